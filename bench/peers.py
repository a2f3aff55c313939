"""Other people's kernels for the operators of the table, where they are installed.

A peer is a function with the operator's signature. One that is not installed is left out and said so; one that is
installed and fails to import, or gives a wrong answer, is reported with its reason and gets no time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hotloop import kernels
from hotloop.harness.text import one_line
from hotloop.kernels import attend
from hotloop.kernels.attend.backends import BACKENDS

__all__ = ["PEERS", "available"]

Function = Callable[..., Any]


def _liger_loss() -> Function:
    fused = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def run(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = 15.0) -> Tensor:
        # input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap
        out = fused.apply(x, weight, targets, None, None, -1, 0.0, 0.0, "mean", softcap)
        loss: Tensor = out[0] if isinstance(out, tuple) else out
        return loss

    return run


def _attention(backend: str) -> Callable[[], Function]:
    def load() -> Function:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if why := attend.backends(device)[1].get(backend):
            raise kernels.KernelError(why)
        return functools.partial(kernels.attention, backend=backend)

    return load


# operator -> name -> (module whose presence decides, loader)
PEERS: dict[str, dict[str, tuple[str, Callable[[], Function]]]] = {
    "loss": {"liger": ("liger_kernel", _liger_loss)},
    "attention": {name: ("torch", _attention(name)) for name in BACKENDS if name != "triton"},
}


def available(operator: str) -> tuple[dict[str, Function], dict[str, str]]:
    """(peers that load, those that do not with one line each)."""
    loaded: dict[str, Function] = {}
    missing: dict[str, str] = {}
    for name, (module, load) in PEERS.get(operator, {}).items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            missing[name] = f"not installed (no module {e.name})"
            continue
        except Exception as e:  # a broken install raises anything
            missing[name] = f"fails to import: {type(e).__name__}: {one_line(str(e), 160)}"
            continue
        try:
            loaded[name] = load()
        except kernels.KernelError as e:
            missing[name] = str(e)
        except Exception as e:
            missing[name] = f"fails to load: {type(e).__name__}: {one_line(str(e), 160)}"
    return loaded, missing
