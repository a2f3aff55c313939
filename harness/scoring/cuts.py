"""Where an audit looks: cuts drawn so that a lie that wins much is met, and how many odd ones honest noise explains.

A lie can only win where the reported loss is far below what a trusted reference lost on the same token (the night's
baseline, the user's own file). So half of the cuts are drawn in proportion to that gain, a token's chance being its
share of all gains; the other half anywhere. Without a reference all are drawn anywhere.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["allowed_mismatches", "draw"]

# How often honest differences pass the tolerance. On a CPU they never do (the largest of 200 honest audits is a
# thousandth of it). In bf16 their tails are heavy: Student's t with 3 degrees of freedom and a scale of 1e-3 nats
# passes 0.02 nats 2.8e-4 of the time; an estimate until it was measured on a GPU.
HONEST_SHARE = {"cpu": 0.0, "cuda": 5e-4}
ALARM = 1e-5  # the chance that honest noise passes more often than is allowed


def draw(
    nll: npt.NDArray[np.float32], reference: npt.NDArray[np.floating] | None, count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and positions of `count` cuts, in a random order; several may be in one row.

    Args:
        nll: float [N, T], what was reported, nats.
        reference: float [N, T], what the reference lost; None for none.
    """
    rows, length = nll.shape
    anywhere = count if reference is None else count // 2
    picked = np.concatenate([rng.permutation(rows) for _ in range(-(-anywhere // rows))])[:anywhere]
    at = [picked * length + rng.integers(0, length, anywhere)]
    if reference is not None:
        chances = np.cumsum(np.maximum(0.0, reference.astype(np.float64) - nll).ravel())
        if chances[-1] > 0:
            at.append(np.searchsorted(chances, rng.random(count - anywhere) * chances[-1], side="right"))
        else:
            at.append(rng.integers(0, rows * length, count - anywhere))
    cuts = np.minimum(rng.permutation(np.concatenate(at)), rows * length - 1)
    return np.asarray(cuts // length), np.asarray(cuts % length)


def allowed_mismatches(count: int, device: str) -> int:
    """How many of `count` cuts may differ by more than the tolerance before noise explains them no more."""
    mean = count * HONEST_SHARE[device]
    term, tail, k = math.exp(-mean), 1.0 - math.exp(-mean), 0  # Poisson
    while tail > ALARM:
        k += 1
        term *= mean / k
        tail -= term
    return k
