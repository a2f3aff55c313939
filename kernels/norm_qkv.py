"""The QKV projection from the residual stream: `kernels.linear_qkv` of norm(x), without norm(x).

    r = 1 / sqrt(mean(x^2) + 2^-23);  s = r x W^T;  gate = r x[:C] W_gate^T;  then as in `kernels.qkv`

Backward, with ds and dgate as there: <ds, s> of a head that is normalised again is eps r_head^2 <h, n>, of a value <dv,
v - 2 sigmoid(gate) ve>; with <dgate, gate>, and times r, that is the `share` of `kernels.residual_stream`. x itself
goes through this operator, so that the gradient of what the stream becomes next is added in the epilogue of that of x,
and no pass adds the two.

Bytes, elements of b bytes, M tokens, width D, N = (H + 2G) K: forward read x and ve, write q, k, v: M (D + G K + N) b.
Backward read the three gradients, q, k, v and ve, write ds and dve: M (2 N + (H + G) K + 3 G K) b; then ds twice, x
twice, g, write dx: M (2 N + 4 D) b. Weights, roots and gates come on top. Operations: 2 M D N forward, twice that
backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import linear_qkv, qkv, residual_stream
from hotloop.kernels.dispatch import KernelError, choose
from hotloop.kernels.residual_stream import Norm, Squares, normalized, squares_of
from hotloop.kernels.weight_gradient import weight_gradient

__all__ = ["norm_linear_qkv"]


@torch.library.custom_op("hotloop::norm_linear_qkv", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, T, D], weight [(H + 2G) K, D], partial fp32 [S, B T], ve [B, T, G, K], gate [B, T, G] ->
    q [B, T, H, K], k, v [B, T, G, K], r fp32 [B, T, H + G].
    """
    return linear_qkv.launch(x, weight, partial, cos, sin, ve, gate, heads)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_qkv.empty(x, weight, cos, heads)


@torch.library.custom_op("hotloop::norm_linear_qkv_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, root: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v -> those of the product [B, T, H + 2G, K] and the gate, both times root fp32 [B T], that
    of ve, and share fp32 [H + 2G, B T].
    """
    dqkv, dve, dgate, share = qkv.launch_backward(None, (q, k, r), cos, sin, ve, gate, dq, dk, dv, (v, root))
    return dqkv, dve, dgate, share


@_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, root: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, dq: Tensor,
    dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv, dve, dgate = qkv.empty_gradients(dq, dk, ve, gate)
    return dqkv, dve, dgate, dq.new_empty(dqkv.shape[2], len(root), dtype=torch.float32)


class _NormLinearQKV(torch.autograd.Function):
    """No operator of torch.library: those may not return what they were given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, heads: int,
        ve: Tensor | None, w_gate: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        root = residual_stream.reciprocal_root(partial, x.shape[-1])
        gate = None
        if w_gate is not None:
            gate = F.linear(x[..., : w_gate.shape[1]], w_gate)
            gate = (gate.float() * root.view(*x.shape[:2], 1)).to(x.dtype)
        q, k, v, r = _op(x, weight, partial, cos, sin, ve, gate, heads)
        ctx.save_for_backward(x, weight, partial, root, cos, sin, ve, w_gate, gate, q, k, v, r)
        return x.view_as(x), q, k, v

    @staticmethod
    def backward(ctx: Any, g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, partial, root, cos, sin, ve, w_gate, gate, q, k, v, r = ctx.saved_tensors
        given = (dq.contiguous(), dk.contiguous(), dv.contiguous())
        dqkv, dve, dgate, share = _backward_op(q, k, v, r, root, cos, sin, ve, gate, *given)
        flat, ds = x.view(-1, x.shape[-1]), dqkv.view(-1, weight.shape[0])
        if w_gate is None:
            dve, dgate, dw_gate = None, None, None
        else:
            dgate = dgate.view(-1, w_gate.shape[0])
            dw_gate = dgate.T @ flat[:, : w_gate.shape[1]]
        g = g.contiguous().view_as(flat)
        dx, _, _ = residual_stream.gradient(ds, weight, g, flat, None, None, None, partial, share, dgate, w_gate)
        return dx.view_as(x), weight_gradient(ds, flat), None, None, None, None, dve, dw_gate


@register_flop_formula(torch.ops.hotloop.norm_linear_qkv)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * x[2] * weight[0])


def norm_linear_qkv(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    ve: Tensor | None = None,
    w_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, QKV projection, rotary positions, QK-norm and gated value embeddings; see `reference`.

    Args:
        x: [B, T, D], the residual stream; under autocast it, the weights and ve are taken in the autocast dtype.
        norm: of x, from the function that made it. A normalised tensor is served by `linear_qkv_rope_norm`.
        weight: [(H + 2G) K, D]: rows of query heads, key heads, value heads; K one of 16, 32, 64, 128.
        cos, sin: [T, K/2]; no gradient.
        heads: H.
        ve: [B, T, G, K]; None for none. Comes with w_gate.
        w_gate: [G, C]: its gates, before the sigmoid, are products with the first C columns of norm(x).

    Returns:
        x, which the residual stream goes on with; q [B, T, H, K], k [B, T, G, K], v [B, T, G, K].

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if (ve is None) != (w_gate is None):
        raise KernelError("norm_linear_qkv: ve and w_gate come together or not at all")
    if not (choose("norm_linear_qkv", x.device.type) and isinstance(norm, Squares)):
        normed = normalized(x, norm)
        gate = None if w_gate is None else F.linear(normed[..., : w_gate.shape[1]], w_gate)
        return x, *linear_qkv.linear_qkv_rope_norm(normed, weight, cos, sin, heads, ve, gate)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        ve, w_gate = (y if y is None else y.to(dtype) for y in (ve, w_gate))
    linear_qkv.check("norm_linear_qkv", x, weight, cos, sin, heads, ve, None)
    groups = (weight.shape[0] // (2 * cos.shape[1]) - heads) // 2
    if w_gate is not None and (
        w_gate.ndim != 2 or w_gate.shape[0] != groups or w_gate.shape[1] > x.shape[2] or w_gate.dtype != x.dtype
    ):
        raise KernelError(
            f"norm_linear_qkv needs w_gate {x.dtype} [{groups}, C], C <= {x.shape[2]}, not {w_gate.dtype} "
            f"{list(w_gate.shape)}"
        )
    partial = squares_of("norm_linear_qkv", x, norm)
    x, weight, cos, sin = x.contiguous(), weight.contiguous(), cos.contiguous(), sin.contiguous()
    ve, w_gate = (y if y is None else y.contiguous() for y in (ve, w_gate))
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _NormLinearQKV.apply(  # type: ignore[no-untyped-call]
        x, weight, partial, cos, sin, heads, ve, w_gate
    )
    return made
