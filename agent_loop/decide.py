"""Keep or discard: pure functions of numbers, each decision with its reason in one sentence."""

from __future__ import annotations

from collections.abc import Callable

from hotloop.agent_loop.night import Night, Row
from hotloop.agent_loop.source import Size, size_of
from hotloop.harness.records.model import Decision, Judgement, Kind, Outcome, Status
from hotloop.harness.scoring.score import Noise, Score

__all__ = ["MARGINAL", "decide", "decide_confirmed", "judge"]

# A gain within the noise floor, but above this share of it, is worth a second seed.
MARGINAL = 0.5


def decide(
    outcome: Outcome,
    size: Size,
    incumbent: Score | None,
    incumbent_size: Size,
    noise: Noise,
    second_seed: bool = False,
    parent: Score | None = None,
) -> Judgement:
    """What becomes of an experiment.

    Keep on a gain above the noise floor; keep when equal within the noise and simpler; marginal on a gain above half
    the floor; else discard.

    Args:
        size, incumbent_size: of the two train.py (`source.size_of`).
        incumbent: None for the first run, which is kept when it has a score.
        noise: the measured floor; a floor of 0 (not measured) keeps any gain.
        second_seed: whether a marginal gain may be tried again; else it is discarded.
        parent: the score of the train.py that was edited, where that is not the incumbent any more.
    """
    if outcome.status != Status.OK or outcome.val_bpb is None:
        return Judgement(Decision(outcome.status), outcome.reason or "no score")
    score = Score(outcome.val_bpb)
    if incumbent is None:
        return Judgement(Decision.KEEP, f"the baseline: {score} bits per byte")
    gain = score.gain_over(incumbent)
    floor = noise.floor_bpb
    known = f"the noise floor of {floor:.6f} ({noise.seeds} seeds)" if floor else "zero (noise was not measured)"
    if gain > floor:
        return Judgement(Decision.KEEP, f"better by {gain:.6f}, above {known}")
    if abs(gain) <= floor and size.simpler_than(incumbent_size):
        return Judgement(
            Decision.KEEP,
            f"equal within {known} ({-gain:+.6f}) and simpler: {size.lines} lines of code against "
            f"{incumbent_size.lines}",
        )
    if parent is not None:
        own = score.gain_over(parent)
        if own > MARGINAL * floor:
            return Judgement(
                Decision.DISCARD,
                f"better than what it was made from by {own:.6f}, but not than what was kept meanwhile ({gain:+.6f}); "
                f"tried again on top of that",
                again=True,
            )
    elif second_seed and gain > MARGINAL * floor:
        return Judgement(Decision.MARGINAL, f"better by {gain:.6f}, which is within {known}; a second seed will tell")
    if gain > 0:
        return Judgement(Decision.DISCARD, f"better by {gain:.6f}, which is within {known}")
    return Judgement(Decision.DISCARD, f"worse by {-gain:.6f}" if gain < 0 else "no change to the last digit")


def decide_confirmed(
    outcome: Outcome, gains: list[float | None], noise: Noise, parent_is_incumbent: bool = True
) -> Judgement:
    """What becomes of a marginal gain after its second seed.

    Args:
        outcome: of the second seed.
        gains: over what was edited, under the same seed, one for each; None where one of the two runs has no score.
        noise: the floor of a single difference; that of a mean of n differences is smaller by the root of n.
        parent_is_incumbent: False where something else was kept while it ran: a gain that holds is tried on top of it.
    """
    if outcome.status != Status.OK:
        return Judgement(Decision(outcome.status), f"with the second seed: {outcome.reason}")
    known = [g for g in gains if g is not None]
    if len(known) < len(gains):
        return Judgement(
            Decision.DISCARD, "the incumbent has no score under the second seed, so nothing can be compared"
        )
    mean, floor = sum(known) / len(known), noise.floor_bpb / len(known) ** 0.5
    each = ", ".join(f"{g:+.6f}" for g in known)
    if mean <= 0:
        return Judgement(Decision.DISCARD, f"worse by {-mean:.6f} on average over {len(known)} seeds ({each})")
    above = mean > floor
    reason = (
        f"better by {mean:.6f} on average over {len(known)} seeds ({each}), {'above' if above else 'within'} the "
        f"noise floor of such a mean, {floor:.6f}"
    )
    if above and not parent_is_incumbent:
        return Judgement(
            Decision.DISCARD, reason + "; something else was kept meanwhile, tried again on top of that", True
        )
    return Judgement(Decision.KEEP if above else Decision.DISCARD, reason)


def judge(
    night: Night,
    outcome: Outcome,
    incumbent: Row | None,
    source_of: Callable[[str], bytes],
    noise: Noise,
    second_seed: bool,
) -> Judgement:
    """The decision on a run of a night, where `incumbent` is the best that was kept before it.

    Args:
        source_of: the train.py of a commit.
    """
    run = outcome.run
    if run.kind == Kind.REPEAT and outcome.status == Status.OK:
        whose = "baseline" if run.commit == night.rows()[0].commit else "incumbent"
        return Judgement(Decision.MEASURED, f"the {whose}'s train.py with seed {run.seed}, for the noise floor")
    same = incumbent is None or incumbent.commit == run.parent
    if run.kind == Kind.CONFIRM:
        return decide_confirmed(outcome, night.gains(outcome, run.parent), noise, same)
    size = _size(source_of, run.commit)
    best_size = _size(source_of, incumbent.commit) if incumbent else size
    if size is None or best_size is None:  # neither is simpler
        size = best_size = Size(0, 0)
    scores = [night.score_of(c, night.seed) if c else None for c in (incumbent and incumbent.commit, run.parent)]
    best, parent = (None if bpb is None else Score(bpb) for bpb in scores)
    return decide(outcome, size, best, best_size, noise, second_seed, None if same else parent)


def _size(source_of: Callable[[str], bytes], commit: str) -> Size | None:
    """Of a train.py; None where it is gone or cannot be measured: what is recorded is decided all the same."""
    try:
        return size_of(source_of(commit))
    except Exception:
        return None
