"""uids that no account has, one for each child that runs at the same time, and what such a child leaves."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hotloop.harness.errors import SandboxError

__all__ = ["free_uid", "remove_shared", "tasks_of"]

# uids that no account has (systemd's table of unused ones); one for each child that runs at the same time.
_UIDS = range(60900, 61100)
_UID_LOCKS = Path("/run/hotloop-uids")


@contextlib.contextmanager
def free_uid() -> Iterator[int]:
    """A uid that no other child has; the kernel's lock on a file of its own keeps it.

    In another pid namespace (a container's) there may be children too, whose locks are not seen here: each begins at
    another uid, and one that a process has is passed over.
    """
    try:
        _UID_LOCKS.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise SandboxError(f"{_UID_LOCKS}: {e.strerror}") from None
    first = os.stat("/proc/self/ns/pid").st_ino % len(_UIDS)
    for uid in (*_UIDS[first:], *_UIDS[:first]):
        fd = os.open(_UID_LOCKS / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = tasks_of(uid) > 0
        except OSError:
            taken = True
        if taken:
            os.close(fd)
            continue
        try:
            yield uid
        finally:
            os.close(fd)
        return
    raise SandboxError(f"all of {len(_UIDS)} uids are in use by other children of hotloop")


def remove_shared(uid: int) -> None:
    """What a uid left in the folders that everyone may write to."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)


def tasks_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
