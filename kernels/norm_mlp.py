"""The relu^2 MLP from the residual stream back into it: norm, MLP, residual mix, without a normalised activation.

    r = 1 / sqrt(mean(x^2) + 2^-23);  y = relu(r x W_fc^T)^2;  out = lam (x + y W_proj^T) + mu x0

The first product (`kernels.mlp`) scales its rows by r, the second (`kernels.residual_linear`) mixes in its epilogue.
Backward, dpre' = r (g W_proj) 2 sqrt(y), whose epilogue also sums up `share` = r <dpre, pre> = 2 r <g W_proj, y> by
rows: the norm's gradient, and with 1 / 2r the branch's part of dlam. Then, by `kernels.residual_stream`:

    dx = lam (dpre' W_fc + g - r share / D x);  dW_fc = lam dpre'^T x;  dW_proj = lam g^T y
    dx0 = mu g;  dlam = <g, x> + sum(share / 2r);  dmu = <g, x0>

Bytes, elements of b bytes, widths D and N: forward read x twice and x0, write y, read y, write out: M (4 D + 2 N) b.
Backward read g and y, write dpre'; g and y again for dW_proj; dpre' and x twice, g and x0, write dx and dx0: M (7 D + 5
N) b. The weights come on top. Operations: two products of 2 M D N forward, four backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import mlp, residual_linear, residual_stream
from hotloop.kernels.dispatch import KernelError, choose
from hotloop.kernels.residual_norm import residual_rms_norm
from hotloop.kernels.residual_stream import DTYPES, Norm, Squares, check_mix, normalized, squares_of
from hotloop.kernels.weight_gradient import weight_gradient

__all__ = ["norm_mlp_relu2"]


@torch.library.custom_op("hotloop::norm_mlp_relu2", mutates_args=())
def _op(
    x: Tensor, partial: Tensor, w_fc: Tensor, w_proj: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, x0 [M, D], partial fp32 [S, M], w_fc [N, D], w_proj [D, N] -> out [M, D], its squares, y [M, N]."""
    y, _ = mlp.launch(x, w_fc, None, partial)
    return *residual_linear.launch(y, w_proj, x, x0, lam, mu), y


@_op.register_fake
def _(
    x: Tensor, partial: Tensor, w_fc: Tensor, w_proj: Tensor, x0: Any, lam: Any, mu: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n = w_fc.shape[0]
    return torch.empty_like(x), residual_linear.squares_like(x, n), x.new_empty(x.shape[0], n)


@torch.library.custom_op("hotloop::norm_mlp_relu2_dpre", mutates_args=())
def _dpre_op(g: Tensor, w_proj: Tensor, y: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    """g [M, D], w_proj [D, N], y [M, N], partial fp32 [S, M] -> dpre' [M, N], share fp32 [P, M]."""
    return mlp.launch(g, w_proj, y, partial)


@_dpre_op.register_fake
def _(g: Tensor, w_proj: Tensor, y: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), mlp.empty_share(g, y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, g: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    x, partial, w_fc, w_proj, x0, lam, mu, y = ctx.saved_tensors
    g = g.contiguous()
    dpre, share = _dpre_op(g, w_proj, y, partial)
    dx, dx0, sums = residual_stream.gradient(dpre, w_fc, g, x, x0, lam, mu, partial, share, None, None)
    dw_fc, dw_proj = weight_gradient(dpre, x), weight_gradient(g, y)
    if x0 is None:
        return dx, None, dw_fc, dw_proj, None, None, None
    dlam = sums[0] + (share.sum(0) / (2 * residual_stream.reciprocal_root(partial, x.shape[1]))).sum()
    dw_fc, dw_proj = ((lam * dw.float()).to(dw.dtype) for dw in (dw_fc, dw_proj))
    return dx, None, dw_fc, dw_proj, dx0, dlam.to(lam.dtype), sums[1].to(mu.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.norm_mlp_relu2)
def _flops(x: Any, partial: Any, w_fc: Any, *args: Any, **kwargs: Any) -> int:
    return int(4 * x[0] * x[1] * w_fc[0])


@register_flop_formula(torch.ops.hotloop.norm_mlp_relu2_dpre)
def _dpre_flops(g: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * g[0] * g[1] * w_proj[1])


def norm_mlp_relu2(
    x: Tensor,
    norm: Norm,
    w_fc: Tensor,
    w_proj: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
    *,
    fp8: str = "",
) -> tuple[Tensor, Norm]:
    """Norm, relu^2 MLP, residual mix, and what the next norm takes; see `reference`.

    Args:
        x: [..., D], the residual stream; under autocast it, x0 and the weights are taken in the autocast dtype.
        norm: of x, from the function that made it. A normalised tensor is served by `mlp_relu2` and
            `residual_rms_norm`.
        w_fc: [N, D]; w_proj: [D, N].
        x0: of x's shape and dtype, mixed in; comes with lam and mu.
        lam, mu: scalars [] on x's device, of a floating dtype.
        fp8: as `mlp_relu2`, which then serves it.

    Returns:
        lam (x + MLP(norm(x))) + mu x0, and its norm.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    check_mix("norm_mlp_relu2", x, x0, lam, mu)
    if fp8 or not (choose("norm_mlp_relu2", x.device.type) and isinstance(norm, Squares)):
        return residual_rms_norm(x, mlp.mlp_relu2(normalized(x, norm), w_fc, w_proj, fp8=fp8), x0, lam, mu)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_fc, w_proj = x.to(dtype), w_fc.to(dtype), w_proj.to(dtype)
        x0 = None if x0 is None else x0.to(dtype)
    if x.dtype not in DTYPES or w_fc.dtype != x.dtype or w_proj.dtype != x.dtype:
        raise KernelError(
            f"norm_mlp_relu2 serves bfloat16, float16 and float32, all alike, not {x.dtype}, {w_fc.dtype}, "
            f"{w_proj.dtype}"
        )
    if w_fc.ndim != 2 or w_fc.shape[1] != x.shape[-1] or w_proj.shape != w_fc.T.shape:
        raise KernelError(
            f"norm_mlp_relu2 needs x [..., D], w_fc [N, D] and w_proj [D, N], not {list(x.shape)}, {list(w_fc.shape)}, "
            f"{list(w_proj.shape)}"
        )
    flat, x0 = (None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, x0))
    out, partial, _y = _op(
        flat, squares_of("norm_mlp_relu2", x, norm), w_fc.contiguous(), w_proj.contiguous(), x0, lam, mu
    )
    return out.view(x.shape), Squares(partial)
