"""Validation bits per byte, by commit and audit.

    bpb = sum of NLL over tokens with bytes / (ln 2 * sum of their bytes)

The trainer is dead and the parent has only bytes. Evaluator A, a fresh process, gets the rows and returns each token's
NLL; it is killed, and its numbers stand. Evaluator B, another fresh process, gets some of those rows again, of val and
holdout, each only up to a cut that was drawn after A had answered (`harness.scoring.cuts`), followed by tokens of train
rows, and returns the logits at the cut. The parent normalises them in fp64, looks up the true next token, which B never
had, and compares with what A said. A model that looks ahead, keeps state across rows, returns what is no distribution,
or lies about its loss, disagrees with itself.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import TrialError
from hotloop.harness.gpu.between_runs import fresh
from hotloop.harness.sandbox import residency
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, SharedMemory
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut
from hotloop.harness.scoring.bound import Bound
from hotloop.harness.scoring.cuts import allowed_mismatches, draw
from hotloop.harness.scoring.failures import failure_of
from hotloop.harness.settings import Preset, Spec
from hotloop.harness.training.session import Event

__all__ = ["TOLERANCE_NATS", "Evaluation", "Evaluator", "bits_per_byte", "compare", "questions", "surprise"]

Rows = npt.NDArray[np.uint16]
Take = Callable[[slice, npt.NDArray[np.float32]], None]

# How far A and B may differ on one token. Their batches have the same shape, so on a CPU an honest model repeats
# itself to rounding; in bf16 on a GPU 0.02 nats is the bound of the design notes, still to be measured there.
TOLERANCE_NATS = {"cpu": 2e-3, "cuda": 2e-2}
# The mean difference of honest runs is zero within its own standard error; this many of those errors are
# allowed, and a little more than the rounding of fp32 sums.
MEAN_ERRORS = 6.0
MEAN_SLACK_NATS = 2e-5
# Batches that an evaluator holds at a time: one in work, one launched behind it, one on its way.
_SLOTS = 3
LOOK_S = 0.5  # how often an evaluator that does not answer is looked at


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


def surprise(logits: npt.NDArray[np.float32], true: Rows) -> npt.NDArray[np.float64]:
    """NLL of each true token, nats [N], normalised in fp64; NaN for logits that are not finite.

    Args:
        logits: float32 [N, V]. A batch at a time: all of a val split in fp64 are seconds of fresh memory.
        true: uint16 [N], the tokens that really follow.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=1, keepdims=True)
        at_true = wide[np.arange(len(wide)), true]  # a copy
        finite = np.isfinite(logits).all(axis=1)
        found = np.log(np.exp(wide, out=wide).sum(axis=1)) - at_true
    return np.where(finite, found, np.nan)


def compare(
    nll: npt.NDArray[np.float32], found: npt.NDArray[np.float64], tolerance: float, most: int = 0
) -> dict[str, Any]:
    """What B's logits say about A's numbers at the cuts.

    Args:
        nll: float32 [N], A's NLL at each cut.
        found: float64 [N], what B's logits make of the tokens that really follow.
        tolerance: nats, for one token.
        most: cuts that may differ by more.

    Returns:
        The audit's figures, as they are recorded.

    Raises:
        TrialError: `invalid`, with the figures in its reason.
    """
    difference = found - nll
    n = len(difference)
    mismatches = int(np.count_nonzero(~(np.abs(difference) <= tolerance)))
    mean = float(difference.mean())
    allowed = MEAN_ERRORS * float(difference.std()) / math.sqrt(n) + MEAN_SLACK_NATS
    figures = {
        "cuts": n,
        "tolerance_nats": tolerance,
        "mismatches": mismatches,
        "mismatches_allowed": most,
        "largest_nats": float(np.abs(difference).max()),
        "mean_nats": mean,
        "mean_allowed_nats": allowed,
        # The smallest share of falsified tokens that n cuts find with 99 % probability: 1 - 0.01^(1/n).
        "detectable_share": 1.0 - 0.01 ** (1.0 / n),
    }
    if mismatches > most:
        raise TrialError(
            "invalid",
            f"the model contradicts itself at {mismatches} of {n} cuts (by up to {figures['largest_nats']:.1g} nats): "
            f"it looks ahead, keeps state across rows, or its probabilities are none",
        )
    if abs(mean) > allowed:
        raise TrialError(
            "invalid",
            f"the reported losses are off by {mean:+.5f} nats a token on average; {allowed:.5f} are allowed",
        )
    return figures


def questions(
    scored: Rows, train: Rows, rows: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64], rng: np.random.Generator
) -> Rows:
    """What evaluator B is asked, uint16 [n, T]: rows up to and with their cut, behind it tokens of a train row.

    Args:
        scored, train: uint16 [N, T + 1], [M, T + 1].
        rows, cuts: int64 [n], which row each is, and its position.
    """
    length = scored.shape[1] - 1
    asked = scored[rows, :length].copy()
    decoys = train[rng.integers(0, len(train), len(rows)), :length]
    behind = np.arange(length)[None, :] > cuts[:, None]
    asked[behind] = decoys[behind]
    return asked


