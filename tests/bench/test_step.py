"""A whole step of train.py, timed and profiled: what counts as idle, and which settings it runs under."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hotloop.bench import step
from hotloop.bench.cli import main
from hotloop.bench.determinism import determinism
from hotloop.bench.step import device_spans, idle_of, profile_step
from hotloop.harness.errors import UsageError
from hotloop.harness.profile import Machine
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import PRESETS
from hotloop.harness.tuning.runner import Setting, StepRunner
from hotloop.harness.tuning.selection import Answer, Unfit

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = """
import os
import torch
CUDA_GRAPHS = False
def build_model(spec): ...
def train(run):
    print("SAYS", torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"), CUDA_GRAPHS)
    seen = []
    def step(batch):
        seen.append(tuple(batch.tokens.shape))
        assert seen[-1] == (2, 256) and batch.tokens.dtype == torch.int64 and int(batch.tokens.max()) < 2048
        return batch.tokens.float().mean()
    run.warmup(step, rows=2)
"""


# ---- the device's timeline


def test_idle_is_what_no_stream_fills() -> None:
    """Two streams, one kernel inside another, one that begins where another ends."""
    spans = [
        (5.0, 6.0, "late"),
        (0.0, 2.0, "a"),
        (1.0, 3.0, "b"),
        (1.2, 1.5, "inside"),
        (3.0, 4.0, "c"),
        (6.5, 10.0, "d"),
    ]
    found = idle_of(spans, 2)
    assert found.share == pytest.approx(0.15)  # 4 to 5 and 6 to 6.5, of 10
    assert found.busy_s == pytest.approx(4.25)
    assert found.longest == [(1.0, "c", "late"), (0.5, "late", "d")]


def test_the_pause_between_two_steps_is_idle() -> None:
    """Each step is full; what lies between them is the host's."""
    steps = [(10.0 * i + 0.1 * k, 10.0 * i + 0.1 * (k + 1), f"kernel {k}") for i in range(5) for k in range(90)]
    found = idle_of(steps, 5)
    assert found.share == pytest.approx(4 / 49)  # four pauses of 1 s from the first start to the last end
    assert found.busy_s == pytest.approx(9.0)
    assert {(a, b) for s, a, b in found.longest if s > 0.5} == {("kernel 89", "kernel 0")}


def test_a_full_device_and_none() -> None:
    assert idle_of([(0.0, 1.0, "a"), (1.0, 2.0, "b")], 1).share == 0.0
    assert idle_of([(1.0, 1.0, "nothing")], 1).share == 0.0
    with pytest.raises(ValueError, match="no spans"):
        idle_of([], 1)


def event(start_us: float, end_us: float, name: str, device: str = "DeviceType.CUDA", annotation: bool = False) -> Any:
    span = SimpleNamespace(start=start_us, end=end_us)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_annotations_and_the_host_fill_no_gap() -> None:
    """torch marks compiled regions and the optimizer's step on the device's timeline, over the pauses inside."""
    events = [
        event(0, 9, "Torch-Compiled Region: 0/0", annotation=True),
        event(0, 9, "Optimizer.step#MuonAdamW.step", annotation=True),
        event(0, 9, "aten::mm", "DeviceType.CPU"),
        event(0, 1, "gemm"),
        event(8, 9, "gemm"),
    ]
    assert device_spans(events) == [(0.0, 1e-6, "gemm"), (8e-6, 9e-6, "gemm")]
    assert idle_of(device_spans(events), 1).share == pytest.approx(7 / 9)


def test_torch_still_tells_annotations_apart() -> None:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, torch.profiler.record_function("mine"):
        torch.ones(2).sum()
    told = {e.name: e.is_user_annotation for e in profiler.events() or ()}
    assert told["mine"] and not told["aten::sum"]


# ---- the command


@pytest.mark.parametrize(("share", "status", "words"), [(0.004, 0, "within the 1% allowed"), (0.03, 1, "ABOVE the 1%")])
def test_a_gap_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: float, status: int, words: str
) -> None:
    found = {
        "tokens": 10, "step_s": 1.0, "idle": step.Idle(share, 0.99, [(0.002, "a|b", "c")]), "groups": {}, "kernels": [],
        "cpu_figures": False,
    }  # fmt: skip
    monkeypatch.setattr(step, "profile_step", lambda *_: found)
    monkeypatch.setattr("hotloop.harness.tuning.step.settle", lambda _: None)
    assert main(["step", "--train", str(ROOT / "train.py")]) == status
    page = capsys.readouterr().out
    assert words in page
    assert "idle for 1.00% of one without the profiler" in page
    assert "- 2.000 ms between `a b` and `c`" in page
    found["idle"] = None  # a CPU has no such timeline
    assert main(["step", "--train", str(ROOT / "train.py")]) == 0
    assert "Idle" not in capsys.readouterr().out


