"""What a sandbox is built of: the paths that a child may read, bubblewrap's arguments, uids of its own.

Used by `harness.sandbox.levels` for train.py and by `agent_loop.agents.sandbox` for agents.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hotloop.harness.data.packages import copies_below
from hotloop.harness.errors import SandboxError
from hotloop.harness.paths import import_root, project_root

__all__ = [
    "ETC",
    "NOBODY",
    "SYSTEM",
    "Launch",
    "around",
    "device_nodes",
    "first_to_go",
    "free_uid",
    "has_size",
    "hidden_text",
    "homes",
    "info_pipe",
    "namespace_pid",
    "parents_of",
    "python_and_code",
    "remove_shared",
    "tasks_of",
]

# uids that no account has (systemd's table of unused ones); one for each child that runs at the same time.
_UIDS = range(60900, 61100)
_UID_LOCKS = Path("/run/hotloop-uids")
NOBODY = 65534
DEV = "/dev"
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store")
ETC = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/etc/localtime", "/etc/os-release",
)  # fmt: skip


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


def python_and_code() -> list[str]:
    """The interpreter with its packages, and the sealed code: what a child imports. And CUDA, where settings say."""
    root = project_root()
    paths = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)]
    paths += [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    paths += [str(root / name) for name in ("harness", "kernels", "prepare.py")]
    paths.append(f"{import_root()}/hotloop")
    for variable in ("CUDA_HOME", "LD_LIBRARY_PATH"):
        paths += [p for p in os.environ.get(variable, "").split(":") if p.startswith("/") and p != "/"]
    return [p for p in dict.fromkeys(paths) if p != "/usr" and not p.startswith("/usr/")]


@functools.cache
def hidden_text() -> tuple[str, ...]:
    """Every copy of the built-in text that lies in what a child may read; no child may read these."""
    return tuple(copies_below([*(p for p in SYSTEM if not os.path.islink(p)), *python_and_code()]))


def around(paths: Iterable[str], hidden: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Paths that cover `paths` but nothing `hidden`, and the folders in between, which may be listed and no more.

    Landlock can only allow, so a folder that holds something hidden is allowed entry by entry.
    """
    without = {Path(os.path.realpath(p)) for p in hidden}
    above = {parent for p in without for parent in p.parents}
    found, listed = dict[str, None](), dict[str, None]()

    def walk(path: Path) -> None:
        if path in without:
            return
        if path not in above:
            found[str(path)] = None
            return
        listed[str(path)] = None
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if not entry.is_symlink():  # where it leads is what counts
                    walk(Path(entry.path))

    for path in paths:
        walk(Path(os.path.realpath(path)))
    return list(found), list(listed)


def parents_of(path: str, made: set[str]) -> list[str]:
    """bubblewrap makes missing parents for its own uid only; these make them for all."""
    argv = []
    for parent in reversed(Path(path).parents):
        if str(parent) not in made:
            made.add(str(parent))
            argv += ["--perms", "0755", "--dir", str(parent)]
    return argv


def device_nodes(device: str, only: str = "", caps: Sequence[str] = ()) -> list[str]:
    """What a child on a device needs of /dev; with `only` that one GPU's file (and its part's) and no other's.

    dxg is the GPU of WSL2. The files of nvidia-caps are the rights to the parts of a divided GPU (MIG), which their own
    modes guard.
    """
    if device != "cuda":
        return []
    nodes = [only, *caps] if only else glob.glob(f"{DEV}/nvidia[0-9]*") + glob.glob(f"{DEV}/nvidia-caps/*")
    shared = [f"{DEV}/{name}" for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "dxg")]
    return list(dict.fromkeys(sorted(nodes) + [p for p in shared if os.path.exists(p)]))


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


@functools.cache
def has_size(bwrap: str) -> bool:
    done = subprocess.run([bwrap, "--help"], capture_output=True, text=True)
    return "--size" in done.stdout + done.stderr


def info_pipe(launch: Launch) -> int:
    """A pipe on which bubblewrap will tell its namespace's first process; the end that it writes to."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    launch.started.callback(os.close, write_end)
    launch.ended.callback(os.close, read_end)
    launch.info_fd = read_end
    launch.pass_fds.append(write_end)
    return write_end


def namespace_pid(info_fd: int, timeout_s: float = 10.0) -> int | None:
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