@dataclass
class Evaluation:
    """Scores and the audit's figures; `ledger` has the seconds of `evaluate` and `audit`, `cost` what they computed.

    `val_bpb_reference` is the same loss over the bytes that karpathy/autoresearch counts, which are more wherever a
    token is no whole characters; only it compares with scores published there.
    """

    val_bpb: float = math.nan
    val_bpb_reference: float = math.nan
    holdout_bpb: float = math.nan
    audit: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    nll: npt.NDArray[np.float32] | None = None  # [N, T], nats, of val and then of holdout


class Evaluator:
    """Args:
    val, holdout, train: uint16 [N, T + 1]; the train rows are only B's decoys.
    token_bytes, reference_bytes: int32 [V], see harness.data.tokenizer; without the latter there is no
        `val_bpb_reference`.
    token_s: what training on a token cost, by which its scoring is bounded; None for no such bound.
    reference: float [N, T], what a trusted train.py lost on val and then holdout; None for none.
    """

    def __init__(
        self,
        source: bytes,
        spec: Spec,
        preset: Preset,
        val: Rows,
        holdout: Rows,
        train: Rows,
        token_bytes: npt.NDArray[np.int32],
        folder: Path,
        threads: int,
        on_event: Callable[[Event], None] = lambda _: None,
        sandbox: Sandbox | None = None,
        reference_bytes: npt.NDArray[np.int32] | None = None,
        token_s: float | None = None,
        reference: npt.NDArray[np.floating] | None = None,
    ) -> None:
        self.sandbox = sandbox or best()
        self.source, self.spec, self.preset = source, spec, preset
        self.val, self.holdout, self.train = val, holdout, train
        self.token_bytes, self.reference_bytes = token_bytes, reference_bytes
        self.folder, self.threads, self._emit = folder, threads, on_event
        self._token_s, self.reference = token_s, reference
        self._cost: dict[str, float] = {}
        self._served = False  # whether the evaluator at work has got a row
        self._since: tuple[int, int] | None = None  # what had been read when it got the first

    def run(self, weights: bytearray) -> Evaluation:
        """Raises TrialError: `invalid`, `nan`, `crash`, `oom` or `timeout`."""
        result = Evaluation()
        began = time.monotonic()
        scored = np.concatenate([self.val, self.holdout])
        nll = np.empty((len(scored), self.spec.seq_len), dtype=np.float32)

        def take(here: slice, answer: npt.NDArray[np.float32]) -> None:
            nll[here] = answer

        self._answer("evaluate", weights, scored, None, self.spec.seq_len, take)
        if not np.isfinite(nll).all():
            raise TrialError("nan", "the model's loss on a validation token is not finite")
        if nll.min() < -1e-3:
            raise TrialError("invalid", "the model reported a negative loss")
        n = len(self.val)
        result.val_bpb = bits_per_byte(nll[:n], self.val[:, 1:], self.token_bytes)
        if self.reference_bytes is not None:
            result.val_bpb_reference = bits_per_byte(nll[:n], self.val[:, 1:], self.reference_bytes)
        result.holdout_bpb = bits_per_byte(nll[n:], self.holdout[:, 1:], self.token_bytes)
        result.ledger["evaluate"] = time.monotonic() - began
        began = time.monotonic()
        result.audit, result.nll = self._audit(weights, nll, scored), nll
        result.ledger["audit"] = time.monotonic() - began
        result.cost = self._cost
        return result

    def _audit(self, weights: bytearray, nll: npt.NDArray[np.float32], scored: Rows) -> dict[str, Any]:
        rng = np.random.default_rng()  # from the system's entropy: A could not know these
        reference = self.reference if self.reference is not None and self.reference.shape == nll.shape else None
        order, cuts = draw(nll, reference, len(self.val), rng)
        rows = questions(scored, self.train, order, cuts, rng)
        true = scored[order, cuts + 1]
        found = np.empty(len(rows))

        def take(here: slice, logits: npt.NDArray[np.float32]) -> None:
            found[here] = surprise(logits, true[here])  # while the device has its next batch

        self._answer("audit", weights, rows, cuts.tolist(), self.spec.vocab_size, take)
        if not np.isfinite(found).all():
            raise TrialError("nan", "the model's logits are not finite")
        device = self.spec.device
        figures = compare(nll[order, cuts], found, TOLERANCE_NATS[device], allowed_mismatches(len(rows), device))
        return figures | {"reference": reference is not None}

    def _answer(
        self, phase: str, weights: bytearray, rows: Rows, cuts: list[int] | None, width_out: int, take: Take
    ) -> None:
        """One fresh process over `rows`; each batch of its answers, float32 [n, width_out], goes to `take`."""
        self._emit(Event(phase))
        fresh(self.spec.device, gpu=self.sandbox.gpu)
        limits = self.preset.limits
        width, batch = rows.shape[1], min(self.preset.eval_batch_rows, len(rows))
        weights_in = SharedMemory(len(weights))
        asked = SharedMemory(_SLOTS * batch * width * 2)
        answers = SharedMemory(_SLOTS * batch * width_out * 4)
        memories = (weights_in, asked, answers)
        policy = Policy.of("hotloop.harness.scoring.child", self.folder, self.source, self.spec.device, limits)
        self._since, self._served = None, False
        try:
            weights_in.map[: len(weights)] = weights
            log = self.folder / "evaluate.txt"
            with Child(self.sandbox, policy, [m.fd for m in memories], log, self.threads) as child:
                try:
                    child.wire.send(
                        "hello", spec=self.spec.as_dict(), threads=self.threads, weights_bytes=len(weights),
                        width=width, width_out=width_out, batch_rows=batch,
                    )  # fmt: skip
                    if self.sandbox.level in (1, 2):
                        residency.settle_times()  # while it makes its imports
                    given = np.frombuffer(asked.map, dtype=np.uint16, count=_SLOTS * batch * width)
                    answered = np.frombuffer(answers.map, dtype=np.float32, count=_SLOTS * batch * width_out)
                    self._converse(
                        child, phase, rows, cuts, take,
                        given.reshape(_SLOTS, batch, width), answered.reshape(_SLOTS, batch, width_out),
                    )  # fmt: skip
                except TimedOut:
                    raise TrialError("timeout", f"the evaluation took longer than {limits.evaluate_s:.0f} s") from None
                except Malformed:
                    raise TrialError("invalid", "the evaluator sent something that is no message") from None
                except Closed:
                    killed = child.wait() == -signal.SIGKILL
                    why = child.fault or ("killed by the system, most likely out of memory" if killed else "by itself")
                    raise TrialError(child.fault_status, f"the evaluator died ({why})") from None
        finally:
            for m in memories:
                m.close()
            if self.sandbox.level and self._served:
                residency.begin(self._since)  # what starts next finds nothing of what this one knew

    def _converse(
        self,
        child: Child,
        phase: str,
        rows: Rows,
        cuts: list[int] | None,
        take: Take,
        rows_in: Rows,
        answers: npt.NDArray[np.float32],
    ) -> None:
        """Give batches, a few ahead, and take each answer when it is said to be there: from then on it stands."""
        deadline = time.monotonic() + self.preset.limits.evaluate_s
        batch = rows_in.shape[1]
        starts = range(0, len(rows), batch)

        self._bound = Bound(child, self.spec.device, self.preset.limits, self._token_s)
        self._expect(child, "ready", deadline)
        self._bound.begin(min(len(rows), _SLOTS * batch) * self.spec.seq_len)
        child.wire.send("begin")
        self._expect(child, "loaded", deadline)

        def give(index: int) -> None:
            if index == len(starts):
                child.wire.send("end")
            if index >= len(starts):
                return
            here = slice(starts[index], starts[index] + batch)
            slot, count = index % _SLOTS, len(rows[here])
            rows_in[slot, :count] = rows[here]
            answers[slot] = np.nan  # poisoned, so that what the evaluator does not write is no number
            child.wire.send("rows", slot=slot, rows=count, cuts=None if cuts is None else cuts[here])

        self._since, self._served = residency.mark(), True  # from here on it has rows
        for index in range(_SLOTS):
            give(index)
        for index, start in enumerate(starts):
            self._expect(child, "answer", deadline)
            self._bound.answered(min(len(rows), start + (1 + _SLOTS) * batch) * self.spec.seq_len)
            count = len(rows[start : start + batch])
            answer = answers[index % _SLOTS, :count].copy()  # it can write to the other for as long as it lives
            give(index + _SLOTS)
            take(slice(start, start + count), answer)
            self._emit(Event(phase, (start + count) / len(rows)))
        self._cost |= {f"{phase}_{k}": v for k, v in self._bound.facts().items()}

    def _expect(self, child: Child, kind: str, deadline: float) -> None:
        while not child.wire.waiting(min(LOOK_S, max(0.001, deadline - time.monotonic()))):
            self._bound.check()
            if time.monotonic() >= deadline:
                raise TimedOut
        message = child.wire.recv(max(0.001, deadline - time.monotonic()))
        if message["kind"] == "error":
            raise failure_of(message, self._served, self.source.count(b"\n") + 1)
        if message["kind"] != kind:
            raise TrialError("invalid", f"the evaluator sent something else where {kind!r} was due")
