"""Which implementation of an operation runs: chosen once a process, by capability, and never silently.

OPERATORS is the one table: each operation's implementations by name. What a machine runs of it, that machine has proven
and measured (`hotloop tune`), and the harness passes it on as `HOTLOOP_KERNELS`:

    auto         references, compiled; attention by its ranking (`kernels.attend`)
    reference    nothing but references, for attention too
    triton       every kernel of ours; attention by its ranking
    NAMES        with commas between: `operator`, for our kernel, or `operator=implementation`; after a first `auto`
                 attention stays with its ranking, and what cannot run somewhere (a pre-flight's CPU) is the reference

What is asked for otherwise and cannot run is an error. A Triton kernel can run on tensors of a CUDA device of compute
capability 8.0 or newer; where TRITON_INTERPRET=1 is set, what is asked for runs on CPU tensors too. What the vendor's
library computes (`linear_fp8`) is not chosen: it runs where the hardware can, and under `reference` nowhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hotloop.kernels import cache_key, tuning
from hotloop.kernels.architectures import ARCHITECTURES

__all__ = [
    "HAVE_TRITON",
    "OPERATORS",
    "CompileCase",
    "KernelError",
    "Operator",
    "asked",
    "auto",
    "choose",
    "compiled",
    "describe",
    "implementation",
    "implementations",
    "note",
    "selection",
    "told",
]


class Operator(NamedTuple):
    """What can compute an operation.

    Attributes:
        implementations: from the one that is expected to be the fastest.
    """

    implementations: tuple[str, ...] = ("triton", "reference")


OPERATORS = {
    "adamw_": Operator(),
    "attention": Operator(("flash3", "torch", "flash4", "flash2", "cudnn", "flex", "triton", "reference")),
    "embedding": Operator(),
    "linear": Operator(),
    "linear_fp8": Operator(("vendor", "reference")),
    "loss": Operator(("triton", "triton-exp", "triton-chunked", "reference")),
    "mlp": Operator(),
    "muon_": Operator(),
    "qkv": Operator(),
    "residual": Operator(),
    "step": Operator(("compiled", "eager")),  # train.py's pass as a whole: by torch.compile, or as it is written
}
# Importing Triton takes a third of a second, in every process of every experiment, so a torch without CUDA goes without
# unless kernels are asked for.
ASKED = os.environ.get("HOTLOOP_KERNELS", "auto")
WANT_TRITON = torch.version.cuda is not None or any(
    item not in ("auto", "reference") and not item.startswith("step=") for item in ASKED.split(",")
)
HAVE_TRITON = WANT_TRITON and importlib.util.find_spec("triton") is not None
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


told: dict[str, str] = {}  # what else a record says of this process's kernels: `fusions`, by `kernels.fuse`
_decided: dict[str, tuple[bool, str]] = {}
_asked: set[str] = set()


def auto() -> bool:
    """Whether what is not named is chosen by what was measured."""
    return ASKED.split(",")[0] == "auto"


def selection() -> dict[str, str]:
    """Operator -> the implementation that `HOTLOOP_KERNELS` asks for. Raises KernelError for a name that has none."""
    return _selected(ASKED)


@functools.cache
def _selected(asked: str) -> dict[str, str]:
    if asked == "triton":
        return {name: "triton" for name, op in OPERATORS.items() if "triton" in op.implementations}
    found: dict[str, str] = {}
    for item in asked.split(",")[asked.split(",")[0] in ("auto", "reference") :]:
        name, _, chosen = item.strip().partition("=")
        chosen = chosen or "triton"
        if name not in OPERATORS or chosen not in OPERATORS[name].implementations:
            names = ", ".join(OPERATORS[name].implementations) if name in OPERATORS else ""
            why = f"{name} has {names}, and not {chosen!r}" if names else f"{name!r} is no kernel"
            raise KernelError(
                f"HOTLOOP_KERNELS={asked!r}: {why}; say auto, reference, triton, or some of {','.join(OPERATORS)}"
            )
        found[name] = chosen
    return found


def wanted() -> frozenset[str]:
    """The operators whose kernels of ours are asked for."""
    return frozenset(name for name, chosen in selection().items() if chosen.startswith("triton"))


def compiled(device: str) -> bool:
    """Whether a pass over tensors of this device type is compiled: on a GPU, and on a CPU where that is asked for."""
    note("step")
    return _step(device) == "compiled"


def _step(device: str) -> str:
    return selection().get("step", "compiled" if device == "cuda" else "eager")


def _decide(device: str) -> tuple[bool, str]:
    """(whether Triton kernels can run on tensors of this device type, why)."""
    if device not in _decided:
        cache_key.mark()
        can, why = _capable(device)
        if wanted() and not auto() and not can:
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
def implementation(operator: str, device: str) -> str:
    """The name of what computes `operator` on tensors of this device type.

    Raises:
        KernelError: `HOTLOOP_KERNELS` asks for what cannot run.
    """
    note(operator)
    return selection().get(operator, "reference") if _decide(device)[0] else "reference"


def choose(operator: str, device: str) -> bool:
    """True where a kernel of ours computes `operator`. Raises as `implementation`."""
    chosen: str = implementation(operator, device)
    return chosen.startswith("triton")


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
    table = {}
    for name in OPERATORS:
        if name == "step":
            table[name] = _step(device)
        elif name in describe:
            table[name] = describe[name](device)
        elif can and name in wanted():
            table[name] = f"{selection()[name]}: {why}"
        elif can:
            table[name] = f"reference: {'asked for' if not auto() else 'not chosen on this machine'}"
        else:
            table[name] = f"reference: {why}"
    return table | told
