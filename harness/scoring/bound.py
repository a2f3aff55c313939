"""How much an evaluator may compute: it has the weights and a processor, and could go on training there.

Its first batch is apart, with the import of train.py and the model's loading. Each further token may cost so many times
what training on one did. On a CPU that is processor time, on a GPU, which nobody shares, the parent's clock.
"""

from __future__ import annotations

import time

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import EvaluatorTime
from hotloop.harness.sandbox.process import Child
from hotloop.harness.settings import Limits

__all__ = ["SLACK_S", "Bound"]

SLACK_S = 1.0  # what a whole evaluation may take beside: batches of a model that costs next to nothing


class Bound:
    """Args:
    token_s: what training on a token cost; None bounds the first batch only.
    """

    def __init__(self, child: Child, device: str, limits: Limits, token_s: float | None) -> None:
        self._child, self._limits, self._token_s = child, limits, token_s
        self._on_cpu = device == "cpu"
        self._began: float | None = None
        self._first_s: float | None = None
        self._tokens, self._spent_s = 0, 0.0

    def begin(self, tokens: int) -> None:
        """Before the evaluator runs any code of train.py; so many tokens will lie ready for its first batches."""
        self._tokens = tokens
        if self._on_cpu:
            self._child.count_cpu()
        self._began = self._now()

    def answered(self, tokens: int) -> None:
        """A batch was answered; `tokens`, those behind it included, may have been worked on. Raises as `check`."""
        self.check()
        if self._first_s is None:
            self._first_s = self._spent_s
        self._tokens = tokens

    def check(self) -> None:
        """Raises TrialError `overtime` where more was computed than an honest evaluation takes."""
        if self._began is None:
            return
        self._spent_s = self._now() - self._began
        unit = "processor seconds" if self._on_cpu else "seconds"
        due_s = self._limits.evaluate_step * (self._token_s or 0.0) * self._tokens
        if self._first_s is None:
            first_s = self._limits.evaluate_first_s + due_s
            if self._spent_s > first_s:
                raise TrialError(
                    "overtime", f"an evaluator had no first batch after {first_s:.1f} {unit} of train.py's code"
                )
        elif self._token_s is not None:
            allowed_s = due_s + SLACK_S
            if self._spent_s - self._first_s > allowed_s:
                raise TrialError(
                    "overtime", f"an evaluator took more than {allowed_s:.1f} {unit} after its first batch; each token "
                    f"may cost {self._limits.evaluate_step:g} times what training on one did",
                )  # fmt: skip

    def times(self) -> EvaluatorTime:
        """Seconds, of the processor on a CPU: up to the first batch, and after it."""
        first_s = self._first_s or 0.0
        return EvaluatorTime(round(first_s, 3), round(self._spent_s - first_s, 3))

    def _now(self) -> float:
        return self._child.cpu_s() if self._on_cpu else time.monotonic()
