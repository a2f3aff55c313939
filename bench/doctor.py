"""`hotloop doctor`'s lines on the kernels: which implementations of attention work here."""

from __future__ import annotations

from collections.abc import Iterator

from hotloop.harness.doctor import Check
from hotloop.harness.errors import DeviceError
from hotloop.harness.gpu.devices import chosen

__all__ = ["attention", "checks"]


def checks() -> Iterator[Check]:
    try:
        device = "cuda" if chosen() else "cpu"
    except DeviceError:  # the line on the GPU says so
        device = "cpu"
    yield from attention(device)


def attention(device: str) -> Iterator[Check]:
    """The implementations that work, the one that would be taken first; on a GPU also why the others do not."""
    try:
        from hotloop.kernels import attend
    except ImportError:  # no torch: the line on versions says so
        return
    try:
        able, unable = attend.backends(device)
    except (RuntimeError, AssertionError) as e:  # what is asked for cannot run, or a torch without CUDA beside a GPU
        yield Check("attention", False, str(e))
        return
    yield Check("attention", True, ", ".join([*able, "reference"]))
    if device == "cuda":
        for name, why in unable.items():
            yield Check(f"  not {name}", True, why)
