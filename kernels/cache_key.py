"""What torch's compile caches are told of the kernels.

Which kernel runs, and in what tiles, is read while AOTAutograd traces a backward pass; its cache knows a graph by its
forward pass alone. So a backward pass of another selection, or of launch configurations that were tuned since, would
be taken for this one's. The tag is part of every key of those caches.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import torch.compiler.config

__all__ = ["fingerprint", "mark"]

FOLDER = Path(__file__).parent
# What this process is told to choose; read when it is read there.
SELECTION = {
    name: os.environ.get(name, "")
    for name in ("HOTLOOP_KERNELS", "HOTLOOP_ATTENTION", "HOTLOOP_PROFILE", "TRITON_INTERPRET")
}


def fingerprint(selection: dict[str, str] = SELECTION, folder: Path = FOLDER) -> str:
    """SHA-256 of the selection, of the kernels' sources and of every tuned file."""
    found = hashlib.sha256(repr(sorted(selection.items())).encode())
    for path in sorted([*folder.rglob("*.py"), *folder.glob("tuned/*.json")]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\0".encode() + content)
    return found.hexdigest()


@functools.cache
def mark() -> None:
    """Add the fingerprint to the tag of torch's compile caches. Whatever chooses an implementation calls this first, so
    no graph with a choice in it can be looked up without.
    """
    given = torch.compiler.config.cache_key_tag
    torch.compiler.config.cache_key_tag = f"{given} hotloop-{fingerprint()}".lstrip()
