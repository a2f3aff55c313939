"""The audit: where it looks, what it asks, and what it makes of the answers.

A lie can only win where the reported loss is far below what a trusted reference lost on the same token (the incumbent,
which the run is to beat). So a fifth of the cuts are drawn in proportion to that gain, a token's chance being its share
of all gains over val and holdout. The others are drawn anywhere: they meet a model that is worse than the reference on
some tokens and lies itself back to it there. Without a reference all are drawn anywhere.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import Audit

__all__ = ["SAMPLE", "STEADY_NATS", "TOLERANCE_NATS", "allowed_mismatches", "compare", "draw", "questions", "surprise"]

Rows = npt.NDArray[np.uint16]

# How far A and B may differ on one token. Their batches have the same shape, so on a CPU an honest model repeats
# itself to rounding; in bf16 on a GPU 0.02 nats is the bound of the design notes, still to be measured there.
TOLERANCE_NATS = {"cpu": 2e-3, "cuda": 2e-2}
# Beyond this an honest model did not repeat itself as it does on a CPU (2e-6 at most in 200 audits): in one process all
# losses were off by 1e-5, for a reason that is not known.
STEADY_NATS = {"cpu": 1e-5, "cuda": math.inf}
# The mean difference of honest runs is zero within its own standard error; this many of those errors are
# allowed, and a little more than the rounding of fp32 sums.
MEAN_ERRORS = 6.0
MEAN_SLACK_NATS = 2e-5
# How often honest differences pass the tolerance. On a CPU they never do (the largest of 200 honest audits is a
# thousandth of it). In bf16 their tails are heavy: Student's t with 3 degrees of freedom and a scale of 1e-3 nats
# passes 0.02 nats 2.8e-4 of the time; an estimate until it was measured on a GPU.
HONEST_SHARE = {"cpu": 0.0, "cuda": 5e-4}
ALARM = 1e-5  # the chance that honest noise passes more often than is allowed
BY_GAIN = 0.2  # of the cuts: what leaves the least to the best lie that is known (tests/harness/test_audit.py)
SAMPLE = 0.125  # of the cuts that a run which may be kept is asked, for one that is too far behind to be


def draw(
    nll: npt.NDArray[np.float32], reference: npt.NDArray[np.floating] | None, count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and positions of `count` cuts, in a random order; several may be in one row.

    Args:
        nll: float [N, T], what was reported, nats.
        reference: float [N, T], what the reference lost; None for none.
    """
    rows, length = nll.shape
    anywhere = count if reference is None else count - round(BY_GAIN * count)
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


def questions(
    scored: Rows, train: Rows, rows: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64], rng: np.random.Generator
) -> Rows:
    """What evaluator B is asked, uint16 [n, T]: rows up to and with their cut, behind it tokens of a train row.

    Args:
        scored, train: uint16 [N, T + 1], [M, T + 1].
        rows, cuts: int64 [n], which row each is, and its position.
    """
    length = scored.shape[1] - 1
    asked = scored[rows, :length].copy()
    decoys = train[rng.integers(0, len(train), len(rows)), :length]
    behind = np.arange(length)[None, :] > cuts[:, None]
    asked[behind] = decoys[behind]
    return asked


def surprise(logits: npt.NDArray[np.float32], true: Rows) -> npt.NDArray[np.float64]:
    """NLL of each true token, nats [N], normalised in fp64; NaN for logits that are not finite.

    Args:
        logits: float32 [N, V]. A batch at a time: all of a val split in fp64 are seconds of fresh memory.
        true: uint16 [N], the tokens that really follow.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=1, keepdims=True)
        at_true = wide[np.arange(len(wide)), true]  # a copy
        finite = np.isfinite(logits).all(axis=1)
        found = np.log(np.exp(wide, out=wide).sum(axis=1)) - at_true
    return np.where(finite, found, np.nan)


def allowed_mismatches(count: int, device: str) -> int:
    """How many of `count` cuts may differ by more than the tolerance before noise explains them no more."""
    mean = count * HONEST_SHARE[device]
    term, tail, k = math.exp(-mean), 1.0 - math.exp(-mean), 0  # Poisson
    while tail > ALARM:
        k += 1
        term *= mean / k
        tail -= term
    return k


def compare(nll: npt.NDArray[np.float32], found: npt.NDArray[np.float64], tolerance: float, most: int = 0) -> Audit:
    """What B's logits say about A's numbers at the cuts.

    Args:
        nll: float32 [N], A's NLL at each cut.
        found: float64 [N], what B's logits make of the tokens that really follow.
        tolerance: nats, for one token.
        most: cuts that may differ by more.

    Returns:
        The audit's figures, as they are recorded.

    Raises:
        TrialError: `invalid`, with the figures in its reason.
    """
    difference = found - nll
    n = len(difference)
    mismatches = int(np.count_nonzero(~(np.abs(difference) <= tolerance)))
    mean = float(difference.mean())
    allowed = MEAN_ERRORS * float(difference.std()) / math.sqrt(n) + MEAN_SLACK_NATS
    figures = Audit(
        cuts=n,
        tolerance_nats=tolerance,
        mismatches=mismatches,
        mismatches_allowed=most,
        largest_nats=float(np.abs(difference).max()),
        mean_nats=mean,
        mean_allowed_nats=allowed,
        # The smallest share of falsified tokens that n cuts find with 99 % probability: 1 - 0.01^(1/n).
        detectable_share=1.0 - 0.01 ** (1.0 / n),
    )
    if mismatches > most:
        raise TrialError(
            "invalid",
            f"the model contradicts itself at {mismatches} of {n} cuts (by up to {figures.largest_nats:.1g} nats): "
            f"it looks ahead, keeps state across rows, or its probabilities are none",
        )
    if abs(mean) > allowed:
        raise TrialError(
            "invalid",
            f"the reported losses are off by {mean:+.5f} nats a token on average; {allowed:.5f} are allowed",
        )
    return figures
