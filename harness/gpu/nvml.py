"""What the NVIDIA driver says of its GPUs, by its management library (NVML, through nvidia-ml-py).

Any question may stay without an answer: an old driver, WSL, a slice of a MIG card, a card that is lost. Then it is None
(or empty), and who asks says what that means there. The library is opened once a process and stays open, which keeps
the driver from unloading its state between two runs. Cards are in NVML's order, that of their places on the PCI bus.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "Gpu", "Process", "cards", "clocks", "cuda_version", "driver", "lost", "persistent", "processes", "prohibited",
    "trouble",
]  # fmt: skip

CAPABILITIES = Path("/proc/driver/nvidia/capabilities")  # which device file opens which slice of a MIG card
_lock = threading.Lock()
_open: ModuleType | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one slice of it (MIG).

    Attributes:
        index: NVML's and nvidia-smi's; a slice has its card's.
        uuid: what CUDA_VISIBLE_DEVICES and NVML call it.
        node: its device file, such as /dev/nvidia0; empty where the driver does not say.
        memory_gib: None where the driver does not say.
        capability: of CUDA, such as (9, 0); None where the driver does not say.
        card: the uuid of the whole card, where this is a slice of one; else empty.
        sliced: whether this is a card that MIG has divided, so that it cannot be used as a whole.
        part: of a slice, its GPU instance and its compute instance, such as 7/0.
        caps: the device files that open a slice.
    """

    index: int
    uuid: str
    node: str = ""
    name: str = ""
    memory_gib: float | None = None
    driver: str = ""
    capability: tuple[int, int] | None = None
    card: str = ""
    sliced: bool = False
    part: str = ""
    caps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"GPU {self.index}, {self.name or 'unnamed'} ({self.uuid})"

    def as_dict(self) -> dict[str, str]:
        """For the record: name, memory and driver as nvidia-smi writes them, and the uuid."""
        memory = "unknown" if self.memory_gib is None else f"{round(self.memory_gib * 1024)} MiB"
        return {"name": self.name, "memory": memory, "driver": self.driver, "uuid": self.uuid}


@dataclass(frozen=True)
class Process:
    """One that computes on a GPU. `pid` as NVML says it: in a container that may be the host's number, or 0."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.pid} {self.name}"


def _library() -> ModuleType:
    """NVML, opened. Raises ImportError or pynvml.NVMLError."""
    global _open
    with _lock:
        if _open is None:
            import pynvml

            pynvml.nvmlInit()
            _open = pynvml
        return _open


def _ask(function: str, *args: Any) -> Any:
    """One of NVML's answers; None where it has none."""
    global _open
    try:
        nvml = _library()
    except Exception:  # ImportError or NVMLError, whose class is only known where the import works
        return None
    try:
        return getattr(nvml, function)(*args)
    except nvml.NVMLError as e:
        if e.value == nvml.NVML_ERROR_UNINITIALIZED:  # the next question opens it anew
            _open = None
        return None


def trouble() -> str:
    """Why NVML cannot be asked, in its own words; empty where it can."""
    try:
        _library()
    except ImportError:
        return "nvidia-ml-py is not installed"
    except Exception as e:  # NVMLError, as above
        return str(e)
    return ""


def cuda_version() -> int | None:
    """The newest CUDA that the driver's library offers, such as 13000; None where it does not say."""
    return _ask("nvmlSystemGetCudaDriverVersion_v2") or None


def driver() -> str:
    """The driver's version, such as 580.65.06; empty without one."""
    return str(_ask("nvmlSystemGetDriverVersion") or "")


