"""Operations of one step, counted by torch's own counter.

torch.utils.flop_counter counts matrix products and attention (2 operations a multiply-add). It has no formula for
the CPU's attention operator, so that one is given here; the kernels register theirs themselves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_flops"]


def _forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _backward(grad_out: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out, q, k, v))


def count_flops(step: Callable[[], Any]) -> int:
    """Run `step` once, eagerly, and count its operations."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # Nothing was compiled where the compiler was not imported, and importing it takes a second.
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext(), counter:
        step()
    return int(counter.get_total_flops())
