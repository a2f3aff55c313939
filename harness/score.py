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
    def from_repeats(cls, bpbs: Sequence[float]) -> Noise:
        """From the scores of one train.py under different seeds; fewer than two tell nothing."""
        if len(bpbs) < 2:
            return cls(0.0, len(bpbs))
        return cls(2.0 * 2.0**0.5 * statistics.stdev(bpbs), len(bpbs))
