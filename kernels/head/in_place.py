"""Softcapped cross-entropy in one pass over the logits, in place.

    s = c tanh(l / c);  loss = log sum exp(s) - s[target];  dl = scale (exp(s - lse) - onehot) (1 - tanh(l / c)^2)

The loss and the gradient of the logits come from one read of a row, and the gradient takes the logits' place, so that
neither fp32 logits nor a second M x V tensor ever exist. The cap bounds s by c, so exp(s) cannot overflow and no row
maximum is needed; without a cap the maximum is taken.

Bytes, logits of b bytes an element: read M V b + write M V b (+ 12 M for targets and losses).
Operations: about 12 M V, negligible beside the bytes.

After the in-place losses of Liger-Kernel and modded-nanogpt (the idea, not the code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels import tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError

if HAVE_TRITON:
    import triton
    import triton.language as tl

__all__ = [
    "check",
    "compile_cases",
    "default_config",
    "launch",
    "launch_config",
    "search_space",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A row of up to MAX_BLOCK logits stays in registers and is read once; a longer one is read twice.
MAX_BLOCK = 8192
# exp(s) of s <= MAX_CAP, summed over 2^20 columns, stays below fp32's largest number.
MAX_CAP = 60.0


def launch_config(vocab: int, capped: bool) -> dict[str, int]:
    """Block and warps for rows of `vocab` logits: as tuned on this GPU, else by size."""
    return tuning.config("loss", config_key(vocab, capped)) or default_config(vocab)


def config_key(vocab: int, capped: bool) -> str:
    return f"V={vocab} {'capped' if capped else 'uncapped'}"


def default_config(vocab: int) -> dict[str, int]:
    """Block and warps by size."""
    block = max(16, 1 << (vocab - 1).bit_length())
    block = block if block <= MAX_BLOCK else 4096  # two passes: more would only spill
    # With eight logits a thread the assembler aims at an occupancy that it misses by a spill.
    return {"BLOCK": block, "num_warps": 8 if block > 2048 else max(4, block // 128)}


def search_space(vocab: int) -> list[dict[str, int]]:
    """Configurations worth timing: whole rows in registers, and two passes in blocks."""
    whole = max(16, 1 << (vocab - 1).bit_length())
    blocks = {whole, 1024, 2048, 4096, 8192}
    return [
        {"BLOCK": block, "num_warps": warps}
        for block in sorted(b for b in blocks if b <= min(whole, 2 * MAX_BLOCK))
        for warps in (4, 8, 16, 32)
        if 4 <= block // (32 * warps) <= 64
    ]


def compile_cases() -> list[CompileCase]:
    """What is shipped: defaults and every tuned configuration, at the vocabularies that people use."""
    cases = {}
    for vocab in (1024, 2048, 4096, 8192, 16384, 50304):
        for capped in (True, False):
            key = config_key(vocab, capped)
            tuned = tuning.of_all_gpus("loss", key)
            for config, capabilities in [(default_config(vocab), tuple(ARCHITECTURES)), *tuned]:
                options = {"num_warps": config["num_warps"]}
                constants = {"CAPPED": capped, "BLOCK": config["BLOCK"], "ONE_BLOCK": vocab <= config["BLOCK"]}
                name = f"{key} BLOCK={config['BLOCK']} warps={config['num_warps']}"
                function = _softcap_cross_entropy_kernel
                cases[name] = CompileCase(name, function, _SIGNATURE, constants, options, capabilities)
    return list(cases.values())


_SIGNATURE = {
    "logits_ptr": "*bf16", "targets_ptr": "*i64", "loss_ptr": "*fp32", "scale_ptr": "*fp32",
    "stride": "i64", "V": "i32", "softcap": "fp32",
}  # fmt: skip


# ---- forward kernel: losses and gradients -----------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _capped(x, softcap, CAPPED: tl.constexpr):
        """(s, ds/dl) of logits x, fp32."""
        if CAPPED:
            t = 1.0 - 2.0 / (tl.exp(x * (2.0 / softcap)) + 1.0)  # tanh; exact limits at both ends
            s = softcap * t
            slope = 1.0 - t * t
        else:
            s = x
            slope = x * 0.0 + 1.0
        return s, slope

    @triton.jit
    def _softcap_cross_entropy_kernel(
        logits_ptr, targets_ptr, loss_ptr, scale_ptr, stride, V, softcap,
        CAPPED: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row. logits [M, V] rows `stride` apart, targets int64 [M], loss fp32 [M], scale fp32 [1]."""
        row = tl.program_id(0).to(tl.int64)  # M x V passes 2^31 at the baseline
        p_row = logits_ptr + row * stride
        target = tl.load(targets_ptr + row)
        valid = target != -1
        scale = tl.where(valid, tl.load(scale_ptr), 0.0)
        column = tl.arange(0, BLOCK)
        if ONE_BLOCK:
            inside = column < V
            x = tl.load(p_row + column, mask=inside, other=0.0).to(tl.float32)
            s, slope = _capped(x, softcap, CAPPED)
            s = tl.where(inside, s, float("-inf"))
            top = 0.0 if CAPPED else tl.max(s, 0)
            e = tl.exp(s - top)
            total = tl.sum(e, 0)
            hit = column == target
            at_target = tl.sum(tl.where(hit, s, 0.0), 0)
            grad = (e * (1.0 / total) - tl.where(hit, 1.0, 0.0)) * slope * scale
            tl.store(p_row + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)
        else:
            top = 0.0 if CAPPED else float("-inf")
            total = 0.0
            at_target = 0.0
            for start in range(0, V, BLOCK):
                inside = start + column < V
                x = tl.load(p_row + start + column, mask=inside, other=0.0).to(tl.float32)
                s, _ = _capped(x, softcap, CAPPED)
                s = tl.where(inside, s, float("-inf"))
                if CAPPED:
                    total += tl.sum(tl.exp(s), 0)
                else:
                    higher = tl.maximum(top, tl.max(s, 0))
                    total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), 0)
                    top = higher
                at_target += tl.sum(tl.where(start + column == target, s, 0.0), 0)
            share = 1.0 / total
            for start in range(0, V, BLOCK):
                inside = start + column < V
                x = tl.load(p_row + start + column, mask=inside, other=0.0).to(tl.float32)
                s, slope = _capped(x, softcap, CAPPED)
                hit = start + column == target
                grad = (tl.exp(s - top) * share - tl.where(hit, 1.0, 0.0)) * slope * scale
                tl.store(p_row + start + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)
        tl.store(loss_ptr + row, tl.where(valid, tl.log(total) + top - at_target, 0.0))


