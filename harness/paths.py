"""Where the code that is running is, and how a process of its own finds the same."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SAME_CODE", "import_root", "project_root"]

# The first words of a process that is given `import_root()` as its first argument. Once `hotloop` is imported its
# parts are found through it; the folder goes to the end, so that a checkout's `kernels/` hides no package of that name.
SAME_CODE = "import sys; sys.path.insert(0, sys.argv[1]); import hotloop; sys.path.append(sys.path.pop(0)); "


def project_root() -> Path:
    """The folder of `harness/`, `kernels/` and prepare.py: a checkout, or the installed package itself."""
    return Path(__file__).resolve().parents[1]


def import_root() -> str:
    """The folder from which `hotloop` is imported: a checkout, or site-packages."""
    return str(Path(__file__).absolute().parents[2])
