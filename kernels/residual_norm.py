"""Residual mix and RMS norm in one pass: what stands between two branches of a transformer block.

    u = x + branch;  mixed = lam u + mu x0;  normed = mixed / sqrt(mean(mixed^2) + 2^-23)

Backward, with the gradients g of `mixed` and h of `normed`, n = normed, r the reciprocal root:

    t = g + r (h - n mean(h n));  dx = dbranch = lam t;  dx0 = mu t;  dlam = sum(t u);  dmu = sum(t x0)

The scalars' gradients are summed in fixed order: each of a fixed number of programs writes one partial sum.

Bytes, elements of b bytes: forward read x, branch, x0, write mixed, normed: 5 M D b. Backward read x, branch, x0, g, h,
write dx (which is dbranch too), dx0: 7 M D b. Without x0 and scalars: 4 and 5 M D b.
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

__all__ = ["compile_cases", "default_config", "residual_rms_norm", "search_space"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 8192
# The same on every GPU, so that the scalars' gradients do not depend on which one it is.
PROGRAMS = 1024


def launch_config(dim: int) -> dict[str, int]:
    """Rows a step, block and warps for rows of `dim` elements: as tuned on this GPU, else 16 to 32 KB a step."""
    return tuning.config("residual_norm", f"D={dim}") or default_config(dim)


def default_config(dim: int) -> dict[str, int]:
    """By size."""
    block = max(16, 1 << (dim - 1).bit_length())
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def search_space(dim: int) -> list[dict[str, int]]:
    """Configurations worth timing."""
    block = max(16, 1 << (dim - 1).bit_length())
    return [
        {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        for rows in (1, 2, 4, 8, 16)
        for warps in (4, 8, 16)
        if 2 <= rows * block // (32 * warps) <= 64
    ]


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _mix(
        x_ptr, branch_ptr, x0_ptr, lam, mu, at, inside, BRANCH: tl.constexpr, X0: tl.constexpr
    ):  # fmt: skip
        """(u, x0, mixed) of a block, fp32; `mixed` is rounded as it is stored."""
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            u += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x0 = u * 0.0
        mixed = u
        if X0:
            x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mixed = lam * u + mu * x0
        return u, x0, mixed.to(x_ptr.dtype.element_ty).to(tl.float32)

    @triton.jit
    def _residual_norm_forward_kernel(
        x_ptr, branch_ptr, x0_ptr, lam_ptr, mu_ptr, mixed_ptr, normed_ptr, M, D, eps,
        BRANCH: tl.constexpr, X0: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """x, branch, x0, mixed, normed [M, D]; lam, mu fp32 []. Programs stride over blocks of ROWS rows."""
        lam = tl.load(lam_ptr).to(tl.float32) if X0 else 1.0
        mu = tl.load(mu_ptr).to(tl.float32) if X0 else 0.0
        column = tl.arange(0, BLOCK)[None, :]
        for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            inside = (row < M) & (column < D)
            at = row.to(tl.int64) * D + column
            _, _, mixed = _mix(x_ptr, branch_ptr, x0_ptr, lam, mu, at, inside, BRANCH, X0)
            r = tl.rsqrt(tl.sum(mixed * mixed, 1) / D + eps)[:, None]
            tl.store(mixed_ptr + at, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)
            tl.store(normed_ptr + at, (mixed * r).to(normed_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _residual_norm_backward_kernel(
        x_ptr, branch_ptr, x0_ptr, lam_ptr, mu_ptr, dmixed_ptr, dnormed_ptr, dx_ptr, dx0_ptr, partial_ptr, M, D, eps,
        BRANCH: tl.constexpr, X0: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradients [M, D]; partial fp32 [programs, 2], this program's share of dlam and dmu."""
        lam = tl.load(lam_ptr).to(tl.float32) if X0 else 1.0
        mu = tl.load(mu_ptr).to(tl.float32) if X0 else 0.0
        column = tl.arange(0, BLOCK)[None, :]
        dlam = tl.zeros([ROWS], tl.float32)
        dmu = tl.zeros([ROWS], tl.float32)
        for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            inside = (row < M) & (column < D)
            at = row.to(tl.int64) * D + column
            u, x0, mixed = _mix(x_ptr, branch_ptr, x0_ptr, lam, mu, at, inside, BRANCH, X0)
            g = tl.load(dmixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(mixed * mixed, 1) / D + eps)[:, None]
            n = mixed * r
            t = g + r * (h - n * (tl.sum(h * n, 1) / D)[:, None])
            tl.store(dx_ptr + at, (lam * t).to(dx_ptr.dtype.element_ty), mask=inside)
            if X0:
                tl.store(dx0_ptr + at, (mu * t).to(dx0_ptr.dtype.element_ty), mask=inside)
                dlam += tl.sum(t * u, 1)
                dmu += tl.sum(t * x0, 1)
        if X0:
            tl.store(partial_ptr + tl.program_id(0) * 2, tl.sum(dlam, 0))
            tl.store(partial_ptr + tl.program_id(0) * 2 + 1, tl.sum(dmu, 0))


