"""Files to documents: text, JSON and parquet, compressed or not.

What cannot be read at all (a damaged archive, a parquet file without the column) is an error that names the file.
One document that cannot be used is counted and named in `Tally`, and the others are read.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from hotloop.harness.errors import DataError
from hotloop.harness.text import one_line

__all__ = [
    "DOCUMENT_CHARS",
    "FORMATS",
    "Document",
    "Fields",
    "Tally",
    "counted",
    "cut",
    "kind_of",
    "read",
    "shown",
    "text_files",
]

FORMATS = ".txt, .md, .jsonl, .json (each also .gz or .zst) or .parquet"
DOCUMENT_CHARS = 10_000  # the longest document that is made of a text file
_KINDS = {".txt": "text", ".md": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What lies beside the shards of a Hugging Face dataset and is no text of it.
_CARDS = {"readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The tokenizer's regular expression runs out of its stack somewhere above this.
MOST_BLANKS = 500_000
_BLANKS = re.compile(rf"\s{{{MOST_BLANKS}}}")
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A piece of text that is split, packed and scored as one.

    Attributes:
        key: what decides its split, empty for the text itself; the same for all parts of one file.
        place: the line, row, item or part of its file that it is, from 1.
    """

    text: str
    key: str
    place: int


@dataclass(frozen=True)
class Fields:
    """Where the text is: the field of a JSON object, the column of a parquet file."""

    json: str = "text"
    column: str = "text"


@dataclass
class Tally:
    """What was met on the way: documents read, blank or null ones, mended ones, and those that cannot be used."""

    read: int = 0
    blank: int = 0
    mended: int = 0
    unusable: int = 0
    named: list[str] = field(default_factory=list)  # the first ones: where and why

    def __add__(self, other: Tally) -> Tally:
        both = [getattr(self, f.name) + getattr(other, f.name) for f in fields(self)]
        return Tally(*both)

    def refuse(self, where: str, why: str) -> None:
        self.read += 1
        self.unusable += 1
        if len(self.named) < 3:
            self.named.append(f"{where}: {why}")


def shown(path: Path | str) -> str:
    """A path as it can be printed anywhere."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def kind_of(path: Path) -> str | None:
    """`text`, `lines`, `json` or `parquet`; None for what is not read."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return _KINDS.get(suffixes[-1]) if suffixes else None


def text_files(path: Path) -> tuple[list[Path], Counter[str]]:
    """The files of a source in a fixed order, and how many were passed over, by kind.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        raise DataError(f"{shown(path)} does not exist; give another --source")
    if not path.is_dir():
        if kind_of(path) is None:
            raise DataError(f"{shown(path)} is none of {FORMATS}; give another --source")
        return [path], Counter()
    found: list[Path] = []
    passed: Counter[str] = Counter()
    for folder, folders, names in os.walk(path, onerror=_raise):
        if {"manifest.json", "tokenizer.json", "train.bin"} <= set(names):  # prepared by us
            folders.clear()
            continue
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        cards = _CARDS if any(n.lower().endswith(".parquet") for n in names) or _holds_shards(folder, folders) else ()
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file():
                passed["hidden or special"] += 1
            elif name.lower() in cards:
                passed["dataset card"] += 1
            elif kind_of(file) is None:
                passed["".join(file.suffixes[-1:]).lower() or "without a suffix"] += 1
            else:
                found.append(file)
    if not found:
        also = f" ({sum(passed.values())} files of other kinds: {counted(passed)})" if passed else ""
        raise DataError(f"{shown(path)} holds no {FORMATS} file{also}; give another --source")
    return sorted(found), passed


def _raise(error: OSError) -> None:
    raise error


def _holds_shards(folder: str, folders: list[str]) -> bool:
    return any(next(Path(folder, f).glob("*.parquet"), None) is not None for f in folders)


def counted(counts: Counter[str]) -> str:
    """`3 .csv, 1 without a suffix`."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def read(file: Path, where: Fields, tally: Tally) -> Iterator[Document]:
    """The documents of one file. Raises DataError where the file as a whole cannot be read."""
    kind = kind_of(file)
    try:
        if kind == "parquet":
            yield from _parquet(file, where.column, tally)
            return
        with _open(file) as stream:
            if kind == "text":
                yield from _text(file, stream.read(), tally)
            elif kind == "lines":
                yield from _lines(file, stream, where.json, tally)
            else:
                yield from _json(file, stream.read(), where.json, tally)
    except (OSError, EOFError) as e:
        raise DataError(f"{shown(file)} cannot be read: {getattr(e, 'strerror', None) or e}") from None


