"""Leave one out: is what was kept early still worth something at the end?

For each kept experiment, its edit is taken out of the incumbent's train.py (a three-way merge, its own train.py as the
base) and the rest is run. The entry in the records says what the edit is worth now, and the verdict:

    confirmed   worse without it by more than the noise floor
    marginal    worse without it, within the noise floor
    retracted   no worse without it: a candidate for removal
    entangled   later edits changed the same lines, so it cannot be taken out alone
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from hotloop.agent_loop.commands.show import night_named
from hotloop.agent_loop.commands.tune import recorded_profile
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.night import Night, Row
from hotloop.agent_loop.report.files import draw
from hotloop.agent_loop.source import ProposalError, check_source, syntax_hash
from hotloop.harness.errors import UsageError
from hotloop.harness.experiment import Event, Job, Settings, run_experiment
from hotloop.harness.records.chain import Lock
from hotloop.harness.records.model import Decision, Kind, LeftOut, Outcome, Trial, Worth
from hotloop.harness.settings import BudgetRule
from hotloop.harness.single import budget_from, settings_of
from hotloop.harness.text import one_line
from hotloop.harness.training.budget import held_against

__all__ = ["ablate", "ablate_command", "verdict"]

Runner = Callable[[Job, Settings, Callable[[Event], None]], Outcome]


def verdict(worth: float, floor: float) -> Worth:
    """`worth` and `floor` in bits per byte."""
    if worth > floor:
        return Worth.CONFIRMED
    return Worth.MARGINAL if worth > 0 else Worth.RETRACTED


def ablate_command(args: argparse.Namespace) -> int:
    """`hotloop ablate`: each verdict as it comes, then the report."""
    folder = night_named(args.tag).folder
    args.recorded = recorded_profile(folder)
    settings = settings_of(args)
    repo = open_repo(Path.cwd())
    with Lock(folder / "lock"):
        night = NightFolder(folder)
        for left_out in ablate(night, NightRepo(repo, folder.name, folder), settings, budget_from(args)):
            print(f"#{left_out.number:<4} {left_out.verdict:<10} {one_line(left_out.reason)}", flush=True)
    draw(str(folder), str(Path.cwd()))
    print(f"the whole report: {folder / 'report.html'}")
    return 0


def ablate(
    night: NightFolder,
    repo: NightRepo,
    settings: Settings,
    budget: BudgetRule | None,
    on_event: Callable[[Event], None] = lambda _: None,
    runner: Runner = run_experiment,
) -> Iterator[LeftOut]:
    """Check what was not checked yet against this incumbent; yields each entry when it is recorded.

    Raises:
        UsageError: a night that kept nothing, or was scored with other settings.
        HotloopError: as run_experiment.
    """
    best, have = night.incumbent(), night.settings
    kept = [r for r in night.rows() if r.decision == Decision.KEEP][1:]
    if best is None or not kept or have is None:
        raise UsageError(f"{night.folder.name} kept nothing beside its baseline, so there is nothing to leave out")
    if (have.data, have.preset) != (settings.dataset.digest, settings.preset.name):
        raise UsageError(f"{night.folder.name} was scored on other data or with another preset; give the same --data")
    if have.profile != (settings.profile.sha256 if settings.profile else ""):
        raise UsageError(f"{night.folder.name} ran under another profile of this machine; scores would not compare")
    if have.repeatable != settings.repeatable:
        wanted = "without" if have.repeatable else "with"
        raise UsageError(f"{night.folder.name} was run {wanted} --fast-nondeterministic; give the same")
    done = {(left_out.number, left_out.incumbent) for _, left_out in night.left_out}

    def run(source: bytes, row: Row) -> Outcome:
        was = best.outcome
        pace, late = held_against(was.budget, was.training.wall_s) if was.device == "cuda" else (1.0, 1.0)
        words = f"without experiment {row.number}: {row.description}"
        job = Job(
            Trial(row.number, Kind.LEAVE_ONE_OUT, "", best.commit, words, night.seed), source, repo.tag,
            night.folder / "leave-one-out" / f"{row.number:04d}", budget=budget, incumbent_tokens=was.budget.tokens,
            pace=pace, late=late,
        )  # fmt: skip
        return runner(job, settings, on_event)

    for row in kept:
        if (row.number, best.commit) not in done:
            left_out = _without(night, repo, best, row, run)
            night.append(left_out)
            yield left_out


def _without(night: Night, repo: NightRepo, best: Row, row: Row, run: Callable[[bytes, Row], Outcome]) -> LeftOut:
    floor = night.noise().floor_bpb

    def found(
        verdict: Worth, reason: str, outcome: Outcome | None = None, val_bpb: float | None = None,
        worth: float | None = None,
    ) -> LeftOut:  # fmt: skip
        return LeftOut(
            number=row.number, commit=row.commit, incumbent=best.commit, noise_bpb=floor, verdict=verdict,
            reason=reason, outcome=outcome, val_bpb=val_bpb, worth=worth,
        )  # fmt: skip

    source = repo.merged(row.commit, best.commit, repo.source(row.run.parent))
    if source is None:
        return found(Worth.ENTANGLED, "later edits changed the same lines, so it cannot be taken out alone")
    try:
        check_source(source)
    except ProposalError as e:
        return found(Worth.ENTANGLED, str(e))
    if syntax_hash(source) == syntax_hash(repo.source(best.commit)):
        return found(Worth.RETRACTED, "a later edit has undone it already")
    outcome, without = None, _known_score(night, source, repo)
    if without is None:
        outcome = run(source, row)
        without = outcome.val_bpb
        if without is None:
            reason = f"without it the run ends as {outcome.status}: {outcome.reason}"
            return found(Worth.CONFIRMED, reason, outcome)
    score = night.score_of(best.commit, night.seed)
    assert score is not None
    worth = without - score
    words = f"without it {without:.6f} instead of {score:.6f}: worth {worth:+.6f} at the end (noise floor {floor:.6f})"
    return found(verdict(worth, floor), words, outcome, without, worth)


def _known_score(night: Night, source: bytes, repo: NightRepo) -> float | None:
    """Of a train.py that was run already, as the last kept one's parent was."""
    digest = syntax_hash(source)
    scored = [r.commit for r in night.rows() if r.kind in (Kind.BASELINE, Kind.EXPERIMENT) and r.val_bpb is not None]
    same = (c for c in scored if digest in night.seen and syntax_hash(repo.source(c)) == digest)
    commit = next(same, None)
    return None if commit is None else night.score_of(commit, night.seed)
