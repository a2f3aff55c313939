"""Child processes that run an agent's code: started clean, killed whole.

The child gets an isolated interpreter (`-I`: no PYTHON* variables, no user site, no current folder on the path), a
cleared environment, private HOME, TMPDIR and compiler caches, the socket and the shared memory it needs, and
nothing else. It dies with the parent. This is a process boundary; it is not yet an operating-system sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from harness.wire import Wire

__all__ = ["SANDBOX", "Child", "SharedMemory", "enter", "project_root", "tail"]

SANDBOX = "process boundary"

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import child_main; child_main()"
# Settings of the user's machine that a child needs, or that choose an implementation openly.
_PASSED = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "CC",
    "HOTLOOP_KERNELS",
    "HOTLOOP_ATTENTION",
    "TRITON_INTERPRET",
)


def project_root() -> Path:
    """The folder that holds the harness, kernels and prepare that are running now."""
    return Path(__file__).resolve().parent.parent


class SharedMemory:
    """Anonymous memory (memfd) that parent and child both map. It has no name and no file."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("hotloop", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, max(size, 1))
        self.map = mmap.mmap(self.fd, max(size, 1))

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view may outlive us; the memory goes with it
            self.map.close()
        os.close(self.fd)


class Child:
    """One running child. Use as a context manager: leaving it kills the whole process group.

    Args:
        module: the module whose `child_main()` runs in the child.
        folder: the run's folder; the child works in `folder/scratch`, made now and removed at the end.
        source: the bytes of train.py, written into scratch.
        memories: shared memories whose descriptors the child inherits, in the order of its arguments.
        log: file that takes stdout and stderr.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        source: bytes,
        memories: list[SharedMemory],
        log: Path,
        threads: int,
        log_bytes: int,
    ) -> None:
        self.scratch = folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        (self.scratch / "train.py").write_bytes(source)
        parent, child = socket.socketpair()
        with child, open(log, "ab") as out:
            fds = [child.fileno(), *(m.fd for m in memories)]
            root = str(project_root())
            argv = [str(f) for f in fds]
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable, "-I", "-u", "-c", _BOOT.format(module=module),
                        root, str(os.getpid()), str(log_bytes), *argv,
                    ],
                    cwd=self.scratch, env=self._environment(threads), pass_fds=fds, close_fds=True,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
            except BaseException:
                parent.close()
                raise
        self.wire = Wire(parent)
        self.pid = self._process.pid
        self.peak_rss_mb = 0.0
        self.returncode: int | None = None

    def _environment(self, threads: int) -> dict[str, str]:
        home = self.scratch / "home"
        tmp = self.scratch / "tmp"
        home.mkdir()
        tmp.mkdir()
        env = {k: os.environ[k] for k in _PASSED if k in os.environ}
        return env | {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "TMPDIR": str(tmp),
            "LANG": "C.UTF-8",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp / "inductor"),
            "TRITON_CACHE_DIR": str(tmp / "triton"),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            # glibc returns large blocks to the system at once, so that every activation is paged in anew at every
            # step: half of a CPU step's time. These keep what was freed.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        }

    def wait(self, timeout_s: float = 5.0) -> int | None:
        """The exit status if the child ends within `timeout_s`, negative for a signal; else None."""
        if self.returncode is None:
            try:
                self.returncode = self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
        return self.returncode

    def kill(self) -> None:
        """Kill the process group and reap the child; idempotent."""
        if self.returncode is None:
            self._note_peak()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.returncode = self._process.wait()
        self.wire.close()

    def _note_peak(self) -> None:
        # VmHWM counts this process alone; getrusage would mix in what the parent had before exec.
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_rss_mb = int(line.split()[1]) / 1024

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)


def enter() -> tuple[Wire, list[int]]:
    """First thing in a child: die with the parent, bound files, and give the wire and the memory descriptors.

    `sys.argv` is [-c, root, parent pid, log bytes, socket, memory...].
    """
    parent, log_bytes, sock, *memories = (int(a) for a in sys.argv[2:])
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (log_bytes, log_bytes))
    sys.argv = ["train.py"]
    return Wire(socket.socket(fileno=sock)), memories


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
