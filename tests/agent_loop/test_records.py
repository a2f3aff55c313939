"""A night of 0.1 is read as it was; what is recorded has one shape; both pictures of a night show the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import git
import matplotlib.figure
import pytest
from rich.console import Console

from hotloop.agent_loop.cli import main
from hotloop.agent_loop.commands.verify import checks
from hotloop.agent_loop.folder import Flight, NightFolder, Proposal
from hotloop.agent_loop.night import Night
from hotloop.agent_loop.report.charts import progress
from hotloop.agent_loop.report.files import print_results, tsv_text, write_progress
from hotloop.agent_loop.report.page import page
from hotloop.agent_loop.report.tally import Tally
from hotloop.harness.errors import RecordError, UsageError
from hotloop.harness.records.chain import Chain, Entry
from hotloop.harness.records.model import Decision, Kind, Origin, Status, Worth
from tests.agent_loop.nights import Synthetic, realistic
from tests.builders import LAPTOP, make_decision, make_outcome, make_run

OLD = Path(__file__).with_name("night_of_0_1")  # written by hotloop 0.1, with its repository


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The repository of that night, with its records."""
    git.Repo.clone_from(str(OLD / "repository.bundle"), tmp_path / "repo", mirror=True, bare=False).close()
    repo = tmp_path / "repo"
    shutil.copytree(OLD, repo / "runs" / "old", ignore=shutil.ignore_patterns("*.bundle"))
    return repo


def test_a_night_of_0_1_is_read_in_todays_shapes() -> None:
    before = (OLD / "records.jsonl").read_bytes()
    night = NightFolder.reading(OLD)
    assert (OLD / "records.jsonl").read_bytes() == before
    assert {e.version for e in night.chain.entries} == {1}
    assert [(r.kind, r.decision) for r in night.rows()] == [
        ("baseline", "keep"), ("repeat", "measured"), ("repeat", "measured"), ("experiment", "marginal"),
        ("confirm", "keep"), ("experiment", "crash"), ("experiment", "marginal"), ("confirm", "discard"),
        ("experiment", "nan"), ("experiment", "keep"), ("experiment", "keep"), ("experiment", "discard"),
        ("experiment", "overtime"),
    ]  # fmt: skip
    assert tsv_text(night).encode() == (OLD / "results.tsv").read_bytes()
    row = night.rows()[6]
    assert row.run.parent == row.outcome.run.parent == night.rows()[4].commit
    assert (row.origin.agent, row.origin.tokens, row.origin.cost_usd) == ("claude", 1200, 0.02)
    assert row.origin.why == "= 0.0441 should do better than = 0.0425"
    training = row.outcome.training
    assert (training.tokens, training.feed_late_s, len(training.curve)) == (204800, 2.1, 5)
    assert training.start.because and training.implementations == {"attention": "reference: cpu tensors"}
    assert row.outcome.conditions.evaluate and row.outcome.conditions.evaluate.first_s == 1.551
    assert row.outcome.conditions.warnings and row.outcome.ledger.import_ == 0.97
    assert row.outcome.audit and row.outcome.audit.cuts == 200 and row.outcome.budget.timed_steps == [2]
    refused, failed = night.turns
    assert (refused.result, refused.status, refused.origin.tokens) == ("refused", Decision.CRASH, 2400)
    assert (failed.result, failed.status, failed.origin.cost_usd) == ("failed", None, 0.01)
    assert night.tokens == 8 * 1200 + 2400 + 300 and night.insisted == 0
    assert [(c.number, c.verdict, c.outcome and c.outcome.run.kind) for _, c in night.left_out] == [
        (4, Worth.ENTANGLED, None), (9, Worth.CONFIRMED, Kind.LEAVE_ONE_OUT), (10, Worth.CONFIRMED, None)
    ]  # fmt: skip


