"""Entries of a night, with what a test needs in them; all else is what an experiment on a CPU might have left."""

from __future__ import annotations

from typing import Any

from hotloop.harness.records.model import (
    Decided,
    Decision,
    Environment,
    Judgement,
    Kind,
    NightBegun,
    Origin,
    Outcome,
    Scores,
    Status,
    Training,
    Trial,
)
from hotloop.harness.settings import BudgetRule

LAPTOP = NightBegun(
    preset="laptop", device="cpu", threads=2, data="d", budget=BudgetRule("flops", 1.8e12), seed=1, sandbox=3
)


def make_run(number: int = 1, kind: str = "experiment", *, seed: int = 1, **fields: Any) -> Trial:
    """`fields`: of the run, and of its origin."""
    origin = Origin(**{k: fields.pop(k) for k in Origin.__struct_fields__ if k in fields})
    defaults = {"commit": f"{number:040x}", "parent": "0" * 40, "description": "an edit"}
    return Trial(number=number, kind=Kind(kind), seed=seed, origin=origin, **defaults | fields)


def make_outcome(
    run: Trial | None = None, val_bpb: float | None = None, holdout_bpb: float | None = None, **fields: Any
) -> Outcome:
    """`fields`: of the outcome, and of its training. One with a score is ok, one without crashed."""
    training = Training(**{k: fields.pop(k) for k in Training.__struct_fields__ if k in fields})
    scores = None if val_bpb is None else Scores(val_bpb, holdout_bpb)
    defaults: dict[str, Any] = {
        "tag": "t", "preset": "laptop", "device": "cpu", "source_sha256": "", "environment": Environment(threads=2),
        "status": Status.OK if scores else Status.CRASH,
    }  # fmt: skip
    given = {"run": run or make_run(), "scores": scores, "training": training}
    return Outcome(**defaults | given | fields)


def make_decision(run: Trial, decision: str, reason: str = "because", *, again: bool = False, **fields: Any) -> Decided:
    return Decided(run=run, judgement=Judgement(Decision(decision), reason, again), **fields)
