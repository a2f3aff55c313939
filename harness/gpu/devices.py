"""Which GPU: always one, named by its uuid; and in one line what is wrong with one that is there and cannot be used.

    chosen()    the first of CUDA_VISIBLE_DEVICES, else the first of the machine
    gpus()      all that may be used, the chosen one first
    usable(gpu) raises DeviceError with the cure where CUDA cannot work on it

Nothing here falls back to the CPU: a machine with an NVIDIA device and no working driver is an error that says so, and
`--device cpu` asks for the CPU. Numbers in CUDA_VISIBLE_DEVICES are NVML's, in PCI order, as with
CUDA_DEVICE_ORDER=PCI_BUS_ID; children are given the uuid, which means the same in any order.
"""

from __future__ import annotations

import functools
import glob
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hotloop.harness.errors import DeviceError, UsageError
from hotloop.harness.gpu import nvml
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.gpu.toolchain import build_trouble, compiler_trouble, header_trouble, torch_build

__all__ = ["Signs", "chosen", "gpus", "gpus_at", "named", "signs", "usable", "visible", "why_unusable"]

ASK_FOR_CPU = "or ask for the CPU: --device cpu"
LEAST_CAPABILITY = (8, 0)  # bf16 and what the kernels are compiled for


@dataclass(frozen=True)
class Signs:
    """What tells of an NVIDIA GPU where its library does not.

    Attributes:
        module: the driver's kernel module is loaded.
        nodes: there are device files /dev/nvidia0 ...
        pci: a graphics device of NVIDIA's on the PCI bus.
        nouveau: which another driver has.
        wsl: /dev/dxg, by which WSL2 shows Windows' GPU, of whatever make.
        container: this seems to be one.
    """

    module: bool = False
    nodes: bool = False
    pci: bool = False
    nouveau: bool = False
    wsl: bool = False
    container: bool = False

    def __bool__(self) -> bool:
        return self.module or self.nodes or self.pci or self.wsl


def signs(root: Path = Path("/")) -> Signs:
    """What this machine (or the one under `root`, in tests) shows."""
    graphics = [d for d in _pci(root) if d[0] == "0x10de" and d[1].startswith("0x03")]
    return Signs(
        module=(root / "proc/driver/nvidia/version").exists(),
        nodes=bool(glob.glob(str(root / "dev/nvidia[0-9]*"))),
        pci=bool(graphics),
        nouveau=any(d[2] == "nouveau" for d in graphics),
        wsl=(root / "dev/dxg").exists(),
        container=any((root / p).exists() for p in (".dockerenv", "run/.containerenv")),
    )


def _pci(root: Path) -> Iterator[tuple[str, str, str]]:
    """(vendor, class, driver) of each device on the PCI bus."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((folder / n).read_text().strip() for n in ("vendor", "class"))
        except OSError:
            continue
        yield vendor, kind, (folder / "driver").resolve().name if (folder / "driver").exists() else ""


def why_unusable(found: Signs, trouble: str) -> str:
    """One line: why NVML shows no GPU although there are signs of one, and the cure.

    Args:
        trouble: NVML's own words; empty where it opens and shows none.
    """
    words = trouble.lower()
    if "nvidia-ml-py" in words:
        cure = "nvidia-ml-py, which asks the driver, is not installed; run: make install"
    elif "mismatch" in words:
        cure = "its driver was updated and the old one is still loaded; reboot"
    elif "permission" in words:
        cure = "this user may not open its device files /dev/nvidia*; give it access (often: the group video)"
    elif found.wsl and not found.module:
        cure = (
            "WSL2 shows it (/dev/dxg) without NVIDIA's library; install NVIDIA's driver on Windows, not in WSL, and "
            "restart WSL: wsl --shutdown (if the GPU is not NVIDIA's, there is no cure)"
        )
    elif "not found" in words and (found.module or found.nodes) and not found.container:
        cure = "its driver is loaded and libnvidia-ml.so.1 is missing; install the driver's package nvidia-utils"
    elif found.container:
        cure = "this container was not given it; start it with --gpus all (NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    elif found.nouveau:
        cure = "it is run by nouveau; install NVIDIA's driver (580 or newer) and reboot"
    elif found.module or found.nodes or "not loaded" in words:
        cure = f"its driver does not work ({trouble or 'it shows no GPU'}); see: dmesg | grep -i nvrm, and reboot"
    else:
        cure = "no driver is installed; install NVIDIA's driver, 580 or newer, and reboot"
    return f"there is a GPU and it cannot be used: {cure}"


def visible(cards: list[Gpu], wanted: str | None, order: str | None = None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, in its order; of cards that MIG has divided, the slices.

    Args:
        cards: all of the machine, as `nvml.cards` gives them.
        wanted: CUDA_VISIBLE_DEVICES: numbers, uuids or beginnings of uuids (GPU-..., MIG-...); None for all.
        order: CUDA_DEVICE_ORDER. FASTEST_FIRST is CUDA's own guess, so between different cards a number says nothing.

    Raises:
        DeviceError: it names none that is there.
    """
    whole = [g for g in cards if not g.card]
    if wanted is None:
        return [g for g in cards if not g.sliced]
    known = "; ".join(map(str, (g for g in cards if not g.sliced)))
    found: list[Gpu] = []
    for word in (w.strip() for w in wanted.split(",")):
        if word.isdigit():
            if order == "FASTEST_FIRST" and len({g.name for g in whole}) > 1:
                raise DeviceError(
                    f"CUDA_VISIBLE_DEVICES={wanted} with CUDA_DEVICE_ORDER=FASTEST_FIRST does not say which of several "
                    f"different GPUs; name one by its uuid: {known}"
                )
            matches = [g for g in whole if g.index == int(word)]
        else:
            low = word.lower()
            matches = [g for g in cards if low and g.uuid.lower().startswith(low)]
            # MIG-GPU-<uuid of the card>/<GPU instance>/<compute instance>, as drivers before 470 named slices.
            matches = matches or [g for g in cards if g.card and low == f"mig-{g.card.lower()}/{g.part}"]
        if len(matches) != 1 and not (matches and matches[0].uuid.lower() == word.lower()):
            break  # as CUDA does: what comes after one that is not there is not seen
        gpu = matches[0]
        found += [g for g in cards if g.card == gpu.uuid] if gpu.sliced else [gpu]
    if not found:
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES={wanted!r} leaves no GPU to be used; this machine has {known}; {ASK_FOR_CPU}"
        )
    return list(dict.fromkeys(found))


