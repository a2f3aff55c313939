"""What an evaluator says once it has rows is not repeated, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.scoring.failures import failure_of


@given(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.sampled_from(["crash", "oom", "nan", "invalid"])))
def test_of_any_words_only_a_kind_and_a_line_are_left(words: str, status: object) -> None:
    error = failure_of({"kind": "error", "status": status, "reason": "Secret" + words}, True, 50)
    assert error.status in ("crash", "oom", "nan", "invalid")
    told = error.reason.removeprefix("while evaluating: an exception").removesuffix("; its words are in evaluate.txt")
    assert told in ("", " (device lost)") or (told.endswith(")") and len(told) < 40)
    assert "Secret" not in error.reason


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("ValueError: a b c (train.py:7)", "ValueError (train.py:7)"),
        ("ValueError: a b c (train.py:51)", "ValueError"),  # it has 50 lines
        ("Val_text_in_a_name: x (train.py:7)", "an exception (train.py:7)"),
        ("TypeError: the model returned (1234, 5678) for tokens", "TypeError: the model's logits are not"),
        ("RuntimeError: CUDA error: uncorrectable ECC (train.py:3)", "RuntimeError (device lost) (train.py:3)"),
        ("MemoryError", "MemoryError"),
    ],
)
def test_what_is_shown(reason: str, shown: str) -> None:
    assert failure_of({"reason": reason}, True, 50).reason.startswith(f"while evaluating: {shown}")


def test_before_a_row_all_is_shown() -> None:
    reason = 'RuntimeError: Error(s) in loading state_dict for Tiny: Missing key(s): "head.weight"'
    error = failure_of({"status": "crash", "reason": reason}, False, 50)
    assert (error.status, error.reason) == ("invalid", f"while evaluating: {reason}")
