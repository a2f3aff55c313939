"""The source as a whole: how much of it there is, and whether each class says what it is."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources() -> Iterator[Path]:
    """Every Python file of the project that is no test of its own."""
    yield from ROOT.glob("*.py")
    yield from (ROOT / "hotloop").glob("__*.py")
    for folder in ("harness", "kernels", "agent_loop", "bench", "tools"):
        yield from (ROOT / folder).rglob("*.py")


def test_there_is_no_more_source_than_its_budget() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in sources())
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hotloop"]["source_lines"]
    assert lines <= budget, (
        f"{lines} lines of source without tests, and pyproject.toml allows {budget}: delete something, or raise the "
        f"budget by what the change is worth, in a commit of its own that says why"
    )


def test_each_class_says_first_what_it_is() -> None:
    silent = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not is_train_py(path):
                words = ast.get_docstring(node) or ""
                if not words or words.startswith(("Args:", "Attributes:", "Raises:")):
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def is_train_py(path: Path) -> bool:
    """Whether it is a train.py, whose modules say it by their names."""
    return path.name == "train.py" or path.relative_to(ROOT).as_posix() == "bench/baseline.py"
