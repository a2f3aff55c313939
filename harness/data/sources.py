"""Where text comes from: files of one's own, the sources of packages, the standard library, climbmix.

A `Text` says what it is (its identity, by which a prepared folder that is stale is told) and gives its documents by
split, as often as they are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hotloop.harness.data import packages
from hotloop.harness.data.download import download, endpoint
from hotloop.harness.data.readers import DOCUMENT_CHARS, Document, Fields, Tally, counted, read, shown, text_files
from hotloop.harness.data.spool import Spool
from hotloop.harness.errors import DataError, UsageError

__all__ = ["ClimbmixText", "CodeText", "Corpus", "PathText", "Text", "open_text", "tell_unusable"]

Report = Callable[[str], None]

CLIMBMIX = "datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_LAST = 6542  # shard_06542 is val, as in the reference; the one before is holdout

# The splits that Hugging Face's shards are named after.
_GIVEN = re.compile(r"(train|validation|valid|val|dev|test)(?:[-_.]\d+(?:[-_]of[-_]\d+)?)?\.", re.IGNORECASE)
_GIVEN_SPLIT = {"train": 0, "test": 2}

_TOP_LEVEL = re.compile(r"^(?=class |def |async def |@)", re.MULTILINE)
# Parts of the standard library that distributions leave out or keep elsewhere, so that the text is nearly the same on
# all of them.
_STDLIB_SKIP = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo",
    "lib2to3", "distutils", "ensurepip",
}  # fmt: skip


class Corpus(Protocol):
    """Documents that were read, or can be."""

    @property
    def tally(self) -> Tally:
        """What was met in reading them."""

    def documents(self, split: str) -> Iterator[tuple[int, str]]:
        """(index, text), always in the same order."""

    def where(self, index: int) -> str:
        """The file and place of a document, for messages."""

    def close(self) -> None: ...


class Text(Protocol):
    """Where the text of a prepared folder comes from.

    Attributes:
        name: what the manifest calls the source.
    """

    name: str

    def identity(self) -> dict[str, Any]:
        """What its rows depend on, as JSON; equal where the text is."""

    def corpus(self, folder: Path, report: Report) -> Corpus:
        """Read it, with room for intermediate files in `folder`. Raises DataError."""


def open_text(
    source: str, *, fields: Fields, shards: int, shards_folder: Path, workers: int, mirror: str | None,
    base_url: str | None,
) -> Text:  # fmt: skip
    """The text that `--source` names. Raises UsageError or DataError."""
    if source in ("packages", "stdlib"):
        return CodeText(source)
    if source == "climbmix":
        return ClimbmixText(shards_folder, shards, workers, base_url or f"{endpoint(mirror)}/{CLIMBMIX}")
    return PathText(Path(source), fields)


class PathText:
    """A file, or a folder with all below it."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path, self.fields = path.resolve(), fields
        self.name = str(self.path)
        self.files, self.passed = text_files(self.path)

    def _names(self) -> list[str]:
        root = self.path if self.path.is_dir() else self.path.parent
        return [shown(p.relative_to(root)) for p in self.files]

    def identity(self) -> dict[str, Any]:
        files = {}
        for name, path in zip(self._names(), self.files, strict=True):
            with open(path, "rb") as f:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
                files[name] = [f.tell(), sha256]
        return {
            "files": files, "text_field": self.fields.json, "text_column": self.fields.column,
            "document_chars": DOCUMENT_CHARS,
        }  # fmt: skip

    def corpus(self, folder: Path, report: Report) -> Corpus:
        if self.passed:
            report(f"passed over: {counted(self.passed)}")
        spool = Spool(folder / "spool", [str(p) for p in self.files])
        try:
            for index, path in enumerate(self.files):
                match = _GIVEN.match(path.name)
                given = _GIVEN_SPLIT.get(match[1].lower(), 1) if match else -1
                for document in read(path, self.fields, spool.tally):
                    spool.add(document, index, given)
            if spool.tally.blank:
                report(f"{spool.tally.blank:,} blank or null documents were passed over")
            if spool.tally.mended:
                report(f"{spool.tally.mended:,} documents held half of a surrogate pair, which is U+FFFD now")
            if 100 * spool.tally.unusable > spool.tally.read:
                tell_unusable(spool.tally, report)
            report(f"splits: {spool.assign()}")
        except BaseException:
            spool.close()
            raise
        return spool