def compile_cases() -> list[CompileCase]:
    """Both kernels at the widths that people use, with all inputs and with x and branch alone."""
    cases = []
    for dim in (512, 768, 2048, 8192):
        tuned = tuning.of_all_gpus("residual_norm", f"D={dim}")
        for config, capabilities in [(default_config(dim), tuple(ARCHITECTURES)), *tuned]:
            for full in (True, False):
                for way, function, more in (
                    ("forward", _residual_norm_forward_kernel, ("mixed_ptr", "normed_ptr")),
                    ("backward", _residual_norm_backward_kernel, ("dmixed_ptr", "dnormed_ptr", "dx_ptr", "dx0_ptr")),
                ):
                    tensors = dict.fromkeys(("x_ptr", "branch_ptr", "x0_ptr"), "*bf16")
                    signature = tensors | {"lam_ptr": "*fp32", "mu_ptr": "*fp32"} | dict.fromkeys(more, "*bf16")
                    if way == "backward":
                        signature["partial_ptr"] = "*fp32"
                    signature |= {"M": "i32", "D": "i32", "eps": "fp32"}
                    constants = {"BRANCH": True, "X0": full, "ROWS": config["ROWS"], "BLOCK": config["BLOCK"]}
                    what = f"{way} D={dim} {'mixed' if full else 'plain'}"
                    key = f"{what} ROWS={config['ROWS']} warps={config['num_warps']}"
                    options = {"num_warps": config["num_warps"]}
                    cases.append(CompileCase(key, function, signature, constants, options, capabilities))
    return cases


# ---- operators --------------------------------------------------------------------------------------------------


def _grid(m: int, config: dict[str, int]) -> tuple[int]:
    return (max(1, min(PROGRAMS, -(-m // config["ROWS"]))),)


@torch.library.custom_op("hotloop::residual_rms_norm", mutates_args=())
def _forward_op(
    x: Tensor, branch: Tensor | None, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Tensor]:
    m, d = x.numel() // x.shape[-1], x.shape[-1]
    mixed, normed = torch.empty_like(x), torch.empty_like(x)
    config = launch_config(d)
    if m:
        _residual_norm_forward_kernel[_grid(m, config)](
            x, branch if branch is not None else x, x0 if x0 is not None else x, lam if lam is not None else x,
            mu if mu is not None else x, mixed, normed, m, d, reference.NORM_EPS,
            BRANCH=branch is not None, X0=x0 is not None, **config,
        )  # fmt: skip
    return mixed, normed


@_forward_op.register_fake
def _(x: Tensor, branch: Any, x0: Any, lam: Any, mu: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("hotloop::residual_rms_norm_backward", mutates_args=())
def _backward_op(
    x: Tensor, branch: Tensor | None, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None, dmixed: Tensor,
    dnormed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m, d = x.numel() // x.shape[-1], x.shape[-1]
    config = launch_config(d)
    grid = _grid(m, config)
    dx = torch.empty_like(x)
    dx0 = torch.empty_like(x) if x0 is not None else x.new_empty(0)
    partial = torch.empty(grid[0] if x0 is not None and m else 0, 2, dtype=torch.float32, device=x.device)
    if m:
        _residual_norm_backward_kernel[grid](
            x, branch if branch is not None else x, x0 if x0 is not None else x, lam if lam is not None else x,
            mu if mu is not None else x, dmixed, dnormed, dx, dx0 if x0 is not None else x,
            partial if x0 is not None else dx, m, d, reference.NORM_EPS,
            BRANCH=branch is not None, X0=x0 is not None, **config,
        )  # fmt: skip
    return dx, dx0, partial.sum(0)


@_backward_op.register_fake
def _(x: Tensor, branch: Any, x0: Any, lam: Any, mu: Any, dmixed: Tensor, dnormed: Tensor) -> tuple[Tensor, ...]:
    dx0 = torch.empty_like(x) if x0 is not None else x.new_empty(0)
    return torch.empty_like(x), dx0, x.new_empty(2, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dmixed: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    x, branch, x0, lam, mu = ctx.saved_tensors
    dx, dx0, scalars = _backward_op(x, branch, x0, lam, mu, dmixed.contiguous(), dnormed.contiguous())
    dlam = scalars[0].to(lam.dtype) if lam is not None else None
    dmu = scalars[1].to(mu.dtype) if mu is not None else None
    return dx, dx if branch is not None else None, dx0 if x0 is not None else None, dlam, dmu


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# ---- public function --------------------------------------------------------------------------------------------


def residual_rms_norm(
    x: Tensor,
    branch: Tensor | None = None,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual mix and RMS norm; see `reference`.

    Args:
        x: [..., D], the residual stream; bfloat16, float16 or float32, D <= 8192.
        branch: of x's shape and dtype, added to x; None for none.
        x0: of x's shape and dtype, mixed in; comes with lam and mu.
        lam, mu: scalars [] on x's device, of a floating dtype.

    Returns:
        (mixed, normed), each of x's shape and dtype.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if (x0 is None) != (lam is None) or (x0 is None) != (mu is None):
        raise KernelError("x0, lam and mu come together or not at all")
    if not choose("residual_rms_norm", x.device.type):
        return reference.residual_rms_norm(x, branch, x0, lam, mu)
    if x.dtype not in DTYPES or not 0 < x.shape[-1] <= MAX_DIM:
        raise KernelError(
            f"residual_rms_norm serves bfloat16, float16 and float32 with up to {MAX_DIM} columns, not {x.dtype} "
            f"{list(x.shape)}"
        )
    for other in (branch, x0):
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise KernelError(f"{other.dtype} {list(other.shape)} does not fit x, {x.dtype} {list(x.shape)}")
    branch, x0 = (t if t is None else t.contiguous() for t in (branch, x0))
    found: tuple[Tensor, Tensor] = _forward_op(x.contiguous(), branch, x0, lam, mu)
    return found
