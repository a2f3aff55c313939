"""What an agent has to know of the code around its edit: which constants are in force, and what `kernels` offers.

Both are read from source text, so that a brief needs neither torch nor the edited code.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from hotloop.harness.paths import project_root
from hotloop.harness.text import one_line

__all__ = ["in_force", "signatures"]

_VALUE = 40  # characters; what is longer is code, not a setting


@functools.lru_cache(maxsize=8)
def in_force(source: bytes, preset: str) -> tuple[str, ...]:
    """Lines that name train.py's constants with the values that this preset uses, and where each has to be changed."""
    plain: dict[str, str] = {}
    table: dict[str, str] = {}
    try:
        body = ast.parse(source).body
    except Exception:  # an older record may hold anything
        return ()
    lines = []
    for statement in body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name, value = statement.targets[0].id, statement.value
        if name == "LAPTOP":
            table = dict(_entries(value))
        elif name.isupper():
            plain[name] = ast.unparse(value)
    over = table if preset == "laptop" else {}
    if over:
        lines.append(
            "LAPTOP's entries stand instead of the constants of the same name: change them there, for an edit of the "
            "constant above does nothing in this preset."
        )
        lines.append(f"- in LAPTOP: {_listed(over)}")
    elif table:
        lines.append("The LAPTOP table is not in force in this preset.")
    if rest := {name: text for name, text in plain.items() if name not in over}:
        lines.append(f"- constants: {_listed(rest)}")
    return tuple(lines)


def _entries(value: ast.expr) -> Iterator[tuple[str, str]]:
    """Of dict(NAME=value) and {"NAME": value}."""
    if isinstance(value, ast.Call):
        yield from ((k.arg, ast.unparse(k.value)) for k in value.keywords if k.arg)
    elif isinstance(value, ast.Dict):
        for key, entry in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, ast.unparse(entry)


def _listed(values: dict[str, str]) -> str:
    short = (f"{name} = {text}" for name, text in values.items() if len(text) <= _VALUE)
    return "`" + one_line(", ".join(short)).replace("`", "'") + "`"


def signatures(source: bytes) -> list[str]:
    """A line for each function of `kernels`, those that train.py calls first."""
    text = source.decode("utf-8", "replace")
    known = _kernels()
    return [known[name] for name in sorted(known, key=lambda n: (f"kernels.{n}(" not in text, n))]


@functools.cache
def _kernels() -> dict[str, str]:
    folder = project_root() / "kernels"
    found = {}
    for statement in ast.parse((folder / "__init__.py").read_bytes()).body:
        if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("hotloop.kernels."):
            continue
        names = {alias.name for alias in statement.names}
        place = folder.joinpath(*str(statement.module).split(".")[2:])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        for node in ast.parse(module.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                    argument.annotation = None
                found[node.name] = f"- kernels.{node.name}({ast.unparse(node.args)})"
    return found
