"""A chain that was cut, or put back, is found by what stands outside its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotloop.harness.errors import RecordError
from hotloop.harness.records import heads
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import AgentsAsked


def written(path: Path, numbers: range) -> Chain:
    chain = Chain.open(path)
    for i in numbers:
        chain.append(AgentsAsked([str(i)]))
    return chain


def test_a_tail_that_was_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    written(path, range(4))
    assert not Chain.read(path).shortened()
    assert heads.remembered(path) == (4, Chain.read(path).head)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    assert "it has 3" in Chain.read(path).shortened()  # as a chain it is whole
    with pytest.raises(RecordError, match="cut or put back"):
        Chain.open(path)
    path.write_bytes(b"".join(lines))
    written(path, range(4, 6))


def test_an_older_copy_that_went_on_otherwise_is_found(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    written(path, range(2))
    older = path.read_bytes()
    written(path, range(2, 4))
    path.write_bytes(older)
    heads.place(path).unlink()
    forged = written(path, range(10, 12)).path.read_bytes()  # as long as it was
    path.unlink()
    heads.place(path).unlink()
    path.write_bytes(older)
    written(path, range(2, 4))
    path.write_bytes(forged)
    assert Chain.read(path).shortened()


def test_a_copy_elsewhere_and_a_new_start_are_no_fault(tmp_path: Path) -> None:
    path, copy = tmp_path / "records.jsonl", tmp_path / "copy.jsonl"
    written(path, range(3))
    copy.write_bytes(path.read_bytes()[:200])
    assert not Chain.read(copy).shortened()
    path.unlink()
    assert len(written(path, range(1)).entries) == 1
    assert not Chain.read(path).shortened()


def test_a_state_that_cannot_be_written_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_STATE", "/dev/null/no")
    chain = written(tmp_path / "records.jsonl", range(2))
    assert len(Chain.read(chain.path).entries) == 2
    assert not chain.shortened()
