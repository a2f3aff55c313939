"""Child processes that run an agent's code: started clean inside the sandbox, ended whole.

The child gets an isolated interpreter (`-I`: no PYTHON* variables, no user site, no current folder on the path), a
cleared environment, a private HOME, TMPDIR and compiler caches, the socket and the shared memory it needs, and what
its sandbox lets it have. It dies with the parent, and everything that it started dies with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from hotloop.harness.errors import SandboxError
from hotloop.harness.processes import descendants
from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.bounds import (
    FIRST,
    Bounds,
    floor_bytes,
    headroom,
    limited_cgroups,
    score,
    size_of,
    tree_bytes,
    used,
)
from hotloop.harness.sandbox.bubblewrap import pid_inside
from hotloop.harness.sandbox.cputime import CpuTime
from hotloop.harness.sandbox.entry import SURVIVORS
from hotloop.harness.sandbox.launch import Launch
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.wire import Wire

__all__ = ["Child", "ProcessTree", "SharedMemory", "child_environment", "end_all", "tail"]

# Settings of the user's machine that a child needs, or that choose an implementation openly.
_PASSED = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "CC",
    "HOTLOOP_KERNELS",
    "HOTLOOP_ATTENTION",
    "HOTLOOP_PROFILE",
    "TRITON_INTERPRET",
)
DEFAULT_BOUNDS = Bounds()
END_S = 20.0  # how long the end of a killed child may take
WATCH_S = 1.0  # how often what a tree has is counted
# What the machine has left is looked at the more often the less it is: memory is hardly filled faster.
FASTEST_BYTES_S, LOOK_S, OFTEN_S = 20 << 30, 0.5, 0.02
_alive: weakref.WeakSet[ProcessTree] = weakref.WeakSet()


def end_all() -> None:
    """End every child of this process, from any thread; those that wait for one find it dead and clean up."""
    for tree in list(_alive):
        tree.end()


class SharedMemory:
    """Anonymous memory (memfd) that parent and child both map. It has no name and no file.

    Its size is sealed: a child that could shrink it would make the parent's next access a fatal signal.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("hotloop", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, max(size, 1))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.map = mmap.mmap(self.fd, max(size, 1))

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view may outlive us; the memory goes with it
            self.map.close()
        os.close(self.fd)


