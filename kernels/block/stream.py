"""The residual stream x without its normalised copies: what a product that reads norm(x) gives back to x.

    r = 1 / sqrt(mean(x^2) + 2^-23);  pre = (r x) W^T;  dpre' = r dpre
    dx = dpre' W + g - r^2 <dpre, pre> / D x [+ dgate' W_gate];  dW = dpre'^T x

The norm has no gain, so r is one number a row: the product that reads x scales by it in its epilogue, and the product
that makes x leaves what it takes, sums of squares of each row by tiles of columns: fp32 [S, M]. Backward, <dn, n> =
<dpre W, n> = <dpre, pre>, again one number a row, which whoever forms dpre sums up (`share`, times r); so the norm's
gradient is an epilogue too, and it adds the stream's own gradient g on the way. Where x was mixed on, out = lam (x +
branch) + mu x0, all of dx takes a lam, and the same pass gives dx0 = mu g, <g, x> and <g, x0>. The algebra in fp64 is
in `tests/kernels/test_norm_free.py`.

Bytes of the gradient, elements of b bytes, dpre [M, N], x [M, D]: read dpre, g, x, write dx: M (N + 3 D) b, and read
x0, write dx0 where mixed. Operations: 2 M N D.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase
from hotloop.kernels.gemm import product

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.gemm.product import halves, multiply, tile_order

__all__ = [
    "DTYPES",
    "compile_cases",
    "default_config",
    "gradient",
    "mixes",
    "reciprocal_root",
    "search_space",
    "squares",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def squares(x: Tensor) -> Tensor:
    """Of any x [..., D]: fp32 [1, M]. No gradient: that of the norm goes to x where the squares are used."""
    return x.detach().float().square().sum(-1).view(1, -1)


def reciprocal_root(partial: Tensor, dim: int) -> Tensor:
    """fp32 [S, M] -> fp32 [M], 1 / sqrt(mean(x^2) + 2^-23)."""
    return (partial.sum(0) / dim + reference.NORM_EPS).rsqrt()


def launch_config(dtype: torch.dtype, width: int, dim: int) -> dict[str, int]:
    """Tile, warps and stages for a sum over `width`: as tuned on this GPU, else by architecture."""
    default = functools.partial(default_config, width)
    return product.launch_config("stream_gradient", product.config_key(width), default, dtype, width, dim)


default_config = product.default_config


def search_space(width: int) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    return product.search_space(product.tiles(width))


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def row_sum(partial_ptr, row, PARTS, M, ROWS: tl.constexpr):
        """partial fp32 [PARTS, M] -> the sums of rows, fp32 [ROWS], added in order."""
        total = tl.zeros([ROWS], tl.float32)
        for part in range(0, PARTS):
            total += tl.load(partial_ptr + part * M + row, mask=row < M, other=0.0)
        return total

    @triton.jit
    def row_root(squares_ptr, row, PARTS, M, D, eps, ROWS: tl.constexpr):
        """1 / sqrt(mean(x^2) + eps) of rows of D, fp32 [ROWS]."""
        return tl.rsqrt(row_sum(squares_ptr, row, PARTS, M, ROWS) / D + eps)

    @triton.jit
    def _gradient_part(
        total, row, column, lam, mu, back, g_ptr, x_ptr, x0_ptr, dgate_ptr, w_gate_ptr, dx_ptr, dx0_ptr, M, D, CHANNELS,
        MIX: tl.constexpr, GATES: tl.constexpr,
    ):  # fmt: skip
        """A part of a tile; (its share of <g, x>, of <g, x0>)."""
        inside = (row < M)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += g - back[:, None] * x
        if MIX:
            total *= lam
        for gate in tl.static_range(GATES):
            left = tl.load(dgate_ptr + row * GATES + gate, mask=row < M, other=0.0).to(tl.float32)
            right = tl.load(w_gate_ptr + gate * CHANNELS + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
            total += left[:, None] * right[None, :]
        tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=inside)
        of_x = 0.0
        of_x0 = 0.0
        if MIX:
            of_x = tl.sum(tl.sum(g * x, 1), 0)
            x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            of_x0 = tl.sum(tl.sum(g * x0, 1), 0)
            tl.store(dx0_ptr + at, (mu * g).to(dx0_ptr.dtype.element_ty), mask=inside)
        return of_x, of_x0

    @triton.jit
    def _stream_gradient_kernel(
        dpre, w, g_ptr, x_ptr, x0_ptr, lam_ptr, mu_ptr, squares_ptr, share_ptr, dgate_ptr, w_gate_ptr, dx_ptr, dx0_ptr,
        partial_ptr, M, N, D, PARTS, SHARES, CHANNELS, eps,
        MIX: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """dpre [M, N] times r, w [N, D], g, x, x0 [M, D]; squares fp32 [PARTS, M]; share fp32 [SHARES, M], adding up to
        r <dpre, pre>; dgate [M, GATES] times r, w_gate [GATES, CHANNELS] -> dx, dx0 [M, D]; partial fp32 [tiles, 2].
        """
        tile_m, tile_d = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(D, COLUMNS), GROUP)
        first = tile_m * ROWS
        column = tile_d * COLUMNS
        total = multiply(dpre, w, first, column, M, D, N, ROWS, COLUMNS, DEPTH, TMA, False)
        lam = tl.load(lam_ptr).to(tl.float32) if MIX else 1.0
        mu = tl.load(mu_ptr).to(tl.float32) if MIX else 0.0
        row = first + tl.arange(0, ROWS)
        r = row_root(squares_ptr, row, PARTS, M, D, eps, ROWS)
        back = r * row_sum(share_ptr, row, SHARES, M, ROWS) / D
        # In quarters, so that what the epilogue loads fits beside the accumulator.
        at = column + tl.arange(0, COLUMNS // 4)
        of_x = 0.0
        of_x0 = 0.0
        left, right = halves(total, ROWS, COLUMNS)
        for side in tl.static_range(2):
            half = left
            if side == 1:
                half = right
            one, other = halves(half, ROWS, COLUMNS // 2)
            start = at + side * (COLUMNS // 2)
            a, b = _gradient_part(one, row, start, lam, mu, back, g_ptr, x_ptr, x0_ptr, dgate_ptr, w_gate_ptr, dx_ptr,
                                  dx0_ptr, M, D, CHANNELS, MIX, GATES)  # fmt: skip
            c, d = _gradient_part(other, row, start + COLUMNS // 4, lam, mu, back, g_ptr, x_ptr, x0_ptr, dgate_ptr,
                                  w_gate_ptr, dx_ptr, dx0_ptr, M, D, CHANNELS, MIX, GATES)  # fmt: skip
            of_x += a + c
            of_x0 += b + d
        if MIX:
            tl.store(partial_ptr + tl.program_id(0) * 2, of_x)
            tl.store(partial_ptr + tl.program_id(0) * 2 + 1, of_x0)


def compile_cases() -> list[CompileCase]:
    """For 16-bit elements: plain, mixed, and with gates; default and tuned."""
    types = {
        "*bf16": "g_ptr x_ptr x0_ptr dgate_ptr w_gate_ptr dx_ptr dx0_ptr", "i32": "M N D PARTS SHARES CHANNELS",
        "*fp32": "lam_ptr mu_ptr squares_ptr share_ptr partial_ptr", "fp32": "eps",
    }  # fmt: skip
    cases = []
    for config, capabilities in product.shipped("stream_gradient", default_config):
        tiles = {"dpre": (config["ROWS"], config["DEPTH"]), "w": (config["DEPTH"], config["COLUMNS"])}
        for mix, gates in ((False, 0), (True, 0), (False, 4)):
            words = f"{'mixed' if mix else 'plain'}{' gates' if gates else ''} {product.tile_name(config)}"
            way = {"MIX": mix, "GATES": gates}
            cases.append(product.case(words, _stream_gradient_kernel, config, capabilities, types, tiles, way))
    return cases


# ---- operator ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::stream_gradient", mutates_args=())
def gradient(
    dpre: Tensor, weight: Tensor, g: Tensor, x: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None,
    partial: Tensor, share: Tensor, dgate: Tensor | None, w_gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of x: dpre [M, N] (times r), weight [N, D], g and x [M, D]; x0 [M, D], lam and mu [] where x was
    mixed on; partial fp32 [S, M]; share fp32 [P, M], which adds up to r <dpre, pre>; dgate [M, G] (times r) and w_gate
    [G, C] where the first C columns of x gate something.

    Returns:
        dx [M, D]; dx0 [M, D], or empty; fp32 [2]: <g, x> and <g, x0>, zeros where not mixed.
    """
    (m, n), d = dpre.shape, x.shape[1]
    config = launch_config(x.dtype, n, d)
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    tiles = -(-m // rows) * -(-d // columns)
    dx, dx0 = torch.empty_like(x), torch.empty_like(x) if x0 is not None else x.new_empty(0)
    sums = torch.empty(tiles if x0 is not None else 0, 2, dtype=torch.float32, device=x.device)
    if tiles:
        _stream_gradient_kernel[(tiles,)](
            product.operand(dpre, rows, depth, tma), product.operand(weight, depth, columns, tma), g, x,
            x if x0 is None else x0, x if lam is None else lam, x if mu is None else mu, partial, share,
            x if dgate is None else dgate, x if w_gate is None else w_gate, dx, dx0 if x0 is not None else x,
            sums if x0 is not None else partial, m, n, d, partial.shape[0], share.shape[0],
            0 if w_gate is None else w_gate.shape[1], reference.NORM_EPS,
            MIX=x0 is not None, GATES=0 if dgate is None else dgate.shape[1], **config,
        )  # fmt: skip
    return dx, dx0, sums.sum(0)


@gradient.register_fake
def _(
    dpre: Tensor, weight: Tensor, g: Tensor, x: Tensor, x0: Any, lam: Any, mu: Any, partial: Tensor, share: Tensor,
    dgate: Any, w_gate: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx0 = torch.empty_like(x) if x0 is not None else x.new_empty(0)
    return torch.empty_like(x), dx0, x.new_empty(2, dtype=torch.float32)


@register_flop_formula(torch.ops.hotloop.stream_gradient)
def _flops(dpre: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dpre[0] * dpre[1] * weight[1])


# ---- what the patterns of a block share ---------------------------------------------------------------------------


def mixes(x: Tensor, out: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None) -> bool:
    """Whether `out` can be lam (x + branch) + mu x0: tensors of one shape and type, and scalars on their device."""
    alike = (t is None or (t.shape == out.shape and t.dtype == out.dtype) for t in (x, x0))
    scalars = (t is None or (not t.ndim and t.is_floating_point() and t.device == out.device) for t in (lam, mu))
    return all(alike) and all(scalars)
