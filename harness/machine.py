"""What this machine is: device, versions, threads. Nothing here imports torch."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DeviceError

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
    "mfu_percent",
    "nvidia_smi",
    "record_hash",
    "threads_default",
]

# Dense bf16 peak of the tensor cores, NVIDIA's data sheets. karpathy/autoresearch takes the first for its MFU.
PEAK_BF16_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}


@dataclass(frozen=True)
class Gpu:
    """One of several GPUs, for children that may use no other.

    Attributes:
        index: nvidia-smi's.
        uuid: what CUDA_VISIBLE_DEVICES and nvidia-smi call it.
        node: its file, such as /dev/nvidia0; empty where the driver does not say.
    """

    index: int
    uuid: str
    node: str = ""


def gpus_at(indices: list[int], drivers: Path = Path("/proc/driver/nvidia/gpus")) -> list[Gpu]:
    """The GPUs with these indices. Raises DeviceError for one that is not there."""
    have = {int(row[0]): row for row in nvidia_smi("--query-gpu=index,uuid,pci.bus_id") if len(row) == 3}
    found = []
    for index in indices:
        if index not in have:
            known = ", ".join(map(str, have)) or "none"
            raise DeviceError(f"there is no GPU {index}; nvidia-smi shows {known}")
        _, uuid, bus = have[index]
        minor = ""
        with contextlib.suppress(OSError):  # nvidia-smi writes the bus with eight digits, the driver with four
            for line in (drivers / bus.lower()[-12:] / "information").read_text().splitlines():
                if line.startswith("Device Minor:"):
                    minor = line.split(":", 1)[1].strip()
        found.append(Gpu(index, uuid, f"/dev/nvidia{minor}" if minor else ""))
    return found


@functools.cache
def gpus() -> list[dict[str, str]]:
    """The NVIDIA GPUs that the driver shows: name, memory, driver. Empty without a driver."""
    rows = nvidia_smi("--query-gpu=name,memory.total,driver_version")
    return [dict(zip(("name", "memory", "driver"), r, strict=False)) for r in rows]


def gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU, as nvidia-smi shows it; None without one, or where it does not say."""
    sizes = []
    for gpu in gpus():
        number, _, unit = gpu.get("memory", "").partition(" ")
        if unit == "MiB" and number.isdigit():
            sizes.append(int(number) / 1024)
    return min(sizes, default=None)


def nvidia_smi(query: str) -> list[list[str]]:
    """The rows of one of nvidia-smi's queries; none without a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [[c.strip() for c in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


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


def check_device(device: str) -> None:
    """Raises DeviceError when `cuda` is asked for and there is none, with what to do."""
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"no device is called {device!r}; say cpu or cuda")
    if device == "cuda" and not gpus():
        raise DeviceError(
            "a GPU was asked for and nvidia-smi shows none; check the driver, or use --preset laptop --device cpu"
        )


def mfu_percent(device: str, flops_per_token: float | None, tokens_per_s: float) -> float | None:
    """Model FLOP utilisation against the bf16 peak; None where the peak is not known (CPUs)."""
    if device != "cuda" or not flops_per_token or not gpus():
        return None
    for key, peak in PEAK_BF16_FLOPS.items():
        if key in gpus()[0]["name"]:
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


def environment(device: str, threads: int) -> dict[str, Any]:
    """The facts that a record carries."""
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
        "gpu": gpus()[0] if device == "cuda" and gpus() else None,
        "threads": threads,
        "versions": versions,
    }
