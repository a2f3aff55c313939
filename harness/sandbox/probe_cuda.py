"""Whether CUDA works inside a sandbox: a child there makes a real product, and a Triton kernel is built and launched.

The kernel needs all that torch.compile needs: ptxas, a C compiler with Python.h, the linker, ldconfig, a place to write
and run what was made. Where compile processes run beside a trainer, one more process initialises CUDA.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hotloop.harness.errors import SandboxError
from hotloop.harness.gpu import toolchain
from hotloop.harness.paths import SAME_CODE, import_root
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, tail
from hotloop.harness.sandbox.rehearsal import refused_needs
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut, Wire

__all__ = ["child_main", "probe_cuda", "worker"]

LIMIT_S = 900.0  # the first import of gigabytes of CUDA's libraries from a cold disk among it
WORKER_S = 60.0
_WORKER = SAME_CODE + "from hotloop.harness.sandbox.probe_cuda import worker; worker()"


def probe_cuda(sandbox: Sandbox) -> float:
    """Seconds until a child of `sandbox` had a product and a kernel's result from the GPU.

    Raises:
        SandboxError: it got none; with the last words of its log, and what the sandbox refused of what CUDA is known
            to need.
    """

    if lacking := toolchain.missing():
        raise SandboxError(lacking)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hotloop-probe-") as folder:
        log = Path(folder) / "log.txt"
        try:
            with Child(
                sandbox, Policy("hotloop.harness.sandbox.probe_cuda", Path(folder), device="cuda"), [], log, 1
            ) as child:
                answer = child.wire.recv(LIMIT_S)
                if answer.get("kind") == "works":
                    return time.monotonic() - began
                words = str(answer.get("why"))[:200]
        except (Closed, Malformed, TimedOut):
            words = " ".join(" ".join(tail(log, 3)).split())[-200:]
    refused = "; ".join(f"refused there: {name} ({why[:80]})" for name, why in refused_needs(sandbox).items())
    raise SandboxError(f"CUDA does not work in it ({words or 'no answer'}{'; ' * bool(refused)}{refused})")


def child_main(wire: Wire, descriptors: list[int]) -> None:
    from hotloop.harness.sandbox.probe_kernel import compute

    if why := _worker_fails() or compute("cuda"):
        wire.send("fails", why=why)
    else:
        wire.send("works")
    wire.recv()


def worker() -> None:
    """In a process that the child started: exit with 1 where libcuda cannot be initialised."""
    code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    sys.exit(f"cuInit fails with error {code} in a process that the trainer starts" if code else 0)


def _worker_fails() -> str:
    """Compile processes beside the trainer use CUDA too, where they run (not at L1)."""
    if os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") == "1":
        return ""
    argv = [sys.executable, "-I", "-B", "-c", _WORKER, import_root()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WORKER_S)
    return (done.stderr.strip().splitlines() or ["a process that it started died"])[-1] if done.returncode else ""
