"""Everything that decides what a number means: budget, feed, evaluation, seal, record.

train.py uses four names of this package: `Run` and `Batch`, what its `train` is given; `Spec`, what its
`build_model` is given; and `main`, which runs the file as one experiment. They are loaded when they are asked
for, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotloop.harness.settings import Spec
    from hotloop.harness.training.run import Batch, Run

__all__ = ["Batch", "Run", "Spec", "main"]

__version__ = "0.1.0"

_HOMES = {
    "Batch": "hotloop.harness.training.run",
    "Run": "hotloop.harness.training.run",
    "Spec": "hotloop.harness.settings",
}


def main(path: str) -> int:
    """Run the train.py at `path` as one experiment; returns the exit code."""
    from hotloop.harness.single import main as run

    return run(path)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
