"""`hotloop doctor`: what this machine has, and what is wrong with it, one line each."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hotloop.harness.data.dataset import default_data_dir, load_dataset
from hotloop.harness.errors import DeviceError, HotloopError
from hotloop.harness.gpu import nvml
from hotloop.harness.gpu.between_runs import touch
from hotloop.harness.gpu.devices import chosen, gpus, usable
from hotloop.harness.gpu.neighbours import others, strangers
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.gpu.toolchain import MAKE_FIT, TESTED, compiler_trouble, compiles, header_trouble, torch_build
from hotloop.harness.machine import cpu_name, gpu_memory_gib, threads_default
from hotloop.harness.records.seal import verify_seal
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.probe_cuda import probe_cuda
from hotloop.harness.settings import PRESETS, batch_divisor
from hotloop.harness.single import preset_here
from hotloop.harness.training.conditions import SLOWED, clock_words, clocks

__all__ = ["Check", "checks", "main"]

NEEDED_BYTES = 2 << 30


class Check(NamedTuple):
    """One line of the doctor's: what was looked at, whether it is fine, what was found and how to mend it."""

    name: str
    fine: bool
    found: str


def checks() -> Iterator[Check]:
    """All that can be told without the kernels and without an agent."""
    yield Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer is needed)")
    yield _versions()
    yield from _packages()
    try:
        gpu = chosen()
    except DeviceError as e:
        gpu = None
        yield Check("gpu", False, str(e))
    else:
        yield _gpu(gpu)
    device = "cuda" if gpu else "cpu"
    yield _preset()
    if gpu:
        yield from _needs(gpu)
        yield from _conditions(gpu)
        yield _cuda(gpu)
    yield Check(
        "repeatable", True, "trainings are asked to repeat to the bit; what that costs: hotloop bench determinism"
    )
    yield Check("cpu", True, f"{cpu_name()}, {os.cpu_count()} cores, {threads_default()} threads by default")
    git = shutil.which("git")
    yield Check("git", git is not None, git or "not found; install git")
    yield from _sandbox(device, gpu)
    yield from _user_namespaces()
    free = shutil.disk_usage(Path.cwd()).free
    yield Check("disk", free > NEEDED_BYTES, f"{free / 2**30:.1f} GiB free here; a night wants 2 GiB")
    try:
        yield Check("seal", True, verify_seal()[:16])
    except HotloopError as e:
        yield Check("seal", False, str(e))
    try:
        mine = preset_here()
    except DeviceError:  # the line on the preset says so
        mine = ""
    for preset in PRESETS.values():
        path = default_data_dir(preset.source, preset.seq_len, preset.vocab_size)
        if not path.exists():
            words = f"not prepared; run: hotloop prepare --preset {preset.name}"
            yield Check(f"data {preset.name}", preset.name != mine, words)
            continue
        try:
            dataset = load_dataset(path)
            dataset.verify()
            rows = ", ".join(f"{s} {len(dataset.rows(s)):,}" for s in ("train", "val", "holdout"))
            yield Check(f"data {preset.name}", True, f"{path} (rows: {rows})")
        except HotloopError as e:
            yield Check(f"data {preset.name}", False, str(e))


def _packages() -> Iterator[Check]:
    """What hotloop requires and does not find."""
    try:
        required = importlib.metadata.requires("hotloop") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("hotloop", False, "not installed; run in its folder: pip install -e .")
        return
    for line in required:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if "extra ==" not in line:
                yield Check(name, False, f"not installed; run: {MAKE_FIT}")


def _gpu(gpu: Gpu | None) -> Check:
    """The one that is used, whether anything speaks against it, and how many others there are."""
    if gpu is None:
        return Check("gpu", True, "none; the laptop preset runs on the CPU")
    more = f"; {n} more, to be chosen by CUDA_VISIBLE_DEVICES" if (n := len(gpus()) - 1) else ""
    facts = gpu.as_dict()
    words = f"{gpu}, {facts['memory']}, driver {facts['driver'] or 'unknown'}{more}"
    try:
        usable(gpu)
    except DeviceError as e:
        return Check("gpu", False, str(e))
    return Check("gpu", True, words)


def _needs(gpu: Gpu) -> Iterator[Check]:
    """What Triton compiles with, and whether the driver stays loaded."""
    for name, trouble in (("Python.h", header_trouble()), ("compiler", compiler_trouble() or compiles())):
        yield Check(name, not trouble, trouble or "found")
    if nvml.persistent(gpu) is False:
        yield Check(
            "persistence", False, "persistence mode is off, so the driver unloads whenever nobody uses the GPU, which "
            "costs seconds; run as root: nvidia-smi -pm 1 (on the host, where this is a container)",
        )  # fmt: skip


