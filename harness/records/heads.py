"""How far each chain of records had come, kept outside of the folder that holds it.

A file that was cut, or put back as it once was, is a good chain by itself. What was written last stands here, in
`$HOTLOOP_STATE` or `~/.local/state/hotloop`, one small file a chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from hotloop.harness.files import write_whole

__all__ = ["place", "remember", "remembered"]


def place(chain: Path) -> Path:
    """The file that says how far the chain at a path had come."""
    base = os.environ.get("HOTLOOP_STATE") or Path.home() / ".local" / "state" / "hotloop"
    return Path(base) / "heads" / hashlib.sha256(os.fsencode(chain.resolve())).hexdigest()[:24]


def remember(chain: Path, entries: int, head: str) -> None:
    """Best effort: a record that is on the disk is never lost because this is not."""
    with contextlib.suppress(OSError, RuntimeError):
        path = place(chain)
        write_whole(path, json.dumps({"path": str(chain.resolve()), "entries": entries, "head": head}) + "\n")


def remembered(chain: Path) -> tuple[int, str] | None:
    """(entries, hash of the last) as they were written; None where nothing is known of this path."""
    try:
        told = json.loads(place(chain).read_text())
        return int(told["entries"]), str(told["head"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
