"""train.py as syntax: what may be run, what was tried before, how long it is."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import io
import tokenize
from dataclasses import dataclass

from harness.errors import HotloopError
from harness.lint import MAX_BYTES, compressed_bytes, problem

__all__ = ["MAX_BYTES", "ProposalError", "Size", "check_source", "code_lines", "merge", "size_of", "syntax_hash"]


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
    """Raises ProposalError for a train.py that cannot be an experiment."""
    if reason := problem(source):
        raise ProposalError("invalid", reason)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as e:
        where = f" in line {e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        raise ProposalError("crash", f"train.py does not parse: {getattr(e, 'msg', e)}{where}") from None
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    for name in ("build_model", "train"):
        if name not in defined:
            raise ProposalError("crash", f"train.py does not define {name}()")


def _tree(source: bytes) -> ast.Module:
    """The syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def syntax_hash(source: bytes) -> str:
    """Equal for two files that differ in comments, docstrings and layout only."""
    return hashlib.sha256(ast.dump(_tree(source)).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def size_of(source: bytes) -> Size:
    """The measure of "simpler"."""
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
    edits = [*_edits(lines, ours), *(e for e in _edits(lines, theirs) if e not in _edits(lines, ours))]
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
