"""Documents to rows of one width, without padding. Every row starts with BOS.

Both ways fill a row with the largest buffered document that still fits, and cut one where none does:

    crop    the shortest is cut and its rest is thrown away: karpathy/autoresearch's packing, row for row
    carry   the one that has waited longest is cut, and its rest starts the next row behind a BOS: nothing is lost
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

import numpy as np

from hotloop.harness.data.tokenizer import Row

__all__ = ["BUFFER_DOCUMENTS", "PACKINGS", "PACKING_VERSION", "Packer"]

PACKINGS = ("crop", "carry")
PACKING_VERSION = 1  # raised by whoever changes which rows come out
BUFFER_DOCUMENTS = 1000  # documents among which the packer picks


class Packer:
    """The result is that of a search through the whole buffer. Here documents wait in queues by length, and a bit set
    says which lengths are there, so a step costs the same for any buffer.

    Args:
        batches: lists of token arrays that each start with BOS; an iterator that is asked for one at a time.
        width: tokens a row, seq_len + 1.

    Attributes:
        placed: tokens of documents that are in rows so far; a BOS that `carry` added is none.
        lost: tokens that were cropped, or were in the last row, which was not full.
    """

    def __init__(
        self, batches: Iterator[list[Row]], width: int, buffer: int = BUFFER_DOCUMENTS, *, packing: str = "crop"
    ) -> None:
        self._batches, self._width, self._buffer = batches, width, buffer
        self._carries = packing == "carry"
        self._queues: dict[int, deque[tuple[int, Row]]] = {}  # length -> (arrival, document), up to width
        self._lengths = 0  # bit n: a document of n <= width tokens waits
        self._long: list[tuple[int, int, Row]] = []  # longer ones: a heap by length and arrival, or by arrival
        self._order: deque[tuple[int, int]] = deque()  # carry: (arrival, length) of all, those that are gone included
        self._count = self._arrived = 0
        self._more = True
        self.placed = self.lost = 0

    def rows(self) -> Iterator[Row]:
        """uint16 [width] each, until the documents end; the last, incomplete row is dropped."""
        width = self._width
        rest, done = np.empty(0, dtype=np.uint16), 0  # a document that was cut, and how much of it is placed
        while True:
            row = np.empty(width, dtype=np.uint16)
            at = added = 0
            if done < len(rest):
                row[0], added = rest[0], 1
                at = 1 + min(width - 1, len(rest) - done)
                row[1:at] = rest[done : done + at - 1]
                done += at - 1
            while at < width:
                while self._more and self._count < self._buffer:
                    self._refill()
                if self._count == 0:
                    self.lost += at - added
                    return
                document = self._pick(width - at)
                n = min(len(document), width - at)
                row[at : at + n] = document[:n]
                at += n
                if n < len(document):
                    if self._carries:
                        rest, done = document, n
                    else:
                        self.lost += len(document) - n
            self.placed += width - added
            yield row

    def _refill(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self._more = False
            return
        for document in batch:
            n = len(document)
            if self._carries:
                self._order.append((self._arrived, n))
            if n > self._width:
                heapq.heappush(self._long, (0 if self._carries else n, self._arrived, document))
            else:
                queue = self._queues.get(n)
                if queue is None:
                    queue = self._queues[n] = deque()
                queue.append((self._arrived, document))
                self._lengths |= 1 << n
            self._arrived += 1
        self._count += len(batch)

    def _pick(self, room: int) -> Row:
        self._count -= 1
        fitting = self._lengths & ((2 << room) - 1)
        if fitting:
            return self._take(fitting.bit_length() - 1)
        if self._carries:
            return self._take(self._oldest())
        if self._lengths:
            return self._take((self._lengths & -self._lengths).bit_length() - 1)
        return heapq.heappop(self._long)[2]

    def _take(self, n: int) -> Row:
        if n > self._width:
            return heapq.heappop(self._long)[2]
        queue = self._queues[n]
        _, document = queue.popleft()
        if not queue:
            self._lengths ^= 1 << n
        return document

    def _oldest(self) -> int:
        """The length of the document that has waited longest: it is the first of its queue."""
        while True:
            arrival, n = self._order.popleft()
            if n > self._width:
                return n  # such a document never fits, so nobody else took it
            queue = self._queues[n]
            if queue and queue[0][0] == arrival:
                return n
