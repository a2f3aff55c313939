"""What a process tree takes of the machine while it runs, looked at from outside several times a second.

Limits of the kernel count one process or one file. What counts for nobody is memory without a mapping (memfds, files
in a file system in memory) and the sum over processes; when the machine is full, the kernel's killer may choose the
driver. So the tree is ended before that: when its memory, its files or its log pass their bounds, when what the machine
or a cgroup above it has left falls below a floor (whoever took it, however it is hidden), or when a process of the tree
made itself less likely to be killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FIRST", "Bounds", "floor_bytes", "headroom", "limited_cgroups", "score", "size_of", "tree_bytes", "used"]

FIRST = 1000  # the score of those that the kernel ends first
_FLOOR_SHARE, _MOST_FLOOR = 20, 2 << 30
_LEAST_FILE = 1024  # what an empty one is counted as
_LEFT = re.compile(rb"^(?:MemAvailable|SwapFree): +(\d+)", re.MULTILINE)
_NO_LIMIT = 1 << 60  # cgroup v1 says "none" by a number near 2^63


@dataclass(frozen=True)
class Bounds:
    """Bytes that all processes of a tree may have together.

    Attributes:
        memory: that they may hold, shared and unmapped memory included; None for no bound but the machine's.
        files: by which its folders on the disk may grow.
        log: by which its log may grow.
    """

    memory: int | None = None
    files: int = 4 << 30
    log: int = 128 << 20


# ---- what is left


def headroom(cgroups: Iterable[tuple[Path, int]] = ()) -> int:
    """Bytes that can be taken before the kernel ends processes: of the machine, or of the fullest of `cgroups`."""
    with open("/proc/meminfo", "rb", buffering=0) as f:  # asked for so often that it must cost next to nothing
        found = _LEFT.findall(f.read(4096))
    left = sum(map(int, found)) * 1024
    for folder, most in cgroups:
        with contextlib.suppress(OSError, ValueError, KeyError):
            left = min(left, most - _taken(folder))
    return left


def floor_bytes(cgroups: Iterable[tuple[Path, int]] = ()) -> int:
    """The headroom below which a tree is ended: a twentieth of the memory, at most 2 GiB."""
    most = min([_fields("/proc/meminfo")["MemTotal"] * 1024, *(limit for _, limit in cgroups)])
    return min(most // _FLOOR_SHARE, _MOST_FLOOR)


@functools.cache
def limited_cgroups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[Path, int]]:
    """(folder, bytes) of the cgroups of this process, from its own upwards, that limit memory; versions 1 and 2."""
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mount = root / "memory" if number != "0" else root
        name = "memory.limit_in_bytes" if number != "0" else "memory.max"
        here = mount / path.lstrip("/")
        # In a container the path may be the host's while the mount shows the container's own as its root.
        for folder in (here, *here.parents) if here.exists() else (mount,):
            with contextlib.suppress(OSError, ValueError):  # "max"
                if (limit := int((folder / name).read_text())) < _NO_LIMIT:
                    found.append((folder, limit))
            if folder == mount:
                break
    return found


def _taken(folder: Path) -> int:
    """What a cgroup holds and the kernel cannot simply drop."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    for usage, prefix in (("memory.current", ""), ("memory.usage_in_bytes", "total_")):
        if (folder / usage).exists():
            files = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            return int((folder / usage).read_text()) - files
    raise OSError("no memory controller")


# ---- what a tree has


def tree_bytes(pids: Iterable[int], files: int = 0, most: int | None = None) -> int:
    """Memory of these processes: anonymous and shared, what nothing maps (memfds) and files in memory.

    Memory that several of them share is counted more than once where that already stays below `most`; only else is the
    kernel asked for their exact shares, which takes it longer.

    Args:
        files: bytes of theirs in file systems in memory.
    """
    pids = list(pids)
    files += _unmapped(pids)
    statuses = [_fields(f"/proc/{pid}/status") for pid in pids]
    total = files + sum(s.get("RssAnon", 0) + s.get("RssShmem", 0) for s in statuses) * 1024
    if most is None or total <= most:
        return total
    shares = [_fields(f"/proc/{pid}/smaps_rollup") for pid in pids]
    anonymous, shared = (sum(s.get(name, 0) for s in shares) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))
    return anonymous + max(shared, files)


def score(pid: int) -> int | None:
    """How readily the kernel ends a process when memory runs out, -1000 to 1000; None for one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except (OSError, ValueError):
        return None


def size_of(
    folder: Path | str, most: int | None = None, uid: int | None = None, stop: Callable[[], bool] = lambda: False
) -> int:
    """Bytes on the disk (or in memory) of all below, counted until there are more than `most`.

    Args:
        uid: count what this owner has alone.
        stop: asked at each folder; true ends the count.
    """
    total = 0
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):
                stat = os.lstat(os.path.join(root, name))
                if uid in (None, stat.st_uid):
                    total += max(stat.st_blocks * 512, _LEAST_FILE)
        if (most is not None and total > most) or stop():
            break
    return total


def used(mount: str) -> int:
    """Bytes in use of the file system that `mount` is the root of; 0 where it cannot be told."""
    with contextlib.suppress(OSError):
        stat = os.statvfs(mount)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    return 0


def _unmapped(pids: Iterable[int]) -> int:
    """Bytes in memfds, and in shared memory that has a descriptor, each once."""
    sizes: dict[int, int] = {}
    device = _memory_device()
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    stat = os.stat(entry.path)
                    if stat.st_dev == device:
                        sizes[stat.st_ino] = stat.st_blocks * 512
    return sum(sizes.values())


@functools.cache
def _memory_device() -> int:
    """Of the kernel's own file system in memory, where memfds are."""
    fd = os.memfd_create("hotloop", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _fields(path: str) -> dict[str, int]:
    """The lines `Name:  12345 kB` of a file in /proc; empty for a process that has ended."""
    found = {}
    with contextlib.suppress(OSError), open(path) as f:
        for line in f:
            name, _, value = line.partition(":")
            number = value.split(maxsplit=1)[:1]
            if number and number[0].isdigit():
                found[name] = int(number[0])
    return found
