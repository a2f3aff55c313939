"""A bias-free linear layer whose weight's gradient is summed in a fixed number of parts, in fixed order.

    y = x W^T;  dx = dy W;  dW = dy^T x

dW [N, D] of a small model has fewer tiles than a GPU has multiprocessors (512 x 512: eight of 128 x 256), while its sum
over M tokens is long. So each tile's sum is cut into parts, fixed by the shape alone; each part is a program that
writes fp32, and a second kernel adds the parts in order: no atomics, the same bits each time. y and dx are the vendor
library's. The other operators with a weight form dW by `weight_gradient` too, while `linear` is on.

Bytes, elements of b bytes, S parts: read dy and x, write dW: M (N + D) b + N D b, and 8 S N D between the two kernels
where S > 1. Operations: 2 M N D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES, BY_DESCRIPTORS
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, choose
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.gemm import product

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.gemm.product import dot, load_tile, tile_order

__all__ = [
    "NAME",
    "compile_cases",
    "config_key",
    "default_config",
    "find",
    "linear",
    "parts",
    "search_space",
    "weight_gradient",
]

NAME = "linear"

MULTIPROCESSORS = 132  # H100, H200; a constant, so that one shape is one order of summation on every GPU
OVERHEAD = 16  # what a program costs beside its sum, in steps of DEPTH: an estimate; whole waves decide
MOST_PARTS = 64
BLOCK = 1024
WIDE = 64  # a weight of fewer rows or columns is left to the vendor


def config_key(n: int, d: int) -> str:
    """What is tuned apart: the gradient's shape."""
    return f"{n}x{d}"


def default_config(modern: bool = True) -> dict[str, int]:
    """128 x 256 by descriptors where the accumulator is the tensor core's (sm_90, sm_100), else 128 x 128."""
    return product.default_config(2 * product.SHORT, modern) | {"VENDOR": 0, "GROUP": 8}


def search_space() -> list[dict[str, int]]:
    """Configurations worth timing on Hopper, the vendor library's product among them."""
    shapes = ((128, 256, 8), (256, 128, 8), (128, 128, 4), (128, 128, 8), (64, 256, 4))
    ours = product.search_space(shapes, (4, 8), ((64, 3), (64, 4), (128, 2)))
    return [{"VENDOR": 1, "TMA": 0}, *(config | {"VENDOR": 0} for config in ours)]


