"""Nights that never ran: records as a driver writes them, with what a test needs in them."""

from __future__ import annotations

import datetime
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import git

from hotloop.agent_loop.folder import NightFolder
from hotloop.harness.records import chain as chain_module
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import (
    Body,
    Conditions,
    DataFacts,
    Environment,
    GpuFacts,
    Ledger,
    NightBegun,
    Origin,
    SandboxFacts,
    Start,
    Status,
    Turn,
    TurnResult,
)
from hotloop.harness.settings import BudgetRule
from tests.builders import make_decision, make_outcome, make_run

START = datetime.datetime(2026, 11, 23, 22, 0, tzinfo=datetime.UTC)
LEDGER = Ledger(2.0, 1.0, 14.0, 5.0, 300.0, 1.0, 21.0, 9.0)
TOTAL_S = 355.0  # two seconds of it in no phase


class _At(datetime.datetime):
    """The clock of the records, which tests set."""

    moment = START

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.moment


class Synthetic:
    """A night being written. `seconds` is the time since it began, at which the next entry is written."""

    def __init__(self, folder: Path, monkeypatch: Any, repo: git.Repo | None = None, device: str = "cuda") -> None:
        monkeypatch.setattr(chain_module, "datetime", SimpleNamespace(datetime=_At, UTC=datetime.UTC))
        monkeypatch.setattr(chain_module, "os", _Quick())
        self.chain = Chain.open(folder / "records.jsonl")
        self.repo, self.device, self.seconds = repo, device, 0.0
        self.incumbent = "a" * 40 if repo is None else str(repo.head.commit.hexsha)
        self.number = 0

    def append(self, body: Body) -> None:
        _At.moment = START + datetime.timedelta(seconds=self.seconds)
        self.chain.append(body)

    @property
    def state(self) -> NightFolder:
        return NightFolder.reading(self.chain.path.parent)

    def settings(self, **changes: Any) -> None:
        on_gpu = self.device == "cuda"
        given = {
            "preset": "h100" if on_gpu else "laptop", "device": self.device, "threads": 2, "data": "d", "seed": 1,
            "budget": BudgetRule("seconds", 300.0) if on_gpu else BudgetRule("flops", 1.8e12), "sandbox": 3,
        }  # fmt: skip
        self.append(NightBegun(**given | changes))

    def turn(self, agent: str, reason: str, **origin: Any) -> None:
        self.append(Turn(origin=Origin(agent, **origin), result=TurnResult.FAILED, reason=reason))

    def run(
        self, kind: str, decision: str, val: float | None, description: str = "an edit", reason: str = "because", *,
        gain: float | None = None, holdout: float | None = None, seed: int = 1, commit: str | None = None,
        floor: float = 0.01, slot: int = 0, idle_s: float = 0.0, curve: Any = (), total_s: float = TOTAL_S,
        ledger: Ledger = LEDGER, log_tail: Sequence[str] = (), how: str = "cold", warnings: Sequence[str] = (),
        **origin: Any,
    ) -> int:  # fmt: skip
        """Write a run and its decision, ended `seconds` after the night began; returns its number."""
        number, self.number = self.number, self.number + 1
        commit = commit or (self.incumbent if kind in ("baseline", "repeat") else f"{number:040x}")
        run = make_run(
            number, kind, commit=commit, parent=self.incumbent, description=description, seed=seed, **origin
        )  # fmt: skip
        gpu = GpuFacts("NVIDIA H100 80GB HBM3") if self.device == "cuda" else None
        self.append(make_outcome(
            run, val, holdout, preset="h100", device=self.device, status=Status.OK if val is not None else
            Status(decision), reason=reason, tokens=500_000_000, wall_s=312.5, total_s=total_s, peak_mb=45_000.0,
            mfu_percent=39.8 if gpu else None, curve=list(curve), ledger=ledger, log_tail=list(log_tail),
            start=Start(how), conditions=Conditions(warnings=list(warnings)),
            environment=Environment(cpu="AMD EPYC", gpu=gpu), data=DataFacts("climbmix", "crop", 1.0, 10**9),
            sandbox=SandboxFacts(3, "bubblewrap, own uid"),
        ))  # fmt: skip
        self.append(make_decision(
            run, decision, reason, gain=gain, noise_bpb=floor, slot=slot, idle_s=idle_s
        ))  # fmt: skip
        if decision == "keep":
            self.incumbent = commit
        return number

    def commit(self, text: str) -> str:
        """A commit of train.py on top of the incumbent."""
        assert self.repo is not None
        root = Path(str(self.repo.working_tree_dir))
        self.repo.git.checkout("-q", self.incumbent)
        (root / "train.py").write_text(text)
        self.repo.git.add("train.py")
        self.repo.git.commit("-q", "-m", "edit", "--allow-empty")
        return str(self.repo.head.commit.hexsha)


class _Quick:
    """os, without the wait for the disk at each of thousands of entries."""

    def __getattr__(self, name: str) -> Any:
        return (lambda fd: None) if name == "fsync" else getattr(os, name)


def repository(folder: Path, text: str) -> git.Repo:
    repo = git.Repo.init(folder)
    with repo.config_writer() as config:
        config.set_value("user", "name", "t").set_value("user", "email", "t@localhost")
    (folder / "train.py").write_text(text)
    repo.git.add("train.py")
    repo.git.commit("-q", "-m", "start")
    return repo