class ProcessTree:
    """A process tree in a sandbox. Use as a context manager: leaving it ends all of the tree.

    Args:
        log: file that takes stdout and stderr.
        bounds: what it may take of the machine; it is ended where it takes more.

    Raises:
        SandboxError: it cannot be started, or (from `kill`) something of it did not end.
    """

    def __init__(self, launch: Launch, log: Path, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self.peak_rss_mb = 0.0
        self.returncode: int | None = None
        self._cpu: CpuTime | None = None
        self._first = 0  # as seen from here, of its namespace
        self.fault, self.fault_status = "", "crash"  # why it was ended from here, if it was
        self._inside: int | None = None  # a descriptor of the first process in its pid namespace
        self._launch = launch
        self._had = {folder: size_of(folder) for folder in launch.folders}
        try:
            with open(log, "ab") as out:
                self._log = os.dup(out.fileno())  # the file may be renamed
                launch.ended.callback(os.close, self._log)
                self._process = subprocess.Popen(
                    launch.argv, cwd=launch.cwd, env=launch.env, pass_fds=launch.pass_fds, close_fds=True,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
        except BaseException:
            launch.ended.close()
            raise
        finally:
            launch.started.close()
        self.pid = self._process.pid
        if launch.info_fd is not None:
            pid = pid_inside(launch.info_fd)
            if pid is None:
                self._process.kill()
                self._process.wait()
                launch.ended.close()
                words = " ".join(tail(log, 2))
                raise SandboxError(f"bubblewrap could not start ({words}); see: hotloop doctor")
            self._first = pid
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                self._inside = os.pidfd_open(pid)
        self._watch = threading.Event()
        _alive.add(self)
        watches = (self._watch_machine, self._watch_tree, self._watch_files)
        self._watches = [threading.Thread(target=watch, args=(bounds,), daemon=True) for watch in watches]
        for thread in self._watches:
            thread.start()

    def wait(self, timeout_s: float = 5.0) -> int | None:
        """The exit status if the child ends within `timeout_s`, negative for a signal; else None."""
        if self.returncode is None:
            try:
                code = self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
            self.returncode = 128 - code if code > 128 else code  # as bubblewrap and the supervisor tell a signal
        return self.returncode

    def cpu_s(self) -> float:
        """Processor seconds of the process and all that it started since `count_cpu`; 0 without."""
        return self._cpu.seconds() if self._cpu else 0.0

    @property
    def hidden_cpu_s(self) -> float:
        """What of it went to nobody, as far as that can be seen; see `harness.sandbox.cputime`."""
        return self._cpu.hidden_s if self._cpu else 0.0

    def count_cpu(self) -> None:
        """Count its processor time from now on: before it runs code that nobody trusts."""
        self._cpu = self._cpu or CpuTime(self.pid)

    def rss_mb(self) -> float:
        """Memory that the process and all that it started hold now, MiB; pages that they share count for each."""
        pages = 0
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(OSError, IndexError, ValueError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def kill(self) -> None:
        """End the process and everything that it started, and reap it; idempotent."""
        self._watch.set()
        if self._process.returncode is None:
            self._note_peak()
        self.end()
        try:
            if self._inside is not None and not select.select([self._inside], [], [], END_S)[0]:
                raise SandboxError(f"the processes below pid {self.pid} do not end; is the device stuck?")
            try:
                code = self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                code = SURVIVORS
            if code == SURVIVORS:
                raise SandboxError(f"the processes below pid {self.pid} do not end; end them by hand")
            self.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            _alive.discard(self)
            for thread in self._watches:  # they look at what is closed now
                thread.join()
            if self._cpu is not None:
                self._cpu.close()
            if self._inside is not None:
                os.close(self._inside)
                self._inside = None
            self._launch.ended.close()

    def end(self) -> None:
        """Tell it to end, without waiting."""
        if (inside := self._inside) is not None:  # the end of a namespace's first process is the end of all in it
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(inside, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)  # a supervisor ends all that is below it

    def _note_peak(self) -> None:
        # VmHWM counts one process alone; getrusage would mix in what the parent had before exec.
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(OSError, ValueError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak_rss_mb = max(self.peak_rss_mb, int(line.split()[1]) / 1024)

    def _watch_machine(self, _: Bounds) -> None:
        """End it before the kernel has to choose whom to end, in which it may choose the driver."""
        cgroups = limited_cgroups()
        floor = floor_bytes(cgroups)
        while (left := headroom(cgroups) - floor) >= 0:
            if self._watch.wait(min(LOOK_S, max(OFTEN_S, left / FASTEST_BYTES_S))):
                return
        self._stop(f"memory ran out: less than {floor >> 20} MiB were left", "oom")

    def _watch_tree(self, bounds: Bounds) -> None:
        mine = score(os.getpid())
        for _ in self._rounds():
            pids = descendants(self.pid)
            if mine is not None and any(s is not None and s < FIRST for s in map(score, pids)):
                self._stop("it made itself one of those that the system spares when memory runs out")
            elif bounds.memory is not None and tree_bytes(pids, self._in_memory(), bounds.memory) > bounds.memory:
                self._stop(f"its processes hold more than {bounds.memory >> 20} MiB of memory", "oom")

    def _watch_files(self, bounds: Bounds) -> None:
        for _ in self._rounds():
            if os.fstat(self._log).st_size > bounds.log:
                self._stop(f"its log grew beyond {bounds.log >> 20} MiB")
            elif any(self._grew(folder, had + bounds.files) for folder, had in self._had.items()):
                self._stop(f"its files grew beyond {bounds.files >> 20} MiB")

    def _grew(self, folder: Path, most: int) -> bool:
        return size_of(folder, most, stop=self._watch.is_set) > most

    def _rounds(self) -> Iterator[None]:
        """One a second until it ends or was ended; less often where a round itself takes long."""
        wait_s = WATCH_S
        while not self._watch.wait(wait_s) and not self.fault:
            began = time.monotonic()
            yield
            wait_s = max(WATCH_S, 10 * (time.monotonic() - began))

    def _in_memory(self) -> int:
        """Bytes of its files in file systems in memory."""
        root = f"/proc/{self._first}/root"
        shared = 0 if self._launch.uid is None else size_of("/dev/shm", uid=self._launch.uid)
        return shared + sum(used(root + mount) for mount in self._launch.mounts)

    def _stop(self, why: str, status: str = "crash") -> None:
        self.fault, self.fault_status = self.fault or why, status
        self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Child(ProcessTree):
    """A child that runs a train.py, and the wire to it.

    Args:
        policy: what it runs and what it needs.
        descriptors: that it inherits, in the order of its arguments.
        repeatable: whether its results must repeat to the bit; see `child_environment`.
    """

    def __init__(
        self, sandbox: Sandbox, policy: Policy, descriptors: list[int], log: Path, threads: int, repeatable: bool = True
    ) -> None:
        residency.wait()
        parent, child = socket.socketpair()
        with child:
            try:
                environment = child_environment(threads, repeatable)
                launch = sandbox.launch(policy, [child.fileno(), *descriptors], environment)
                super().__init__(launch, log, policy.bounds)
            except BaseException:
                parent.close()
                raise
        self.wire = Wire(parent, policy.send_s)

    def kill(self) -> None:
        self.wire.close()
        super().kill()


def child_environment(threads: int, repeatable: bool = True) -> dict[str, str]:
    """What every child gets of the environment; its sandbox adds HOME, TMPDIR and compiler caches.

    Args:
        repeatable: ask cuBLAS and the compiler for results that repeat to the bit.
    """
    env = {k: os.environ[k] for k in _PASSED if k in os.environ}
    if repeatable:
        env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
        # Also then the compiler times whether to pad a product whose width is no multiple of 8, and each answer is
        # another kernel of cuBLAS's with other bits.
        env["TORCHINDUCTOR_SHAPE_PADDING"] = "0"
    return env | {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # glibc returns large blocks to the system at once, so that every activation is paged in anew at every
        # step: half of a CPU step's time. These keep what was freed.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    }


def tail(log: Path, lines: int = 20, width: int = 300) -> list[str]:
    """The last lines of a log, bounded, with control characters made visible."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 64 * 1024))
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return []
    rows = text.replace("\r", "\n").splitlines()[-lines:]
    return ["".join(c if c.isprintable() else "?" for c in r.expandtabs(4))[:width] for r in rows]
