"""`hotloop doctor`: what this machine has, and what is wrong with it, one line each."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.conditions import SLOWED, clock_words, clocks, strangers
from harness.errors import HotloopError
from harness.machine import cpu_name, gpu_memory_gib, gpus, threads_default
from harness.probe_cuda import probe_cuda
from harness.sandbox import best
from harness.seal import verify_seal
from harness.spec import PRESETS, auto_preset, batch_divisor
from prepare import default_data_dir, load_dataset

__all__ = ["checks", "main"]

# Pairs that belong together: torch's own build pins its triton.
TORCH_TRITON = {"2.13.0": "3.7.1", "2.11.0": "3.6.0"}
NEEDED_BYTES = 2 << 30


def checks() -> Iterator[tuple[str, bool, str]]:
    """(what, whether it is fine, what was found and how to mend it)."""
    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer is needed)"
    yield _versions()
    for name in ("numpy", "tiktoken", "rustbpe", "pyarrow", "safetensors", "GitPython", "rich", "matplotlib"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, False, "not installed; run: make install"
    found = gpus()
    yield (
        "gpu",
        True,
        ", ".join(f"{g['name']} ({g['memory']}, driver {g['driver']})" for g in found)
        or ("none; the laptop preset runs on the CPU"),
    )
    yield _preset()
    if found:
        yield from _conditions()
        yield _cuda()
    yield from _attention("cuda" if found else "cpu")
    yield "repeatable", True, "trainings are asked to repeat to the bit; what that costs: hotloop bench determinism"
    yield "cpu", True, f"{cpu_name()}, {os.cpu_count()} cores, {threads_default()} threads by default"
    git = shutil.which("git")
    yield "git", git is not None, git or "not found; install git"
    yield from _sandbox("cuda" if found else "cpu")
    free = shutil.disk_usage(Path.cwd()).free
    yield "disk", free > NEEDED_BYTES, f"{free / 2**30:.1f} GiB free here; a night wants 2 GiB"
    try:
        yield "seal", True, verify_seal()[:16]
    except HotloopError as e:
        yield "seal", False, str(e)
    for preset in PRESETS.values():
        path = default_data_dir(preset.source, preset.seq_len, preset.vocab_size)
        needed = preset.name == auto_preset(gpu_memory_gib())
        if not path.exists():
            yield (
                f"data {preset.name}",
                not needed,
                f"not prepared; run: hotloop prepare --preset {preset.name}",
            )
            continue
        try:
            dataset = load_dataset(path)
            dataset.verify()
            rows = ", ".join(f"{s} {len(dataset.rows(s)):,}" for s in ("train", "val", "holdout"))
            yield f"data {preset.name}", True, f"{path} (rows: {rows})"
        except HotloopError as e:
            yield f"data {preset.name}", False, str(e)


def _preset() -> tuple[str, bool, str]:
    """What `--preset auto` takes here, and why."""
    memory_gib = gpu_memory_gib()
    name = auto_preset(memory_gib)
    if memory_gib is None and gpus():
        return "preset", False, f"{name}: nvidia-smi does not tell the GPU's memory; say --preset h100"
    if memory_gib is None:
        return "preset", True, f"{name} (no GPU)"
    if name == "laptop":
        return "preset", False, f"laptop on the CPU: {memory_gib:.0f} GiB of GPU memory are too little for h100"
    rows = f"1/{batch_divisor(memory_gib)} of" if batch_divisor(memory_gib) > 1 else "all of"
    return "preset", True, f"{name}, with {rows} DEVICE_BATCH_SIZE a pass ({memory_gib:.0f} GiB of GPU memory)"


def _conditions() -> Iterator[tuple[str, bool, str]]:
    """The GPU's clocks, what holds them back, and who computes there now."""
    now = clocks()
    if now is None:
        yield "clocks", False, "nvidia-smi does not tell them; records cannot say whether they fell"
    else:
        held = [r for r in now["reasons"] if r in SLOWED]
        yield "clocks", not held, clock_words(now) + ("; cool it, or look at its power supply" if held else "")
    others = strangers(None)
    words = f"computing there: {'; '.join(others[:3])}; end them before a night" if others else "nobody computes there"
    yield "gpu use", not others, words


def _attention(device: str) -> Iterator[tuple[str, bool, str]]:
    """Which implementations of attention work here, the one that would be taken first; on a GPU also why not others."""
    try:
        attend = importlib.import_module("kernels.attend")
    except ImportError:  # no torch: the line on versions says so
        return
    try:
        able, unable = attend.backends(device)
    except (RuntimeError, AssertionError) as e:  # what is asked for cannot run, or a torch without CUDA beside a GPU
        yield "attention", False, str(e)
        return
    yield "attention", True, ", ".join([*able, "reference"])
    if device == "cuda":
        for name, why in unable.items():
            yield f"  not {name}", True, why


def _sandbox(device: str) -> Iterator[tuple[str, bool, str]]:
    """The best level in which the device works, what is in the way of better ones, and what a probe tried."""
    try:
        sandbox = best(device=device)
    except HotloopError as e:
        yield "sandbox", False, str(e)
        return
    yield "sandbox", sandbox.level == 3, str(sandbox)
    for level, why in sandbox.missing.items():
        yield f"  not {level.split(' ')[0]}", True, why
    for name, stopped in sandbox.probes.items():
        yield "  probe", stopped, f"{name}: {'stopped' if stopped else 'NOT stopped'}"


def _versions() -> tuple[str, bool, str]:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "torch", False, "not installed; run: make install"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    wanted = TORCH_TRITON.get(torch.split("+")[0])
    text = f"{torch} with triton {triton}"
    if wanted is None:
        return (
            "torch",
            True,
            f"{text} (tested: {', '.join(f'{a} with {b}' for a, b in TORCH_TRITON.items())})",
        )
    return "torch", triton == wanted, text if triton == wanted else f"{text}; it needs triton {wanted}"


def _cuda() -> tuple[str, bool, str]:
    """A real product on the device, outside of any sandbox; nvidia-smi alone proves little."""
    try:
        return "cuda", True, f"works, {probe_cuda(best(0)):.1f} s to a first product"
    except HotloopError as e:
        return "cuda", False, str(e)


def main(args: argparse.Namespace | None = None, more: Sequence[Callable[[], tuple[str, bool, str]]] = ()) -> int:
    """Print every check, and those of `more`; 0 when all are fine, 1 otherwise."""
    bad = 0
    for name, good, text in itertools.chain(checks(), (check() for check in more)):
        bad += not good
        print(f"{'ok ' if good else 'BAD'}  {name:<13} {text}")
    print("all is fine" if not bad else f"{bad} to mend")
    return 1 if bad else 0
