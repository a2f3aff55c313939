"""The fast operations of train.py, most of which it need not name.

`compile` finds in a function of plain PyTorch what operators of ours compute and puts in those that the selection
names (`kernels.fuse`); attention, the optimizers' steps and products in 8 bits are called. Each operator has a
reference of the same name and signature in `kernels.reference`, which is its specification and what runs where no
faster implementation can. Which one runs is chosen by capability and shown by `implementations()`; `HOTLOOP_KERNELS`
asks for others (see `kernels.dispatch`), and `HOTLOOP_ATTENTION` for one of attention's many (see `kernels.attend`).
What is asked for and cannot run is an error.

Shapes, here and below: B batch, T time, D model, H heads, G key-value heads, K head dim, V vocab, M = B*T.
"""

from __future__ import annotations

from hotloop.kernels.attend import attention, document_offsets
from hotloop.kernels.compiler import compile
from hotloop.kernels.dispatch import KernelError, compiled, implementations
from hotloop.kernels.fp8 import linear_fp8
from hotloop.kernels.head.cross_entropy import loss
from hotloop.kernels.optimizer.adamw import adamw_
from hotloop.kernels.optimizer.muon import muon_

__all__ = [
    "KernelError",
    "adamw_",
    "attention",
    "compile",
    "compiled",
    "document_offsets",
    "implementations",
    "linear_fp8",
    "loss",
    "muon_",
]
