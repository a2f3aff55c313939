"""The GPU architectures that the project knows, in one table: what a block of threads can get, and an example card.

Kernels are offered, compiled in the gate and tuned for these. Shared memory is the one limit by which a launch
configuration fits one card and not another of the same kind (CUDA C++ programming guide, compute capabilities).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ARCHITECTURES", "Architecture", "capability", "shared_limit"]


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
