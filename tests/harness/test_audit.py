"""What an audit finds, and how often it is wrong, in a model of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hotloop.harness.errors import TrialError
from hotloop.harness.scoring.audit import ALARM, BY_GAIN, TOLERANCE_NATS, allowed_mismatches, compare, draw
from hotloop.harness.settings import PRESETS

LAPTOP = PRESETS["laptop"]
FLOOR_NATS = 0.0758 * 3.18 * math.log(2)  # the laptop night's noise floor, a token
APART_NATS = 0.88  # the mean difference on a token of train.py under two seeds there; Laplace's law fits its tails


def losses(rows: int = 296, length: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Of a reference and of an honest model that is no better than it."""
    rng = np.random.default_rng(3)
    reference = rng.gamma(1.2, 3.0, (rows, length))
    return reference, np.maximum(0.001, reference + rng.laplace(0.0, APART_NATS, (rows, length))).astype(np.float32)


def told_by(order: np.ndarray, to: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """What a liar says who falsifies tokens in this order, down to `to`, until it has won a noise floor."""
    won = np.cumsum(np.maximum(0.0, honest - to)[order]) / honest.size
    count = int(np.searchsorted(won, FLOOR_NATS)) + 1
    assert count <= len(order), "it wins no noise floor"
    told = honest.copy()
    told[order[:count]] = np.minimum(honest, to)[order[:count]]
    return told


def lie(name: str, reference: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """Losses that win a noise floor; `reference` and `honest` flat."""
    largest, gap = np.argsort(-honest), np.argsort(reference - honest)
    match name:
        case "nothing lost on a few of the largest":
            return told_by(largest, 0 * honest, honest)
        case "a fifth less on the largest":
            return told_by(largest, 0.8 * honest, honest)
        case "a tenth less anywhere":
            return told_by(np.arange(honest.size), 0.9 * honest, honest)
        case "on one row in five":
            rows = np.arange(honest.size) // 256
            return told_by(largest[rows[largest] % 5 == 0], 0 * honest, honest)
        case "on the holdout alone":
            return told_by(np.arange(LAPTOP.eval_rows * 256, honest.size), 0 * honest, honest)
        case "back to the reference where it is worse":
            return told_by(gap, reference, honest)
        case "a little below the reference where it is worst":
            return told_by(gap, np.maximum(0.0, reference - 0.5), honest)
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "nothing lost on a few of the largest", "a fifth less on the largest", "a tenth less anywhere",
        "on one row in five", "on the holdout alone", "back to the reference where it is worse",
        "a little below the reference where it is worst",
    ],
)  # fmt: skip
def test_a_lie_that_wins_a_noise_floor_is_found(name: str) -> None:
    """Missed at most once in a million: the chance that no cut is at a token that is falsified beyond the tolerance."""
    reference, honest = (x.ravel() for x in losses())
    told = lie(name, reference, honest)
    falsified = honest - told > TOLERANCE_NATS["cpu"]
    gains = np.maximum(0.0, reference - told)
    by_gain, anywhere = gains[falsified].sum() / gains.sum(), falsified.mean()
    assert LAPTOP.audit_cuts is not None
    n = round(BY_GAIN * LAPTOP.audit_cuts)
    assert (1 - by_gain) ** n * (1 - anywhere) ** (LAPTOP.audit_cuts - n) <= 1e-6
    # And draw() draws by those chances.
    n = 6000
    rows, cuts = draw(told.reshape(-1, 256), reference.reshape(-1, 256), n, np.random.default_rng(1))
    expected = n * (BY_GAIN * by_gain + (1 - BY_GAIN) * anywhere)
    assert falsified[rows * 256 + cuts].sum() == pytest.approx(expected, abs=6 * math.sqrt(n) / 2)


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
