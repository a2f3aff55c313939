"""bubblewrap, of which level 3 is built: the arguments that a child's and an agent's sandbox share."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
from pathlib import Path

from hotloop.harness.sandbox.launch import Launch, first_to_go

__all__ = ["NOBODY", "argv_of", "namespaces", "parents_of", "pid_inside", "private_folder", "read_only_proc"]

NOBODY = 65534


def namespaces(bwrap: str) -> list[str]:
    """The command, with namespaces for processes, IPC, names and cgroups, and no capability."""
    return [
        bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL",
    ]  # fmt: skip


def read_only_proc() -> list[str]:
    """After `--proc /proc`: nothing below it changes the kernel's settings."""
    names = ("sys", "sysrq-trigger", "irq", "bus", "fs")
    return [word for n in names for word in ("--ro-bind-try", f"/proc/{n}", f"/proc/{n}")]


def private_folder(bwrap: str, path: str, most: int) -> list[str]:
    """An empty folder in memory that everyone inside may write to, of at most `most` bytes where bwrap can limit it."""
    return ["--perms", "1777", *(["--size", str(most)] if _has_size(bwrap) else []), "--tmpfs", path]


def argv_of(arguments: list[str], launch: Launch, folder: str) -> list[str]:
    """The whole command, up to the program, which starts in `folder`; `launch` learns which process it is."""
    return first_to_go([*arguments, "--info-fd", str(_info_pipe(launch)), "--chdir", folder, "--"])


def parents_of(path: str, made: set[str]) -> list[str]:
    """bubblewrap makes missing parents for its own uid only; these make them for all."""
    argv = []
    for parent in reversed(Path(path).parents):
        if str(parent) not in made:
            made.add(str(parent))
            argv += ["--perms", "0755", "--dir", str(parent)]
    return argv


@functools.cache
def _has_size(bwrap: str) -> bool:
    done = subprocess.run([bwrap, "--help"], capture_output=True, text=True)
    return "--size" in done.stdout + done.stderr


def _info_pipe(launch: Launch) -> int:
    """A pipe on which bubblewrap will tell its namespace's first process; the end that it writes to."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    launch.started.callback(os.close, write_end)
    launch.ended.callback(os.close, read_end)
    launch.info_fd = read_end
    launch.pass_fds.append(write_end)
    return write_end


def pid_inside(info_fd: int, timeout_s: float = 10.0) -> int | None:
    """The pid, as seen from here, of the first process in bubblewrap's pid namespace; None where it did not start."""
    text = b""
    while select.select([info_fd], [], [], timeout_s)[0]:
        part = os.read(info_fd, 4096)
        if not part:
            break
        text += part
        with contextlib.suppress(ValueError):
            return int(json.loads(text)["child-pid"])
    return None
