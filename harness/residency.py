"""Which parts of files lie in memory, brought to one state between processes that must not hear of each other.

Reading a page brings it into the kernel's memory, and that it is there shows in how long the next read takes, in
another process too: one bit a page, on files that may only be read. So when an evaluator has ended, which had val text,
the parent has the kernel drop every page of every file that children can read. What stays is what living processes
map, and they made their imports before it got a row. It is not done where the kernel's own counters say that since then
no page was brought in or pushed out on the whole machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from harness.walls import ETC, SYSTEM, python_and_code

__all__ = ["begin", "drop", "mark", "readable", "wait"]

# File systems whose reads are counted: those on the machine's own disks, and what is stacked on them.
_COUNTED = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "squashfs", "erofs", "overlay", "tmpfs"}
_lock = threading.Lock()
_pending: threading.Thread | None = None


def mark() -> tuple[int, int] | None:
    """What the kernel has read from disks and taken from the memory of files so far; None where it does not tell."""
    read = taken = None
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as f:
        for line in f:
            name, value = line.split()
            if name == "pgpgin":
                read = int(value)
            elif name.startswith("pgsteal_"):
                taken = (taken or 0) + int(value)
    return None if read is None or taken is None else (read, taken)


def begin(since: tuple[int, int] | None) -> None:
    """Begin to drop them, in a thread that the interpreter does not end without; `wait` before anything is started.

    Args:
        since: `mark()` of before; nothing is done where it is the same still.
    """
    global _pending
    if since is not None and since == mark() and _all_counted():
        return
    with _lock:
        if _pending is not None:
            _pending.join()
        _pending = threading.Thread(target=lambda: drop(readable()), name="residency")
        _pending.start()


def wait() -> None:
    """Until what was begun is done; at once where nothing was."""
    with _lock:
        if _pending is not None:
            _pending.join()


def drop(files: Iterable[str]) -> None:
    """Have the kernel forget the clean pages of these files that nothing maps; what cannot be opened is passed over."""
    for path in files:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def readable() -> tuple[str, ...]:
    """Every file that a child can read and nobody writes: looked up once."""
    return _below(_roots())


def _roots() -> tuple[str, ...]:
    return tuple(os.path.realpath(p) for p in (*SYSTEM, *ETC, *python_and_code()) if os.path.exists(p))


@functools.cache
def _all_counted() -> bool:
    """Whether the reads of all of them show in the kernel's counters; not so over a network, say."""
    kinds: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mountinfo") as f:
        for line in f:
            fields = line.split()
            kinds[fields[4]] = fields[fields.index("-") + 1]  # a later mount hides an earlier one
    relevant = {kinds.get(mount, "") for root in _roots() for mount in _mounts_of(root, kinds)}
    return bool(relevant) and relevant <= _COUNTED


def _mounts_of(root: str, mounts: Iterable[str]) -> list[str]:
    """The mount that holds a path, and those below it."""
    above = [m for m in mounts if Path(root).is_relative_to(m)]
    return [max(above, key=len, default="/"), *(m for m in mounts if m != root and Path(m).is_relative_to(root))]


@functools.cache
def _below(roots: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for root in sorted(set(roots)):
        if not any(Path(root).is_relative_to(other) for other in set(roots) - {root}):
            found += [root] if os.path.isfile(root) else _files(root)
    return tuple(found)


def _files(folder: str) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                found += _files(entry.path)
            elif entry.is_file(follow_symlinks=False):
                found.append(entry.path)
    return found
