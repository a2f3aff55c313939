"""What this machine is: device, versions, threads. Nothing here imports torch."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from hotloop.harness.errors import DeviceError
from hotloop.harness.gpu.devices import chosen, gpus, gpus_at, usable
from hotloop.harness.gpu.nvml import Gpu

__all__ = [
    "PEAK_BF16_FLOPS",
    "Gpu",
    "changed_files",
    "check_device",
    "cpu_name",
    "environment",
    "gpu_memory_gib",
    "gpus",
    "gpus_at",
    "installed_hash",
    "mfu_percent",
    "package_version",
    "record_hash",
    "threads_default",
]

# Dense bf16 peak of the tensor cores, NVIDIA's data sheets. karpathy/autoresearch takes the first for its MFU.
PEAK_BF16_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}


def gpu_memory_gib(gpu: Gpu | None = None) -> float | None:
    """Memory of a GPU, by default of the chosen one; None without one, or where nothing tells.

    Raises:
        DeviceError: there is a GPU that cannot be used.
    """
    gpu = gpu or chosen()
    if gpu is None:
        return None
    if gpu.memory_gib is not None:
        return gpu.memory_gib
    from hotloop.harness.gpu.between_runs import touch  # cards that share the machine's memory tell it to CUDA only

    return touch(gpu)["memory"] / 2**30 or None


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threads_default() -> int:
    """Cores that this process may use, two at most: results depend on the number, so it should be a common one."""
    return min(2, len(os.sched_getaffinity(0)))


def check_device(device: str, gpu: Gpu | None = None) -> None:
    """Raises DeviceError when `cuda` is asked for and cannot be had, with what to do.

    Args:
        gpu: which one; None for the chosen one.
    """
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"no device is called {device!r}; say cpu or cuda")
    if sys.platform != "linux":
        raise DeviceError(f"hotloop needs Linux (on Windows: WSL2), and this is {sys.platform}")
    if device == "cuda":
        usable(gpu or chosen())


def mfu_percent(
    device: str, flops_per_token: float | None, tokens_per_s: float, gpu: Gpu | None = None
) -> float | None:
    """Model FLOP utilisation against the bf16 peak; None where the peak is not known (CPUs, slices of a card)."""
    if device != "cuda" or not flops_per_token:
        return None
    gpu = gpu or chosen()
    if gpu is None or gpu.card:
        return None
    for key, peak in PEAK_BF16_FLOPS.items():
        if key in gpu.name:
            return 100.0 * flops_per_token * tokens_per_s / peak
    return None


@functools.cache
def record_hash(package: str) -> str:
    """SHA-256 of an installed package's RECORD, the list of its files with their hashes; empty without one."""
    try:
        text = importlib.metadata.distribution(package).read_text("RECORD")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def package_version(package: str) -> str:
    """Of an installed distribution; empty without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def installed_hash(package: str) -> str:
    """SHA-256 over the names and contents of an installed package's files as they are now; empty without it."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = hashlib.sha256()
    for path in sorted(files, key=str):
        if path.suffix != ".pyc":
            where = Path(str(path.locate()))
            content = hashlib.sha256(where.read_bytes()).hexdigest() if where.is_file() else "missing"
            found.update(f"{path} {content}\n".encode())
    return found.hexdigest()


def changed_files(package: str) -> list[str]:
    """Files of an installed package that are not what its RECORD says. Reads them all: seconds for torch."""
    wrong = []
    for path in importlib.metadata.distribution(package).files or []:
        if path.hash is None or path.hash.mode != "sha256":
            continue
        try:
            with open(path.locate(), "rb") as f:
                digest = hashlib.file_digest(f, "sha256").digest()
        except OSError:
            wrong.append(str(path))
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != path.hash.value:
            wrong.append(str(path))
    return wrong


# By the names of their distributions: FlashAttention 2, 4 and 3 (built, and prebuilt), and cuDNN's front end.
ATTENTION_PACKAGES = ("flash-attn", "flash-attn-4", "flash_attn_3", "hotloop-flash3", "nvidia-cudnn-frontend")


def environment(device: str, threads: int, gpu: Gpu | None = None) -> dict[str, Any]:
    """The facts that a record carries. `gpu` is the one that is meant; None for the chosen one."""
    gpu = (gpu or chosen()) if device == "cuda" else None
    versions = {}
    for name in ("torch", "triton", "numpy", "tiktoken", *ATTENTION_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages = {}
    for name in ("torch", "triton", "numpy", "safetensors", *ATTENTION_PACKAGES):
        if name in versions or name == "safetensors":
            packages[name] = record_hash(name)
    return {
        "packages": packages,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "gpu": gpu.as_dict() if gpu else None,
        "threads": threads,
        "versions": versions,
    }
