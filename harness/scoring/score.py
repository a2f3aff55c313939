"""Scores, which know that lower is better, and the noise they are measured with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import total_ordering

__all__ = ["Noise", "Score"]


@total_ordering
@dataclass(frozen=True, eq=False)
class Score:
    """Validation bits per byte. `max(scores)` is the best one, `a > b` reads "a is better"."""

    bpb: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self.bpb == other.bpb

    def __hash__(self) -> int:
        return hash(self.bpb)

    def __lt__(self, other: Score) -> bool:
        return self.bpb > other.bpb

    def gain_over(self, other: Score) -> float:
        """Bits per byte by which this score is better than `other` (negative when worse)."""
        return other.bpb - self.bpb

    def __str__(self) -> str:
        return f"{self.bpb:.6f}"


@dataclass(frozen=True)
class Noise:
    """How far the score of one train.py moves from seed to seed.

    `floor_bpb` is the gain below which a difference of two single runs says nothing: two
    standard deviations of such a difference, `2 * sqrt(2) * sd`, with sd the sample standard
    deviation over the seeds that were run.
    """

    floor_bpb: float
    seeds: int

    @classmethod
    def from_repeats(cls, *groups: Sequence[float]) -> Noise:
        """From the scores of one or more train.py, each under different seeds: the pooled standard deviation.

        Groups of fewer than two tell nothing.
        """
        told = [g for g in groups if len(g) > 1]
        if not told:
            return cls(0.0, max((len(g) for g in groups), default=0))
        squares = sum((len(g) - 1) * statistics.variance(g) for g in told)
        freedom = sum(len(g) - 1 for g in told)
        return cls(2.0 * 2.0**0.5 * (squares / freedom) ** 0.5, sum(len(g) for g in told))
