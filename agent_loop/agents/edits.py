"""Edits of train.py that a model asks for in words: an exact piece and what replaces it, or the whole file.

Nothing is run. Each refusal is a sentence for the model to go by.
"""

from __future__ import annotations

import difflib
import re

from hotloop.agent_loop.source import MAX_BYTES

__all__ = ["Draft", "EditError", "without_thoughts"]

_BLOCK = re.compile(
    r"^<{5,9} ?SEARCH[^\n]*\n(?P<old>.*?)^={5,9}[ \t]*\n(?P<new>.*?)^>{5,9} ?REPLACE", re.MULTILINE | re.DOTALL
)
_HUNK = re.compile(
    r"^@@(?: -(?P<at>\d+)[^@\n]*@@[^\n]*)?\n(?P<body>(?:[ +\-\\][^\n]*\n|\n(?=[ +\-\n]))+)", re.MULTILINE
)
_THOUGHT = re.compile(
    r"^[ \t]*<(?P<tag>think|thinking|reasoning)>.*?(?:</(?P=tag)>|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE
)
_FENCE = re.compile(r"^```(?:python|py)[^\n]*\n(?P<whole>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class EditError(Exception):
    """An edit that was not made, and why."""


class Draft:
    """A copy of train.py that edits are made to.

    Raises:
        EditError: the file is not UTF-8.
    """

    def __init__(self, source: bytes) -> None:
        self._source = source
        try:
            self.text = source.decode()
        except UnicodeDecodeError as e:
            raise EditError(f"train.py is not UTF-8 (byte {e.start})") from None

    @property
    def data(self) -> bytes:
        return self.text.encode("utf-8", "surrogatepass")

    @property
    def changed(self) -> bool:
        return self.data != self._source

    def edit(self, old: str, new: str) -> None:
        """Replace the one place where `old` stands. Raises EditError."""
        if not old:
            raise EditError("`old` is empty; give the exact text to replace")
        if old == new:
            raise EditError("`old` and `new` are the same")
        count = self.text.count(old)
        if count > 1:
            raise EditError(f"`old` stands in {count} places of train.py; add lines around it until it is unique")
        if count == 0:
            raise EditError(f"`old` is not in train.py; it must match exactly, blanks included.{self._nearest(old)}")
        self._take(self.text.replace(old, new))

    def write(self, content: str) -> None:
        """Replace all of it. Raises EditError."""
        if "def build_model(" not in content or "def train(" not in content:
            raise EditError("the whole of train.py must define build_model() and train(); send all of it, or edit")
        self._take(content)

    def read_answer(self, answer: str) -> bool:
        """Make the edits of a plain answer: SEARCH/REPLACE blocks, else one fenced whole file, else a unified diff.

        All are made or none. False where there is no edit in it. Raises EditError.
        """
        before = self.text
        try:
            blocks = list(_BLOCK.finditer(answer))
            for block in blocks:
                self.edit(block["old"], block["new"])
            if blocks:
                return True
            if "build_model(" not in "".join(f["whole"] for f in _FENCE.finditer(answer)):
                hunks = list(_HUNK.finditer(answer.replace("\r\n", "\n") + "\n"))
                for hunk in hunks:
                    self._patch(hunk["body"], int(hunk["at"] or 0))
                return bool(hunks)
        except EditError:
            self.text = before
            raise
        files = [f["whole"] for f in _FENCE.finditer(answer) if "def build_model(" in f["whole"]]
        if len(files) > 1:
            raise EditError("there are several whole files in the answer; send one")
        if files:
            self.write(files[0])
        return bool(files)

    def _patch(self, body: str, at: int) -> None:
        """Make one hunk of a unified diff where its lines stand, nearest to line `at`. Raises EditError.

        Models count lines badly, so the place is found by the text.
        """
        rows = [row for row in body.splitlines() if not row.startswith("\\")]
        while rows and not rows[-1].strip():
            rows.pop()
        old = [row[1:] for row in rows if row[:1] != "+"]
        new = [row[1:] for row in rows if row[:1] != "-"]
        if not old:
            raise EditError("a hunk of the diff has no line of train.py, so its place is not known; add some around it")
        lines = self.text.split("\n")
        places = [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
        if not places:
            first = next((row[1:] for row in rows if row[:1] == "-"), old[0])
            raise EditError(f"the lines of the hunk {first!r} are not in train.py.{self._nearest(first)}")
        place = min(places, key=lambda i: abs(i + 1 - at))
        self._take("\n".join([*lines[:place], *new, *lines[place + len(old) :]]))

    def _take(self, text: str) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise EditError(f"train.py would have {size:,} bytes; at most {MAX_BYTES:,} are allowed")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise EditError("the text holds a lone surrogate, which no file can")
        self.text = text

    def _nearest(self, old: str) -> str:
        """The line of train.py that is most like the first one of `old`, with its number."""
        wanted = next((line.strip() for line in old.splitlines() if line.strip()), "")[:200]
        lines = {line.strip(): (number, line) for number, line in enumerate(self.text.splitlines(), 1) if line.strip()}
        near = difflib.get_close_matches(wanted, lines, 1, 0.3)
        if not near:
            return ""
        number, line = lines[near[0]]
        return f" The nearest line is {line[:300]!r}, line {number}."


def without_thoughts(text: str) -> str:
    """A model's answer without what it thought aloud before it.

    Some templates write the opening tag into the prompt, so that only the closing one comes back.
    """
    before, closed, after = text.partition("</think>")
    if closed and "<think>" not in before:
        text = after
    return _THOUGHT.sub("", text).strip("\n")
