"""Every operation in plain PyTorch: the specification that the kernels are tested against, and the fallback.

Shapes: B batch, T time, D model, H heads, K head dim, V vocab, M = B*T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "adamw_",
    "attention",
    "embedding",
    "linear",
    "linear_fp8",
    "loss",
    "mlp",
    "mlp_alone",
    "muon_",
    "qkv",
    "residual",
]

IGNORE = -1  # a target that counts in no loss
NORM_EPS = 2.0**-23  # fp32's machine epsilon, whatever the dtype
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# A row whose largest element is smaller is scaled as if it were this, so that a row of zeros has a scale.
FP8_SMALLEST, FP8_LARGEST = 2.0**-100, 2.0**126


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last dimension, without a gain. [..., D] -> [..., D]."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS).to(x.dtype)  # autocast would leave fp32


def rope_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the two halves of each head, then RMS norm over the head.

    Args:
        x: [B, T, H, K], K even.
        cos, sin: [T, 1, K/2].

    Returns:
        [B, T, H, K] of x's dtype.
    """
    a, b = x.chunk(2, dim=-1)
    return rms_norm(torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x [..., D], weight [N, D] -> [..., N]."""
    return F.linear(x, weight)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row by a scale of its own: the least power of two that brings its largest element into the range of 8 bits.

    A power of two, so that nothing but the conversion rounds: the same bits eagerly, compiled and on any device.
    Numbers of bfloat16 over another scale lie halfway between two codes often, where the last bit of a division would
    decide. The error is as large (docs/performance.md).

    Args:
        x: [M, N]; what is wider than fp32 is rounded to it.
        dtype: E4M3 or E5M2.

    Returns:
        q [M, N] in dtype, contiguous, and scale fp32 [M, 1]; x is about q scale. A row with an element that is not
        finite, or above 2^126, has the scale NaN, so that all that is made of it shows it.
    """
    x = x.float().contiguous()
    amax, top = x.abs().amax(-1, keepdim=True), torch.finfo(dtype).max / 1.75  # a power of two, for both types
    # The bits of the least power of two that is no less than amax / 1.75: a mantissa above 1.75 carries into the
    # exponent. Its inverse has the exponent's mirror image.
    bits = (amax.clamp(FP8_SMALLEST, FP8_LARGEST).view(torch.int32) + 0x1FFFFF) & 0x7F800000
    power, inverse = bits.view(torch.float32), (0x7F000000 - bits).view(torch.float32)
    return (x * (inverse * top)).to(dtype), torch.where(amax <= FP8_LARGEST, power / top, torch.nan)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, N] as `quantize` leaves it, fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, scale = quantize(x, dtype)
    return q.to(wide) * scale.to(wide)


