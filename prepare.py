"""Text to packed rows, once.

    text -> documents -> [train | val | holdout] -> BPE tokenizer (from train only) -> rows of seq_len + 1 tokens

A prepared folder holds `train.bin`, `val.bin` and `holdout.bin` (little-endian uint16, seq_len + 1 tokens a row, for
memory mapping), `tokenizer.json` (plain data) and `manifest.json` (the SHA-256 of each). The folder appears whole or
not at all. Rows start with a BOS token and are packed by best fit, as karpathy/autoresearch packs them: no padding, and
a document is cropped only where nothing fits. The splits never share a document.

    python prepare.py                    # what this machine wants: climbmix with a GPU, stdlib without
    python prepare.py --source FILE_OR_FOLDER
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import functools
import hashlib
import heapq
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import DataError, HotloopError, UsageError

__all__ = ["Dataset", "Packer", "Tokenizer", "default_data_dir", "load_dataset", "main", "prepare"]

FORMAT = 1
SPLITS = ("train", "val", "holdout")
# The GPT-4 pattern with numbers in pairs: the pieces are the reference's. Its possessive quantifiers change no match
# here, and without them all alternatives but the look-ahead form one group that runs as an automaton: twice as fast.
SPLIT_PATTERN = (
    r"""(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n])"""
    r"""|\s+(?!\S)|\s+"""
)
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the first is BOS
TOKENIZER_CHARS = 1_000_000_000  # text that the tokenizer is trained on, at most
DOCUMENT_CHARS = 10_000  # of each document, likewise
BUFFER_DOCUMENTS = 1000  # documents among which the packer picks
BATCH_DOCUMENTS = 128  # documents that are tokenised at a time
# What falls into val and holdout where the source has no split of its own.
VAL_SHARE, HOLDOUT_SHARE = 0.08, 0.04

CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
CLIMBMIX_LAST = 6542  # shard_06542 is val, as in the reference; the one before is holdout

Row = npt.NDArray[np.uint16]


# ---- Tokenizer ------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-pair encoding with a BOS token.

    Attributes:
        vocab_size: V.
        bos_id: the token that starts every document.
        token_bytes: int32 [V], the raw bytes of each token; 0 for special ones. A lone byte of a longer character
            is 1 byte.
    """

    def __init__(self, pattern: str, ranks: Sequence[bytes], special: Sequence[str]) -> None:
        import tiktoken

        self.pattern, self.ranks, self.special = pattern, list(ranks), list(special)
        self.vocab_size = len(ranks) + len(special)
        self.bos_id = len(ranks)
        self.token_bytes: npt.NDArray[np.int32] = np.array([len(r) for r in ranks] + [0] * len(special), dtype=np.int32)
        self._encoding = tiktoken.Encoding(
            name="hotloop",
            pat_str=pattern,
            mergeable_ranks={r: i for i, r in enumerate(ranks)},
            special_tokens={s: len(ranks) + i for i, s in enumerate(special)},
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train on documents; raises DataError where the text has too few distinct pairs for the vocabulary."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda x: x[1])]
        if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
            raise DataError(
                f"the text gives a vocabulary of {len(ranks) + len(SPECIAL_TOKENS)} tokens at most; ask for a smaller "
                f"--vocab-size than {vocab_size}, or give more text"
            )
        return cls(SPLIT_PATTERN, ranks, SPECIAL_TOKENS)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises DataError for a file that is no tokenizer."""
        try:
            data = json.loads(path.read_text())
            return cls(data["pattern"], [base64.b64decode(r) for r in data["ranks"]], data["special"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path} is not a tokenizer ({e}); run: hotloop prepare") from None

    def to_json(self) -> bytes:
        ranks = [base64.b64encode(r).decode() for r in self.ranks]
        return json.dumps({"pattern": self.pattern, "special": self.special, "ranks": ranks}).encode()

    def encode(self, text: str) -> Row:
        """The text's tokens behind a BOS, uint16. What looks like a special token is text. Releases the GIL."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate; becomes U+FFFD
            ids = np.array(self._encoding.encode_ordinary(text))
        row = np.empty(len(ids) + 1, dtype=np.uint16)
        row[0], row[1:] = self.bos_id, ids
        return row

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])


