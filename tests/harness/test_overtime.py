"""A card that trains slower than it calibrates must not end a night. Cards and clocks are made up."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hotloop.harness import experiment
from hotloop.harness.errors import TrialError
from hotloop.harness.experiment import Job, replayed, run_experiment
from hotloop.harness.records.model import Audit, Corrected, EvaluatorTime, FixedBudget, Ledger, Outcome, Scores
from hotloop.harness.scoring.evaluation import Evaluation
from hotloop.harness.settings import PRESETS, BudgetRule
from hotloop.harness.training.budget import Budget, Shape, held_against
from hotloop.harness.training.session import Session
from tests.builders import make_run
from tests.harness.conftest import tiny_source
from tests.harness.fake_nvml import FakeNvml
from tests.harness.test_conditions import settings

pytestmark = pytest.mark.usefixtures("warm_children")


SHAPE = Shape(rows=128, seq_len=2048)
STEP_S = 0.25


class Card:
    """What a step of train.py takes on it, in the calibration and in a training, of STEP_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.calibrates, self.trains = 1.0, 1.0
        self.tries: list[int] = []
        self.warmed: list[float] = []
        self.settings = settings(folder, "cpu", monkeypatch)
        self.folder = folder
        monkeypatch.setattr(Session, "run", self._run())
        monkeypatch.setattr(experiment, "check_weights", lambda *_: 1)
        quick, audit = EvaluatorTime(0.0, 0.0), Audit(1, 0.0, 0, 0, 0.0, 0.0, 0.0, 1.0)
        scored = Evaluation(Scores(1.0, 1.0, 1.0), audit, Ledger(), quick, quick, np.zeros((1, 1), np.float32))
        evaluator = SimpleNamespace(run=lambda *_: scored, wait=lambda: None)
        monkeypatch.setattr(experiment, "Evaluator", lambda _: contextlib.nullcontext(evaluator))

    def _run(card) -> Any:
        def run(self: Session) -> None:
            budget, training = self.budget, self.training
            self._child = SimpleNamespace(hidden_cpu_s=0.0)  # type: ignore[assignment]
            card.warmed.append(self.config.warm_s)
            budget.measured(SHAPE, [card.calibrates * STEP_S] * 3, 10**12)
            budget.charges = budget.charges or {SHAPE: float(SHAPE.tokens)}
            budget.fix()
            card.tries.append(budget.tokens)
            while budget.affords(SHAPE):
                budget.charge(SHAPE)
            training.tokens = budget.tokens
            training.wall_s = budget.tokens / SHAPE.tokens * card.trains * STEP_S
            self.ledger.calibrate, self.ledger.train = 5.0, training.wall_s
            self._check_time()

        return run

    def train(self, baseline: Outcome | None = None, replay: bool = False, **changes: Any) -> Outcome:
        """One run: of the baseline, or held against it."""
        kind = changes.pop("kind", "experiment" if baseline else "baseline")
        job = Job(make_run(0, kind), tiny_source(), "t", self.folder / "run", budget=RULE, **changes)
        if baseline and replay:
            job = replayed(baseline, job)
        elif baseline:
            pace, late = held_against(baseline.budget, baseline.training.wall_s)
            job = dataclasses.replace(job, incumbent_tokens=baseline.budget.tokens, pace=pace, late=late)
        self.tries.clear()
        preset = self.settings.preset.with_limits(overtime=1.03, overtime_cpu=1e9)
        return run_experiment(job, dataclasses.replace(self.settings, preset=preset), clock=lambda: 0.0)


