"""`hotloop doctor`: what this machine has, and what is wrong with it, one line each."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import HotloopError
from harness.machine import cpu_name, gpus, threads_default
from harness.probe_cuda import probe_cuda
from harness.sandbox import best
from harness.seal import verify_seal
from harness.spec import PRESETS
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
    if found:
        yield _cuda()
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
        needed = preset.device == ("cuda" if found else "cpu")
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


def main(args: argparse.Namespace | None = None) -> int:
    """Print every check; 0 when all are fine, 1 otherwise."""
    bad = 0
    for name, good, text in checks():
        bad += not good
        print(f"{'ok ' if good else 'BAD'}  {name:<13} {text}")
    print("all is fine" if not bad else f"{bad} to mend")
    return 1 if bad else 0
