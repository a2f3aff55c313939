"""What the records are good for: the brief, racing, leaving one out, showing experiments."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import git
import pytest

import hotloop.agent_loop.commands.start
from hotloop.agent_loop.agents.brief import MAX_TOKENS, most_tokens, write_brief
from hotloop.agent_loop.commands.ablate import ablate, verdict
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.race import (
    CHECKPOINTS,
    Lesson,
    Rate,
    deficit,
    false_stops,
    lessons,
    spared,
    stopper,
    thresholds,
)
from hotloop.harness.errors import UsageError
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Ledger, Outcome, Status
from tests.agent_loop.test_loop import Rates, cli, refused, repo, scripted  # noqa: F401 - a fixture
from tests.builders import LAPTOP, make_decision, make_outcome, make_run


def long_night(folder: Path, count: int, words: str = "MATRIX_LR 0.04 -> 0.06") -> NightFolder:
    """Records of a night whose words are as long as they may be."""
    folder.mkdir(parents=True)
    chain = Chain.open(folder / "records.jsonl")
    chain.append(LAPTOP)
    rng = random.Random(1)
    best = 2.0
    for number in range(count):
        run = make_run(number, "experiment" if number else "baseline", description=f"{words} {number}")
        bpb = best - rng.uniform(-0.02, 0.004)
        failed = number and number % 5 == 0
        chain.append(make_outcome(
            run, None if failed else bpb, None if failed else 7.654321, reason=f"{words} {number}",
            log_tail=[words * 3] * 5, tokens=10**6, steps=100, curve=[(i / 50, 5.0 - i / 20) for i in range(50)],
            ledger=Ledger(train=20.0, evaluate=3.0),
        ))  # fmt: skip
        decision = "crash" if failed else "keep" if bpb < best or not number else "discard"
        gain = None if failed else best - bpb
        chain.append(make_decision(
            run, decision, f"{words} because", gain=gain, noise_bpb=0.01, syntax=f"{number:064x}"
        ))  # fmt: skip
        best = bpb if decision == "keep" else best
    return NightFolder.reading(folder)


@pytest.mark.parametrize("count", [1, 30, 1000])
@pytest.mark.parametrize("words", ["MATRIX_LR 0.04 -> 0.06", "0.123456|789`\n# heading ü漢字 " * 20])
def test_the_brief_stays_under_its_limit(tmp_path: Path, count: int, words: str) -> None:
    night = long_night(tmp_path / "t", count, words)
    text = write_brief(night, "laptop", [make_run(9999, description=words)], refused=words, least_gain=0.03)
    assert most_tokens(text) <= MAX_TOKENS
    assert f"Best val_bpb {night.incumbent_score()}" in text
    assert "Your last edit was refused" in text
    assert "Under way now" in text
    assert "7.654" not in text  # the holdout
    assert not any(line.startswith("# heading") for line in text.splitlines())
    if count > 1:
        for heading in ("The last results", "Near misses", "What failed", "Tried by theme", "How it got there"):
            assert heading in text
        last = night.rows()[-1]
        assert f"| {last.number} | {last.decision} |" in text


def test_a_long_brief_is_cut_and_not_a_short_one(tmp_path: Path) -> None:
    night = long_night(tmp_path / "t", 200)
    whole, cut = (write_brief(night, "laptop", limit=limit) for limit in (100_000, 2000))
    assert most_tokens(cut) <= 2000 < most_tokens(whole)
    assert "left out" in cut


# ---- racing


def flat(level: float, points: int = 100) -> list[tuple[float, float]]:
    return [(i / points, level) for i in range(points)]


def test_a_deficit_is_at_as_many_tokens_or_the_same_share_whichever_is_kinder() -> None:
    best = [(i / 100, 5.0 - 2 * i / 100) for i in range(100)]
    assert deficit(flat(4.5), 1000, best, 1000, 0.5) == pytest.approx(4.5 - 4.1, abs=0.02)
    # With twice the tokens, half of them are all of the incumbent's: there it is at 3.0, at half of its own at 4.0.
    assert deficit(flat(4.5), 2000, best, 1000, 0.5) == pytest.approx(4.5 - 4.1, abs=0.02)
    assert deficit([], 1000, best, 1000, 0.5) is None


def lesson(number: int, behind: float, gain: float) -> Lesson:
    return Lesson(number, tuple(behind for _ in CHECKPOINTS), gain, gain > -0.01)


def test_nothing_is_stopped_before_enough_runs_were_seen() -> None:
    few = [lesson(i, 0.1, 0.01) for i in range(7)]
    assert thresholds(few) == [None] * len(CHECKPOINTS)
    assert thresholds([lesson(i, 0.1, -1.0) for i in range(50)]) == [None] * len(CHECKPOINTS)  # none came near


def test_the_limit_is_beyond_what_any_good_run_was_behind() -> None:
    known = [lesson(i, 0.02 * i, 0.01) for i in range(5)] + [lesson(10 + i, 1.0, -0.5) for i in range(5)]
    limit = thresholds(known)[0]
    assert limit is not None and 0.08 < limit < 0.2


def test_false_stops_are_counted_by_leaving_one_out() -> None:
    known = [lesson(i, 0.01, 0.02) for i in range(9)] + [lesson(99, 0.9, 0.05)]  # far behind, and won
    assert false_stops(known) == Rate(1, 10)
    assert "would have stopped 1" in str(false_stops(known))
    assert Rate(0, 10).most == pytest.approx(1 - 0.05**0.1, abs=1e-6)
    assert "not known" in str(Rate(0, 0))


def raced_outcome(curve: list[tuple[float, float]]) -> Outcome:
    return make_outcome(curve=curve, tokens=1000)


def test_a_run_that_cannot_win_is_stopped_at_a_checkpoint_and_one_that_can_goes_on() -> None:
    known = [lesson(i, 0.02, 0.01) for i in range(10)]
    number = next(n for n in range(100) if not spared("t", n))
    stop = stopper(raced_outcome(flat(3.0)), known, "t", number)
    assert stop is not None
    curve = flat(3.5)
    said = [(p, reason) for i, (p, _) in enumerate(curve) if (reason := stop(curve[: i + 1], 1000))]
    assert said[0][0] == pytest.approx(0.3)
    assert "stopped at 30%: 0.5000 nats behind experiment 1" in str(said[0][1])
    near = stopper(raced_outcome(flat(3.0)), known, "t", number)
    assert near is not None
    curve = flat(3.02)
    assert not any(near(curve[: i + 1], 1000) for i in range(len(curve)))


def test_one_run_in_eight_is_spared() -> None:
    share = sum(spared("t", n) for n in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)
    best, known = raced_outcome(flat(3.0)), [lesson(i, 0.0, 0.01) for i in range(10)]
    assert stopper(best, known, "t", next(n for n in range(100) if spared("t", n))) is None


def test_a_night_that_races_stops_the_hopeless_and_says_so(repo: Path) -> None:  # noqa: F811
    def run(job: Any, settings: Any, on_event: Any) -> Any:
        rate = float(job.source.decode().split("MATRIX_LR = ")[1].split()[0])
        curve: list[tuple[float, float]] = []
        for i in range(50):
            curve.append((i / 50, 4.0 + abs(rate - 0.04) * 10 - i / 50))
            if job.stop and (reason := job.stop(curve, 1000)):
                return scripted.outcome_of(job, status=Status.RACED, reason=reason, curve=curve, tokens=1000)
        bpb = 1.0 + abs(rate - 0.04) + 0.001 * (job.run.seed - 1)
        return scripted.outcome_of(job, val_bpb=bpb, curve=curve, tokens=1000)

    rates = [f"0.0{400 + i}" for i in range(1, 9)] + [f"0.{i}" for i in range(2, 8)]
    night = scripted.drive(repo, "t", 14, agent=Rates(*rates), runner=run, race=True, least_gain=0.01)
    ends = [r.decision for r in night.rows() if r.kind == "experiment"]
    assert set(ends[:8]) == {"discard"}
    assert ends[8:].count("raced") >= 3
    assert all("nats behind" in r.reason for r in night.rows() if r.decision == "raced")
    assert len(lessons(night, 0.01)) == 14 - ends.count("raced")
    done = cli(repo, "report", "--tag", "t")
    assert f"racing: stopped {ends.count('raced')}" in done.stdout, done.stdout


# ---- leave one out


def test_each_kept_gain_is_taken_out_alone(repo: Path) -> None:  # noqa: F811
    class Two:
        name, ahead = "two", False

        def __init__(self) -> None:
            self.edits = [("MATRIX_LR = 0.04", "MATRIX_LR = 0.08"), ("DEPTH=4", "DEPTH=4.5"), ("0.08", "0.09")]

        def propose(self, context: Any) -> Any:
            from hotloop.agent_loop.agents.agent import Turn

            old, new = self.edits.pop(0)
            (context.worktree / "train.py").write_text(context.source.decode().replace(old, new))
            return Turn(new)

    scripted.drive(repo, "t", 3, agent=Two(), least_gain=0.001, noise_seeds=0)
    night = NightFolder(repo / "runs" / "t")
    jobs = []

    def run(job: Any, settings: Any, on_event: Any) -> Any:
        jobs.append(job)
        return scripted.run(job, settings, on_event)

    night_repo = NightRepo(open_repo(repo), "t", night.folder)
    bodies = list(ablate(night, night_repo, scripted.SETTINGS, None, runner=run))
    assert [(b.number, b.verdict) for b in bodies] == [(1, "entangled"), (2, "confirmed"), (3, "confirmed")]
    assert bodies[1].worth == pytest.approx(0.01)
    assert b"MATRIX_LR = 0.09" in jobs[0].source and b"DEPTH=4)" in jobs[0].source
    assert len(jobs) == 1  # without the last one it is what was run before
    assert not list(ablate(NightFolder(repo / "runs" / "t"), night_repo, scripted.SETTINGS, None, runner=run))  # done
    other = dataclasses.replace(scripted.SETTINGS, repeatable=False)
    with pytest.raises(UsageError, match="was run without --fast-nondeterministic; give the same"):
        list(ablate(NightFolder(repo / "runs" / "t"), night_repo, other, None, runner=run))
    assert [verdict(w, 0.01) for w in (0.02, 0.005, 0.0, -0.1)] == ["confirmed", "marginal", "retracted", "retracted"]


def test_a_night_that_kept_nothing_has_nothing_to_leave_out(repo: Path) -> None:  # noqa: F811
    scripted.drive(repo, "t", 0)
    night = NightFolder(repo / "runs" / "t")
    with pytest.raises(UsageError, match="nothing to leave out"):
        list(ablate(night, NightRepo(open_repo(repo), "t", night.folder), scripted.SETTINGS, None))


# ---- show, diff, best, checkout


def test_show_diff_best_and_checkout(repo: Path) -> None:  # noqa: F811
    night = scripted.drive(repo, "t", 3, agent=Rates("0.06", "0.01", "0.07"))
    shown = cli(repo, "show", "3").stdout
    for words in (
        "3 of t (experiment), by rates",
        "MATRIX_LR 0.06",
        "keep",
        "1.080000 (+0.020000",
        "weights.safetensors",
    ):
        assert words in shown
    assert "+MATRIX_LR = 0.06" in cli(repo, "diff", "3").stdout
    between = cli(repo, "diff", "4", "3").stdout
    assert "-MATRIX_LR = 0.06" in between and "+MATRIX_LR = 0.01" in between
    best = cli(repo, "best").stdout.splitlines()
    assert [line.split()[0] for line in best[:-1]] == ["0", "3", "5"]
    user = git.Repo(repo)
    done = cli(repo, "checkout", "4")
    assert (done.returncode, user.active_branch.name) == (0, "hotloop/t-0004"), done.stderr
    assert "MATRIX_LR = 0.01" in (repo / "train.py").read_text()
    assert cli(repo, "checkout").returncode == 0
    assert user.active_branch.name == "hotloop/t-0005"
    (repo / "train.py").write_text("mine\n")
    refused(cli(repo, "checkout", "3"), 2, "uncommitted changes (train.py)")
    refused(cli(repo, "show", "99"), 2, "t has no experiment 99; it has 0 to 5")
    refused(cli(repo, "diff", "0"), 2, "changes nothing; give two numbers")
    refused(cli(repo, "show", "1", "--tag", "nowhere"), 2, "there is no night called nowhere")
    assert night.incumbent() is not None
    user.close()


def test_the_page_and_the_picture_are_drawn_on_request(repo: Path) -> None:  # noqa: F811
    night = scripted.drive(repo, "t", 2, agent=Rates("0.06", "0.01"))
    assert cli(repo, "report").returncode == 0
    assert (night.folder / "progress.png").read_bytes()[:4] == b"\x89PNG"
    page = (night.folder / "report.html").read_text()
    assert "MATRIX_LR 0.06" in page and "+MATRIX_LR = 0.06" in page


def test_results_tsv_edited_by_hand_is_found_and_made_again(repo: Path) -> None:  # noqa: F811
    night = scripted.drive(repo, "t", 1)
    path = night.folder / "results.tsv"
    want = path.read_text()
    path.write_text(want.replace("keep", "discard"))
    done = cli(repo, "verify")
    assert "BAD  results.tsv" in done.stdout and "hotloop report" in done.stdout
    cli(repo, "report")
    assert path.read_text() == want


# ---- bad input of the loop


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--agent", "gemini"], "there is no agent 'gemini'; there are: builtin, command, claude, codex, api"),
        (["--agent", "claude"], "npm install -g @anthropic-ai/claude-code"),
        (["--agent", "api"], "needs --api-url"),
        (["--agent", "builtin,builtin"], "each agent once"),
        (["--gpus", "0,1"], "needs GPUs"),
        (["--notify", "'"], "is not a command"),
        (["--max-cost", "-1"], "--max-cost must not be negative"),
    ],
)
def test_what_a_user_can_have_wrong_is_one_line(
    repo: Path, args: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    from hotloop.agent_loop.cli import main

    monkeypatch.setattr(hotloop.agent_loop.commands.start, "settings_of", lambda _: scripted.SETTINGS)
    monkeypatch.chdir(repo)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("HOTLOOP_API_URL", raising=False)
    assert main(["loop", "--preset", "laptop", *args]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_detached_head_is_no_obstacle_and_no_branch_of_the_users_moves(repo: Path) -> None:  # noqa: F811
    user = git.Repo(repo)
    user.git.checkout("--detach")
    before = {h.name: h.commit.hexsha for h in user.heads}
    scripted.drive(repo, "t", 2)
    after = {h.name: h.commit.hexsha for h in user.heads}
    assert {k: v for k, v in after.items() if not k.startswith("autoresearch/")} == before
    assert user.head.is_detached
    user.close()


def test_the_references_notebook_reads_results_tsv(repo: Path) -> None:  # noqa: F811
    """What its cells do with the file: columns by name, numbers, the statuses KEEP, DISCARD and CRASH in capitals."""
    import csv

    night = scripted.drive(repo, "t", 8)
    with open(night.folder / "results.tsv", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    assert list(rows[0]) == ["commit", "val_bpb", "memory_gb", "status", "description"]
    statuses = [r["status"].strip().upper() for r in rows]
    assert set(statuses) <= {"KEEP", "DISCARD", "CRASH"}
    kept = [float(r["val_bpb"]) for r, s in zip(rows, statuses, strict=True) if s == "KEEP"]
    assert kept[0] == max(kept) and len(kept) > 1
    assert all(float(r["memory_gb"]) >= 0 for r in rows)


def test_a_report_that_cannot_be_drawn_says_why_and_leaves_nothing_running(repo: Path) -> None:  # noqa: F811
    from hotloop.agent_loop.loop.background import Reporter

    night = scripted.drive(repo, "t", 1)
    reporter = Reporter(night.folder, repo, every_s=0.0)
    reporter.want()
    assert reporter.finish() == ""
    assert (night.folder / "report.html").exists()
    (night.folder / "records.jsonl").write_text("{}\n")
    reporter.want()
    assert "does not continue the chain" in reporter.finish()
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if str(night.folder) in line and str(os.getpid()) not in line]
