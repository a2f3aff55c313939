"""What a long measurement has found so far, on disk, so that one that is killed goes on where it was.

A file is written whole or not at all. What it says counts only for what it was found on: another GPU, driver, version
or kernel makes it worthless, and then it is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotloop.harness.files import write_whole

__all__ = ["UNFINISHED", "Notes"]

UNFINISHED = 75  # exit status: the time was over, and the same command goes on


class Notes:
    """A JSON object in a file, for one measurement.

    Args:
        path: None for notes in memory only.
        stamp: what they depend on, as JSON; those of another stamp do not count.

    Attributes:
        body: change it in place, then `save`.
        why: why what is in the file does not count; empty where it does, and where there is no file.
    """

    def __init__(self, path: Path | None, stamp: Mapping[str, Any]) -> None:
        self.path, self.stamp = path, json.loads(json.dumps(stamp))
        self.body: dict[str, Any] = {}
        self.why = ""
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            was, body = dict(found["stamp"]), dict(found["body"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            self.why = f"{path} is damaged ({type(e).__name__})"
            return
        changed = sorted(k for k in was.keys() | self.stamp.keys() if was.get(k) != self.stamp.get(k))
        if changed:
            self.why = f"{path} was found with another {', '.join(changed)}"
        else:
            self.body = body

    def save(self) -> None:
        if self.path is not None:
            write_whole(self.path, json.dumps({"stamp": self.stamp, "body": self.body}, indent=1) + "\n")
