"""What the tokenizer is trained on: the beginning of each document, up to an amount of text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hotloop.harness.data import building


def sampled(*texts: str) -> list[str]:
    corpus: Any = SimpleNamespace(documents=lambda split: enumerate(texts))
    return list(building._sample(corpus))


def test_of_a_long_document_only_its_beginning_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = "a" * building.TOKENIZER_DOCUMENT_CHARS + "b", "c"
    assert sampled(long, short) == [long[:-1], short]
    monkeypatch.setattr(building, "TOKENIZER_CHARS", 2 * building.TOKENIZER_DOCUMENT_CHARS)
    assert len(sampled(*[long] * 5)) == 2
