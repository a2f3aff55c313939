"""The GPU architectures that the project knows, in one table: what is offered, compiled in the gate and tuned.

Shared memory is the limit by which a launch configuration fits one card and not another (CUDA C++ programming guide,
compute capabilities): two stages of what an H100 holds are all that an RTX 5090 has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ARCHITECTURES", "BY_DESCRIPTORS", "MAJORS", "Architecture", "serves_descriptors"]


class Architecture(NamedTuple):
    """One compute capability.

    Attributes:
        shared: bytes of shared memory that a block can get.
        threads: that a multiprocessor holds.
        matrix_instruction: the PTX of its tensor cores, as Triton writes it.
        card: a GPU of it by its CUDA name.
        multiprocessors, memory_gib: of that GPU.
    """

    shared: int
    threads: int
    matrix_instruction: str
    card: str
    multiprocessors: int
    memory_gib: int


# By 10 * major + minor.
ARCHITECTURES = {
    80: Architecture(166_912, 2048, "mma.sync", "NVIDIA A100-SXM4-80GB", 108, 80),
    86: Architecture(101_376, 1536, "mma.sync", "NVIDIA GeForce RTX 3090", 82, 24),
    89: Architecture(101_376, 1536, "mma.sync", "NVIDIA GeForce RTX 4090", 128, 24),
    90: Architecture(232_448, 2048, "wgmma.mma_async", "NVIDIA H100 80GB HBM3", 132, 80),
    100: Architecture(232_448, 2048, "tcgen05.mma", "NVIDIA B200", 148, 180),
    120: Architecture(101_376, 1536, "mma.sync", "NVIDIA GeForce RTX 5090", 170, 32),
}
MAJORS = tuple(sorted({capability // 10 for capability in ARCHITECTURES}))
# By default, large tiles by TMA descriptors where the accumulator is the tensor core's and shared memory has room for
# them, smaller ones by pointers elsewhere: sm_120 has TMA, and neither of the two.
BY_DESCRIPTORS = (90, 100)


def serves_descriptors() -> bool:
    """Whether this process's GPU takes the default configurations by descriptors; its minor version does not matter."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] * 10 in BY_DESCRIPTORS
