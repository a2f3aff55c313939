"""train.py as syntax: what may be run, what was tried before, how long it is."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import io
import tokenize
from dataclasses import dataclass

from hotloop.harness.errors import HotloopError
from hotloop.harness.preflight.lint import MAX_BYTES, compressed_bytes, problem, unfit
from hotloop.harness.text import one_line

__all__ = ["MAX_BYTES", "ProposalError", "Size", "check_source", "code_lines", "merge", "size_of", "syntax_hash"]

MAX_DEPTH = 200  # of the syntax tree; ast.dump takes up to three frames for each of Python's thousand
MAX_LINES = 5000  # a merge compares all lines with all


@dataclass(frozen=True)
class Size:
    """How long a train.py is: lines that hold code; nodes of its syntax tree without docstrings, and bytes of its
    strings and large numbers, which could be code; bytes of the compressed file, comments included.

    Lines alone could be had by writing two statements on one, nodes alone by writing a number in another way, both by
    packing the code into a string or a comment: that never makes the compressed file smaller.
    """

    lines: int
    nodes: int
    compressed: int = 0

    def simpler_than(self, other: Size) -> bool:
        return self.lines < other.lines and self.nodes < other.nodes and self.compressed <= other.compressed


class ProposalError(HotloopError):
    """A proposal that is not run; `status` goes into its decision."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check_source(source: bytes) -> None:
    """Raises ProposalError for a train.py that cannot be an experiment.

    All that is asked of a source later is asked of it here, so that what any of it raises is a refusal.
    """
    if reason := problem(source):
        raise ProposalError("invalid", reason)
    reason, line = unfit(source)
    if reason:
        raise ProposalError("crash", f"train.py cannot be run: {reason}{f' (line {line})' * bool(line)}")
    if (lines := len(source.splitlines())) > MAX_LINES:
        raise ProposalError("invalid", f"train.py has {lines} lines; at most {MAX_LINES} are run")
    try:
        source.decode()
        tree = ast.parse(source)
        deep = _depth(tree) > MAX_DEPTH
        if not deep:
            _dumped(source)
            size_of(source)
        merge(source, source, source)
    except Exception as e:  # RecursionError, MemoryError, tokenize's own, ...
        raise ProposalError("crash", f"train.py does not parse: {one_line(str(e) or type(e).__name__, 200)}") from None
    if deep:
        raise ProposalError("crash", f"train.py nests expressions or blocks deeper than {MAX_DEPTH}; write it flatter")


def _depth(tree: ast.AST) -> int:
    """Of the syntax tree, without recursion."""
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _tree(source: bytes) -> ast.Module:
    """The syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _dumped(source: bytes) -> bytes:
    return ast.dump(_tree(source)).encode()


def syntax_hash(source: bytes) -> str:
    """Equal for two files that differ in comments, docstrings and layout only.

    Of what cannot be read as syntax, which an older record may hold, it is the hash of its bytes.
    """
    try:
        data = _dumped(source)
    except Exception:
        data = b"\0" + source
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=64)
def size_of(source: bytes) -> Size:
    """The measure of "simpler". Raises whatever the parser and the tokenizer do."""
    nodes = sum(1 + _packed_bytes(node) for node in ast.walk(_tree(source)))
    return Size(code_lines(source), nodes, compressed_bytes(source))


def _packed_bytes(node: ast.AST) -> int:
    """The bytes that a literal could hold; of numbers only what no hyperparameter needs."""
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    return max(0, value.bit_length() // 8 - 8) if isinstance(value, int) else 0


def code_lines(source: bytes) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    lines: set[int] = set()
    statement_starts = True
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type in skip or token.type == tokenize.ENDMARKER:
            statement_starts = statement_starts or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        if not (token.type == tokenize.STRING and statement_starts):  # a string that is a statement is a docstring
            lines.update(range(token.start[0], token.end[0] + 1))
        statement_starts = False
    return len(lines)


def merge(base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
    """Three-way merge by lines; None where both change the same line, or insert at the same place.

    Git's own merge also refuses changes of neighbouring lines. Most constants of train.py are neighbours, and what
    comes out is checked and run like any other edit.
    """
    lines = base.splitlines(keepends=True)
    mine = _edits(lines, ours)
    edits = [*mine, *(e for e in _edits(lines, theirs) if e not in mine)]
    edits.sort(key=lambda e: e[:2])
    merged: list[bytes] = []
    at = 0
    for i, (begin, end, new) in enumerate(edits):
        if begin < at or (i and edits[i - 1][:2] == (begin, end)):
            return None
        merged += [*lines[at:begin], *new]
        at = end
    return b"".join(merged + lines[at:])


def _edits(base: list[bytes], other: bytes) -> list[tuple[int, int, list[bytes]]]:
    """The lines [begin, end) of `base` that are others in `other`, with what they become."""
    new = other.splitlines(keepends=True)
    codes = difflib.SequenceMatcher(None, base, new, autojunk=False).get_opcodes()
    edits = []
    for tag, i1, i2, j1, j2 in codes:
        if tag == "replace" and i2 - i1 == j2 - j1:  # line by line, so that neighbours stay apart
            edits += [(i1 + k, i1 + k + 1, [new[j1 + k]]) for k in range(i2 - i1)]
        elif tag != "equal":
            edits.append((i1, i2, new[j1:j2]))
    return edits
