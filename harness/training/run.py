"""The trainer's side of one experiment: the `run` that train.py's `train(run)` gets.

    run.warmup(step, rows=R, restore=(model, optimizer))   compile and calibrate on synthetic tokens
    for batch in run.batches(rows=R):                      real tokens, until the budget is used
        run.log(step(batch))
    run.submit(model)                                      the weights; the clock stops when they have arrived

This code runs in the agent's process and decides nothing: clock, budget, data and score are the parent's.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from hotloop.harness.sandbox.wire import Wire
from hotloop.harness.settings import Spec
from hotloop.harness.training.feed import Ring
from hotloop.harness.training.snapshot import Snapshot as _Snapshot

__all__ = [
    "Batch",
    "NonFiniteLossError",
    "Run",
    "Submitted",
    "implementations",
    "load_weights",
    "on_device",
    "plain_name",
]


class NonFiniteLossError(RuntimeError):
    """A logged loss was NaN or infinite; the run's status is `nan`."""


class Submitted(BaseException):
    """Ends train() after the submission: nothing that runs later can count."""


@dataclass(frozen=True)
class Batch:
    """One optimizer step's data.

    Attributes:
        tokens: int64 [rows, seq_len] on the run's device.
        targets: int64 [rows, seq_len], the next token at each position.
        progress: share of the budget used before this batch, in [0, 1). The parent's figure.
        step: 0 for the first real batch.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    progress: float
    step: int


class Run:
    """One experiment, as train.py sees it. `run.spec` says what to build."""

    def __init__(self, spec: Spec, wire: Wire, ring: Ring) -> None:
        self.spec = spec
        self._wire = wire
        self._ring = ring
        self._warm: set[tuple[int, int]] = set()
        self._losses: deque[tuple[int, torch.Tensor | float, torch.cuda.Event | None]] = deque()
        self._step = -1
        self._began: _Mark | None = None  # of the first real batch

    def warmup(
        self,
        step: Callable[[Batch], Any],
        *,
        rows: int,
        seq_len: int | None = None,
        restore: tuple[Any, ...] = (),
    ) -> None:
        """Run `step` on synthetic tokens: compilation first, then the calibration of the budget.

        Call it once for every batch shape that the training will use; the first is the budget's unit.

        Args:
            step: one whole optimizer step, exactly as the training does it.
            rows: rows a step.
            seq_len: tokens a row; None for `spec.seq_len`, else a divisor of it.
            restore: modules and optimizers, and what else has a `state_dict` and a `load_state_dict`; put back
                afterwards exactly as they were. So is every generator of random numbers: Python's, NumPy's, torch's,
                and train.py's own, where its globals, `step` or what is restored lead to it.

        Raises:
            ValueError: a shape that cannot be fed.
        """
        seq_len = seq_len or self.spec.seq_len
        if self.spec.seq_len % seq_len or not Ring.fits(rows, seq_len):
            raise ValueError(
                f"cannot feed {rows} rows of {seq_len} tokens: seq_len must divide {self.spec.seq_len} and a "
                f"step must fit into 64 MiB"
            )
        saved = _Snapshot(restore, (step,))
        self._wire.send("warmup", rows=rows, seq_len=seq_len)
        flops = 0
        while True:
            message = self._next(rows, seq_len, flops)
            if message["kind"] == "calibrated":
                break
            if message["kind"] == "tidy":  # outside of what is timed: a whole collection can take a second
                _tidy()
                continue
            batch = self._batch(message, rows, seq_len)
            if message["stage"] == "count":
                from hotloop.harness.training.flops import count_flops  # slow to import, and only this needs it

                flops = count_flops(lambda: step(batch))  # noqa: B023 - called at once
            else:
                step(batch)
            self._synchronize()
        self._warm.add((rows, seq_len))
        saved.put_back()
        gc.enable()  # another shape's compilation leaves much

    def batches(self, *, rows: int | Callable[[float], tuple[int, int]]) -> Iterator[Batch]:
        """Real batches until the budget is used.

        Args:
            rows: rows a step; or, to change shape during training, a function of the progress that
                returns (rows, seq_len), each pair declared by `warmup` before.
        """
        progress = 0.0
        _tidy()
        while True:
            shape = rows(progress) if callable(rows) else (rows, self.spec.seq_len)
            if shape not in self._warm:
                raise ValueError(
                    f"a batch of {shape[0]} rows x {shape[1]} tokens was not declared by run.warmup(rows=...)"
                )
            message = self._next(*shape, 0)
            if message["kind"] == "end":
                return
            progress = message["progress"]
            self._step = message["step"]
            self._began = self._began or _Mark(self.spec.device)
            yield self._batch(message, *shape)

    def log(self, loss: torch.Tensor | float) -> None:
        """Report the loss of the step just made. Read late, so the device is never waited for.

        Raises:
            NonFiniteLossError: an earlier loss was NaN or infinite.
        """
        event = None
        if isinstance(loss, torch.Tensor):
            loss = loss.detach()
            if loss.is_cuda:
                host = torch.empty((), dtype=torch.float32, pin_memory=True)
                loss = host.copy_(loss.float(), non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            else:
                loss = loss.clone()
        self._losses.append((self._step, loss, event))
        while len(self._losses) > (2 if event is not None else 0):
            self._send_loss()

    def submit(self, model: torch.nn.Module, *, depth: int | None = None, flops_per_token: float | None = None) -> None:
        """Send the weights and end. Does not return: the parent kills this process when it has them.

        Args:
            model: its `state_dict` must load into what `build_model(spec)` returns.
            depth, flops_per_token: for the summary; they decide nothing.
        """
        while self._losses:
            self._send_loss()
        ended = _Mark(self.spec.device)
        self._synchronize()
        if self._began:
            self._wire.send("trained", device_s=ended.since(self._began))
        state = {plain_name(k): v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}
        data = safetensors.torch.save(state)
        peak_mb = torch.cuda.max_memory_allocated() / 2**20 if self.spec.device == "cuda" else None
        facts = dict(depth=depth, flops_per_token=flops_per_token, peak_mb=peak_mb)
        self._wire.send("submit", bytes=len(data), implementations=implementations(), **facts)
        self._wire.send_bytes(data)
        raise Submitted

    def _next(self, rows: int, seq_len: int, flops: int) -> dict[str, Any]:
        self._wire.send("next", rows=rows, seq_len=seq_len, flops=flops)
        if not gc.isenabled():
            gc.collect(0)  # what the last step left, here, where the parent makes the next batch ready
        while (message := self._wire.recv())["kind"] == "compiled?":
            from hotloop.harness.training.compile_cache import collect

            data = collect(message["most"])
            self._wire.send("compiled", bytes=len(data))
            self._wire.send_bytes(data)
        return message

    def _batch(self, message: dict[str, Any], rows: int, seq_len: int) -> Batch:
        data = on_device(self._ring.get(message["slot"], rows, seq_len), self.spec.device)  # the other slot is filled
        tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        return Batch(tokens, targets, message["progress"], message["step"])

    def _send_loss(self) -> None:
        step, loss, event = self._losses.popleft()
        if event is not None:
            event.synchronize()
        value = float(loss)
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss of step {step} is {value}")
        self._wire.send("log", step=step, loss=value)

    def _synchronize(self) -> None:
        if self.spec.device == "cuda":
            torch.cuda.synchronize()


class _Mark:
    """A point on the device's own clock; on a CPU on that of this process."""

    def __init__(self, device: str) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        if self._event:
            self._event.record()
        self._host_s = time.monotonic()

    def since(self, earlier: _Mark) -> float:
        """Seconds; the device must have got there."""
        if self._event and earlier._event:
            return float(earlier._event.elapsed_time(self._event)) / 1e3
        return self._host_s - earlier._host_s


def plain_name(name: str) -> str:
    """A tensor's name in a `state_dict` without what torch.compile adds to it, of the whole model or of a part."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what was submitted, whatever `build_model` compiles. Raises RuntimeError where it does not fit."""
    own = {plain_name(name): name for name in model.state_dict()}
    model.load_state_dict({own.get(name, name): value for name, value in state.items()}, strict=True)


def on_device(rows: npt.NDArray[np.uint16], device: str) -> torch.Tensor:
    """Tokens as int64 on the device, copied, without waiting for what the device does.

    A token goes there as two bytes, from pinned memory that torch gives out again only after the copy; as int16, which
    every device can widen.
    """
    data = torch.from_numpy(rows.view(np.int16))
    if device == "cuda":
        data = data.pin_memory().to("cuda", non_blocking=True)
    return data.to(torch.int64) & 0xFFFF


def implementations() -> dict[str, str]:
    """What train.py's kernels are; after its calls, what ran. Empty where it imported none."""
    kernels = sys.modules.get("hotloop.kernels")
    return kernels.implementations() if kernels else {}


def _tidy() -> None:
    """Before timed steps: no garbage collection in the middle of one, and none ever of what is there already."""
    gc.collect()
    gc.freeze()
    gc.disable()
