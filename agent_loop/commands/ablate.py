"""Leave one out: is what was kept early still worth something at the end?

For each kept experiment, its edit is taken out of the incumbent's train.py (a three-way merge, its own train.py as the
base) and the rest is run. The entry in the records says what the edit is worth now, and the verdict:

    confirmed   worse without it by more than the noise floor
    marginal    worse without it, within the noise floor
    retracted   no worse without it: a candidate for removal
    entangled   later edits changed the same lines, so it cannot be taken out alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from hotloop.agent_loop.gitrepo import NightRepo
from hotloop.agent_loop.night import Night, Row
from hotloop.agent_loop.source import ProposalError, check_source, syntax_hash
from hotloop.harness.errors import UsageError
from hotloop.harness.experiment import Event, Job, Settings, run_experiment
from hotloop.harness.records.record import Outcome
from hotloop.harness.settings import BudgetRule
from hotloop.harness.training.budget import held_against

__all__ = ["ablate", "verdict"]

Runner = Callable[[Job, Settings, Callable[[Event], None]], Outcome]


def verdict(worth: float, floor: float) -> str:
    """`worth` and `floor` in bits per byte."""
    if worth > floor:
        return "confirmed"
    return "marginal" if worth > 0 else "retracted"


def ablate(
    night: Night,
    repo: NightRepo,
    settings: Settings,
    budget: BudgetRule | None,
    on_event: Callable[[Event], None] = lambda _: None,
    runner: Runner = run_experiment,
) -> Iterator[dict[str, Any]]:
    """Check what was not checked yet against this incumbent; yields each entry's body when it is recorded.

    Raises:
        UsageError: a night that kept nothing, or was scored with other settings.
        HotloopError: as run_experiment.
    """
    best = night.incumbent()
    kept = [r for r in night.rows() if r.decision == "keep"][1:]
    if best is None or not kept or best.outcome is None:
        raise UsageError(f"{night.folder.name} kept nothing beside its baseline, so there is nothing to leave out")
    have = night.settings or {}
    if have.get("data") != settings.dataset.digest or have.get("preset") != settings.preset.name:
        raise UsageError(f"{night.folder.name} was scored on other data or with another preset; give the same --data")
    if best.outcome.profile != (settings.profile.sha256 if settings.profile else ""):
        raise UsageError("the night ran under another profile of this machine; scores would not compare")
    if best.outcome.repeatable != settings.repeatable:
        wanted = "without" if best.outcome.repeatable else "with"
        raise UsageError(f"{night.folder.name} was run {wanted} --fast-nondeterministic; give the same")
    done = {(b["number"], b["incumbent"]) for b in night.chain.bodies("leave-one-out")}
    for row in kept:
        if (row.number, best.commit) not in done:
            body = _without(night, repo, settings, budget, on_event, runner, best, row)
            night.chain.append("leave-one-out", body)
            yield body


def _without(
    night: Night, repo: NightRepo, settings: Settings, budget: BudgetRule | None, on_event: Callable[[Event], None],
    runner: Runner, best: Row, row: Row,
) -> dict[str, Any]:  # fmt: skip
    assert row.outcome is not None
    floor = night.noise().floor_bpb
    body: dict[str, Any] = {
        "number": row.number, "commit": row.commit, "incumbent": best.commit, "noise_bpb": floor, "run": None,
        "val_bpb": None, "worth": None,
    }  # fmt: skip
    parent = repo.source(row.outcome.parent)
    source = repo.merged(row.commit, best.commit, parent)
    try:
        if source is None:
            raise ProposalError("entangled", "later edits changed the same lines, so it cannot be taken out alone")
        check_source(source)
        if syntax_hash(source) == syntax_hash(repo.source(best.commit)):
            raise ProposalError("retracted", "a later edit has undone it already")
    except ProposalError as e:
        kind = e.status if e.status in ("entangled", "retracted") else "entangled"
        return body | {"verdict": kind, "reason": str(e)}
    known = _known_score(night, source, repo)
    if known is None:
        was = best.outcome
        pace, late = held_against(was.budget, was.training_s) if was and was.device == "cuda" else (1.0, 1.0)
        job = Job(
            source=source, number=row.number, tag=repo.tag, kind="leave-one-out", commit="", parent=best.commit,
            description=f"without experiment {row.number}: {row.description}", seed=night.seed,
            folder=night.folder / "leave-one-out" / f"{row.number:04d}", budget=budget,
            incumbent_tokens=(best.outcome.budget if best.outcome else {}).get("tokens"), pace=pace, late=late,
        )  # fmt: skip
        outcome = runner(job, settings, on_event)
        body["run"] = dataclasses.asdict(outcome)
        known = outcome.val_bpb
        if known is None:
            reason = f"without it the run ends as {outcome.status}: {outcome.reason}"
            return body | {"verdict": "confirmed", "reason": reason}
    score = night.score_of(best.commit, night.seed)
    assert score is not None
    worth = known - score
    words = f"without it {known:.6f} instead of {score:.6f}: worth {worth:+.6f} at the end (noise floor {floor:.6f})"
    return body | {"val_bpb": known, "worth": worth, "verdict": verdict(worth, floor), "reason": words}


def _known_score(night: Night, source: bytes, repo: NightRepo) -> float | None:
    """Of a train.py that was run already, as the last kept one's parent was."""
    digest = syntax_hash(source)
    scored = [r.commit for r in night.rows() if r.kind in ("baseline", "experiment") and r.val_bpb is not None]
    same = (c for c in scored if digest in night.seen and syntax_hash(repo.source(c)) == digest)
    commit = next(same, None)
    return None if commit is None else night.score_of(commit, night.seed)
