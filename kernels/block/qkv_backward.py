"""The backward pass of `kernels.block.qkv` up to the product: rotary positions, QK-norm, gated value embeddings.

With the gradient h of a head that was normalised, n its value, r its reciprocal root: dy = r (h - n mean(h n)), ds =
rotate^-1(dy); of values ds = h, dve = 2 sigmoid(gate) h, dgate = 2 sigmoid' sum(h ve). All that flows on to the product
is scaled by the root of the row that it read, and each head's part of <ds, s> + <dgate, gate> is the `share` of
`kernels.block.stream`: eps r^2 K mean(h n) of a head, <h, v - 2 sigmoid(gate) ve> of a value.

Bytes, elements of b bytes, M tokens, H query and G key-value heads: read the three gradients, q, k, v and ve, write ds
and dve: M ((H + 2G) 3 + 2 G) K b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase

if HAVE_TRITON:
    import triton
    import triton.language as tl

__all__ = ["compile_cases", "default_config", "empty_gradients", "launch", "search_space"]


def launch_config(head_dim: int) -> dict[str, int]:
    """Tokens a program and warps: as tuned on this GPU, else 4,096 elements a program."""
    return tuning.config("qkv_backward", f"K={head_dim}") or default_config(head_dim)


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


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _qkv_backward_kernel(
        q_ptr, k_ptr, v_ptr, r_ptr, root_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, dq_ptr, dk_ptr, dv_ptr, ds_ptr,
        dve_ptr, dgate_ptr, share_ptr, M, T, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """q [M, H, K], k, v [M, G, K], r fp32 [M, H + G], root fp32 [M], and the gradients of q, k, v -> those of the
        product [M, H + 2G, K] and of gate [M, G], both times root; of ve [M, G, K]; share fp32 [H + 2G, M].
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        head = tl.program_id(1)
        inside = row < M
        half = tl.arange(0, K // 2)[None, :]
        wide = row.to(tl.int64)
        at = (wide * (H + 2 * G) + head) * K + half
        root = tl.load(root_ptr + row, mask=inside, other=0.0)
        if head < H + G:
            p_in = dq_ptr + (wide * H + head) * K + half
            p_out = q_ptr + (wide * H + head) * K + half
            if head >= H:
                p_in = dk_ptr + (wide * G + head - H) * K + half
                p_out = k_ptr + (wide * G + head - H) * K + half
            h1 = tl.load(p_in, mask=inside, other=0.0).to(tl.float32)
            h2 = tl.load(p_in + K // 2, mask=inside, other=0.0).to(tl.float32)
            n1 = tl.load(p_out, mask=inside, other=0.0).to(tl.float32)
            n2 = tl.load(p_out + K // 2, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + wide * (H + G) + head, mask=inside, other=0.0)
            angle = (row % T) * (K // 2) + half
            cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
            mean = ((tl.sum(h1 * n1, 1) + tl.sum(h2 * n2, 1)) / K)[:, None]
            # A normalised head does not change with its scale, but for eps.
            tl.store(share_ptr + head * M + row, root * (eps * r * r * K * mean), mask=inside)
            r *= root
            d1 = r * (h1 - n1 * mean)
            d2 = r * (h2 - n2 * mean)
            tl.store(ds_ptr + at, (d1 * cos - d2 * sin).to(ds_ptr.dtype.element_ty), mask=inside)
            tl.store(ds_ptr + at + K // 2, (d1 * sin + d2 * cos).to(ds_ptr.dtype.element_ty), mask=inside)
        else:
            own = wide * G + head - H - G
            h1 = tl.load(dv_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
            h2 = tl.load(dv_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
            tl.store(ds_ptr + at, (h1 * root).to(ds_ptr.dtype.element_ty), mask=inside)
            tl.store(ds_ptr + at + K // 2, (h2 * root).to(ds_ptr.dtype.element_ty), mask=inside)
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
            v1 = tl.load(v_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
            v2 = tl.load(v_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
            share += (tl.sum(h1 * v1, 1) + tl.sum(h2 * v2, 1))[:, None]
            tl.store(share_ptr + head * M + row, root * share, mask=inside)


def compile_cases() -> list[CompileCase]:
    """For heads of 64 and 128, with and without value embeddings: default and tuned."""
    cases = []
    names = ("q", "k", "v", "cos", "sin", "ve", "gate", "dq", "dk", "dv", "ds", "dve", "dgate")
    signature = {f"{name}_ptr": "*bf16" for name in names} | {"M": "i32", "T": "i32", "eps": "fp32"}
    signature |= dict.fromkeys(("r_ptr", "root_ptr", "share_ptr"), "*fp32")
    for head_dim in (64, 128):
        tuned = tuning.of_all_gpus("qkv_backward", f"K={head_dim}")
        for config, capabilities in [(default_config(head_dim), tuple(ARCHITECTURES)), *tuned]:
            for ve in (True, False):
                constants = {"H": 4, "G": 4, "K": head_dim, "VE": ve, "ROWS": config["ROWS"]}
                key = f"K={head_dim}{' ve' if ve else ''} ROWS={config['ROWS']} warps={config['num_warps']}"
                options = {"num_warps": config["num_warps"]}
                cases.append(CompileCase(key, _qkv_backward_kernel, signature, constants, options, capabilities))
    return cases


def launch(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, root: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the product [B, T, H + 2G, K], of ve and gate (empty where there are none), and share fp32
    [H + 2G, B T]; see the kernel.
    """
    b, t, heads, head_dim = dq.shape
    ds, dve, dgate = empty_gradients(dq, dk, ve, gate)
    share = dq.new_empty(ds.shape[2], b * t, dtype=torch.float32)
    if b * t:
        config = launch_config(head_dim)
        _qkv_backward_kernel[(-(-b * t // config["ROWS"]), ds.shape[2])](
            q, k, v, r, root, cos, sin, dq if ve is None else ve, dq if gate is None else gate, dq, dk, dv, ds, dve,
            dgate, share, b * t, t, reference.NORM_EPS, H=heads, G=dk.shape[2], K=head_dim, VE=ve is not None, **config,
        )  # fmt: skip
    return ds, dve, dgate, share


def empty_gradients(dq: Tensor, dk: Tensor, ve: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the product [B, T, H + 2G, K], ve and gate."""
    b, t, heads, k = dq.shape
    dve, dgate = (dq.new_empty(0) if x is None else torch.empty_like(x) for x in (ve, gate))
    return dq.new_empty(b, t, heads + 2 * dk.shape[2], k), dve, dgate