def _open(file: Path) -> io.BufferedReader:
    compression = _COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return open(file, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(os.fsdecode(file)), compression), 1 << 20)


def _text(file: Path, raw: bytes, tally: Tally) -> Iterator[Document]:
    """All parts of a file have its text as their key, so that they fall into one split."""
    try:
        text = raw.removeprefix(_BOM).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        tally.refuse(shown(file), f"is not UTF-8 text (byte {e.start})")
        return
    if not _is_text(text, tally):
        return
    for place, part in enumerate(cut(text, DOCUMENT_CHARS), 1):
        if not part.isspace():
            tally.read += 1
            yield Document(part, text, place)


def cut(text: str, most: int) -> Iterator[str]:
    """The text in parts of at most `most` characters, nothing left out: between paragraphs, else lines, else words."""
    start = 0
    while len(text) - start > most:
        least, end = start + most // 4, start + most
        for mark in ("\n\n", "\n", " "):
            at = text.rfind(mark, least, end)
            if at >= 0:
                end = at + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _lines(file: Path, stream: Iterable[bytes], name: str, tally: Tally) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.isspace() or not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            tally.refuse(f"{shown(file)}:{number}", f"is no JSON ({_why(e)})")
            continue
        yield from _value(file, number, value, name, tally)


def _json(file: Path, raw: bytes, name: str, tally: Tally) -> Iterator[Document]:
    """One array, or one object; or, as many files of that name are, an object a line."""
    try:
        value = json.loads(raw.removeprefix(_BOM))
    except (ValueError, RecursionError) as e:
        if "Extra data" in str(e):
            yield from _lines(file, io.BytesIO(raw), name, tally)
        else:
            tally.refuse(shown(file), f"is no JSON ({_why(e)})")
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield from _value(file, number, item, name, tally)


def _why(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else one_line(str(error), 80)


def _value(file: Path, place: int, value: Any, name: str, tally: Tally) -> Iterator[Document]:
    where = f"{shown(file)}:{place}"
    if isinstance(value, dict):
        if name not in value:
            has = ", ".join(list(map(repr, value))[:5]) or "nothing"
            tally.refuse(where, f"has no field {name!r} (it has {has[:120]}; see --text-field)")
            return
        value = value[name]
    if value is not None and not isinstance(value, str):
        tally.refuse(where, f"the field {name!r} is {_article(type(value).__name__)}, no text")
    else:
        yield from _document(file, place, value, tally)


def _document(file: Path, place: int, text: str | None, tally: Tally) -> Iterator[Document]:
    if not _is_text(text, tally):
        return
    if len(text) >= MOST_BLANKS and _BLANKS.search(text):
        tally.refuse(
            f"{shown(file)}:{place}", f"holds {MOST_BLANKS:,} blanks in a row, on which the tokenizer gives up"
        )
        return
    tally.read += 1
    yield Document(text, "", place)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _is_text(text: str | None, tally: Tally) -> TypeGuard[str]:
    """null, nothing and blanks are all the same: no document, and no fault either."""
    good = bool(text) and not str(text).isspace()
    tally.blank += not good
    return good


def _parquet(file: Path, name: str, tally: Tally) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            _check_column(file, name, schema)
            place = 0
            for batch in table.iter_batches(batch_size=1024, columns=[name]):
                for value in _strings(batch.column(0)):
                    place += 1
                    if isinstance(value, bytes):
                        try:
                            value = value.decode()
                        except UnicodeDecodeError:
                            tally.refuse(f"{shown(file)}:{place}", f"the column {name!r} holds bytes, no UTF-8 text")
                            continue
                    yield from _document(file, place, value, tally)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{shown(file)} is no parquet file that can be read ({one_line(str(e), 120)})") from None


def _check_column(file: Path, name: str, schema: Any) -> None:
    import pyarrow as pa

    if name not in schema.names:
        columns = ", ".join(schema.names)[:120]
        raise DataError(f"{shown(file)} has no column {name!r}; say which with --text-column: {columns}")
    kind = schema.field(name).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(getattr(pa.types, f"is_{k}", lambda _: False)(inner) for k in (
        "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null",
    )):  # fmt: skip
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        also = f"; columns of text: {', '.join(texts)[:120]}" if texts else ""
        raise DataError(f"{shown(file)}: the column {name!r} holds {kind}, no text; say another --text-column{also}")


def _strings(column: Any) -> list[str | bytes | None]:
    import pyarrow as pa

    try:
        values: list[str | bytes | None] = column.to_pylist()
    except UnicodeDecodeError:  # bytes that only claim to be text: each is looked at by itself
        values = column.cast(pa.binary()).to_pylist()
    return values
