"""The live view: lines for each finished run, and for each device one that moves.

On a terminal the current runs are redrawn in place, with what the night has come to below them; elsewhere each phase is
printed once. What is printed for good also goes to `night.log`, which is rotated.
"""

from __future__ import annotations

import logging
import logging.handlers
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent_loop.night import Night, Row
from agent_loop.report import COLOURS
from harness.experiment import Event, Job

__all__ = ["View", "sparkline"]

# The parent's ledger in the order of time, with the names that the view gives its parts.
PARTS = (
    ("start", ("start", "import")),
    ("warm-up", ("compile", "calibrate")),
    ("train", ("train", "submit")),
    ("evaluate", ("evaluate",)),
    ("audit", ("audit",)),
)
BARS = "▁▂▃▄▅▆▇█"
LOG_BYTES, LOG_FILES = 4 << 20, 3


def sparkline(values: list[float], width: int = 16) -> str:
    """The last of the values, thinned to a width, as bars between their least and their greatest."""
    if not values:
        return ""
    picked = [values[int(i * (len(values) - 1) / max(1, width - 1))] for i in range(min(width, len(values)))]
    low, high = min(picked), max(picked)
    return "".join(BARS[int((v - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for v in picked)


class _Current:
    """What is shown of one device's run."""

    def __init__(self, job: Job) -> None:
        self.job, self.event, self.phase = job, Event("start"), ""
        self.losses: list[float] = []
        self.began = time.monotonic()


class View:
    """Args:
    log: where the lines are kept as well; None for nowhere.
    """

    def __init__(self, console: Console, log: Path | None = None) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._current: dict[int, _Current] = {}
        self._lock = threading.Lock()  # events come from each device's thread
        self._began = time.monotonic()
        self._finished, self._idle_s, self._agent, self._standing = 0, 0.0, "", Text("")
        self._logger = logging.Logger("night")
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            self._logger.addHandler(handler)

    def __enter__(self) -> View:
        logging.raiseExceptions = False  # a full disk must not end the night by its log
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        for handler in self._logger.handlers:
            handler.close()

    def _print(self, text: Text | str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
        self._logger.info(str(text))

    def header(self, lines: list[str]) -> None:
        for line in lines:
            self._print(line)

    def note(self, text: str) -> None:
        self._print(Text(text, style="yellow"))

    def turn(self, agent: str) -> None:
        """Whose turn it is; empty for nobody's."""
        self._agent = agent
        self._redraw()

    def started(self, slot: int, job: Job) -> None:
        with self._lock:
            self._current[slot] = _Current(job)

    def event(self, slot: int, event: Event) -> None:
        with self._lock:
            current = self._current.get(slot)
            if current is None:
                return
            if event.loss is not None:
                current.losses.append(event.loss)
            was, current.phase, current.event = current.phase, event.phase, event
        if self._live:
            self._redraw()
        elif event.phase != was:
            seconds = time.monotonic() - current.began
            self.console.print(f"    #{current.job.number} {seconds:6.1f} s  {event.phase}", highlight=False)

    def state(self, night: Night, queue: int, idle: list[float]) -> None:
        """What the night has come to: the incumbent, what waits, how busy the devices are.

        Args:
            queue: proposals that wait for a device.
            idle: for each device, the seconds that it has been waiting now.
        """
        hours = max(1e-9, (time.monotonic() - self._began) / 3600 * len(idle))
        share = min(1.0, (self._idle_s + sum(idle)) / (hours * 3600))
        best = night.incumbent_score()
        facts = [f"best {best or '-'}", f"{night.experiments} experiments", f"queue {queue}"]
        if self._finished:
            facts.append(f"{self._finished / hours:.1f} runs a device-hour")
        facts.append(f"idle {share:.1%}")
        self._standing = Text("  ".join(facts), style="dim")
        self._redraw()

    def standing(self, night: Night) -> str:
        kept = [r.val_bpb for r in night.tried() if r.decision == "keep" and r.val_bpb is not None]
        scores = f"val_bpb {kept[0]:.6f} -> {kept[-1]:.6f}, " if kept else ""
        return f"{scores}{night.experiments} experiments, {max(0, len(kept) - 1)} kept"

    def _redraw(self) -> None:
        if not self._live:
            return
        with self._lock:
            grid = Table.grid(padding=(0, 1))
            for current in self._current.values():
                grid.add_row(*self._row(current))
            agent = Text(f"  {self._agent} is thinking" if self._agent else "", style="magenta")
        self._live.update(Group(grid, self._standing + agent))

    def _row(self, current: _Current) -> list[Text | ProgressBar]:
        event = current.event
        words = f"#{current.job.number} {current.job.description}"
        limit = max(20, self.console.width - 96)
        words = words if len(words) <= limit else words[: limit - 1] + "…"
        facts = [f"{time.monotonic() - current.began:5.1f} s"]
        if event.message:
            facts.append(event.message)
        if current.losses:
            facts.append(f"loss {current.losses[-1]:.4f} {sparkline(current.losses)}")
        if event.tokens_per_s:
            facts.append(f"{event.tokens_per_s:,.0f} tokens/s")
        return [
            Text(words, style="bold"),
            Text(f"{event.phase:<9}", style="cyan"),
            ProgressBar(total=1.0, completed=event.progress, width=18),
            Text("  ".join(facts)),
        ]

    def finished(self, row: Row, night: Night) -> None:
        """One run, in three lines: the decision with its numbers; why; how long each part took."""
        with self._lock:
            for slot in [s for s, c in self._current.items() if c.job.number == row.number]:
                del self._current[slot]
        self._finished += 1
        self._idle_s += row.idle_s
        first = Text(no_wrap=False)
        first.append(f"#{row.number:<3} ", style="bold")
        first.append(f"{row.decision:<9}", style=COLOURS.get(row.decision, "red"))
        first.append(f" {row.val_bpb:.6f}" if row.val_bpb is not None else "        -")
        first.append(f" {row.gain:+.6f}" if row.gain is not None else " " * 10)
        first.append(f"  {row.description}")
        self._print(first)
        self._print(Text("     " + row.reason, style="dim"))
        for words in row.outcome.conditions.get("warnings", []) if row.outcome else []:
            self._print(Text(f"     warning: {words}", style="yellow"))
        if row.outcome:
            ledger = row.outcome.ledger
            parts = [f"{name} {sum(ledger.get(k, 0.0) for k in keys):.1f}" for name, keys in PARTS]
            if row.outcome.start.get("how") == "warm":
                parts[0] = f"warm {parts[0]}"
            parts += [f"all {row.outcome.total_s:.1f}", f"idle before {row.idle_s:.1f} s"]
            facts = f"{row.outcome.tokens:,} tokens at {row.outcome.tokens_per_s:,.0f}/s"
            self._print(Text(f"     {', '.join(parts)}; {facts}", style="dim"))