def cards() -> list[Gpu]:
    """All GPUs of the machine in PCI order, each card that MIG has divided followed by its slices."""
    found: list[Gpu] = []
    version = driver()
    for index in range(_ask("nvmlDeviceGetCount") or 0):
        handle = _ask("nvmlDeviceGetHandleByIndex", index)
        uuid = handle and _ask("nvmlDeviceGetUUID", handle)
        if not uuid:  # lost, or not ours to see
            continue
        minor = _ask("nvmlDeviceGetMinorNumber", handle)
        node = "" if minor is None else f"/dev/nvidia{minor}"
        capability = _ask("nvmlDeviceGetCudaComputeCapability", handle)
        name = str(_ask("nvmlDeviceGetName", handle) or "")
        sliced = (_ask("nvmlDeviceGetMigMode", handle) or [0])[0] == 1
        card = Gpu(
            index, uuid, node, name, _memory_gib(handle), version, tuple(capability) if capability else None,
            sliced=sliced,
        )  # fmt: skip
        found.append(card)
        for i in range((_ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0) if sliced else 0):
            part = _ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i)
            part_uuid = part and _ask("nvmlDeviceGetUUID", part)
            if not part_uuid:
                continue
            gi, ci = (_ask(f"nvmlDeviceGet{n}InstanceId", part) for n in ("Gpu", "Compute"))
            slice_ = replace(
                card, uuid=part_uuid, name=str(_ask("nvmlDeviceGetName", part) or name),
                memory_gib=_memory_gib(part), card=uuid, sliced=False, part=f"{gi}/{ci}", caps=_caps(minor, gi, ci),
            )  # fmt: skip
            found.append(slice_)
    return found


def _memory_gib(handle: Any) -> float | None:
    memory = _ask("nvmlDeviceGetMemoryInfo", handle)
    return memory.total / 2**30 if memory and memory.total else None


def _caps(minor: int | None, gpu: int | None, compute: int | None) -> tuple[str, ...]:
    """The device files of a slice: of its GPU instance, and of its compute instance."""
    found = []
    for path in (f"gi{gpu}/access", f"gi{gpu}/ci{compute}/access"):
        with contextlib.suppress(OSError):
            for line in (CAPABILITIES / f"gpu{minor}" / "mig" / path).read_text().splitlines():
                if line.startswith("DeviceFileMinor:"):
                    found.append(f"/dev/nvidia-caps/nvidia-cap{line.split(':', 1)[1].strip()}")
    return tuple(found)


def _handle(gpu: Gpu) -> Any:
    return _ask("nvmlDeviceGetHandleByUUID", gpu.uuid)


def _card_handle(gpu: Gpu) -> Any:
    """Of the whole card, which alone has clocks and a temperature."""
    return _ask("nvmlDeviceGetHandleByUUID", gpu.card or gpu.uuid)


def processes(gpu: Gpu) -> list[Process] | None:
    """Who computes on this GPU now; None where the driver does not tell (WSL, some slices)."""
    handle = _handle(gpu)
    found = None if handle is None else _ask("nvmlDeviceGetComputeRunningProcesses", handle)
    if found is None:
        return None
    return [Process(p.pid, str(_ask("nvmlSystemGetProcessName", p.pid) or _comm(p.pid))) for p in found]


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "(no name)"


def clocks(gpu: Gpu) -> dict[str, int | None] | None:
    """sm_mhz, memory_mhz, temperature_c and reasons (NVML's bits for why clocks are not higher) of its card.

    None where the driver does not tell the first; any other may be None alone.
    """
    handle = _card_handle(gpu)
    sm_mhz = None if handle is None else _ask("nvmlDeviceGetClockInfo", handle, 1)  # NVML_CLOCK_SM
    if sm_mhz is None:
        return None
    reasons = _ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # the older drivers' word
        reasons = _ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return {
        "sm_mhz": sm_mhz,
        "memory_mhz": _ask("nvmlDeviceGetClockInfo", handle, 2),  # NVML_CLOCK_MEM
        "temperature_c": _ask("nvmlDeviceGetTemperature", handle, 0),  # NVML_TEMPERATURE_GPU
        "reasons": reasons,
    }


def persistent(gpu: Gpu) -> bool | None:
    """Whether the driver stays loaded while nobody uses the card; None where it does not say."""
    handle = _card_handle(gpu)
    mode = None if handle is None else _ask("nvmlDeviceGetPersistenceMode", handle)
    return None if mode is None else bool(mode)


def prohibited(gpu: Gpu) -> bool:
    """Whether its compute mode lets nobody compute."""
    handle = _card_handle(gpu)
    return handle is not None and _ask("nvmlDeviceGetComputeMode", handle) == 2  # NVML_COMPUTEMODE_PROHIBITED


def lost(gpu: Gpu) -> str:
    """In NVML's words how the GPU has gone (fallen off the bus, needs a reset); empty where that is not known."""
    try:
        nvml = _library()
    except Exception:  # as above
        return ""
    try:
        nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
    except nvml.NVMLError as e:
        gone = (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
        return str(e) if e.value in gone else ""
    return ""
