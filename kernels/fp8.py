"""A linear layer multiplied in 8 bits: e4m3 forward, backward in the input's dtype or with dy in e5m2.

    y = (xq wq^T) sx sw^T;   xq = e4m3(x / sx), sx[m] the least power of two no less than max |x[m]| / 448;
                             wq and sw the same of the rows of W
    dx = dy W, or (dq vq^T) sd sv^T;   dq = e5m2(dy / sd), of 57344;   vq and sv: e4m3 of the columns of W
    dW = dy^T x

Rounding counts as the identity. A scale of x belongs to one row, so what is computed of a token depends on no other
token: a scale of the whole tensor would fail the evaluation's audit. Rounding is plain PyTorch, for torch.compile to
fuse with what made x. The product is the vendor library's (torch.nn.functional.scaled_mm with row-wise scales, summed
in fp32), behind an operator of ours, because torch's counter does not count it.

Bytes, elements of b bytes: read x and W, write y: (M (D + N) + N D) b, and twice (M + N) D for the 8-bit copies between
rounding and product. Backward: as `linear`; with e5m2, twice (M + D) N more. Operations: 2 M D N forward, 4 backward.

Scales a row, of powers of two, are those of torchao's row-wise recipe (the idea, not the code).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import cache_key, dispatch, reference
from hotloop.kernels.dispatch import KernelError
from hotloop.kernels.gemm.weight_gradient import weight_gradient
from hotloop.kernels.reference import E4M3, E5M2, quantize

__all__ = ["BACKWARDS", "check_fp8", "input_gradient", "linear_fp8", "scaled_product"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKWARDS = ("bf16", "e5m2")
MULTIPLE = 16  # of both widths, which the row-wise product demands


# ---- which one runs ---------------------------------------------------------------------------------------------


@functools.cache
def _decide(device: str) -> tuple[bool, str]:
    """(whether products in 8 bits run on tensors of this device type, why)."""
    cache_key.mark()
    if dispatch.ASKED == "reference":
        return False, "asked for"
    if device == "cuda":
        if torch.version.cuda is None:
            return False, "this torch has no CUDA"
        if not hasattr(F, "scaled_mm"):
            return False, f"torch {torch.__version__} has no scaled_mm"
        major, minor = torch.cuda.get_device_capability()
        return (major, minor) >= (8, 9), f"cuda sm_{major}{minor}" + (
            "" if (major, minor) >= (8, 9) else " is below 8.9"
        )
    if os.environ.get("TRITON_INTERPRET") == "1" and dispatch.ASKED != "auto":
        return True, "interpreter"  # of the other kernels: this one is emulated
    return False, f"{device} tensors; products in 8 bits need CUDA 8.9 or newer"


@torch.compiler.assume_constant_result  # as dispatch.choose
def runs(device: str) -> bool:
    """True where the operator, and not the reference, runs on tensors of this device type."""
    return _decide(device)[0]


def _described(device: str) -> str:
    can, why = _decide(device)
    return f"{'vendor' if can else 'reference'}: {why}"


dispatch.describe["linear_fp8"] = _described


# ---- product ----------------------------------------------------------------------------------------------------


def vendor_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """As `scaled_product`, by torch."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(a, b.T, scale_a, by_row, scale_b.T, by_row, output_dtype=dtype)


@torch.library.custom_op("hotloop::scaled_product", mutates_args=())
def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a b^T) scale_a scale_b^T in dtype: a [M, K] and b [N, K] in 8 bits, scales fp32 [M, 1] and [N, 1] -> [M, N]."""
    if a.is_cuda and runs("cuda"):
        return vendor_product(a, b, scale_a, scale_b, dtype)
    with torch.autocast(a.device.type, enabled=False):  # it stays in fp32
        return ((a.float() * scale_a) @ (b.float() * scale_b).T).to(dtype)


@scaled_product.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.hotloop.scaled_product)
def _flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * b[0])


# ---- forward and backward ---------------------------------------------------------------------------------------


def input_gradient(dy: Tensor, weight: Tensor, backward: str = "") -> Tensor:
    """dy W: dy [M, N], weight [N, D] -> [M, D]; in 8 bits where `backward` is e5m2."""
    if backward != "e5m2":
        return dy @ weight
    (dq, d_scale), (vq, v_scale) = quantize(dy, E5M2), quantize(weight.T, E4M3)
    made: Tensor = scaled_product(dq, vq, d_scale, v_scale, dy.dtype)
    return made


class _Linear(torch.autograd.Function):
    """No registered operator: its rounding would be out of the compiler's sight, and x would have to be in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backward: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = backward
        (xq, x_scale), (wq, w_scale) = quantize(x, E4M3), quantize(weight, E4M3)
        made: Tensor = scaled_product(xq, wq, x_scale, w_scale, x.dtype)
        return made

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return input_gradient(dy, weight, ctx.how), weight_gradient(dy, x), None


# ---- public function --------------------------------------------------------------------------------------------


def check_fp8(x: Tensor, weight: Tensor, backward: str) -> None:
    """Raises KernelError for what the product does not serve."""
    if backward not in BACKWARDS:
        raise KernelError(f"no backward pass in 8 bits is called {backward!r}; there are {', '.join(BACKWARDS)}")
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise KernelError(
            f"linear_fp8 serves bfloat16, float16 and float32, both alike, not {x.dtype} and {weight.dtype}"
        )
    if not x.ndim or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.numel():
        raise KernelError(
            f"linear_fp8 needs x [..., D] and weight [N, D], not {list(x.shape)} and {list(weight.shape)}"
        )
    if runs(x.device.type) and (weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE):
        raise KernelError(
            f"linear_fp8's product needs widths of a multiple of {MULTIPLE}, not a weight {list(weight.shape)}"
        )


def linear_fp8(x: Tensor, weight: Tensor, backward: str = "bf16") -> Tensor:
    """x W^T of both rounded to e4m3; see `reference`.

    Args:
        x: [..., D]; under autocast it and the weight are taken in the autocast dtype, else the weight in x's.
        weight: [N, D].
        backward: `bf16` or `e5m2`, the type of dy in dx = dy W; `bf16` stands for the input's dtype.

    Returns:
        [..., N].

    Raises:
        KernelError: inputs that the product does not serve.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to(x.dtype)
    check_fp8(x, weight, backward)
    if not runs(x.device.type):
        return reference.linear_fp8(x, weight, backward)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, backward)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])
