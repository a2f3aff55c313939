"""Which implementation of an operation runs: chosen once a process, by capability, and never silently.

A Triton kernel runs on tensors of a CUDA device of compute capability 8.0 or newer. `HOTLOOP_KERNELS=reference` turns
the kernels off; `HOTLOOP_KERNELS=triton` insists on them, on CPU tensors too where `TRITON_INTERPRET=1` is set.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch

from kernels import tuning

__all__ = ["HAVE_TRITON", "TRITON_OPERATORS", "CompileCase", "KernelError", "choose", "implementations"]

# Importing Triton takes a third of a second, in every process of every experiment, so a torch without CUDA goes without
# unless the kernels are asked for.
WANT_TRITON = torch.version.cuda is not None or os.environ.get("HOTLOOP_KERNELS") == "triton"
HAVE_TRITON = WANT_TRITON and importlib.util.find_spec("triton") is not None

# Operations that have a Triton kernel; the others have only their reference so far.
TRITON_OPERATORS = ("softcap_cross_entropy_", "softcap_linear_cross_entropy")
REFERENCE_OPERATORS = ("apply_rope_norm", "attention", "embedding", "linear_relu2", "rms_norm")


class KernelError(RuntimeError):
    """An implementation was asked for that cannot run here, or inputs that no implementation serves."""


class CompileCase(NamedTuple):
    """One configuration that is shipped, for the compile gate.

    Attributes:
        key: size and variant, in words.
        function: the @triton.jit function.
        signature: argument -> Triton type, without the constants.
        constants: argument -> value.
        options: num_warps, num_stages.
        capabilities: 10 * major + minor of every architecture that it claims to run on.
        tensor_cores: whether matrix instructions must appear.
    """

    key: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    capabilities: tuple[int, ...] = (80, 90, 100)
    tensor_cores: bool = False


_decided: dict[str, tuple[bool, str]] = {}


def _decide(device: str) -> tuple[bool, str]:
    """(whether Triton kernels run on tensors of this device type, why)."""
    if device not in _decided:
        asked = os.environ.get("HOTLOOP_KERNELS", "auto")
        if asked not in ("auto", "reference", "triton"):
            raise KernelError(f"HOTLOOP_KERNELS={asked!r}: say auto, reference or triton")
        can, why = (False, "asked for") if asked == "reference" else _capable(device)
        if asked == "triton" and not can:
            raise KernelError(f"HOTLOOP_KERNELS=triton was asked for and cannot run: {why}")
        _decided[device] = can, why
    return _decided[device]


def _capable(device: str) -> tuple[bool, str]:
    if not HAVE_TRITON:
        return False, "triton is not installed" if WANT_TRITON else "this torch has no CUDA"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return False, f"compute capability {major}.{minor} is below 8.0"
        return True, "; ".join(filter(None, [f"cuda sm_{major}{minor}", tuning.notice()]))
    # The interpreter proves kernels and is slow: only where it is asked for.
    if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("HOTLOOP_KERNELS") == "triton":
        return True, "interpreter"
    return False, f"{device} tensors; kernels need CUDA, or TRITON_INTERPRET=1 to be tried without"


def choose(operator: str, device: str) -> bool:
    """True where the Triton kernel of `operator` runs on tensors of this device type.

    Raises:
        KernelError: `HOTLOOP_KERNELS` asks for what cannot run.
    """
    return operator in TRITON_OPERATORS and _decide(device)[0]


def implementations() -> dict[str, str]:
    """Operator -> implementation and reason, on this process's device; goes into every record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton, why = _decide(device)
    table = {name: f"{'triton' if triton else 'reference'}: {why}" for name in TRITON_OPERATORS}
    return table | dict.fromkeys(REFERENCE_OPERATORS, "reference: no kernel yet")
