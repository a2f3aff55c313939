"""AdamW without decay over many tensors in one launch, its rates on the device.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

(Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101.) Arithmetic is fp32, each tensor is
rounded once when it is stored. Rates, betas and corrections come from a tensor on the device, so that a captured graph
can replay with other rates.

Bytes, elements of b bytes, N elements in all: read p, g, m, v, write p, m, v: 7 N b.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import reference
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose

if HAVE_TRITON:
    import triton
    import triton.language as tl

__all__ = ["adamw_", "addresses", "compile_cases"]

BLOCK, WARPS = 4096, 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _pointer(at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
        """An address that is read says nothing of itself: loads are as wide as one is known to be aligned."""
        p = at.to(tl.pointer_type(TYPE))
        return tl.multiple_of(p, 16) if ALIGNED else p

    @triton.jit
    def _update(
        p_at, g_at, m_at, v_at, size_ptr, place, lr, b1, b2, eps, c1, c2, TYPE: tl.constexpr, ALIGNED: tl.constexpr
    ):  # fmt: skip
        """One block of one tensor; the addresses are numbers, TYPE their element. ALIGNED: they and size are multiples
        of 16.
        """
        size = tl.load(size_ptr)
        inside = place < (tl.multiple_of(size, 16) if ALIGNED else size)
        p_ptr = _pointer(p_at, TYPE, ALIGNED) + place
        g_ptr = _pointer(g_at, TYPE, ALIGNED) + place
        m_ptr = _pointer(m_at, TYPE, ALIGNED) + place
        v_ptr = _pointer(v_at, TYPE, ALIGNED) + place
        p = tl.load(p_ptr, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr, mask=inside, other=0.0).to(tl.float32)
        m += (g - m) * (1.0 - b1)
        v += (g * g - v) * (1.0 - b2)
        p -= (lr / c1) * (m / (tl.sqrt(v / c2) + eps))
        tl.store(p_ptr, p.to(TYPE), mask=inside)
        tl.store(m_ptr, m.to(TYPE), mask=inside)
        tl.store(v_ptr, v.to(TYPE), mask=inside)

    @triton.jit
    def _adamw_kernel(address_ptr, size_ptr, kind_ptr, chunk_ptr, hyper_ptr, BLOCK: tl.constexpr):
        """address int64 [n, 4] of p, g, m, v; size int64 [n]; kind int32 [n], of DTYPES, and 2 more where all of it is
        aligned; chunk int32 [programs, 2]: tensor, block.
        """
        i = tl.load(chunk_ptr + tl.program_id(0) * 2).to(tl.int64)
        block = tl.load(chunk_ptr + tl.program_id(0) * 2 + 1).to(tl.int64)
        place = block * BLOCK + tl.arange(0, BLOCK)
        size_ptr += i
        kind = tl.load(kind_ptr + i)
        lr = tl.load(hyper_ptr + i * 6)
        b1 = tl.load(hyper_ptr + i * 6 + 1)
        b2 = tl.load(hyper_ptr + i * 6 + 2)
        eps = tl.load(hyper_ptr + i * 6 + 3)
        c1 = tl.load(hyper_ptr + i * 6 + 4)
        c2 = tl.load(hyper_ptr + i * 6 + 5)
        p_at = tl.load(address_ptr + i * 4)
        g_at = tl.load(address_ptr + i * 4 + 1)
        m_at = tl.load(address_ptr + i * 4 + 2)
        v_at = tl.load(address_ptr + i * 4 + 3)
        if kind == 3:
            _update(p_at, g_at, m_at, v_at, size_ptr, place, lr, b1, b2, eps, c1, c2, tl.bfloat16, True)
        elif kind == 2:
            _update(p_at, g_at, m_at, v_at, size_ptr, place, lr, b1, b2, eps, c1, c2, tl.float32, True)
        elif kind == 1:
            _update(p_at, g_at, m_at, v_at, size_ptr, place, lr, b1, b2, eps, c1, c2, tl.bfloat16, False)
        else:
            _update(p_at, g_at, m_at, v_at, size_ptr, place, lr, b1, b2, eps, c1, c2, tl.float32, False)


def compile_cases() -> list[CompileCase]:
    signature = {
        "address_ptr": "*i64", "size_ptr": "*i64", "kind_ptr": "*i32", "chunk_ptr": "*i32", "hyper_ptr": "*fp32",
    }  # fmt: skip
    return [
        CompileCase(f"BLOCK={BLOCK} warps={WARPS}", _adamw_kernel, signature, {"BLOCK": BLOCK}, {"num_warps": WARPS})
    ]


# ---- operator ---------------------------------------------------------------------------------------------------


def table(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, which is not waited for: a copy from pinned memory, which torch gives out again only after it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], kinds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(size, kind, chunk) tables of a set of tensors."""
    chunks = [(i, b) for i, n in enumerate(sizes) for b in range(-(-n // BLOCK))]
    return (
        table(sizes, torch.int64, device),
        table(kinds, torch.int32, device),
        table(chunks, torch.int32, device),
    )


@functools.lru_cache(maxsize=64)
def addresses(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table of addresses. The allocator gives most steps the same, and a captured graph always has the same: then
    nothing is copied.
    """
    return table(numbers, torch.int64, device)


def kind_of(dtype: torch.dtype, size: int, numbers: tuple[int, ...]) -> int:
    """How the kernel takes tensors of so many elements at these addresses."""
    return DTYPES[dtype] + (0 if size % 16 or any(n % 16 for n in numbers) else 2)


@torch.library.custom_op("hotloop::adamw_", mutates_args=("params", "ms", "vs"))
def _op(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], hyper: Tensor) -> None:
    device, sizes = params[0].device, tuple(p.numel() for p in params)
    numbers = tuple(tuple(t.data_ptr() for t in four) for four in zip(params, grads, ms, vs, strict=True))
    kinds = tuple(kind_of(p.dtype, n, four) for p, n, four in zip(params, sizes, numbers, strict=True))
    size, kind, chunk = _layout(sizes, kinds, device)
    if len(chunk):
        address = addresses(numbers, device)
        _adamw_kernel[(len(chunk),)](address, size, kind, chunk, hyper, BLOCK=BLOCK, num_warps=WARPS)


@_op.register_fake
def _(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], hyper: Tensor) -> None:
    return None


# ---- public function --------------------------------------------------------------------------------------------


def adamw_(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor], hyper: Tensor) -> None:
    """One AdamW step of every tensor, in place; see `reference`.

    Args:
        params, grads, ms, vs: lists of n tensors on one device; the four of one place have one shape, and are float32
        or
            bfloat16 alike.
        hyper: fp32 [n, 6] on that device: lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if not params:
        return
    if not choose("adamw_", params[0].device.type):
        reference.adamw_(params, grads, ms, vs, hyper)
        return
    if tuple(hyper.shape) != (len(params), 6) or hyper.dtype != torch.float32:
        raise KernelError(f"hyper must be float32 [{len(params)}, 6], not {hyper.dtype} {list(hyper.shape)}")
    for p, *others in zip(params, grads, ms, vs, strict=True):
        for t in (p, *others):
            if t.dtype not in DTYPES or t.dtype != p.dtype or t.shape != p.shape or t.device != p.device:
                raise KernelError(
                    f"adamw_ serves float32 or bfloat16 tensors of one shape, not {p.dtype} {list(p.shape)} beside "
                    f"{t.dtype} {list(t.shape)}"
                )
        if not p.is_contiguous() or not all(t.is_contiguous() for t in others[1:]):
            raise KernelError(f"adamw_ needs contiguous tensors; one of shape {list(p.shape)} has other strides")
    _op(params, [g.contiguous() for g in grads], ms, vs, hyper)
