"""The live view: lines for each finished run, and for each device one that moves.

On a terminal the current runs are redrawn in place, with what the night has come to below them; elsewhere each phase is
printed once. What is printed for good also goes to `night.log`, which is rotated.

What is shown is shown by a thread of the view's own, so that nothing that happens to the output (a pipe that nobody
reads, a terminal that was closed, a full disk) is noticed by the night: the night.log says it, once.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hotloop.agent_loop.night import Night, Row
from hotloop.agent_loop.report.files import COLOURS
from hotloop.harness.experiment import Event, Job
from hotloop.harness.records.model import Decision
from hotloop.harness.text import flushed, forgiving, one_line, printable

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
LINES_WAITING = 1000  # for an output that takes none just now
REDRAW_S = 0.25
END_S = 5.0  # that the end of a night waits for the last lines to be shown


def sparkline(values: list[float], width: int = 16) -> str:
    """The values, thinned to a width with both ends among them, as bars between their least and their greatest."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    count = min(width, len(values))
    picked = [values[-1 - (count - 1 - i) * (len(values) - 1) // max(1, count - 1)] for i in range(count)]
    low, high = min(picked) / 2, max(picked) / 2  # halves: the whole of a range may be more than a float holds
    return "".join(BARS[int((v / 2 - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for v in picked)


class _Current:
    """What is shown of one device's run."""

    def __init__(self, job: Job) -> None:
        self.job, self.event, self.phase = job, Event("start"), ""
        self.losses: list[float] = []
        self.began = time.monotonic()


class _Output:
    """A stream that never raises: the console would keep what it could not write, and write all of it again."""

    def __init__(self, stream: IO[str], lost: Callable[[Exception], None]) -> None:
        self.stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as e:  # ValueError: it was closed
            self._lost(e)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as e:
            self._lost(e)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class View:
    """What the user sees of a night while it runs: lines, and one status line for each device.

    Args:
        log: where the lines are kept as well; None for nowhere.
    """

    def __init__(self, console: Console, log: Path | None = None) -> None:
        forgiving(console.file)
        self._output = _Output(console.file, self._lost)
        console.file = cast(IO[str], self._output)
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._current: dict[int, _Current] = {}
        self._lock = threading.Lock()  # events come from each device's thread
        self._began = time.monotonic()
        self._finished, self._idle_s, self._agent, self._standing = 0, 0.0, "", Text("")
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(LINES_WAITING)
        self._moved = threading.Event()  # something of what is redrawn in place
        self._shows: threading.Thread | None = None
        self._failed = ""
        self._logger = logging.Logger("night")
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(
                log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True, encoding="utf-8", errors="backslashreplace"
            )
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            self._logger.addHandler(handler)

    def __enter__(self) -> View:
        logging.raiseExceptions = False  # a full disk must not end the night by its log
        self._shows = threading.Thread(target=self._show, name="view", daemon=True)
        self._shows.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._shows:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=END_S)
                self._shows.join(END_S)
        if not self.stuck:
            flushed(self._output.stream)
        for handler in self._logger.handlers:
            handler.close()

    @property
    def stuck(self) -> bool:
        """Whether the output still takes nothing, after the end."""
        return self._shows is not None and self._shows.is_alive()

    def _show(self) -> None:
        """In the view's thread: what waits, in order, and on a terminal what moves, a few times a second."""
        self._try(self._live.start if self._live else None)
        draw: Callable[[], object] | None = str
        while draw is not None:
            try:
                draw = self._waiting.get(timeout=REDRAW_S if self._live else None)
                self._try(draw)
            except queue.Empty:
                if self._live and self._moved.is_set():
                    self._moved.clear()
                    self._try(self._draw)
        self._try(self._live.stop if self._live else None)

    def _try(self, draw: Callable[[], object] | None) -> None:
        try:
            if draw is not None:
                draw()
        except Exception as e:
            self._lost(e)

    def _lost(self, error: Exception) -> None:
        words = f"{type(error).__name__}: {one_line(str(error), 200)}"
        if words != self._failed:
            self._failed = words
            self._logger.warning(f"the view cannot be shown ({words}); the night goes on without it")

    def _later(self, draw: Callable[[], object]) -> None:
        if self._shows is None:
            self._try(draw)
            return
        with contextlib.suppress(queue.Full):  # nobody reads; the night.log has it
            self._waiting.put_nowait(draw)

    def _print(self, text: Text | str) -> None:
        line = Text(text) if isinstance(text, str) else text
        line.plain = printable(line.plain)
        self._logger.info(line.plain)
        self._later(lambda: self.console.print(line, highlight=False, soft_wrap=True))

    def header(self, lines: list[str]) -> None:
        for line in lines:
            self._print(line)

    def note(self, text: str) -> None:
        self._print(Text(text, style="yellow"))

    def warn(self, text: str) -> None:
        self._print(Text(f"WARNING: {text}", style="bold red"))

    def turn(self, agent: str) -> None:
        """Whose turn it is; empty for nobody's."""
        self._agent = agent
        self._moved.set()

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
        if event.message and event.phase != "done":
            self.note(f"#{current.job.run.number}: {event.message}")
            return
        if self._live:
            self._moved.set()
        elif event.phase != was:
            line = Text(f"    #{current.job.run.number} {time.monotonic() - current.began:6.1f} s  {event.phase}")
            self._later(lambda: self.console.print(line, highlight=False))

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
        self._moved.set()

    def standing(self, night: Night) -> str:
        kept = [r.val_bpb for r in night.tried() if r.decision == Decision.KEEP and r.val_bpb is not None]
        scores = f"val_bpb {kept[0]:.6f} -> {kept[-1]:.6f}, " if kept else ""
        return f"{scores}{night.experiments} experiments, {max(0, len(kept) - 1)} kept"

    def _draw(self) -> None:
        assert self._live is not None
        with self._lock:
            grid = Table.grid(padding=(0, 1))
            for current in self._current.values():
                grid.add_row(*self._row(current))
            agent = Text(f"  {self._agent} is thinking" if self._agent else "", style="magenta")
        self._live.update(Group(grid, self._standing + agent), refresh=True)

    def _row(self, current: _Current) -> list[Text | ProgressBar]:
        event = current.event
        job = current.job.run
        words = one_line(f"#{job.number} {job.description}", max(20, self.console.width - 96))
        facts = [f"{time.monotonic() - current.began:5.1f} s"]
        if event.loaded_mb:
            facts.append(f"{event.loaded_mb:,.0f} MB loaded")
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
            for slot in [s for s, c in self._current.items() if c.job.run.number == row.number]:
                del self._current[slot]
        self._finished += 1
        self._idle_s += row.decided.idle_s
        first = Text(no_wrap=False)
        first.append(f"#{row.number:<3} ", style="bold")
        first.append(f"{row.decision:<9}", style=COLOURS.get(row.decision, "red"))
        first.append(f" {row.val_bpb:.6f}" if row.val_bpb is not None else "        -")
        first.append(f" {row.gain:+.6f}" if row.gain is not None else " " * 10)
        first.append(f"  {row.description}")
        self._print(first)
        self._print(Text("     " + row.reason, style="dim"))
        outcome, training = row.outcome, row.outcome.training
        for words in outcome.conditions.warnings:
            self._print(Text(f"     warning: {words}", style="yellow"))
        seconds = dict(outcome.ledger.items())
        parts = [f"{name} {sum(seconds[k] for k in keys):.1f}" for name, keys in PARTS]
        if training.start.how == "warm":
            parts[0] = f"warm {parts[0]}"
        parts += [f"all {outcome.total_s:.1f}", f"idle before {row.decided.idle_s:.1f} s"]
        facts = f"{training.tokens:,} tokens at {training.tokens_per_s:,.0f}/s"
        self._print(Text(f"     {', '.join(parts)}; {facts}", style="dim"))
