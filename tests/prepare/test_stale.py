"""A prepared folder is made anew exactly where its text or what shaped it has changed, and what changed is said."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hotloop.harness.data.building
from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import Dataset, load_dataset
from hotloop.harness.errors import DataError


def write(path: Path, count: int, word: str = "word") -> None:
    lines = [json.dumps({"text": f"{word} {i} " * 40}) for i in range(count)]
    path.write_text("\n".join(lines))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", 200)
    write(folder / "b.jsonl", 50, "other")
    return folder


def make(texts: Path, **flags: Any) -> tuple[Dataset, list[str]]:
    told: list[str] = []
    whole = {"seq_len": 32, "vocab_size": 280, "out": texts.parent / "data", "report": told.append} | flags
    return prepare(str(texts), **whole), told


def change(texts: Path) -> Iterator[tuple[str, str]]:
    """(what was done to the files, what has to be said of it)."""
    stat = (texts / "a.jsonl").stat()
    text = (texts / "a.jsonl").read_text()
    (texts / "a.jsonl").write_text(text.replace("word 7 ", "wird 7 "))
    os.utime(texts / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time
    yield "changed", "a.jsonl is changed"
    write(texts / "c.jsonl", 3)
    yield "added", "c.jsonl is new"
    (texts / "b.jsonl").unlink()
    yield "removed", "b.jsonl is gone"
    (texts / "a.jsonl").rename(texts / "d.jsonl")
    yield "renamed", "d.jsonl is new; a.jsonl is gone"


def test_files_that_changed_are_named_and_prepared_anew(texts: Path) -> None:
    before, _ = make(texts)
    for what, words in change(texts):
        after, told = make(texts)
        assert f"is prepared anew: {words}" in told[0], what
        assert after.digest != before.digest, what
        again, told = make(texts)
        assert len(told) == 1 and "is prepared already" in told[0]
        assert again.digest == after.digest
        before = after


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"packing": "crop"}, "packing carry -> crop"),
        ({"vocab_size": 270}, "vocab_size 280 -> 270"),
        ({"seq_len": 16}, "seq_len 32 -> 16"),
        ({"max_rows": {"train": 20}}, "max_rows"),
        ({"text_field": "text2"}, "text_field text -> text2"),
    ],
)
def test_flags_that_shape_the_rows(texts: Path, flags: dict[str, Any], words: str) -> None:
    before, _ = make(texts)
    if "text_field" in flags:
        for file in texts.iterdir():
            file.write_text(re.sub(r'"text": (.*)}', r'"text": \1, "text2": \1}', file.read_text()))
        before, _ = make(texts)
    after, told = make(texts, **flags)
    assert words in told[0]
    assert len(told[0].split(";")) == 1
    assert after.digest != before.digest
    made_at_once, _ = make(texts, out=texts.parent / "at once", **flags)
    assert made_at_once.manifest == after.manifest


def test_a_folder_that_is_prepared_into_itself(texts: Path) -> None:
    """What was prepared is no text, though it holds .json files."""
    make(texts, out=texts / "data")
    _, told = make(texts, out=texts / "data")
    assert "is prepared already" in told[0]


def test_text_that_changes_while_it_is_read(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = make(texts)
    write(texts / "a.jsonl", 210)
    written = hotloop.harness.data.building._write

    def slow(*args: Any) -> None:
        written(*args)
        write(texts / "a.jsonl", 220)

    monkeypatch.setattr(hotloop.harness.data.building, "_write", slow)
    with pytest.raises(DataError, match="changed while it was read; run the same command again"):
        make(texts)
    assert load_dataset(before.path).digest == before.digest


def test_another_version_of_the_packing(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(texts)
    monkeypatch.setattr(hotloop.harness.data.building, "PACKING_VERSION", 99)
    assert "packing_version 1 -> 99" in make(texts)[1][0]


def test_a_damaged_folder_and_one_of_an_earlier_format_are_made_anew(texts: Path) -> None:
    dataset, _ = make(texts)
    with open(dataset.path / "val.bin", "r+b") as f:
        f.write(b"xx")
    again, told = make(texts)
    assert "val.bin is not what was prepared" in told[0]
    assert again.digest == dataset.digest
    again.verify()
    (dataset.path / "manifest.json").write_text(json.dumps(dataset.manifest | {"format": 1}))
    assert "has format 1" in make(texts)[1][0]


def test_what_is_not_this_text_is_left_alone(texts: Path, tmp_path: Path) -> None:
    dataset, _ = make(texts)
    other = tmp_path / "other"
    shutil.copytree(texts, other)
    with pytest.raises(DataError, match=r"holds the text of .*; give another --out"):
        make(other)
    load_dataset(dataset.path).verify()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is there and is no prepared folder; give another --out"):
        make(texts, out=mine)
    assert (mine / "thesis.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_preparation_leaves_what_was_there(
    texts: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    dataset, _ = make(texts)
    write(texts / "c.jsonl", 30)

    def stop(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":  # the last step
            raise error

    monkeypatch.setattr(hotloop.harness.data.building, "_put", stop)
    with pytest.raises((KeyboardInterrupt, DataError)):
        make(texts)
    monkeypatch.undo()
    assert load_dataset(dataset.path).digest == dataset.digest
    load_dataset(dataset.path).verify()
    assert not list(texts.parent.glob(".data.tmp-*"))


def test_a_file_system_that_cannot_exchange_folders(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(texts)
    write(texts / "c.jsonl", 30)
    monkeypatch.setattr(hotloop.harness.data.building.ctypes, "CDLL", lambda *_, **__: object())
    after, told = make(texts)
    assert "c.jsonl is new" in told[0]
    after.verify()