def test_report_show_and_verify_read_a_night_of_0_1(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(old)
    assert main(["report", "--tag", "old"]) == 0
    assert "val_bpb 1.100000 -> 1.070000 (2.73% better than the baseline)" in capsys.readouterr().out
    text = (old / "runs" / "old" / "report.html").read_text()
    for words in ("Confirmed (3)", "claude (8)", "laptop 1.8e+12 flops", "left out at the end", "without #9"):
        assert words in text, words
    assert main(["show", "6", "--tag", "old"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "6 of old (experiment), by claude",
        "1,200 tokens of a model, $0.02",
        "import 1.0",
        "warning:",
        "cuts",
    ):
        assert words in shown, words
    with git.Repo(old) as repo:
        found = {name: (good, text) for name, good, text in checks(old / "runs" / "old", repo, None)}
    for name in ("chain", "commits", "branch", "numbers", "decisions", "results.tsv", "one seal", "sandbox"):
        assert found[name][0], (name, found[name])


def test_a_night_of_0_1_is_not_gone_on_with_and_a_changed_one_is_found(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    night = NightFolder.reading(tmp_path / "old")
    assert night.settings is not None
    with pytest.raises(UsageError, match=r"was begun by an earlier hotloop, .* give another --tag"):
        night.check_settings(night.settings)
    path = tmp_path / "old" / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"val_bpb":1.07,', b'"val_bpb":1.06,', 1))
    with pytest.raises(RecordError, match="was changed after it was written"):
        Chain.read(path)


# ---- a fold


def test_a_night_is_a_fold_of_its_entries_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Synthetic(tmp_path, monkeypatch)
    realistic(made, 30)
    entries = made.chain.entries
    step = Night()
    for entry in entries:
        step.take(entry)
    whole, read = Night.of(entries), Night.of(Chain.read(made.chain.path).entries)
    assert vars(step) | {"pairs": 0} == vars(whole) | {"pairs": 0} == vars(read) | {"pairs": 0}
    assert [(p.run, p.parent, p.gain) for p in step.pairs] == [(p.run, p.parent, p.gain) for p in read.pairs]


def test_a_decision_without_its_run_is_refused() -> None:
    with pytest.raises(RecordError, match="experiment 7 has no experiment before it"):
        Night.of([Entry("", make_decision(make_run(7), "keep"), "")])


def test_what_a_turn_took_is_counted_once_wherever_it_ended(tmp_path: Path) -> None:
    """Proposed, under way, run, decided: the same origin, never parts of it."""
    origin = Origin("claude", 61.0, 0.25, 900, "it was low")
    proposal = Proposal("b", b"x = 1\n\xff", "an edit", origin)
    run = make_run(0, "baseline", agent="claude", seconds=61.0, cost_usd=0.25, tokens=900, why="it was low")
    Flight([run], [proposal]).save(tmp_path / "flight.json")
    flight = Flight.load(tmp_path / "flight.json")
    assert flight == Flight([run], [proposal]) and flight.runs[0].origin == proposal.origin
    entries = [Entry("", body, "") for body in (LAPTOP, make_outcome(run, 1.0), make_decision(run, "keep"))]
    night = Night.of(entries)
    assert (night.tokens, night.cost_usd) == (900, 0.25) and night.rows()[0].origin == origin
    assert Night.of(entries[:2]).undecided()[0].run.origin == origin  # where the flight is lost, it is not


# ---- pictures


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_both_pictures_of_a_night_show_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, floor: float) -> None:
    night = Synthetic(tmp_path / "t", monkeypatch)
    night.settings()
    night.run("baseline", "keep", 1.0, floor=0.0)
    night.run("repeat", "measured", 1.01, seed=2, floor=0.0)
    night.run("experiment", "keep", 0.95, gain=0.05, floor=floor)
    night.run("experiment", "discard", 0.97, gain=-0.02, floor=floor)
    night.run("experiment", "discard", 90.0, gain=-89.0, floor=floor)
    figures: list[Any] = []
    real = matplotlib.figure.Figure.savefig

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    write_progress(night.state)
    (axes,) = figures[0].axes
    tally = Tally(night.state)
    found = tally.progress
    assert found is not None
    assert axes.get_ylim() == pytest.approx((found.low, found.high))
    assert axes.lines[0].get_xydata().tolist() == [list(p) for p in found.line] == [[0, 1.0], [2, 0.95], [4.5, 0.95]]
    assert [p.tolist() for p in axes.collections[1].get_offsets()] == [[0, 1.0], [2, 0.95]]
    labels = {t.get_text() for t in axes.get_legend().get_texts()}
    assert (f"Noise floor ({floor:.4f})" in labels) == bool(floor)
    chart = progress(tally, 1000)
    assert chart is not None
    assert chart.count('class="kept"') == 2 and chart.count('class="band"') == bool(floor)
    assert chart.count('class="above"') == 1 and "#0 1.000000" in chart and "#2 0.950000" in chart
    assert f"noise floor, {floor:.6f}" in page(night.state, None) or not floor


def test_a_warning_and_a_race_are_told_of_any_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Synthetic(tmp_path / "t", monkeypatch)
    night.settings()
    night.run("baseline", "keep", 1.0)
    night.run("experiment", Status.RACED, None, reason="stopped at 30%")
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_results(night.state, console)
    console.file.close()
    assert "racing: stopped 1; no complete run gained yet" in console.export_text()
