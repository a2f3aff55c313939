"""Decisions are arithmetic, and each says its numbers."""

from __future__ import annotations

import ast
import base64
import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from hotloop.agent_loop.decide import decide, decide_confirmed
from hotloop.agent_loop.source import Size, size_of
from hotloop.harness.records.model import Outcome, Status
from hotloop.harness.scoring.score import Noise, Score
from tests.builders import make_outcome

NOISE = Noise(0.01, 3)
SIZE = Size(100, 1000)


def outcome(bpb: float | None, status: str = "ok") -> Outcome:
    return make_outcome(val_bpb=bpb, status=Status(status), reason="because" if status != "ok" else "")


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
        (1.9899, 100, "keep", "better by 0.010100, above"),
        (1.9905, 100, "discard", "better by 0.009500, which is within"),
        (2.0099, 99, "keep", "(+0.009900) and simpler"),
        (2.0105, 50, "discard", "worse by 0.010500"),
    ],
)
def test_with_an_incumbent_of_2_and_100_lines(bpb: float, lines: int, decision: str, words: str) -> None:
    made = decide(outcome(bpb), Size(lines, 10 * lines), Score(2.0), SIZE, NOISE)
    assert (made.decision, words in made.reason) == (decision, True), made


def test_the_first_score_is_the_baseline() -> None:
    assert decide(outcome(2.0), SIZE, None, SIZE, Noise(0.0, 0)).decision == "keep"


@pytest.mark.parametrize(
    ("bpb", "decision"),
    [(1.980, "keep"), (1.9905, "marginal"), (1.9949, "marginal"), (1.9951, "discard"), (2.001, "discard")],
)
def test_a_gain_of_more_than_half_the_floor_is_marginal_where_it_may_be_tried_again(bpb: float, decision: str) -> None:
    made = decide(outcome(bpb), SIZE, Score(2.0), SIZE, NOISE, second_seed=True)
    assert made.decision == decision, made
    assert ("a second seed will tell" in made.reason) == (decision == "marginal")


@pytest.mark.parametrize(
    ("gains", "decision", "words"),
    [
        ([0.006, 0.009], "keep", "better by 0.007500 on average over 2 seeds (+0.006000, +0.009000), above the noise"),
        ([0.0071, 0.0072], "keep", "above the noise floor of such a mean, 0.007071"),
        ([0.007, 0.0071], "discard", "within the noise floor of such a mean, 0.007071"),
        ([0.006, -0.02], "discard", "worse by 0.007000 on average"),
        ([0.006, None], "discard", "nothing can be compared"),
    ],
)
def test_two_seeds_decide_by_their_mean(gains: list[float | None], decision: str, words: str) -> None:
    made = decide_confirmed(outcome(2.0), gains, NOISE)
    assert (made.decision, words in made.reason) == (decision, True), made
    failed = decide_confirmed(outcome(None, "oom"), gains, NOISE)
    assert (failed.decision, failed.reason) == ("oom", "with the second seed: because")


def test_noise_is_pooled_over_groups_of_seeds() -> None:
    one, two = [2.0, 2.1, 2.3], [1.5, 1.4]
    alone = Noise.from_repeats(one)
    assert Noise.from_repeats(one, [7.0]) == alone
    pooled = Noise.from_repeats(one, two)
    squares = sum((x - sum(g) / len(g)) ** 2 for g in (one, two) for x in g)
    assert pooled.floor_bpb == pytest.approx(2 * 2**0.5 * (squares / 3) ** 0.5)
    assert pooled.seeds == 5
    assert Noise.from_repeats([2.0]) == Noise(0.0, 1)


@pytest.mark.parametrize("status", ["crash", "invalid", "overtime", "timeout", "oom", "nan"])
def test_a_failure_is_its_status(status: str) -> None:
    made = decide(outcome(None, status), Size(1, 1), Score(2.0), SIZE, NOISE)
    assert (made.decision, made.reason) == (status, "because")


