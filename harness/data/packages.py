"""The built-in text: the Python sources of two pinned packages that only the driver imports.

No child needs them, so every child is kept from reading them (`harness.sandbox.bubblewrap`), wherever a copy lies in
what it may read. They are the same in every wheel of a version, so text, tokenizer and rows are the same on every
machine that has the pinned versions. (Pygments would do as well, were it not also inside every pip.)
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path

from hotloop.harness.errors import DataError

__all__ = ["FOLDERS", "PINNED", "TEXT_SHA256", "copies_below", "differences", "package_files", "text_hash"]

PINNED = {"matplotlib": "3.11.2", "fonttools": "4.68.0"}  # as in requirements/lock.txt
FOLDERS = {"matplotlib": ("matplotlib", "mpl_toolkits"), "fonttools": ("fontTools",)}
# Of the text of these versions: see text_hash.
TEXT_SHA256 = "71218a0947f530de6e8a4077da002d0d16e18ceac20be385586bcea87c0f0056"

# Where an interpreter keeps packages, below a folder that a child may read: environments of venv and conda, Debian's
# folders, Nix, and the archives that conda unpacks from.
_SITES = (
    "", "lib*/python3*/site-packages", "lib*/python3*/dist-packages", "local/lib*/python3*/*-packages",
    "envs/*/lib/python3*/site-packages", "pkgs/*/lib/python3*/site-packages", "pkgs/*/site-packages",
    "*/lib/python3*/site-packages",
)  # fmt: skip


def package_files() -> list[tuple[str, Path]]:
    """(name relative to the packages' folder, path) of each source file, in a fixed order.

    Raises:
        DataError: a package is not installed.
    """
    found = []
    for name, folders in FOLDERS.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(f"the built-in text needs the package {name}; run: make install") from None
        for folder in folders:
            root = Path(str(distribution.locate_file(folder)))
            files = [p for p in root.rglob("*.py") if p.is_file()]
            found += [(p.relative_to(root.parent).as_posix(), p) for p in files]
    return sorted(found)


def text_hash(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over names and texts, with newlines of one kind."""
    digest = hashlib.sha256()
    for name, text in files:
        data = text.encode()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def differences(found_sha256: str) -> str:
    """Why the built-in text is not that of other machines; empty where it is."""
    have = {name: importlib.metadata.version(name) for name in PINNED}
    other = [f"{name} {have[name]} (pinned: {PINNED[name]})" for name in PINNED if have[name] != PINNED[name]]
    if other:
        return f"installed is {', '.join(other)}"
    return "" if found_sha256 == TEXT_SHA256 else "files of the pinned packages are not as they were released"


def copies_below(roots: Iterable[str]) -> list[str]:
    """Every copy of the packages that lies below folders which a child may read, in whatever environment."""
    names = [folder for folders in FOLDERS.values() for folder in folders]
    patterns = [os.path.join(site, name) for site in _SITES for name in names]
    patterns += [os.path.join("pkgs", f"{name}*") for name in FOLDERS]
    found: list[str] = []
    for root in dict.fromkeys(roots):
        below = [p for pattern in patterns for p in glob.glob(os.path.join(glob.escape(root), pattern))]
        found += {os.path.realpath(p): p for p in reversed(below)}.values()  # lib64 is often a link to lib
    return sorted(set(found))
