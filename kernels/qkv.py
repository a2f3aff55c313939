"""From the QKV projection to what attention takes, in one pass: rotary positions, QK-norm, gated value embeddings.

    q, k:  y = rotate(x);  out = y / sqrt(mean(y^2) + 2^-23)          over each head
    v:     out = x + 2 sigmoid(gate) ve

rotate takes the halves (a, b) of a head to (a cos + b sin, b cos - a sin). Backward, with the gradient h, n = out, r
the reciprocal root: dy = r (h - n mean(h n)), dx = rotate^-1(dy); dve = 2 sigmoid(gate) h; dgate = 2 sigmoid' sum(h
ve).

Bytes, elements of b bytes, M tokens, H query and G key-value heads: forward read M (H + 2G) K b, and M G K b of ve,
write M (H + 2G) K b. Backward read q, k, the three gradients and ve, write the gradients of QKV and ve: M ((H + G) +
(H + 2G) + G + (H + 2G) + G) K b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose

if HAVE_TRITON:
    import triton
    import triton.language as tl

__all__ = ["compile_cases", "default_config", "qkv_rope_norm", "search_space"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)


def launch_config(head_dim: int) -> dict[str, int]:
    """Tokens a program and warps: as tuned on this GPU, else 4,096 elements a program."""
    return tuning.config("qkv_rope_norm", f"K={head_dim}") or default_config(head_dim)


def default_config(head_dim: int) -> dict[str, int]:
    """By size."""
    return {"ROWS": 4096 // head_dim, "num_warps": 4}


def search_space(head_dim: int) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return [
        {"ROWS": rows, "num_warps": warps}
        for rows in (16, 32, 64, 128)
        for warps in (2, 4, 8)
        if 4 <= rows * head_dim // (32 * warps) <= 128
    ]


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _rotated(x_ptr, cos_ptr, sin_ptr, row, at, inside, T, K: tl.constexpr):
        """(y1, y2, cos, sin): the rotated halves of a block of heads, fp32."""
        half = tl.arange(0, K // 2)[None, :]
        angle = (row % T) * (K // 2) + half
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + K // 2, mask=inside, other=0.0).to(tl.float32)
        return a * cos + b * sin, b * cos - a * sin, cos, sin

    @triton.jit
    def _qkv_forward_kernel(
        x_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, M, T, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """x [M, H + 2G, K] -> q [M, H, K], k, v [M, G, K]. Grid: blocks of ROWS tokens, heads."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        head = tl.program_id(1)
        inside = row < M
        half = tl.arange(0, K // 2)[None, :]
        wide = row.to(tl.int64)
        at = (wide * (H + 2 * G) + head) * K + half
        if head < H + G:
            y1, y2, _, _ = _rotated(x_ptr, cos_ptr, sin_ptr, row, at, inside, T, K)
            r = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / K + eps)[:, None]
            p_out = q_ptr + (wide * H + head) * K + half
            if head >= H:
                p_out = k_ptr + (wide * G + head - H) * K + half
            tl.store(p_out, (y1 * r).to(q_ptr.dtype.element_ty), mask=inside)
            tl.store(p_out + K // 2, (y2 * r).to(q_ptr.dtype.element_ty), mask=inside)
        else:
            own = wide * G + head - H - G
            a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x_ptr + at + K // 2, mask=inside, other=0.0).to(tl.float32)
            if VE:
                gate = 2.0 * tl.sigmoid(tl.load(gate_ptr + own, mask=inside, other=0.0).to(tl.float32))
                a += gate * tl.load(ve_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
                b += gate * tl.load(ve_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
            tl.store(v_ptr + own * K + half, a.to(v_ptr.dtype.element_ty), mask=inside)
            tl.store(v_ptr + own * K + half + K // 2, b.to(v_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _qkv_backward_kernel(
        x_ptr, q_ptr, k_ptr, v_ptr, r_ptr, root_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr,
        dve_ptr, dgate_ptr, share_ptr, M, T, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, SAVED: tl.constexpr, NORM: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        """Gradients of q, k, v -> those of x [M, H + 2G, K], ve [M, G, K], gate [M, G]. SAVED: by q [M, H, K], k [M, G,
        K] and the reciprocal roots fp32 [M, H + G] of the forward pass, instead of by x.

        NORM: x was a product of rows that it scaled by root fp32 [M]. So are its gradient and the gate's here, and
        share fp32 [H + 2G, M], their parts of <dx, x> + <dgate, gate>; for values by v [M, G, K].
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        head = tl.program_id(1)
        inside = row < M
        half = tl.arange(0, K // 2)[None, :]
        wide = row.to(tl.int64)
        at = (wide * (H + 2 * G) + head) * K + half
        root = 1.0
        if NORM:
            root = tl.load(root_ptr + row, mask=inside, other=0.0)
        if head < H + G:
            p_in = dq_ptr + (wide * H + head) * K + half
            p_out = q_ptr + (wide * H + head) * K + half
            if head >= H:
                p_in = dk_ptr + (wide * G + head - H) * K + half
                p_out = k_ptr + (wide * G + head - H) * K + half
            h1 = tl.load(p_in, mask=inside, other=0.0).to(tl.float32)
            h2 = tl.load(p_in + K // 2, mask=inside, other=0.0).to(tl.float32)
            if SAVED:
                n1 = tl.load(p_out, mask=inside, other=0.0).to(tl.float32)
                n2 = tl.load(p_out + K // 2, mask=inside, other=0.0).to(tl.float32)
                r = tl.load(r_ptr + wide * (H + G) + head, mask=inside, other=0.0)
                angle = (row % T) * (K // 2) + half
                cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
                sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
            else:
                y1, y2, cos, sin = _rotated(x_ptr, cos_ptr, sin_ptr, row, at, inside, T, K)
                r = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / K + eps)[:, None]
                n1 = y1 * r
                n2 = y2 * r
            mean = ((tl.sum(h1 * n1, 1) + tl.sum(h2 * n2, 1)) / K)[:, None]
            if NORM:  # a normalised head does not change with its scale, but for eps
                tl.store(share_ptr + head * M + row, root * (eps * r * r * K * mean), mask=inside)
                r *= root
            d1 = r * (h1 - n1 * mean)
            d2 = r * (h2 - n2 * mean)
            tl.store(dx_ptr + at, (d1 * cos - d2 * sin).to(dx_ptr.dtype.element_ty), mask=inside)
            tl.store(dx_ptr + at + K // 2, (d1 * sin + d2 * cos).to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            own = wide * G + head - H - G
            h1 = tl.load(dv_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
            h2 = tl.load(dv_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, (h1 * root).to(dx_ptr.dtype.element_ty), mask=inside)
            tl.store(dx_ptr + at + K // 2, (h2 * root).to(dx_ptr.dtype.element_ty), mask=inside)
            share = tl.zeros([ROWS, 1], tl.float32)
            if VE:
                gate = tl.load(gate_ptr + own, mask=inside, other=0.0).to(tl.float32)
                s = tl.sigmoid(gate)
                e1 = tl.load(ve_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
                e2 = tl.load(ve_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
                tl.store(dve_ptr + own * K + half, (2.0 * s * h1).to(dve_ptr.dtype.element_ty), mask=inside)
                tl.store(dve_ptr + own * K + half + K // 2, (2.0 * s * h2).to(dve_ptr.dtype.element_ty), mask=inside)
                total = (tl.sum(h1 * e1, 1) + tl.sum(h2 * e2, 1))[:, None]
                dgate = 2.0 * s * (1.0 - s) * total
                tl.store(dgate_ptr + own, (dgate * root).to(dgate_ptr.dtype.element_ty), mask=inside)
                share += dgate * gate - 2.0 * s * total
            if NORM:
                v1 = tl.load(v_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
                v2 = tl.load(v_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
                share += (tl.sum(h1 * v1, 1) + tl.sum(h2 * v2, 1))[:, None]
                tl.store(share_ptr + head * M + row, root * share, mask=inside)


def compile_cases() -> list[CompileCase]:
    """Both kernels for heads of 64 and 128, with and without value embeddings; the backward one in both its ways."""
    cases = []
    gradients = ("dq_ptr", "dk_ptr", "dv_ptr", "dx_ptr", "dve_ptr", "dgate_ptr")
    for head_dim in (64, 128):
        tuned = tuning.of_all_gpus("qkv_rope_norm", f"K={head_dim}")
        for config, capabilities in [(default_config(head_dim), tuple(ARCHITECTURES)), *tuned]:
            for ve in (True, False):
                for way, function, more in (
                    ("forward", _qkv_forward_kernel, ("q_ptr", "k_ptr", "v_ptr")),
                    ("backward", _qkv_backward_kernel, gradients),
                    ("backward saved", _qkv_backward_kernel, gradients),
                    ("backward norm", _qkv_backward_kernel, gradients),
                ):
                    names = ("x_ptr", "cos_ptr", "sin_ptr", "ve_ptr", "gate_ptr", *more)
                    signature = dict.fromkeys(names, "*bf16") | {"M": "i32", "T": "i32", "eps": "fp32"}
                    constants = {"H": 4, "G": 4, "K": head_dim, "VE": ve, "ROWS": config["ROWS"]}
                    if way != "forward":
                        signature |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16")
                        signature |= dict.fromkeys(("r_ptr", "root_ptr", "share_ptr"), "*fp32")
                        constants |= {"SAVED": way != "backward", "NORM": way == "backward norm"}
                    options = {"num_warps": config["num_warps"]}
                    key = f"{way} K={head_dim}{' ve' if ve else ''} ROWS={config['ROWS']} warps={config['num_warps']}"
                    cases.append(CompileCase(key, function, signature, constants, options, capabilities))
    return cases


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::qkv_rope_norm", mutates_args=())
def _forward_op(
    qkv: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, all_heads, k = qkv.shape
    g = (all_heads - heads) // 2
    out = qkv.new_empty(b, t, heads, k), qkv.new_empty(b, t, g, k), qkv.new_empty(b, t, g, k)
    if b * t:
        config = launch_config(k)
        _qkv_forward_kernel[(-(-b * t // config["ROWS"]), all_heads)](
            qkv, cos, sin, ve if ve is not None else qkv, gate if gate is not None else qkv, *out, b * t, t,
            reference.NORM_EPS, H=heads, G=g, K=k, VE=ve is not None, **config,
        )  # fmt: skip
    return out


@_forward_op.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, all_heads, k = qkv.shape
    g = (all_heads - heads) // 2
    return qkv.new_empty(b, t, heads, k), qkv.new_empty(b, t, g, k), qkv.new_empty(b, t, g, k)


@torch.library.custom_op("hotloop::qkv_rope_norm_backward", mutates_args=())
def _backward_op(
    qkv: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(qkv, None, cos, sin, ve, gate, dq, dk, dv)[:3]


@_backward_op.register_fake
def _(
    qkv: Tensor, cos: Any, sin: Any, ve: Any, gate: Any, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(dq, dk, ve, gate)


def empty_gradients(dq: Tensor, dk: Tensor, ve: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the product [B, T, H + 2G, K], ve and gate."""
    b, t, heads, k = dq.shape
    dve, dgate = (dq.new_empty(0) if x is None else torch.empty_like(x) for x in (ve, gate))
    return dq.new_empty(b, t, heads + 2 * dk.shape[2], k), dve, dgate


def launch_backward(
    qkv: Tensor | None, saved: tuple[Tensor, Tensor, Tensor] | None, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, norm: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By qkv [B, T, H + 2G, K], or by what was `saved` instead: q, k, and the reciprocal roots fp32 [B, T, H + G].

    norm: v [B, T, G, K], and fp32 [B T], what the product scaled its rows by. So are then the first and third result,
    and the last, fp32 [H + 2G, B T]: parts of <dqkv, qkv> + <dgate, gate>; else it is empty.
    """
    b, t, heads, k = dq.shape
    dqkv, dve, dgate = empty_gradients(dq, dk, ve, gate)
    share = dq.new_empty(dqkv.shape[2] if norm else 0, b * t, dtype=torch.float32)
    if b * t:
        config = launch_config(k)
        q, keys, r = saved or (dq, dk, dq)
        v, root = norm or (dv, dq)
        _qkv_backward_kernel[(-(-b * t // config["ROWS"]), dqkv.shape[2])](
            dqkv if qkv is None else qkv, q, keys, v, r, root, cos, sin, dq if ve is None else ve,
            dq if gate is None else gate, dq, dk, dv, dqkv, dve, dgate, share, b * t, t, reference.NORM_EPS,
            H=heads, G=dk.shape[2], K=k, VE=ve is not None, SAVED=saved is not None, NORM=norm is not None, **config,
        )  # fmt: skip
    return dqkv, dve, dgate, share


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    qkv, cos, sin, ve, gate = ctx.saved_tensors
    dqkv, dve, dgate = _backward_op(qkv, cos, sin, ve, gate, dq.contiguous(), dk.contiguous(), dv.contiguous())
    return dqkv, None, None, dve if ve is not None else None, dgate if gate is not None else None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# ---- public function --------------------------------------------------------------------------------------------


def qkv_rope_norm(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, ve: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary positions, QK-norm and gated value embeddings; see `reference`.

    Args:
        qkv: [B, T, H + 2G, K]: query heads, key heads, value heads; K one of 16, 32, 64, 128, 256.
        cos, sin: [T, K/2]; no gradient.
        heads: H.
        ve: [B, T, G, K], of qkv's dtype; None for none. Comes with gate.
        gate: [B, T, G], before the sigmoid, of qkv's dtype.

    Returns:
        q [B, T, H, K], k [B, T, G, K], v [B, T, G, K].

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if (ve is None) != (gate is None):
        raise KernelError("ve and gate come together or not at all")
    if not choose("qkv_rope_norm", qkv.device.type):
        return reference.qkv_rope_norm(qkv, cos, sin, heads, ve, gate)
    b, t, all_heads, k = qkv.shape
    if qkv.dtype not in DTYPES or k not in HEAD_DIMS:
        raise KernelError(
            f"qkv_rope_norm serves bfloat16, float16 and float32 [B, T, H + 2G, K] with K one of {HEAD_DIMS}, not "
            f"{qkv.dtype} {list(qkv.shape)}"
        )
    check(b, t, all_heads, k, qkv.dtype, cos, sin, heads, ve, gate)
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    ve, gate = (x if x is None else x.contiguous() for x in (ve, gate))
    found: tuple[Tensor, Tensor, Tensor] = _forward_op(qkv, cos, sin, ve, gate, heads)
    return found


def check(
    b: int, t: int, all_heads: int, k: int, dtype: torch.dtype, cos: Tensor, sin: Tensor, heads: int,
    ve: Tensor | None, gate: Tensor | None,
) -> None:  # fmt: skip
    """Raises KernelError for what does not fit a product of `all_heads` heads."""
    g = (all_heads - heads) // 2
    if heads < 1 or g < 1 or heads + 2 * g != all_heads:
        raise KernelError(f"{all_heads} heads are no H + 2G with H = {heads}")
    for name, given, wanted in (("ve", ve, (b, t, g, k)), ("gate", gate, (b, t, g))):
        if given is not None and (tuple(given.shape) != wanted or given.dtype != dtype):
            raise KernelError(f"{name} must be {dtype} {list(wanted)}, not {given.dtype} {list(given.shape)}")
    if tuple(cos.shape) != (t, k // 2) or cos.shape != sin.shape:
        raise KernelError(f"cos and sin must be [{t}, {k // 2}], not {list(cos.shape)} and {list(sin.shape)}")
