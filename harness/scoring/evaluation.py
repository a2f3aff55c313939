"""Validation bits per byte, by commit and audit.

    bpb = sum of NLL over tokens with bytes / (ln 2 * sum of their bytes)

The trainer is dead and the parent has only bytes. Evaluator A, a fresh process, gets the rows and returns each token's
NLL; it is killed, and its numbers stand. Evaluator B, another fresh process, gets some of those rows again, of val and
holdout, each only up to a cut that was drawn after A had answered (`harness.scoring.audit`), followed by tokens of
train rows, and returns the logits at the cut. The parent normalises them in fp64, looks up the true next token, which B
never had, and compares with what A said. A model that looks ahead, keeps state across rows, returns what is no
distribution, or lies about its loss, disagrees with itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import TrialError
from hotloop.harness.gpu.between_runs import fresh
from hotloop.harness.records.model import Audit, EvaluatorTime, Ledger, Scores
from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.scoring.audit import (
    SAMPLE,
    STEADY_NATS,
    TOLERANCE_NATS,
    allowed_mismatches,
    compare,
    draw,
    questions,
    surprise,
)
from hotloop.harness.scoring.bound import Bound
from hotloop.harness.scoring.process import LOG_BYTES, EvaluatorProcess, Rows, Take
from hotloop.harness.settings import Preset, Spec
from hotloop.harness.training.session import Event
from hotloop.harness.training.trainer import Setup

__all__ = ["Evaluation", "Evaluator", "Scoring", "bits_per_byte"]


def bits_per_byte(nll: npt.NDArray[Any], targets: Rows, token_bytes: npt.NDArray[np.int32]) -> float:
    """Bits per byte from nats.

    Args:
        nll: float [N, T], nats.
        targets: uint16 [N, T].
        token_bytes: int32 [V]; tokens with 0 bytes (special ones) count in neither sum.
    """
    lengths = token_bytes[targets]
    nats = float(np.sum(nll, where=lengths > 0, dtype=np.float64))
    return nats / (math.log(2.0) * int(lengths.sum(dtype=np.int64)))


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What an `Evaluator` scores by.

    Attributes:
        source: the bytes of train.py.
        val, holdout, train: uint16 [N, T + 1]; the train rows are only B's decoys.
        token_bytes, reference_bytes: int32 [V], see harness.data.tokenizer; without the latter there is no
            `val_bpb_reference`.
        folder: receives evaluate.txt, the last of what the evaluators printed.
        reference: float [N, T], what the incumbent lost on val and then holdout, by which the audit looks; None for
            none.
        baseline: what the evaluation of the night's baseline took, which bounds this one; None where there is none.
        keep_below: the bpb above which the run cannot be kept, so that a smaller audit will do; None for a full one.
    """

    source: bytes
    spec: Spec
    preset: Preset
    val: Rows
    holdout: Rows
    train: Rows
    token_bytes: npt.NDArray[np.int32]
    folder: Path
    threads: int
    sandbox: Sandbox = field(default_factory=best)
    on_event: Callable[[Event], None] = lambda _: None
    reference_bytes: npt.NDArray[np.int32] | None = None
    reference: npt.NDArray[np.floating] | None = None
    baseline: EvaluatorTime | None = None
    keep_below: float | None = None

    @property
    def setup(self) -> Setup:
        return Setup(self.sandbox, self.spec.device, self.preset.limits, self.threads)


@dataclass(frozen=True)
class Evaluation:
    """Scores, the audit's figures, the seconds of both, and of what both evaluators computed.

    `val_bpb_reference` is the same loss over the bytes that karpathy/autoresearch counts, which are more wherever a
    token is no whole characters; only it compares with scores published there.

    Attributes:
        nll: float32 [N, T], nats, of val and then of holdout.
    """

    scores: Scores
    audit: Audit
    ledger: Ledger
    evaluate_time: EvaluatorTime
    audit_time: EvaluatorTime
    nll: npt.NDArray[np.float32]


