"""The chain of records: nothing changes unseen, nothing is lost to a crash or to a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.harness.errors import DiskFullError, RecordError
from hotloop.harness.records.chain import BALLAST_BYTES, Chain
from hotloop.harness.records.model import AgentsAsked, Decision, Origin, Status, Turn, TurnResult
from tests.builders import make_decision, make_outcome, make_run

TEXT = st.text(st.characters(), max_size=20)  # half surrogates too
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
TURNS = st.builds(
    Turn,
    origin=st.builds(Origin, TEXT, NUMBER, NUMBER, st.integers(0, 2**53), TEXT, st.none() | st.integers(0, 9)),
    result=st.sampled_from(TurnResult), reason=TEXT, description=TEXT, status=st.none() | st.sampled_from(Decision),
)  # fmt: skip


@given(turns=st.lists(TURNS, max_size=5))
def test_what_is_appended_is_read_back(tmp_path_factory: pytest.TempPathFactory, turns: list[Turn]) -> None:
    path = tmp_path_factory.mktemp("chain") / "records.jsonl"
    chain = Chain.open(path)
    for turn in turns:
        chain.append(turn)
    assert Chain.read(path).bodies(Turn) == turns
    assert Chain.read(path).entries == chain.entries
    assert Chain.read(path).head == chain.head


def asked(*names: object) -> AgentsAsked:
    """The least of an entry."""
    return AgentsAsked([str(name) for name in names])


@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("chain") / "records.jsonl"
    chain = Chain.open(path)
    for i in range(3):
        chain.append(asked(i, "a gain of 0.01"))
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
        chain.append(asked(i))
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
            chain.append(asked(i, reason))
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
        chain.append(asked(i))
        assert flushed[-1:] == [chain.path.read_bytes()]
    assert len(flushed) == 2


def test_a_torn_last_line_is_cut_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chain = Chain.open(path)
    chain.append(asked(0))
    whole = path.read_bytes()
    chain.append(asked(1))
    path.write_bytes(path.read_bytes()[:-7])
    again = Chain.open(path)
    assert again.cut_bytes > 0
    assert path.read_bytes() == whole
    again.append(asked(1))
    assert Chain.read(path).bodies(AgentsAsked) == [asked(0), asked(1)]


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        chain.append(make_decision(make_run(), "keep", gain=float("nan")))
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
    chain.append(asked(0))
    filler = fill(small_disk)
    chain.append(asked(1, "x" * 20000))  # in the ballast's place
    assert Chain.read(chain.path).bodies(AgentsAsked) == [asked(0), asked(1, "x" * 20000)]
    fill(small_disk)
    before = chain.path.read_bytes()
    with pytest.raises(DiskFullError, match="full; free some space"):  # without a ballast the file stays as it was
        chain.append(asked(2, "x" * 20000))
    assert chain.path.read_bytes() == before
    filler.unlink()
    again = Chain.open(chain.path)
    again.append(asked(2))
    assert len(Chain.read(chain.path).entries) == 3
    assert (small_disk / "records.jsonl.ballast").stat().st_size == BALLAST_BYTES


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain.open(tmp_path / "records.jsonl")
    chain.append(asked(0))
    before = chain.path.read_bytes()
    real = os.write

    def half(fd: int, data: bytes) -> int:
        real(fd, bytes(data)[: len(data) // 2])
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RecordError, match="Input/output error"):
        chain.append(asked(1))
    monkeypatch.undo()
    assert chain.path.read_bytes() == before


def test_what_a_decision_is_made_of_survives_the_record(tmp_path: Path) -> None:
    """One thing has one shape: the outcome and the decision hold the very run, and that its edit's origin."""
    run = make_run(3, agent="claude", seconds=61.5, cost_usd=0.25, tokens=900, why="it was low", again_of=1)
    chain = Chain.open(tmp_path / "records.jsonl")
    chain.append(make_outcome(run, 1.25, 1.5, curve=[(0.0, 7.5), (0.5, 3.25)], tokens=4096, wall_s=1.5))
    chain.append(make_decision(run, "keep", gain=0.5, noise_bpb=0.01, syntax="s", slot=1, idle_s=2.0))
    outcome, decided = (e.body for e in Chain.read(chain.path).entries)
    assert [outcome, decided] == [e.body for e in chain.entries]
    assert outcome.run == decided.run == run and decided.run.origin.tokens == 900


def test_a_run_that_failed_is_decided_as_what_it_ended_as() -> None:
    assert {str(d) for d in Decision if d.failed} == {str(s) for s in Status} - {"ok"}
