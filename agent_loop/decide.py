"""Keep or discard: pure functions of numbers, each decision with its reason in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from harness.record import Outcome
from harness.score import Noise, Score

__all__ = ["MARGINAL", "Decision", "decide", "decide_confirmed"]

# A gain within the noise floor, but above this share of it, is worth a second seed.
MARGINAL = 0.5


@dataclass(frozen=True)
class Decision:
    """`decision` is `keep`, `discard`, `marginal` (a second seed will tell), or the status of a run that failed."""

    decision: str
    reason: str


def decide(
    outcome: Outcome,
    lines: int,
    incumbent: Score | None,
    incumbent_lines: int,
    noise: Noise,
    second_seed: bool = False,
) -> Decision:
    """What becomes of an experiment.

    Keep on a gain above the noise floor; keep when equal within the noise and shorter; marginal on a gain above half
    the floor; else discard.

    Args:
        lines, incumbent_lines: lines of code (`source.code_lines`).
        incumbent: None for the first run, which is kept when it has a score.
        noise: the measured floor; a floor of 0 (not measured) keeps any gain.
        second_seed: whether a marginal gain may be tried again; else it is discarded.
    """
    if outcome.status != "ok" or outcome.val_bpb is None:
        return Decision(outcome.status if outcome.status != "ok" else "crash", outcome.reason or "no score")
    score = Score(outcome.val_bpb)
    if incumbent is None:
        return Decision("keep", f"the baseline: {score} bits per byte")
    gain = score.gain_over(incumbent)
    floor = noise.floor_bpb
    known = f"the noise floor of {floor:.6f} ({noise.seeds} seeds)" if floor else "zero (noise was not measured)"
    if gain > floor:
        return Decision("keep", f"better by {gain:.6f}, above {known}")
    if abs(gain) <= floor and lines < incumbent_lines:
        return Decision(
            "keep", f"equal within {known} ({-gain:+.6f}) and simpler: {lines} lines of code against {incumbent_lines}"
        )
    if second_seed and gain > MARGINAL * floor:
        return Decision("marginal", f"better by {gain:.6f}, which is within {known}; a second seed will tell")
    if gain > 0:
        return Decision("discard", f"better by {gain:.6f}, which is within {known}")
    return Decision("discard", f"worse by {-gain:.6f}" if gain < 0 else "no change to the last digit")


def decide_confirmed(outcome: Outcome, gains: list[float | None], noise: Noise) -> Decision:
    """What becomes of a marginal gain after its second seed.

    Args:
        outcome: of the second seed.
        gains: over the incumbent under the same seed, one for each; None where one of the two runs has no score.
        noise: the floor of a single difference; that of a mean of n differences is smaller by the root of n.
    """
    if outcome.status != "ok":
        return Decision(outcome.status, f"with the second seed: {outcome.reason}")
    known = [g for g in gains if g is not None]
    if len(known) < len(gains):
        return Decision("discard", "the incumbent has no score under the second seed, so nothing can be compared")
    mean, floor = sum(known) / len(known), noise.floor_bpb / len(known) ** 0.5
    each = ", ".join(f"{g:+.6f}" for g in known)
    above = mean > floor
    return Decision(
        "keep" if above else "discard",
        f"better by {mean:.6f} on average over {len(known)} seeds ({each}), {'above' if above else 'within'} the "
        f"noise floor of such a mean, {floor:.6f}"
        if mean > 0
        else f"worse by {-mean:.6f} on average over {len(known)} seeds ({each})",
    )
