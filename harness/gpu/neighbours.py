"""Who computes on a GPU: ours, another hotloop's, or strangers. And whose it is for a night."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from hotloop.harness.errors import LockedError
from hotloop.harness.gpu import nvml
from hotloop.harness.gpu.devices import chosen
from hotloop.harness.gpu.nvml import Gpu, Process
from hotloop.harness.processes import descendants

__all__ = ["claim", "others", "strangers"]

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's number for it (PROC_PID_INIT_INO)
_claims: dict[str, int] = {}


def claim(gpu: Gpu) -> None:
    """Keep a GPU for this process until it ends: two nights of one user on one GPU would spoil each other's clocks.

    The lock is the kernel's, on a file beside the prepared data. A watchdog's claim is its driver's as well.

    Raises:
        LockedError: another hotloop of this user has it.
    """
    if gpu.uuid in _claims:
        return
    from hotloop.harness.data.dataset import (
        default_data_dir,  # needs numpy, which harness.gpu.between_runs's processes start without
    )

    path = default_data_dir("x", 1, 1).parent / "gpus" / f"{gpu.uuid.replace('/', '_')}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # a folder that is read-only; `fresh` still finds who computes
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        if owner.isdigit() and int(owner) in _ancestors(os.getpid()):
            return
        what = " ".join(_arguments(int(owner)))[:200] if owner.isdigit() else ""
        raise LockedError(
            f"{gpu} is in use by another hotloop of yours, process {owner or 'unknown'}{f' ({what})' if what else ''}; "
            f"wait for it, stop it, or name another GPU: CUDA_VISIBLE_DEVICES=UUID"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    _claims[gpu.uuid] = fd


def others(gpu: Gpu | None = None) -> list[str]:
    """Processes that compute on the GPU now, as `pid name`. Between two runs there must be none, of ours neither."""
    gpu = gpu or chosen()
    return [_words(p) for p in (gpu and nvml.processes(gpu)) or []]


def strangers(gpu: Gpu | None = None) -> list[str]:
    """Processes that compute on the GPU and are not below this one, as `pid name`.

    In a container NVML may name pids of the host, or none: where no pid is one of ours, one process is taken for the
    trainer, since nobody computed there when it started.
    """
    gpu = gpu or chosen()
    found = (gpu and nvml.processes(gpu)) or []
    ours = {os.getpid(), *descendants(os.getpid())}
    foreign = [p for p in found if _process_of(p.pid) not in ours]
    if len(foreign) == len(found) == 1 and _in_container():
        return []
    return [_words(p) for p in foreign]


def _in_container() -> bool:
    """Whether this process lives in a pid namespace of its own, so that the driver may count in another."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE
    except OSError:
        return True


def _process_of(pid: int) -> int:
    """The process of a thread: what the driver calls a pid may be one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return pid


def _words(process: Process) -> str:
    """`pid name`, and whose it is where that is another run of ours."""
    for pid in _ancestors(process.pid):
        names = [os.path.basename(a) for a in _arguments(pid)]
        if "hotloop" in names[:2] or any("hotloop.agent_loop.cli" in a for a in _arguments(pid)):
            whose = "of this hotloop, left behind" if pid == os.getpid() else f"of another hotloop, process {pid}"
            return f"{process}, {whose}"
    return str(process)


def _ancestors(pid: int) -> list[int]:
    """The process that started it, and so on; not itself."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1 and len(found) < 100:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            found.append(pid)
    return found


def _arguments(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return []