def loss_curve(end: float, points: int = 200) -> list[tuple[float, float]]:
    return [
        (i / points, round(end + 6.0 * math.exp(-i / points * 9) + 0.3 * (1 - i / points), 6)) for i in range(points)
    ]


_EDITS = [
    "MATRIX_LR 0.04 -> 0.05", "value embeddings in every second layer", "warm-down over the last 40 % instead of 20 %",
    "DEPTH 8 -> 9 at ASPECT_RATIO 57", "Muon momentum warm-up 300 -> 120 steps", "drop the second x0 mix",
    "attention window 1024 in three of four layers", "logit soft cap 15 -> 12", "EMBEDDING_LR 0.3 -> 0.45",
    "batch 2**19 -> 2**18 with the rate scaled by sqrt", "QK-norm gain learned per head", "RoPE base 10,000 -> 100,000",
    "no weight decay on the unembedding", "relu^2 -> gated with the same operations",
]  # fmt: skip
_SOURCE = "".join(f"SETTING_{i} = {i}  # a hyperparameter\n" for i in range(120))


def realistic(night: Synthetic, count: int = 60, slots: int = 1) -> None:
    """A night as one would be: few gains, many failures, a second seed here and there, some idle time."""
    rng = random.Random(7)
    text, lines = _SOURCE, _SOURCE.splitlines(keepends=True)
    clock = [0.0] * slots

    def at(slot: int, idle: float, total: float) -> None:
        clock[slot] += idle + total
        night.seconds = clock[slot]

    night.settings()
    at(0, 0, TOTAL_S)
    best, best_holdout, floor = 0.9979, 1.0042, 0.0012
    night.run("baseline", "keep", best, "baseline", f"the baseline: {best:.6f} bits per byte", holdout=best_holdout,
              floor=0.0, curve=loss_curve(2.9))  # fmt: skip
    for seed in (2, 3):
        at(0, 0, TOTAL_S)
        night.run("repeat", "measured", best + rng.gauss(0, 0.0004), f"baseline, seed {seed}",
                  f"the baseline's train.py with seed {seed}, for the noise floor", gain=-0.0003, seed=seed,
                  holdout=best_holdout + 0.0003)  # fmt: skip
    for i in range(count):
        slot = i % slots
        idle = rng.expovariate(1 / 12)
        description = rng.choice(_EDITS) + rng.choice(["", "", " (again)", " together with a longer warm-up, see #7"])
        agent = {"agent": rng.choice(["claude", "codex"]), "seconds": rng.uniform(30, 240), "slot": slot,
                 "cost_usd": rng.uniform(0.02, 0.2), "idle_s": idle, "floor": floor}  # fmt: skip
        luck = rng.random()
        if luck < 0.12:
            at(slot, idle, 41.0)
            status, reason = rng.choice([
                ("crash", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2048x768 and 1024x3072)"),
                ("oom", "CUDA out of memory. Tried to allocate 12.00 GiB"), ("nan", "the loss of step 212 is nan"),
            ])  # fmt: skip
            night.run("experiment", status, None, description, reason, total_s=41.0,
                      ledger=Ledger(2.0, 1.0, 14.0, train=22.0),
                      log_tail=["Traceback (most recent call last):", '  File "train.py", line 212, in train', reason],
                      **agent)  # fmt: skip
            continue
        gain = rng.gauss(-0.002, 0.002)
        if luck > 0.8:
            gain = rng.uniform(0.0013, 0.006)
        elif luck > 0.74:
            gain = rng.uniform(0.0007, 0.0011)
        elif luck > 0.72:
            gain = -0.31
        at(slot, idle, TOTAL_S)
        holdout = best_holdout - gain * rng.uniform(0.6, 0.95)
        val = best - gain
        spot = rng.randrange(len(lines))
        commit = None
        decision, reason = "discard", f"worse by {-gain:.6f}"
        if gain > floor:
            decision, reason = "keep", f"better by {gain:.6f}, above the noise floor of {floor:.6f} (3 seeds)"
        elif gain > 0.6 * floor:
            decision, reason = "marginal", f"better by {gain:.6f}, within the noise floor; a second seed will tell"
        elif -floor / 4 < gain < 0:
            decision, reason = "keep", f"equal within the noise floor of {floor:.6f} and simpler: 388 lines against 391"
        if night.repo and decision in ("keep", "marginal"):
            lines[spot] = f"SETTING_{spot} = {rng.random():.4f}  # {description}\n"
            text = "".join(lines)
            commit = night.commit(text)
        night.run("experiment", decision, val, description, reason, gain=gain, holdout=holdout, commit=commit,
                  curve=loss_curve(2.9 - (0.9979 - val) * 3), **agent)  # fmt: skip
        if decision == "marginal":
            commit = commit or f"{night.number - 1:040x}"
            at(slot, 0, TOTAL_S)
            good = rng.random() > 0.5
            confirm = "keep" if good else "discard"
            why = f"better by {gain * 0.9:.6f} on average over 2 seeds, {'above' if good else 'within'} the noise floor"
            night.run("confirm", confirm, val + 0.0002, f"{description} (seed 2)", why, gain=gain * 0.8, seed=2,
                      commit=commit, holdout=holdout, slot=slot, floor=floor)  # fmt: skip
            decision = confirm
        if decision == "keep":
            best, best_holdout = val, holdout
    for reason in ("no answer in 900 s", *["the agent left train.py as it was"] * 3):
        night.turn("codex", reason, seconds=61.0, cost_usd=0.03, tokens=900)
