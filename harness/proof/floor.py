"""The least that a token of the baseline architecture costs: everything fused that can be, at a machine's ceilings."""

from __future__ import annotations

__all__ = ["FLOOR", "floor_s", "step_floor_s"]

# MFLOP and KB of ideal traffic a token, all layers, forward and backward. Estimates from counting bytes and operations;
# times come from the machine's own ceilings.
FLOOR = {
    "matrix products": (37.7 + 12.6 + 100.7, 135 + 57 + 311),
    "attention": (13.6 + 34.1, 33 + 107),
    "loss": (25.2, 52 + 2),
    "embedding": (0.0, 10),
    "fused elementwise": (0.0, 82),
}


def floor_s(group: str, flops_per_s: float, bytes_per_s: float) -> float:
    """Seconds a token of one group."""
    megaflop, kilobytes = FLOOR[group]
    return max(megaflop * 1e6 / flops_per_s, kilobytes * 1e3 / bytes_per_s)


def step_floor_s(flops_per_s: float, bytes_per_s: float) -> float:
    """Seconds a token of a whole step."""
    return sum(floor_s(group, flops_per_s, bytes_per_s) for group in FLOOR)
