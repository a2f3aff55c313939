"""The product and the Triton kernel that a GPU is probed with. Importing it needs torch and Triton."""

import torch
import triton
import triton.language as tl

__all__ = ["compute"]


@triton.jit  # type: ignore[untyped-decorator]
def add_one_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1.0, mask=at < n)


def compute(device: str) -> str:
    """A product by torch and a sum by a Triton kernel; what was wrong, empty for nothing."""
    x = torch.ones(64, 64, device=device)
    if float((x @ x).sum()) != 64.0**3:
        return "torch's product of two matrices is wrong"
    out = torch.empty_like(x)
    add_one_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return "" if bool((out == 2.0).all()) else "a Triton kernel's sum is wrong"