# ---- Packing --------------------------------------------------------------------------------------------------------


class Packer:
    """Best-fit packing: the largest buffered document that fits the rest of the row, the earliest among equals;
    where none fits, the shortest is cropped to fill it.

    The result is that of a search through the whole buffer. Here documents wait in queues by length, and a bit set says
    which lengths are there, so a step costs the same for any buffer. Documents longer than a row wait in a heap.

    Args:
        documents: token arrays; an iterator that is asked for one batch at a time.
        width: tokens a row, seq_len + 1.
    """

    def __init__(self, batches: Iterator[list[Row]], width: int, buffer: int = BUFFER_DOCUMENTS) -> None:
        self._batches, self._width, self._buffer = batches, width, buffer
        self._queues: dict[int, deque[Row]] = {}
        self._lengths = 0  # bit n: a document of n <= width tokens waits
        self._long: list[tuple[int, int, Row]] = []
        self._count = self._arrived = 0
        self._more = True

    def rows(self) -> Iterator[Row]:
        """uint16 [width] each, until the documents end; the last, incomplete row is dropped."""
        while True:
            row = np.empty(self._width, dtype=np.uint16)
            at = 0
            while at < self._width:
                while self._more and self._count < self._buffer:
                    self._refill()
                if self._count == 0:
                    return
                document = self._pick(self._width - at)
                row[at : at + len(document)] = document
                at += len(document)
            yield row

    def _refill(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self._more = False
            return
        for document in batch:
            n = len(document)
            if n > self._width:
                heapq.heappush(self._long, (n, self._arrived, document))
            else:
                queue = self._queues.get(n)
                if queue is None:
                    queue = self._queues[n] = deque()
                queue.append(document)
                self._lengths |= 1 << n
            self._arrived += 1
        self._count += len(batch)

    def _pick(self, room: int) -> Row:
        self._count -= 1
        fitting = self._lengths & ((2 << room) - 1)
        if fitting:
            return self._take(fitting.bit_length() - 1)
        if self._lengths:
            return self._take((self._lengths & -self._lengths).bit_length() - 1)[:room]
        return heapq.heappop(self._long)[2][:room]

    def _take(self, n: int) -> Row:
        queue = self._queues[n]
        document = queue.popleft()
        if not queue:
            self._lengths ^= 1 << n
        return document


# ---- Sources --------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Where text comes from. `documents(split)` yields the texts of one split, in a fixed order."""

    name: str
    documents: Callable[[str], Iterator[str]]
    facts: dict[str, Any] = field(default_factory=dict)


def split_of(key: str) -> str:
    """The split of a document, by a hash of what identifies it: the same whatever stands beside it."""
    share = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "val" if share < VAL_SHARE else "holdout" if share < VAL_SHARE + HOLDOUT_SHARE else "train"


_TOP_LEVEL = re.compile(r"^(?=class |def |async def |@)", re.MULTILINE)


# Parts of the standard library that distributions leave out or keep elsewhere, so that the text is nearly the same on
# all of them.
STDLIB_SKIP = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo",
    "lib2to3", "distutils", "ensurepip",
}  # fmt: skip


def stdlib_source() -> Source:
    """The text of the running Python's standard library. Split by file; a file's documents are its definitions."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def paths() -> Iterator[Path]:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in STDLIB_SKIP)
            yield from (Path(folder, f) for f in sorted(files) if f.endswith((".py", ".txt", ".rst")))

    def documents(split: str) -> Iterator[str]:
        for path in paths():
            if split_of(path.relative_to(root).as_posix()) != split:
                continue
            with contextlib.suppress(UnicodeDecodeError, OSError):  # a few test files are not text on purpose
                text = path.read_text(encoding="utf-8")
                yield from (part for part in _TOP_LEVEL.split(text) if part.strip())

    return Source("stdlib", documents, {"python": platform.python_version()})


def path_source(path: Path) -> Source:
    """A .txt file (one document), .jsonl (`text` of each line), .parquet (column `text`), or a folder of them."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet") and p.is_file())
    else:
        files = [path]
    if not path.exists() or not files:
        raise DataError(f"{path} does not exist or holds no .txt, .jsonl or .parquet file; give another --source")
    if path.is_file() and path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise DataError(f"{path} is none of .txt, .jsonl and .parquet; give another --source")

    def documents(split: str) -> Iterator[str]:
        for file in files:
            yield from (text for text in _texts(file) if text.strip() and split_of(text) == split)

    return Source(str(path), documents)


