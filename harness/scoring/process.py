"""An evaluator, from the parent's side: started in the sandbox, given its job, then rows and no more than a few ahead.

It may be started long before its job is there (`harness.scoring.evaluation` does so, beside the trainer's start): until
`answer` it makes imports of trusted code and waits, and no line of train.py has run in it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import TrialError
from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.policy import Policy
from hotloop.harness.sandbox.process import Child, SharedMemory
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut
from hotloop.harness.scoring.bound import Bound
from hotloop.harness.scoring.failures import failure_of
from hotloop.harness.settings import Preset, Spec
from hotloop.harness.training.prewarm import AHEAD
from hotloop.harness.training.trainer import Setup

__all__ = ["LOG_BYTES", "EvaluatorProcess", "Rows", "Take"]

Rows = npt.NDArray[np.uint16]
Take = Callable[[slice, npt.NDArray[np.float32]], None]

MODULES = ("safetensors.torch", "hotloop.kernels")  # what an evaluator, and most train.py, import
SLOTS = 3  # batches that it holds at a time: one in work, one launched behind it, one on its way
LOOK_S = 0.5  # how often one that does not answer is looked at
LOG_BYTES = 64 << 10  # of what it prints, kept once it has ended


class EvaluatorProcess:
    """One evaluator. A context manager: leaving it ends it, and what it read is dropped from the machine's memory.

    What it prints goes into memory without a name: the size of a file would tell the next one what this one knew.

    Args:
        source: the bytes of train.py, read-only in its folder.
        folder: for its scratch folder, at sandbox levels that need one.

    Attributes:
        said: what it printed, the last 64 KiB, once it has ended.
        since: what the kernel had read and taken when it got its first row, see `residency.mark`; None before.

    Raises:
        SandboxError: it cannot be started.
    """

    def __init__(self, setup: Setup, source: bytes, spec: Spec, preset: Preset, folder: Path) -> None:
        self._setup, self._source, self._spec, self._limits = setup, source, spec, preset.limits
        self._batch = preset.eval_batch_rows
        self._ready = self._served = self._closed = False
        self.said = b""
        self.since: tuple[int, int] | None = None
        self._own = tempfile.TemporaryDirectory(dir=folder, prefix="evaluator-")
        policy = Policy.of("hotloop.harness.scoring.child", Path(self._own.name), source, spec.device, self._limits)
        self._asked = SharedMemory(SLOTS * self._batch * (spec.seq_len + 1) * 2)
        self._answers = SharedMemory(SLOTS * self._batch * max(spec.seq_len, spec.vocab_size) * 4)
        self._log = os.memfd_create("log", os.MFD_CLOEXEC)
        log, descriptors = Path(f"/proc/self/fd/{self._log}"), [self._asked.fd, self._answers.fd]
        try:
            self._child = Child(setup.sandbox, policy, descriptors, log, setup.threads)
        except BaseException:
            self._free()
            raise
        self._speak(lambda: self._child.wire.send("prepare", modules=[*AHEAD[spec.device], *MODULES]))

    def wait(self) -> None:
        """Until it has made its imports. Raises TrialError."""
        if not self._ready:
            self._speak(lambda: self._expect("ready", time.monotonic() + self._limits.load_s))
            self._ready = True

    def answer(
        self,
        bound: Bound,
        weights: bytearray,
        rows: Rows,
        cuts: list[int] | None,
        take: Take,
        shown: Callable[[float], None],
    ) -> None:
        """Its one job: each batch of its answers, float32 [n, T] or with cuts [n, V], goes to `take`.

        Args:
            bound: what it may compute.
            rows: uint16 [N, T + 1], or with cuts [N, T].
            shown: told the share that is done.

        Raises:
            TrialError: the experiment's fault.
        """
        self.wait()
        self._speak(lambda: self._converse(bound, weights, rows, cuts, take, shown))

    def close(self) -> None:
        """End it; idempotent. Raises SandboxError where something of it does not end."""
        if self._closed:
            return
        self._closed = True
        try:
            self._child.kill()
            self.said = os.pread(self._log, LOG_BYTES, max(0, os.fstat(self._log).st_size - LOG_BYTES))
        finally:
            self._free()
            if self._setup.sandbox.level and self._served:
                residency.begin(self.since)  # what goes on next finds nothing of what this one knew

    def _free(self) -> None:
        os.close(self._log)
        self._own.cleanup()
        for memory in (self._asked, self._answers):
            memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _speak(self, said: Callable[[], object]) -> None:
        """Raises TrialError for what ends a conversation."""
        try:
            said()
        except TimedOut:
            raise TrialError("timeout", f"the evaluation took longer than {self._limits.evaluate_s:.0f} s") from None
        except Malformed:
            raise TrialError("invalid", "the evaluator sent something that is no message") from None
        except Closed:
            killed = self._child.wait() == -signal.SIGKILL
            why = self._child.fault or ("killed by the system, most likely out of memory" if killed else "by itself")
            raise TrialError(self._child.fault_status, f"the evaluator died ({why})") from None

    def _converse(
        self,
        bound: Bound,
        weights: bytearray,
        rows: Rows,
        cuts: list[int] | None,
        take: Take,
        shown: Callable[[float], None],
    ) -> None:
        """Give batches, a few ahead, and take each answer when it is said to be there: from then on it stands."""
        child, batch, length = self._child, self._batch, self._spec.seq_len
        width, width_out = rows.shape[1], length if cuts is None else self._spec.vocab_size
        until = time.monotonic() + self._limits.evaluate_s
        child.wire.send(
            "job", spec=self._spec.as_dict(), threads=self._setup.threads, weights_bytes=len(weights), width=width,
            width_out=width_out, batch_rows=batch, spare_bytes=self._limits.spare_bytes,
        )  # fmt: skip
        child.wire.send_bytes(memoryview(weights))
        if self._setup.sandbox.level in (1, 2):
            residency.settle_times()  # while it wakes the device
        self._expect("set", until)
        residency.wait()  # no line of train.py runs before the one before it has left nothing
        bound.begin(child, min(len(rows), 2 * batch) * length)
        child.wire.send("begin")
        self._expect("loaded", until, bound)

        rows_in = np.frombuffer(self._asked.map, dtype=np.uint16, count=SLOTS * batch * width)
        rows_in = rows_in.reshape(SLOTS, batch, width)
        answers = np.frombuffer(self._answers.map, dtype=np.float32, count=SLOTS * batch * width_out)
        answers = answers.reshape(SLOTS, batch, width_out)
        starts = range(0, len(rows), batch)

        def give(index: int) -> None:
            if index == len(starts):
                child.wire.send("end")
            if index >= len(starts):
                return
            here = slice(starts[index], starts[index] + batch)
            slot, count = index % SLOTS, len(rows[here])
            rows_in[slot, :count] = rows[here]
            answers[slot] = np.nan  # poisoned, so that what the evaluator does not write is no number
            child.wire.send("rows", slot=slot, rows=count, cuts=None if cuts is None else cuts[here])

        self.since, self._served = residency.mark(), True  # from here on it has rows
        for index in range(SLOTS):
            give(index)
        for index, start in enumerate(starts):
            self._expect("answer", until, bound)
            bound.answered(min(len(rows), start + (1 + SLOTS) * batch) * length)
            count = len(rows[start : start + batch])
            answer = answers[index % SLOTS, :count].copy()  # it can write to the other for as long as it lives
            give(index + SLOTS)
            take(slice(start, start + count), answer)
            shown((start + count) / len(rows))

    def _expect(self, kind: str, until: float, bound: Bound | None = None) -> None:
        wire = self._child.wire
        while not wire.waiting(min(LOOK_S, max(0.001, until - time.monotonic()))):
            if bound is not None:
                bound.check()
            if time.monotonic() >= until:
                raise TimedOut
        message = wire.recv(max(0.001, until - time.monotonic()))
        if message["kind"] == "error":
            raise failure_of(message, self._served, self._source.count(b"\n") + 1)
        if message["kind"] != kind:
            raise TrialError("invalid", f"the evaluator sent something else where {kind!r} was due")
