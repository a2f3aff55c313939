"""What people bring: every format, and every kind of document that cannot be used, named and counted."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import SPLITS, Dataset
from hotloop.harness.data.readers import Fields, Tally, cut, read, text_files
from hotloop.harness.errors import DataError

RANDOM = np.random.default_rng(7)
WORDS = ["".join(RANDOM.choice(list("abcdefghijklmnopqrstuvwxyz"), RANDOM.integers(2, 9))) for _ in range(500)]
GOOD = [" ".join(RANDOM.choice(WORDS, 60)) for _ in range(300)]


def make(source: Path, **flags: Any) -> tuple[Dataset, str]:
    told: list[str] = []
    whole = {"seq_len": 32, "vocab_size": 280, "out": source.parent / "out", "report": told.append} | flags
    return prepare(str(source), **whole), "\n".join(told)


def refused(source: Path, words: str, **flags: Any) -> None:
    with pytest.raises(DataError, match=words) as e:
        make(source, **flags)
    assert "\n" not in str(e.value)
    assert not (source.parent / "out").exists()
    assert not list(source.parent.glob(".out.tmp-*"))


def documents(path: Path, **fields: str) -> list[str]:
    tally = Tally()
    found = [d.text for d in read(path, Fields(**fields), tally)]
    assert tally.unusable == 0
    return found


def lines(texts: list[Any], key: str = "text") -> bytes:
    return "".join(json.dumps({key: t}) + "\n" for t in texts).encode()


# ---- formats


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.compress(data, "zstd", asbytes=True)
    return compressed


FORMATS = {
    "x.jsonl": lines(GOOD),
    "x.JSONL": lines(GOOD),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(GOOD),
    "crlf.jsonl": lines(GOOD).replace(b"\n", b"\r\n"),
    "x.jsonl.gz": gzip.compress(lines(GOOD)),
    "parts.jsonl.gz": gzip.compress(lines(GOOD[:100])) + gzip.compress(lines(GOOD[100:])),
    "x.jsonl.zst": zstd(lines(GOOD)),
    "parts.jsonl.zst": zstd(lines(GOOD[:100])) + zstd(lines(GOOD[100:])),
    "array.json": json.dumps([{"text": t} for t in GOOD], indent=1).encode(),
    "strings.json": json.dumps(GOOD).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "lines.json": lines(GOOD),
    "x.json.gz": gzip.compress(json.dumps(GOOD).encode()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    assert documents(tmp_path / name) == GOOD


@pytest.mark.parametrize(
    "array",
    [
        pa.array(GOOD), pa.array(GOOD, pa.large_string()), pa.array(GOOD).dictionary_encode(),
        pa.array([g.encode() for g in GOOD], pa.binary()), pa.array([g.encode() for g in GOOD], pa.large_binary()),
    ],
    ids=str,
)  # fmt: skip
def test_columns_of_text_and_of_its_bytes(tmp_path: Path, array: pa.Array) -> None:
    pq.write_table(pa.table({"body": array}), tmp_path / "x.parquet", row_group_size=70)
    assert documents(tmp_path / "x.parquet", column="body") == GOOD
    assert documents(tmp_path / "x.parquet", column="body") == GOOD


def test_text_and_markdown_lose_their_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\nwords\r\n")
    assert documents(tmp_path / "x.md") == ["# Title\n\nwords\n"]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"words"))
    assert documents(tmp_path / "x.txt.gz") == ["words"]


def test_the_field_and_the_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(GOOD, "body"))
    assert make(tmp_path / "x.jsonl", text_field="body")[0].manifest["text"]["text_field"] == "body"
    pq.write_table(pa.table({"body": GOOD, "n": range(300)}), tmp_path / "x.parquet")
    other = make(tmp_path / "x.parquet", text_column="body", out=tmp_path / "other")[0]
    assert other.manifest["sha256"]["tokenizer.json"]


def test_a_folder_says_what_it_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(GOOD))
    (folder / "deep" / "b.md").write_text(GOOD[0])
    for name in ("x.csv", "y.csv", "z.png", "LICENSE", ".hidden.txt", "deep/.git/c.txt", "deep/x.parquet.gz"):
        (folder / name).write_text("a,b")
    files, passed = text_files(folder)
    assert [f.name for f in files] == ["a.jsonl", "b.md"]
    assert passed == {".csv": 2, ".png": 1, "without a suffix": 1, "hidden or special": 1, ".gz": 1}
    assert "passed over: 2 .csv" in make(folder)[1]


def test_a_hugging_face_dataset_keeps_its_own_splits(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n" + GOOD[0])
    (folder / "dataset_infos.json").write_text("{}")
    shards = {
        "train-00000-of-00002": (0, 120),
        "train-00001-of-00002": (120, 220),
        "validation-00000-of-00001": (220, 300),
    }
    for name, (first, last) in shards.items():
        pq.write_table(pa.table({"text": GOOD[first:last]}), folder / "data" / f"{name}.parquet")
    dataset, told = make(folder)
    assert "passed over: 2 dataset card" in told
    assert "val by the source's own files" in told
    assert dataset.manifest["splits"]["val"]["documents"] == 80
    assert dataset.manifest["splits"]["holdout"]["documents"] + dataset.manifest["splits"]["train"]["documents"] == 220


# ---- documents that cannot be used


@pytest.mark.parametrize("name", ["nulls.jsonl", "nulls.parquet", "nulls.json"])
def test_null_and_blank_are_passed_over_alike(tmp_path: Path, name: str) -> None:
    texts: list[str | None] = [None if i % 9 == 0 else " \n" if i % 9 == 1 else t for i, t in enumerate(GOOD)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        whole = json.dumps([{"text": t} for t in texts]).encode()
        (tmp_path / name).write_bytes(whole if name.endswith("json") else lines(texts))
    dataset, told = make(tmp_path / name)
    assert dataset.manifest["documents"] == {"blank": 68, "mended": 0, "unusable": 0}
    assert "68 blank or null documents were passed over" in told


BAD_LINES = {
    "no JSON": (b"not json\n", "is no JSON"),
    "another field": (b'{"txt": "a"}\n', r"has no field 'text' \(it has 'txt'; see --text-field\)"),
    "a number": (b'{"text": 5}\n', "the field 'text' is an int, no text"),
    "a list": (b'{"text": ["a"]}\n', "the field 'text' is a list, no text"),
    "an object": (b'{"text": {"a": "b"}}\n', "the field 'text' is a dict, no text"),
    "nested deep": (b"[" * 100_000 + b"\n", "is no JSON"),
    "nested deep and closed": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deep|no text"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "is no JSON"),
    "a million blanks": (b'{"text": "' + b" " * 1_000_000 + b'x"}\n', "holds 500,000 blanks in a row"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_one_bad_document_is_named_and_many_are_an_error(tmp_path: Path, kind: str) -> None:
    line, words = BAD_LINES[kind]
    good = lines(GOOD).splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_bytes(b"".join([*good[:150], line, *good[150:]]))
    dataset, told = make(tmp_path / "x.jsonl")
    assert re.search(rf"1 of 301 documents cannot be used: {tmp_path}/x.jsonl:151: .*({words})", told)
    assert dataset.manifest["documents"]["unusable"] == 1
    (tmp_path / "y.jsonl").write_bytes(b"".join([*good[:150], *[line] * 4, *good[150:]]))
    with pytest.raises(DataError, match=rf"y\.jsonl:15\d: .*({words}).*4 of 304 documents cannot be used"):
        make(tmp_path / "y.jsonl", out=tmp_path / "out y")
    assert not (tmp_path / "out y").exists()


def test_half_a_surrogate_pair_is_mended(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([*GOOD, "half \ud83d of a pair " + GOOD[0]]))
    dataset, told = make(tmp_path / "x.jsonl")
    assert "1 documents held half of a surrogate pair" in told
    assert dataset.manifest["documents"]["mended"] == 1


@pytest.mark.parametrize(
    ("values", "kind"), [(range(300), "int64"), ([[g] for g in GOOD], "list"), ([{"text": g} for g in GOOD], "struct")]
)
def test_columns_that_are_no_text(tmp_path: Path, values: Any, kind: str) -> None:
    pq.write_table(pa.table({"text": values, "body": GOOD}), tmp_path / "x.parquet")
    refused(
        tmp_path / "x.parquet", rf"x\.parquet: the column 'text' holds {kind}.*--text-column; columns of text: body"
    )
    refused(
        tmp_path / "x.parquet", r"has no column 'words'; say which with --text-column: text, body", text_column="words"
    )


def test_bytes_that_are_no_text_are_found_in_a_column_of_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([*(g.encode() for g in GOOD), b"\xff\xfe"])}), tmp_path / "x.parquet")
    assert "x.parquet:301: the column 'text' holds bytes, no UTF-8 text" in make(tmp_path / "x.parquet")[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"\xff\xfe\xfa", "x.txt: is not UTF-8 text .byte 0."),
        ("x.parquet", b"PAR1 broken", "x.parquet is no parquet file"),
        ("x.jsonl.gz", gzip.compress(lines(GOOD))[:-40], "x.jsonl.gz cannot be read"),
        ("x.jsonl.gz", b"no gzip at all", "x.jsonl.gz cannot be read"),
        ("x.jsonl.zst", b"no zstd at all", "x.jsonl.zst cannot be read"),
        ("x.csv", b"a,b", "none of .txt"),
        ("x.txt", b"", "the text is 0 documents .1 more are blank. and 3 are needed"),
        ("x.jsonl", b"", "the text is 0 documents and 3 are needed"),
        ("x.jsonl", lines(["\n".join(GOOD)]), "the text is 1 document and 3 are needed"),
        ("x.jsonl", lines(["a b", "c d", "e f"]), "vocabulary of .* at most"),
        ("x.jsonl", lines([" ".join(GOOD), "a b", "e f"]), "the val split is 1 documents of . tokens together"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)
    refused(tmp_path / "missing", "does not exist")


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.csv").write_text("a,b")
    refused(tmp_path / "folder", r"holds no .*file \(1 files of other kinds: 1 \.csv\)")


# ---- few and large documents


@given(st.text(alphabet="ab \n", max_size=300), st.integers(8, 40))
def test_cutting_loses_nothing(text: str, most: int) -> None:
    parts = list(cut(text, most))
    assert "".join(parts) == text
    assert all(len(p) <= most for p in parts)


def test_one_file_is_cut_at_paragraphs_and_val_is_its_end(tmp_path: Path) -> None:
    book = "\n\n".join(GOOD)
    (tmp_path / "book.txt").write_text(book)
    assert all(d.endswith("\n\n") for d in documents(tmp_path / "book.txt")[:-1])
    dataset, told = make(tmp_path / "book.txt")
    assert "parts of" in told and "book.txt lie in two splits" in told
    tokenizer = dataset.tokenizer
    found = {s: tokenizer.decode(t for t in dataset.rows(s)[0] if t != tokenizer.bos_id) for s in SPLITS}
    at = {s: book.index(text) for s, text in found.items()}
    assert at["train"] < at["holdout"] < at["val"]
    bytes_ = {s: dataset.manifest["splits"][s]["bytes"] for s in SPLITS}
    assert sum(bytes_.values()) == len(book)
    assert 0.08 <= bytes_["val"] / len(book) < 0.2


def test_a_large_file_beside_small_ones(tmp_path: Path) -> None:
    """By chance nearly all of the text would fall into one split."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(12):
        (folder / f"note{i:02}.txt").write_text(GOOD[i])
    (folder / "zbook.txt").write_text("\n\n".join(GOOD))
    dataset, told = make(folder)
    assert "zbook.txt lie in two splits" in told
    assert dataset.manifest["splits"]["train"]["bytes"] > 0.8 * len("\n\n".join(GOOD))


