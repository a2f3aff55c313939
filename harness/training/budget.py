"""The budget: how many training tokens one experiment gets, fixed before its first real token.

The parent measures what one step of each declared shape costs, in seconds of its own clock or in counted
operations. The first shape is the unit: `tokens` is the rule's amount at that shape's cost, in whole steps. A step
of another shape is charged `first_shape_tokens * its_cost / first_shape_cost`, so a short step costs what it takes,
and the whole is a pure function of the record: a replay needs no clock.

A card may train slower than it calibrates (it warms up, its clock falls). The night's baseline shows by how much, and
what follows is held against that: see `held_against`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from hotloop.harness.errors import TrialError
from hotloop.harness.records.model import FixedBudget, ShapeCost
from hotloop.harness.settings import BudgetRule

__all__ = ["SNAP", "Budget", "Shape", "held_against"]

# Budgets closer than this to the incumbent's become the incumbent's: same tokens, same data order.
SNAP = 0.015


@dataclass(frozen=True)
class Shape:
    """One step's batch: `rows` packed sequences of `seq_len` tokens."""

    rows: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


@dataclass
class Budget:
    """Measurements in, charges out.

    Attributes:
        pace: seconds of training for each that the calibration promised, in tokens and limit; 1 where that was right.
        late: the same, in the limit alone: within it, but by so much the baseline was late.
        sustained: tokens a second that an earlier try of this very run reached, which `pace` then follows.

    Raises (from `fix`): TrialError `invalid` when nothing was declared or one step costs more than all there is.
    """

    rule: BudgetRule
    incumbent_tokens: int | None = None
    pace: float = 1.0
    late: float = 1.0
    sustained: float | None = None
    step_s: dict[Shape, float] = field(default_factory=dict)
    step_cpu_s: dict[Shape, float] = field(default_factory=dict)
    flops: dict[Shape, int] = field(default_factory=dict)
    timed_steps: list[int] = field(default_factory=list)  # of each warm-up, in their order
    replayed_steps: list[int] | None = None  # the same of the original, in a replay
    charges: dict[Shape, float] = field(default_factory=dict)
    tokens: int = 0
    snapped: bool = False
    used: float = 0.0

    def measured(self, shape: Shape, steps_s: list[float], flops: int, cpu_s: float = 0.0) -> None:
        """What the calibration of one shape found.

        Args:
            steps_s: each steady step's seconds.
            flops: one step's operations; 0 where the rule does not need them.
            cpu_s: processor seconds of all these steps.
        """
        self.step_s[shape] = statistics.median(steps_s)
        self.step_cpu_s[shape] = cpu_s / len(steps_s)
        self.flops[shape] = flops
        self.timed_steps.append(len(steps_s))

    def recorded_steps(self) -> int | None:
        """How many steps the next warm-up times, where that is on record; None for as many as the clock wants."""
        done = len(self.timed_steps)
        return self.replayed_steps[done] if self.replayed_steps and done < len(self.replayed_steps) else None

    def fix(self) -> None:
        """Turn the measurements into tokens and charges. Replayed budgets are fixed already."""
        if self.tokens:
            return
        if not self.step_s:
            raise TrialError("invalid", "train() asked for data before any run.warmup(...)")
        first = next(iter(self.step_s))
        costs: dict[Shape, float]
        if self.rule.kind == "flops":
            if not all(self.flops.values()):
                raise TrialError("invalid", "a warm-up step did no counted operation (no matrix product)")
            costs = {s: float(f) for s, f in self.flops.items()}
        else:
            costs = self.step_s
            if self.sustained:
                self.pace = first.tokens / self.sustained / costs[first]
        self.charges = {s: first.tokens * c / costs[first] for s, c in costs.items()}
        allowed = self.rule.amount if self.rule.kind == "tokens" else (
            self.rule.amount / (costs[first] * (self.pace if self.rule.kind == "seconds" else 1.0)) * first.tokens
        )  # fmt: skip
        if self.rule.kind == "seconds" and self.incumbent_tokens and abs(allowed / self.incumbent_tokens - 1) < SNAP:
            allowed, self.snapped = self.incumbent_tokens, True
        steps = int(allowed / first.tokens + 1e-9)
        if steps < 1:
            raise TrialError(
                "invalid",
                f"one step of {first.tokens} tokens costs more than the budget of {allowed:.0f} tokens",
            )
        self.tokens = steps * first.tokens

    def affords(self, shape: Shape) -> bool:
        return self.used + self.charges[shape] <= self.tokens * (1 + 1e-9)

    def charge(self, shape: Shape) -> float:
        """Take one step of `shape`; returns the progress before it, in [0, 1)."""
        progress = self.used / self.tokens
        self.used += self.charges[shape]
        return progress

    @property
    def expected_s(self) -> float:
        """Seconds that the budget takes at the first shape's measured speed, and the night's pace."""
        first = next(iter(self.step_s))
        return self.tokens / first.tokens * self.step_s[first] * self.pace

    @property
    def expected_cpu_s(self) -> float:
        """Processor seconds that the budget takes at the first shape's measured cost."""
        first = next(iter(self.step_cpu_s))
        return self.tokens / first.tokens * self.step_cpu_s[first]

    def recorded(self) -> FixedBudget:
        """For the record."""
        shapes = [
            ShapeCost(s.rows, s.seq_len, c, self.step_s.get(s, 0.0), self.flops.get(s, 0))
            for s, c in self.charges.items()
        ]
        return FixedBudget(
            kind=self.rule.kind, amount=self.rule.amount, tokens=self.tokens, snapped=self.snapped,
            timed_steps=list(self.timed_steps), pace=self.pace, late=self.late, shapes=shapes,
        )  # fmt: skip

    @classmethod
    def replay(cls, recorded: FixedBudget) -> Budget:
        """The budget of a record, tokens and charges included."""
        return cls(
            BudgetRule(recorded.kind, recorded.amount), pace=recorded.pace, late=recorded.late, tokens=recorded.tokens,
            replayed_steps=recorded.timed_steps,
            charges={Shape(s.rows, s.seq_len): s.charge for s in recorded.shapes},
        )  # fmt: skip


def held_against(recorded: FixedBudget, training_s: float) -> tuple[float, float]:
    """The `pace` and `late` of what follows a baseline.

    Args:
        recorded: the baseline's budget.
        training_s: how long it trained, by the parent's clock.
    """
    if recorded.kind != "seconds" or not recorded.shapes or not recorded.shapes[0].step_s:
        return 1.0, 1.0
    first = recorded.shapes[0]
    promised_s = recorded.tokens / (first.rows * first.seq_len) * first.step_s * recorded.pace
    return recorded.pace, max(1.0, training_s / promised_s)
