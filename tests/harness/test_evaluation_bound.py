"""What an evaluator may compute, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import EvaluatorTime
from hotloop.harness.scoring.bound import SLACK_S, Bound
from hotloop.harness.settings import Limits

LIMITS = Limits(evaluate_first_s=5.0, evaluate_step=2.0, evaluate_baseline=3.0)
TOKEN_S = 0.01


class Worker:
    """A child that has used so many processor seconds."""

    used_s = 3.0  # before any code of train.py

    def count_cpu(self) -> None: ...

    def cpu_s(self) -> float:
        return self.used_s


def begun(token_s: float | None = TOKEN_S, baseline: EvaluatorTime | None = None) -> tuple[Any, Bound]:
    worker: Any = Worker()
    bound = Bound("cpu", LIMITS, 1000, token_s, baseline)
    bound.begin(worker, 100)
    return worker, bound


def over(bound: Bound) -> bool:
    try:
        bound.check()
    except TrialError as e:
        assert e.status == "overtime" and "processor seconds" in e.reason
        return True
    return False


def test_the_first_batch_is_apart() -> None:
    worker, bound = begun()
    worker.used_s += 6.9  # 5 s, and 100 tokens at twice what training on them cost
    assert not over(bound)
    bound.answered(100)
    worker.used_s += 2.0 + SLACK_S - 0.1  # what it took before counts no more
    assert not over(bound)
    worker.used_s += 0.2
    assert over(bound)
    assert bound.times().first_s == 6.9


def test_no_first_batch_is_overtime() -> None:
    worker, bound = begun()
    worker.used_s += 7.1
    assert over(bound)


def test_each_batch_adds_what_its_tokens_may_cost() -> None:
    worker, bound = begun()
    bound.answered(100)
    for batch in range(2, 10):
        worker.used_s += 2.0
        bound.answered(100 * batch)
    worker.used_s += 2.0 + SLACK_S + 0.1
    with pytest.raises(TrialError, match="each token may cost 2 times"):
        bound.answered(1000)


def test_without_a_training_only_the_first_batch_is_bounded() -> None:
    worker, bound = begun(None)
    bound.answered(100)
    worker.used_s += 1000.0
    assert not over(bound)
    worker, bound = begun(None)
    worker.used_s += 5.1
    assert over(bound)


def test_the_baselines_evaluation_bounds_it_too() -> None:
    """Both before the first batch and after it, whatever training cost."""
    baseline = EvaluatorTime(first_s=0.5, rest_s=1.0)  # of 1,000 tokens
    worker, bound = begun(1000.0, baseline)
    worker.used_s += 3 * (0.5 + SLACK_S) + 3 * 100 * 1.0 / 1000 - 0.1
    assert not over(bound)
    worker.used_s += 0.2
    assert over(bound)
    worker, bound = begun(1000.0, baseline)
    bound.answered(1000)
    worker.used_s += 3 * 1.0 + SLACK_S - 0.1
    assert not over(bound)
    worker.used_s += 0.2
    assert over(bound)


def test_a_dear_baseline_makes_nothing_looser() -> None:
    worker, bound = begun(TOKEN_S, EvaluatorTime(first_s=100.0, rest_s=1000.0))
    worker.used_s += 7.1
    assert over(bound)
