"""Make a prepared folder: whole or not at all, and anew where its text or what shaped it is not what it was."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from hotloop.harness.data.copies import Copies
from hotloop.harness.data.dataset import FORMAT, SPLITS, Dataset, default_data_dir, load_dataset
from hotloop.harness.data.packing import PACKING_VERSION, PACKINGS, Packer
from hotloop.harness.data.readers import Fields, Tally
from hotloop.harness.data.sources import Corpus, Text, open_text, tell_unusable
from hotloop.harness.data.tokenizer import SPECIAL_TOKENS, Row, Tokenizer, Untokenizable
from hotloop.harness.errors import DataError, UsageError

__all__ = ["default_packing", "prepare"]

TOKENIZER_CHARS = 1_000_000_000  # text that the tokenizer is trained on, at most
TOKENIZER_DOCUMENT_CHARS = 10_000  # of each document, likewise
BATCH_DOCUMENTS = 128  # documents that are tokenised at a time
LOW_SHARE = 0.5  # of the train tokens in rows, below which there is a warning
LEAK_SHARE = 0.05  # of val or holdout tokens that are near-copies, likewise

Report = Callable[[str], None]


def default_packing(source: str) -> str:
    """climbmix is packed as in the reference, so that scores compare with published ones; else nothing is lost."""
    return "crop" if source == "climbmix" else "carry"


def prepare(
    source: str,
    *,
    seq_len: int,
    vocab_size: int,
    out: Path | None = None,
    packing: str | None = None,
    num_shards: int = 10,
    workers: int = 8,
    max_rows: dict[str, int] | None = None,
    text_field: str = "text",
    text_column: str = "text",
    mirror: str | None = None,
    report: Report = lambda _: None,
    base_url: str | None = None,
) -> Dataset:
    """Prepare a source, or return it where that is done already and neither text nor flags have changed.

    Args:
        source: `climbmix`, `packages`, `stdlib` or a path.
        seq_len: T; rows hold T + 1 tokens.
        vocab_size: V, special tokens included; at most 65536.
        out: the folder; None for `default_data_dir`.
        packing: `crop` or `carry`; None for the source's default.
        max_rows: caps by split.
        mirror: a server in place of Hugging Face's; `base_url`: the folder that holds the shards, whole.
        report: takes lines on what happens.

    Raises:
        DataError, UsageError: what is wrong and how to mend it; nothing half-written stays, and what was there does.
    """
    if not 256 + len(SPECIAL_TOKENS) <= vocab_size <= 65536:
        raise UsageError(f"--vocab-size must be between {256 + len(SPECIAL_TOKENS)} and 65536, not {vocab_size}")
    if not 8 <= seq_len <= 1 << 20:
        raise UsageError(f"--seq-len must be between 8 and {1 << 20}, not {seq_len}")
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    packing = packing or default_packing(source)
    if packing not in PACKINGS:
        raise UsageError(f"--packing must be one of {', '.join(PACKINGS)}, not {packing!r}")
    out = (out or default_data_dir(source, seq_len, vocab_size)).resolve()
    try:
        text = open_text(
            source, fields=Fields(text_field, text_column), shards=num_shards,
            shards_folder=out.parent / "climbmix-shards", workers=workers, mirror=mirror, base_url=base_url,
        )  # fmt: skip
        wanted = {
            "source": text.name, "seq_len": seq_len, "vocab_size": vocab_size, "packing": packing,
            "packing_version": PACKING_VERSION, "max_rows": max_rows or {},
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f".{out.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"another process is preparing {out}; wait for it") from None
            for left in out.parent.glob(f".{out.name}.tmp-*"):  # of a preparation that was killed: we hold the lock
                shutil.rmtree(left)
            wanted["text"] = text.identity()
            if out.exists():
                dataset, changes = _still_good(out, wanted)
                if dataset is not None:
                    report(f"{out} is prepared already; text, flags and hashes are what they were")
                    return dataset
                report(f"{out} is prepared anew: {'; '.join(changes)}")
            temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
            temporary.mkdir(mode=0o700)
            try:
                _write(text, temporary, wanted, report)
                if text.identity() != wanted["text"]:
                    raise DataError(f"the text of {text.name} changed while it was read; run the same command again")
                _put_in_place(temporary, out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DataError(
                f"the disk of {out.parent} is full; free some space and run the same command again"
            ) from None
        raise DataError(f"{e.filename or out}: {e.strerror or e}") from None
    return load_dataset(out)


def _still_good(out: Path, wanted: dict[str, Any]) -> tuple[Dataset | None, list[str]]:
    """The dataset that is there, or None and why it has to be made anew.

    Raises:
        DataError: what is there is another text's, or nothing of ours.
    """
    if not (out / "manifest.json").is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise DataError(f"{out} is there and is no prepared folder; give another --out")
        return None, ["it is empty"]
    try:
        dataset = load_dataset(out)
    except DataError as e:
        return None, [str(e).split("; ")[0]]
    have = dataset.manifest
    if have["source"] != wanted["source"]:
        raise DataError(f"{out} holds the text of {have['source']}, not of {wanted['source']}; give another --out")
    changes = [
        f"{key} {_words(have.get(key))} -> {_words(value)}"
        for key, value in wanted.items() if key not in ("text", "source") and have.get(key) != value
    ]  # fmt: skip
    changes += _text_changes(have["text"], wanted["text"])
    if not changes:
        try:
            dataset.verify()
        except DataError as e:
            changes = [str(e).split("; ")[0]]
    return (None, changes) if changes else (dataset, [])


def _words(value: object) -> str:
    return json.dumps(value, sort_keys=True).strip('"')


def _text_changes(have: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = []
    for key in sorted(have.keys() | now.keys()):
        was, is_ = have.get(key), now.get(key)
        if was == is_:
            continue
        if key == "shards" and was and is_:
            changes.append(f"--num-shards {len(was['train'])} -> {len(is_['train'])}")
        elif key == "files" and was and is_:
            kinds = {
                "changed": [n for n in is_ if n in was and is_[n] != was[n]],
                "new": [n for n in is_ if n not in was],
                "gone": [n for n in was if n not in is_],
            }
            for kind, names in kinds.items():
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    changes.append(f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} {kind}")
        else:
            changes.append(f"{key} {_words(was)[:80]} -> {_words(is_)[:80]}")
    return changes


def _write(text: Text, folder: Path, wanted: dict[str, Any], report: Report) -> None:
    """Fill a folder: tokenizer, rows, manifest."""
    began = time.monotonic()
    corpus = text.corpus(folder, report)
    with contextlib.closing(corpus):
        tokenizer = Tokenizer.train(_sample(corpus), wanted["vocab_size"])
        report(f"tokenizer of {tokenizer.vocab_size} tokens; {time.monotonic() - began:.1f} s since the start")
        _put(folder / "tokenizer.json", tokenizer.to_json())
        copies, splits, given_up = Copies(), {}, Tally()
        for split in ("val", "holdout", "train"):  # what is looked for first, then where
            splits[split] = _write_split(corpus, split, tokenizer, copies, given_up, wanted, folder, report)
        tally = corpus.tally + given_up
        tell_unusable(tally, report)
        (folder / "spool").unlink(missing_ok=True)
    leaks = copies.facts()
    _tell_leaks(leaks, report)
    hashes = {}
    for name in ("tokenizer.json", *(f"{s}.bin" for s in SPLITS)):
        with open(folder / name, "rb") as f:
            hashes[name] = hashlib.file_digest(f, "sha256").hexdigest()
    manifest = {
        "format": FORMAT, **wanted, "bos_id": tokenizer.bos_id, "splits": splits, "near_copies": leaks,
        "documents": {"blank": tally.blank, "mended": tally.mended, "unusable": tally.unusable}, "sha256": hashes,
    }  # fmt: skip
    _put(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    _sync(folder)


def _sample(corpus: Corpus) -> Iterator[str]:
    """What the tokenizer is trained on, as in the reference."""
    total = 0
    for _, text in corpus.documents("train"):
        part = text[:TOKENIZER_DOCUMENT_CHARS]
        yield part
        total += len(part)
        if total >= TOKENIZER_CHARS:
            return


def _write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, copies: Copies, given_up: Tally, wanted: dict[str, Any],
    folder: Path, report: Report,
) -> dict[str, Any]:  # fmt: skip
    began, path, most = time.monotonic(), folder / f"{split}.bin", wanted["max_rows"].get(split)
    facts: dict[str, Any] = {"file": path.name, "rows": 0, "documents": 0, "bytes": 0, "tokens": 0}

    def encoded(item: tuple[int, str]) -> Row | tuple[str, str]:
        try:
            return tokenizer.encode(item[1])
        except Untokenizable as e:
            return corpus.where(item[0]), f"the tokenizer gives up on it ({e})"

    def batches(pool: ThreadPoolExecutor) -> Iterator[list[Row]]:
        documents = corpus.documents(split)
        while texts := list(islice(documents, BATCH_DOCUMENTS)):
            tokens = []
            for found in pool.map(encoded, texts):
                if isinstance(found, tuple):
                    given_up.refuse(*found)
                else:
                    tokens.append(found)
            if not tokens:
                continue
            copies.seek(tokens) if split == "train" else copies.add(split, tokens)
            facts["documents"] += len(tokens)
            facts["bytes"] += sum(int(tokenizer.token_bytes[t].sum()) for t in tokens)
            facts["tokens"] += sum(map(len, tokens))
            yield tokens

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with pool, open(path, "wb", opener=functools.partial(os.open, mode=0o600)) as f:
        packer = Packer(batches(pool), wanted["seq_len"] + 1, packing=wanted["packing"])
        for row in packer.rows():
            f.write(row.astype("<u2", copy=False).tobytes())
            facts["rows"] += 1
            if facts["rows"] == most:
                break
        f.flush()
        os.fsync(f.fileno())
    if not facts["rows"]:
        tell_unusable(corpus.tally + given_up, report)
        raise DataError(
            f"the {split} split is {facts['documents']} documents of {facts['tokens']} tokens together, and a row is "
            f"{wanted['seq_len'] + 1}; give more text, or a smaller --seq-len"
        )
    facts["share_in_rows"] = packer.placed / (packer.placed + packer.lost)
    report(
        f"{split:<8} {facts['rows']:>9,} rows from {facts['documents']:,} documents, {facts['bytes'] / 1e6:.2f} MB of "
        f"text, {facts['bytes'] / max(1, facts['tokens']):.2f} bytes a token; {100 * facts['share_in_rows']:.1f} % of "
        f"its tokens are in rows ({wanted['packing']}), {time.monotonic() - began:.1f} s"
    )
    if facts["share_in_rows"] < LOW_SHARE and split == "train":
        report(
            f"WARNING: only {100 * facts['share_in_rows']:.1f} % of the text is in rows, the rest was cropped; "
            f"--packing carry uses all of it"
        )
    return facts


def _tell_leaks(leaks: dict[str, Any], report: Report) -> None:
    for split, found in leaks.items():
        line = (
            f"near-copies of {split} documents in train: {found['near_copies']:,} of {found['looked_at']:,} looked at, "
            f"{100 * found['share_of_tokens']:.1f} % of the split's tokens"
        )
        bad = found["share_of_tokens"] > LEAK_SHARE
        report(f"WARNING: {line}; they flatter every score" if bad else line)


def _put(path: Path, data: bytes) -> None:
    with open(path, "wb", opener=functools.partial(os.open, mode=0o600)) as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename, or exchange with what is there, so that at any moment one of the two is there, whole."""
    if out.exists():
        exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        here = -100  # AT_FDCWD; 2: RENAME_EXCHANGE
        if exchange is None or exchange(here, os.fsencode(temporary), here, os.fsencode(out), 2) != 0:
            shutil.rmtree(out)  # a C library or a file system that cannot exchange
            os.replace(temporary, out)
    else:
        os.replace(temporary, out)
    _sync(out.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
