"""The feed: rows of tokens from the parent to the trainer, through shared memory.

The parent decides which rows, in which order, and when. The order is a permutation drawn from the seed, another
one each epoch. Two slots: while the trainer works on one batch, the parent fills the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hotloop.harness.sandbox.process import SharedMemory

__all__ = ["SLOTS", "SLOT_BYTES", "Ring", "RowOrder", "synthetic_rows", "zipf_tokens"]

Rows = npt.NDArray[np.uint16]

SLOTS = 2
SLOT_BYTES = 64 << 20  # sparse until used: 32 M tokens a batch at most
# Of synthetic rows. Zipf's law as Mandelbrot (1953) has it: a token's share is as 1 / (rank + RANK_SHIFT). Figures of
# text in general; nothing is counted.
RANK_SHIFT = 2.7
REPEATS = 0.3  # the share of tokens that come again from earlier in their row


class RowOrder:
    """An endless, deterministic walk over `rows` [N, T + 1].

    A batch may ask for a shorter length that divides T: each row is then cut into T / seq_len pieces that
    overlap by the one token that is target of one and input of the next.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        if len(rows) == 0:
            raise ValueError("no rows to feed")
        self._rows = rows
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation()
        self._pieces: Rows | None = None

    def take(self, count: int, seq_len: int) -> Rows:
        """The next batch, [count, seq_len + 1]. `seq_len` divides T."""
        full = self._rows.shape[1] - 1
        if seq_len == full:
            return self._take_full(count)
        parts: list[Rows] = []
        have = 0
        while have < count:
            if self._pieces is None or self._pieces.shape[1] != seq_len + 1 or len(self._pieces) == 0:
                row = self._take_full(1)[0]
                starts = np.arange(0, full, seq_len)
                self._pieces = row[starts[:, None] + np.arange(seq_len + 1)[None, :]]
            taken, self._pieces = self._pieces[: count - have], self._pieces[count - have :]
            parts.append(taken)
            have += len(taken)
        return np.concatenate(parts)

    def _take_full(self, count: int) -> Rows:
        picks: list[npt.NDArray[np.int64]] = []
        while count > 0:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation()
            part = self._order[self._position : self._position + count]
            picks.append(part)
            self._position += len(part)
            count -= len(part)
        return np.asarray(self._rows[np.concatenate(picks)])

    def _permutation(self) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._rows))


def zipf_tokens(rng: np.random.Generator, shape: tuple[int, ...], vocab_size: int) -> Rows:
    """Independent tokens by Zipf's law, a token's number being its rank."""
    law = np.cumsum(1.0 / (np.arange(1, vocab_size + 1) + RANK_SHIFT))
    found = np.searchsorted(law / law[-1], rng.random(shape), side="right")
    return np.minimum(found, vocab_size - 1).astype(np.uint16)


def synthetic_rows(count: int, seq_len: int, vocab_size: int, seed: int) -> Rows:
    """Tokens [count, seq_len + 1] that cost what text costs and carry no information about any: frequent ones are as
    frequent as in text, and what a row has had comes again in it.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    rows = zipf_tokens(rng, (count, seq_len + 1), vocab_size)
    earlier = (rng.random(rows.shape) * np.arange(seq_len + 1)).astype(np.int64)
    return np.where(rng.random(rows.shape) < REPEATS, np.take_along_axis(rows, earlier, axis=1), rows)


class Ring:
    """The shared slots. The parent writes with `put`, the child reads with `get`."""

    def __init__(self, memory: SharedMemory) -> None:
        self._bytes = np.frombuffer(memory.map, dtype=np.uint8)

    @staticmethod
    def fits(rows: int, seq_len: int) -> bool:
        return 0 < rows * (seq_len + 1) * 2 <= SLOT_BYTES

    def put(self, slot: int, rows: Rows) -> None:
        self._view(slot, *rows.shape)[:] = rows

    def get(self, slot: int, rows: int, seq_len: int) -> Rows:
        return self._view(slot, rows, seq_len + 1)

    def _view(self, slot: int, rows: int, width: int) -> Rows:
        start = slot * SLOT_BYTES
        return self._bytes[start : start + rows * width * 2].view(np.uint16).reshape(rows, width)
