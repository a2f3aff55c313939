"""Evaluators that are made ready ahead: what B may have done while A has val text, and when it is given up."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.levels import best
from hotloop.harness.scoring.evaluation import Evaluator, Scoring
from hotloop.harness.settings import Spec
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Event, Session, SessionConfig
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source
from tests.needs import at, sandbox

SPEC = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
SOURCE = tiny_source() + b"\nprint('IMPORTED', flush=True)\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytearray:
    preset = tiny_preset()
    folder = tmp_path_factory.mktemp("trained")
    config = SessionConfig(
        source=SOURCE, spec=SPEC, preset=preset, rows=tiny_rows(256, 0), budget=Budget(preset.budget), folder=folder,
        threads=1,
    )  # fmt: skip
    return Session(config).run().weights


class Watched(Evaluator):
    """Notes what its second process has printed whenever the first answers, and how many were started."""

    def __init__(self, folder: Path, level: int | None) -> None:
        self.b_said: list[int] = []
        self.started = 0
        super().__init__(
            Scoring(
                source=SOURCE, spec=SPEC, preset=tiny_preset(), val=tiny_rows(64, 1), holdout=tiny_rows(16, 2),
                train=tiny_rows(256, 0), token_bytes=np.ones(VOCAB, np.int32), folder=folder, threads=1,
                sandbox=best(level), on_event=self._look,
            )
        )  # fmt: skip

    def _start(self):  # type: ignore[no-untyped-def]
        self.started += 1
        return super()._start()

    def _look(self, event: Event) -> None:
        if event.phase == "evaluate" and event.progress and self._ready:
            assert self._ready[0]._ready
            self.b_said.append(os.fstat(self._ready[0]._log).st_size)


@pytest.mark.parametrize("taken", [False, True])
def test_b_waits_and_runs_no_line_of_train_py_while_a_lives(
    weights: bytearray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """And it is another process where the kernel took pages of files meanwhile."""
    sandbox(2)
    monkeypatch.setattr(residency, "taken_since", lambda since: taken)
    with Watched(tmp_path, None) as evaluator:
        evaluator.wait()
        assert evaluator.started == 2
        evaluator.run(weights)
    assert evaluator.started == (3 if taken else 2)
    assert len(evaluator.b_said) > 1 and set(evaluator.b_said) == {0}
    assert (tmp_path / "evaluate.txt").read_text().split() == ["IMPORTED"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["evaluate.txt"]


@pytest.mark.parametrize("level", [at(1)])
def test_where_a_could_reach_it_b_is_started_when_a_is_dead(weights: bytearray, tmp_path: Path, level: int) -> None:
    sandbox(level)
    with Watched(tmp_path, level) as evaluator:
        evaluator.wait()
        assert evaluator.started == 1
        evaluator.run(weights)
    assert evaluator.started == 2 and evaluator.b_said == []


def test_pages_that_went_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"now": (5, 7)}
    monkeypatch.setattr(residency, "mark", lambda: marks["now"])
    assert not residency.taken_since((1, 7))  # that others read is no reason
    assert residency.taken_since((5, 6)) and residency.taken_since(None)
    marks["now"] = None  # type: ignore[assignment]
    assert residency.taken_since((5, 7))
