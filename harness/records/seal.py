"""The seal: SHA-256 of every file that decides what a number means.

`harness/seal.json` lists kernels/, harness/ and prepare.py. Every run checks it before and after; the agent's edits
never touch these files, and a change of ours is sealed on purpose, with `hotloop seal`, in the same commit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hotloop.harness.errors import SealError
from hotloop.harness.files import write_whole
from hotloop.harness.paths import project_root

__all__ = ["SEAL_FILE", "current_manifest", "verify_seal", "write_seal"]

SEAL_FILE = "harness/seal.json"
_SUFFIXES = {".py", ".json"}


def current_manifest(root: Path) -> dict[str, str]:
    """Path relative to `root` -> SHA-256, of all sealed files as they are now."""
    paths = [root / "prepare.py"]
    for folder in ("kernels", "harness"):
        paths += [p for p in (root / folder).rglob("*") if p.suffix in _SUFFIXES and p.is_file()]
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(paths)
        if p.relative_to(root).as_posix() != SEAL_FILE
    }


def write_seal(root: Path | None = None) -> Path:
    """Seal the files as they are now; returns the path of the seal."""
    root = root or project_root()
    path = root / SEAL_FILE
    write_whole(path, json.dumps(current_manifest(root), indent=1) + "\n")
    return path


def verify_seal(root: Path | None = None) -> str:
    """Compare the files with the seal; returns the seal's own SHA-256.

    Raises:
        SealError: a file was changed, added or removed, or there is no seal.
    """
    root = root or project_root()
    try:
        raw = (root / SEAL_FILE).read_bytes()
        sealed = json.loads(raw)
    except (OSError, ValueError) as e:
        raise SealError(f"{root / SEAL_FILE} cannot be read ({e}); write it with: hotloop seal") from None
    now = current_manifest(root)
    wrong = sorted(p for p in sealed.keys() | now.keys() if sealed.get(p) != now.get(p))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SealError(
            f"{', '.join(wrong[:3])}{more} differ from the seal; undo with: git checkout {' '.join(wrong[:3])}, or, "
            f"where the change is yours and wanted: hotloop seal"
        )
    return hashlib.sha256(raw).hexdigest()
