"""What a night does with its records, at 100, 1,000 and 10,000 experiments: each should grow with their number alone.

pytest bench/bench_night.py --benchmark-only -o addopts=--import-mode=importlib
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hotloop.agent_loop.agents.brief import write_brief
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.race import false_stops, lessons
from hotloop.agent_loop.report.files import tsv_text, write_progress
from hotloop.agent_loop.report.page import page
from hotloop.harness.records import chain as chain_module
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import (
    Decided,
    Decision,
    Judgement,
    Kind,
    Ledger,
    NightBegun,
    Origin,
    Outcome,
    Run,
    Scores,
    Status,
    Training,
)
from hotloop.harness.settings import BudgetRule

COUNTS = (100, 1000, 10_000)
EDITS = ("MATRIX_LR 0.04 -> 0.05", "value embeddings in every second layer", "DEPTH 8 -> 9", "attention window 1024")
FLOOR = 0.001


@functools.cache
def folder_of(count: int) -> Path:
    """Records of a night that never ran: one run in twelve crashed, one in fifteen was kept."""
    folder = Path(tempfile.mkdtemp(prefix="hotloop-night-")) / "t"
    rng = random.Random(7)
    with mock.patch.object(chain_module.os, "fsync", return_value=None):
        chain = Chain.open(folder / "records.jsonl")
        chain.append(NightBegun(
            preset="h100", device="cuda", threads=2, data="d", budget=BudgetRule("seconds", 300.0), seed=1, sandbox=3
        ))  # fmt: skip
        best, parent = 1.0, f"{0:040x}"
        for number in range(count):
            failed = number % 12 == 5
            gain = rng.uniform(0.0011, 0.003) if number % 15 == 0 else rng.gauss(-0.002, 0.001)
            val = None if failed else best - gain * bool(number)
            decision = Decision.CRASH if val is None else (
                Decision.KEEP if best - val > FLOOR or not number else Decision.DISCARD
            )  # fmt: skip
            words, commit = f"{rng.choice(EDITS)}, number {number}", f"{number:040x}"
            kind = Kind.EXPERIMENT if number else Kind.BASELINE
            run = Run(number, kind, commit, parent, words, 1, Origin("codex", 60.0, 0.05))
            curve = [(i / 50, (val or 1.0) + 2.0 + 6.0 * math.exp(-i / 6)) for i in range(50)]
            chain.append(Outcome(
                run=run, tag="t", preset="h100", device="cuda", source_sha256="",
                status=Status.CRASH if failed else Status.OK, reason="RuntimeError: shapes" if failed else "",
                scores=None if val is None else Scores(val, val), total_s=355.0,
                training=Training(steps=950, tokens=500_000_000, wall_s=300.0, peak_mb=45_000.0, curve=curve),
                ledger=Ledger(start=3.0, train=300.0, evaluate=21.0, audit=9.0),
            ))  # fmt: skip
            chain.append(Decided(
                run=run, judgement=Judgement(decision, "because"), gain=None if val is None else best - val,
                noise_bpb=FLOOR, idle_s=2.0,
            ))  # fmt: skip
            if decision == Decision.KEEP and val is not None:
                best, parent = val, commit
    return folder


@functools.cache
def night_of(count: int) -> NightFolder:
    return NightFolder.reading(folder_of(count))


def raced(count: int) -> Any:
    """Of a night that is read anew: what is learned from a run is kept."""
    return false_stops(lessons(NightFolder(folder_of(count), night_of(count).chain), FLOOR))


DOES = {
    "start again": lambda count: NightFolder.reading(folder_of(count)).tried(),
    "brief": lambda count: write_brief(night_of(count), "h100"),
    "results.tsv": lambda count: tsv_text(night_of(count)),
    "report.html": lambda count: page(night_of(count), None),
    "progress.png": lambda count: write_progress(night_of(count)),
    "false stops": raced,
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", DOES)
def bench_night(benchmark: Any, what: str, count: int) -> None:
    night_of(count)
    benchmark.pedantic(DOES[what], args=(count,), rounds=1 if count == COUNTS[-1] else 3)
