"""The sandbox that train.py runs in: chosen once by what this machine really stops, then used for every child.

    L3  bubblewrap (own mount, pid, net, ipc, uts and cgroup namespaces), another uid or a user namespace, then
        Landlock, seccomp, resource limits
    L2  root without namespaces: another uid, Landlock, seccomp, limits, a supervisor that kills by uid
    L1  an ordinary user without namespaces: Landlock, seccomp, limits, a supervisor that kills what it started
    L0  limits and the supervisor only; refused unless asked for

A level is taken when a probe, a real child at that level, found that it stops what the level promises. The probe's
answers go into every record.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hotloop.harness.data.dataset import BUILT_IN, Dataset
from hotloop.harness.errors import DeviceError, SandboxError
from hotloop.harness.gpu import toolchain
from hotloop.harness.machine import Gpu
from hotloop.harness.paths import import_root
from hotloop.harness.sandbox import landlock, seccomp
from hotloop.harness.sandbox.bounds import Bounds, score
from hotloop.harness.sandbox.bubblewrap import (
    ETC,
    NOBODY,
    SYSTEM,
    Launch,
    around,
    device_nodes,
    first_to_go,
    free_uid,
    has_size,
    hidden_text,
    homes,
    info_pipe,
    parents_of,
    python_and_code,
    remove_shared,
    tasks_of,
)
from hotloop.harness.sandbox.entry import BOOT
from hotloop.harness.settings import Limits

__all__ = ["LEVELS", "Policy", "Sandbox", "best", "exposed", "exposed_text", "readable_text"]

_LOG_BYTES = 16 << 20
_DEVICES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))

LEVELS = {3: "bubblewrap, Landlock, seccomp", 2: "another uid, Landlock, seccomp", 1: "Landlock, seccomp", 0: "none"}


@dataclass(frozen=True)
class Policy:
    """What one child needs.

    Attributes:
        module: whose `child_main(wire, descriptors)` runs.
        files: name -> bytes, laid into its working folder.
        folder: where its scratch folder is made, at levels without a private file system.
        device: `cuda` gets the NVIDIA device nodes.
        scratch_bytes / file_bytes / memory_bytes / processes: caps; None for none. Memory is what one process may
            allocate.
        tree_bytes: memory that all of its processes may hold; None for what the machine has.
        send_s: how long a message to it may wait for it to read.
    """

    module: str
    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)
    device: str = "cpu"
    scratch_bytes: int = 4 << 30
    file_bytes: int | None = None
    memory_bytes: int | None = None
    processes: int = 4096
    send_s: float = 30.0
    tree_bytes: int | None = None

    @classmethod
    def of(cls, module: str, folder: Path, source: bytes | None, device: str, limits: Limits) -> Policy:
        """For a child that runs a train.py: `source`, or None for one that gets it later.

        Its memory is capped at what the limits say, else at nine tenths of the machine's. On a CPU the kernel does so
        for each process; CUDA reserves addresses far beyond any memory, so there only the watch over the tree does.
        """
        most = limits.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10
        return cls(
            module, folder, {} if source is None else {"train.py": source}, device, limits.scratch_bytes,
            limits.file_bytes, most if device == "cpu" else None, limits.processes, limits.send_s, most,
        )  # fmt: skip

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.tree_bytes, self.scratch_bytes, _LOG_BYTES)


@dataclass(frozen=True)
class Sandbox:
    """One way to confine children on this machine.

    Attributes:
        level: 3 (best) to 0.
        own_uid: children run under a uid that nothing else has; only root can give them one.
        reads_all: that uid may pass folders that are closed to it (the interpreter may lie in root's home), so that
            Landlock alone says what it reads.
        probes: what a child at this level tried -> whether it was stopped.
        missing: better level -> why it cannot be had here.
        gpu: the only one that children on `cuda` get; None for those that the driver's own environment has.
    """

    level: int
    own_uid: bool = False
    reads_all: bool = False
    bwrap: str = ""
    probes: dict[str, bool] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None

    def __str__(self) -> str:
        return f"L{self.level} ({self.how})"

    @property
    def how(self) -> str:
        if self.level == 3:
            return LEVELS[3] + (", own uid" if self.own_uid else ", user namespace")
        return LEVELS[self.level] + (", may enter closed folders" if self.reads_all else "")

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"level": self.level, "how": self.how, "landlock_abi": landlock.abi(), "probes": self.probes}

    def launch(self, policy: Policy, fds: list[int], env: dict[str, str]) -> Launch:
        """Raises SandboxError."""
        launch = Launch([], dict(env))
        if self.gpu and policy.device == "cuda":
            launch.env["CUDA_VISIBLE_DEVICES"] = self.gpu.uuid
        try:
            uid = launch.ended.enter_context(free_uid()) if self.own_uid else None
            config: dict[str, Any] = {
                "module": policy.module, "exec": None, "fds": fds, "parent": os.getpid(), "uid": uid,
                "supervise": self.level < 3, "reads_all": self.reads_all,
                "landlock": self.level > 0 and landlock.abi() > 0, "seccomp": self.level > 0,
                "network": self.level == 0, "metadata": self.level == 1, "cuda": policy.device == "cuda",
                "model": True, "file_bytes": policy.file_bytes, "memory_bytes": policy.memory_bytes,
                "processes": policy.processes, "settings": [], "score": score(os.getpid()),
            }  # fmt: skip
            if self.level == 3:
                self._walls(policy, launch, config)
            else:
                self._folder(policy, launch, config)
            boot = [sys.executable, "-I", "-B", "-u", "-c", BOOT, import_root(), json.dumps(config)]
            launch.argv = launch.argv + boot if self.level == 3 else first_to_go(boot)
            launch.pass_fds += fds
        except BaseException:
            launch.started.close()
            launch.ended.close()
            raise
        return launch

    def _walls(self, policy: Policy, launch: Launch, config: dict[str, Any]) -> None:
        """L3: a file system of its own that holds what is needed, read-only, and one private /tmp."""
        size = ["--size", str(policy.scratch_bytes)] if has_size(self.bwrap) else []
        argv = [
            self.bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
            "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        ]  # fmt: skip
        if self.own_uid:
            argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up for good by setresuid
        else:
            argv += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        argv += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", *size, "--tmpfs", "/tmp"]
        argv += ["--perms", "1777", *size, "--tmpfs", "/dev/shm"]
        argv += ["--perms", "1777", "--dir", "/tmp/run", "--perms", "1777", "--dir", "/tmp/home"]
        made = {"/", "/tmp", "/dev", "/proc"}
        for path in SYSTEM:
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                argv += ["--ro-bind", path, path]
        sys_paths = ["/sys"] if policy.device == "cuda" else ["/sys/devices/system"]
        for path in (*ETC, *sys_paths, *python_and_code()):
            if os.path.exists(path):
                argv += [*parents_of(path, made), "--ro-bind", path, path]
        for path in hidden_text():
            argv += ["--tmpfs", path, "--remount-ro", path] if os.path.isdir(path) else ["--ro-bind", "/dev/null", path]
        nodes = device_nodes(policy.device, *((self.gpu.node, self.gpu.caps) if self.gpu else ()))
        for path in nodes:
            argv += [*parents_of(path, made), "--dev-bind", path, path]
        for path in ("sys", "sysrq-trigger", "irq", "bus", "fs"):
            argv += ["--ro-bind-try", f"/proc/{path}", f"/proc/{path}"]
        for name, data in policy.files.items():
            fd = os.memfd_create("file", os.MFD_CLOEXEC)
            launch.started.callback(os.close, fd)
            with open(fd, "wb", closefd=False) as f:
                f.write(data)
            os.lseek(fd, 0, os.SEEK_SET)
            launch.pass_fds.append(fd)
            argv += ["--perms", "0444", "--ro-bind-data", str(fd), f"/tmp/run/{name}"]
        launch.argv = first_to_go([*argv, "--info-fd", str(info_pipe(launch)), "--chdir", "/tmp/run", "--"])
        launch.mounts = ("/tmp", "/dev/shm")
        launch.env |= homes("/tmp/home", "/tmp")
        config |= {"read": ["/"], "write": ["/tmp", "/dev/shm", *_DEVICES, *nodes]}
        if policy.device == "cuda":  # its pid namespace has no other processes
            config["settings"] = ["/proc"]

    def _folder(self, policy: Policy, launch: Launch, config: dict[str, Any]) -> None:
        """L2 to L0: a scratch folder on the disk."""
        if self.own_uid:  # it must be able to get there, and homes are closed to other uids
            scratch = Path(tempfile.mkdtemp(prefix="hotloop-"))
            launch.ended.callback(remove_shared, config["uid"])
        else:
            scratch = policy.folder.absolute() / "scratch"  # the child starts in it
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        launch.ended.callback(shutil.rmtree, scratch, ignore_errors=True)
        for name in ("run", "home", "tmp"):
            (scratch / name).mkdir()
        for name, data in policy.files.items():
            (scratch / "run" / name).write_bytes(data)
        if self.own_uid:
            for path in (scratch, *scratch.iterdir()):
                os.chown(path, config["uid"], config["uid"])
        launch.folders, launch.cwd, launch.uid = (scratch,), scratch / "run", config["uid"]
        launch.env |= homes(str(scratch / "home"), str(scratch / "tmp"))
        whole = [*SYSTEM, *ETC, *python_and_code(), "/proc", "/sys", str(scratch)]
        config["read"], config["listed"] = around(whole, hidden_text())
        nodes = device_nodes(policy.device, *((self.gpu.node, self.gpu.caps) if self.gpu else ()))
        config["write"] = [str(scratch), *_DEVICES, *nodes]
        if policy.device == "cuda":
            # libcuda names its threads through /proc and fails where it cannot. With a uid of its own a child may
            # write to no other's files there; else Landlock must name the one process, which leaves out its workers.
            config["settings"] = ["/proc" if self.own_uid else "/proc/self/task"]
        if self.own_uid:
            config["write"].append("/dev/shm")  # what it leaves there is found by its uid
        elif self.level == 1:
            # Without /dev/shm there are no semaphores, which torch's pool of compile processes needs; and on CUDA its
            # processes could not name their threads.
            launch.env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
            config["processes"] += tasks_of(os.getuid())


def exposed(path: Path) -> bool:
    """Whether children can read `path`, because it lies in a folder that they need."""
    return _below(path, *_readable())


def _readable() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The real paths that children can read below, and those below these that they cannot."""
    whole = (*SYSTEM, *ETC, *python_and_code())
    return tuple(os.path.realpath(p) + "/" for p in whole), tuple(os.path.realpath(p) + "/" for p in hidden_text())


def _below(path: Path, shown: tuple[str, ...], hidden: tuple[str, ...]) -> bool:
    real = os.path.realpath(path) + "/"
    return real.startswith(shown) and not real.startswith(hidden)


def exposed_text(dataset: Dataset) -> Path | None:
    """A file that a dataset was made of and that children can read; None where there is none any more, or never was."""
    if dataset.source in BUILT_IN:
        return None
    source = Path(dataset.source)
    folder = source if source.is_dir() else source.parent
    files = (folder / name for name in dataset.manifest["text"]["files"])
    readable = _readable()  # once: there may be very many files
    return next((f for f in files if _below(f, *readable) and f.exists()), None)


def readable_text(source: str, sandbox: Sandbox) -> str:
    """Why train.py may have read the text that it is scored on, so that its scores prove nothing; empty where not."""
    if sandbox.level == 0:
        return "at sandbox level L0 train.py can read the text that it is scored on"
    if source == "stdlib":
        return "the text is Python's own library, which train.py can read; prepare another one (--source)"
    return ""


@functools.cache
def best(wanted: int | None = None, unsafe: bool = False, device: str = "cpu", gpu: Gpu | None = None) -> Sandbox:
    """The best sandbox of this machine, or the best at level `wanted`; probed once a process.

    Args:
        unsafe: take L0 where nothing better works.
        device: `cuda` also wants a real product from the GPU, inside.
        gpu: the only one that its children get.

    Raises:
        SandboxError: there is none (at that level).
        DeviceError: `cuda` lacks a compiler or headers, which is no sandbox's fault; with the package that has them.
    """
    if device == "cuda" and (lacking := toolchain.missing()):
        raise DeviceError(lacking)
    missing: dict[str, str] = {}
    for candidate in (replace(c, gpu=gpu) for c in _candidates(missing)):
        if wanted not in (None, candidate.level) or (candidate.level == 0 and not (unsafe or wanted == 0)):
            continue
        if candidate.level == 0:
            return replace(candidate, missing=missing)
        try:
            probes = _probed(candidate, device)
            if device == "cuda":
                from hotloop.harness.sandbox.probe_cuda import probe_cuda

                probe_cuda(candidate)
        except SandboxError as e:
            missing.setdefault(str(candidate), str(e))
            continue
        return replace(candidate, probes=probes, missing=missing)
    reasons = "; ".join(f"{k}: {v}" for k, v in missing.items())
    which = "no sandbox works" if wanted is None else f"the sandbox level L{wanted} does not work"
    raise SandboxError(
        f"{which} on this machine ({reasons or 'not applicable'}). Install bubblewrap (apt-get install bubblewrap), or "
        f"run unprotected with --unsafe-no-sandbox"
    )


def _candidates(missing: dict[str, str]) -> Iterator[Sandbox]:
    root = os.geteuid() == 0
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        missing["L3"] = "bubblewrap is not installed (apt-get install bubblewrap)"
    else:
        if root:
            yield Sandbox(3, own_uid=True, bwrap=bwrap)
        yield Sandbox(3, bwrap=bwrap)
    if landlock.abi() < 1 or not seccomp.supported():
        missing["L2, L1"] = "this kernel has no Landlock, or this machine's seccomp is not known"
    else:
        if root:
            yield Sandbox(2, own_uid=True)
            yield Sandbox(2, own_uid=True, reads_all=True)
        yield Sandbox(1)
    yield Sandbox(0)


def _probed(candidate: Sandbox, device: str) -> dict[str, bool]:
    """What a real child of this sandbox is stopped from. Raises SandboxError where that is not enough."""
    from hotloop.harness.sandbox.probe import probe, promised

    stopped = probe(candidate, device)
    open_ones = [name for name in promised(candidate, device) if not stopped.get(name, False)]
    if open_ones:
        raise SandboxError(f"it did not stop: {', '.join(open_ones)}")
    return stopped
