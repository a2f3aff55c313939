"""Whether CUDA works inside a sandbox: a child there compiles nothing, but makes a real product on the device."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import SandboxError
from harness.wire import Closed, Malformed, TimedOut, Wire

if TYPE_CHECKING:
    from harness.sandbox import Sandbox

__all__ = ["child_main", "probe_cuda"]

LIMIT_S = 900.0  # the first to load torch's gigabytes, from a cold disk perhaps


def probe_cuda(sandbox: Sandbox) -> float:
    """Seconds until a child of `sandbox` had a product from the GPU.

    Raises:
        SandboxError: it got none; with the last words of its log.
    """
    from harness.process import Child, tail
    from harness.sandbox import Policy

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hotloop-probe-") as folder:
        log = Path(folder) / "log.txt"
        try:
            with Child(sandbox, Policy("harness.probe_cuda", Path(folder), device="cuda"), [], log, 1) as child:
                if child.wire.recv(LIMIT_S).get("kind") == "works":
                    return time.monotonic() - began
        except (Closed, Malformed, TimedOut):
            pass
        words = " ".join(" ".join(tail(log, 3)).split())[-200:]
    raise SandboxError(f"CUDA does not work in it ({words or 'no answer'})")


def child_main(wire: Wire, descriptors: list[int]) -> None:
    import torch

    x = torch.ones(64, 64, device="cuda")
    wire.send("works" if float((x @ x).sum()) == 64.0**3 else "wrong")
    wire.recv()
