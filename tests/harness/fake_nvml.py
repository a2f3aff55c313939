"""A machine with the GPUs that a test wants: the stand-in for NVML, and what goes with it in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness import single
from hotloop.harness.gpu import devices, neighbours, nvml
from hotloop.harness.gpu.toolchain import Build

STAND_INS = Path(__file__).parent / "stand_ins"
H100 = {
    "uuid": "GPU-aa", "name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "minor": 3, "capability": [9, 0],
    "sm": 1980, "memory_mhz": 2619, "temperature": 61, "reasons": 0x4, "persistence": 1, "mode": 0, "apps": [],
}  # fmt: skip
SMALL = H100 | {"uuid": "GPU-bb", "name": "NVIDIA T400", "memory_mib": 2048, "minor": 1, "capability": [7, 5]}
DROPPED = {"sm": 1410, "reasons": 0x24, "temperature": 88}


class FakeNvml:
    """What NVML says is in a file, replaced whole by `says`; the real one's library is not asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "nvml.json"
        monkeypatch.setenv("FAKE_NVML", str(self.file))
        monkeypatch.setenv("HOTLOOP_DATA", str(folder / "data"))  # where claims are made
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        monkeypatch.syspath_prepend(str(STAND_INS))
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        monkeypatch.setattr(nvml, "_open", None)
        monkeypatch.setattr(neighbours, "_claims", {})
        monkeypatch.setattr(devices, "torch_build", lambda: Build("2.13.0", "13.0"))
        monkeypatch.setattr(single, "touch", lambda gpu: {"cuda": 13000, "memory": 0})
        self.says()

    def says(self, *cards: dict[str, Any], **machine: Any) -> None:
        """The cards (by default one H100), and what is special about the machine."""
        devices.gpus.cache_clear()
        body = {"driver": "580.65.06", "cuda": 13000, "cards": list(cards or [H100])} | machine
        next_file = self.file.with_suffix(".next")
        next_file.write_text(json.dumps(body))
        os.replace(next_file, self.file)

    def end(self) -> None:
        devices.gpus.cache_clear()
        sys.modules.pop("pynvml", None)
