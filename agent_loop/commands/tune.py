"""`hotloop tune`: what this machine proves and chooses of the implementations, shown as it is found."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from hotloop.harness.errors import HotloopError, LockedError, UsageError
from hotloop.harness.experiment import Settings
from hotloop.harness.profile import Machine, Profile, facts, own_path
from hotloop.harness.records.chain import Chain, Lock
from hotloop.harness.records.model import NightBegun
from hotloop.harness.single import machine_from, read_train_source

__all__ = ["promise", "recorded_profile", "tune_command", "tune_first"]


def tune_command(args: argparse.Namespace) -> int:
    """`hotloop tune`. 0 when all was compared, UNFINISHED where the time was over before."""
    from hotloop.harness.tuning.notes import UNFINISHED
    from hotloop.harness.tuning.tune import MINUTES, QUICK_MINUTES

    minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES)
    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes must be a positive number, not {args.minutes}")
    source = read_train_source(Path(args.train))
    machine = machine_from(
        preset=args.preset, device=args.device, sandbox=args.sandbox, unsafe=args.unsafe_no_sandbox
    )  # fmt: skip
    profile = _tuned(machine, source, minutes, args.quick)
    return 0 if profile.body["complete"] else UNFINISHED


def tune_first(settings: Settings, train: Path) -> None:
    """Before a night on a GPU that has no profile: quickly, and the night begins in any case."""
    from hotloop.harness.tuning.tune import QUICK_MINUTES

    print(f"hotloop: this GPU has no profile yet; tuning for {QUICK_MINUTES:g} minutes (--no-tune goes without)")
    here = facts(settings.preset, settings.device, settings.sandbox.gpu)
    machine = Machine(settings.preset, settings.device, settings.sandbox, here, settings.threads)
    try:
        _tuned(machine, read_train_source(train), QUICK_MINUTES, True)
    except HotloopError as e:
        print(f"hotloop: WARNING: nothing was tuned, and references run: {e}", file=sys.stderr)


def recorded_profile(night: Path) -> tuple[Path, str] | None:
    """(where the profile of a night that was begun is kept, its hash or ""); None for one that was not."""
    if not (night / "records.jsonl").exists():
        return None
    begun = Chain.read(night / "records.jsonl").bodies(NightBegun)
    return (night / "experiments" / "0000", begun[0].profile) if begun else None


def _tuned(machine: Machine, source: bytes, minutes: float, quick: bool) -> Profile:
    """Tune, showing it. Any other use of the device would be measured too, so this process sees no other."""
    from hotloop.harness.tuning.tune import Progress, tune

    gpu = machine.sandbox.gpu
    if machine.device == "cpu" or gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid if gpu else ""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        lock = Lock(own_path(machine.facts).with_suffix(".lock"))
    except LockedError:
        raise LockedError("another tuning of this machine is under way; wait for it, or stop it") from None
    with lock, _bar(console, minutes) as show:
        say = lambda words: console.print(words, markup=False, highlight=False)  # noqa: E731
        profile = tune(machine, source, Progress(say, show), minutes, quick)
    console.print(promise(profile))
    console.print(f"written: {profile.path} ({profile.sha256[:12]})", markup=False, highlight=False, soft_wrap=True)
    return profile


@contextlib.contextmanager
def _bar(console: Console, minutes: float) -> Iterator[Any]:
    """A progress bar with what is being done and the most time that is left."""
    deadline = time.monotonic() + minutes * 60
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("plain", left="")

        def show(words: str, done: int, planned: int) -> None:
            left_s = max(0, round(deadline - time.monotonic()))
            left = f"at most {left_s // 60}:{left_s % 60:02d} left"
            bar.update(task, description=words, completed=done, total=planned, left=left)
            if not console.is_terminal:
                console.print(f"[{done + 1}/{planned}, {left}] {words}", markup=False, highlight=False)

        yield show


def promise(profile: Profile) -> Table:
    """What was found on this machine: part, implementation, ratio; the whole step."""
    body = profile.body
    where = body["depends"].get("gpu") or f"{body['depends'].get('cpu', 'any CPU')} (CPU figures)"
    table = Table(title=f"{where}, preset {body['depends']['preset']}", title_justify="left")
    for name in ("part", "implementation", "alone", "whole step", ""):
        table.add_column(name, justify="right" if name in ("alone", "whole step") else "left")

    def times(ratio: float | None) -> str:
        return f"{ratio:.3f}x" if ratio else ""

    for row in body.get("table", []):
        words = "chosen" if row["chosen"] else f"out: {row['reason']}" if "reason" in row else ""
        table.add_row(row["part"], row["implementation"], times(row.get("alone")), times(row.get("step")), words)
    table.add_section()
    if not any(row["chosen"] for row in body.get("table", [])):
        table.add_row("whole step", "plain stays", "", "", "nothing gained beyond the spread")
    whole = body.get("whole", {})
    for name, found in whole.items():
        if isinstance(found, dict):
            low, high = min(found["ratios"]), max(found["ratios"])
            ratio = sorted(found["ratios"])[len(found["ratios"]) // 2]
            table.add_row("whole step", f"against {name}", "", times(ratio), f"{low:.3f} to {high:.3f}")
    if rate := whole.get("tokens_per_s"):
        in_five_minutes = f"{rate * 300 / 1e6:,.1f} M tokens in five minutes"
        table.add_row("whole step", f"{rate:,.0f} tokens/s", "", "", in_five_minutes)
    if share := whole.get("share_of_floor"):
        table.add_row("whole step", "share of the floor", "", "", f"{share:.0%} of what bytes and operations allow")
    return table