def test_without_measured_noise_any_gain_counts() -> None:
    assert decide(outcome(1.9999), SIZE, Score(2.0), SIZE, Noise(0.0, 1)).decision == "keep"


def test_simpler_is_fewer_lines_and_less_syntax() -> None:
    one_line, short = size_of(b"x = 1; y = 2\n"), size_of(b"x = 1\ny = 2\n")
    assert one_line.lines < short.lines
    assert not one_line.simpler_than(short)  # two statements on one line
    assert not size_of(b"x = 256\ny = 2\n").simpler_than(size_of(b"x = 2**8\ny = 2\n"))  # a number written otherwise
    assert size_of(b"x = 1\n").simpler_than(short)


PACKED = {  # how the code is kept, and what makes it run again
    "a string": lambda code: f"import builtins as b\ngetattr(b, 'exec')({code.decode()!r}, globals())\n",
    "a compressed string": lambda code: (
        f"import bz2, base64, builtins as b\nT = {base64.b85encode(bz2.compress(code, 9)).decode()!r}\n"
        "getattr(b, 'exec')(bz2.decompress(base64.b85decode(T)), globals())\n"
    ),
    "a comment": lambda code: (
        f"# {base64.b85encode(lzma.compress(code, preset=9)).decode()}\n"
        "import lzma, base64\nT = open(__file__).readline()[2:]\n"
        "open('m.py', 'wb').write(lzma.decompress(base64.b85decode(T)))\n"
        "from m import *\n"
    ),
    "an integer": lambda code: (
        f"N = {hex(int.from_bytes(zlib.compress(code, 9)))}\nimport zlib\n"
        "open('m.py', 'wb').write(zlib.decompress(N.to_bytes(N.bit_length() // 8 + 1)))\nfrom m import *\n"
    ),
    "a docstring": lambda code: (
        f'"""{base64.b85encode(bz2.compress(code, 9)).decode()}"""\nimport bz2, base64\n'
        "open('m.py', 'wb').write(bz2.decompress(base64.b85decode(__doc__)))\nfrom m import *\n"
    ),
}


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_packing_the_code_makes_nothing_simpler(pack: Callable[[bytes], str]) -> None:
    real = (Path(__file__).resolve().parents[2] / "train.py").read_bytes()
    packed = pack(real).encode()
    ast.parse(packed)
    assert size_of(packed).lines < size_of(real).lines
    assert not size_of(packed).simpler_than(size_of(real))
    assert decide(outcome(2.0), size_of(packed), Score(2.0), size_of(real), NOISE).decision == "discard"
    begin, end = (real.index(b"    if progress < " + x) for x in (b"hp.WARMUP_RATIO", b"1.0 - hp.WARMDOWN"))
    assert size_of(real[:begin] + real[end:]).simpler_than(size_of(real))


def test_what_was_better_than_its_parent_is_tried_again_on_top_of_what_was_kept_meanwhile() -> None:
    made = decide(outcome(1.99), SIZE, Score(1.97), SIZE, NOISE, second_seed=True, parent=Score(2.0))
    assert (made.decision, made.again) == ("discard", True)
    assert "better than what it was made from by 0.010000" in made.reason
    best_of_both = decide(outcome(1.95), SIZE, Score(1.97), SIZE, NOISE, parent=Score(2.0))
    assert (best_of_both.decision, best_of_both.again) == ("keep", False)
    again = [decide(outcome(bpb), SIZE, Score(1.97), SIZE, NOISE, parent=Score(2.0)).again for bpb in (1.9949, 1.9951)]
    assert again == [True, False]  # half the floor
    worse = decide(outcome(2.01), SIZE, Score(1.97), SIZE, NOISE, parent=Score(2.0))
    assert (worse.decision, worse.again) == ("discard", False)
    confirmed = decide_confirmed(outcome(1.99), [0.01, 0.01], NOISE, parent_is_incumbent=False)
    assert (confirmed.decision, confirmed.again) == ("discard", True)