def _preset() -> Check:
    """What `--preset auto` takes here, and why."""
    try:
        name = preset_here()
        memory_gib = gpu_memory_gib()
    except DeviceError as e:
        return Check("preset", False, str(e))
    if memory_gib is None:
        return Check("preset", True, f"{name} (no GPU)")
    rows = f"1/{batch_divisor(memory_gib)} of" if batch_divisor(memory_gib) > 1 else "all of"
    return Check("preset", True, f"{name}, with {rows} DEVICE_BATCH_SIZE a pass ({memory_gib:.0f} GiB of GPU memory)")


def _conditions(gpu: Gpu) -> Iterator[Check]:
    """The GPU's clocks, what holds them back, and who computes there now."""
    now = clocks(gpu)
    if now is None:
        yield Check("clocks", False, "the driver does not tell them; records cannot say whether they fell")
    else:
        held = [r for r in now["reasons"] if r in SLOWED]
        yield Check("clocks", not held, clock_words(now) + ("; cool it, or look at its power supply" if held else ""))
    found = strangers(gpu)
    words = f"computing there: {'; '.join(found[:3])}; end them before a night" if found else "nobody computes there"
    if not found and nvml.processes(gpu) is None:
        words = "the driver does not tell who computes there; see to it that nobody else does"
    yield Check("gpu use", not found, words)


# Settings of the kernel that keep an ordinary user's bubblewrap from working, so that L3 falls to L1.
_NO_NAMESPACES = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor (as of Ubuntu 24.04)",
     "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("kernel/unprivileged_userns_clone", "0", "Debian's kernel", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "the kernel", "sysctl -w user.max_user_namespaces=10000"),
)  # fmt: skip


def _user_namespaces(root: Path = Path("/proc/sys")) -> Iterator[Check]:
    """Why bubblewrap may not work for an ordinary user, where the machine's settings are the reason."""
    for path, bad, who, command in _NO_NAMESPACES:
        with contextlib.suppress(OSError):
            if (root / path).read_text().strip() == bad and os.geteuid() != 0 and best().level < 3:
                yield Check(
                    "namespaces", False, f"{who} keeps users from namespaces, so the sandbox is not L3 (at L1 one "
                    f"thread compiles); run as root: {command} (to keep it: in /etc/sysctl.d/60-hotloop.conf)",
                )  # fmt: skip


def _sandbox(device: str, gpu: Gpu | None) -> Iterator[Check]:
    """The best level in which the device works, what is in the way of better ones, and what a probe tried."""
    if gpu and others(gpu):  # somebody's run would be slowed by a probe
        device, gpu = "cpu", None
    try:
        sandbox = best(device=device, gpu=gpu)
    except HotloopError as e:
        yield Check("sandbox", False, str(e))
        return
    yield Check("sandbox", sandbox.level == 3, str(sandbox))
    for level, why in sandbox.missing.items():
        yield Check(f"  not {level.split(' ')[0]}", True, why)
    if sandbox.level == 1:
        yield Check("  compiling", True, "by one process: at L1 torch's pool of compile processes cannot run")
    for name, stopped in sandbox.probes.items():
        yield Check("  probe", stopped, f"{name}: {'stopped' if stopped else 'NOT stopped'}")


def _versions() -> Check:
    build = torch_build()
    if build is None:
        return Check("torch", False, f"not installed; run: {MAKE_FIT}")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    what = f"CUDA {build.cuda}" if build.cuda else "ROCm, which is not supported" if build.hip else "CPUs"
    text = f"{build.version} for {what}, with triton {triton}"
    wanted = TESTED.get(build.version.split("+")[0])
    if wanted is None:
        return Check(
            "torch", not build.hip, f"{text} (tested: {', '.join(f'{a} with {b}' for a, b in TESTED.items())})"
        )
    return Check(
        "torch", triton == wanted and not build.hip, text if triton == wanted else f"{text}; it needs {wanted}"
    )


def _cuda(gpu: Gpu) -> Check:
    """A real product on the device, outside of any sandbox; the driver's word alone proves little."""
    if found := others(gpu):
        return Check("cuda", True, f"not tried beside what computes there ({'; '.join(found[:3])})")
    try:
        touch(gpu)
        return Check("cuda", True, f"works, {probe_cuda(best(0, gpu=gpu)):.1f} s to a first product")
    except HotloopError as e:
        return Check("cuda", False, str(e))


def main(args: argparse.Namespace | None = None, more: Iterable[Check] = ()) -> int:
    """Print every check, and `more`; 0 when all are fine, 1 otherwise."""
    bad = 0
    for name, fine, found in itertools.chain(checks(), more):
        bad += not fine
        print(f"{'ok ' if fine else 'BAD'}  {name:<13} {found}")
    print("all is fine" if not bad else f"{bad} problem{'s' * (bad > 1)}")
    return 1 if bad else 0
