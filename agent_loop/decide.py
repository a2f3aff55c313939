"""Keep or discard: pure functions of numbers, each decision with its reason in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from harness.record import Outcome
from harness.score import Noise, Score

__all__ = ["Decision", "decide"]


@dataclass(frozen=True)
class Decision:
    """`decision` is `keep`, `discard`, or the status of a run that failed."""

    decision: str
    reason: str


def decide(outcome: Outcome, lines: int, incumbent: Score | None, incumbent_lines: int, noise: Noise) -> Decision:
    """What becomes of an experiment.

    Keep on a gain above the noise floor; keep when equal within the noise and shorter; else discard.

    Args:
        lines, incumbent_lines: lines of code (`source.code_lines`).
        incumbent: None for the first run, which is kept when it has a score.
        noise: the measured floor; a floor of 0 (not measured) keeps any gain.
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
    if gain > 0:
        return Decision("discard", f"better by {gain:.6f}, which is within {known}")
    return Decision("discard", f"worse by {-gain:.6f}" if gain < 0 else "no change to the last digit")
