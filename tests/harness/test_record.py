"""The chain of records: nothing changes unseen, nothing is lost to a crash or to a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.errors import DiskFullError, RecordError
from hotloop.harness.records.record import BALLAST_BYTES, Chain, Outcome

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(bodies=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=5))
def test_what_is_appended_is_read_back(tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("chain") / "records.jsonl"
    chain = Chain.open(path)
    for body in bodies:
        chain.append("decision", body)
    assert Chain.read(path).bodies("decision") == bodies
    assert Chain.read(path).head == chain.head


@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("chain") / "records.jsonl"
    chain = Chain.open(path)
    for i in range(3):
        chain.append("decision", {"number": i, "reason": "a gain of 0.01"})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        found = Chain.read(path).entries
    except RecordError:
        return
    # A line end that became something else looks like a torn last line: shorter, but nothing in it is false.
    assert found == chain.entries[: len(found)]
    assert len(found) < 3


def test_dropped_and_swapped_lines_are_found(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chain = Chain.open(path)
    for i in range(4):
        chain.append("decision", {"number": i})
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (lines[1:], [lines[0], *lines[2:]], [lines[1], lines[0], *lines[2:]]):
        path.write_bytes(b"".join(bad))
        with pytest.raises(RecordError, match="line"):
            Chain.read(path)


def test_a_line_that_is_whole_but_continues_another_chain_is_found(tmp_path: Path) -> None:
    """Number and hash of it are right; only `prev` tells."""
    path, other = tmp_path / "records.jsonl", tmp_path / "other.jsonl"
    for where, reason in ((path, "as it was"), (other, "rewritten")):
        chain = Chain.open(where)
        for i in range(3):
            chain.append("decision", {"number": i, "reason": reason})
    mine, theirs = (p.read_bytes().splitlines(keepends=True) for p in (path, other))
    for i in (1, 2):
        path.write_bytes(b"".join([*mine[:i], theirs[i], *mine[i + 1 :]]))
        with pytest.raises(RecordError, match=f"line {i + 1} does not continue"):
            Chain.read(path)


def test_an_entry_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    flushed: list[bytes] = []
    real = os.fsync

    def spy(fd: int) -> None:
        real(fd)
        flushed.append(Path(f"/proc/self/fd/{fd}").read_bytes())

    monkeypatch.setattr(os, "fsync", spy)
    for i in range(2):
        chain.append("decision", {"number": i})
        assert flushed[-1:] == [chain.path.read_bytes()]
    assert len(flushed) == 2


def test_a_torn_last_line_is_cut_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chain = Chain.open(path)
    chain.append("decision", {"number": 0})
    whole = path.read_bytes()
    chain.append("decision", {"number": 1})
    path.write_bytes(path.read_bytes()[:-7])
    again = Chain.open(path)
    assert again.cut_bytes > 0
    assert path.read_bytes() == whole
    again.append("decision", {"number": 1})
    assert [b["number"] for b in Chain.read(path).bodies("decision")] == [0, 1]


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        chain.append("decision", {"gain": float("nan")})
    assert Chain.read(chain.path).entries == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(fd, b"x" * 4096)
    except OSError as e:
        assert e.errno == errno.ENOSPC
    finally:
        os.close(fd)
    return filler


def test_a_full_disk_loses_no_record(small_disk: Path) -> None:
    chain = Chain.open(small_disk / "records.jsonl")
    chain.append("decision", {"number": 0})
    filler = fill(small_disk)
    with pytest.raises(DiskFullError, match="full; free some space") as e:  # the ballast takes this one
        chain.append("experiment", {"number": 1, "log_tail": ["x" * 20000]})
    assert getattr(e.value, "written", False)
    assert [x["body"]["number"] for x in Chain.read(chain.path).entries] == [0, 1]
    fill(small_disk)
    before = chain.path.read_bytes()
    with pytest.raises(DiskFullError) as e:  # and with no ballast the file stays as it was
        chain.append("experiment", {"number": 2, "log_tail": ["x" * 20000]})
    assert not getattr(e.value, "written", False)
    assert chain.path.read_bytes() == before
    filler.unlink()
    again = Chain.open(chain.path)
    again.append("experiment", {"number": 2})
    assert len(Chain.read(chain.path).entries) == 3
    assert (small_disk / "records.jsonl.ballast").stat().st_size == BALLAST_BYTES


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    chain.append("decision", {"number": 0})
    before = chain.path.read_bytes()
    real = os.write

    def half(fd: int, data: bytes) -> int:
        real(fd, bytes(data)[: len(data) // 2])
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RecordError, match="Input/output error"):
        chain.append("decision", {"number": 1})
    monkeypatch.undo()
    assert chain.path.read_bytes() == before


def test_an_outcome_survives_the_record() -> None:
    outcome = Outcome(
        number=3, tag="t", kind="experiment", commit="c", parent="p", description="d", seed=1, preset="laptop",
        device="cpu", source_sha256="0", val_bpb=1.25, curve=[[0.0, 7.5]],
    )  # fmt: skip
    assert Outcome.from_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome
