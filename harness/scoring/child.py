"""An evaluator process: builds the model, loads the weights, runs it over rows. Knows no score.

    nll     evaluator A: rows [B, T + 1] in, per-token NLL float32 [B, T] out (nats)
    logits  evaluator B: rows [B, T] and one cut each in, logits float32 [B, V] at the cuts out

    prepare -> ready      imports of ours and of libraries; it may wait here for as long as a training
    job, weights -> set   torch as the job wants it
    begin -> loaded       from here on it runs code of train.py: its import, the model, the loading
    rows -> answer        in batches, a few ahead of the answers and never all at once
    end -> done

It runs the agent's code, so the parent believes nothing of it; see `harness.scoring.evaluation`. All of that code runs
under torch's inference mode: nothing is to be learnt here, and what tries to fails in plain words.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback
from collections import deque
from typing import Any

from hotloop.harness.sandbox.wire import Closed, Wire
from hotloop.harness.training.child import SOURCE_S, failure, load_train_module, make_ready, prepare_torch

__all__ = ["child_main", "logits_of", "spare_bytes"]


def child_main(wire: Wire, memories: list[int]) -> None:
    try:
        _evaluate(wire, memories)
        wire.recv()  # the parent kills us; it never answers
    except Closed:
        os._exit(0)  # it is not needed any more
    except BaseException as e:
        traceback.print_exc()
        sys.stderr.flush()
        status, reason = ("invalid", str(e)) if isinstance(e, _TooMuchBesideError) else failure(e)
        wire.send("error", status=status, reason=reason)
        os._exit(1)


def _evaluate(wire: Wire, memories: list[int]) -> None:
    make_ready(wire.recv()["modules"])
    wire.send("ready")
    job = wire.recv()
    weights = bytes(wire.recv_bytes(job["weights_bytes"], SOURCE_S))
    if job["spec"]["device"] == "cpu":  # an evaluation is shorter than a compilation
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch = prepare_torch(job["spec"], job["threads"])
    wire.send("set")
    wire.recv()
    with torch.inference_mode():
        model = _loaded(job, weights)
        del weights
        wire.send("loaded")
        _answer(wire, model, job, *(mmap.mmap(fd, 0) for fd in memories))
    wire.send("done")


def _loaded(job: dict[str, Any], weights: bytes) -> Any:
    import safetensors.torch

    from hotloop.harness.settings import Spec
    from hotloop.harness.training.run import load_weights

    model = load_train_module().build_model(Spec(**job["spec"]))
    if (spare := spare_bytes(model)) > job["spare_bytes"]:
        raise _TooMuchBesideError(
            f"the weights have {spare:,} bytes that are no parameters of the model (buffers); {job['spare_bytes']:,} "
            f"are allowed, and register_buffer(..., persistent=False) keeps what build_model can make again out of them"
        )
    load_weights(model, safetensors.torch.load(weights))
    return model.eval().requires_grad_(False)


def spare_bytes(model: Any) -> int:
    """Bytes of a model's `state_dict` that are none of its parameters."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(getattr(value, "nbytes", 0) for name, value in model.state_dict().items() if name not in own)


def _answer(wire: Wire, model: Any, job: dict[str, Any], rows_in: mmap.mmap, answers: mmap.mmap) -> None:
    import numpy as np
    import torch

    from hotloop.harness.settings import Spec
    from hotloop.harness.training.run import on_device

    spec = Spec(**job["spec"])
    width, width_out, batch = job["width"], job["width_out"], job["batch_rows"]
    waiting: deque[tuple[int, Any, Any]] = deque()

    def answer() -> None:
        slot, out, event = waiting.popleft()
        if event is not None:
            event.synchronize()
        to = np.frombuffer(answers, dtype=np.float32, count=out.numel(), offset=slot * batch * width_out * 4)
        to[:] = out.numpy().reshape(-1)
        wire.send("answer", slot=slot)

    while (message := wire.recv())["kind"] != "end":
        slot, count, cuts = message["slot"], message["rows"], message["cuts"]
        rows = np.frombuffer(rows_in, dtype=np.uint16, count=count * width, offset=slot * batch * width * 2)
        block = on_device(rows.reshape(count, width), spec.device)
        if cuts is None:
            out = _nll(torch, logits_of(torch, model, block[:, :-1], spec), block[:, 1:])
        else:
            at = on_device(np.asarray(cuts, dtype=np.uint16), spec.device)
            out = logits_of(torch, model, block, spec)[torch.arange(count, device=spec.device), at].float()
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


def logits_of(torch: Any, model: Any, tokens: Any, spec: Any) -> Any:
    """What the model says, [B, T, V]. Raises TypeError where it says something else."""
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


class _TooMuchBesideError(Exception):
    """What was submitted holds more than parameters."""
