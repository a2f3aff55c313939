"""The budget is a pure function of measurements, and a replay needs none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.errors import TrialError
from hotloop.harness.settings import BudgetRule
from hotloop.harness.training.budget import Budget, Shape

A = Shape(rows=16, seq_len=256)  # 4096 tokens
B = Shape(rows=32, seq_len=128)  # 4096 tokens


def fixed(rule: BudgetRule, step_s: float, incumbent: int | None = None, flops: int = 0) -> Budget:
    budget = Budget(rule, incumbent)
    budget.measured(A, [step_s] * 3, flops)
    budget.fix()
    return budget


def test_seconds_become_whole_steps_at_the_median_step_time() -> None:
    budget = Budget(BudgetRule("seconds", 300.0))
    budget.measured(A, [0.31, 0.30, 9.0], 0)  # one outlier does not count
    budget.fix()
    assert budget.tokens == int(300.0 / 0.31) * A.tokens
    assert budget.expected_s == pytest.approx(budget.tokens / A.tokens * 0.31)


def test_flops_do_not_look_at_the_clock() -> None:
    fast, slow = (fixed(BudgetRule("flops", 1e9), s, flops=3_000_000) for s in (0.001, 7.0))
    assert fast.tokens == slow.tokens == 333 * A.tokens


@pytest.mark.parametrize(
    ("speed", "snapped"), [(1.0, True), (1.014, True), (0.987, True), (1.02, False), (0.98, False)]
)
def test_a_budget_near_the_incumbents_becomes_it(speed: float, snapped: bool) -> None:
    incumbent = fixed(BudgetRule("seconds", 300.0), 0.3).tokens
    budget = fixed(BudgetRule("seconds", 300.0), 0.3 / speed, incumbent)
    assert budget.snapped is snapped
    assert (budget.tokens == incumbent) is snapped


@pytest.mark.parametrize(("kind", "amount"), [("flops", 1e9), ("tokens", 333.0 * A.tokens)])
def test_what_needs_no_clock_never_becomes_the_incumbents(kind: str, amount: float) -> None:
    """It is exact already: a step more or less is the edit's own doing."""
    budget = fixed(BudgetRule(kind, amount), 0.3, incumbent=334 * A.tokens, flops=3_000_000)  # type: ignore[arg-type]
    assert (budget.tokens, budget.snapped) == (333 * A.tokens, False)


def test_a_step_larger_than_the_budget_is_invalid() -> None:
    with pytest.raises(TrialError, match="costs more than the budget") as e:
        fixed(BudgetRule("tokens", 4095), 0.1)
    assert e.value.status == "invalid"


def test_nothing_declared_is_invalid() -> None:
    with pytest.raises(TrialError, match="before any run"):
        Budget(BudgetRule("tokens", 4096)).fix()


def test_each_shape_is_charged_its_own_cost() -> None:
    budget = Budget(BudgetRule("seconds", 10.0))
    budget.measured(A, [1.0], 0)
    budget.measured(B, [0.5], 0)
    budget.fix()
    steps = 0
    while budget.affords(B):
        budget.charge(B)
        steps += 1
    assert steps == 20  # twice as many steps of half the cost
    assert not budget.affords(A)


@given(
    costs=st.lists(st.floats(0.001, 10.0), min_size=2, max_size=2),
    picks=st.lists(st.booleans(), max_size=60),
    amount=st.floats(20.0, 500.0),
)
def test_progress_never_passes_one_and_a_replay_gives_the_same_steps(
    costs: list[float], picks: list[bool], amount: float
) -> None:
    budget = Budget(BudgetRule("seconds", amount))
    budget.measured(A, [costs[0]], 0)
    budget.measured(B, [costs[1]], 0)
    budget.fix()
    replay = Budget.replay(budget.recorded())
    replay.measured(A, [costs[0] * 3], 0)  # another machine, another day
    replay.fix()
    for pick in picks:
        shape = A if pick else B
        assert budget.affords(shape) == replay.affords(shape)
        if budget.affords(shape):
            progress = budget.charge(shape)
            assert 0.0 <= progress < 1.0
            assert progress == replay.charge(shape)