RULE = BudgetRule("seconds", 300.0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    return Card(monkeypatch, tmp_path)


def test_a_card_that_keeps_its_promise_is_tried_once(card: Card) -> None:
    outcome = card.train()
    assert (outcome.status, card.tries) == ("ok", [1200 * SHAPE.tokens])
    assert (outcome.budget.pace, outcome.budget.late) == (1.0, 1.0)
    assert outcome.conditions.corrected is None


def test_a_single_run_is_run_again_where_it_would_be_overtime_and_not_where_it_was_short(card: Card) -> None:
    for trains, tries in ((1.05, 2), (0.9, 1)):
        card.trains = trains
        assert card.train(kind="single").status == "ok"
        assert len(card.tries) == tries


@pytest.mark.parametrize("trains", [1.05, 1.3, 2.5, 0.9])
def test_a_baseline_off_its_calibration_is_run_once_more_with_the_budget_corrected(card: Card, trains: float) -> None:
    card.trains = trains
    outcome = card.train()
    assert outcome.status == "ok", outcome.reason
    assert card.tries == [1200 * SHAPE.tokens, int(1200 / trains + 1e-9) * SHAPE.tokens]
    assert outcome.training.wall_s == pytest.approx(300.0, rel=0.01)
    assert outcome.conditions.corrected == Corrected(pytest.approx(300 * trains), 300.0)
    assert any("run once more" in words for words in outcome.conditions.warnings)
    assert outcome.budget.pace == pytest.approx(trains)
    # Its like is within the limit, with the same tokens; one that is slower than that is overtime, as ever.
    again = card.train(outcome)
    assert (again.status, card.tries) == ("ok", [outcome.budget.tokens])
    card.trains = trains * 1.05
    assert card.train(outcome).status == "overtime"
    assert len(card.tries) == 1
    # A faster train.py gets more tokens, for as long as the baseline trained.
    card.calibrates, card.trains = 0.5, 0.5 * trains
    faster = card.train(outcome)
    assert (faster.status, len(card.tries)) == ("ok", 1)
    assert faster.training.wall_s == pytest.approx(300.0, rel=0.01)
    assert faster.training.tokens == pytest.approx(2 * outcome.training.tokens, rel=0.01)


def test_what_follows_a_baseline_that_was_a_little_late_is_held_against_it(card: Card) -> None:
    card.trains = 1.025
    baseline = card.train()
    assert (baseline.status, len(card.tries), baseline.budget.pace) == ("ok", 1, 1.0)
    for trains, status in ((1.025, "ok"), (1.05, "ok"), (1.06, "overtime")):
        card.trains = trains
        follower = card.train(baseline)
        assert (follower.status, follower.budget.tokens) == (status, baseline.budget.tokens)
    # One that was early makes nothing stricter.
    card.trains = 0.98
    early = card.train()
    card.trains = 1.02
    assert (early.status, card.train(early).status) == ("ok", "ok")


def test_one_that_stays_off_is_overtime_after_two_tries(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.run

    def worse(self: Session) -> None:
        card.trains *= 1.1
        real(self)

    card.trains = 1.0
    monkeypatch.setattr(Session, "run", worse)
    outcome = card.train()
    assert (outcome.status, len(card.tries)) == ("overtime", 2)


def test_a_replay_repeats_the_corrected_budget(card: Card) -> None:
    card.trains = 1.2
    was = card.train()
    now = card.train(was, replay=True)
    assert (now.status, card.tries, now.budget.tokens) == ("ok", [was.training.tokens], was.training.tokens)
    assert Budget.replay(now.budget).pace == was.budget.pace


def test_a_budget_in_operations_or_tokens_knows_no_pace(card: Card) -> None:
    for rule in (BudgetRule("flops", 1e15), BudgetRule("tokens", 1000 * SHAPE.tokens)):
        budget = Budget(rule, pace=1.5)
        budget.measured(SHAPE, [STEP_S] * 3, 10**12)
        budget.fix()
        assert budget.tokens == 1000 * SHAPE.tokens
        assert held_against(budget.recorded(), 1e6) == (1.0, 1.0)
    assert held_against(FixedBudget(), 1.0) == (1.0, 1.0)


def test_only_a_gpu_is_warmed_and_only_after_it_stood_idle(card: Card, gpus: FakeNvml) -> None:
    assert PRESETS["h100"].warm_s == 30.0 and PRESETS["laptop"].warm_s == 0.0
    preset = dataclasses.replace(card.settings.preset, warm_s=30.0)
    for device in ("cpu", "cuda"):
        card.settings = dataclasses.replace(card.settings, preset=preset, device=device)
        for cold in (True, False):
            card.train(cold=cold)
    assert card.warmed == [0.0, 0.0, 30.0, 0.0]


def test_overtime_by_processor_time_is_not_the_cards_doing(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Session) -> None:
        self.budget.measured(SHAPE, [STEP_S] * 3, 0)
        self.budget.fix()
        self.budget.used, self.training.wall_s = self.budget.tokens, 300.0
        card.tries.append(1)
        raise TrialError("overtime", "trained for 900 processor seconds")

    monkeypatch.setattr(Session, "run", run)
    assert (card.train().status, len(card.tries)) == ("overtime", 1)
