"""Documents on the disk, read once from whatever they came in, and which split each of them falls into.

By chance where there are many: a hash of the document (of the whole file, where it is a part of a text file), the same
whatever stands beside it. By place where they are too few or too unequal for that: the end of the text is val, what is
before it holdout, each in one piece.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotloop.harness.data.dataset import SPLITS
from hotloop.harness.data.readers import Document, Tally, shown
from hotloop.harness.errors import DataError

__all__ = ["HOLDOUT_SHARE", "VAL_SHARE", "Spool", "split_share"]

VAL_SHARE, HOLDOUT_SHARE = 0.08, 0.04
# Chance is good enough where val and holdout are within this factor of their shares of the text.
UNEVEN = 4.0
_TRAIN, _VAL, _HOLDOUT = range(3)


def split_share(key: str) -> float:
    """From 0 to 1, by a hash of what identifies a document; below VAL_SHARE it is val, then holdout, then train."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


class Spool:
    """The documents of all files, written to the disk once, and which split each belongs to.

    Attributes:
        tally: of what was read; its `read` are the documents here and those that were refused.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self._file = open(path, "wb+", opener=lambda p, flags: os.open(p, flags, 0o600))  # noqa: SIM115 - closed below
        self._names = names
        self._offsets, self._places = array("q", [0]), array("q")
        self._files, self._given = array("l"), array("b")
        self._shares = array("d")
        self._splits: npt.NDArray[np.int8] = np.empty(0, dtype=np.int8)
        self._last = ("", 0.0)
        self.tally = Tally()

    def close(self) -> None:
        self._file.close()

    def add(self, document: Document, file: int, given: int = -1) -> None:
        """Args:
        file: the index of its file's name.
        given: the index of the split that its source says; -1 for none.
        """
        try:
            data = document.text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            data = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            self.tally.mended += 1
        key = document.key or document.text
        if key is not self._last[0]:  # the parts of a file come one after the other
            self._last = (key, split_share(key))
        self._file.write(data)
        self._offsets.append(self._offsets[-1] + len(data))
        self._places.append(document.place)
        self._files.append(file)
        self._given.append(given)
        self._shares.append(self._last[1])

    def where(self, index: int) -> str:
        return f"{shown(self._names[self._files[index]])}:{self._places[index]}"

    def assign(self) -> str:
        """Decide every document's split; returns how, in words.

        Raises:
            DataError: there are fewer than three documents.
        """
        self._file.flush()
        count = len(self._places)
        if count < len(SPLITS):
            blank = f" ({self.tally.blank} more are blank)" if self.tally.blank else ""
            raise DataError(
                f"the text is {count} document{'s' * (count != 1)}{blank} and {len(SPLITS)} are needed, one for each "
                f"of {', '.join(SPLITS)}; give more text, or one long document as a .txt, which is cut at paragraphs"
            )
        shares = np.frombuffer(self._shares)
        drawn = np.where(shares < VAL_SHARE, _VAL, np.where(shares < VAL_SHARE + HOLDOUT_SHARE, _HOLDOUT, _TRAIN))
        given = np.frombuffer(self._given, dtype=np.int8)
        if (given == _TRAIN).any() and (given > _TRAIN).any():
            own = set(np.unique(given).tolist())
            free = np.where(np.isin(drawn, [s for s in (_VAL, _HOLDOUT) if s not in own]), drawn, _TRAIN)
            splits = np.where(given > _TRAIN, given, free)
            if len(np.unique(splits)) == len(SPLITS):
                self._splits = splits.astype(np.int8)
                names = ", ".join(SPLITS[s] for s in sorted(own) if s > _TRAIN)
                return f"{names} by the source's own files, what it lacks by a hash of each document"
        sizes = np.diff(np.frombuffer(self._offsets, dtype=np.int64)).astype(np.float64)
        found = np.bincount(drawn, weights=sizes, minlength=3) / sizes.sum()
        wanted = np.array([1 - VAL_SHARE - HOLDOUT_SHARE, VAL_SHARE, HOLDOUT_SHARE])
        if ((found > wanted / UNEVEN) & (found < wanted * UNEVEN)).all():
            self._splits = drawn.astype(np.int8)
            return "by a hash of each document, or of its whole file"
        self._splits = _by_place(sizes)
        return self._by_place_words()

    def _by_place_words(self) -> str:
        files = np.frombuffer(self._files, dtype=f"i{self._files.itemsize}")
        edges = np.flatnonzero(np.diff(self._splits))
        shared = sorted({self._names[files[e]] for e in edges if files[e] == files[e + 1]})
        parts = f"; parts of {', '.join(map(shown, shared))} lie in two splits" if shared else ""
        return (
            f"by place, for there are too few documents to draw by chance: the last {VAL_SHARE:.0%} of the text, or "
            f"more, are val, the {HOLDOUT_SHARE:.0%} before them holdout{parts}"
        ).replace("%", " %")

    def documents(self, split: str) -> Iterator[tuple[int, str]]:
        """(index, text) of one split, in the order in which they were read."""
        fd, offsets = self._file.fileno(), self._offsets
        for index in np.flatnonzero(self._splits == SPLITS.index(split)).tolist():
            yield index, os.pread(fd, offsets[index + 1] - offsets[index], offsets[index]).decode()


def _by_place(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Val and holdout from the end, a document each at least, and at least one is left for train."""
    behind = np.cumsum(sizes[::-1])[::-1] / sizes.sum()  # the share of the text from each document on
    count = len(sizes)
    val = min(count - 1, int(np.flatnonzero(behind >= VAL_SHARE)[-1]))
    val = max(val, 2)
    holdout = max(1, min(val - 1, int(np.flatnonzero(behind >= VAL_SHARE + HOLDOUT_SHARE)[-1])))
    splits = np.zeros(count, dtype=np.int8)
    splits[holdout:val], splits[val:] = _HOLDOUT, _VAL
    return splits
