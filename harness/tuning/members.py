"""What a step can be made of, and how a set of it is run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from hotloop.harness.profile import PASSED
from hotloop.harness.tuning.runner import Setting
from hotloop.harness.tuning.selection import Member, Members, words
from hotloop.kernels.dispatch import OPERATORS

__all__ = ["ATTENTION", "STEP", "THREADS", "candidates", "operators_of", "selection_of", "setting_of"]

ATTENTION, STEP, THREADS = "attention", "step", "threads"
CONSTANT = "train.py"  # a part whose implementation is NAME=VALUE


def operators_of(part: str) -> tuple[str, ...]:
    """Those that run together are one part: their names, with commas between."""
    return tuple(part.split(","))


def candidates(asked: Iterable[str], device: str, threads: int) -> list[Member]:
    """What can be chosen instead of what runs anyway.

    Args:
        asked: operators of which the step had to choose an implementation.
        threads: that the step has anyway.
    """
    asked = frozenset(asked)
    if device == "cpu":  # nothing of ours or of others runs there
        cores = len(os.sched_getaffinity(0))
        counts = sorted({1, cores} | {n for n in (2, 4, 8, 16, 32) if n < cores})
        return [
            *([Member(STEP, "compiled")] if STEP in asked else []),
            *(Member(THREADS, str(n)) for n in counts if n != threads),
        ]
    parts: dict[str, tuple[str, ...]] = {}
    for name, op in OPERATORS.items():
        group = [n for n, other in OPERATORS.items() if op.together and other.together == op.together] or [name]
        if asked & set(group) and name not in (STEP, "linear_fp8"):
            parts[",".join(group)] = op.implementations
    return [Member(part, i) for part, names in parts.items() for i in names if i != "reference"]


def setting_of(members: Members, found: Mapping[str, Any] | None = None, threads: int = 1) -> Setting:
    """How a set is run: without any member, references under torch.compile on a GPU, eagerly on a CPU.

    Args:
        found: `configs` that were tuned, where there are any.
        threads: where the set does not say.
    """
    chosen = {m.part: m.implementation for m in members if m.part != CONSTANT}
    attention = chosen.pop(ATTENTION, "")
    threads = int(chosen.pop(THREADS, threads))
    named = [f"{operator}={i}" for part, i in sorted(chosen.items()) for operator in operators_of(part)]
    kernels = ",".join([*named, *([f"{ATTENTION}=triton"] if attention == "triton" else [])])
    environment = {
        "HOTLOOP_KERNELS": f"reference,{kernels}" if kernels else "reference",
        "HOTLOOP_ATTENTION": "" if attention == "triton" else attention,
        PASSED: json.dumps({"configs": (found or {}).get("configs", {}), "measured": {}}),
    }
    constants = tuple(sorted(m.implementation for m in members if m.part == CONSTANT))
    return Setting(words(members), environment, constants, threads=threads)


def selection_of(members: Members) -> dict[str, str]:
    """Operator -> implementation, as a profile has it."""
    return {name: m.implementation for m in members for name in operators_of(m.part)}
