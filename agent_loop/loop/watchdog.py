"""Keeps a night going: starts the driver, and starts it again when it is killed, crashes, or shows no sign of life.

The driver is a process of its own, so that the system's choice of a victim, a fault of a library or a stuck call ends
the driver and not the night; it goes on from its records. What a user must mend (a status of `HotloopError`) ends both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hotloop.agent_loop.backoff import Backoff
from hotloop.harness.command_line import say

__all__ = ["CRASHED", "HEARTBEAT", "UNDER_WATCH", "watch"]

HEARTBEAT = "heartbeat"  # a file in the night's folder, touched by the driver
UNDER_WATCH = "HOTLOOP_UNDER_WATCH"  # in the driver's environment
CRASHED = 70  # the driver's exit status for what is a bug of ours
STUCK_S = 900.0
TRIES = 3  # in a row without a new record
FIRST_WAIT_S = 5.0


def watch(
    argv: Sequence[str], folder: Path, stuck_s: float = STUCK_S, first_wait_s: float = FIRST_WAIT_S, look_s: float = 1.0
) -> int:
    """Run the driver until it ends by itself; returns its exit status.

    Args:
        argv: its command line.
        folder: the night's: `records.jsonl` shows whether it gets anywhere, `heartbeat` whether it is alive.
        stuck_s: without a heartbeat, after which it is killed.
    """
    backoff = Backoff(first_wait_s)
    while True:
        before = _size(folder)
        code = _once(argv, folder, stuck_s, look_s)
        if code >= 0 and code != CRASHED:
            return code
        if _size(folder) > before:
            backoff.tries = 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "crashed; the traceback is above"
        if backoff.tries == TRIES:
            say(f"the driver {how}, {TRIES} times without a new record; giving up")
            return 1
        wait = backoff.next_s()
        say(f"the driver {how}; it goes on from its records in {wait:.0f} s")
        time.sleep(wait)


def _once(argv: Sequence[str], folder: Path, stuck_s: float, look_s: float) -> int:
    process = subprocess.Popen(argv, env=os.environ | {UNDER_WATCH: str(os.getpid())})
    beat, since = _beat(folder), time.monotonic()  # never the wall clock: a laptop that wakes up moves it by hours

    def passed_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    # Ctrl-C reaches the driver from the terminal itself; it ends, and so do we.
    was = {s: signal.signal(s, h) for s, h in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, passed_on))}
    try:
        while True:
            try:
                return process.wait(look_s)
            except subprocess.TimeoutExpired:
                now = _beat(folder)
                if now != beat:
                    beat, since = now, time.monotonic()
                elif time.monotonic() - since > stuck_s:
                    say(f"no sign of life of the driver for {stuck_s:.0f} s")
                    process.kill()
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


def _beat(folder: Path) -> int:
    """When the heartbeat was last touched: any other number than before is a sign of life."""
    with contextlib.suppress(OSError):
        return (folder / HEARTBEAT).stat().st_mtime_ns
    return 0


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return (folder / "records.jsonl").stat().st_size
    return 0
