"""The fast operations that train.py calls.

Shapes: B batch, T time, D model, H heads, K head dim, V vocab, M = B*T. Each function here has a reference of the same
name and signature in `kernels.reference`, which is its specification and what runs where no faster implementation can.
Which one runs is chosen by capability and shown by `implementations()`; `HOTLOOP_KERNELS` asks for others (see
`kernels.dispatch`), and `HOTLOOP_ATTENTION` for one of attention's many (see `kernels.attend`). What is asked for
and cannot run is an error.
"""

from __future__ import annotations

from hotloop.kernels.adamw import adamw_
from hotloop.kernels.attend import attention, document_offsets
from hotloop.kernels.dispatch import KernelError, compiled, implementations
from hotloop.kernels.fp8 import linear_fp8
from hotloop.kernels.linear_cross_entropy import softcap_linear_cross_entropy
from hotloop.kernels.linear_qkv import linear_qkv_rope_norm
from hotloop.kernels.mlp import mlp_relu2
from hotloop.kernels.muon import muon_
from hotloop.kernels.norm_mlp import norm_mlp_relu2
from hotloop.kernels.norm_qkv import norm_linear_qkv
from hotloop.kernels.qkv import qkv_rope_norm
from hotloop.kernels.reference import apply_rope_norm, rms_norm
from hotloop.kernels.residual_linear import linear_residual
from hotloop.kernels.residual_norm import residual_rms_norm
from hotloop.kernels.residual_stream import Norm, Squares, normalized, squares
from hotloop.kernels.softcap_cross_entropy import softcap_cross_entropy_
from hotloop.kernels.token_embedding import TokenOrder, embedding, token_order
from hotloop.kernels.weight_gradient import linear

__all__ = [
    "KernelError",
    "Norm",
    "Squares",
    "TokenOrder",
    "adamw_",
    "apply_rope_norm",
    "attention",
    "compiled",
    "document_offsets",
    "embedding",
    "implementations",
    "linear",
    "linear_fp8",
    "linear_qkv_rope_norm",
    "linear_residual",
    "mlp_relu2",
    "muon_",
    "norm_linear_qkv",
    "norm_mlp_relu2",
    "normalized",
    "qkv_rope_norm",
    "residual_rms_norm",
    "rms_norm",
    "softcap_cross_entropy_",
    "softcap_linear_cross_entropy",
    "squares",
    "token_order",
]
