"""What reading a file leaves behind, brought to one state between processes that must not hear of each other.

Reading a page brings it into the kernel's memory, and that it is there shows in how long the next read takes, in
another process too: one bit a page, on files that may only be read. So when an evaluator has ended, which had val text,
the parent has the kernel drop every page of every file that children can read. What stays is what living processes
map, and they made their imports before it got a row. It is not done where the kernel's own counters say that since then
no page was brought in or pushed out on the whole machine.

A read also leaves its time, once a day (`relatime`), where a child can see the machine's own mounts (L2, L1): one bit
for each file, folder and link that nobody read for a day. So all of them are touched before an evaluator gets a row.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from hotloop.harness.sandbox.visible import ETC, SYSTEM, python_and_code

__all__ = ["begin", "drop", "mark", "readable", "settle_times", "taken_since", "wait"]

# File systems whose reads are counted: those on the machine's own disks, and what is stacked on them.
_COUNTED = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "squashfs", "erofs", "overlay", "tmpfs"}
_DAY_S = 24 * 3600
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


def taken_since(since: tuple[int, int] | None) -> bool:
    """Whether the kernel took pages from the memory of files since `mark()`; True where it does not tell.

    Which of its pages are gone a living process can see, and what they were used for last decides which go.
    """
    now = mark()
    return since is None or now is None or now[1] != since[1]


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


def settle_times(entries: Iterable[str] | None = None) -> None:
    """Touch what a read would leave a new time of access on, without reading it; by default all that children can read.

    From then on, for a day, reading leaves none. What its file system keeps no times for costs a look.
    """
    if entries is None:
        entries = readable() if _keeps_times() else ()
        entries = (*entries, *_folders_and_links(_roots())) if entries else ()
    now = time.time()
    for path in entries:
        with contextlib.suppress(OSError):
            s = os.lstat(path)
            if now - s.st_atime < _DAY_S and s.st_atime > max(s.st_mtime, s.st_ctime):
                continue
            if stat.S_ISLNK(s.st_mode):
                os.readlink(path)
            elif stat.S_ISDIR(s.st_mode):
                os.listdir(path)
            elif s.st_size:
                with open(path, "rb", buffering=0) as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ):
                    pass  # the mapping alone counts as a use, and brings no page in
            else:
                with open(path, "rb", buffering=0) as f:
                    f.read(1)


def readable() -> tuple[str, ...]:
    """Every file that a child can read and nobody writes: looked up once."""
    return _below(_roots())


def _roots() -> tuple[str, ...]:
    return tuple(os.path.realpath(p) for p in (*SYSTEM, *ETC, *python_and_code()) if os.path.exists(p))


@functools.cache
def _all_counted() -> bool:
    """Whether the reads of all of them show in the kernel's counters; not so over a network, say."""
    kinds = {kind for kind, _ in _mounts()}
    return bool(kinds) and kinds <= _COUNTED


@functools.cache
def _keeps_times() -> bool:
    """Whether a read of any of them may leave its time. Of what an overlay shows from below it never does."""
    return any(kind != "overlay" and not {"noatime", "ro"} & options for kind, options in _mounts())


def _mounts() -> list[tuple[str, set[str]]]:
    """File system and options of every mount that holds a part of them."""
    found: dict[str, tuple[str, set[str]]] = {}
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mountinfo") as f:
        for line in f:
            fields = line.split()
            found[fields[4]] = (
                fields[fields.index("-") + 1],
                set(fields[5].split(",")),
            )  # a later one hides an earlier
    return [found[m] for root in _roots() for m in _mounts_of(root, found) if m in found]


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


@functools.cache
def _folders_and_links(roots: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for root in roots:
        for folder, folders, names in os.walk(root):
            found.append(folder)
            entries = (os.path.join(folder, name) for name in (*folders, *names))
            found += (entry for entry in entries if os.path.islink(entry))
    return tuple(dict.fromkeys(found))


def _files(folder: str) -> list[str]:
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _files(entry.path)
            elif entry.is_file(follow_symlinks=False):
                found.append(entry.path)
    return found