def test_thirty_files_have_three_splits(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text("\n".join(GOOD[i * 10 : i * 10 + 10]))
    dataset, _ = make(folder)
    assert all(dataset.manifest["splits"][s]["rows"] for s in SPLITS)


# ---- nothing thrown away in silence


def test_the_share_of_the_text_in_rows_is_told_and_kept(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(GOOD))
    dataset, told = make(tmp_path / "x.jsonl")
    train = dataset.manifest["splits"]["train"]
    assert dataset.manifest["packing"] == "carry"
    assert train["share_in_rows"] > 0.99
    assert "of its tokens are in rows (carry)" in told
    assert "WARNING" not in told
    cropped, told = make(tmp_path / "x.jsonl", packing="crop", out=tmp_path / "cropped")
    share = cropped.facts().share_in_rows
    assert (
        share == cropped.manifest["splits"]["train"]["rows"] * 33 / cropped.manifest["splits"]["train"]["tokens"] < 0.5
    )
    assert f"WARNING: only {100 * share:.1f} % of the text is in rows" in told


def test_the_reference_counts_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([g.replace("a", "ä").replace("e", "字") for g in GOOD]))
    dataset, _ = make(tmp_path / "x.jsonl")
    tokenizer = dataset.tokenizer
    lone = tokenizer.ranks.index(b"\xc3")
    assert dataset.token_bytes[lone] == 1
    assert dataset.reference_bytes[lone] == 3  # U+FFFD
    for token in range(tokenizer.bos_id):  # as the reference makes its table
        assert dataset.reference_bytes[token] == len(tokenizer.decode([token]).encode())
    assert (dataset.reference_bytes[tokenizer.bos_id :] == 0).all()
