"""Kernels compiled in other processes, before anything is launched: what each takes of the machine, and into the cache.

Triton compiles at the first launch, in the process that launches, one kernel after another. Here a function is run
once with `recorded()`, which notes what it would launch and launches nothing; `compile_all` compiles those launches in
a pool of processes, which need no GPU. A later real launch in any process finds the result in Triton's cache on the
disk, under the very key that it looks for.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Facts", "Launch", "compile_all", "recorded", "resources", "without_driver"]

MOST_WORKERS = 32  # each takes most of a gigabyte


class Launch(NamedTuple):
    """A kernel and all that its machine code depends on.

    Attributes:
        module, function: where the @triton.jit function is.
        data: Triton's own description of the specialisation, JSON.
    """

    module: str
    function: str
    data: str


@dataclass(frozen=True)
class Facts:
    """What a launch was compiled to.

    Attributes:
        registers: of a thread. stack: bytes of a thread that did not fit into them. shared: bytes of a block.
        error: why it does not compile; empty where it does.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""

    def refusal(self, shared_limit: int) -> str:
        """Why it is not worth a launch on a card with so much shared memory a block; empty where it is."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.shared > shared_limit:
            return f"{self.shared:,} bytes of shared memory; a block gets {shared_limit:,}"
        return f"spills: {self.stack} bytes of stack" if self.stack else ""


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of what is run inside. None is made, so what they should have written is not there."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function.fn
        found.append(Launch(function.__module__, function.__qualname__, compile["specialization_data"]))
        return True  # there is nothing to be compiled, nor launched

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What was compiled already is launched without a word to the hook.
        kept, self.device_caches = self.device_caches, collections.defaultdict(self.create_binder)
        try:
            return was_run(self, *args, **kwargs)
        finally:
            self.device_caches = kept

    was_hook, was_run = knobs.runtime.jit_cache_hook, JITFunction.run
    knobs.runtime.jit_cache_hook, JITFunction.run = note, run
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = was_hook, was_run


def compile_all(
    launches: Iterable[Launch], capability: int, workers: int | None = None, limit_s: int = 300
) -> dict[Launch, Facts]:
    """Compile each once, for 10 * major + minor of an architecture, in `workers` processes (None: one a core).

    A compiler that takes its process with it, or longer than `limit_s`, is that launch's error; the others are compiled
    all the same.
    """
    wanted = list(dict.fromkeys(launches))
    found: dict[Launch, Facts] = {}
    most = max(1, min(workers or len(os.sched_getaffinity(0)), MOST_WORKERS, len(wanted)))
    while left := [x for x in wanted if x not in found]:
        with _pool(most, capability) as pool:
            jobs = [(x, pool.submit(_compile, x, limit_s)) for x in left]
            for launch, job in jobs:
                with contextlib.suppress(BrokenProcessPool):
                    found[launch] = job.result()
        if len(left := [x for x in left if x not in found]) == len(jobs):  # the pool broke before any was done
            with _pool(1, capability) as pool:
                try:
                    found[left[0]] = pool.submit(_compile, left[0], limit_s).result()
                except BrokenProcessPool:
                    found[left[0]] = Facts(error="the compiler ended its process, or did not end")
    return found


def _pool(workers: int, capability: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _enter, (capability,))


class _NoDriver:
    """What Triton asks of a driver in order to compile, without one."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _enter(capability: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the process that compiles here
    # Before Triton is imported: a torch without CUDA goes without it otherwise. No process of the pool touches the GPU.
    os.environ |= {"HOTLOOP_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.pop("TRITON_INTERPRET", None)
    without_driver(capability)


def without_driver(capability: int) -> None:
    """Have Triton compile, and record, in this process as for a card that is not there; nothing can be launched."""
    from triton.runtime import driver

    driver.set_active(_NoDriver(capability))


def _compile(launch: Launch, limit_s: int) -> Facts:
    signal.alarm(limit_s)  # ends this process, wherever the compiler is
    try:
        function: Any = importlib.import_module(launch.module)
        for name in launch.function.split("."):
            function = getattr(function, name)
        kernel = function.preload(launch.data)
        taken = resources(kernel.asm["cubin"])
    except Exception as e:  # whatever the compiler raises is this configuration's fault
        return Facts(error=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
    finally:
        signal.alarm(0)
    return Facts(taken["registers"], taken["stack"], int(kernel.metadata.shared))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread, from the compiler's own report."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}
