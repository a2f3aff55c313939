"""Files that somebody else wrote, looked at before they are read; and our own, written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

__all__ = ["kind_of", "read_ordinary", "write_whole"]

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def kind_of(path: Path, most: int) -> str:
    """What `path` is that cannot be read as an ordinary file of at most `most` bytes; empty where it can.

    Raises:
        OSError: there is nothing.
    """
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return f"{_KINDS[stat.S_IFMT(found.st_mode)]}, not an ordinary file"
    return f"a file of {found.st_size:,} bytes, and at most {most:,} are read" if found.st_size > most else ""


def read_ordinary(path: Path, most: int) -> bytes | None:
    """Up to `most` bytes of a regular file; None for anything else: missing, a link, a pipe, a device, a folder."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as f:
        return f.read(most) if stat.S_ISREG(os.fstat(fd).st_mode) else None


def write_whole(path: Path, data: bytes | str) -> None:
    """Replace a file, so that a reader, and a kill at any moment, finds the old one or the new one.

    Its folder is made. A link is replaced, not followed. Nothing waits for the disk: what must outlast a power cut is a
    record.

    Raises:
        OSError: the path is a folder, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
