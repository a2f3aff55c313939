"""What a child needs, and how it is launched with just that at each sandbox level.

L3  bubblewrap (own mount, pid, net, ipc, uts and cgroup namespaces), another uid or a user namespace, then
    Landlock, seccomp, resource limits
L2  root without namespaces: another uid, Landlock, seccomp, limits, a supervisor that kills by uid
L1  an ordinary user without namespaces: Landlock, seccomp, limits, a supervisor that kills what it started
L0  limits and the supervisor only; refused unless asked for
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.paths import import_root
from hotloop.harness.sandbox import landlock
from hotloop.harness.sandbox.bounds import Bounds, score
from hotloop.harness.sandbox.bubblewrap import (
    NOBODY,
    argv_of,
    namespaces,
    parents_of,
    private_folder,
    read_only_proc,
)
from hotloop.harness.sandbox.entry import BOOT
from hotloop.harness.sandbox.launch import Launch, first_to_go, homes
from hotloop.harness.sandbox.uids import free_uid, remove_shared, tasks_of
from hotloop.harness.sandbox.visible import ETC, SYSTEM, around, device_nodes, hidden_text, python_and_code
from hotloop.harness.settings import Limits

__all__ = ["LEVELS", "Policy", "Sandbox"]

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
    """A way to keep children from the rest of this machine.

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
                self._bubblewrap(policy, launch, config)
            else:
                self._scratch_folder(policy, launch, config)
            boot = [sys.executable, "-I", "-B", "-u", "-c", BOOT, import_root(), json.dumps(config)]
            launch.argv = launch.argv + boot if self.level == 3 else first_to_go(boot)
            launch.pass_fds += fds
        except BaseException:
            launch.started.close()
            launch.ended.close()
            raise
        return launch

    def _bubblewrap(self, policy: Policy, launch: Launch, config: dict[str, Any]) -> None:
        """L3: a file system of its own that holds what is needed, read-only, and one private /tmp."""
        argv = [*namespaces(self.bwrap), "--unshare-net"]
        if self.own_uid:
            argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up for good by setresuid
        else:
            argv += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        argv += ["--proc", "/proc", "--dev", "/dev"]
        for path in ("/tmp", "/dev/shm"):
            argv += private_folder(self.bwrap, path, policy.scratch_bytes)
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
        argv += read_only_proc()
        for name, data in policy.files.items():
            fd = os.memfd_create("file", os.MFD_CLOEXEC)
            launch.started.callback(os.close, fd)
            with open(fd, "wb", closefd=False) as f:
                f.write(data)
            os.lseek(fd, 0, os.SEEK_SET)
            launch.pass_fds.append(fd)
            argv += ["--perms", "0444", "--ro-bind-data", str(fd), f"/tmp/run/{name}"]
        launch.argv = argv_of(argv, launch, "/tmp/run")
        launch.mounts = ("/tmp", "/dev/shm")
        launch.env |= homes("/tmp/home", "/tmp")
        config |= {"read": ["/"], "write": ["/tmp", "/dev/shm", *_DEVICES, *nodes]}
        if policy.device == "cuda":  # its pid namespace has no other processes
            config["settings"] = ["/proc"]

    def _scratch_folder(self, policy: Policy, launch: Launch, config: dict[str, Any]) -> None:
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
