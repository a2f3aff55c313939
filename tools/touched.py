"""The test files that a change touches, one a line: `python tools/touched.py [BASE]`.

The change is what differs from BASE (default: where this branch left origin/main, else the last commit), uncommitted
and new files included. A test file is touched when it changed itself or names a module that did.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> list[str]:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed(base: str | None) -> list[Path]:
    start = base or next(iter(git("merge-base", "HEAD", "origin/main")), "HEAD")
    return [
        Path(name) for name in git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")
    ]


def touched(files: list[Path], tests: dict[Path, str]) -> list[Path]:
    """Of `tests`, path -> text, those that `files` touch."""
    modules = [f.with_suffix("") for f in files if f.suffix == ".py" and f.parts[0] != "tests"]
    names = [
        rf"from hotloop\.{re.escape('.'.join(m.parent.parts))} import [^\n]*\b{m.name}\b"
        rf"|\bhotloop\.{re.escape('.'.join(m.parts))}\b"
        if m.parent.parts
        else rf"\b{m.name}\b"
        for m in modules
    ]
    helpers = [f.parent for f in files if f.parts[0] == "tests" and not f.name.startswith("test_")]
    return [
        path
        for path, text in sorted(tests.items())
        if path in files or path.parent in helpers or any(re.search(name, text) for name in names)
    ]


if __name__ == "__main__":
    tests = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "tests").rglob("test_*.py")}
    print(*touched(changed(sys.argv[1] if len(sys.argv) > 1 else None), tests), sep="\n")
