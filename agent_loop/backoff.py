"""How long to wait before something is tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Backoff"]


@dataclass
class Backoff:
    """Waits in seconds, each twice the one before, up to `longest_s`. `tries` waits were given; 0 begins anew."""

    first_s: float
    longest_s: float = math.inf
    tries: int = 0

    def next_s(self) -> float:
        self.tries += 1
        return min(self.longest_s, self.first_s * 2.0 ** min(30, self.tries - 1))
