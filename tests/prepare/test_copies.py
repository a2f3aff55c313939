"""Near-copies across the splits are found, hardly anything else is, and it takes time linear in the text."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from hotloop.harness.data.building import prepare
from hotloop.harness.data.copies import Copies
from hotloop.harness.data.spool import VAL_SHARE, split_share
from hotloop.harness.data.tokenizer import Row

RNG = np.random.default_rng(11)
# Words as frequent as in language, so that two documents share many of them.
WORDS = ["".join(RNG.choice(list("abcdefghijklmnopqrstuvwxyz"), RNG.integers(2, 9))) for _ in range(5000)]
ZIPF = 1 / np.arange(1, 5001)
ZIPF /= ZIPF.sum()


def text() -> str:
    return " ".join(RNG.choice(WORDS, 150, p=ZIPF))


def edited(words: str) -> str:
    """One word in ten replaced, and a sentence in front and behind."""
    new = [str(RNG.choice(WORDS)) if RNG.random() < 0.1 else w for w in words.split()]
    return " ".join([*RNG.choice(WORDS, 12), *new, *RNG.choice(WORDS, 12)])


def test_one_in_a_hundred_planted_copies_is_found(tmp_path: Path) -> None:
    texts = [text() for _ in range(6000)]
    val = [t for t in texts if split_share(t) < VAL_SHARE]
    planted = val[:: len(val) // max(1, len(val) // 100)]
    copies = []
    for original in planted:
        while split_share(copy := edited(original)) < 0.12:
            pass  # until it falls into train
        copies.append(copy)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*texts, *copies]))
    told: list[str] = []
    made = prepare(str(tmp_path / "x.jsonl"), seq_len=64, vocab_size=1024, out=tmp_path / "out", report=told.append)
    found = made.manifest["near_copies"]
    assert found["val"]["documents"] == found["val"]["looked_at"] == len(val)
    assert found["val"]["near_copies"] == len(planted)  # every one, and none of the others
    assert 0.005 < found["val"]["share_of_tokens"] < 0.02
    assert found["holdout"]["near_copies"] == 0
    assert any(f"near-copies of val documents in train: {len(planted)} of {len(val)} looked at" in t for t in told)


def tokens(count: int, rng: np.random.Generator) -> list[Row]:
    """Documents whose runs of tokens repeat as those of a language do."""
    return [(rng.zipf(1.2, 300) % 2000).astype(np.uint16) for _ in range(count)]


def test_the_false_rate() -> None:
    """No document of 4,000 is taken for a copy of one of 8,000 others: fewer than 1 in 1,300, with 95 % confidence."""
    rng = np.random.default_rng(5)
    copies = Copies()
    copies.add("val", tokens(4000, rng))
    for _ in range(8):
        copies.seek(tokens(1000, rng))
    assert copies.facts()["val"]["near_copies"] == 0


def test_what_many_documents_share_makes_no_copies() -> None:
    rng = np.random.default_rng(6)
    header = rng.integers(0, 2000, 200).astype(np.uint16)
    copies = Copies()
    copies.add("val", [np.concatenate([header, d]) for d in tokens(50, rng)])
    copies.seek([np.concatenate([header, d]) for d in tokens(500, rng)])
    assert copies.facts()["val"]["near_copies"] == 0


def test_short_documents_and_none_at_all() -> None:
    copies = Copies()
    copies.add("val", [np.arange(5, dtype=np.uint16)])
    copies.seek([np.arange(5, dtype=np.uint16)])
    assert copies.facts() == {"val": {"documents": 1, "looked_at": 0, "near_copies": 0, "share_of_tokens": 0.0}}


def test_twice_the_text_takes_twice_the_time() -> None:
    """Also where every document has the same header, which comparing pairs could not bear."""
    header = np.arange(100, dtype=np.uint16)

    def seconds(count: int) -> float:
        rng = np.random.default_rng(7)
        copies = Copies()
        val = [np.concatenate([header, d]) for d in tokens(count // 10, rng)]
        train = [np.concatenate([header, d]) for d in tokens(count, rng)]
        began = time.process_time()
        copies.add("val", val)
        for i in range(0, count, 128):
            copies.seek(train[i : i + 128])
        return time.process_time() - began

    small, large = (min(seconds(n) for _ in range(2)) for n in (1000, 8000))
    assert large < 24 * small  # pairs would take 64 times as long
