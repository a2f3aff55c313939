"""The feed's order is a function of the seed alone, and every row is served once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.sandbox.process import SharedMemory
from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring, RowOrder, synthetic_rows, zipf_tokens


def rows(n: int, t: int) -> np.ndarray:
    return np.arange(n * (t + 1), dtype=np.uint16).reshape(n, t + 1)


@given(n=st.integers(1, 40), batches=st.lists(st.integers(1, 17), min_size=1, max_size=12), seed=st.integers(0, 9))
def test_each_epoch_serves_each_row_once_whatever_the_batch(n: int, batches: list[int], seed: int) -> None:
    order = RowOrder(rows(n, 4), seed)
    served = np.concatenate([order.take(b, 4)[:, 0] // 5 for b in batches])
    for epoch in range(len(served) // n):
        assert sorted(served[epoch * n : (epoch + 1) * n]) == list(range(n))
    again = RowOrder(rows(n, 4), seed)
    one_by_one = np.concatenate([again.take(1, 4)[:, 0] // 5 for _ in range(len(served))])
    assert (served == one_by_one).all()


def test_another_seed_is_another_order() -> None:
    first, second = (RowOrder(rows(100, 4), s).take(100, 4) for s in (1, 2))
    assert not (first == second).all()


def test_shorter_rows_cover_every_target_once() -> None:
    data = rows(6, 8)
    pieces = RowOrder(data, 1).take(12, 4)
    assert sorted(pieces[:, 1:].ravel()) == sorted(data[:, 1:].ravel())
    uneven = RowOrder(data, 1)
    assert (np.concatenate([uneven.take(5, 4), uneven.take(7, 4)]) == pieces).all()


def test_the_ring_carries_two_batches_at_a_time() -> None:
    memory = SharedMemory(SLOTS * SLOT_BYTES)
    ring = Ring(memory)
    a, b = rows(3, 5), rows(7, 2) + np.uint16(9)
    ring.put(0, a)
    ring.put(1, b)
    assert (ring.get(0, 3, 5) == a).all()
    assert (ring.get(1, 7, 2) == b).all()
    assert not Ring.fits(SLOT_BYTES // 2, 1)
    assert not Ring.fits(0, 8)
    del ring
    memory.close()


def test_synthetic_tokens_are_in_the_vocabulary_and_as_frequent_as_those_of_text() -> None:
    vocab, seq_len = 8192, 2048
    tokens = synthetic_rows(64, seq_len, vocab, 0)
    assert tokens.shape == (64, seq_len + 1)
    assert tokens.dtype == np.uint16 and tokens.max() < vocab
    assert (tokens == synthetic_rows(64, seq_len, vocab, 0)).all()
    assert (tokens != synthetic_rows(64, seq_len, vocab, 1)).any()
    # Zipf's law: the share of rank r is as 1 / (r + 2.7), repeats or not.
    law = 1.0 / (np.arange(1, vocab + 1) + 2.7)
    share, want = np.bincount(tokens.ravel(), minlength=vocab) / tokens.size, law / law.sum()
    for first, end in ((0, 1), (1, 4), (4, 32), (32, 256), (256, 2048), (2048, vocab)):
        assert 0.9 < share[first:end].sum() / want[first:end].sum() < 1.1


def test_what_a_row_has_had_comes_again_in_it() -> None:
    """Rare tokens of one row, which would hardly ever meet if each were drawn for itself."""

    def met(rows: np.ndarray) -> float:
        rare = [row[row > 4096] for row in rows]
        return float(np.mean([len(row) - len(np.unique(row)) for row in rare]))

    assert met(synthetic_rows(64, 2048, 8192, 0)) > 3 * met(zipf_tokens(np.random.default_rng(0), (64, 2049), 8192))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(rows(1, 4)[:0], 0)
