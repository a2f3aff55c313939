"""The built-in agent: deterministic, guided by the history, and it changes constants and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hotloop.agent_loop.agents.agent import AgentError, Context, Tried
from hotloop.agent_loop.agents.builtin import KNOBS, BuiltinAgent, constants, replace_constant
from hotloop.agent_loop.source import ProposalError, check_source, code_lines, merge, syntax_hash

SOURCE = b'''"""A train.py."""
MATRIX_LR = 0.04  # muon
TOTAL_BATCH_SIZE = 2**19  # tokens
WARMDOWN_RATIO = 0.5
OTHER = "text"

LAPTOP = dict(
    TOTAL_BATCH_SIZE=2**12,  # smaller
    DEPTH=4,
)


def build_model(spec): ...
def train(run): ...
'''
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def context(tmp_path: Path, **changes: object) -> Context:
    fields: dict[str, object] = {
        "worktree": tmp_path, "number": 3, "preset": "laptop", "source": SOURCE, "history": [],
        "seen": frozenset({syntax_hash(SOURCE)}), "folder": tmp_path,
    }  # fmt: skip
    return Context(**(fields | changes))  # type: ignore[arg-type]


def test_constants_in_force_by_preset() -> None:
    laptop = {k: c.value for k, c in constants(SOURCE, "laptop").items()}
    assert laptop == {"MATRIX_LR": 0.04, "TOTAL_BATCH_SIZE": 4096, "WARMDOWN_RATIO": 0.5, "DEPTH": 4}
    assert constants(SOURCE, "h100")["TOTAL_BATCH_SIZE"].value == 2**19
    assert "DEPTH" not in constants(SOURCE, "h100")


def test_one_literal_is_replaced_and_nothing_else_moves() -> None:
    new = replace_constant(SOURCE, constants(SOURCE, "laptop")["TOTAL_BATCH_SIZE"], 2048)
    assert new == SOURCE.replace(b"TOTAL_BATCH_SIZE=2**12,", b"TOTAL_BATCH_SIZE=2**11,")
    new = replace_constant(SOURCE, constants(SOURCE, "h100")["MATRIX_LR"], 0.06)
    assert new == SOURCE.replace(b"0.04", b"0.06")


def test_a_proposal_is_a_function_of_seed_number_and_history(tmp_path: Path) -> None:
    descriptions = [BuiltinAgent(7).propose(context(tmp_path)).description for _ in range(3)]
    edited = (tmp_path / "train.py").read_bytes()
    assert len(set(descriptions)) == 1
    check_source(edited)
    assert syntax_hash(edited) != syntax_hash(SOURCE)
    others = {BuiltinAgent(seed).propose(context(tmp_path)).description for seed in range(20)}
    assert len(others) > 3


def test_nothing_is_proposed_twice_and_single_steps_come_first(tmp_path: Path) -> None:
    seen, said = {syntax_hash(SOURCE)}, []
    for _ in range(60):
        said.append(BuiltinAgent(1).propose(context(tmp_path, seen=frozenset(seen))).description)
        new = syntax_hash((tmp_path / "train.py").read_bytes())
        assert new not in seen
        seen.add(new)
    assert all("," not in words for words in said[:8])  # four constants, up and down
    assert any("," in words for words in said[8:])


def test_without_a_constant_the_agent_has_nothing_to_give(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="no constant") as e:
        BuiltinAgent(1).propose(context(tmp_path, source=b"x = 1\n"))
    assert e.value.permanent


def test_what_was_kept_is_tried_further_and_what_was_discarded_avoided(tmp_path: Path) -> None:
    def share(decision: str) -> float:
        history = [Tried(1, decision, "", "MATRIX_LR 0.026 -> 0.04", 1.0)] * 2
        proposals = [BuiltinAgent(s).propose(context(tmp_path, history=history)).description for s in range(150)]
        return sum(p == "MATRIX_LR 0.04 -> 0.06" for p in proposals) / len(proposals)

    assert share("keep") > 3 * share("discard")


def test_every_knob_is_a_constant_of_the_real_train_py() -> None:
    for preset in ("laptop", "h100"):
        found = constants(TRAIN.read_bytes(), preset)
        assert {k.name for k in KNOBS} <= set(found)
        for knob in KNOBS:
            ways = [knob.step(found[knob.name].value, way) for way in (1, -1)]
            assert any(way is not None for way in ways), knob.name


def test_syntax_hash_ignores_layout_and_comments_alone() -> None:
    same = SOURCE.replace(b"  # muon", b"").replace(b'"""A train.py."""', b"")
    assert syntax_hash(same) == syntax_hash(SOURCE)
    assert syntax_hash(SOURCE.replace(b"0.04", b"0.05")) != syntax_hash(SOURCE)


def test_lines_of_code_count_no_blank_comment_or_docstring() -> None:
    source = b'"""Doc\nstring."""\n\n# comment\nx = """a\nb"""\n\ndef f():\n    "doc"\n    return (1,\n        2)\n'
    assert code_lines(source) == 5
    assert code_lines(SOURCE) == len(ast.parse(SOURCE).body) - 1 + 3


@pytest.mark.parametrize(
    ("source", "words"),
    [(b"def train(:", "does not parse"), (b"def train(run): ...", "build_model"), (b"#" * 300_000, "bytes")],
)
def test_what_cannot_run_is_refused(source: bytes, words: str) -> None:
    with pytest.raises(ProposalError, match=words):
        check_source(source)


def test_a_history_with_two_changes_at_once_is_read(tmp_path: Path) -> None:
    history = [Tried(1, "keep", "", "MATRIX_LR 0.026 -> 0.04, WARMDOWN_RATIO 0.35 -> 0.5", 1.0)]
    weights = BuiltinAgent._weights(context(tmp_path, history=history))
    for name in ("MATRIX_LR", "WARMDOWN_RATIO"):
        assert weights[name, 1] > 10 * weights[name, -1]


@pytest.mark.parametrize(
    ("ours", "theirs", "both"),
    [
        (b"A\nb\nc\nd\n", b"a\nB\nc\nd\n", b"A\nB\nc\nd\n"),  # neighbours
        (b"A\nb\nc\nd\n", b"a\nb\nc\nD\n", b"A\nb\nc\nD\n"),
        (b"A\nb\nc\nd\n", b"A\nb\nc\nD\n", b"A\nb\nc\nD\n"),  # the same change twice
        (b"b\nc\nd\n", b"a\nb\nx\nc\nd\n", b"b\nx\nc\nd\n"),
        (b"a\nb\nc\nd\n", b"a\nb\nc\nd\ne\n", b"a\nb\nc\nd\ne\n"),
        (b"A\nb\nc\nd\n", b"X\nb\nc\nd\n", None),
        (b"a\nb\nx\nc\nd\n", b"a\nb\ny\nc\nd\n", None),
        (b"a\nd\n", b"a\nb\nC\nd\n", None),
    ],
)
def test_two_edits_of_one_file_are_put_together_where_they_change_different_lines(
    ours: bytes, theirs: bytes, both: bytes | None
) -> None:
    assert merge(b"a\nb\nc\nd\n", ours, theirs) == both
    assert merge(b"a\nb\nc\nd\n", theirs, ours) == both
