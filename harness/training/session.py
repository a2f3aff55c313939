"""One training, from the parent's side: starts the trainer, feeds it, keeps the clock, takes the weights.

    start -> import -> compile (warm-up steps) -> calibrate -> train -> submit -> kill

Every duration is taken here, between messages, by the parent's monotonic clock. What the trainer says of itself
(loss, depth, FLOPs a token) is shown and recorded as its word and decides nothing.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import TrialError
from hotloop.harness.gpu.between_runs import fresh
from hotloop.harness.records.model import Curve, Ledger, Start, Training
from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut
from hotloop.harness.settings import Preset, Spec
from hotloop.harness.text import one_line
from hotloop.harness.training.budget import Budget, Shape
from hotloop.harness.training.compile_cache import Pack, decode
from hotloop.harness.training.feed import SLOTS, Ring, RowOrder, synthetic_rows
from hotloop.harness.training.prewarm import Prewarmer
from hotloop.harness.training.trainer import Setup, Trainer

__all__ = ["Event", "Session", "SessionConfig"]

COMPILE_STEPS = 2
SHOW_S = 2.0  # how often a start that takes long shows that it goes on
CURVE_POINTS = 100
CPU_SLACK_S = 0.5  # what the measuring of processor time may be off by, where all of it is a fraction of a second


@dataclass(frozen=True)
class Event:
    """Something to show: where the run is. `progress` is 0..1 within the phase."""

    phase: str
    progress: float = 0.0
    loss: float | None = None
    tokens_per_s: float | None = None
    message: str = ""
    loaded_mb: float | None = None  # while it starts


@dataclass(kw_only=True)
class SessionConfig:
    """What one training is given.

    Attributes:
        source: the bytes of train.py.
        rows: the train split, uint16 [N, T + 1].
        budget: to be fixed by the calibration, or a replayed one; the session measures into it.
        folder: receives log.txt, and a scratch folder at sandbox levels that need one.
        threads: of the CPU.
        sandbox: None for the machine's best.
        repeatable: whether the trainer is asked for results that repeat to the bit.
        on_event: told where the run is.
        clock: seconds, monotonic; tests pass their own.
        stop: told the curve and the budget's tokens after each loss; a reason ends the run as `raced`.
        baseline_cpu_s: processor seconds of the baseline's training, to bound a budget in operations; None for no
            bound.
        prewarmer: may have a trainer that is ready; None starts one cold.
        compiled: what compilers made before, for the trainer; None for nothing.
        ask_compiled: ask for what its own compilers made.
        warm_s: of steps that nobody times before the calibration, for a device that stood idle.
    """

    source: bytes
    spec: Spec
    preset: Preset
    rows: npt.NDArray[np.uint16]
    budget: Budget
    folder: Path
    threads: int
    sandbox: Sandbox | None = None
    repeatable: bool = True
    on_event: Callable[[Event], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    stop: Callable[[Curve, int], str | None] | None = None
    baseline_cpu_s: float | None = None
    prewarmer: Prewarmer | None = None
    compiled: Pack | None = None
    ask_compiled: bool = False
    warm_s: float = 0.0


class Session:
    """One training, served: a trainer is started, fed, timed, and ended when it has sent its weights."""

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.sandbox = config.sandbox or best()
        self.training, self.ledger = Training(), Ledger()
        self.weights = bytearray()
        self.compiled: Pack | None = None  # what its compilers had made before it got real tokens
        self._emit, self._clock, self._limits = config.on_event, config.clock, config.preset.limits
        self._spec, self.budget = config.spec, config.budget
        self._compiled = config.compiled.data if config.compiled else b""
        self._progress = 0.0

    def run(self) -> Self:
        """Train once; returns itself. What was found is there as far as it came, also where this raises.

        Raises:
            TrialError: the experiment's fault, with its status.
        """
        fresh(self._spec.device, gpu=self.sandbox.gpu)
        began = self._clock()
        with self._trainer() as trainer:
            self._child, self._ring = trainer.child, Ring(trainer.memory)
            try:
                self._converse(began)
            except Closed:
                raise self._died() from None
            except TimedOut:
                raise TrialError("timeout", "the trainer does not read what it is sent") from None
            except Malformed as e:
                raise TrialError("invalid", f"the trainer sent {e}") from None
            finally:
                self._child.kill()
                self.training.peak_mb = self.training.peak_mb or self._child.peak_rss_mb
                del self._ring
        return self

    def _trainer(self) -> Trainer:
        """One that is ready, or a new one that is getting ready. Raises SandboxError."""
        setup = Setup(self.sandbox, self._spec.device, self._limits, self.config.threads, self.config.repeatable)
        log = self.config.folder / "log.txt"
        trainer, why = self.config.prewarmer.take(setup, log) if self.config.prewarmer else (None, "")
        if trainer is None:
            trainer = Trainer(setup, self.config.folder, log)
            trainer.how = Start(because=why)
        self.training.start = trainer.how
        return trainer

    # The conversation, phase by phase.

    def _converse(self, began: float) -> None:
        ledger = self.ledger
        self._emit(Event("start"))
        if self.training.start.how == "cold":
            self._await("ready", began)
        residency.wait()  # what was made ready beside an evaluator begins when that one has left nothing
        if self._spec.device == "cpu":  # on a GPU no limit asks for it
            self._child.count_cpu()
        sizes = {"source_bytes": len(self.config.source), "compiled_bytes": len(self._compiled)}
        how = {"spec": self._spec.as_dict(), "threads": self.config.threads, "repeatable": self.config.repeatable}
        self._child.wire.send("hello", **how, **sizes)
        self._child.wire.send_bytes(self.config.source)
        self._child.wire.send_bytes(self._compiled)
        self._await("started", began)
        ledger.start = self._clock() - began
        self._emit(Event("import"))
        imported = self._expect("imported", self._clock() + self._limits.start_s, "to import train.py")
        ledger.import_ = self._clock() - began - ledger.start
        self._note_implementations(imported)
        message = self._warm_up()
        if self.config.ask_compiled and message["kind"] == "next":
            self._take_compiled()
        message = self._feed(message)
        self._take_weights(message)

    def _await(self, kind: str, began: float) -> None:
        """Wait for our own code to load torch or to wake CUDA, and show that it goes on."""
        until = began + self._limits.load_s
        while True:
            try:
                self._expect(kind, min(until, self._clock() + SHOW_S), "")
                return
            except TimedOut:
                if self._clock() >= until:
                    raise TrialError(
                        "timeout",
                        f"torch and CUDA were not ready within {self._limits.load_s:.0f} s; is the disk slow?",
                    ) from None
                self._emit(Event("start", loaded_mb=self._child.rss_mb()))

    def _note_implementations(self, message: dict[str, Any]) -> None:
        """What the trainer says that computes; after the training, of attention, what did."""
        if isinstance(told := message.get("implementations"), dict):
            self.training.implementations = {str(k)[:100]: str(v)[:600] for k, v in list(told.items())[:50]}

    def _warm_up(self) -> dict[str, Any]:
        """Serve every `warmup`; returns the first message that is not part of one."""
        ledger = self.ledger
        ledger.compile = ledger.calibrate = 0.0
        warm_until = self._clock() + self._limits.warmup_s
        mark = self._clock()
        self._emit(Event("compile"))
        while True:
            message = self._message(warm_until, "to warm up")
            if message["kind"] != "warmup":
                return message
            shape = self._shape(message)
            rows = [synthetic_rows(shape.rows, shape.seq_len, self._spec.vocab_size, s) for s in range(SLOTS)]
            for _ in range(COMPILE_STEPS):
                self._expect("next", warm_until, "to make a warm-up step")
                self._serve(rows[0], 0, 0, 0.0, "compile")
            message = self._expect("next", warm_until, "to make a warm-up step")
            ledger.compile += self._clock() - mark
            mark = self._clock()
            if self.config.warm_s and not self.budget.step_s:
                self._warm(rows[0], warm_until)
            self._emit(Event("calibrate"))
            flops = 0
            if self.budget.rule.kind == "flops":
                self._serve(rows[0], 0, 0, 0.0, "count")
                message = self._expect("next", warm_until, "to make a counted step")
                flops = self._count(message, "flops", 10**24)
            self._child.wire.send("tidy")
            self._expect("next", warm_until, "to collect its garbage")
            steps: list[float] = []
            cpu_s = self._child.cpu_s()
            while self._to_time(steps):
                sent = self._clock()
                self._serve(rows[len(steps) % SLOTS], len(steps) % SLOTS, 0, 0.0, "time")
                self._expect("next", warm_until, "to make a timed step")
                steps.append(self._clock() - sent)
            self.budget.measured(shape, steps, flops, self._child.cpu_s() - cpu_s)
            self._child.wire.send("calibrated")
            ledger.calibrate += self._clock() - mark
            mark = self._clock()

    def _to_time(self, steps: list[float]) -> bool:
        """Whether one more step is timed. A replay makes as many as its original did, whatever its clock says."""
        if (recorded := self.budget.recorded_steps()) is not None:
            return len(steps) < recorded
        return len(steps) < self.config.preset.calibrate_steps or sum(steps) < self.config.preset.calibrate_s

    def _warm(self, rows: npt.NDArray[np.uint16], until: float) -> None:
        """Steps that are not timed, until the card is as warm as in a training; part of the calibration's time."""
        began = self._clock()
        while (past_s := self._clock() - began) < self.config.warm_s:
            self._emit(Event("warm", past_s / self.config.warm_s))
            self._serve(rows, 0, 0, 0.0, "time")
            self._expect("next", until, "to make a warm-up step")

    def _take_compiled(self) -> None:
        """What the compilers made, all of it before the first real token is anywhere in the trainer's reach."""
        began, most = self._clock(), self._limits.compiled_bytes
        self._child.wire.send("compiled?", most=most)
        size = self._count(self._expect("compiled", began + self._limits.submit_s, "to send its caches"), "bytes", most)
        try:
            self.compiled = decode(bytes(self._child.wire.recv_bytes(size, self._limits.submit_s)), most)
        except TimedOut:
            raise TrialError("timeout", "the compile cache did not arrive in time") from None
        except ValueError as e:
            raise TrialError("invalid", f"the trainer sent a compile cache that is none: {e}") from None
        self.ledger.compile += self._clock() - began

    def _feed(self, message: dict[str, Any]) -> dict[str, Any]:
        """Fix the budget, then serve real rows; returns the first message that does not ask for more."""
        if message["kind"] not in ("next", "log"):
            return message
        self.budget.fix()
        order = RowOrder(self.config.rows, self._spec.seed)
        expected_s = self.budget.expected_s
        training, limits = self.training, self._limits
        began, cpu_s = self._clock(), self._child.cpu_s()
        first = began  # when the first batch was on its way
        # Twice the allowed time ends a run that would be `overtime` anyway.
        stop = began + 2 * limits.overtime * self.budget.late * expected_s + 5.0
        stall_s = max(limits.stall_s, 10 * max(self.budget.step_s.values()))
        ready: tuple[Shape, npt.NDArray[np.uint16]] | None = None
        try:
            while True:
                if message["kind"] == "log":
                    self._log(message, began)
                elif message["kind"] == "trained" and training.steps:
                    training.device_s = self._number(message, "device_s")
                    training.device_wall_s = self._clock() - first
                elif message["kind"] == "next":
                    asked = self._clock()
                    shape = self._shape(message)
                    if shape not in self.budget.charges:
                        raise TrialError("invalid", f"asked for a batch shape that was not declared: {shape}")
                    if not self.budget.affords(shape):
                        self._child.wire.send("end")
                    else:
                        rows = ready[1] if ready and ready[0] == shape else order.take(shape.rows, shape.seq_len)
                        self._progress = self.budget.charge(shape)
                        self._serve(rows, training.steps % SLOTS, training.steps, self._progress, "train")
                        served = self._clock()
                        first = first if training.steps else served
                        training.feed_late_s += served - asked
                        training.steps += 1
                        training.tokens += shape.tokens
                        # Shapes of one length draw from one stream, so the next rows can be made ready now.
                        ready = (
                            (shape, order.take(shape.rows, shape.seq_len)) if len(self.budget.charges) == 1 else None
                        )
                        if self._child.wire.waiting():
                            training.feed_late_s += self._clock() - served
                else:
                    return message
                deadline = min(stop, self._clock() + stall_s)
                try:
                    if self._clock() >= stop:  # also where one message comes after the other
                        raise TimedOut
                    message = self._message(deadline, "")
                except TimedOut:
                    if self._clock() >= stop:
                        raise TrialError(
                            "overtime", f"stopped after {self._clock() - began:.0f} s of training; the budget was "
                            f"{expected_s:.1f} s"
                        ) from None  # fmt: skip
                    raise TrialError("timeout", f"no sign of life for {stall_s:.0f} s while training") from None
        finally:
            training.wall_s = self.ledger.train = self._clock() - began
            training.cpu_s = self._child.cpu_s() - cpu_s

    def _take_weights(self, message: dict[str, Any]) -> None:
        if message["kind"] != "submit":
            raise TrialError("invalid", f"the trainer sent {message['kind']!r} where a submission was due")
        if self.training.steps == 0:
            raise TrialError("invalid", "submitted without having taken a batch")
        self._note_implementations(message)
        size = self._count(message, "bytes", 1 << 62)
        if size > self._limits.submission_bytes:
            raise TrialError(
                "invalid", f"a submission of {size} bytes; at most {self._limits.submission_bytes} are read"
            )
        cpu_s = self._child.cpu_s()
        self._emit(Event("submit"))
        began = self._clock()
        try:
            self.weights = self._child.wire.recv_bytes(size, self._limits.submit_s)
        except TimedOut:
            raise TrialError("timeout", f"the weights did not arrive within {self._limits.submit_s:.0f} s") from None
        self.ledger.submit = self._clock() - began
        self.training.wall_s += self.ledger.submit
        self.training.cpu_s += self._child.cpu_s() - cpu_s
        if message.get("depth") is not None:
            self.training.depth = self._count(message, "depth", 1 << 20)
        if message.get("flops_per_token") is not None:
            self.training.flops_per_token = self._number(message, "flops_per_token")
        if message.get("peak_mb") is not None:
            self.training.peak_mb = self._number(message, "peak_mb")
        self._check_time()

    def _check_time(self) -> None:
        """Raises TrialError `overtime`. On a CPU processor time counts: wall time depends on who else is there."""
        allowed_s = self._limits.overtime * self.budget.late * self.budget.expected_s
        if self.training.wall_s > allowed_s:
            raise TrialError(
                "overtime",
                f"trained for {self.training.wall_s:.1f} s ({self.training.feed_late_s:.1f} s of it waiting for rows); "
                f"the budget was {self.budget.expected_s:.1f} s and at most {allowed_s:.1f} s are accepted",
            )
        if self._spec.device != "cpu":
            return
        if (hidden_s := self._child.hidden_cpu_s) > CPU_SLACK_S:
            raise TrialError(
                "invalid",
                f"processes of train.py worked for {hidden_s:.1f} s and ended without anybody having waited for them, "
                f"so that their time was credited to nobody",
            )
        used_s = self.training.cpu_s
        expected_s = self.budget.expected_cpu_s
        if used_s > self._limits.overtime_cpu * expected_s + CPU_SLACK_S:
            raise TrialError(
                "overtime",
                f"trained for {used_s:.1f} processor seconds; the calibrated step says {expected_s:.1f}, and at most "
                f"{self._limits.overtime_cpu:g} times that are accepted",
            )
        baseline_s = self.config.baseline_cpu_s
        most = baseline_s and self._limits.baseline_cpu * baseline_s + CPU_SLACK_S
        if most and self.budget.rule.kind == "flops" and used_s > most:
            raise TrialError(
                "overtime",
                f"trained for {used_s:.1f} processor seconds; the baseline took {baseline_s:.1f}, and at most "
                f"{self._limits.baseline_cpu:g} times that are accepted for as many operations",
            )

    # Messages.

    def _serve(self, rows: npt.NDArray[np.uint16], slot: int, step: int, progress: float, stage: str) -> None:
        self._ring.put(slot, rows)
        self._child.wire.send("batch", slot=slot, step=step, progress=progress, stage=stage)

    def _message(self, deadline: float, doing: str) -> dict[str, Any]:
        """The next message. With `doing` a timeout is a TrialError, without it is TimedOut."""
        try:
            message = self._child.wire.recv(max(0.001, deadline - self._clock()))
        except TimedOut:
            if not doing:
                raise
            raise TrialError("timeout", f"train.py took too long {doing}") from None
        if message["kind"] == "error":
            status = message.get("status")
            if message.get("peak_mb") is not None:
                self.training.peak_mb = self._number(message, "peak_mb")
            reason = one_line(str(message.get("reason", "")), 400)
            if status == "oom" and self.training.peak_mb:
                reason += f"; at most {self.training.peak_mb:,.0f} MB were in use"
            raise TrialError(status if status in ("crash", "oom", "nan") else "crash", reason or "no reason given")
        return message

    def _expect(self, kind: str, deadline: float, doing: str) -> dict[str, Any]:
        message = self._message(deadline, doing)
        if message["kind"] != kind:
            raise TrialError("invalid", f"the trainer sent {message['kind']!r} where {kind!r} was due")
        return message

    def _shape(self, message: dict[str, Any]) -> Shape:
        shape = Shape(self._count(message, "rows", 1 << 32), self._count(message, "seq_len", 1 << 32))
        if self._spec.seq_len % shape.seq_len or not Ring.fits(shape.rows, shape.seq_len):
            raise TrialError("invalid", f"asked for a batch of {shape.rows} x {shape.seq_len} tokens")
        return shape

    def _number(self, message: dict[str, Any], key: str) -> float:
        value = message.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e24:
            raise TrialError("invalid", f"the trainer sent a malformed {key}")
        return float(value)

    def _count(self, message: dict[str, Any], key: str, most: int) -> int:
        value = message.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise TrialError("invalid", f"the trainer sent a malformed {key}")
        return value

    def _log(self, message: dict[str, Any], began: float) -> None:
        loss = message.get("loss")
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise TrialError("nan", f"the loss of step {str(message.get('step'))[:20]} is {str(loss)[:20]}")
        curve = self.training.curve
        curve.append((round(self._progress, 6), round(loss, 6)))
        if len(curve) > 2 * CURVE_POINTS:
            del curve[1::2]
        elapsed = self._clock() - began
        rate = self.training.tokens / elapsed if elapsed > 0 else None
        self._emit(Event("train", self._progress, loss, rate))
        if self.config.stop and (reason := self.config.stop(curve, self.budget.tokens)):
            raise TrialError("raced", reason)

    def _died(self) -> TrialError:
        code = self._child.wait()
        if self._child.fault:
            return TrialError(self._child.fault_status, f"the trainer was stopped: {self._child.fault}")
        if code == -signal.SIGKILL:
            return TrialError("oom", "the trainer was killed by the system (SIGKILL), most likely out of memory")
        if code is not None and code < 0:
            return TrialError("crash", f"the trainer died by signal {signal.Signals(-code).name}")
        return TrialError("crash", f"the trainer ended without submitting weights (exit status {code})")
