"""What a benchmark needs of the device: a timer, inputs past the cache, and the machine's own ceilings.

On a GPU `now()` records an event on the current stream, and the difference of two is device time; on a CPU it is the
host's clock. pytest-benchmark takes it through its public `timer` option and only ever subtracts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hotloop.harness.errors import DeviceError
from hotloop.harness.gpu.devices import gpus, usable
from hotloop.harness.gpu.neighbours import claim

__all__ = [
    "Mark", "ceilings", "compiled", "copy_bandwidth", "device", "facts", "flush", "identity", "matrix_rate", "now",
    "require_gpu", "rotations", "seconds",
]  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Mark:
    """A point on the device's timeline. `later - earlier` waits for both and is seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Mark) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def now() -> Any:
    return Mark() if torch.cuda.is_available() else time.perf_counter()


@functools.cache
def _scratch() -> Tensor:
    # Twice the L2, and long enough to write that the host has launched what follows before the device gets to it.
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(max(size, 256 << 20), dtype=torch.int8, device="cuda")


def flush() -> None:
    """Evict the L2 and queue some work, so that a launch's cost on the host does not show in what is timed next."""
    if torch.cuda.is_available():
        _scratch().zero_()


def rotations(bytes_each: int, most: int = 8) -> int:
    """How many copies of the inputs push each other out of the cache, within a quarter of the free memory."""
    if not torch.cuda.is_available():
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    fits = torch.cuda.mem_get_info()[0] // 4 // max(1, bytes_each)
    return int(max(1, min(most, fits, -(-2 * cache // max(1, bytes_each)) + 1)))


def seconds(work: Callable[[], Any], rounds: int = 10) -> float:
    """Median device seconds of `work`, after one untimed call."""
    work()
    times = []
    for _ in range(rounds):
        flush()
        start = now()
        work()
        times.append(now() - start)
    return float(sorted(times)[len(times) // 2])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, reads and writes counted: the ceiling of memory-bound work."""
    n = (1 << 30) if torch.cuda.is_available() else (1 << 26)
    source, target = (torch.empty(n, dtype=torch.int8, device=device()) for _ in range(2))
    source.random_(-100, 100)
    return 2 * n / seconds(lambda: target.copy_(source))


@functools.cache
def matrix_rate() -> float:
    """Operations a second of a large bf16 product of random numbers by the vendor's library: the ceiling of
    products.
    """
    n, dtype = (8192, torch.bfloat16) if torch.cuda.is_available() else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def identity() -> dict[str, Any]:
    """What figures depend on."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "cpu_figures": True}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties()
        found |= {
            "device": p.name,
            "cpu_figures": False,
            "capability": [p.major, p.minor],
            "multiprocessors": p.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": next((g.driver for g in gpus()), "unknown"),
        }
    return found


def ceilings() -> tuple[float, float]:
    """(operations, bytes) a second of this machine at the most."""
    return matrix_rate(), copy_bandwidth()


def facts() -> dict[str, Any]:
    """What figures depend on, and the machine's ceilings; goes into every result."""
    return identity() | {"copy_bytes_per_s": copy_bandwidth(), "matrix_flops_per_s": matrix_rate()}


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile for each shape by itself, however many come. Past its limit, of eight, torch goes on with eager
    code, which would be timed in its place, or raises where the whole graph is wanted.
    """
    import torch._dynamo  # slow, and only this needs it

    torch._dynamo.config.recompile_limit = 1 << 10
    made: Callable[..., Any] = torch.compile(function, dynamic=False, **options)
    return made


def require_gpu() -> None:
    """Raises DeviceError where there is no working GPU."""
    found = gpus()
    if not found:
        raise DeviceError("this needs an NVIDIA GPU and nvidia-smi shows none; on a CPU: hotloop bench smoke")
    usable(found[0])
    claim(found[0])
    os.environ["CUDA_VISIBLE_DEVICES"] = found[0].uuid  # the same as in a night, whatever CUDA's own order is
    if not torch.cuda.is_available():
        raise DeviceError(f"nvidia-smi shows a GPU and torch {torch.__version__} cannot use it; run: make install")
