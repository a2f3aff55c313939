"""The pre-flight's child: rehearses a train.py in the sandbox, without data, and says what became of each stage.

`Rehearsal` is the trainer's own `Run` (its checks are those of the real run) whose parent is a script: one warm-up step
for each declared shape, a few batches whose progress goes to the end of the budget, then the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hotloop.harness.preflight.rules import ContractError, UnsubmittedError, judge
from hotloop.harness.sandbox.wire import Wire
from hotloop.harness.text import one_line
from hotloop.harness.training.child import failure, load_train_module, prepare_torch

__all__ = ["child_main"]

# Progress of the real batches. The last is near the end, so that every shape of a schedule has its turn and what
# train.py prepares late in the run (an average of weights) is there when it submits.
SHAPES_PROGRESS = (0.0, 0.5, 0.995)
STEP_PROGRESS = (0.0, 0.995)
STEPS = 1000  # batch.step counts in the same way: 0, 500, 995


def child_main(wire: Wire, memories: list[int]) -> None:
    hello = wire.recv()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for compilers that are not reached through torch.compile
    torch = prepare_torch(hello["spec"] | {"device": "cpu"}, hello["threads"])
    from hotloop.harness.preflight.fake_cuda import eager_compile

    torch.compile = eager_compile(torch.compile)
    with open("train.py", encoding="utf-8", errors="replace") as f:
        source = f.read()
    own, spec, rows = hello["own"], hello["spec"], hello["eval_rows"]
    imported = _stage(wire, source, "import", _import, "own import" if own else "import")
    if imported == "ok" and own:
        _stage(wire, source, "step", functools.partial(_step, spec, rows), "own")
    elif imported == "ok" and _stage(wire, source, "shapes", functools.partial(_shapes, spec, rows)) == "inconclusive":
        from hotloop.harness.settings import PRESETS

        small = PRESETS["laptop"]
        laptop = spec | {
            "preset": "laptop", "device": "cpu", "vocab_size": small.vocab_size, "seq_len": small.seq_len,
            "batch_divisor": 1,
        }  # fmt: skip
        _stage(wire, source, "step", functools.partial(_step, laptop, small.eval_batch_rows), "laptop")
    wire.send("end")
    sys.stdout.flush()
    os._exit(0)  # at once: nothing that train.py left behind is waited for


class _Place:
    """Where a stage is, for the judgement of what it raises."""

    def __init__(self) -> None:
        self.late = self.doubt = False
        self.at = ""

    def column(self, stage: str) -> str:
        if stage == "own":
            return "own late" if self.late else "own early"
        if stage == "shapes":
            return "doubtful" if self.doubt else "late" if self.late else "early"
        return stage


def _stage(wire: Wire, source: str, name: str, body: Callable[[_Place], None], column: str = "") -> str:
    """Run one stage and tell the parent; returns its status."""
    place = _Place()
    status, reason = "ok", ""
    try:
        body(place)
    except BaseException as e:
        traceback.print_exc()
        status = judge(e, source, place.column(column or name))
        reason = failure(e)[1]
        if isinstance(e, ContractError):
            reason = one_line(str(e), 300)
    sys.stdout.flush()
    sys.stderr.flush()
    wire.send("stage", name=name, status=status, reason=reason, did=place.at)
    return status


def _import(place: _Place) -> None:
    try:
        load_train_module()
    except AttributeError as e:
        if "train.py has no function" in str(e):
            raise ContractError(f"AttributeError: {e}") from None
        raise


def _shapes(fields: dict[str, Any], eval_rows: int, place: _Place) -> None:
    """The real sizes, and the branches that a GPU takes."""
    from hotloop.harness.preflight.fake_cuda import Pretence, pretend_cuda

    module = load_train_module()  # anew: what the file keeps in globals must not pass from one stage to the next
    mode = Pretence()
    try:
        with pretend_cuda(mode):
            _rehearse(module, fields, eval_rows, SHAPES_PROGRESS, place, real=False)
    finally:
        place.doubt = mode.doubt
    if mode.doubt:
        place.at += " (with values made up)"


def _step(fields: dict[str, Any], eval_rows: int, place: _Place) -> None:
    """Real numbers, on the CPU."""
    _rehearse(load_train_module(), fields, eval_rows, STEP_PROGRESS, place, real=True)


def _rehearse(
    module: Any, fields: dict[str, Any], eval_rows: int, progress: tuple[float, ...], place: _Place, real: bool
) -> None:
    import torch

    from hotloop.harness.scoring.child import logits_of, spare_bytes
    from hotloop.harness.settings import PRESETS, Spec
    from hotloop.harness.training.feed import synthetic_rows
    from hotloop.harness.training.run import Batch, NonFiniteLossError, Run, Submitted, load_weights, plain_name

    spec = Spec(**fields)
    done = {"warm-ups": 0, "batches": 0}

    class Rehearsal(Run):
        """The trainer's `Run`, with a script in the parent's place."""

        model: dict[str, torch.Tensor] | None = None

        def __init__(self) -> None:
            super().__init__(spec, _Mute(), None)  # type: ignore[arg-type]
            self._warming = False
            self._served = 0

        def warmup(self, *args: Any, **kwargs: Any) -> None:
            self._warming, self._served = True, 0
            super().warmup(*args, **kwargs)
            self._warming = False
            done["warm-ups"] += 1

        def submit(self, model: torch.nn.Module, **kwargs: Any) -> None:
            place.at = "submission"
            if not done["batches"]:
                raise ContractError("submitted without having taken a batch")
            if real:
                while self._losses:
                    self._send_loss()
            state = model.state_dict()
            if wrong := [k for k, v in state.items() if not isinstance(v, torch.Tensor)]:
                raise ContractError(f"run.submit takes a module; {wrong[0]!r} of its state_dict is no tensor")
            # As Run.submit does it.
            self.model = {plain_name(k): v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
            raise Submitted

        def _next(self, rows: int, seq_len: int, flops: int) -> dict[str, Any]:
            self._served += 1
            batch = {"kind": "batch", "slot": 0, "step": 0, "progress": 0.0, "stage": "compile"}
            if self._warming:
                place.at = f"warm-up of {rows} x {seq_len} tokens"
                return batch if self._served == 1 else {"kind": "calibrated"}
            if done["batches"] == len(progress):
                return {"kind": "end"}
            at = progress[done["batches"]]
            place.late = done["batches"] > 0
            done["batches"] += 1
            place.at = f"batch of {rows} x {seq_len} tokens at progress {at:g}"
            return batch | {"step": int(at * STEPS), "progress": at, "stage": "train"}

        def _batch(self, message: dict[str, Any], rows: int, seq_len: int) -> Batch:
            if real:
                data = torch.from_numpy(synthetic_rows(rows, seq_len, spec.vocab_size, done["batches"]).astype("int64"))
            else:
                data = torch.zeros(rows, seq_len + 1, dtype=torch.int64)
            tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
            return Batch(tokens, targets, message["progress"], message["step"])

        def _send_loss(self) -> None:
            if real:
                super()._send_loss()
            else:
                self._losses.popleft()

        def _synchronize(self) -> None: ...

    run = Rehearsal()
    place.at = "set-up"
    with contextlib.suppress(Submitted):
        module.train(run)
    if run.model is None:
        raise UnsubmittedError("train() ended without submitting weights")
    place.at, place.late = "evaluation", False
    with torch.inference_mode():  # as the evaluators do
        model = module.build_model(spec)
        if (spare := spare_bytes(model)) > (most := PRESETS[spec.preset].limits.spare_bytes):
            raise ContractError(f"the weights have {spare:,} bytes of buffers; {most:,} are allowed (persistent=False)")
        try:
            load_weights(model, run.model)
        except RuntimeError as e:
            raise ContractError(f"the submitted weights do not load into build_model(spec): {e}") from e
        model.eval().requires_grad_(False)
    tokens = torch.zeros(eval_rows, spec.seq_len, dtype=torch.int64)
    if real:
        tokens = torch.from_numpy(synthetic_rows(eval_rows, spec.seq_len - 1, spec.vocab_size, 99).astype("int64"))
    with torch.inference_mode():
        logits = model(tokens)
        try:
            logits_of(torch, lambda _: logits, tokens, spec)
        except TypeError as e:
            raise ContractError(f"while evaluating: {e}") from None
        if real and not torch.isfinite(logits).all():
            raise NonFiniteLossError("the model's logits are not finite")
    place.at = f"{done['warm-ups']} warm-ups, {done['batches']} batches, submission, evaluation"


class _Mute:
    """A wire that nobody reads."""

    def send(self, kind: str, **fields: Any) -> None: ...

    def send_bytes(self, data: bytes) -> None: ...
