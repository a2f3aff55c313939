"""Words of others made fit to be shown and kept: a child's, an agent's, git's, a service's.

They may hold what drives a terminal (ESC, OSC), what turns the direction of reading, halves of surrogates that nothing
encodes, and line ends that are none. Here, where they come in, each becomes a visible escape; every view then shows
text as it is.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, Any

__all__ = ["cut", "flushed", "forgiving", "one_line", "printable", "shorten"]


def printable(text: str) -> str:
    """The text with an escape such as `\\x1b` or `\\u202e` for each character that is not printable.

    Blanks of every kind are one blank; line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(c: str) -> str:
    return " " if c in "\xa0\u1680\u202f\u205f\u3000" or "\u2000" <= c <= "\u200a" else repr(c)[1:-1]


def one_line(text: str, most: int | None = None) -> str:
    """The same in one line, blanks joined, of at most `most` characters."""
    if most is None:
        return printable(" ".join(text.split()))
    line = printable(" ".join(text[: 4 * most].split()))
    return cut(line + "..." * (len(text) > 4 * most), most)


def cut(line: str, most: int) -> str:
    """At most `most` characters of a line, and a sign where there were more."""
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def forgiving(stream: IO[Any] | None) -> None:
    """Make a text stream write escapes for what its encoding has not, instead of raising."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        with contextlib.suppress(OSError, ValueError):  # closed, or detached
            reconfigure(errors="backslashreplace")


def flushed(stream: IO[Any] | None) -> bool:
    """Flush a stream; where that fails, let what is written there from now on go nowhere. False if so.

    What cannot be written stays in the stream's buffer and would fail again when the process ends.
    """
    if stream is None:
        return True
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return False
    return True


def shorten(log: Path, most: int) -> None:
    """Keep the end of a log that is longer than `most` bytes; what cannot be shortened stays."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > most:
            with open(log, "rb") as f:
                f.seek(-most, os.SEEK_END)
                end = f.read()
            log.write_bytes(b"(the beginning was cut off)\n" + end)
