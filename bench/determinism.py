"""What results that repeat to the bit, as trainings are asked for, cost against those that need not.

hotloop bench determinism [--pairs N]
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

from hotloop.harness.errors import HotloopError
from hotloop.harness.profile import Machine
from hotloop.harness.tuning.runner import Setting, StepRunner
from hotloop.harness.tuning.selection import Unfit

__all__ = ["COST_ALLOWED", "determinism"]

COST_ALLOWED = 0.02  # of the speed, that repeatable results may cost before they are worth giving up


def determinism(
    source: bytes, machine: Machine, pairs: int, say: Callable[[str], None] = print,
    start: Callable[[Setting], Any] | None = None,
) -> int:  # fmt: skip
    """Print tokens a second with and without repeatable results, in pairs of changing order, and what they cost.

    Returns:
        0 when all of them ran, whatever the cost.

    Raises:
        HotloopError: one of them does not run.
    """
    start = start or (lambda s: StepRunner(s, source, machine.preset, machine.device, machine.sandbox))
    kinds = [Setting("repeatable"), Setting("free", repeatable=False)]
    costs = []
    with contextlib.ExitStack() as stack:
        try:
            runners = {s.name: stack.enter_context(contextlib.closing(start(s))) for s in kinds}
            for pair in range(pairs):
                rates = {s.name: runners[s.name].turn() for s in (kinds if pair % 2 else kinds[::-1])}
                costs.append(1 - rates["repeatable"] / rates["free"])
                told = ", ".join(f"{s.name} {rates[s.name]:,.0f}" for s in kinds)
                say(f"pair {pair}: tokens/s {told}; repeatable costs {costs[-1]:+.2%}")
        except Unfit as e:
            raise HotloopError(f"the step cannot be timed: {e}") from None
    cost = statistics.median(costs)
    say(
        f"Repeatable results cost {cost:+.2%} of the speed (median of {pairs}, {min(costs):+.2%} to {max(costs):+.2%})."
    )
    if machine.device == "cpu":
        say("CPU figures: a trial of the way, they say nothing of a GPU.")
    elif cost > COST_ALLOWED:
        say(f"Above {COST_ALLOWED:.0%}: where speed matters more than proof, --fast-nondeterministic is worth it.")
    else:
        say(f"Within {COST_ALLOWED:.0%}: --fast-nondeterministic is not worth what it gives up.")
    return 0
