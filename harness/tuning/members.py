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

__all__ = ["ATTENTION", "STEP", "THREADS", "candidates", "selection_of", "setting_of"]

ATTENTION, STEP, THREADS = "attention", "step", "threads"


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
    known = [(name, op) for name, op in OPERATORS.items() if name in asked and name not in (STEP, "linear_fp8")]
    return [Member(name, i) for name, op in known for i in op.implementations if i != "reference"]


def setting_of(members: Members, found: Mapping[str, Any] | None = None, threads: int = 1) -> Setting:
    """How a set is run: without any member, references under torch.compile on a GPU, eagerly on a CPU.

    Args:
        found: `configs` that were tuned, where there are any.
        threads: where the set does not say.
    """
    chosen = selection_of(members)
    attention = chosen.pop(ATTENTION, "")
    threads = int(chosen.pop(THREADS, threads))
    named = [f"{part}={i}" for part, i in sorted(chosen.items())]
    environment = {
        "HOTLOOP_KERNELS": ",".join(["reference", *named, *([f"{ATTENTION}=triton"] if attention == "triton" else [])]),
        "HOTLOOP_ATTENTION": "" if attention == "triton" else attention,
        PASSED: json.dumps({"configs": (found or {}).get("configs", {}), "measured": {}}),
    }
    return Setting(words(members), environment, threads=threads)


def selection_of(members: Members) -> dict[str, str]:
    """Part -> implementation, as a profile has it."""
    return {m.part: m.implementation for m in members}
