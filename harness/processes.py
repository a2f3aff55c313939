"""The processes that a process started."""

from __future__ import annotations

import contextlib
import os

__all__ = ["descendants"]


def descendants(pid: int) -> set[int]:
    """The pids of all that a process started and that lives, as far down as it goes."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = set(_children(waiting.pop())) - found
        found |= new
        waiting += new
    return found


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                found += [int(p) for p in f.read().split()]
    return found
