"""The relu^2 MLP: two products whose epilogues do what lies between them.

    y = relu(x W_fc^T)^2;  out = y W_proj^T

Forward, the first product's epilogue squares, so the pre-activation is never written. Backward needs only y:
relu(pre) = sqrt(y), so dpre = (dout W_proj) 2 sqrt(y), in the epilogue of the product that forms dout W_proj. The
products out and dx are the vendor library's, dW_proj and dW_fc too unless `linear` is on.

Bytes, elements of b bytes, M tokens, widths D and N: forward read x, write y, read y, write out: M (2 D + 2 N) b.
Backward read dout and y, write dpre; dout and y again for dW_proj; dpre twice, x, write dx: M (4 D + 5 N) b. The
weights come on top. Operations: two products of 2 M D N forward, four backward.

In 8 bits (`fp8`) both products are `linear_fp8`'s, and what lies between them is plain PyTorch, for torch.compile to
fuse with the scales and the rounding of the second product's input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import product, reference
from hotloop.kernels.architectures import BY_DESCRIPTORS
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose
from hotloop.kernels.fp8 import linear_fp8
from hotloop.kernels.weight_gradient import weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.product import dot, halves, load_tile, tile_order
    from hotloop.kernels.residual_stream import row_root

__all__ = ["compile_cases", "default_config", "empty_share", "launch", "launch_config", "mlp_relu2", "search_space"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def launch_config(dtype: torch.dtype, dim: int, width: int) -> dict[str, int]:
    """Tile, warps and stages of both directions, which are tuned as one: on this GPU, else by architecture. Both sum
    over `dim`.
    """
    default = functools.partial(default_config, dim)
    return product.launch_config("mlp_product", product.config_key(dim), default, dtype, dim, width)


def default_config(dim: int, modern: bool = True) -> dict[str, int]:
    """By descriptors where the accumulator is the tensor core's (Hopper and later), there 128 x 256 for long sums, else
    128 x 128. PROGRAMS for each multiprocessor, each walking over tiles, or 0 for one a tile.
    """
    return {
        "ROWS": 128, "COLUMNS": 256 if modern and dim > product.SHORT else 128, "DEPTH": 64 if modern else 32,
        "GROUP": 16, "TMA": int(modern), "PROGRAMS": 0, "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def persistent(config: dict[str, int]) -> dict[str, int]:
    """The same tile with as many programs as a multiprocessor has room for."""
    return config | {"PROGRAMS": 2 if config["ROWS"] * config["COLUMNS"] <= 128 * 128 else 1}


def search_space(dim: int) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    plain = [
        {
            "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": group, "TMA": tma, "PROGRAMS": 0,
            "num_warps": warps, "num_stages": stages,
        }
        for rows, columns, warps in product.tiles(dim)
        for depth, stages in ((64, 3), (64, 4), (32, 4))
        for group in (8, 16)
        for tma in (1, 0)
    ]  # fmt: skip
    return [*plain, *(persistent(config) for config in plain if config["TMA"])]


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _mlp_product_kernel(
        a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps,
        BACKWARD: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        GROUP: tl.constexpr, TMA: tl.constexpr, PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        """Forward: a = x [M, D], w = W_fc [N, D] -> out = relu(a w^T)^2 [M, N].
        Backward: a = dout [M, D], w = W_proj [D, N], y [M, N] -> out = (a w) 2 sqrt(y) [M, N].

        NORM: the a of the forward pass was x, not norm(x). By squares fp32 [PARTS, M] each row is scaled by r, which
        normalises it; backward, share fp32 [halves of tiles of N, M] becomes the rows' sums of out relu(pre): r <dpre,
        pre>.
        """
        if PROGRAMS:  # each walks over tiles, and loads for the next while it finishes one
            tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, COLUMNS)
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
                _mlp_tile(tile, a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps, BACKWARD, NORM, ROWS,
                          COLUMNS, DEPTH, GROUP, TMA)  # fmt: skip
        else:
            _mlp_tile(tl.program_id(0), a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps, BACKWARD,
                      NORM, ROWS, COLUMNS, DEPTH, GROUP, TMA)  # fmt: skip

    @triton.jit
    def _mlp_tile(
        tile, a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps,
        BACKWARD: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        tile_m, tile_n = tile_order(tile, tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
        first = tile_m * ROWS
        column = tile_n * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, DEPTH):
            a_tile = load_tile(a, first, start, M, D, ROWS, DEPTH, TMA)
            if BACKWARD:
                w_tile = load_tile(w, start, column, D, N, DEPTH, COLUMNS, TMA)
            else:
                w_tile = load_tile(w, column, start, N, D, COLUMNS, DEPTH, TMA).T
            total = dot(a_tile, w_tile, total)
        row = first + tl.arange(0, ROWS)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if NORM:
            scale = row_root(squares_ptr, row, PARTS, M, D, eps, ROWS)
        # In two halves, so that the epilogue's temporaries fit beside the accumulator.
        left, right = halves(total, ROWS, COLUMNS)
        at = column + tl.arange(0, COLUMNS // 2)
        p_share = share_ptr + tile_n * 2 * M
        _finish(left, row, at, scale, y_ptr, out_ptr, p_share, M, N, BACKWARD, NORM)
        _finish(right, row, at + COLUMNS // 2, scale, y_ptr, out_ptr, p_share + M, M, N, BACKWARD, NORM)

    @triton.jit
    def _finish(
        total, row, column, scale, y_ptr, out_ptr, p_share, M, N, BACKWARD: tl.constexpr, NORM: tl.constexpr
    ):  # fmt: skip
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        if BACKWARD:
            active = tl.sqrt(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32))
            result = total * (2.0 * active)
            if NORM:
                result *= scale[:, None]
                tl.store(p_share + row, tl.sum(result * active, 1), mask=row < M)
        else:
            if NORM:
                total *= scale[:, None]
            active = tl.maximum(total, 0.0)
            result = active * active
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """Both directions for 16-bit elements, of normalised rows and of others: default and tuned."""
    cases = []
    for backward, norm in ((False, False), (True, False), (False, True), (True, True)):
        key = f"{'backward' if backward else 'forward'}{' norm' if norm else ''} 16 bit"
        shipped = product.shipped("mlp_product", default_config)
        shipped += [(persistent(config), given) for config, given in shipped if given == BY_DESCRIPTORS]
        for config, capabilities in shipped:
            constants = {"BACKWARD": backward, "NORM": norm} | config
            options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
            signature = dict.fromkeys(("a", "w", "y_ptr", "out_ptr"), "*bf16")
            signature |= dict.fromkeys(("squares_ptr", "share_ptr"), "*fp32") | {"eps": "fp32"}
            signature |= {"M": "i32", "N": "i32", "D": "i32", "PARTS": "i32"}
            rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
            if config["TMA"]:
                signature["a"] = f"tensordesc<bf16[{rows},{depth}]>"
                signature["w"] = (
                    f"tensordesc<bf16[{depth},{columns}]>" if backward else f"tensordesc<bf16[{columns},{depth}]>"
                )
            name = f"{key} {product.tile_name(config)}{' persistent' if config['PROGRAMS'] else ''}"
            name += f" warps={options['num_warps']} stages={options['num_stages']}"
            case = CompileCase(
                name, _mlp_product_kernel, signature, constants, options, capabilities, tensor_cores=True
            )
            cases.append(case)
    return cases


def launch(a: Tensor, w: Tensor, y: Tensor | None, partial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a [M, D], w -> [M, N]; with y the backward product. With the forward pass's `partial` sums of squares fp32 [S, M]
    of rows yet to be normalised, each is scaled by r; backward, r <dpre, pre> follows, fp32 [halves of tiles of N, M].
    """
    m, d = a.shape
    n = w.shape[0] if y is None else w.shape[1]
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    config = launch_config(a.dtype, d, n)
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    share = empty_share(a, n) if partial is not None and y is not None else out
    if m:
        tiles = -(-m // rows) * -(-n // columns)
        _mlp_product_kernel[product.grid(tiles, config["PROGRAMS"], a.device)](
            product.operand(a, rows, depth, tma),
            product.operand(w, *((columns, depth) if y is None else (depth, columns)), tma),
            a if y is None else y, out, a if partial is None else partial, share, m, n, d,
            0 if partial is None else partial.shape[0], reference.NORM_EPS, BACKWARD=y is not None,
            NORM=partial is not None, **config,
        )  # fmt: skip
    return out, share


def empty_share(a: Tensor, n: int) -> Tensor:
    """For a product of a [M, D] with N columns."""
    tiles = -(-n // launch_config(a.dtype, a.shape[1], n)["COLUMNS"])
    return torch.empty(2 * tiles, a.shape[0], dtype=torch.float32, device=a.device)


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::mlp_relu2_dpre", mutates_args=())
def _dpre_op(dout: Tensor, w_proj: Tensor, y: Tensor) -> Tensor:
    """dout [M, D], w_proj [D, N], y [M, N] -> gradient of the pre-activation [M, N]."""
    return launch(dout, w_proj, y)[0]


@_dpre_op.register_fake
def _(dout: Tensor, w_proj: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("hotloop::mlp_relu2", mutates_args=())
def _op(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, D], w_fc [N, D], w_proj [E, N] -> (out [M, E], y [M, N])."""
    y = launch(x, w_fc, None)[0]
    return y @ w_proj.T, y


@_op.register_fake
def _(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w_proj.shape[0]), x.new_empty(x.shape[0], w_fc.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_fc, w_proj, y = ctx.saved_tensors
    if dout is None:
        return None, None, None
    dout = dout.contiguous()
    dpre = _dpre_op(dout, w_proj, y)
    return dpre @ w_fc, weight_gradient(dpre, x), weight_gradient(dout, y)


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.mlp_relu2)
def _flops(x: Any, w_fc: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * w_fc[0] * (x[1] + w_proj[0]))


@register_flop_formula(torch.ops.hotloop.mlp_relu2_dpre)
def _dpre_flops(dout: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dout[0] * dout[1] * w_proj[1])


# ---- public function --------------------------------------------------------------------------------------------


def mlp_relu2(x: Tensor, w_fc: Tensor, w_proj: Tensor, *, fp8: str = "") -> Tensor:
    """relu(x W_fc^T)^2 W_proj^T; see `reference`.

    Args:
        x: [..., D]; under autocast it and the weights are taken in the autocast dtype.
        w_fc: [N, D]; w_proj: [E, N].
        fp8: `bf16` or `e5m2`: both products by `linear_fp8`, with that backward pass; "" for none.

    Returns:
        [..., E].

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if fp8:
        pre = linear_fp8(x, w_fc, fp8)
        return linear_fp8(F.relu(pre).square().to(pre.dtype), w_proj, fp8)
    if not choose("mlp_relu2", x.device.type):
        return reference.mlp_relu2(x, w_fc, w_proj)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_fc, w_proj = x.to(dtype), w_fc.to(dtype), w_proj.to(dtype)
    shapes = f"x {list(x.shape)}, w_fc {list(w_fc.shape)}, w_proj {list(w_proj.shape)}"
    if x.dtype not in DTYPES or w_fc.dtype != x.dtype or w_proj.dtype != x.dtype:
        raise KernelError(
            f"mlp_relu2 serves bfloat16, float16 and float32, all alike, not {x.dtype}, {w_fc.dtype}, {w_proj.dtype}"
        )
    if w_fc.ndim != 2 or w_proj.ndim != 2 or w_fc.shape[1] != x.shape[-1] or w_proj.shape[1] != w_fc.shape[0]:
        raise KernelError(f"mlp_relu2 needs x [..., D], w_fc [N, D] and w_proj [E, N], not {shapes}")
    out: Tensor = _op(x.flatten(0, -2).contiguous(), w_fc.contiguous(), w_proj.contiguous())[0]
    return out.view(*x.shape[:-1], w_proj.shape[0])
