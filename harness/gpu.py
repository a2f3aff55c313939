"""The GPU between two runs: nobody else on it, and nothing left in its memory. Run as a process of its own.

    python -I -m harness.gpu      clears all free memory, prints how many MiB

Through the driver's own library (ctypes), without torch: a context takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

from harness.errors import DeviceError
from harness.machine import Gpu, nvidia_smi
from harness.walls import project_root

__all__ = ["clear", "clear_memory", "fresh", "others"]

_CHUNK = 1 << 30
_LEAST = 1 << 20  # what is left below this is the driver's own fragments


def fresh(device: str, wait_s: float = 20.0, gpu: Gpu | None = None) -> None:
    """Before each child on a GPU: nobody else computes on it, and its free memory is clear. Nothing on a CPU.

    A child's leftovers could tell the next one what it must not know: evaluator A has every true token.

    Args:
        gpu: the one that is meant, where there are several; None for the first, and nobody else on any.

    Raises:
        DeviceError: somebody else stays on the GPU, or its memory cannot be cleared.
    """
    if device != "cuda":
        return
    deadline = time.monotonic() + wait_s
    while found := others(gpu):
        if time.monotonic() > deadline:
            raise DeviceError(f"other processes compute on the GPU ({'; '.join(found[:3])}); end them and start again")
        time.sleep(0.5)
    clear(gpu)


def others(gpu: Gpu | None = None) -> list[str]:
    """Processes that compute on the GPU now, as `pid name`. Between two runs there must be none of ours."""
    rows = nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    return [" ".join(row[1:]) for row in rows if gpu is None or row[0] == gpu.uuid]


def clear(gpu: Gpu | None = None) -> int:
    """Clear the GPU's free memory in a process of its own; MiB cleared.

    Raises:
        DeviceError: the driver refuses, or it takes longer than a minute.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from harness.gpu import main; sys.exit(main())"
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu.uuid} if gpu else {})
    command = [sys.executable, "-I", "-S", "-c", code, str(project_root())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except subprocess.TimeoutExpired:
        raise DeviceError("the GPU's memory could not be cleared within a minute; is the device stuck?") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
        raise DeviceError(f"the GPU's memory could not be cleared ({words}); see: nvidia-smi")
    return int(done.stdout)


def clear_memory(cuda: Any) -> int:
    """Allocate all free memory in falling sizes, set it to zero, give it back; bytes cleared.

    Args:
        cuda: the driver's library, or something with its functions.

    Raises:
        DeviceError: a call failed.
    """

    def check(result: int, what: str) -> None:
        if result != 0:
            raise DeviceError(f"{what} failed with CUDA error {result}")

    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda.cuInit(0), "cuInit")
    check(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    blocks: list[Any] = []
    total, size = 0, _CHUNK
    while size >= _LEAST:
        pointer = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)) != 0:
            size //= 2
            continue
        blocks.append(pointer)
        check(cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size)), "cuMemsetD8")
        total += size
    check(cuda.cuCtxSynchronize(), "cuCtxSynchronize")
    for pointer in blocks:
        check(cuda.cuMemFree_v2(pointer), "cuMemFree")
    return total


def main() -> int:
    try:
        print(clear_memory(ctypes.CDLL("libcuda.so.1")) >> 20)
    except (OSError, DeviceError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
