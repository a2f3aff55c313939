"""What a train.py may look like as text: no larger than code is, and no carrier of data.

Weights or validation text could be shipped inside the source. Code needs few and short literals, so their number and
size are capped, and that of comments with them; the shipped train.py uses a fifth of each cap at most.
"""

from __future__ import annotations

import ast
import io
import tokenize

__all__ = ["MAX_BYTES", "problem"]

MAX_BYTES = 128 * 1024
MAX_TEXT = 32 * 1024  # characters or bytes of all strings and comments
MAX_NUMBERS = 2000
MAX_INTEGER_BITS = 4096  # bits of one integer


def problem(source: bytes) -> str:
    """Why this source is not run; empty where it may. Text that does not parse is not judged here."""
    if len(source) > MAX_BYTES:
        return f"train.py has {len(source)} bytes; at most {MAX_BYTES} are run"
    try:
        tree = ast.parse(source)
    except Exception:  # whatever a parser raises
        return ""
    text = numbers = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant):
            continue
        if isinstance(node.value, str | bytes):
            text += len(node.value)
        elif isinstance(node.value, int | float | complex):
            numbers += 1
            if isinstance(node.value, int) and node.value.bit_length() > MAX_INTEGER_BITS:
                return f"train.py has an integer of {node.value.bit_length()} bits; at most {MAX_INTEGER_BITS} are code"
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            text += len(token.string) if token.type == tokenize.COMMENT else 0
    except Exception as e:  # the parser passes over comments and line ends that the tokenizer does not take
        return f"train.py is not plain UTF-8 text with ordinary line ends ({' '.join(str(e).split())[:120]})"
    if text > MAX_TEXT:
        return f"train.py has {text} characters in strings and comments; at most {MAX_TEXT} are code, more is data"
    if numbers > MAX_NUMBERS:
        return f"train.py has {numbers} numbers; at most {MAX_NUMBERS} are code, more is data"
    return ""