def _texts(file: Path) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
        elif file.suffix == ".parquet":
            yield from _parquet_texts(file)
        else:
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        text = json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError):
                        raise DataError(
                            f"{file}:{number} is no JSON object with a field text; mend or drop it"
                        ) from None
                    if not isinstance(text, str):
                        raise DataError(f"{file}:{number}: the field text is no string; mend or drop it")
                    yield text
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8 text (byte {e.start}); convert or drop it") from None
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror or e}") from None


def _parquet_texts(file: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            texts = table.read_row_group(group, columns=["text"]).column("text").to_pylist()
            yield from (text for text in texts if text)
    except (pa.ArrowException, KeyError) as e:
        raise DataError(f"{file} is no parquet file with a column text ({' '.join(str(e).split())[:120]})") from None


def climbmix_source(folder: Path, shards: int, workers: int, base_url: str = CLIMBMIX_URL) -> Source:
    """The shards of karpathy/climbmix-400b-shuffle, downloaded as needed. Raises DataError without network."""
    if not 1 <= shards <= CLIMBMIX_LAST - 1:
        raise UsageError(f"--num-shards must be between 1 and {CLIMBMIX_LAST - 1}, not {shards}")
    split_shards = {"train": list(range(shards)), "val": [CLIMBMIX_LAST], "holdout": [CLIMBMIX_LAST - 1]}
    wanted = [i for part in split_shards.values() for i in part]
    download([f"shard_{i:05d}.parquet" for i in wanted], folder, workers, base_url)

    def documents(split: str) -> Iterator[str]:
        for i in split_shards[split]:
            yield from _parquet_texts(folder / f"shard_{i:05d}.parquet")

    return Source("climbmix", documents, {"shards": shards})


def download(names: list[str], folder: Path, workers: int, base_url: str, attempts: int = 5) -> None:
    """Fetch files that are not there yet, in parallel; a broken download goes on where it stopped.

    Raises:
        DataError: a file could not be had.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in names if not (folder / n).exists()]
    if not missing:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_fetch, n, folder, base_url, attempts, progress) for n in missing]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(name: str, folder: Path, base_url: str, attempts: int, progress: Any) -> None:
    part, task = folder / (name + ".part"), progress.add_task(name, total=None)
    problem = ""
    for attempt in range(attempts):
        try:
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(f"{base_url}/{name}", headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as answer:
                if have and answer.status != 206:
                    have = 0
                total = have + int(answer.headers.get("Content-Length", 0))
                progress.update(task, total=total, completed=have)
                with open(part, "ab" if have else "wb") as f:
                    while block := answer.read(1 << 20):
                        f.write(block)
                        progress.advance(task, len(block))
            if total and part.stat().st_size < total:
                raise OSError(f"ended after {part.stat().st_size} of {total} bytes")
            _check_parquet(part)
            os.replace(part, folder / name)
            return
        except DataError as e:
            part.unlink(missing_ok=True)
            problem = str(e)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # the part is longer than the file: start over
                part.unlink(missing_ok=True)
            problem = f"HTTP {e.code}"
        except OSError as e:
            if e.errno == 28:
                raise DataError(
                    f"the disk of {folder} is full; free some space and run the same command again"
                ) from None
            problem = str(getattr(e, "reason", None) or e)
        if attempt + 1 < attempts:
            time.sleep(min(2.0**attempt, 10.0))
    raise DataError(
        f"{name} could not be downloaded from {base_url} ({problem}); check the network and run the same command "
        f"again, it goes on where it stopped, or use text of your own: --source PATH, or --source stdlib"
    )


def _check_parquet(path: Path) -> None:
    with open(path, "rb") as f:
        head = f.read(4)
        f.seek(-4, os.SEEK_END)
        if head != b"PAR1" or f.read(4) != b"PAR1":
            raise DataError("what arrived is no parquet file")


# ---- Prepared folders -----------------------------------------------------------------------------------------------


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
    return f"prepare it again: rm -r {dataset.path} && hotloop prepare --source {dataset.source}"


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
        raise DataError(f"{path} has format {version}, this version reads {FORMAT}; remove it and run: hotloop prepare")
    return dataset


def default_data_dir(source: str, seq_len: int, vocab_size: int) -> Path:
    """Where `prepare` puts a source, under $HOTLOOP_DATA or ~/.cache/hotloop."""
    base = Path(os.environ.get("HOTLOOP_DATA") or Path.home() / ".cache" / "hotloop")
    name = source if source in ("climbmix", "stdlib") else "path-" + hashlib.sha256(
        str(Path(source).resolve()).encode()
    ).hexdigest()[:12]  # fmt: skip
    # The text of the standard library differs between Pythons, so its scores do not compare.
    version = f"-py{sys.version_info.major}.{sys.version_info.minor}" if source == "stdlib" else ""
    return base / f"{name}{version}-t{seq_len}-v{vocab_size}"


def prepare(
    source: str,
    *,
    seq_len: int,
    vocab_size: int,
    out: Path | None = None,
    num_shards: int = 10,
    workers: int = 8,
    max_rows: dict[str, int] | None = None,
    report: Callable[[str], None] = lambda _: None,
    base_url: str = CLIMBMIX_URL,
) -> Dataset:
    """Prepare a source, or return it where that is done already.

    Args:
        source: `climbmix`, `stdlib` or a path.
        seq_len: T; rows hold T + 1 tokens.
        vocab_size: V, special tokens included; at most 65536.
        out: the folder; None for `default_data_dir`.
        max_rows: caps by split.
        report: takes lines on what happens.

    Raises:
        DataError, UsageError: what is wrong and how to mend it; nothing half-written stays.
    """
    if not 256 + len(SPECIAL_TOKENS) <= vocab_size <= 65536:
        raise UsageError(f"--vocab-size must be between {256 + len(SPECIAL_TOKENS)} and 65536, not {vocab_size}")
    if not 8 <= seq_len <= 1 << 20:
        raise UsageError(f"--seq-len must be between 8 and {1 << 20}, not {seq_len}")
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    out = (out or default_data_dir(source, seq_len, vocab_size)).resolve()
    wanted = {"source": source, "seq_len": seq_len, "vocab_size": vocab_size}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f".{out.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"another process is preparing {out}; wait for it") from None
            for left in out.parent.glob(f".{out.name}.tmp-*"):  # of a preparation that was killed: we hold the lock
                shutil.rmtree(left)
            if out.exists():
                dataset = load_dataset(out)
                for key, value in wanted.items():
                    if dataset.manifest[key] != value:
                        raise DataError(f"{out} holds {key} = {dataset.manifest[key]}, not {value}; give another --out")
                dataset.verify()
                report(f"{out} is prepared already; its hashes are right")
                return dataset
            text = _open_source(source, out.parent / "climbmix-shards", num_shards, workers, base_url)
            temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
            temporary.mkdir(mode=0o700)
            try:
                _write(text, temporary, wanted, max_rows or {}, report)
                os.replace(temporary, out)
                _sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        if e.errno == 28:
            raise DataError(
                f"the disk of {out.parent} is full; free some space and run the same command again"
            ) from None
        raise DataError(f"{e.filename or out}: {e.strerror or e}") from None
    return load_dataset(out)


def _open_source(source: str, shards_folder: Path, num_shards: int, workers: int, base_url: str) -> Source:
    if source == "stdlib":
        return stdlib_source()
    if source == "climbmix":
        return climbmix_source(shards_folder, num_shards, workers, base_url)
    return path_source(Path(source))


def _write(
    source: Source, folder: Path, wanted: dict[str, Any], max_rows: dict[str, int], report: Callable[[str], None]
) -> None:
    """Fill a folder: tokenizer, rows, manifest."""
    began = time.monotonic()
    tokenizer = Tokenizer.train(_sample(source.documents("train")), wanted["vocab_size"])
    report(f"tokenizer of {tokenizer.vocab_size} tokens in {time.monotonic() - began:.1f} s")
    _put(folder / "tokenizer.json", tokenizer.to_json())
    splits: dict[str, Any] = {}
    for split in SPLITS:
        began = time.monotonic()
        facts = _write_rows(source.documents(split), tokenizer, wanted["seq_len"] + 1, folder / f"{split}.bin",
                            max_rows.get(split))  # fmt: skip
        if not facts["rows"]:
            raise DataError(f"the source has too little text for a single row of the {split} split; give more text")
        seconds = time.monotonic() - began
        splits[split] = {"file": f"{split}.bin", **facts}
        report(
            f"{split:<8} {facts['rows']:>9,} rows from {facts['documents']:,} documents, {facts['bytes'] / 1e6:.1f} MB "
            f"of text, {facts['bytes'] / max(1, facts['tokens']):.2f} bytes a token, {seconds:.1f} s"
        )
    hashes = {}
    for name in ("tokenizer.json", *(f"{s}.bin" for s in SPLITS)):
        with open(folder / name, "rb") as f:
            hashes[name] = hashlib.file_digest(f, "sha256").hexdigest()
    manifest = {"format": FORMAT, **wanted, "bos_id": tokenizer.bos_id, "splits": splits, "sha256": hashes,
                "facts": source.facts}  # fmt: skip
    _put(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    _sync(folder)


def _sample(documents: Iterator[str]) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text[:DOCUMENT_CHARS]
        total += min(len(text), DOCUMENT_CHARS)
        if total >= TOKENIZER_CHARS:
            return


def _write_rows(
    documents: Iterator[str], tokenizer: Tokenizer, width: int, path: Path, most: int | None
) -> dict[str, int]:
    facts = {"rows": 0, "documents": 0, "bytes": 0, "tokens": 0}

    def batches(pool: ThreadPoolExecutor) -> Iterator[list[Row]]:
        while texts := list(_first(documents, BATCH_DOCUMENTS)):
            tokens = list(pool.map(tokenizer.encode, texts))
            facts["documents"] += len(texts)
            facts["bytes"] += sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
            facts["tokens"] += sum(map(len, tokens))
            yield tokens

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with pool, open(path, "wb", opener=functools.partial(os.open, mode=0o600)) as f:
        for row in Packer(batches(pool), width).rows():
            if facts["rows"] == most:
                break
            f.write(row.astype("<u2", copy=False).tobytes())
            facts["rows"] += 1
        f.flush()
        os.fsync(f.fileno())
    return facts


def _first(items: Iterator[str], count: int) -> Iterator[str]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _put(path: Path, data: bytes) -> None:
    with open(path, "wb", opener=functools.partial(os.open, mode=0o600)) as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- Command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`python prepare.py`, `hotloop prepare`; returns the exit status."""
    from harness.machine import gpu_memory_gib
    from harness.spec import PRESETS, auto_preset, preset_named

    parser = argparse.ArgumentParser(prog="hotloop prepare", description="Text to tokenizer and packed rows, once.")
    parser.add_argument("--preset", default="auto", choices=["auto", *sorted(PRESETS)], help="lengths and source")
    parser.add_argument("--source", help="climbmix, stdlib, or a file or folder of .txt, .jsonl, .parquet")
    parser.add_argument("--seq-len", type=int, metavar="T")
    parser.add_argument("--vocab-size", type=int, metavar="V")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--num-shards", type=int, default=10, metavar="N", help="climbmix: training shards")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="climbmix: downloads at a time")
    args = parser.parse_args(argv)
    name = auto_preset(gpu_memory_gib()) if args.preset == "auto" else args.preset
    preset = preset_named(name)
    try:
        dataset = prepare(
            args.source or preset.source,
            seq_len=preset.seq_len if args.seq_len is None else args.seq_len,
            vocab_size=preset.vocab_size if args.vocab_size is None else args.vocab_size,
            out=args.out,
            num_shards=args.num_shards,
            workers=args.workers,
            max_rows={"val": preset.eval_rows, "holdout": preset.holdout_rows},
            report=print,
        )
    except HotloopError as e:
        print(f"hotloop: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("hotloop: stopped; nothing half-written was left", file=sys.stderr)
        return 130
    rows = ", ".join(f"{s} {dataset.manifest['splits'][s]['rows']:,}" for s in SPLITS)
    print(f"{dataset.path}\nrows of {dataset.seq_len} tokens: {rows}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
