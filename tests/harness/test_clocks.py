"""The training by two clocks, the device's (the trainer's word) and the parent's: compared, recorded, nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import Conditions, Training
from hotloop.harness.settings import BudgetRule, Preset, Spec
from hotloop.harness.training import run
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.conditions import warnings
from hotloop.harness.training.session import Session, SessionConfig
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source

pytestmark = pytest.mark.usefixtures("warm_children")


# Some thirty steps, which SLOW makes slow in the training alone.
PRESET = tiny_preset(budget=BudgetRule("flops", 4.0e7)).with_limits(overtime=1e4)
SLOW = "loss = step(batch); import time as t; t.sleep(0.1)"
# What train.py can do to the clock of its own process.
HALF = "import time\nreal = time.monotonic\ntime.monotonic = lambda: 0.5 * real()"
APART = "by the device's clock the training took"


def train(folder: Path, preset: Preset | None = None, clock: Any = time.monotonic, **changes: str) -> Session:
    preset = preset or PRESET
    spec = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
    rows = tiny_rows(256, 0)
    return Session(SessionConfig(
        source=tiny_source(**changes), spec=spec, preset=preset, rows=rows, budget=Budget(preset.budget), folder=folder,
        threads=1, clock=clock,
    )).run()  # fmt: skip


def told(result: Session) -> list[str]:
    return warnings(Conditions(), result.training)


def test_an_honest_devices_clock_agrees_with_the_parents(folder: Path) -> None:
    result = train(folder, STEP=SLOW)
    assert result.training.device_s is not None
    assert result.training.device_s > 0.1 * result.training.steps > 2.0
    assert result.training.device_s == pytest.approx(result.training.device_wall_s, abs=0.3)
    assert result.training.device_wall_s < result.training.wall_s
    assert told(result) == []


def test_a_clock_at_half_speed_is_told_and_decides_nothing(folder: Path) -> None:
    honest = train(folder, STEP=SLOW)
    result = train(folder, STEP=SLOW, START=HALF)
    assert result.training.device_s == pytest.approx(0.5 * result.training.device_wall_s, rel=0.2)
    (words,) = told(result)
    assert words.startswith(APART)
    assert result.weights == honest.weights
    assert result.training.wall_s > 0.1 * result.training.steps


def test_a_parent_whose_clock_is_wrong_is_told_too(folder: Path) -> None:
    result = train(folder, PRESET.with_limits(overtime=1e3, overtime_cpu=1e3), lambda: 3 * time.monotonic(), STEP=SLOW)
    assert result.training.device_wall_s > 2 * (result.training.device_s or 0.0)
    assert told(result)


@pytest.mark.parametrize(
    ("device_s", "wall_s", "apart"),
    [
        (300.0, 302.9, False),
        (300.0, 303.5, True),
        (303.5, 300.0, True),
        (1.0, 1.4, False),
        (1.0, 1.6, True),
        (0.0, 300.0, True),
    ],
)
def test_one_per_cent_is_allowed_and_half_a_second_of_a_short_run(device_s: float, wall_s: float, apart: bool) -> None:
    training = Training(wall_s=300.0, device_s=device_s, device_wall_s=wall_s)
    assert bool(warnings(Conditions(), training)) == apart


def test_where_the_trainer_does_not_tell_nothing_is_compared(folder: Path) -> None:
    assert warnings(Conditions(), Training(wall_s=300.0)) == []
    result = train(folder, SUBMIT="run._began = None")
    assert result.training.device_s is None
    assert told(result) == []


@pytest.mark.parametrize("lie", ["'long'", "-1.0", "float('nan')", "1e30", "None", "[]"])
def test_a_time_that_is_none_is_invalid(folder: Path, lie: str) -> None:
    with pytest.raises(TrialError) as e:
        train(folder, SUBMIT=f"run._wire.send('trained', device_s={lie})")
    assert (e.value.status, "device_s" in e.value.reason) == ("invalid", True)


def test_who_talks_without_end_is_stopped(folder: Path) -> None:
    preset = PRESET.with_limits(overtime=1.0)
    for words in ("run._wire.send('trained', device_s=1.0)", "run._wire.send('log', step=0, loss=1.0)"):
        with pytest.raises(TrialError) as e:
            train(folder, preset, SUBMIT=f"while True: {words}")
        assert e.value.status == "overtime"


def test_on_a_gpu_the_devices_own_events_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose clock a patched time.monotonic does not reach."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, Event.now = Event.now, Event.now + 250.0

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    first, last = run._Mark("cuda"), run._Mark("cuda")
    assert last.since(first) == 0.25
