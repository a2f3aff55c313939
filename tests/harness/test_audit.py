"""What an audit finds, and how often it is wrong, in a model of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hotloop.harness.errors import TrialError
from hotloop.harness.scoring.audit import ALARM, TOLERANCE_NATS, allowed_mismatches, compare, draw
from hotloop.harness.settings import PRESETS

LAPTOP = PRESETS["laptop"]
FLOOR_NATS = 0.0536 * 3.18 * math.log(2)  # the laptop night's noise floor, a token


def losses(rows: int = 296, length: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Of a reference and of an honest model no better than it: long tails, and half a nat apart on a token."""
    rng = np.random.default_rng(3)
    reference = rng.gamma(1.2, 3.0, (rows, length))
    return reference, np.maximum(0.001, reference + rng.normal(0.0, 0.5, (rows, length))).astype(np.float32)


LIES = {  # which tokens, by their rank of loss, and down to which share of it
    "a few of the largest": (0.35, 0.0),
    "many of the largest": (0.1, 0.8),
    "a tenth of every loss": (1.0, 0.9),
    "on one row in five": (0.2, 0.0),
    "all of the holdout": (1.0, 0.0),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_that_wins_a_noise_floor_is_found(name: str) -> None:
    """Missed at most once in a million: the chance that no cut of those drawn by gain is a falsified token."""
    reference, honest = losses()
    share, left = LIES[name]
    order = np.argsort(-honest.ravel())
    if name == "on one row in five":
        order = np.flatnonzero(np.arange(honest.size) // honest.shape[1] % 5 == 0)
    if name == "all of the holdout":
        order = np.arange(LAPTOP.eval_rows * honest.shape[1], honest.size)
    told = honest.copy().ravel()
    lied: list[int] = []
    for i in order[: max(1, int(share * honest.size))]:
        told[i] *= left
        lied.append(int(i))
        if (honest.ravel()[lied] - told[lied]).sum() >= FLOOR_NATS * honest.size:
            break
    else:
        assert name == "all of the holdout", "it wins no noise floor"
    gains = np.maximum(0.0, reference.ravel() - told)
    chance = gains[lied].sum() / gains.sum()
    assert (1 - chance) ** (LAPTOP.eval_rows // 2) <= 1e-6
    # And draw() draws by those chances.
    rng, n = np.random.default_rng(1), 4000
    rows, cuts = draw(told.reshape(honest.shape), reference, n, rng)
    falsified = np.isin(rows * honest.shape[1] + cuts, lied)
    expected = n / 2 * (chance + len(lied) / honest.size)
    assert falsified.sum() == pytest.approx(expected, abs=6 * math.sqrt(n) / 2)


def test_without_a_reference_cuts_are_anywhere_and_each_row_once() -> None:
    told = np.zeros((40, 7), np.float32)
    rows, cuts = draw(told, None, 40, np.random.default_rng(0))
    assert sorted(rows) == list(range(40))
    rows, cuts = draw(told, None, 4000, np.random.default_rng(0))
    assert set(np.bincount(rows)) == {100} and np.bincount(cuts, minlength=7).min() > 400
    rows, cuts = draw(told, told, 4000, np.random.default_rng(0))  # nothing was gained anywhere
    assert np.bincount(rows, minlength=40).min() > 40 and np.bincount(cuts, minlength=7).min() > 400


def tail_of_t3(x: float) -> float:
    return 1 - 2 / math.pi * (x / math.sqrt(3) / (1 + x * x / 3) + math.atan(x / math.sqrt(3)))


def test_heavy_tails_are_no_lie() -> None:
    """Honest differences in bf16 as Student's t with 3 degrees of freedom: at most one false alarm in 10,000 runs."""
    n, scale = PRESETS["h100"].eval_rows, 1e-3
    most, mean = allowed_mismatches(n, "cuda"), n * tail_of_t3(TOLERANCE_NATS["cuda"] / scale)
    assert 1 - math.exp(-mean) > 0.9  # where none were allowed
    tail = 1 - sum(math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(most + 1))
    assert tail <= 1e-4
    rng = np.random.default_rng(1)
    nll = np.full(n, 2.0, np.float32)
    for _ in range(300):  # the test of the mean, too
        compare(nll, nll + scale * rng.standard_t(3, n), TOLERANCE_NATS["cuda"], most)
    lie = np.where(np.arange(n) < most + 1, 0.5, 0.0)
    with pytest.raises(TrialError, match="contradicts itself"):
        compare(nll, nll + lie, TOLERANCE_NATS["cuda"], most)


def test_on_a_cpu_nothing_is_allowed() -> None:
    assert allowed_mismatches(10**6, "cpu") == 0
    assert ALARM <= 1e-5
