"""Which launch configuration is fastest: successive halving against the default, round by round.

Every candidate gets a few rounds beside the default, in which both are timed one after the other; what is slower then
is not timed again, and of the others the best go on to more rounds, until the winner has to win beyond the spread.
How a round is timed is the caller's: kernels on a GPU, or a script in a test. Ratios are noted as they are found, so
that a search that is cut short goes on; so is what a candidate was being tried for, since one that faults takes the
process with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from hotloop.harness.tuning.notes import Notes
from hotloop.harness.tuning.selection import TimeIsUp, Unfit, fastest_quantile

__all__ = ["KEEP", "RUNGS", "blame", "halving", "out_of"]

RUNGS = (5, 12, 25)  # rounds, all told, after which candidates are judged
KEEP = 4  # one in so many of those that are faster goes on, of a few all
FEW = 4
MARGIN = 0.01  # of the time: less is not worth another configuration

Round = Callable[[str], float]  # a candidate -> the default's time over its own, in one round; raises Unfit


def entry(notes: Notes, key: str) -> dict[str, Any]:
    """What is noted of one search: {"ratios": {candidate: [...]}, "out": {candidate: reason}}."""
    found: dict[str, Any] = notes.body.setdefault(key, {"ratios": {}, "out": {}})
    return found


def blame(notes: Notes, reason: str) -> str:
    """The process ended while a candidate was tried: that one is out. Its name; empty where none was tried."""
    trying = notes.body.pop("trying", None)
    if trying is None:
        return ""
    key, name = trying
    entry(notes, key)["out"][name] = reason
    notes.save()
    return str(name)


def out_of(notes: Notes, key: str, name: str, reason: str) -> None:
    """Note that a candidate is none, before any round."""
    entry(notes, key)["out"][name] = reason


def halving(
    key: str, names: Sequence[str], prove: Callable[[str], None], round_of: Round, notes: Notes,
    over: Callable[[], bool] = lambda: False,
) -> str | None:  # fmt: skip
    """The candidate that beats the default by more than the spread, or None.

    Args:
        prove: raises Unfit for a candidate that cannot be launched or gives another answer; once before its rounds.

    Raises:
        TimeIsUp: `over` said so between two candidates; what was timed is noted.
    """
    here = entry(notes, key)
    if "best" in here:
        return None if here["best"] is None else str(here["best"])
    left = [name for name in names if name not in here["out"]]
    for rung, rounds in enumerate(RUNGS):
        for name in left:
            ratios = here["ratios"].get(name, [])
            if len(ratios) >= rounds:
                continue
            if over():
                raise TimeIsUp
            notes.body["trying"] = [key, name]
            notes.save()
            try:
                if not ratios:
                    prove(name)
                here["ratios"][name] = ratios + [round_of(name) for _ in range(rounds - len(ratios))]
            except Unfit as e:
                here["out"][name] = str(e)
                here["ratios"].pop(name, None)
            notes.body.pop("trying")
            notes.save()
        faster = [n for n in left if n in here["ratios"] and statistics.median(here["ratios"][n]) > 1.0]
        faster.sort(key=lambda n: -statistics.median(here["ratios"][n]))
        left = faster[: max(FEW, -(-len(faster) // KEEP))] if rung + 1 < len(RUNGS) else faster
    best = next((name for name in left if fastest_quantile(here["ratios"][name]) > 1 + MARGIN), None)
    here["best"] = best
    notes.save()
    return best
