"""Trainings that need not repeat (--fast-nondeterministic): what they are spared; none is taken for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hotloop.harness import single
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Environment, Outcome
from hotloop.harness.sandbox.process import child_environment
from hotloop.harness.scoring.evaluation import Evaluator, Scoring
from hotloop.harness.settings import Spec
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Session, SessionConfig
from tests.builders import make_outcome, make_run
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source

pytestmark = pytest.mark.usefixtures("warm_children")


SPEC, PRESET = Spec("laptop", "cpu", 1, VOCAB, LENGTH), tiny_preset()
ASKED = (
    "import os\n"
    "print('ASKED', torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'), "
    "os.environ.get('TORCHINDUCTOR_DETERMINISTIC'), flush=True)"
)


def train(folder: Path, source: bytes, repeatable: bool) -> Session:
    return Session(SessionConfig(
        source=source, spec=SPEC, preset=PRESET, rows=tiny_rows(256, 0), budget=Budget(PRESET.budget), folder=folder,
        threads=1, repeatable=repeatable,
    )).run()  # fmt: skip


@pytest.mark.parametrize(("repeatable", "asked"), [(True, "True :4096:8 1"), (False, "False None None")])
def test_the_training_is_asked_or_spared_and_the_evaluation_always_asked(
    folder: Path, repeatable: bool, asked: str
) -> None:
    source = tiny_source(
        START=ASKED, LOGITS=f"if not self.training:\n    {ASKED.replace(chr(10), '; ')}\nreturn self.head(x)"
    )
    weights = train(folder, source, repeatable).weights
    assert f"ASKED {asked}\n" in (folder / "log.txt").read_text()
    val, bytes_ = tiny_rows(64, 1), np.ones(VOCAB, dtype=np.int32)
    Evaluator(
        Scoring(
            source=source, spec=SPEC, preset=PRESET, val=val, holdout=tiny_rows(16, 2), train=tiny_rows(64, 0),
            token_bytes=bytes_, folder=folder, threads=1,
        )
    ).run(weights)  # fmt: skip
    said = [x for x in (folder / "evaluate.txt").read_text().splitlines() if x.startswith("ASKED")]
    assert said and set(said) == {"ASKED True :4096:8 1"}


def test_only_what_asks_for_repetition_is_left_out() -> None:
    asked, spared = child_environment(1), child_environment(1, repeatable=False)
    assert asked.items() - spared.items() == {
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        ("TORCHINDUCTOR_DETERMINISTIC", "1"),
        ("TORCHINDUCTOR_SHAPE_PADDING", "0"),  # which is else decided by timing
    }
    assert not spared.items() - asked.items()


# ---- the replay of one compares scores


def outcome(number: int, val_bpb: float, seed: int = 1, repeatable: bool = False, tokens: int = 4096) -> Outcome:
    environment = Environment(repeatable=repeatable)
    return make_outcome(make_run(number, "single", seed=seed), val_bpb, tokens=tokens, environment=environment)


@pytest.mark.parametrize(
    ("others", "now", "status", "words"),
    [
        ([], 2.5, 0, "val_bpb differs by +0.500000; no train.py was run here under two seeds"),
        ([outcome(1, 2.01, seed=2)], 2.015, 0, "within the noise floor of seeds, 0.020000"),
        ([outcome(1, 2.01, seed=2)], 1.97, 1, "differs by -0.030000, DIFFERENT: above the noise floor"),
        # Neither another budget nor one that was asked to repeat tells its noise.
        ([outcome(1, 2.9, seed=2, tokens=9)], 2.5, 0, "no train.py was run here under two seeds"),
        ([outcome(1, 2.9, seed=2, repeatable=True)], 2.5, 0, "no train.py was run here under two seeds"),
    ],
)
def test_scores_are_held_against_the_noise_of_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[Outcome], now: float, status: int, words: str
) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    was = outcome(0, 2.0)
    for one in (was, *others):
        chain.append(one)
    assert single._about_the_same(was, outcome(0, now), chain) == status
    said = capsys.readouterr().out
    assert said.startswith("the weights differ, as those of --fast-nondeterministic may\n")
    assert words in said
