"""How a child is started: its command line, its environment, and what is to be closed before and after."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Launch", "first_to_go", "homes"]


@dataclass
class Launch:
    """How to start a child, and what to close once it runs and when it has ended."""

    argv: list[str]
    env: dict[str, str]
    cwd: Path | None = None
    pass_fds: list[int] = field(default_factory=list)
    folders: tuple[Path, ...] = ()  # that it may write to, on the disk
    mounts: tuple[str, ...] = ()  # its private file systems in memory, as it sees them
    uid: int | None = None  # of its own
    info_fd: int | None = None  # bubblewrap writes the pid of its namespace's first process here
    started: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    ended: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


def first_to_go(argv: list[str]) -> list[str]:
    """`argv`, as what the kernel ends first when memory runs out.

    Where root says so it is also the least that it can be made by what runs in it; bubblewrap drops the right to.
    """
    # Without the variables that some shells export.
    command = '{ echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec env -u PWD -u OLDPWD -u SHLVL -u _ "$@"'
    return ["/bin/sh", "-c", command, "sh", *argv]


def homes(home: str, tmp: str) -> dict[str, str]:
    return {
        "HOME": home,
        "TMPDIR": tmp,
        "USER": "hotloop",  # getpass looks here first; the uid has no account
        "TORCHINDUCTOR_CACHE_DIR": f"{tmp}/inductor",
        "TRITON_CACHE_DIR": f"{tmp}/triton",
        "CUDA_CACHE_PATH": f"{tmp}/cuda",
    }