@functools.cache
def gpus() -> list[Gpu]:
    """The GPUs that may be used, the chosen one first; empty on a machine without.

    Raises:
        DeviceError: there is one and it cannot be asked, or CUDA_VISIBLE_DEVICES hides all.
    """
    cards = nvml.cards()
    if not cards:
        if found := signs():
            raise DeviceError(f"{why_unusable(found, nvml.trouble())}; {ASK_FOR_CPU}")
        return []
    if all(g.sliced for g in cards):
        raise DeviceError(
            f"{cards[0]} is divided by MIG and has no slice; make one (nvidia-smi mig -cgi 0 -C), or end MIG "
            f"(nvidia-smi -mig 0); {ASK_FOR_CPU}"
        )
    return visible(cards, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))


def chosen() -> Gpu | None:
    """The one GPU that is used; None on a machine without. Raises DeviceError as `gpus` does."""
    return next(iter(gpus()), None)


def gpus_at(indices: list[int]) -> list[Gpu]:
    """The GPUs with these numbers, among those that may be used. Raises DeviceError for one that is not there."""
    have: dict[int, Gpu] = {}
    for gpu in gpus():
        have.setdefault(gpu.index, gpu)
    for index in indices:
        if index not in have:
            hidden = " of those in CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
            known = ", ".join(map(str, sorted(have))) or "none"
            raise DeviceError(f"there is no GPU {index}{hidden}; nvidia-smi shows {known}")
    return [have[i] for i in indices]


def named(words: str) -> list[Gpu]:
    """The GPUs of `--gpus 0,1`. Raises UsageError for what is no list, DeviceError for what is not there."""
    try:
        indices = [int(word) for word in words.split(",")]
    except ValueError:
        raise UsageError(f"--gpus {words!r} is not a list of numbers, such as 0,1") from None
    if len(set(indices)) < len(indices):
        raise UsageError(f"--gpus {words} names one twice")
    return gpus_at(indices)


def usable(gpu: Gpu | None) -> None:
    """Whether CUDA can work on it, as far as that can be told without trying.

    Raises:
        DeviceError: it cannot; one line with the cure.
    """
    if platform.machine() not in ("x86_64", "aarch64"):
        raise DeviceError(f"a GPU needs x86-64 or 64-bit Arm, and this is {platform.machine()}; {ASK_FOR_CPU}")
    build = torch_build()
    if build and build.hip:
        raise DeviceError(
            f"torch {build.version} is for AMD's GPUs (ROCm), and hotloop's kernels for NVIDIA's; {ASK_FOR_CPU}"
        )
    if gpu is None:
        raise DeviceError("a GPU was asked for and nvidia-smi shows none; check the driver, or say --device cpu")
    if gpu.capability is not None and gpu.capability < LEAST_CAPABILITY:
        have = ".".join(map(str, gpu.capability))
        raise DeviceError(
            f"{gpu} has compute capability {have}; 8.0 (Ampere) or newer is needed; choose another with "
            f"CUDA_VISIBLE_DEVICES, {ASK_FOR_CPU}"
        )
    if nvml.prohibited(gpu):
        raise DeviceError(f"{gpu} lets nobody compute (its compute mode); run as root: nvidia-smi -c DEFAULT")
    for trouble in (build_trouble(build, gpu.driver, nvml.cuda_version()), header_trouble(), compiler_trouble()):
        if trouble:
            raise DeviceError(f"{gpu} cannot be used: {trouble}; {ASK_FOR_CPU}")
