"""Which implementation of an operation runs: chosen once a process, by capability, and never silently.

A Triton kernel can run on tensors of a CUDA device of compute capability 8.0 or newer. By default those of DEFAULTS
do: the ones that were measured to win end to end on a GPU. `HOTLOOP_KERNELS` asks for something else: `reference` for
none, `triton` for all, or operators with commas between (those of TOGETHER as one); what is asked for and cannot run is
an error. Attention has more than two implementations and a ranking of its own (`kernels.attend`): `triton` leaves it to
that, and only its name asks for ours. Where TRITON_INTERPRET=1 is set, what is asked for runs on CPU tensors too. What
the vendor's library computes needs no kernel of ours and is not named there: it runs where the hardware can, and under
`reference` nowhere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hotloop.kernels import cache_key, tuning
from hotloop.kernels.architectures import ARCHITECTURES

__all__ = [
    "DEFAULTS",
    "HAVE_TRITON",
    "TOGETHER",
    "TRITON_OPERATORS",
    "VENDOR_OPERATORS",
    "CompileCase",
    "KernelError",
    "asked",
    "choose",
    "describe",
    "implementations",
    "note",
]

# Importing Triton takes a third of a second, in every process of every experiment, so a torch without CUDA goes without
# unless kernels are asked for.
ASKED = os.environ.get("HOTLOOP_KERNELS", "auto")
WANT_TRITON = torch.version.cuda is not None or ASKED not in ("auto", "reference")
HAVE_TRITON = WANT_TRITON and importlib.util.find_spec("triton") is not None

# Operations that have a Triton kernel; the others have only their reference so far.
TRITON_OPERATORS = (
    "adamw_", "attention", "embedding", "linear", "linear_qkv_rope_norm", "linear_residual", "mlp_relu2", "muon_",
    "norm_linear_qkv", "norm_mlp_relu2", "qkv_rope_norm", "residual_rms_norm", "softcap_cross_entropy_",
    "softcap_linear_cross_entropy",
)  # fmt: skip
# Each of these takes what another leaves, so they run together or not at all.
TOGETHER = frozenset({"linear_residual", "norm_linear_qkv", "norm_mlp_relu2"})
# No kernel is a default before it was measured to win end to end on a GPU (docs/performance.md).
DEFAULTS: frozenset[str] = frozenset()
REFERENCE_OPERATORS = ("apply_rope_norm", "rms_norm")
# Operations whose fast form is the vendor library's; each says in `describe` whether it runs.
VENDOR_OPERATORS = ("linear_fp8",)
# Operators that choose among more than their kernel and their reference: name -> what runs on a device type.
describe: dict[str, Callable[[str], str]] = {}


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
    capabilities: tuple[int, ...] = tuple(ARCHITECTURES)
    tensor_cores: bool = False


_decided: dict[str, tuple[bool, str]] = {}
_asked: set[str] = set()


def wanted() -> frozenset[str]:
    """The operators whose kernels `HOTLOOP_KERNELS` asks for. Raises KernelError for a name that has none."""
    if ASKED in ("auto", "reference", "triton"):
        return DEFAULTS if ASKED == "auto" else frozenset(TRITON_OPERATORS if ASKED == "triton" else ())
    names = frozenset(n.strip() for n in ASKED.split(","))
    unknown = sorted(names - set(TRITON_OPERATORS))
    if unknown:
        raise KernelError(
            f"HOTLOOP_KERNELS={ASKED!r}: {unknown[0]!r} is no kernel; say auto, reference, triton, or some of "
            f"{','.join(TRITON_OPERATORS)}"
        )
    return names | TOGETHER if names & TOGETHER else names


def _decide(device: str) -> tuple[bool, str]:
    """(whether Triton kernels can run on tensors of this device type, why)."""
    if device not in _decided:
        cache_key.mark()
        can, why = _capable(device)
        if wanted() and ASKED != "auto" and not can:
            raise KernelError(f"HOTLOOP_KERNELS={ASKED} was asked for and cannot run: {why}")
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
    if os.environ.get("TRITON_INTERPRET") == "1" and ASKED != "auto":
        return True, "interpreter"
    return False, f"{device} tensors; kernels need CUDA, or TRITON_INTERPRET=1 to be tried without"


@torch.compiler.assume_constant_result  # it is decided once a process; a graph needs no guard for it
def choose(operator: str, device: str) -> bool:
    """True where the Triton kernel of `operator` runs on tensors of this device type.

    Raises:
        KernelError: `HOTLOOP_KERNELS` asks for what cannot run.
    """
    note(operator)
    return _decide(device)[0] and operator in wanted()


def note(operator: str) -> None:
    """Remember that this process had to choose an implementation of it."""
    _asked.add(operator)


def asked() -> frozenset[str]:
    """The operators of which this process had to choose so far: those that what it ran could have a kernel for."""
    return frozenset(_asked)


def implementations() -> dict[str, str]:
    """Operator -> implementation and reason, on this process's device; goes into every record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    can, why = _decide(device)
    table = dict.fromkeys(REFERENCE_OPERATORS, "reference: no kernel yet")
    for name in (*TRITON_OPERATORS, *VENDOR_OPERATORS):
        if name in describe:
            table[name] = describe[name](device)
        elif can and name in wanted():
            table[name] = f"triton: {why}"
        elif can:
            table[name] = f"reference: {'asked for' if ASKED != 'auto' else 'its kernel is not a default'}"
        else:
            table[name] = f"reference: {why}"
    return table