@pytest.fixture
def no_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile imports its train.py under that name, in this process; the tests after this one want their own."""
    monkeypatch.setitem(sys.modules, "train", ModuleType("train"))


@pytest.mark.usefixtures("no_train")
def test_a_step_of_train_py_is_profiled() -> None:
    found = profile_step(ROOT / "train.py", "laptop")
    assert found["tokens"] == 4096
    assert found["groups"]["matrix products"] > 0
    assert 0 < sum(found["groups"].values()) < 10 * found["step_s"]


@pytest.mark.usefixtures("no_train")
def test_a_train_py_without_a_warm_up_has_no_step(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("def build_model(spec): pass\ndef train(run): pass\n")
    with pytest.raises(UsageError, match=r"without calling run\.warmup"):
        profile_step(path, "laptop")


# ---- settings, each in a process of its own


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(ONE_STEP)
    return path


def runner_of(setting: Setting, path: Path, ready_s: float = 300.0) -> StepRunner:
    return StepRunner(setting, path.read_bytes(), PRESETS["laptop"], "cpu", best(), ready_s, ready_s)


def test_a_step_is_kept_ready_as_the_trainer_would_run_it(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings, its constants, answers that repeat, and what train.py prints in nobody's way."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a shell's wish does not count
    for setting, said in (
        (Setting("a"), "SAYS True :4096:8 False"),
        (Setting("b", repeatable=False), "SAYS False None False"),
    ):
        with contextlib.closing(runner_of(setting, small)) as runner:
            assert runner.turn() > 0
            answers = runner.answer(), runner.answer()
            assert answers[0] == answers[1] and len(answers[0].losses) == 5
            assert said in runner._log.read_text()
        assert runner._child.wait(0.0) is not None and not runner._log.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise RuntimeError('no such kernel')", "it fails: RuntimeError: no such kernel (train.py:"),
        ("os.kill(os.getpid(), 11)", "(signal 11)"),
        ("import time; time.sleep(60)", "it hangs: no answer within 12 s"),
    ],
)
def test_a_step_that_does_not_run_says_why_and_leaves_no_process(small: Path, line: str, words: str) -> None:
    small.write_text(ONE_STEP.replace("seen = []", f"seen = []\n    {line}"))
    with pytest.raises(Unfit, match=re.escape(words)):
        runner_of(Setting("x"), small, 12.0 if "sleep" in line else 300.0)


class Turns:
    """A step whose speeds are given."""

    def __init__(self, speed: Callable[[], float]) -> None:
        self.turn = speed

    def answer(self) -> Answer:
        return Answer((1.0,), "x")

    def close(self) -> None: ...


def machine(device: str) -> Machine:
    return Machine(PRESETS["laptop"], device, best(0), {}, 2)


def test_what_repetition_costs_is_measured_in_pairs_of_changing_order() -> None:
    speeds = iter([100.0, 97.0, 98.0, 100.0, 100.0, 90.0])  # free first, then repeatable first, then free again
    order: list[bool] = []

    def start(setting: Setting) -> Turns:
        def turn() -> float:
            order.append(setting.repeatable)
            return next(speeds)

        return Turns(turn)

    said: list[str] = []
    assert determinism(b"", machine("cpu"), 3, said.append, start) == 0
    assert order == [False, True, True, False, False, True]
    assert [line.rpartition(" ")[2] for line in said[:3]] == ["+3.00%", "+2.00%", "+10.00%"]
    assert said[3] == "Repeatable results cost +3.00% of the speed (median of 3, +2.00% to +10.00%)."
    assert said[4].startswith("CPU figures")
    for free, verdict in ((100.0, "Above 2%"), (98.5, "Within 2%")):
        speeds = iter([free, 97.0])
        assert determinism(b"", machine("cuda"), 1, said.append, start) == 0
        assert said[-1].startswith(verdict)


def test_determinism_for_real(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["determinism", "--train", str(small), "--pairs", "1"]) == 0
    assert "CPU figures: a trial of the way" in capsys.readouterr().out
    assert main(["determinism", "--train", str(small), "--pairs", "0"]) != 0
