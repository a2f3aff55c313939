"""train.py with some of its constants changed, as text: what `--set NAME=VALUE` means everywhere in bench."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from hotloop.harness.errors import UsageError

__all__ = ["with_constants"]


def with_constants(source: bytes, changes: Sequence[str], preset: str) -> bytes:
    """A train.py in which each of `changes`, NAME=VALUE with a literal of Python, is done at the top of the file.

    Raises:
        UsageError: no literal, or a name that stands for nothing at this preset.
    """
    text = source.decode()
    for change in changes:
        name, _, value = (part.strip() for part in change.partition("="))
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise UsageError(
                f"--set takes NAME=VALUE with a literal of Python, such as 'FP8=\"mlp\"'; {value!r} is no value of "
                f"Python's"
            ) from None
        line = re.compile(rf"^({re.escape(name)} = )(.*?)(  #.*)?$", re.MULTILINE)
        overridden = preset == "laptop" and re.search(rf"^    {re.escape(name)}=", text, re.MULTILINE)
        if not name.isidentifier() or len(line.findall(text)) != 1 or overridden:
            raise UsageError(
                f"--set {change}: train.py has no constant {name} for the preset {preset}: it is no such constant, or "
                f"one that the preset's own table overrides"
            )
        text = line.sub(lambda found, value=value: f"{found[1]}{value}{found[3] or ''}", text)  # type: ignore[misc]
    return text.encode()
