"""Racing: a run that cannot win is stopped early, and what that costs in false stops is said.

A run's *deficit* at a checkpoint is how far its training loss, the mean of the last tenth of the budget, is behind the
incumbent's: at as many tokens or at the same share of the budget, whichever is kinder (a faster train.py has more
tokens before it, and its rates fall later). The complete runs of the night tell how far behind one may be and still end
well: a run is stopped when it is further behind than every one of those that came within the noise of their incumbent
ever was at that checkpoint, and by a margin.

The rule is tried on the complete runs themselves, each judged by what all others say (leave one out): the share of
those that gained and would have been stopped is the false-stop rate, shown with its upper confidence limit. One run in
SPARED that the rule would stop goes on, so that runs of that kind are among the complete ones.

The losses are the trainer's word. A lie can keep a run from being stopped and wins nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hotloop.agent_loop.night import Night, Pair
from hotloop.harness.records.model import Curve, Outcome

__all__ = ["CHECKPOINTS", "Lesson", "Rate", "false_stops", "lessons", "stopper", "thresholds"]

CHECKPOINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WINDOW = 0.1
LEAST_RUNS = 8  # complete ones, of which
LEAST_GOOD = 3  # came within the noise of their incumbent
MARGIN_NATS = 0.01
SPARED = 8


@dataclass(frozen=True)
class Lesson:
    """A complete run: its deficits at the checkpoints in nats (None where a curve has no point), and how it ended."""

    number: int
    deficits: tuple[float | None, ...]
    gain: float
    good: bool  # within the noise of its incumbent, or better


@dataclass(frozen=True)
class Rate:
    """False stops among the runs that gained; `most` is the upper limit of the share at 95 % confidence."""

    stopped: int
    gained: int

    @property
    def most(self) -> float:
        """Clopper and Pearson's limit, by bisection: the share at which so few stops have a chance of 5 %."""
        if self.gained == 0 or self.stopped >= self.gained:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _at_most(self.stopped, self.gained, middle) > 0.05 else (low, middle)
        return high

    def __str__(self) -> str:
        if not self.gained:
            return "no complete run gained yet, so the false-stop rate is not known"
        return (
            f"of {self.gained} complete runs that gained, the rule would have stopped {self.stopped} (false-stop rate "
            f"at most {self.most:.0%}, 95 % confidence)"
        )


def _at_most(k: int, n: int, p: float) -> float:
    """The chance of at most k of n."""
    from math import comb

    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _recent(curve: Curve, tokens: float, at: float) -> float | None:
    """The mean loss over the tenth of the budget before `at` tokens; None without a point there."""
    losses = [loss for progress, loss in curve if at - WINDOW * tokens <= progress * tokens <= at]
    return sum(losses) / len(losses) if losses else None


def deficit(curve: Curve, tokens: int, best: Curve, best_tokens: int, progress: float) -> float | None:
    """How far behind `best` a run is, in nats; negative when ahead.

    Args:
        curve, best: [progress, loss] pairs.
        tokens, best_tokens: of the two budgets.
        progress: of the run, 0..1.
    """
    mine = _recent(curve, tokens, progress * tokens)
    theirs = [_recent(best, best_tokens, at) for at in (progress * tokens, progress * best_tokens) if at <= best_tokens]
    known = [t for t in theirs if t is not None]
    return None if mine is None or not known else min(mine - t for t in known)


@functools.lru_cache(maxsize=1 << 14)
def _deficits(pair: Pair) -> tuple[float | None, ...]:
    """Of a run at all checkpoints; each run is looked at once."""
    run, parent = pair.run, pair.parent
    args = (run.training.curve, run.training.tokens, parent.training.curve, parent.training.tokens)
    return tuple(deficit(*args, p) for p in CHECKPOINTS)


def lessons(night: Night, floor: float) -> list[Lesson]:
    """The complete experiments of a night beside the incumbents that they were made from."""
    return [Lesson(p.run.run.number, _deficits(p), p.gain, p.gain > -floor) for p in night.pairs]


def thresholds(known: Sequence[Lesson]) -> list[float | None]:
    """The deficit at each checkpoint above which a run is stopped; None where too little is known to stop any."""
    if len(known) < LEAST_RUNS:
        return [None] * len(CHECKPOINTS)
    limits: list[float | None] = []
    for i in range(len(CHECKPOINTS)):
        good = [d for lesson in known if lesson.good and (d := lesson.deficits[i]) is not None]
        if len(good) < LEAST_GOOD:
            limits.append(None)
        else:
            limits.append(max(0.0, max(good)) + max(MARGIN_NATS, statistics.stdev(good)))
    return limits


def _stops(deficits: Sequence[float | None], limits: Sequence[float | None]) -> int | None:
    """The first checkpoint at which the rule stops a run."""
    pairs = enumerate(zip(deficits, limits, strict=True))
    return next((i for i, (d, most) in pairs if d is not None and most is not None and d > most), None)


def false_stops(known: Sequence[Lesson]) -> Rate:
    """The rule tried on the complete runs that gained, each by what all others say."""
    gained = [lesson for lesson in known if lesson.gain > 0]
    without = [_limits_without(known, i) for i in range(len(CHECKPOINTS))]
    stopped = sum(_stops(g.deficits, [limit(g) for limit in without]) is not None for g in gained)
    return Rate(stopped, len(gained))


def _limits_without(known: Sequence[Lesson], place: int) -> Callable[[Lesson], float | None]:
    """What `thresholds` says at a checkpoint without a lesson: from sums over all, so that each takes no time."""
    good = [d for lesson in known if lesson.good and (d := lesson.deficits[place]) is not None]
    top = sorted(good)[-2:]
    mean = statistics.fmean(good) if good else 0.0
    squares = math.fsum((d - mean) ** 2 for d in good)

    def limit(lesson: Lesson) -> float | None:
        d = lesson.deficits[place] if lesson.good else None
        count = len(good) - (d is not None)
        if len(known) - 1 < LEAST_RUNS or count < LEAST_GOOD:
            return None
        most, spread = top[-1], squares
        if d is not None:
            most = top[-2] if d == most else most
            spread = max(0.0, squares - (d - mean) ** 2 * (count + 1) / count)
        return max(0.0, most) + max(MARGIN_NATS, math.sqrt(spread / (count - 1)))

    return limit


def spared(tag: str, number: int) -> bool:
    """Whether a run goes on whatever the rule says; the same for the same run at any time."""
    return hashlib.sha256(f"{tag}:{number}".encode()).digest()[0] % SPARED == 0


def stopper(best: Outcome, known: Sequence[Lesson], tag: str, number: int) -> Callable[[Curve, int], str | None] | None:
    """What the session asks after each loss; None where this run is not raced.

    Args:
        best: the incumbent that the run was made from.
        known: the complete runs so far.
    """
    limits = thresholds(known)
    if spared(tag, number) or all(limit is None for limit in limits) or not best.training.tokens:
        return None
    left = list(enumerate(CHECKPOINTS))

    def stop(curve: Curve, tokens: int) -> str | None:
        while left and curve[-1][0] >= left[0][1]:
            i, progress = left.pop(0)
            behind, most = deficit(curve, tokens, best.training.curve, best.training.tokens, progress), limits[i]
            if behind is not None and most is not None and behind > most:
                return (
                    f"stopped at {progress:.0%}: {behind:.4f} nats behind experiment {best.run.number}; of "
                    f"{len(known)} complete runs none that came near it was so far behind there (limit {most:.4f})"
                )
        return None

    return stop
