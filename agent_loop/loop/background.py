"""What happens beside the night and must never hold it up: drawing reports, telling the user."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hotloop.harness.errors import UsageError
from hotloop.harness.paths import SAME_CODE, import_root

__all__ = ["Notifier", "Reporter"]

NOTIFY_S = 30.0


class Reporter:
    """Draws progress.png and report.html in a process of its own, one at a time, as often as `every_s` at most."""

    def __init__(self, folder: Path, repo: Path, every_s: float = 60.0) -> None:
        self._argv = [
            sys.executable, "-c", SAME_CODE + "from hotloop.agent_loop.report.files import draw; draw(*sys.argv[2:])",
            import_root(), str(folder), str(repo),
        ]  # fmt: skip
        self._every_s, self._last = every_s, -every_s
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False

    def want(self) -> None:
        self._wanted = True
        self.look()

    def look(self) -> None:
        """Start a drawing that is wanted, where it is time."""
        if self._process and self._process.poll() is None:
            return
        if self._process:
            self._ended(0.0)
        if self._wanted and time.monotonic() - self._last >= self._every_s:
            self._start()

    def finish(self, wait_s: float = 120.0) -> str:
        """Draw a last time; why that failed, or nothing."""
        problem = self._ended(wait_s) if self._process else ""
        if not self._wanted:
            return problem
        self._start()
        return self._ended(wait_s)

    def _start(self) -> None:
        self._wanted, self._last = False, time.monotonic()
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *self._argv], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    def _ended(self, wait_s: float) -> str:
        if self._process is None:
            return "no process could be started"
        try:
            _, err = self._process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            err = b"it took too long"
        code, self._process = self._process.returncode, None
        return (err.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1] if code else ""


class Notifier:
    """Runs the user's command with the message as its last argument, and HOTLOOP_EVENT, HOTLOOP_TAG in its environment.

    Args:
        command: empty for none.
        complain: told of a command that fails; the night goes on.

    Raises:
        UsageError: a command that cannot be one.
    """

    def __init__(self, command: str, tag: str, complain: Callable[[str], None]) -> None:
        try:
            self._argv = shlex.split(command)
        except ValueError as e:
            raise UsageError(f"--notify {command!r} is not a command: {e}") from None
        self._tag, self._complain = tag, complain
        self._running: list[tuple[float, subprocess.Popen[bytes]]] = []

    def tell(self, event: str, text: str) -> None:
        self.look()
        if not self._argv:
            return
        env = os.environ | {"HOTLOOP_EVENT": event, "HOTLOOP_TAG": self._tag}
        try:
            process = subprocess.Popen(
                [*self._argv, text], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            self._complain(f"--notify: {self._argv[0]} cannot be started ({e.strerror or e})")
            return
        self._running.append((time.monotonic() + NOTIFY_S, process))

    def look(self) -> None:
        """Reap what has ended, end what takes too long."""
        still = []
        for deadline, process in self._running:
            code = process.poll()
            if code is None and time.monotonic() < deadline:
                still.append((deadline, process))
            elif code != 0:
                process.kill()
                process.wait()
                self._complain(f"--notify: {self._argv[0]} " + (f"ended with {code}" if code else "took too long"))
        self._running = still

    def finish(self) -> None:
        """Wait for what was told last."""
        while self._running:
            self.look()
            time.sleep(0.05)
