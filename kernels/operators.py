"""Every operator by its name in `reference`, for what proves and times them: each runs its kernels, and asks nobody."""

from __future__ import annotations

from hotloop.kernels.attend import attention
from hotloop.kernels.block.mlp import mlp, mlp_alone
from hotloop.kernels.block.qkv import qkv
from hotloop.kernels.block.residual import residual
from hotloop.kernels.fp8 import linear_fp8
from hotloop.kernels.gemm.weight_gradient import linear
from hotloop.kernels.head.cross_entropy import kernel_loss as loss
from hotloop.kernels.head.embedding import embedding
from hotloop.kernels.optimizer.adamw import adamw_
from hotloop.kernels.optimizer.muon import muon_

__all__ = [
    "adamw_",
    "attention",
    "embedding",
    "linear",
    "linear_fp8",
    "loss",
    "mlp",
    "mlp_alone",
    "muon_",
    "qkv",
    "residual",
]
