"""What the loop tells a run of the device's pace: what the baseline showed, and whether the device stood idle."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hotloop.agent_loop import cli
from hotloop.agent_loop.loop import driver
from hotloop.agent_loop.loop.watchdog import UNDER_WATCH
from hotloop.harness.errors import DeviceError
from hotloop.harness.experiment import Job
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.records.model import FixedBudget
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.settings import BudgetRule
from hotloop.harness.training.budget import Budget, Shape
from tests.agent_loop.test_loop import repo, scripted  # noqa: F401 - a fixture

SHAPE = Shape(8, 256)


@pytest.fixture(autouse=True)
def _hangup() -> Iterator[None]:
    """The command line sets a handler for it."""
    was = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, was)


def recorded(trains: float, sustained: bool) -> tuple[FixedBudget, float]:
    """The budget of a baseline whose training was slower than its calibration, and how long it trained."""
    budget = Budget(BudgetRule("seconds", 300.0), sustained=SHAPE.tokens / (trains * 0.1) if sustained else None)
    budget.measured(SHAPE, [0.1], 0)
    budget.fix()
    return budget.recorded(), budget.tokens / SHAPE.tokens * trains * 0.1


@pytest.mark.parametrize(
    ("device", "trains", "sustained", "pace", "late"),
    [("cuda", 1.02, False, 1.0, 1.02), ("cuda", 1.1, True, 1.1, 1.0), ("cuda", 0.97, False, 1.0, 1.0),
     ("cpu", 1.02, False, 1.0, 1.0)],
)  # fmt: skip
def test_what_follows_a_gpus_baseline_is_held_against_it(
    repo: Path, monkeypatch: pytest.MonkeyPatch, device: str, trains: float, sustained: bool, pace: float, late: float  # noqa: F811
) -> None:  # fmt: skip
    jobs: list[Job] = []
    budget, training_s = recorded(trains, sustained)

    def runner(job: Job, settings: Any, on_event: Any) -> Any:
        jobs.append(job)
        outcome = scripted.run(job, settings, on_event)
        outcome.training.wall_s = training_s
        return msgspec.structs.replace(outcome, device=device, budget=budget)

    scripted.drive(repo, "t", 1, runner=runner, noise_seeds=1, quiet=True)
    baseline, *followers = jobs
    assert (baseline.run.kind, baseline.pace, baseline.late, baseline.cold) == ("baseline", 1.0, 1.0, True)
    assert [j.run.kind for j in followers] == ["repeat", "experiment"]
    for job in followers:
        assert job.pace == pytest.approx(pace, rel=1e-3) and job.late == pytest.approx(late, rel=1e-3)
        assert job.incumbent_tokens == budget.tokens


def test_a_device_is_cold_after_a_pause_and_after_a_restart(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    jobs: list[Job] = []

    def runner(job: Job, settings: Any, on_event: Any) -> Any:
        jobs.append(job)
        return scripted.run(job, settings, on_event)

    monkeypatch.setattr(driver, "COLD_AFTER_S", 1e9)
    scripted.drive(repo, "t", 1, runner=runner, noise_seeds=1, quiet=True)
    assert [j.cold for j in jobs] == [True, False, False]
    scripted.drive(repo, "t", 3, runner=runner, noise_seeds=1, quiet=True)
    assert [j.cold for j in jobs[3:]] == [True, False]
    monkeypatch.setattr(driver, "COLD_AFTER_S", 0.0)
    time.sleep(0.01)
    scripted.drive(repo, "t", 5, runner=runner, noise_seeds=1, quiet=True)
    assert [j.cold for j in jobs[5:]] == [True, True]


def test_a_night_on_a_gpu_that_somebody_uses_does_not_begin(
    repo: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only where the user starts it: a driver that its watchdog starts again waits, as for any fault of the machine."""
    ours = Gpu(0, "GPU-aa")
    slots = [replace(scripted.SETTINGS, device="cuda", sandbox=Sandbox(0, gpu=ours))]
    command = SimpleNamespace(tag="t", folder=repo / "runs" / "t", slots=slots, try_sandboxes=lambda: None)
    monkeypatch.setattr("hotloop.agent_loop.commands.start.night_command", lambda _: command)
    asked: list[Gpu] = []

    def alone(gpu: Gpu) -> None:
        asked.append(gpu)
        raise DeviceError("other processes compute on the GPU (1 miner); end them and start again")

    monkeypatch.setattr("hotloop.harness.gpu.between_runs.alone", alone)
    monkeypatch.setattr(cli, "_drive", lambda *_: 0)
    monkeypatch.chdir(repo)
    assert cli.main(["loop"]) == 5
    assert (
        capsys.readouterr().err == "hotloop: other processes compute on the GPU (1 miner); end them and start again\n"
    )
    monkeypatch.setenv(UNDER_WATCH, "1")
    assert cli.main(["loop"]) == 0
    assert asked == [ours]
