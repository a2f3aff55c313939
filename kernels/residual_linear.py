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
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import product
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose
from hotloop.kernels.residual_norm import residual_rms_norm
from hotloop.kernels.residual_stream import DTYPES, Norm, Squares, check_mix, default_config, search_space
from hotloop.kernels.weight_gradient import linear, weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.product import dot, halves, load_tile, tile_order

__all__ = ["compile_cases", "default_config", "launch", "linear_residual", "search_space", "squares_like"]


def launch_config(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile, warps and stages for a sum over `width`: as tuned on this GPU, else by architecture."""
    default = functools.partial(default_config, width)
    return product.launch_config("linear_residual", product.config_key(width), default, dtype, width)


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
    def _linear_residual_kernel(
        a, w, x_ptr, x0_ptr, lam_ptr, mu_ptr, out_ptr, squares_ptr, M, N, D,
        MIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
        TMA: tl.constexpr,
    ):  # fmt: skip
        """a [M, N], w [D, N], x, x0 [M, D]; lam, mu fp32 [] -> out [M, D], squares fp32 [tiles of D, M]."""
        tile_m, tile_d = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(D, COLUMNS), GROUP)
        first = tile_m * ROWS
        column = tile_d * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, N, DEPTH):
            a_tile = load_tile(a, first, start, M, N, ROWS, DEPTH, TMA)
            w_tile = load_tile(w, column, start, D, N, COLUMNS, DEPTH, TMA)
            total = dot(a_tile, w_tile.T, total)
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
    cases = []
    for config, capabilities in product.shipped("linear_residual", default_config):
        for mix in (False, True):
            constants = {"MIX": mix} | config
            options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
            signature = dict.fromkeys(("a", "w", "x_ptr", "x0_ptr", "out_ptr"), "*bf16")
            signature |= dict.fromkeys(("lam_ptr", "mu_ptr", "squares_ptr"), "*fp32")
            signature |= {"M": "i32", "N": "i32", "D": "i32"}
            if config["TMA"]:
                for name, extent in (("a", config["ROWS"]), ("w", config["COLUMNS"])):
                    signature[name] = f"tensordesc<bf16[{extent},{config['DEPTH']}]>"
            key = f"{'mixed' if mix else 'plain'} {product.tile_name(config)} warps={options['num_warps']}"
            key += f" stages={options['num_stages']}"
            cases.append(
                CompileCase(
                    key, _linear_residual_kernel, signature, constants, options, capabilities, tensor_cores=True
                )
            )
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
        _linear_residual_kernel[(-(-m // rows) * -(-d // columns),)](
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


@torch.library.custom_op("hotloop::linear_residual", mutates_args=())
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


@register_flop_formula(torch.ops.hotloop.linear_residual)
def _flops(a: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * weight[0])


# ---- public function --------------------------------------------------------------------------------------------


def linear_residual(
    a: Tensor,
    weight: Tensor,
    x: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Norm]:
    """Projection, residual mix, and what the next norm takes; see `reference`.

    Args:
        a: [..., N]; under autocast it and the weight are taken in the autocast dtype.
        weight: [D, N].
        x: [..., D], the residual stream, of that dtype.
        x0: of x's shape and dtype, mixed in; comes with lam and mu.
        lam, mu: scalars [] on x's device, of a floating dtype.

    Returns:
        lam (x + a W^T) + mu x0, and its norm: `Squares` where the kernel runs, else the normalised tensor.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    check_mix("linear_residual", x, x0, lam, mu)
    if not choose("linear_residual", x.device.type):
        return residual_rms_norm(x, linear(a, weight), x0, lam, mu)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        a, weight, x = a.to(dtype), weight.to(dtype), x.to(dtype)
        x0 = None if x0 is None else x0.to(dtype)
    if x.dtype not in DTYPES or a.dtype != x.dtype or weight.dtype != x.dtype:
        raise KernelError(
            f"linear_residual serves bfloat16, float16 and float32, all alike, not {a.dtype}, {weight.dtype}, {x.dtype}"
        )
    if weight.ndim != 2 or tuple(weight.shape) != (x.shape[-1], a.shape[-1]) or a.shape[:-1] != x.shape[:-1]:
        raise KernelError(
            f"linear_residual needs a [..., N], weight [D, N] and x [..., D], not {list(a.shape)}, "
            f"{list(weight.shape)}, {list(x.shape)}"
        )
    rows, flat = (t.reshape(-1, t.shape[-1]).contiguous() for t in (a, x))
    x0 = None if x0 is None else x0.reshape(flat.shape).contiguous()
    out, partial = _op(rows, weight.contiguous(), flat, x0, lam, mu)
    return out.view(x.shape), Squares(partial)
