"""Where an experiment's time goes beside its training, from records, against what it should be.

    hotloop bench overheads           two short nights, plain and with everything made ahead, in a folder of their own
    hotloop bench overheads TAG ...   nights that were run, under runs/

A night's five minutes of training are what they are; everything else is overhead, so a short training tells it as well.
Experiments an hour are those of five-minute trainings with the overheads that were found.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.experiment import Settings
from hotloop.harness.paths import import_root
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Decided, Outcome, Status
from hotloop.harness.sandbox.process import tail

__all__ = ["Figure", "Ran", "figures", "main", "page", "per_hour"]

TRAINING_S = 300.0
NIGHTS = {"plain": ["--prewarm", "off"], "ahead": ["--prewarm", "on", "--compile-cache"]}
BUDGETS = {"h100": ["--budget-seconds", "10"], "laptop": ["--budget-flops", "1.5e11"]}


@dataclass(frozen=True)
class Ran:
    """A run, and how long the device had waited before it, where that is known."""

    outcome: Outcome
    idle_s: float | None = None

    @property
    def warm(self) -> bool:
        return self.outcome.training.start.how == "warm"

    @property
    def given(self) -> bool:
        """Whether it was given a compile cache."""
        return bool(self.outcome.compiled and self.outcome.compiled.given)


@dataclass(frozen=True)
class Figure:
    """One of the targets.

    Attributes:
        found: None where no run tells it.
        aim: seconds at most, or experiments an hour at least (`more`); None for what is shown only.
        runs: how many the median is of.
    """

    what: str
    found: float | None
    aim: float | None
    runs: int
    more: bool = False

    @property
    def good(self) -> bool:
        if self.found is None or self.aim is None:
            return True
        return self.found >= self.aim if self.more else self.found <= self.aim


def figures(runs: Sequence[Ran]) -> list[Figure]:
    """The targets, by runs that ended with a score."""
    done = [r for r in runs if r.outcome.status == Status.OK]
    ahead = [r for r in done if r.warm]

    def of(what: str, aim: float, runs: Sequence[Ran], *phases: str) -> Figure:
        ledgers = [dict(r.outcome.ledger.items()) for r in runs]
        times = [sum(ledger[p] for p in phases) for ledger in ledgers]
        return Figure(what, statistics.median(times) if times else None, aim, len(times))

    first = ("start", "import", "compile", "calibrate")
    found = [
        of("start to the first real batch, made ahead and with a compile cache, s", 12.0,
           [r for r in ahead if r.given], *first),
        of("compile without a cache, s", 60.0, [r for r in done if not r.given], "compile"),
        of("evaluation and audit, s", 8.0, done, "evaluate", "audit"),
        of("submission, s", 1.0, done, "submit"),
    ]  # fmt: skip
    for what, aim, runs in (
        ("experiments an hour, next trainer made ahead", 11.6, ahead),
        ("experiments an hour, cold starts", None, [r for r in done if not r.warm]),
    ):
        counted = [r for r in runs if r.idle_s is not None]
        found.append(Figure(what, per_hour(counted) if counted else None, aim, len(counted), more=True))
    waits = [r.idle_s for r in ahead if r.idle_s is not None]
    what = "idle GPU before an experiment that was made ahead, the longest, s"
    return [*found, Figure(what, max(waits, default=None), 3.0, len(waits))]


def per_hour(runs: Sequence[Ran]) -> float:
    """Of experiments that train for five minutes and have the median overhead of these."""
    beside = [r.outcome.total_s - r.outcome.ledger.train + (r.idle_s or 0.0) for r in runs]
    return 3600.0 / (TRAINING_S + statistics.median(beside))


def page(found: Iterable[Figure], on_gpu: bool) -> str:
    """Markdown."""
    lines = ["| | target | found | runs | |", "|---|---:|---:|---:|---|"]
    for f in found:
        aim = "" if f.aim is None else f"{'>=' if f.more else '<='} {f.aim:g}"
        shown = "not measured" if f.found is None else f"{f.found:.2f}"
        mark = "" if f.found is None or f.aim is None or not on_gpu else "ok" if f.good else "FAIL"
        lines.append(f"| {f.what} | {aim} | {shown} | {f.runs} | {mark} |")
    if not on_gpu:
        lines += ["", "CPU figures: the targets are a GPU's."]
    return "\n".join(lines) + "\n"


def read(paths: Iterable[Path]) -> list[Ran]:
    """All runs of these records.

    Raises:
        UsageError: one that is not there.
        RecordError: one that is damaged.
    """
    found: list[Ran] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no night at {path.parent}")
        chain = Chain.read(path)
        idle_s = {d.run.number: d.idle_s for d in chain.bodies(Decided)}
        found += [Ran(o, idle_s.get(o.run.number)) for o in chain.bodies(Outcome)]
    return found


def main(
    tags: Sequence[str], settings: Settings | None, train: Path, say: Callable[[str], None] = print,
    nights: Sequence[str] = tuple(NIGHTS), experiments: int = 2,
) -> tuple[bool, str]:  # fmt: skip
    """(whether a GPU reaches all targets that were measured, or True on a CPU; the page).

    Args:
        settings, train: for nights of its own, where no tag is given.
        nights: of NIGHTS. experiments: of each, beside its baseline.

    Raises:
        HotloopError: one of those nights failed.
    """
    if tags:
        runs = read(Path("runs") / tag / "records.jsonl" for tag in tags)
    else:
        assert settings is not None
        with tempfile.TemporaryDirectory() as scratch:
            source = train.read_bytes()
            runs = read([_night(Path(scratch), name, settings, source, experiments, say) for name in nights])
    found = figures(runs)
    on_gpu = any(r.outcome.device == "cuda" for r in runs)
    return not on_gpu or all(f.good for f in found), page(found, on_gpu)


def _night(
    scratch: Path, name: str, settings: Settings, source: bytes, experiments: int, say: Callable[[str], None]
) -> Path:
    """A short night in a repository of its own; its records."""
    repo = scratch / name
    repo.mkdir()
    (repo / "train.py").write_bytes(source)
    git = ["git", "-c", "user.name=hotloop", "-c", "user.email=hotloop@localhost"]
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "train.py"]):
        subprocess.run([*git, *words], cwd=repo, check=True, capture_output=True)
    preset, log = settings.preset.name, scratch / f"{name}.log"
    code = "import sys; from hotloop.agent_loop.cli import main; sys.exit(main())"
    command = [
        sys.executable, "-c", code, "loop", "--tag", name, "--experiments", str(experiments), "--noise-seeds", "0",
        "--no-watchdog", "--no-second-seed", "--preset", preset, "--data", str(settings.dataset.path.resolve()),
        *BUDGETS[preset], *NIGHTS[name],
    ]  # fmt: skip
    author = {f"GIT_{who}_{what}": "hotloop" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = os.environ | {"PYTHONPATH": import_root()} | author
    say(f"a night of a baseline and {experiments} experiments, {' '.join(NIGHTS[name])}")
    with open(log, "wb") as out:
        done = subprocess.run(command, cwd=repo, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    if done.returncode:
        raise HotloopError(f"the night {name!r} failed: {' / '.join(tail(log, 3))}")
    return repo / "runs" / name / "records.jsonl"