class Evaluator:
    """Scores one train.py's weights. A context manager: entering it starts its two processes, leaving it ends them.

    So it is entered before the training, and both make their imports beside the trainer's; `wait` for them before
    anything is timed. B is then alive while A has val text. It has run trusted code only and waits; what A can leave
    for it is what a dead process can leave, and that is taken away before a line of train.py runs in it. At levels
    where A could reach B itself (L1, L0), and where the kernel has taken pages of files from memory meanwhile, of which
    a process that lives would see which, B is started anew when A is dead.
    """

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self._said: list[bytes] = []
        self._open = contextlib.ExitStack()
        self._ready: list[EvaluatorProcess] = []

    def __enter__(self) -> Self:
        try:
            self._ready = [self._start() for _ in range(2 if self.scoring.sandbox.level >= 2 else 1)]
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def wait(self) -> None:
        """Until its processes are ready and do nothing any more. Raises TrialError."""
        for process in self._ready:
            process.wait()

    def run(self, weights: bytearray, token_s: float | None = None) -> Evaluation:
        """Score and audit them.

        Args:
            token_s: what training on a token cost, by which its scoring is bounded; None for no such bound.

        Raises:
            TrialError: `invalid`, `nan`, `crash`, `oom`, `overtime` or `timeout`.
        """
        s = self.scoring
        try:
            result = self._run(weights, token_s)
            if result.audit.largest_nats > STEADY_NATS[s.spec.device]:
                first, result = result, self._run(weights, token_s)  # a replay is to find the same score
                audit = msgspec.structs.replace(result.audit, odd_bpb=first.scores.val_bpb)
                return replace(result, audit=audit, ledger=first.ledger + result.ledger)
            return result
        finally:
            self._open.close()
            # Of one size whatever was printed: a later train.py may be able to ask for it.
            said = b"".join(self._said)[-LOG_BYTES:].ljust(LOG_BYTES, b"\n")
            (s.folder / "evaluate.txt").write_bytes(said)

    def _run(self, weights: bytearray, token_s: float | None) -> Evaluation:
        s, ledger = self.scoring, Ledger()
        began = time.monotonic()
        scored = np.concatenate([s.val, s.holdout])
        nll = np.empty((len(scored), s.spec.seq_len), dtype=np.float32)

        def take(here: slice, answer: npt.NDArray[np.float32]) -> None:
            nll[here] = answer

        self.wait()  # B too: what it reads while A has rows would stay
        bound = Bound(s.spec.device, s.preset.limits, nll.size, token_s, s.baseline)
        since = self._answer("evaluate", bound, weights, scored, None, take)
        if not np.isfinite(nll).all():
            raise TrialError("nan", "the model's loss on a validation token is not finite")
        if nll.min() < -1e-3:
            raise TrialError("invalid", "the model reported a negative loss")
        n = len(s.val)
        true, as_reference = s.val[:, 1:], s.reference_bytes
        scores = Scores(
            val_bpb=bits_per_byte(nll[:n], true, s.token_bytes),
            holdout_bpb=bits_per_byte(nll[n:], s.holdout[:, 1:], s.token_bytes),
            val_bpb_reference=None if as_reference is None else bits_per_byte(nll[:n], true, as_reference),
        )
        evaluate_time, ledger.evaluate = bound.times(), time.monotonic() - began
        began = time.monotonic()
        if self._ready and residency.taken_since(since):
            self._ready.pop().close()
        bound = Bound(s.spec.device, s.preset.limits, nll.size, token_s, s.baseline)
        full = s.keep_below is None or scores.val_bpb <= s.keep_below
        audit = self._audit(bound, weights, nll, scored, full)
        ledger.audit = time.monotonic() - began
        return Evaluation(scores, audit, ledger, evaluate_time, bound.times(), nll)

    def _audit(self, bound: Bound, weights: bytearray, nll: npt.NDArray[np.float32], scored: Rows, full: bool) -> Audit:
        s = self.scoring
        count = math.ceil((s.preset.audit_cuts or len(s.val)) * (1.0 if full else SAMPLE))
        rng = np.random.default_rng()  # from the system's entropy: A could not know these
        reference = s.reference if s.reference is not None and s.reference.shape == nll.shape else None
        order, cuts = draw(nll, reference, count, rng)
        rows = questions(scored, s.train, order, cuts, rng)
        true = scored[order, cuts + 1]
        found = np.empty(len(rows))

        def take(here: slice, logits: npt.NDArray[np.float32]) -> None:
            found[here] = surprise(logits, true[here])  # while the device has its next batch

        self._answer("audit", bound, weights, rows, cuts.tolist(), take)
        if not np.isfinite(found).all():
            raise TrialError("nan", "the model's logits are not finite")
        device = s.spec.device
        figures = compare(nll[order, cuts], found, TOLERANCE_NATS[device], allowed_mismatches(len(rows), device))
        return msgspec.structs.replace(figures, reference=reference is not None, full=full)

    def _start(self) -> EvaluatorProcess:
        s = self.scoring
        return self._open.enter_context(EvaluatorProcess(s.setup, s.source, s.spec, s.preset, s.folder))

    def _answer(
        self, phase: str, bound: Bound, weights: bytearray, rows: Rows, cuts: list[int] | None, take: Take
    ) -> tuple[int, int] | None:
        """One process over `rows`, from start to end; returns `residency.mark` of when it got the first."""
        self.scoring.on_event(Event(phase))
        fresh(self.scoring.spec.device, gpu=self.scoring.sandbox.gpu)
        process = self._ready.pop(0) if self._ready else self._start()
        try:
            process.answer(bound, weights, rows, cuts, take, lambda share: self.scoring.on_event(Event(phase, share)))
        finally:
            process.close()
            self._said.append(process.said)
        return process.since
