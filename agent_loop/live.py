"""The live view: a line for each finished run, and one that moves for the current one.

On a terminal the current run's line is redrawn in place; elsewhere each phase is printed once.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent_loop.night import Row
from agent_loop.report import COLOURS
from harness.experiment import Event, Job

__all__ = ["View"]

# The parent's ledger in the order of time, with the names that the view gives its parts.
PARTS = (
    ("start", ("start", "import")),
    ("warm-up", ("compile", "calibrate")),
    ("train", ("train", "submit")),
    ("evaluate", ("evaluate",)),
    ("audit", ("audit",)),
)


class View:
    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._job: Job | None = None
        self._phase = ""
        self._loss: float | None = None
        self._began = time.monotonic()

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def header(self, lines: list[str]) -> None:
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def started(self, job: Job) -> None:
        self._job, self._phase, self._loss, self._began = job, "", None, time.monotonic()

    def event(self, event: Event) -> None:
        job = self._job
        if job is None:
            return
        if event.loss is not None:
            self._loss = event.loss
        seconds = time.monotonic() - self._began
        if self._live:
            self._live.update(self._current(job, event, seconds))
        elif event.phase != self._phase:
            self.console.print(f"    #{job.number} {seconds:6.1f} s  {event.phase}", highlight=False)
        self._phase = event.phase

    def _current(self, job: Job, event: Event, seconds: float) -> Table:
        grid = Table.grid(padding=(0, 1))
        words = f"#{job.number} {job.description}"
        limit = max(20, self.console.width - 78)
        words = words if len(words) <= limit else words[: limit - 1] + "…"
        facts = [f"{seconds:5.1f} s"]
        if self._loss is not None:
            facts.append(f"loss {self._loss:.4f}")
        if event.tokens_per_s:
            facts.append(f"{event.tokens_per_s:,.0f} tokens/s")
        grid.add_row(
            Text(words, style="bold"),
            Text(f"{event.phase:<9}", style="cyan"),
            ProgressBar(total=1.0, completed=event.progress, width=18),
            Text("  ".join(facts)),
        )
        return grid

    def finished(self, row: Row) -> None:
        """One run, in two lines: the decision with its numbers; why, and how long each part took."""
        if self._live:
            self._live.update("")
        first = Text(no_wrap=False)
        first.append(f"#{row.number:<3} ", style="bold")
        first.append(f"{row.decision:<9}", style=COLOURS.get(row.decision, "red"))
        first.append(f" {row.val_bpb:.6f}" if row.val_bpb is not None else "        -")
        first.append(f" {row.gain:+.6f}" if row.gain is not None else " " * 10)
        first.append(f"  {row.description}")
        self.console.print(first, soft_wrap=True, highlight=False)
        second = Text("     " + row.reason, style="dim")
        self.console.print(second, soft_wrap=True, highlight=False)
        if row.outcome:
            ledger = row.outcome.ledger
            parts = [f"{name} {sum(ledger.get(k, 0.0) for k in keys):.1f}" for name, keys in PARTS]
            parts.append(f"all {row.outcome.total_s:.1f} s")
            facts = f"{row.outcome.tokens:,} tokens at {row.outcome.tokens_per_s:,.0f}/s"
            self.console.print(Text(f"     {', '.join(parts)}; {facts}", style="dim"), soft_wrap=True, highlight=False)
