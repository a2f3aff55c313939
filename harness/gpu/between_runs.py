"""The GPU between two runs: nobody else on it, nothing left in its memory, and CUDA awake before the first child.

    python -I -m hotloop.harness.gpu.between_runs clear     clears all free memory, prints how many MiB
    python -I -m hotloop.harness.gpu.between_runs touch     initialises CUDA, prints its version and the GPU's memory

Both are processes of their own, of trusted code and outside of any sandbox, through the driver's own library (ctypes)
without torch: a context takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
import time
from typing import Any

from hotloop.harness.errors import DeviceError
from hotloop.harness.gpu import nvml
from hotloop.harness.gpu.devices import chosen
from hotloop.harness.gpu.neighbours import others
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.paths import SAME_CODE, import_root

__all__ = ["alone", "clear", "clear_memory", "cure", "fresh", "others", "touch", "touch_cuda"]

_CHUNK = 1 << 30
_LEAST = 1 << 20  # what is left below this is the driver's own fragments
# What to do about an error of the driver's library, by its number in cuda.h.
_CURES = {
    3: "the driver is shutting down; start again",
    34: "it is only the driver's stub; take the CUDA toolkit's stubs out of LD_LIBRARY_PATH",
    46: "it is busy or its compute mode is exclusive; end what computes there, or run as root: nvidia-smi -c DEFAULT",
    100: "CUDA sees no device; check CUDA_VISIBLE_DEVICES, the rights on /dev/nvidia*, and in a container --gpus all",
    101: "CUDA knows no device of this uuid; where MIG has divided the card, name a slice in CUDA_VISIBLE_DEVICES",
    304: "the system refused a call; is /dev/nvidia-uvm there and open to this user? run as root: modprobe nvidia_uvm",
    802: "the links between the GPUs are not ready; run as root: systemctl start nvidia-fabricmanager",
    803: "the driver and its library are of different versions; reboot",
    804: "the compatibility package of CUDA in LD_LIBRARY_PATH does not fit this GPU; take it out",
    999: "the driver failed, as after a suspend; run as root: modprobe -r nvidia_uvm && modprobe nvidia_uvm, or reboot",
}


def fresh(device: str, wait_s: float = 20.0, gpu: Gpu | None = None) -> None:
    """Before each child on a GPU: nobody else computes on it, and its free memory is clear. Nothing on a CPU.

    A child's leftovers could tell the next one what it must not know: evaluator A has every true token.

    Args:
        gpu: the one that is meant; None for the chosen one.

    Raises:
        DeviceError: it is lost, somebody else stays on it, or its memory cannot be cleared.
    """
    if device != "cuda":
        return
    gpu = gpu or chosen()
    alone(gpu, wait_s)
    clear(gpu)


def alone(gpu: Gpu | None, wait_s: float = 20.0) -> None:
    """Wait until nobody computes on it. Raises DeviceError: somebody stays, or the GPU is lost."""
    deadline = time.monotonic() + wait_s
    while found := others(gpu):
        if time.monotonic() > deadline:
            cure = "end them and start again"
            if any("nvidia-cuda-mps" in words for words in found):
                cure = "end NVIDIA's MPS: echo quit | nvidia-cuda-mps-control"
            raise DeviceError(f"other processes compute on the GPU ({'; '.join(found[:3])}); {cure}")
        time.sleep(0.5)
    if gpu and (words := nvml.lost(gpu)):
        raise DeviceError(f"{gpu} is gone ({words}); see: dmesg | grep -i xid; then reset it (nvidia-smi -r) or reboot")


def clear(gpu: Gpu | None = None) -> int:
    """Clear the GPU's free memory in a process of its own; MiB cleared.

    Raises:
        DeviceError: the driver refuses, or it takes longer than a minute.
    """
    return int(_call("clear", gpu, 60.0, "the GPU's memory could not be cleared"))


@functools.cache
def touch(gpu: Gpu | None) -> dict[str, int]:
    """Initialise CUDA once a process, outside of any sandbox; `cuda` (such as 13000) and `memory` in bytes.

    After a boot the driver makes /dev/nvidia-uvm only then, and no sandbox can hold a file that is not there yet.

    Raises:
        DeviceError: CUDA does not work on it; one line with the cure.
    """
    found: dict[str, int] = json.loads(_call("touch", gpu, 120.0, f"CUDA does not work on {gpu or 'the GPU'}"))
    return found


def _call(what: str, gpu: Gpu | None, limit_s: float, failed: str) -> str:
    code = SAME_CODE + "from hotloop.harness.gpu.between_runs import main; sys.exit(main(sys.argv[2]))"
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu.uuid} if gpu else {})
    command = [sys.executable, "-I", "-S", "-c", code, import_root(), what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=env)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{failed} within {limit_s:.0f} s; is the device stuck? see: nvidia-smi") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise DeviceError(f"{failed} ({words}); see: nvidia-smi")
    return done.stdout


def cure(code: int) -> str:
    """A CUDA error of the driver's library in words, with what to do where that is known."""
    return f"CUDA error {code}" + (f": {_CURES[code]}" if code in _CURES else "")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise DeviceError(f"{what} failed with {cure(result)}")


def touch_cuda(cuda: Any) -> dict[str, int]:
    """Initialise CUDA; what `touch` returns. Raises DeviceError."""
    device, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    _check(cuda.cuInit(0), "cuInit")
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(cuda.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "cuDeviceTotalMem")
    return {"cuda": version.value, "memory": memory.value}


def clear_memory(cuda: Any) -> int:
    """Allocate all free memory in falling sizes, set it to zero, give it back; bytes cleared.

    Args:
        cuda: the driver's library, or something with its functions.

    Raises:
        DeviceError: a call failed.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(cuda.cuInit(0), "cuInit")
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    blocks: list[Any] = []
    total, size = 0, _CHUNK
    while size >= _LEAST:
        pointer = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)) != 0:
            size //= 2
            continue
        blocks.append(pointer)
        _check(cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size)), "cuMemsetD8")
        total += size
    _check(cuda.cuCtxSynchronize(), "cuCtxSynchronize")
    for pointer in blocks:
        _check(cuda.cuMemFree_v2(pointer), "cuMemFree")
    return total


def main(what: str) -> int:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        print(json.dumps(touch_cuda(cuda)) if what == "touch" else clear_memory(cuda) >> 20)
    except (OSError, DeviceError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
