"""What the tokenizer is trained on: the beginning of each document, up to an amount of text."""

from __future__ import annotations

import pytest

import prepare as prep


def test_of_a_long_document_only_its_beginning_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = "a" * prep.DOCUMENT_CHARS + "b", "c"
    assert list(prep._sample(iter([long, short]))) == [long[:-1], short]
    monkeypatch.setattr(prep, "TOKENIZER_CHARS", 2 * prep.DOCUMENT_CHARS)
    assert len(list(prep._sample(iter([long] * 5)))) == 2
