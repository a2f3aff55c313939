"""Which experiment's compile cache a night goes on with: that of the last kept one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hotloop.agent_loop.cli import main
from hotloop.harness.experiment import Settings
from hotloop.harness.records.model import Compiled, Outcome
from hotloop.harness.training.compile_cache import PACK, Store, decode, encode
from tests.agent_loop.test_loop import Rates, night_of, repo, scripted  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("warm_children")


RATES = ("0.02", "0.06", "0.05", "0.09", "0.01")  # the second and the fourth are better


def leaving(job: Any, settings: Settings, on_event: Any) -> Outcome:
    """A run that leaves a cache with its number, as `run_experiment` does."""
    outcome: Outcome = scripted.run(job, settings, on_event)
    assert settings.store is not None
    given, note = settings.store.load(settings.setup)
    made = decode(encode({"triton/number": str(job.run.number).encode()}), 1 << 20)
    left, _ = settings.store.leave(made, settings.setup, None, job.folder)
    assert left is not None
    number = bytes(given.files["triton/number"]).decode() if given else ""
    was_given = msgspec.structs.replace(given.recorded(), key=number) if given else None
    outcome = msgspec.structs.replace(outcome, compiled=Compiled(was_given, left.recorded(), note))
    if job.run.number == 3:
        (pack,) = settings.store.root.glob("*.pack")
        pack.write_bytes(b"damaged")
    return outcome


@pytest.fixture
def stored(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    root = repo / "runs/t/compiled"
    monkeypatch.setattr(scripted, "SETTINGS", replace(scripted.SETTINGS, store=Store(root)))
    return repo


def test_a_cache_is_promoted_when_its_commit_is_kept_and_not_before(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night = scripted.drive(
        stored, "t", 5, agent=Rates(*RATES), runner=leaving, noise_seeds=0, least_gain=0.001, second_seed=False
    )
    rows = night.rows()
    assert [r.decision for r in rows] == ["keep", "discard", "keep", "discard", "keep", "discard"]
    given = [r.outcome.compiled.given for r in rows if r.outcome.compiled]
    # The fourth run's damages what the second kept one left: the fifth begins from nothing and says so.
    assert [g and g.key for g in given] == [None, "0", "0", "2", None, "4"]
    assert capsys.readouterr().out.replace("\n", " ").count("was set aside") == 1
    store = Store(stored / "runs/t/compiled")
    last, _ = store.load(scripted.SETTINGS.setup)
    assert last is not None and last.files["triton/number"] == b"4"
    assert not list((stored / "runs/t/experiments").glob(f"*/{PACK}"))
    assert night_of(stored).rows()[4].outcome is not None


def test_show_tells_what_was_given_and_left(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.drive(stored, "t", 0, runner=leaving, noise_seeds=0, quiet=True)
    monkeypatch.chdir(stored)
    assert main(["show", "0", "--tag", "t"]) == 0
    assert "left 1 files, 0.0 MB, link 1" in capsys.readouterr().out
