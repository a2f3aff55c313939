"""Near-copies across the splits: val and holdout documents of which train holds another version.

Every run of 8 tokens of a document is hashed and one in eight hashes is kept, by its value. A val document is a
near-copy when a single train document holds at least three tenths of what was kept of it. Hashes that more than eight
val documents share (headers, licences) tell nothing and are left out, so the work is linear in the text.
Documents of which fewer than four hashes were kept (some forty tokens) are not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hotloop.harness.data.tokenizer import Row

__all__ = ["Copies"]

GRAM = 8  # tokens
KEEP_BITS = 3  # one hash in 2^3
LEAST_SHARE = 0.3
LEAST_GRAMS = 4
MOST_OWNERS = 8

Hashes = npt.NDArray[np.uint64]
_FACTOR = 0x9E3779B97F4A7C15


def _grams(documents: list[Row]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The kept hashes of each document, once each, and whose they are."""
    tokens = np.concatenate(documents).astype(np.uint64)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    n = len(tokens) - GRAM + 1
    if n < 1:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(GRAM):
        hashes *= np.uint64(_FACTOR)
        hashes += tokens[i : i + n]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(_FACTOR)
    keep = (hashes >> np.uint64(64 - KEEP_BITS) == 0) & (owner[:n] == owner[GRAM - 1 :])
    hashes, owner = hashes[keep], owner[:n][keep]
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[new], owner[new]


class Copies:
    """`add` the documents of val and holdout, then `seek` those of train."""

    def __init__(self) -> None:
        self._hashes: list[Hashes] = []
        self._owners: list[npt.NDArray[np.int64]] = []
        self._splits: list[str] = []
        self._tokens: list[int] = []
        self._index: tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
        self._found: set[int] = set()

    def add(self, split: str, documents: list[Row]) -> None:
        hashes, owners = _grams(documents)
        self._hashes.append(hashes)
        self._owners.append(owners + len(self._splits))
        self._splits += [split] * len(documents)
        self._tokens += map(len, documents)

    def seek(self, documents: list[Row]) -> None:
        if self._index is None:
            self._index = self._build()
        known, first, owners, grams = self._index
        hashes, train = _grams(documents)
        at = np.searchsorted(known, hashes)
        hit = at < len(known)
        hit[hit] = known[at[hit]] == hashes[hit]
        at, train = at[hit], train[hit]
        many = first[at + 1] - first[at]
        # One line for each (train document, val document) that share a hash.
        at_owner = np.repeat(first[at], many) + np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        pairs, counts = np.unique(np.repeat(train, many) * len(grams) + owners[at_owner], return_counts=True)
        found = pairs % max(1, len(grams))
        self._found.update(found[counts >= LEAST_SHARE * grams[found]].tolist())

    def _build(self) -> tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Hashes in order, where the owners of each begin, the owners, and how many hashes each owner has."""
        hashes, owners = np.concatenate(self._hashes), np.concatenate(self._owners)
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        known, first, many = np.unique(hashes, return_index=True, return_counts=True)
        good = np.repeat(many <= MOST_OWNERS, many)
        grams = np.bincount(owners[good], minlength=len(self._splits))
        good &= grams[owners] >= LEAST_GRAMS
        hashes, owners = hashes[good], owners[good]
        known, first = np.unique(hashes, return_index=True)
        return known, np.append(first, len(hashes)), owners, grams

    def facts(self) -> dict[str, Any]:
        """By split: documents, those that were looked at, near-copies, and the share of tokens that these have."""
        index = self._index or self._build()
        told: dict[str, Any] = {}
        for split in dict.fromkeys(self._splits):
            mine = [i for i, s in enumerate(self._splits) if s == split]
            copies = [i for i in mine if i in self._found]
            told[split] = {
                "documents": len(mine),
                "looked_at": sum(int(index[3][i]) >= LEAST_GRAMS for i in mine),
                "near_copies": len(copies),
                "share_of_tokens": sum(self._tokens[i] for i in copies) / max(1, sum(self._tokens[i] for i in mine)),
            }
        return told
