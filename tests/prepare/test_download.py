"""Shards from a server that cuts connections, is busy, lies about what it has, or is not there."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hotloop.harness.data.download
from hotloop.harness.data.download import download, endpoint
from hotloop.harness.errors import DataError, UsageError


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server as Hugging Face's is: the address leads elsewhere, and the hash stands in that first answer."""

    state: dict[str, Any]

    def do_GET(self) -> None:
        self.state["asked"].append(self.path)
        if self.state["busy"]:
            self.answer(self.state["busy"].pop(), self.state["headers"])
            return
        path = Path(self.translate_path(self.path.removeprefix("/cdn")))
        if not path.exists():
            self.answer(404, {})
            return
        data = path.read_bytes()
        if not self.path.startswith("/cdn"):
            etag = {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'} if self.state["tells"] else {}
            self.answer(302, etag | {"Location": f"/cdn{self.path}"})
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        if self.state["damages"]:
            self.state["damages"] -= 1
            data = data[:-10] + bytes(b ^ 1 for b in data[-10:-4]) + data[-4:]
        self.answer(206 if start else 200, {}, data[start:])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


NAME = "shard_00000.parquet"


@pytest.fixture
def state() -> dict[str, Any]:
    return {"asked": [], "busy": [], "headers": {}, "damages": 0, "tells": True}


@pytest.fixture
def url(tmp_path: Path, state: dict[str, Any]) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    pq.write_table(pa.table({"text": [f"words {i}" for i in range(1000)]}), tmp_path / "served" / NAME)
    handler = functools.partial(type("H", (Handler,), {"state": state}), directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(hotloop.harness.data.download.time, "sleep", slept.append)
    return slept


def same(tmp_path: Path, found: dict[str, str]) -> None:
    data = (tmp_path / "served" / NAME).read_bytes()
    assert (tmp_path / "shards" / NAME).read_bytes() == data
    assert found == {NAME: hashlib.sha256(data).hexdigest()}
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == [NAME, f"{NAME}.sha256"]


def test_a_busy_server_is_waited_for_with_growing_pauses(
    tmp_path: Path, url: str, state: dict[str, Any], pauses: list[float]
) -> None:
    state["busy"] = [503, 429, 500, 429, 502, 429, 503]
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))
    assert pauses == [1, 2, 4, 8, 16, 32, 64]
    state["busy"], state["headers"] = [429] * 2, {"Retry-After": "30"}
    (tmp_path / "shards" / NAME).unlink()
    pauses.clear()
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))
    assert pauses == [30, 30]


def test_a_server_that_stays_busy_is_given_up_after_minutes(
    tmp_path: Path, url: str, state: dict[str, Any], pauses: list[float]
) -> None:
    state["busy"] = [429] * 100
    with pytest.raises(DataError, match=rf"{NAME} could not be downloaded .*HTTP 429.*--mirror"):
        download([NAME], tmp_path / "shards", 1, url)
    assert 300 < sum(pauses) <= 600


def test_a_wrong_address_is_said_at_once(tmp_path: Path, url: str, pauses: list[float]) -> None:
    with pytest.raises(DataError, match=r"HTTP 404.*is the address right\? See --mirror and HF_ENDPOINT"):
        download(["shard_00009.parquet"], tmp_path / "shards", 1, url)
    assert pauses == []


def test_what_arrives_damaged_is_fetched_again(
    tmp_path: Path, url: str, state: dict[str, Any], pauses: list[float]
) -> None:
    state["damages"] = 2
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))
    assert len(pauses) == 2


def test_what_is_damaged_on_the_disk_is_fetched_again(tmp_path: Path, url: str, state: dict[str, Any]) -> None:
    download([NAME], tmp_path / "shards", 1, url)
    asked = len(state["asked"])
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))
    assert len(state["asked"]) == asked  # what is whole is not asked for
    with open(tmp_path / "shards" / NAME, "r+b") as f:  # of the same size, and a parquet file from its ends
        f.seek(50)
        f.write(b"xx")
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))


@pytest.mark.parametrize("tells", [True, False])
def test_shards_without_a_hash_are_compared_with_the_servers(
    tmp_path: Path, url: str, state: dict[str, Any], pauses: list[float], tells: bool
) -> None:
    state["tells"] = tells
    (tmp_path / "shards").mkdir()
    data = (tmp_path / "served" / NAME).read_bytes()
    (tmp_path / "shards" / NAME).write_bytes(data)
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))
    (tmp_path / "shards" / f"{NAME}.sha256").unlink()
    (tmp_path / "shards" / NAME).write_bytes(data[:-10] + b"x" * 10)
    same(tmp_path, download([NAME], tmp_path / "shards", 1, url))


def test_the_server_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert endpoint(None) == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert endpoint(None) == "https://hub.example"
    assert endpoint("http://mirror.example/path/") == "http://mirror.example/path"
    with pytest.raises(UsageError, match="is no address such as"):
        endpoint("mirror.example")