def tell_unusable(tally: Tally, report: Report) -> None:
    """Name the documents that cannot be used. Raises DataError where they are more than one in a hundred."""
    if not tally.unusable:
        return
    words = f"{tally.unusable:,} of {tally.read:,} documents cannot be used"
    if 100 * tally.unusable > tally.read:
        raise DataError(f"{tally.named[0]}; {words}, and one in a hundred may be: mend or drop them")
    report(f"{words}: {'; '.join(tally.named)}")


class CodeText:
    """The definitions in Python files: of the pinned packages, or of the running Python's library. Split by file."""

    def __init__(self, name: str) -> None:
        self.name = name

    @functools.cached_property
    def _files(self) -> list[tuple[str, str]]:
        """(name, text) of each file. A few of the library's are not UTF-8 on purpose."""
        paths = packages.package_files() if self.name == "packages" else list(_stdlib_files())
        files = []
        for name, path in paths:
            with contextlib.suppress(UnicodeDecodeError):
                files.append((name, path.read_text(encoding="utf-8")))
        return files

    def identity(self) -> dict[str, Any]:
        found = {"text_sha256": packages.text_hash(self._files)}
        if self.name == "stdlib":
            return found | {"python": platform.python_version()}
        return found | {"packages": {name: importlib.metadata.version(name) for name in packages.PINNED}}

    def corpus(self, folder: Path, report: Report) -> Corpus:
        if self.name == "packages" and (why := packages.differences(packages.text_hash(self._files))):
            report(f"WARNING: {why}; text, rows and scores are not those of other machines")
        spool = Spool(folder / "spool", [name for name, _ in self._files])
        for index, (name, text) in enumerate(self._files):
            for place, part in enumerate(_TOP_LEVEL.split(text), 1):
                if part and not part.isspace():
                    spool.tally.read += 1
                    spool.add(Document(part, name, place), index)
        spool.assign()
        return spool


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _STDLIB_SKIP)
        for name in sorted(names):
            if name.endswith((".py", ".txt", ".rst")):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


class ClimbmixText:
    """The shards of karpathy/climbmix-400b-shuffle, downloaded as needed; val is the reference's."""

    name = "climbmix"

    def __init__(self, folder: Path, shards: int, workers: int, base_url: str) -> None:
        if not 1 <= shards <= CLIMBMIX_LAST - 1:
            raise UsageError(f"--num-shards must be between 1 and {CLIMBMIX_LAST - 1}, not {shards}")
        self.folder, self.workers, self.base_url = folder, workers, base_url
        indices = {"train": list(range(shards)), "val": [CLIMBMIX_LAST], "holdout": [CLIMBMIX_LAST - 1]}
        self.shards = {s: [f"shard_{i:05d}.parquet" for i in part] for s, part in indices.items()}

    def identity(self) -> dict[str, Any]:
        return {"shards": self.shards}

    def corpus(self, folder: Path, report: Report) -> Corpus:
        names = [n for part in self.shards.values() for n in part]
        download(names, self.folder, self.workers, self.base_url)
        return _Shards(self.folder, self.shards)


class _Shards:
    """Shards are text of one split each, so they are read where they are."""

    def __init__(self, folder: Path, shards: dict[str, list[str]]) -> None:
        self._folder, self._shards = folder, shards
        self._names = [n for part in shards.values() for n in part]
        self._tallies: dict[str, Tally] = {}  # of each split's last reading

    @property
    def tally(self) -> Tally:
        return sum(self._tallies.values(), Tally())

    def documents(self, split: str) -> Iterator[tuple[int, str]]:
        tally = self._tallies[split] = Tally()
        for name in self._shards[split]:
            for document in read(self._folder / name, Fields(), tally):
                yield self._names.index(name) << 32 | document.place, document.text

    def where(self, index: int) -> str:
        return f"{self._names[index >> 32]}:{index & 0xFFFFFFFF}"

    def close(self) -> None:
        pass
