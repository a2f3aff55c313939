"""How much an evaluator may compute: it has the weights and a processor, and could go on training there.

Its first batch is apart, with the import of train.py and the model's loading. What that may take, and what each token
may take after it, is held against two things: what the evaluation of the night's baseline took, and for tokens what
training on one did. On a CPU it is processor time, by the cgroup where there is one; on a GPU, which nobody shares, the
parent's clock. The parent's clock bounds the whole anywhere (`Limits.evaluate_s`).
"""

from __future__ import annotations

import time

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import EvaluatorTime
from hotloop.harness.sandbox.process import Child
from hotloop.harness.settings import Limits

__all__ = ["SLACK_S", "Bound"]

SLACK_S = 0.5  # what a whole evaluation may take beside: batches of a model that costs next to nothing


class Bound:
    """What an evaluator may compute before it is stopped.

    Args:
        tokens: that evaluator A is given in all, which is what the baseline's `rest_s` was for.
        token_s: what training on a token cost; None for no such bound.
        baseline: what the night's baseline took; None where there is none.
    """

    def __init__(
        self, device: str, limits: Limits, tokens: int, token_s: float | None, baseline: EvaluatorTime | None = None
    ) -> None:
        self._on_cpu, self._limits = device == "cpu", limits
        self._first_most_s = limits.evaluate_first_s
        dues_s = [] if token_s is None else [limits.evaluate_step * token_s]
        if baseline is not None:
            self._first_most_s = min(self._first_most_s, limits.evaluate_baseline * (baseline.first_s + SLACK_S))
            dues_s.append(limits.evaluate_baseline * baseline.rest_s / tokens)
        self._token_s = min(dues_s, default=None)
        self._child: Child | None = None
        self._began = 0.0
        self._first_s: float | None = None
        self._tokens, self._spent_s = 0, 0.0

    def begin(self, child: Child, tokens: int) -> None:
        """Before the evaluator runs any code of train.py; it may work on so many tokens before its first answer."""
        self._child, self._tokens = child, tokens
        if self._on_cpu:
            child.count_cpu()
        self._began = self._now()

    def answered(self, tokens: int) -> None:
        """A batch was answered; `tokens`, those behind it included, may have been worked on. Raises as `check`."""
        self.check()
        if self._first_s is None:
            self._first_s = self._spent_s
        self._tokens = tokens

    def check(self) -> None:
        """Raises TrialError `overtime` where more was computed than an honest evaluation takes."""
        if self._child is None:
            return
        self._spent_s = self._now() - self._began
        unit = "processor seconds" if self._on_cpu else "seconds"
        due_s = (self._token_s or 0.0) * self._tokens
        if self._first_s is None:
            first_s = self._first_most_s + due_s
            if self._spent_s > first_s:
                raise TrialError(
                    "overtime", f"an evaluator had no first batch after {first_s:.1f} {unit} of train.py's code"
                )
        elif self._token_s is not None:
            allowed_s = due_s + SLACK_S
            if self._spent_s - self._first_s > allowed_s:
                raise TrialError(
                    "overtime", f"an evaluator took more than {allowed_s:.1f} {unit} after its first batch; each token "
                    f"may cost {self._limits.evaluate_step:g} times what training on one did, and "
                    f"{self._limits.evaluate_baseline:g} times what the baseline's scoring did",
                )  # fmt: skip

    def times(self) -> EvaluatorTime:
        """Seconds, of the processor on a CPU: up to the first batch, and after it."""
        first_s = self._first_s or 0.0
        return EvaluatorTime(round(first_s, 3), round(self._spent_s - first_s, 3))

    def _now(self) -> float:
        assert self._child is not None
        return self._child.cpu_s() if self._on_cpu else time.monotonic()
