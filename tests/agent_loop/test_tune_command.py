"""When a night begins with a tuning, and what a tuning shows at its end."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hotloop.agent_loop.cli import _parser, main
from hotloop.agent_loop.commands import start as starting
from hotloop.agent_loop.commands import tune as command
from hotloop.harness import profile
from hotloop.harness.errors import HotloopError
from hotloop.harness.profile import Profile
from hotloop.harness.records.chain import Chain, Lock
from hotloop.harness.records.model import NightBegun
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import PRESETS, BudgetRule
from hotloop.harness.tuning import tune


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path / "cache"))
    for name in (*profile.CHOSEN_BY_USER, profile.PASSED):
        monkeypatch.delenv(name, raising=False)


def begins_with_a_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], device: str, mine: Profile | None = None
) -> bool:
    class Next(Exception):
        """What comes after."""

    tuned: list[Path] = []
    monkeypatch.setattr(starting, "open_repo", lambda _: SimpleNamespace(working_tree_dir=str(tmp_path)))
    monkeypatch.setattr(starting, "settings_of", lambda args: SimpleNamespace(device=device, profile=mine))
    monkeypatch.setattr(starting, "tune_first", lambda settings, train: tuned.append(train))

    def after(*_: Any) -> Any:
        raise Next

    monkeypatch.setattr(starting, "_agents", after)
    with pytest.raises(Next):
        starting.night_command(_parser().parse_args(["loop", *flags]))
    assert tuned in ([], [tmp_path / "train.py"])
    return bool(tuned)


def test_a_night_on_a_gpu_without_a_profile_begins_with_a_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain.open(tmp_path / "runs" / "old" / "records.jsonl")
    budget = BudgetRule("seconds", 300.0)
    chain.append(
        NightBegun(preset="h100", device="cuda", threads=2, data="d", budget=budget, seed=1, sandbox=3, profile="ab")
    )
    assert command.recorded_profile(tmp_path / "runs" / "old") == (tmp_path / "runs/old/experiments/0000", "ab")
    assert begins_with_a_tuning(tmp_path, monkeypatch, [], "cuda")
    assert begins_with_a_tuning(tmp_path, monkeypatch, ["--tag", "new"], "cuda")
    assert not begins_with_a_tuning(tmp_path, monkeypatch, [], "cpu")
    assert not begins_with_a_tuning(tmp_path, monkeypatch, ["--no-tune"], "cuda")
    assert not begins_with_a_tuning(tmp_path, monkeypatch, ["--tag", "old"], "cuda")  # which keeps what it began with
    assert not begins_with_a_tuning(tmp_path, monkeypatch, [], "cuda", mine=Profile({}, tmp_path))
    monkeypatch.setenv("HOTLOOP_KERNELS", "triton")
    assert not begins_with_a_tuning(tmp_path, monkeypatch, [], "cuda")


def test_two_tunings_of_a_machine_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("def build_model(spec): ...\ndef train(run): ...\n")
    path = profile.own_path(profile.facts(PRESETS["laptop"], "cpu", None))
    with Lock(path.with_suffix(".lock")):
        assert main(["tune", str(tmp_path / "train.py"), "--device", "cpu"]) == 7
    assert capsys.readouterr().err == (
        "hotloop: another tuning of this machine is under way; wait for it, or stop it\n"
    )


def test_a_tuning_that_fails_does_not_stop_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Profile:
        raise HotloopError("what others are compared with, plain, does not run: it fails: out of memory")

    monkeypatch.setattr(tune, "tune", fails)
    (tmp_path / "train.py").write_text("def build_model(spec): ...\ndef train(run): ...\n")
    settings: Any = SimpleNamespace(preset=PRESETS["laptop"], device="cpu", sandbox=best(0, True), threads=2)
    command.tune_first(settings, tmp_path / "train.py")
    err = capsys.readouterr().err
    assert err.startswith("hotloop: WARNING: nothing was tuned, and references run: what others are compared with")
    assert len(err.splitlines()) == 1


def test_the_table_at_the_end_is_what_was_measured() -> None:
    compared = {"new_rate": 2.5e6, "old_rate": 2e6, "ratios": [1.24, 1.25, 1.26]}
    body = {
        "depends": {"gpu": "NVIDIA H200", "preset": "h100"},
        "table": [
            {"part": "attention", "implementation": "flash3", "chosen": True, "alone": 3.1, "step": 1.2},
            {"part": "mlp", "implementation": "triton", "chosen": False, "reason": "it varies"},
        ],
        "whole": {
            "plain": compared, "plain with the best attention": compared | {"ratios": [1.1, 1.2, 1.3]},
            "tokens_per_s": 2.5e6, "share_of_floor": 0.61,
        },
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(command.promise(Profile(body, Path())))
    lines = [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]
    for line in (
        "NVIDIA H200, preset h100",
        "attention flash3 3.100x 1.200x chosen",
        "mlp triton out: it varies",
        "whole step against plain 1.250x 1.240 to 1.260",
        "whole step against plain with the best attention 1.200x 1.100 to 1.300",
        "whole step 2,500,000 tokens/s 750.0 M tokens in five minutes",
        "whole step share of the floor 61% of what bytes and operations allow",
    ):
        assert line in lines, lines