# ---- launcher ---------------------------------------------------------------------------------------------------


def launch(logits: Tensor, targets: Tensor, softcap: float | None, scale: Tensor) -> Tensor:
    """Losses [M] of logits [M, V]; the gradient, times scale [], takes the logits' place."""
    m, v = logits.shape
    loss = torch.empty(m, dtype=torch.float32, device=logits.device)
    if m:
        config = launch_config(v, softcap is not None)
        _softcap_cross_entropy_kernel[(m,)](
            logits, targets, loss, scale, logits.stride(0), v, softcap or 1.0,
            CAPPED=softcap is not None, ONE_BLOCK=v <= config["BLOCK"], **config,
        )  # fmt: skip
    return loss


def check(logits_shape: tuple[int, ...], dtype: torch.dtype, targets: Tensor, softcap: float | None) -> None:
    m, v = logits_shape
    if dtype not in DTYPES:
        raise KernelError(f"softcapped cross-entropy serves bfloat16, float16 and float32, not {dtype}")
    if targets.dtype != torch.int64 or targets.numel() != m:
        raise KernelError(f"{m} rows need int64 targets [{m}], not {targets.dtype} {list(targets.shape)}")
    if v < 1:
        raise KernelError("softcapped cross-entropy needs at least one column")
    if softcap is not None and not 0.0 < softcap <= MAX_CAP:
        raise KernelError(f"softcap must be in (0, {MAX_CAP:.0f}] or None, not {softcap}")
