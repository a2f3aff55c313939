"""The feed's order is a function of the seed alone, and every row is served once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.feed import SLOT_BYTES, SLOTS, Ring, RowOrder, synthetic_rows
from harness.process import SharedMemory


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


def test_synthetic_tokens_are_in_the_vocabulary_and_skewed() -> None:
    tokens = synthetic_rows(64, 256, 2048, 0)
    assert tokens.shape == (64, 257)
    assert tokens.max() < 2048
    assert np.median(tokens) < 2048 * 0.2


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(rows(1, 4)[:0], 0)