class _LinearFp8(torch.autograd.Function):
    """x [M, D], weight [N, D] -> [M, N]; rounding counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backward: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.e5m2 = backward == "e5m2"
        with torch.autocast(x.device.type, enabled=False):  # the product stays in fp32
            return (_rounded(x, E4M3) @ _rounded(weight, E4M3).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = (_rounded(dy, E5M2) @ _rounded(weight.T, E4M3).T).to(x.dtype) if ctx.e5m2 else dy @ weight
        return dx, dy.T @ x, None


def linear_fp8(x: Tensor, weight: Tensor, backward: str = "bf16") -> Tensor:
    """x W^T of x and W rounded to e4m3 by a scale a row, summed in fp32 (fp64 for fp64 inputs).

    Args:
        x: [..., D]; weight: [N, D], of one dtype.
        backward: `bf16`: dx = dy W and dW = dy^T x of what was not rounded, in the input's dtype; `e5m2`: dx of dy
            rounded to e5m2 by a scale a row and of W rounded to e4m3 by a scale a column; dW as before.

    Returns:
        [..., N] of x's dtype. A row of x that is not finite gives a row of NaN.
    """
    out: Tensor = _LinearFp8.apply(x.reshape(-1, x.shape[-1]), weight, backward)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


def gated(v: Tensor, ve: Tensor, gate: Tensor) -> Tensor:
    """Values plus 2 sigmoid(gate) times their value embedding: v, ve [B, T, G, K], gate [B, T, G]."""
    return v + (2 * torch.sigmoid(gate))[..., None] * ve


def qkv(
    x: Tensor,
    squares: object,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    ve: Tensor | None = None,
    w_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of the RMS norm of x, whose first C columns make the gate of their value embedding.

    Args:
        x: [B, T, D]; `squares`, what is known of its norm, is not needed here.
        w_q: [H K, D]; w_k, w_v: [G K, D].
        cos, sin: [T, 1, K/2].
        ve: [B, T, G, K]; w_gate: [G, C]; both or neither.

    Returns:
        q [B, T, H, K] and k [B, T, G, K], each head rotated and normalised; v [B, T, G, K]; x itself.
    """
    n = rms_norm(x)
    made = F.linear(n, torch.cat((w_q, w_k, w_v))).unflatten(-1, (-1, 2 * cos.size(-1)))
    heads, groups = (len(w) // (2 * cos.size(-1)) for w in (w_q, w_k))
    q, k, v = made.split((heads, groups, groups), dim=2)
    if ve is not None and w_gate is not None:
        v = gated(v, ve, F.linear(n[..., : w_gate.size(1)], w_gate))
    return rope_norm(q, cos, sin), rope_norm(k, cos, sin), v, x


def mlp_alone(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """relu(x W_fc^T)^2 W_proj^T: x [..., D], w_fc [N, D], w_proj [E, N] -> [..., E]."""
    pre = F.linear(x, w_fc)
    return F.linear(F.relu(pre).square().to(pre.dtype), w_proj)  # CUDA's autocast would leave fp32 between them


def mlp(
    x: Tensor,
    squares: object,
    w_fc: Tensor,
    w_proj: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mix` of x with `mlp_alone` of its RMS norm, and its squares. x, x0 [..., D]; `squares` as above."""
    return mix(x, mlp_alone(rms_norm(x), w_fc, w_proj), x0, lam, mu)


def residual(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mix` of x with a W^T, and its squares. a [..., N], weight [D, N], x and x0 [..., D]."""
    return mix(x, F.linear(a, weight), x0, lam, mu)


def mix(x: Tensor, branch: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None) -> tuple[Tensor, Tensor]:
    """lam (x + branch) + mu x0, without x0, lam and mu x + branch; and the sums of its rows' squares, fp32 [1, M]."""
    mixed = x + branch
    if x0 is not None:
        mixed = lam * mixed + mu * x0  # type: ignore[operator]
    return mixed, mixed.detach().float().square().sum(-1).view(1, -1)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table. tokens int64 [...], weight [V, D] -> [..., D]."""
    return F.embedding(tokens, weight)


@torch.no_grad()
def adamw_(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], hyper: Tensor) -> None:
    """One AdamW step without decay, in place, in each tensor's dtype.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params, grads, ms, vs: lists of n tensors.
        hyper: [n, 6]: lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t.
    """
    for p, g, m, v, row in zip(params, grads, ms, vs, hyper.unbind(), strict=True):
        lr, b1, b2, eps, c1, c2 = row.unbind()
        m.add_((g - m) * (1 - b1))
        v.add_((g.square() - v) * (1 - b2))
        p.sub_((lr / c1) * (m / ((v / c2).sqrt() + eps)))


def orthogonalize(g: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """The nearest semi-orthogonal matrix, about: x <- a x + b (x x^T) x + c (x x^T)^2 x. [N, rows, cols], g's dtype."""
    x: Tensor = g / (g.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = g.size(-2) > g.size(-1)
    for a, b, c in polynomials:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def _muon_update(
    p: Tensor,
    grad: Tensor,
    buffer: Tensor,
    second: Tensor,
    hyper: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
) -> Tensor:
    """Muon over a bank of matrices [N, rows, cols]; updates the two buffers in place and returns the new p."""
    lr, decay, momentum, weight = hyper.unbind()
    buffer.lerp_(grad, 1 - momentum)
    g = torch.lerp(grad, buffer, momentum)
    g = orthogonalize(g.to(dtype), polynomials)
    wide = g if g.dtype == torch.float64 else g.float()
    side = -1 if p.size(-2) >= p.size(-1) else -2
    mean = wide.square().mean(dim=side, keepdim=True)
    norm = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
    second.lerp_(mean.to(second.dtype), weight)
    scale = second.clamp_min(1e-10).rsqrt()
    scaled_norm = (mean * scale.to(mean.dtype).square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    g = g * (scale * (norm / scaled_norm.clamp_min(1e-10))).to(g.dtype)
    new: Tensor = p - lr * g - lr * decay * p * (g * p >= 0)
    return new


@functools.cache
def _compiled_muon_update() -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(_muon_update, dynamic=False, fullgraph=True)
    return made


@torch.no_grad()
def muon_(
    params: list[Tensor],
    grads: list[Tensor],
    buffer: Tensor,
    second: Tensor,
    hyper: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> None:
    """One Muon step of N equal matrices, in place.

    Nesterov momentum, orthogonalisation, variance reduction along the longer side (NorMuon: each row or column is
    divided by its running deviation, the whole keeps its norm), and decay only where it agrees with the step.

    Args:
        params, grads: lists of N matrices [rows, cols].
        buffer: [N, rows, cols], the momentum.
        second: the running mean of squares: [N, rows, 1] where rows >= cols, else [N, 1, cols].
        hyper: [4]: lr, decay, momentum, 1 - beta2.
        polynomials: (a, b, c) of each iteration that sends the singular values to 1.
        dtype: of the orthogonalisation; None for the gradients' own.
        compiled: let torch.compile fuse the update, as is worth its time on a GPU.
    """
    update = _compiled_muon_update() if compiled else _muon_update
    p, grad = torch.stack(list(params)), torch.stack(list(grads))
    new = update(p, grad, buffer, second, hyper, tuple(polynomials), dtype or grad.dtype)
    torch._foreach_copy_(list(params), list(new.unbind(0)))


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention with a sliding window: query i sees keys j of its document with i - window <= j <= i.

    Args:
        q: [B, T, H, K].
        k, v: [B, T, G, K], G dividing H (grouped heads).
        window: keys before the query's own that it sees; T - 1 or more is full attention.
        cu_seqlens: integers [N + 1]: where documents begin in the B T tokens of all rows, rising from 0 to B T; None
            for one document a row.

    Returns:
        [B, T, H, K].
    """
    b, t, heads = q.shape[:3]
    grouped = k.size(2) != heads
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window >= t - 1 and cu_seqlens is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        i = torch.arange(t, device=q.device)
        distance = i[:, None] - i[None, :]
        mask = (distance >= 0) & (distance <= window)
        if cu_seqlens is not None:
            token = torch.arange(b * t, device=q.device)
            document = torch.searchsorted(cu_seqlens.long(), token, right=True).view(b, 1, t)
            mask = mask & (document[..., :, None] == document[..., None, :])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def mean_cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Mean cross-entropy of softcapped logits [..., V] over the targets that are not -1: fp32 (fp64 for fp64)."""
    logits = logits.flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)


def loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = 15.0) -> Tensor:
    """Mean cross-entropy of softcap(x W^T) over the targets that are not -1.

    Args:
        x: [..., D].
        weight: [V, D].
        targets: int64 [...].
        softcap: None for no cap.

    Returns:
        scalar, fp32 (fp64 for fp64 inputs), nats. NaN where no target counts.
    """
    return mean_cross_entropy(F.linear(x, weight), targets, softcap)
