"""A prepared folder: `train.bin`, `val.bin`, `holdout.bin` (little-endian uint16, seq_len + 1 tokens a row, for memory
mapping), `tokenizer.json` (plain data) and `manifest.json` (what it was made from and how, the SHA-256 of each file).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hotloop.harness.data.tokenizer import Tokenizer
from hotloop.harness.errors import DataError
from hotloop.harness.records.model import DataFacts

__all__ = ["BUILT_IN", "FORMAT", "SPLITS", "Dataset", "default_data_dir", "load_dataset"]

FORMAT = 2
SPLITS = ("train", "val", "holdout")
BUILT_IN = ("climbmix", "packages", "stdlib")  # sources that are names and no paths


class Dataset:
    """A prepared folder, read-only: path, manifest, source, seq_len, vocab_size, and digest, that of the manifest."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path = path
        self.digest = hashlib.sha256(raw).hexdigest()
        self.manifest: dict[str, Any] = json.loads(raw)
        self.source: str = self.manifest["source"]
        self.seq_len: int = self.manifest["seq_len"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self._verified: dict[str, tuple[int, int, int]] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.path / "tokenizer.json")

    @property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """int32 [V]: raw bytes of each token, 0 for special ones."""
        return self.tokenizer.token_bytes

    @property
    def reference_bytes(self) -> npt.NDArray[np.int32]:
        """int32 [V]: bytes of each token as karpathy/autoresearch counts them, 0 for special ones."""
        return self.tokenizer.reference_bytes

    def rows(self, split: str) -> npt.NDArray[np.uint16]:
        """uint16 [N, seq_len + 1], memory-mapped, read-only. Raises DataError for a file of another size."""
        entry = self.manifest["splits"][split]
        path = self.path / entry["file"]
        shape = (entry["rows"], self.seq_len + 1)
        try:
            if path.stat().st_size != shape[0] * shape[1] * 2:
                raise DataError(f"{path} has {path.stat().st_size} bytes, not those of {shape[0]} rows; {_again(self)}")
            return np.memmap(path, dtype="<u2", mode="r", shape=shape)
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror or e}; {_again(self)}") from None

    def facts(self) -> DataFacts:
        """What a record says of its data."""
        train = self.manifest["splits"]["train"]
        return DataFacts(self.source, self.manifest["packing"], train["share_in_rows"], train["rows"] * self.seq_len)

    def verify(self) -> None:
        """Hash every file against the manifest, those again that changed since this object last hashed them.

        Raises:
            DataError: names the file that is not what it was.
        """
        for name, sha256 in self.manifest["sha256"].items():
            path = self.path / name
            try:
                stat = path.stat()
                stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
                if self._verified.get(name) == stamp:
                    continue
                with open(path, "rb") as f:
                    found = hashlib.file_digest(f, "sha256").hexdigest()
            except OSError as e:
                raise DataError(f"{path} cannot be read: {e.strerror or e}; {_again(self)}") from None
            if found != sha256:
                raise DataError(f"{path} is not what was prepared (its SHA-256 differs); {_again(self)}")
            self._verified[name] = stamp
        try:
            now = hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()
        except OSError as e:
            raise DataError(f"{self.path / 'manifest.json'} cannot be read: {e.strerror or e}") from None
        if now != self.digest:
            raise DataError(f"{self.path / 'manifest.json'} changed while it was in use; start again")


def _again(dataset: Dataset) -> str:
    return f"prepare it again: rm -r {shlex.quote(str(dataset.path))} && hotloop prepare --source " + shlex.quote(
        dataset.source
    )


def load_dataset(path: Path) -> Dataset:
    """Raises DataError for a folder that is missing, malformed or of another format."""
    try:
        raw = (path / "manifest.json").read_bytes()
        dataset = Dataset(path, raw)
        version = dataset.manifest["format"]
        complete = set(dataset.manifest["splits"]) == set(SPLITS) and isinstance(dataset.manifest["sha256"], dict)
    except FileNotFoundError:
        raise DataError(f"{path} is no prepared folder (it has no manifest.json); run: hotloop prepare") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path / 'manifest.json'} cannot be read ({e}); remove {path} and run: hotloop prepare"
        ) from None
    if version != FORMAT or not complete:
        raise DataError(f"{path} has format {version}, this version reads {FORMAT}; prepare it again: hotloop prepare")
    return dataset


def cache_dir() -> Path:
    """What is prepared and measured for this user: $HOTLOOP_DATA or ~/.cache/hotloop."""
    return Path(os.environ.get("HOTLOOP_DATA") or Path.home() / ".cache" / "hotloop")


def default_data_dir(source: str, seq_len: int, vocab_size: int) -> Path:
    """Where `prepare` puts a source, in `cache_dir`."""
    name = source if source in BUILT_IN else "path-" + hashlib.sha256(
        os.fsencode(Path(source).resolve())
    ).hexdigest()[:12]  # fmt: skip
    # The text of the standard library differs between Pythons, so its scores do not compare.
    version = f"-py{sys.version_info.major}.{sys.version_info.minor}" if source == "stdlib" else ""
    return cache_dir() / f"{name}{version}-t{seq_len}-v{vocab_size}"
