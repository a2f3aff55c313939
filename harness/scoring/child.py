"""An evaluator process: builds the model, loads the weights, runs it over rows. Knows no score.

    nll     evaluator A: rows [B, T + 1] in, per-token NLL float32 [B, T] out (nats)
    logits  evaluator B: rows [B, T] and one cut each in, logits float32 [B, V] at the cuts out

It says `ready` before any code of train.py has run, and `loaded` when the weights are; until then it gets no row.

Rows come in batches, a few ahead of the answers and never all at once, so what is answered first was answered without
the rest. It runs the agent's code, so the parent believes nothing of it; see `harness.scoring.evaluation`.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback
from collections import deque
from typing import Any

from hotloop.harness.sandbox.wire import Wire
from hotloop.harness.training.child import failure, load_train_module, prepare_torch

__all__ = ["child_main"]


def child_main(wire: Wire, memories: list[int]) -> None:
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
    if hello["spec"]["device"] == "cpu":  # an evaluation is shorter than a compilation
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch = prepare_torch(hello["spec"], hello["threads"])
    import numpy as np
    import safetensors.torch

    from hotloop.harness.settings import Spec
    from hotloop.harness.training.run import load_weights, on_device

    wire.send("ready")  # no code of train.py has run
    wire.recv()
    weights, rows_in, answers = (mmap.mmap(fd, 0) for fd in memories)
    spec = Spec(**hello["spec"])
    module = load_train_module()
    model = module.build_model(spec)
    with torch.inference_mode():  # nothing is to be learnt here
        load_weights(model, safetensors.torch.load(bytes(weights[: hello["weights_bytes"]])))
    model.eval().requires_grad_(False)

    width, width_out, batch = hello["width"], hello["width_out"], hello["batch_rows"]
    waiting: deque[tuple[int, Any, Any]] = deque()

    def answer() -> None:
        slot, out, event = waiting.popleft()
        if event is not None:
            event.synchronize()
        start = slot * batch * width_out * 4
        to = np.frombuffer(answers, dtype=np.float32, count=out.numel(), offset=start)
        to[:] = out.numpy().reshape(-1)
        wire.send("answer", slot=slot)

    wire.send("loaded")
    with torch.inference_mode():
        while True:
            message = wire.recv()
            if message["kind"] == "end":
                break
            slot, count, cuts = message["slot"], message["rows"], message["cuts"]
            start = slot * batch * width * 2
            rows = np.frombuffer(rows_in, dtype=np.uint16, count=count * width, offset=start).reshape(count, width)
            block = on_device(rows, spec.device)
            if cuts is None:
                tokens, targets = block[:, :-1], block[:, 1:]
                out = _nll(torch, _logits(torch, model, tokens, spec), targets)
            else:
                logits = _logits(torch, model, block, spec)
                at = on_device(np.asarray(cuts, dtype=np.uint16), spec.device)
                out = logits[torch.arange(count, device=spec.device), at].float()
            event = None
            if spec.device == "cuda":  # the next batch is launched before this one is waited for
                host = torch.empty(out.shape, dtype=torch.float32, pin_memory=True)
                out = host.copy_(out, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            waiting.append((slot, out, event))
            while len(waiting) > (1 if event is not None else 0):
                answer()
        while waiting:
            answer()
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
