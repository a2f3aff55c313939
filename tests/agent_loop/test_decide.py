"""Decisions are arithmetic, and each says its numbers."""

from __future__ import annotations

import pytest

from agent_loop.decide import decide
from harness.record import Outcome
from harness.score import Noise, Score

NOISE = Noise(0.01, 3)


def outcome(bpb: float | None, status: str = "ok") -> Outcome:
    return Outcome(
        number=1, tag="t", kind="experiment", commit="c", parent="p", description="d", seed=1, preset="laptop",
        device="cpu", source_sha256="", status=status, reason="because" if status != "ok" else "", val_bpb=bpb,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bpb", "lines", "decision", "words"),
    [
        (1.980, 100, "keep", "better by 0.020000, above the noise floor of 0.010000 (3 seeds)"),
        (1.995, 100, "discard", "better by 0.005000, which is within"),
        (1.995, 99, "keep", "simpler: 99 lines of code against 100"),
        (2.005, 99, "keep", "(+0.005000) and simpler"),
        (2.005, 100, "discard", "worse by 0.005000"),
        (2.020, 50, "discard", "worse by 0.020000"),
        (2.000, 100, "discard", "no change to the last digit"),
        (1.980, 500, "keep", "better by"),
    ],
)
def test_with_an_incumbent_of_2_and_100_lines(bpb: float, lines: int, decision: str, words: str) -> None:
    made = decide(outcome(bpb), lines, Score(2.0), 100, NOISE)
    assert (made.decision, words in made.reason) == (decision, True), made


def test_the_first_score_is_the_baseline() -> None:
    assert decide(outcome(2.0), 100, None, 0, Noise(0.0, 0)).decision == "keep"


@pytest.mark.parametrize("status", ["crash", "invalid", "overtime", "timeout", "oom", "nan"])
def test_a_failure_is_its_status(status: str) -> None:
    made = decide(outcome(None, status), 1, Score(2.0), 100, NOISE)
    assert (made.decision, made.reason) == (status, "because")


def test_without_measured_noise_any_gain_counts() -> None:
    assert decide(outcome(1.9999), 100, Score(2.0), 100, Noise(0.0, 1)).decision == "keep"
