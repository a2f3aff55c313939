"""Imports point one way: who may import whom, and no circle of files or of folders, imports within functions included.

Only what stands under `if TYPE_CHECKING:` is left out. docs/architecture.md says the same in words.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "harness", "agent_loop", "bench", "prepare", "train")
COMMAND_LINE = {"agent_loop.cli", "__main__"}
PROVING = ("harness.proof", "harness.tuning")  # of the harness, these rooms know kernels, and no other room knows these
# The parts that each part may import; the command line may import all.
ALLOWED = {
    "kernels": set(),
    "harness": set(),
    "prepare": {"harness"},
    "train": {"kernels", "harness"},
    "agent_loop": {"harness"},
    "bench": {"kernels", "harness"},
}


def sources() -> dict[str, Path]:
    """Every module of the project, by its name below `hotloop`."""
    found = {name: ROOT / f"{name}.py" for name in ("prepare", "train")} | {"__main__": ROOT / "hotloop/__main__.py"}
    for part in PARTS[:4]:
        for path in (ROOT / part).rglob("*.py"):
            if not path.name.startswith(("bench_", "conftest")):  # tests
                found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from statements(other)
            continue
        yield child
        yield from statements(child)


def imported(text: str, known: set[str]) -> set[str]:
    """The modules among `known` that a source imports, `importlib.import_module` of a constant included."""
    names: list[str] = []
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names += [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    found = set()
    for name in names:
        if name.split(".")[0] == "hotloop":
            below = name.removeprefix("hotloop.")
            found |= {below if below in known else below.rpartition(".")[0]} & known
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that can all reach each other."""
    reach = {node: set(targets) for node, targets in edges.items()}
    while True:
        grown = {n: t.union(*(reach.get(m, set()) for m in t)) for n, t in reach.items()}
        if grown == reach:
            break
        reach = grown
    return sorted({tuple(sorted(m for m in t if n in reach.get(m, ()))) for n, t in reach.items() if n in t})


def folder(module: str, known: dict[str, Path]) -> str:
    """The folder that a module lies in; one of a part itself (`harness.settings`, say) stands for itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or known[module].name == "__init__.py" else module


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    known = sources()
    return {name: imported(path.read_text(), set(known)) - {name} for name, path in known.items()}


def test_each_part_imports_only_what_is_below_it(edges: dict[str, set[str]]) -> None:
    pairs = [(name, target) for name, targets in edges.items() if name not in COMMAND_LINE for target in targets]
    assert [f"{name} -> {target}" for name, target in pairs if not may_import(name, target)] == []


def may_import(name: str, target: str) -> bool:
    here, there = name.split(".")[0], target.split(".")[0]
    if here == "harness" and not name.startswith(PROVING):
        return there == "harness" and not target.startswith(PROVING)
    return here == there or there in ALLOWED[here] or (here, there) == ("harness", "kernels")


def test_there_is_no_circle_of_files(edges: dict[str, set[str]]) -> None:
    assert circles(edges) == []


def test_there_is_no_circle_of_folders(edges: dict[str, set[str]]) -> None:
    known = sources()
    folders: dict[str, set[str]] = {}
    for name, targets in edges.items():
        here = folder(name, known)
        folders.setdefault(here, set()).update({folder(t, known) for t in targets} - {here})
    assert circles(folders) == []


def test_what_the_test_finds() -> None:
    text = (
        "from hotloop.a import b\nimport hotloop.c\ndef f():\n    import importlib\n    from hotloop.a.d import x\n"
        "    importlib.import_module('hotloop.e')\nif TYPE_CHECKING:\n    from hotloop.g import h\n"
    )
    assert imported(text, {"a", "a.b", "a.d", "c", "e", "g", "g.h"}) == {"a.b", "a.d", "c", "e"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]
