"""A projection back into the residual stream, which is mixed and measured in its epilogue.

    out = lam (x + a W^T) + mu x0;  squares[row] = sum(out^2), by tiles of columns

The branch a W^T is never written, and the norm of `out` is left to the next product, which takes `squares`; see
`kernels.residual_stream`. Backward: da = lam g W, dW = lam g^T a, dx = lam g, dx0 = mu g, dmu = <g, x0>, dlam = <g, x>
+ <g W, a>: the vendor library's products, and without a mix dx is g itself.

Bytes, elements of b bytes, a [M, N], x [M, D]: forward read a, x, x0, write out: M (N + 3 D) b; without a mix M (N + 2
D) b. Backward without a mix, read g and a, write da, then g and a again: M (2 D + 3 N) b. Weights come on top.
Operations: 2 M N D forward, twice that backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels.block.stream import default_config, mixes, search_space
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.fuse.terms import Term
from hotloop.kernels.gemm import product
from hotloop.kernels.gemm.weight_gradient import weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.gemm.product import halves, multiply, tile_order

__all__ = ["NAME", "compile_cases", "default_config", "find", "launch", "residual", "search_space", "squares_like"]

NAME = "residual"


def launch_config(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile, warps and stages for a sum over `width`: as tuned on this GPU, else by architecture."""
    default = functools.partial(default_config, width)
    return product.launch_config("residual", product.config_key(width), default, dtype, width)


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _mixed_half(branch, row, column, lam, mu, x_ptr, x0_ptr, out_ptr, M, D, MIX: tl.constexpr):
        """One half of a tile to its place; the sums of its squares as they are stored, by rows."""
        inside = (row < M)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        out = branch + tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MIX:
            out = lam * out + mu * tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, stored, mask=inside)
        out = tl.where(inside, stored.to(tl.float32), 0.0)
        return tl.sum(out * out, 1)

    @triton.jit
    def _residual_kernel(
        a, w, x_ptr, x0_ptr, lam_ptr, mu_ptr, out_ptr, squares_ptr, M, N, D,
        MIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
        TMA: tl.constexpr,
    ):  # fmt: skip
        """a [M, N], w [D, N], x, x0 [M, D]; lam, mu fp32 [] -> out [M, D], squares fp32 [tiles of D, M]."""
        tile_m, tile_d = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(D, COLUMNS), GROUP)
        first = tile_m * ROWS
        column = tile_d * COLUMNS
        total = multiply(a, w, first, column, M, D, N, ROWS, COLUMNS, DEPTH, TMA, True)
        lam = tl.load(lam_ptr).to(tl.float32) if MIX else 1.0
        mu = tl.load(mu_ptr).to(tl.float32) if MIX else 0.0
        left, right = halves(total, ROWS, COLUMNS)
        row = first + tl.arange(0, ROWS)
        at = column + tl.arange(0, COLUMNS // 2)
        squares = _mixed_half(left, row, at, lam, mu, x_ptr, x0_ptr, out_ptr, M, D, MIX)
        squares += _mixed_half(right, row, at + COLUMNS // 2, lam, mu, x_ptr, x0_ptr, out_ptr, M, D, MIX)
        tl.store(squares_ptr + tile_d * M + row, squares, mask=row < M)


def compile_cases() -> list[CompileCase]:
    """For 16-bit elements, with and without a mix: default and tuned."""
    types = {"*bf16": "x_ptr x0_ptr out_ptr", "*fp32": "lam_ptr mu_ptr squares_ptr", "i32": "M N D"}
    cases = []
    for config, capabilities in product.shipped(NAME, default_config):
        tiles = {"a": (config["ROWS"], config["DEPTH"]), "w": (config["COLUMNS"], config["DEPTH"])}
        for mix in (False, True):
            words = f"{'mixed' if mix else 'plain'} {product.tile_name(config)}"
            cases.append(product.case(words, _residual_kernel, config, capabilities, types, tiles, {"MIX": mix}))
    return cases


def launch(
    a: Tensor, weight: Tensor, x: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a [M, N], weight [D, N], x and x0 [M, D] -> out [M, D], squares fp32 [S, M]."""
    (m, n), d = a.shape, x.shape[1]
    config = launch_config(x.dtype, n)
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    out, partial = torch.empty_like(x), squares_like(x, n)
    if m:
        _residual_kernel[(-(-m // rows) * -(-d // columns),)](
            product.operand(a, rows, depth, tma), product.operand(weight, columns, depth, tma), x,
            x if x0 is None else x0, x if lam is None else lam, x if mu is None else mu, out, partial, m, n, d,
            MIX=x0 is not None, **config,
        )  # fmt: skip
    return out, partial


def squares_like(x: Tensor, n: int) -> Tensor:
    """fp32 [S, M], uninitialised: what a product of [M, N] with a weight [D, N] leaves of x [M, D]."""
    tiles = -(-x.shape[1] // launch_config(x.dtype, n)["COLUMNS"])
    return torch.empty(tiles, x.shape[0], dtype=torch.float32, device=x.device)


# ---- operator ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::residual", mutates_args=())
def _op(
    a: Tensor, weight: Tensor, x: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `launch`."""
    return launch(a, weight, x, x0, lam, mu)


@_op.register_fake
def _(a: Tensor, weight: Tensor, x: Tensor, x0: Any, lam: Any, mu: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), squares_like(x, a.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor, _unused: Any) -> tuple[Tensor | None, ...]:
    a, weight, x, x0, lam, mu = ctx.saved_tensors
    g = g.contiguous()
    if x0 is None:
        return g @ weight, weight_gradient(g, a), g, None, None, None
    wide, of_a = g.float(), (g @ weight).float()
    dlam, dmu = (wide * x).sum() + (of_a * a).sum(), (wide * x0).sum()
    da, dx, dx0 = (y.to(g.dtype) for y in (lam * of_a, lam * wide, mu * wide))
    return da, weight_gradient(dx, a), dx, dx0, dlam.to(lam.dtype), dmu.to(mu.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.residual)
def _flops(a: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * weight[0])


def residual(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """lam (x + a W^T) + mu x0, or x + a W^T, and its squares: a [..., N] and the weight [D, N] are taken in x's type.

    Returns:
        [..., D] of x's type; fp32 [S, M], without a gradient.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = a.to(x.dtype).reshape(len(flat), -1).contiguous()
    x0 = None if x0 is None else x0.reshape(flat.shape).contiguous()
    out, partial = _op(rows, weight.to(x.dtype).contiguous(), flat, x0, lam, mu)
    return out.view(x.shape), partial


# ---- pattern ------------------------------------------------------------------------------------------------------


def _mixed(x: Tensor, a: Tensor, weight: Tensor, x0: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
    return lam * _plain(x, a, weight) + mu * x0


def _plain(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    return x + F.linear(a, weight)


def find(graph: Graph) -> tuple[list[Found], int]:
    """Projections into a stream, with the mix that follows where nothing else takes what is mixed."""
    found = []
    for pattern in (_mixed, _plain):
        for node, given, nodes in graph.matches(pattern):
            values = {name: term.value for name, term in given.items()}
            x, out = values["x"], node.meta["example_value"]
            fits = mixes(x, out, *(values.get(name) for name in ("x0", "lam", "mu"))) and values["weight"].ndim == 2
            fits = fits and values["a"].shape[:-1] == x.shape[:-1]  # nothing is broadcast
            if fits and graph.fits(nodes, [node], given, x.dtype):
                found.append(Found(NAME, [node], nodes, given, residual, gives="squares", counts=(NAME,)))
                graph.taken |= nodes
    return found, len(_places(graph))


def _places(graph: Graph) -> set[fx.Node]:
    """Sums of two tensors of one shape, one of which is a product, times a scalar or not."""

    def is_product(term: Any) -> bool:
        if isinstance(term, Term) and term.op == "mul":
            return any(map(is_product, term.args)) and any(map(_is_scalar, term.args))
        return isinstance(term, Term) and term.op == "linear"

    def is_place(term: Term) -> bool:
        two = term.op == "add" and len(term.nodes) == 1 and not any(map(_is_scalar, term.args))
        return two and any(map(is_product, term.args))

    return {node for node in graph.nodes if is_place(graph.terms[node])}


def _is_scalar(arg: Any) -> bool:
    return not isinstance(arg, Term) or (arg.node is not None and not arg.value.ndim)
