"""Processes that need not wait for the start of torch: one that has imported it forks them.

Each is a fresh child of the process that asks, with the arguments, environment, folder and descriptors that it is
given; only what an interpreter reads as it starts is the first one's. A test of the start itself starts cold.

    run(script)   what `python -c script` does, in the project's folder; `output(script)`, what it prints
    Popen         in the place of subprocess.Popen in harness.sandbox.process: forks children below sandbox level 3
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hotloop.harness.sandbox.entry import BOOT

__all__ = ["Popen", "output", "run"]

ROOT = Path(__file__).parents[1]
ISOLATED = ("-I", "-B", "-u")
TRAINER = ("numpy", "torch", "torch._dynamo", "hotloop.harness.training.run", "hotloop.harness.training.flops")
SCRIPT = ("numpy", "torch", "triton", "torch._dynamo")
# Variables that are read where something is imported, so that each of their values has a process of its own.
AT_IMPORT = ("TRITON_", "TORCH", "PYTHON", "OMP_", "MKL_", "MALLOC_", "LD_")
LATER = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
_CLONE_PARENT, _SYS_CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}[os.uname().machine]


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python -c script` does in the project's folder, with these variables beside our own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | environment
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        numbers = {i: f.fileno() for i, f in enumerate((nothing, out, err))}
        process = _warm((), env, SCRIPT).fork(["-c"], script, env, str(ROOT), numbers)
        try:
            process.wait()
        finally:
            process.kill()
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read())
    return subprocess.CompletedProcess(script, process.returncode or 0, *texts)


def output(script: str, **environment: str) -> str:
    """Of a script that ends well."""
    done = run(script, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def Popen(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, stdout: IO[bytes], pass_fds: Sequence[int],
          **more: Any) -> Any:  # fmt: skip
    python = [sys.executable, *ISOLATED, "-c", BOOT]
    if list(argv[4 : 4 + len(python)]) != python:
        return subprocess.Popen(argv, env=env, cwd=cwd, stdout=stdout, pass_fds=pass_fds, **more)
    with open(os.devnull) as nothing:
        numbers = {0: nothing.fileno(), 1: stdout.fileno(), 2: stdout.fileno()} | {n: n for n in pass_fds}
        words = ["-c", *argv[4 + len(python) :]]
        return _warm(ISOLATED, env, TRAINER).fork(words, BOOT, env, str(cwd), numbers, first_to_go=True)


class Forked:
    """What is used of a subprocess.Popen, for a child that another process forked for this one."""

    returncode: int | None = None

    def __init__(self, pid: int) -> None:
        self.pid, self._ended = pid, os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._ended, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """A process of one thread that has imported `modules`, and ends with us."""

    def __init__(self, flags: Sequence[str], environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.warm import serve; serve()"
        environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}  # its threads would not be forked
        self._one = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", code, str(theirs.fileno()), *modules], env=environment,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def fork(
        self, argv: Sequence[str], code: str, env: Mapping[str, str], cwd: str, numbers: Mapping[int, int],
        first_to_go: bool = False,
    ) -> Forked:  # fmt: skip
        """A child that runs `code`.

        Args:
            numbers: its number of a descriptor -> ours.
            first_to_go: as harness.sandbox.bubblewrap.first_to_go makes one, and in a session of its own.
        """
        with tempfile.TemporaryFile() as job:
            job.write(json.dumps([argv, code, dict(env), cwd, list(numbers), first_to_go]).encode())
            job.flush()
            with self._one:
                socket.send_fds(self._socket, [b"job"], [job.fileno(), *numbers.values()])
                return Forked(int(self._socket.recv(64)))


_forking: dict[object, Warm] = {}


def _warm(flags: tuple[str, ...], environment: Mapping[str, str], modules: tuple[str, ...]) -> Warm:
    early = frozenset((k, v) for k, v in environment.items() if k.startswith(AT_IMPORT) and k not in LATER)
    if (flags, early) not in _forking:
        _forking[flags, early] = Warm(flags, {k: v for k, v in environment.items() if k not in LATER}, modules)
    return _forking[flags, early]


# In the process that forks.


def serve() -> None:
    sys.path.pop(0)
    number, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is shared by all
    asked = socket.socket(fileno=int(number))
    while True:
        words, descriptors, _, _ = socket.recv_fds(asked, 64, 64)
        if not words:
            os._exit(0)
        pid = _fork_sibling()
        if pid == 0:
            asked.detach()
            break
        for fd in descriptors:
            os.close(fd)
        asked.send(str(pid).encode())
    main = vars(importlib.import_module("__main__"))
    main.clear()
    main.update(__name__="__main__", __builtins__=__builtins__)
    status = 1
    try:
        exec(compile(_become(descriptors), "<string>", "exec"), main)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        print(e.code if isinstance(e.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an interpreter's own end takes torch apart, for most of a second


def _fork_sibling() -> int:
    """os.fork, but the child's parent is ours."""
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None)
    python.PyOS_BeforeFork()
    pid = int(libc.syscall(_SYS_CLONE, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    python.PyOS_AfterFork_Parent() if pid else python.PyOS_AfterFork_Child()
    return pid


def _become(descriptors: Sequence[int]) -> str:
    """Take what a new process would have been started with. Returns the code to run."""
    with open(descriptors[0], "rb", closefd=False) as f:
        f.seek(0)
        sys.argv, text, env, cwd, numbers, first_to_go = json.load(f)
    high = [os.dup2(fd, 500 + i) for i, fd in enumerate(descriptors[1:])]
    os.closerange(0, 500)
    for fd, wanted in zip(high, numbers, strict=True):
        os.dup2(fd, wanted)
    os.closerange(500, 600)
    if first_to_go:
        os.setsid()
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None
    return str(text)
