"""Byte-pair encoding: trained by rustbpe, applied by tiktoken, kept as plain JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotloop.harness.errors import DataError
from hotloop.harness.text import one_line

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "Row", "Tokenizer", "Untokenizable"]

# The GPT-4 pattern with numbers in pairs: the pieces are the reference's. Its possessive quantifiers change no match
# here, and without them all alternatives but the look-ahead form one group that runs as an automaton: twice as fast.
SPLIT_PATTERN = (
    r"""(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n])"""
    r"""|\s+(?!\S)|\s+"""
)
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the first is BOS

Row = npt.NDArray[np.uint16]


class Untokenizable(ValueError):
    """A text that the tokenizer gives up on: a run of a million blanks, say."""


class Tokenizer:
    """Byte-pair encoding with a BOS token.

    Attributes:
        vocab_size: V.
        bos_id: the token that starts every document.
        token_bytes: int32 [V], the raw bytes of each token; 0 for special ones. A lone byte of a longer character
            is 1 byte.
        reference_bytes: int32 [V], the same as karpathy/autoresearch counts: a token that is no whole characters is
            decoded first, so that each of its loose bytes is the three of U+FFFD.
    """

    def __init__(self, pattern: str, ranks: Sequence[bytes], special: Sequence[str]) -> None:
        import tiktoken

        self.pattern, self.ranks, self.special = pattern, list(ranks), list(special)
        self.vocab_size = len(ranks) + len(special)
        self.bos_id = len(ranks)
        none = [0] * len(special)
        decoded = [len(r.decode("utf-8", "replace").encode()) for r in ranks]
        self.token_bytes: npt.NDArray[np.int32] = np.array([len(r) for r in ranks] + none, dtype=np.int32)
        self.reference_bytes: npt.NDArray[np.int32] = np.array(decoded + none, dtype=np.int32)
        self._encoding = tiktoken.Encoding(
            name="hotloop",
            pat_str=pattern,
            mergeable_ranks={r: i for i, r in enumerate(ranks)},
            special_tokens={s: len(ranks) + i for i, s in enumerate(special)},
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train on documents; raises DataError where the text has too few distinct pairs for the vocabulary."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda x: x[1])]
        if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
            raise DataError(
                f"the text gives a vocabulary of {len(ranks) + len(SPECIAL_TOKENS)} tokens at most; ask for a smaller "
                f"--vocab-size than {vocab_size}, or give more text"
            )
        return cls(SPLIT_PATTERN, ranks, SPECIAL_TOKENS)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises DataError for a file that is no tokenizer."""
        try:
            data = json.loads(path.read_text())
            return cls(data["pattern"], [base64.b64decode(r) for r in data["ranks"]], data["special"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path} is not a tokenizer ({e}); run: hotloop prepare") from None

    def to_json(self) -> bytes:
        ranks = [base64.b64encode(r).decode() for r in self.ranks]
        return json.dumps({"pattern": self.pattern, "special": self.special, "ranks": ranks}).encode()

    def encode(self, text: str) -> Row:
        """The text's tokens behind a BOS, uint16. What looks like a special token is text. Releases the GIL.

        Raises:
            Untokenizable: the regular expression gave up.
        """
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate; becomes U+FFFD
            ids = np.array(self._encoding.encode_ordinary(text))
        except ValueError as e:
            raise Untokenizable(one_line(str(e), 120)) from None
        row = np.empty(len(ids) + 1, dtype=np.uint16)
        row[0], row[1:] = self.bos_id, ids
        return row

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])
