"""The best sandbox of this machine: chosen once by what it really stops, then used for every child.

A level (see `harness.sandbox.policy`) is taken when a probe, a real child at that level, found that it stops what the
level promises. The probe's answers go into every record.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

from hotloop.harness.errors import DeviceError, SandboxError
from hotloop.harness.gpu import toolchain
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.sandbox import landlock, seccomp
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.probe import probe, promised
from hotloop.harness.sandbox.probe_cuda import probe_cuda

__all__ = ["best"]


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
    stopped = probe(candidate, device)
    open_ones = [name for name in promised(candidate, device) if not stopped.get(name, False)]
    if open_ones:
        raise SandboxError(f"it did not stop: {', '.join(open_ones)}")
    return stopped
