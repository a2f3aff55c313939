"""One training step of a train.py on synthetic tokens, as the trainer makes it."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.harness.errors import UsageError
from hotloop.harness.machine import threads_default
from hotloop.harness.proof import device as dev
from hotloop.harness.sandbox.process import SharedMemory, child_environment
from hotloop.harness.settings import PRESETS, Spec
from hotloop.harness.training.child import load_train_module, prepare_torch
from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring, synthetic_rows
from hotloop.harness.training.run import Batch, Run
from hotloop.kernels.dispatch import implementations

__all__ = ["Step", "settle", "step_of", "time_step"]


class _Captured(Exception):
    """Carries the step out of train()."""


class _Mute:
    """A wire that nobody reads."""

    def send(self, kind: str, **fields: Any) -> None: ...


class _Run(Run):
    """The trainer's own `Run` without a parent: `warmup` takes train.py's step and ends train()."""

    def __init__(self, spec: Spec) -> None:
        self._memory = SharedMemory(SLOTS * SLOT_BYTES)
        super().__init__(spec, _Mute(), Ring(self._memory))  # type: ignore[arg-type]

    def warmup(self, step: Callable[[Batch], Any], *, rows: int, seq_len: int | None = None, restore: Any = ()) -> None:
        raise _Captured(step, rows, seq_len or self.spec.seq_len, restore)

    def restart(self) -> None:
        self._step = -1

    def whole(self, step: Callable[[Batch], Any], rows: int, seq_len: int) -> Callable[[], Any]:
        """What the trainer does from one batch to the next, but for the words with its parent; returns the loss."""
        for slot in range(SLOTS):
            self._ring.put(slot, synthetic_rows(rows, seq_len, self.spec.vocab_size, slot))

        def once() -> Any:
            self._step += 1
            message = {"slot": self._step % SLOTS, "progress": 0.25, "step": 10}
            loss = step(self._batch(message, rows, seq_len))
            if loss is not None:
                self.log(loss)
            return loss

        return once


def settle(repeatable: bool = True, threads: int = 0) -> None:
    """Set this process up as a trainer's, as far as that can be done after torch was imported."""
    threads = threads or threads_default()
    os.environ.update(child_environment(threads, repeatable))
    prepare_torch({"seed": 1, "device": str(dev.device())}, threads, repeatable)


@dataclass(frozen=True)
class Step:
    """One step of a train.py on synthetic tokens.

    Attributes:
        once: makes one, and returns its loss where train.py's step does.
        tokens: of one.
        restore: the modules and optimizers that train.py names to `run.warmup`.
        restart: the tokens begin from the first again.
    """

    once: Callable[[], Any]
    tokens: int
    restore: tuple[Any, ...]
    restart: Callable[[], None]


def step_of(path: Path, preset: str, divisor: int = 1) -> Step:
    """A step as the trainer makes it.

    Args:
        divisor: of the rows of a pass; see Spec.

    Raises:
        UsageError: a train.py that does not call run.warmup.
    """
    on_gpu = torch.cuda.is_available()
    chosen = PRESETS[preset]
    spec = Spec(preset, "cuda" if on_gpu else "cpu", 1, chosen.vocab_size, chosen.seq_len, divisor)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    implementations()  # packages are tried before anything is compiled
    module, run = load_train_module(str(path)), _Run(spec)
    try:
        module.train(run)
    except _Captured as e:
        step, rows, seq_len, restore = e.args
    else:
        raise UsageError(f"{path}: train(run) ended without calling run.warmup, so there is no step to profile")
    return Step(run.whole(step, rows, seq_len), rows * seq_len, restore, run.restart)


def time_step(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of `steps` steps, after as many that are not counted."""
    for _ in range(steps):
        step()
    marks = [dev.now()]
    for _ in range(steps):
        step()
        marks.append(dev.now())
    return float(statistics.median(b - a for a, b in itertools.pairwise(marks)))
