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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.experiment import Settings
from hotloop.harness.paths import import_root
from hotloop.harness.records.record import Chain
from hotloop.harness.sandbox.process import tail

__all__ = ["Figure", "figures", "main", "page", "per_hour"]

TRAINING_S = 300.0
Bodies = Sequence[Mapping[str, Any]]
NIGHTS = {"plain": ["--prewarm", "off"], "ahead": ["--prewarm", "on", "--compile-cache"]}
BUDGETS = {"h100": ["--budget-seconds", "10"], "laptop": ["--budget-flops", "1.5e11"]}


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


def figures(bodies: Bodies, idle_s: Mapping[int, float]) -> list[Figure]:
    """The targets, by runs that ended with a score.

    Args:
        bodies: of `experiment` entries.
        idle_s: how long the device had waited before a run, by its number, where that is known.
    """
    done = [b for b in bodies if b["status"] == "ok"]
    given = [b for b in done if b["compiled"].get("given")]
    ahead = [b for b in done if b["start"].get("how") == "warm"]

    def of(what: str, aim: float, runs: Bodies, *phases: str) -> Figure:
        times = [sum(b["ledger"][p] for p in phases) for b in runs]
        return Figure(what, statistics.median(times) if times else None, aim, len(times))

    first = ("start", "import", "compile", "calibrate")
    warm = [b for b in ahead if b in given]
    fresh = [b for b in done if not b["compiled"].get("given")]
    found = [
        of("start to the first real batch, made ahead and with a compile cache, s", 12.0, warm, *first),
        of("compile without a cache, s", 60.0, fresh, "compile"),
        of("evaluation and audit, s", 8.0, done, "evaluate", "audit"),
        of("submission, s", 1.0, done, "submit"),
    ]
    for what, aim, runs in (
        ("experiments an hour, next trainer made ahead", 11.6, ahead),
        ("experiments an hour, cold starts", None, [b for b in done if b["start"].get("how") != "warm"]),
    ):
        counted = [b for b in runs if b["number"] in idle_s]
        found.append(Figure(what, per_hour(counted, idle_s) if counted else None, aim, len(counted), more=True))
    waits = [idle_s[b["number"]] for b in ahead if b["number"] in idle_s]
    found.append(
        Figure(
            "idle GPU before an experiment that was made ahead, the longest, s",
            max(waits, default=None),
            3.0,
            len(waits),
        )
    )
    return found


def per_hour(bodies: Bodies, idle_s: Mapping[int, float]) -> float:
    """Of experiments that train for five minutes and have the median overhead of these."""
    beside = [float(b["total_s"] - b["ledger"]["train"] + idle_s[b["number"]]) for b in bodies]
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


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """(`experiment` bodies, idle seconds before each) of records; those of several get numbers of their own.

    Raises:
        UsageError: one that is not there.
        RecordError: one that is damaged.
    """
    bodies: list[dict[str, Any]] = []
    idle_s: dict[int, float] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no night at {path.parent}")
        chain, before = Chain.read(path), len(bodies)
        numbers = {b["number"]: before + i for i, b in enumerate(chain.bodies("experiment"))}
        bodies += [b | {"number": numbers[b["number"]]} for b in chain.bodies("experiment")]
        decided = (d for d in chain.bodies("decision") if d["number"] in numbers)
        idle_s |= {numbers[d["number"]]: float(d.get("idle_s") or 0.0) for d in decided}
    return bodies, idle_s


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
        bodies, idle_s = read(Path("runs") / tag / "records.jsonl" for tag in tags)
    else:
        assert settings is not None
        with tempfile.TemporaryDirectory() as scratch:
            source = train.read_bytes()
            bodies, idle_s = read([_night(Path(scratch), name, settings, source, experiments, say) for name in nights])
    found = figures(bodies, idle_s)
    on_gpu = any(b["device"] == "cuda" for b in bodies)
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
