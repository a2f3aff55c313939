"""Processor seconds of a process and of all that it starts, whoever waits for them, and whether anybody does.

The kernel gives the time of a child that has ended to the parent that waits for it; where SIGCHLD is ignored, to
nobody. A cgroup of its own counts all. Where none can be had, the tree is sampled: what vanished and was credited to
nobody is remembered as `hidden_s`, with what it went on to use, by its rate, until the next look.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from hotloop.harness.processes import descendants

__all__ = ["CpuTime"]

SAMPLE_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


class CpuTime:
    """Counts from when it is made, which must be before the tree runs code that nobody trusts.

    Args:
        pid: the tree's first process.
        cgroup: make a cgroup where that is possible; else sample.
    """

    def __init__(self, pid: int, cgroup: bool = True) -> None:
        self._pid = pid
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._last: dict[int, _Times] = {}
        self._looked = time.monotonic()
        self._owed = self._guessed = 0.0
        self._group = _group_of(pid) if cgroup else None
        if self._group is None:
            self._look()
            threading.Thread(target=self._sample, name="cputime", daemon=True).start()

    def seconds(self) -> float:
        """Processor seconds so far; never less than at an earlier call."""
        if self._group is not None:
            with open(self._group / "cpu.stat") as f:
                return next(int(line.split()[1]) for line in f if line.startswith("usage_usec")) / 1e6
        return self._look() + self.hidden_s

    @property
    def hidden_s(self) -> float:
        """Processor seconds that were credited to nobody; 0 where a cgroup counts."""
        return self._owed + self._guessed

    def close(self) -> None:
        """Once the tree has ended."""
        self._closed.set()
        if self._group is not None:
            with contextlib.suppress(OSError):  # something of it lives; it stays empty of meaning
                self._group.rmdir()

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_S):
            self._look()

    def _look(self) -> float:
        """What the living have used and were credited with. What has vanished, one of them must have been credited."""
        with self._lock:
            now = {pid: t for pid in (self._pid, *descendants(self._pid)) if (t := _times(pid)) is not None}
            elapsed, self._looked = time.monotonic() - self._looked, time.monotonic()
            gone = [t for pid, t in self._last.items() if pid not in now or now[pid].began != t.began]
            lost = sum(t.own + t.waited for t in gone)
            credited = sum(
                t.waited - (self._last[pid].waited if pid in self._last and self._last[pid].began == t.began else 0.0)
                for pid, t in now.items()
            )
            owed = max(0.0, self._owed + lost - credited)
            if owed > self._owed + 1.0 / _TICKS:
                share = (owed - self._owed) / lost
                self._guessed += share * elapsed * sum(t.own / max(t.age, 1.0 / _TICKS) for t in gone)
            self._owed, self._last = owed, now
            return sum(t.own + t.waited for t in now.values())


class _Times:
    """Of one process: seconds of its own, of what it waited for, since its start; and the start in ticks."""

    def __init__(self, own: float, waited: float, age: float, began: int) -> None:
        self.own, self.waited, self.age, self.began = own, waited, age, began


def _times(pid: int) -> _Times | None:
    """None for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        # The process's own clock, to the nanosecond: clock_getcpuclockid(3) makes its number so.
        own = time.clock_gettime((~pid << 3) | 2)
    except (OSError, IndexError):
        return None
    began = int(fields[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - began / _TICKS
    return _Times(own, (int(fields[13]) + int(fields[14])) / _TICKS, age, began)


def _group_of(pid: int) -> Path | None:
    """A new cgroup below ours with the whole tree in it; None where there is none, or it is not ours to make."""
    folder = None
    try:
        groups, mounts = (Path(f"/proc/self/{name}").read_text().splitlines() for name in ("cgroup", "mountinfo"))
        own = next(line[3:] for line in groups if line.startswith("0::"))
        mount = next(left.split() for left, right in (m.split(" - ") for m in mounts) if right.startswith("cgroup2 "))
        inside = os.path.relpath(own, mount[3])  # the mount may show a part only
        folder = Path(mount[4]) / inside / f"hotloop-{os.getpid()}-{pid}"
        for old in folder.parent.glob("hotloop-*-*"):  # of drivers that were killed
            if not Path("/proc", old.name.split("-")[1]).exists():
                old.rmdir()
        folder.mkdir()
        for _ in range(20):  # what is forked meanwhile is found the next time
            outside = {pid, *descendants(pid)} - {int(p) for p in (folder / "cgroup.procs").read_text().split()}
            for one in outside:
                with contextlib.suppress(ProcessLookupError):
                    (folder / "cgroup.procs").write_text(str(one))
            if not outside:
                break
        else:  # its first process has ended, or it forks without end
            raise OSError("not all of it can be moved")
        if "usage_usec" not in (folder / "cpu.stat").read_text():
            raise OSError("it counts no processor time")
    except (OSError, StopIteration, ValueError):
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None
    return folder