def parts(m: int, n: int, d: int, rows: int, columns: int, depth: int) -> int:
    """Into how many parts a sum over m tokens is cut: what fills whole waves of programs best, the fewest at a tie."""
    tiles, steps = -(-n // rows) * -(-d // columns), -(-m // depth)

    def cost(s: int) -> int:
        return -(-tiles * s // MULTIPROCESSORS) * (-(-steps // s) + OVERHEAD)

    return min(range(1, max(1, min(MOST_PARTS, steps // OVERHEAD)) + 1), key=cost)


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _weight_gradient_kernel(
        dy, x, out_ptr, M, N, D, SPAN,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """dy [M, N], x [M, D] -> out [parts, N, D]: the sum over tokens part SPAN and on; SPAN a multiple of DEPTH."""
        tile_n, tile_d = tile_order(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(D, COLUMNS), GROUP)
        first = tl.program_id(1) * SPAN
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(first, tl.minimum(first + SPAN, M), DEPTH):
            left = load_tile(dy, start, tile_n * ROWS, M, N, DEPTH, ROWS, TMA).T
            right = load_tile(x, start, tile_d * COLUMNS, M, D, DEPTH, COLUMNS, TMA)
            total = dot(left, right, total)
        row = tile_n * ROWS + tl.arange(0, ROWS)
        column = tile_d * COLUMNS + tl.arange(0, COLUMNS)
        at = (tl.program_id(1) * N + row).to(tl.int64)[:, None] * D + column[None, :]
        inside = (row < N)[:, None] & (column < D)[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_parts_kernel(part_ptr, out_ptr, PARTS, SIZE, BLOCK: tl.constexpr):
        """part fp32 [PARTS, SIZE] -> out [SIZE], added in order."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        total = tl.zeros([BLOCK], tl.float32)
        p_part = part_ptr + at
        for _ in range(0, PARTS):
            total += tl.load(p_part, mask=inside, other=0.0)
            p_part += SIZE
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """The product for 16-bit elements, of one part and of several, default and tuned; and the sum."""
    cases = []
    defaults = [(default_config(False), tuple(ARCHITECTURES)), (default_config(), BY_DESCRIPTORS)]
    for given, capabilities in [*defaults, *tuning.of_all_gpus("weight_gradient")]:
        if given["VENDOR"]:
            continue
        config = {k: v for k, v in given.items() if k != "VENDOR"}
        tiles = {"dy": (config["DEPTH"], config["ROWS"]), "x": (config["DEPTH"], config["COLUMNS"])}
        for out in ("fp32", "bf16"):
            words, types = f"{product.tile_name(config)} to {out}", {f"*{out}": "out_ptr", "i32": "M N D SPAN"}
            cases.append(product.case(words, _weight_gradient_kernel, config, capabilities, types, tiles))
    signature = {"part_ptr": "*fp32", "out_ptr": "*bf16", "PARTS": "i32", "SIZE": "i32"}
    return [*cases, CompileCase("sum of parts", _sum_parts_kernel, signature, {"BLOCK": BLOCK}, {"num_warps": 4})]


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::weight_gradient", mutates_args=())
def _gradient_op(dy: Tensor, x: Tensor) -> Tensor:
    """dy [M, N], x [M, D] -> dy^T x [N, D]."""
    (m, n), d = dy.shape, x.shape[1]
    config = dict(product.launch_config("weight_gradient", config_key(n, d), default_config, x.dtype, n, d))
    if config.pop("VENDOR"):
        return dy.T @ x
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if not m or not out.numel():
        return out.zero_()
    count = parts(m, n, d, rows, columns, depth)
    span = -(-m // (count * depth)) * depth
    count = -(-m // span)
    part = out if count == 1 else torch.empty(count, n, d, dtype=torch.float32, device=x.device)
    _weight_gradient_kernel[(-(-n // rows) * -(-d // columns), count)](
        product.operand(dy, depth, rows, tma), product.operand(x, depth, columns, tma), part, m, n, d, span, **config
    )
    if count > 1:
        _sum_parts_kernel[(-(-n * d // BLOCK),)](part, out, count, n * d, BLOCK=BLOCK, num_warps=4)
    return out


@_gradient_op.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1])


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy [M, N], x [M, D] of one dtype -> dy^T x [N, D]: in parts while `linear` is on, else the vendor library's."""
    if not choose("linear", x.device.type):
        return dy.T @ x
    made: Tensor = _gradient_op(dy.contiguous(), x.contiguous())
    return made


@torch.library.custom_op("hotloop::linear", mutates_args=())
def _op(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, D], weight [N, D] -> [M, N]."""
    return F.linear(x, weight)


@_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return dy @ weight, weight_gradient(dy, x)


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.linear)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


@register_flop_formula(torch.ops.hotloop.weight_gradient)
def _gradient_flops(dy: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dy[0] * dy[1] * x[1])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the weight's type: x [..., D], weight [N, D] -> [..., N]."""
    out: Tensor = _op(x.reshape(-1, x.shape[-1]).to(weight.dtype).contiguous(), weight.contiguous())
    return out.view(*x.shape[:-1], weight.shape[0])


# ---- pattern ------------------------------------------------------------------------------------------------------


def _in(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(x, weight.to(dtype))


def find(graph: Graph) -> tuple[list[Found], int]:
    """What is left of products with a weight that learns, of WIDE columns or more each way."""
    found = []
    for node, given, nodes in graph.matches(reference.linear):
        x, weight, out = given["x"].value, given["weight"].value, node.meta["example_value"]
        fits = len(nodes) == 1 and weight.ndim == 2 and min(weight.shape) >= WIDE and weight.requires_grad
        if fits and x.ndim and graph.fits(nodes, [node], given, out.dtype):
            found.append(Found(NAME, [node], nodes, given | {"dtype": out.dtype}, _in, counts=(NAME,)))
            graph.taken |= nodes
    return found, sum(node.target is F.linear for node in graph.nodes)
