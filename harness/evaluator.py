"""An evaluator process: builds the model, loads the weights, runs it over rows. Knows no score.

    nll     evaluator A: rows [N, T + 1] in, per-token NLL float32 [N, T] out (nats)
    logits  evaluator B: rows [N, T] and one cut each in, logits float32 [N, V] at the cuts out

It runs the agent's code, so the parent believes neither; see `harness.evaluate`.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback
from typing import Any

from harness.process import enter
from harness.trainer import failure, load_train_module, prepare_torch
from harness.wire import Wire

__all__ = ["child_main"]


def child_main() -> None:
    wire, memories = enter()
    try:
        _evaluate(wire, memories)
        wire.recv()  # the parent kills us; it never answers
    except BaseException as e:
        traceback.print_exc()
        sys.stderr.flush()
        status, reason = failure(e)
        wire.send("error", status=status, reason=reason)
        os._exit(1)


def _evaluate(wire: Wire, memories: list[int]) -> None:
    hello = wire.recv()
    torch = prepare_torch(hello["spec"], hello["threads"])
    import numpy as np
    import safetensors.torch

    from harness.spec import Spec

    maps = [mmap.mmap(fd, 0) for fd in memories]
    weights, rows_in, out_map = maps
    spec = Spec(**hello["spec"])
    module = load_train_module()
    model = module.build_model(spec)
    model.load_state_dict(safetensors.torch.load(bytes(weights[: hello["weights_bytes"]])), strict=True)
    model.eval().requires_grad_(False)

    n, width, batch = hello["rows"], hello["width"], hello["batch_rows"]
    rows = np.frombuffer(rows_in, dtype=np.uint16, count=n * width).reshape(n, width)
    cuts = None if hello["cuts"] is None else torch.tensor(hello["cuts"], device=spec.device)
    outs: list[Any] = []
    with torch.inference_mode():
        for start in range(0, n, batch):
            block = torch.from_numpy(rows[start : start + batch].astype(np.int64)).to(spec.device)
            if cuts is None:
                tokens, targets = block[:, :-1], block[:, 1:]
                outs.append(_nll(torch, _logits(torch, model, tokens, spec), targets))
            else:
                logits = _logits(torch, model, block, spec)
                at = cuts[start : start + batch]
                outs.append(logits[torch.arange(len(block), device=spec.device), at].float())
            wire.send("progress", done=min(n, start + batch))
        result = torch.cat(outs).cpu().numpy()  # the only wait for the device
    out = np.frombuffer(out_map, dtype=np.float32, count=result.size)
    out[:] = result.reshape(-1)
    wire.send("done")


def _logits(torch: Any, model: Any, tokens: Any, spec: Any) -> Any:
    logits = model(tokens)
    want = (*tokens.shape, spec.vocab_size)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != want:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TypeError(f"the model returned {got} for tokens {tuple(tokens.shape)}; logits {want} are due")
    return logits


def _nll(torch: Any, logits: Any, targets: Any) -> Any:
    flat = logits.float().reshape(-1, logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(flat, targets.reshape(-1), reduction="none")
    return loss.view(targets.shape)
