"""What the sandbox costs: training speed and start-up inside and outside it, in pairs, one after the other.

    hotloop bench sandbox [--pairs N]

Each pair trains the same train.py for the same tokens without a sandbox and in the best one of this machine, in
changing order. The speed is the parent's measure: tokens over the seconds of the training on a GPU; on a CPU over its
processor seconds, since wall time there depends on who else is there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from hotloop.harness.errors import HotloopError
from hotloop.harness.gpu import between_runs
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.probe_cuda import probe_cuda
from hotloop.harness.settings import BudgetRule, Spec
from hotloop.harness.single import settings_from
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Session, SessionConfig

__all__ = ["levels", "main"]


def levels(device: str) -> int:
    """Print each sandbox level of this machine, whether CUDA works in it, and what clearing the GPU's memory takes; 0
    when one works.
    """
    works = 0
    for level in (3, 2, 1):
        try:
            sandbox = best(level)
            words = f", {probe_cuda(sandbox):.2f} s to a first product" if device == "cuda" else ""
            print(f"{sandbox}{words}", flush=True)
            works += 1
        except HotloopError as e:
            print(f"L{level}: {e}", flush=True)
    if device == "cuda":
        print("not ours on the GPU:", between_runs.others())
        began = time.monotonic()
        print(f"{between_runs.clear()} MiB cleared in {time.monotonic() - began:.2f} s")
    return 0 if works else 1


def main(pairs: int, steps: int, preset: str, data: str | None) -> int:
    """Print a page; 0 when the median cost is at most 0.5 % of the speed."""
    settings = settings_from(preset=preset, data=data)
    source = (project_root() / "train.py").read_bytes()
    dataset, chosen = settings.dataset, settings.preset
    spec = Spec(chosen.name, settings.device, 1, dataset.vocab_size, dataset.seq_len, chosen.batch_divisor)
    rows = dataset.rows("train")

    def train(sandbox: Sandbox, tokens: int) -> Session:
        rule = BudgetRule("tokens", float(tokens))
        with tempfile.TemporaryDirectory() as folder:
            return Session(SessionConfig(
                source=source, spec=spec, preset=chosen, rows=rows, budget=Budget(rule), folder=Path(folder),
                threads=settings.threads, sandbox=sandbox,
            )).run()  # fmt: skip

    first = train(settings.sandbox, 1 << 17 if settings.device == "cpu" else 1 << 20)
    tokens = first.training.tokens // first.training.steps * steps
    print(f"{settings.sandbox} against none, {settings.device}; {tokens:,} tokens each, {pairs} pairs")
    unit = "tok/cpu-s" if settings.device == "cpu" else "tok/s"
    print(f"{'pair':>4}  {'inside ' + unit:>17}  {'outside ' + unit:>17}  {'ratio':>7}  start inside, outside s")
    ratios = []
    for pair in range(pairs):
        order = [settings.sandbox, best(0)] if pair % 2 else [best(0), settings.sandbox]
        found = {s.level: train(s, tokens) for s in order}
        inside, outside = found[settings.sandbox.level], found[0]
        seconds = [t.training.cpu_s if settings.device == "cpu" else t.training.wall_s for t in (inside, outside)]
        speeds = [t.training.tokens / s for t, s in zip((inside, outside), seconds, strict=True)]
        ratios.append(speeds[0] / speeds[1])
        starts = f"{inside.ledger.start:.3f}, {outside.ledger.start:.3f}"
        print(f"{pair:>4}  {speeds[0]:>17,.0f}  {speeds[1]:>17,.0f}  {ratios[-1]:>7.4f}  {starts}", flush=True)
    middle = statistics.median(ratios)
    print(f"median ratio {middle:.4f} (from {min(ratios):.4f} to {max(ratios):.4f})")
    return 0 if middle >= 0.995 else 1
