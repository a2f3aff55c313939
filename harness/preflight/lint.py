"""What a train.py may look like as text: no larger than code is, and no carrier of data.

Weights or validation text could be shipped inside the source. What bounds that, however it is spelled (identifiers,
integers, blanks), is the compressed size of the whole file: nothing can be read out of a file that is not in it. The
caps on literals say more plainly what is wrong. The shipped train.py uses little more than half of the first and a
fifth of each other cap.
"""

from __future__ import annotations

import ast
import bz2
import importlib.util
import io
import lzma
import tokenize
import zlib
from pathlib import Path

from hotloop.harness.paths import project_root
from hotloop.harness.text import one_line

__all__ = ["MAX_BYTES", "MAX_COMPRESSED", "compressed_bytes", "problem", "unfit"]

MAX_BYTES = 128 * 1024
MAX_COMPRESSED = 12 * 1024
MAX_TEXT = 32 * 1024  # characters or bytes of all strings and comments
MAX_NUMBERS = 2000
MAX_INTEGER_BITS = 4096  # bits of one integer
_NOW = {"harness": "from hotloop.harness import Batch, Run, Spec, main", "kernels": "from hotloop import kernels"}


def compressed_bytes(source: bytes) -> int:
    """The size that the best of the standard library's compressors gives it: about what it says, in bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    packed = zlib.compress(source, 9), bz2.compress(source), lzma.compress(source, lzma.FORMAT_RAW, filters=filters)
    return min(map(len, packed))


def unfit(source: bytes) -> tuple[str, int]:
    """Why this text can be no experiment, and in which line (0: none); ("", 0) where it can."""
    try:
        tree = ast.parse(source)
    except Exception as e:  # SyntaxError, ValueError, RecursionError, MemoryError
        line = (e.lineno or 0) if isinstance(e, SyntaxError) else 0
        return f"it does not parse: {one_line(str(getattr(e, 'msg', '') or e) or type(e).__name__, 200)}", line
    old: dict[str, int] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]:
            root = name.partition(".")[0]
            if root == "harness" or (root == "kernels" and not _others_kernels()):
                old.setdefault(root, node.lineno)
    if old:
        now = "; ".join(_NOW[root] for root in old)
        return f"it imports {' and '.join(old)}, as for hotloop 0.1; write: {now}", min(old.values())
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    if missing := [f for f in ("build_model", "train") if f not in defined]:
        return f"it has no function {missing[0]}(); it must define build_model(spec) and train(run)", 0
    return "", 0


def _others_kernels() -> bool:
    """Whether the package of that name that is not ours is installed, which a train.py may use."""
    spec = importlib.util.find_spec("kernels")
    places = (spec and spec.submodule_search_locations) or []
    return spec is not None and not any(Path(p).resolve() == project_root() / "kernels" for p in places)


def problem(source: bytes) -> str:
    """Why this source is not run; empty where it may. Text that does not parse is not judged here."""
    if len(source) > MAX_BYTES:
        return f"train.py has {len(source)} bytes; at most {MAX_BYTES} are run"
    if (size := compressed_bytes(source)) > MAX_COMPRESSED:
        return f"train.py has {size} bytes when compressed; at most {MAX_COMPRESSED} are code, more is data"
    try:
        source.decode(tokenize.detect_encoding(io.BytesIO(source).readline)[0])
    except (SyntaxError, UnicodeDecodeError) as e:
        return f"train.py is not text in its encoding: {e}"
    try:
        tree = ast.parse(source)
    except Exception:  # whatever a parser raises
        return ""
    text = numbers = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("exec", "eval"):
            return f"train.py runs text as code: {node.id} in line {node.lineno}; write the code itself"
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
        return f"train.py is not plain UTF-8 text with ordinary line ends ({one_line(str(e), 120)})"
    if text > MAX_TEXT:
        return f"train.py has {text} characters in strings and comments; at most {MAX_TEXT} are code, more is data"
    if numbers > MAX_NUMBERS:
        return f"train.py has {numbers} numbers; at most {MAX_NUMBERS} are code, more is data"
    return ""
