"""Launch configurations and orders that were measured, as data: from the profile that the harness passes on in
HOTLOOP_PROFILE, else from one of those that ship in `kernels/tuned/`.

Nothing is tuned while a model trains: start-up stays short and two runs launch the same kernels. A GPU that was never
tuned gets the configurations of the nearest one (the same compute capability, then the nearest number of
multiprocessors), which `notice()` says; with none of its capability, each kernel's own default stands.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["FOLDER", "config", "file_name", "measured", "notice", "of_all_gpus", "shipped", "trial"]

FOLDER = Path(__file__).with_name("tuned")


def file_name(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3.json"""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def shipped() -> tuple[dict[str, Any], ...]:
    """Every shipped profile of a GPU: {"gpu", "capability": [major, minor], "multiprocessors",
    "configs": {kernel: {key: config}}, ...}.
    """
    found = (json.loads(p.read_text())["profile"] for p in sorted(FOLDER.glob("*.json")))
    return tuple(f for f in found if "gpu" in f)


def of_all_gpus(kernel: str, key: str | None = None) -> list[tuple[dict[str, int], tuple[int, ...]]]:
    """Every shipped configuration of a kernel at a key (None: at any), for the compile gate, with the architecture that
    it was tuned on: [(configuration, (10 * major + minor,))].
    """
    return [
        (config, (10 * f["capability"][0] + f["capability"][1],))
        for f in shipped()
        for at, config in f["configs"].get(kernel, {}).items()
        if key in (None, at)
    ]


def nearest(gpu: str, capability: tuple[int, int], multiprocessors: int) -> dict[str, Any] | None:
    """The file for a GPU: its own, or the nearest of its compute capability. Of another minor version it would not
    do: a block of an RTX 4090 (8.9) gets 99 KiB of shared memory, one of an A100 (8.0) 163.
    """
    same = [f for f in shipped() if tuple(f["capability"]) == capability]
    return min(same, key=lambda f: (f["gpu"] != gpu, abs(f["multiprocessors"] - multiprocessors)), default=None)


@functools.cache
def _here() -> tuple[dict[str, Any] | None, str]:
    if given := os.environ.get("HOTLOOP_PROFILE"):
        return json.loads(given), ""
    if not torch.cuda.is_available():
        return None, "no GPU"
    p = torch.cuda.get_device_properties()
    found = nearest(p.name, (p.major, p.minor), p.multi_processor_count)
    if found is None:
        return None, f"{p.name} and its compute capability were never tuned; defaults"
    return found, "" if found["gpu"] == p.name else f"{p.name} was never tuned; the values of {found['gpu']}"


def notice() -> str:
    """What is to be said of the configurations on this machine; empty where they are its own. Goes into every
    record.
    """
    return _here()[1]


def config(kernel: str, key: str) -> dict[str, int] | None:
    """The tuned configuration of a kernel at a key of its own (a size, a variant); None for its default."""
    if kernel in _trial:
        return _trial[kernel]
    found = _here()[0]
    return None if found is None else found["configs"].get(kernel, {}).get(key)


def measured(operator: str) -> dict[str, Any]:
    """What was measured of an operator beside its configurations (which backend is fastest); empty for nothing."""
    found = _here()[0]
    return {} if found is None else found.get("measured", {}).get(operator, {})  # type: ignore[no-any-return]


_trial: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def trial(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Launch a kernel with this configuration meanwhile: how one is tried."""
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]
