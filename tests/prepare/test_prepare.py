"""Preparation: the reference's packing, disjoint splits, nothing half-written, and every fault in one line."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex  # tiktoken's own dependency
from hypothesis import given, settings
from hypothesis import strategies as st

import hotloop.harness.data.dataset
import hotloop.harness.data.download
from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import SPLITS, Dataset, load_dataset
from hotloop.harness.data.packing import Packer
from hotloop.harness.data.readers import Fields
from hotloop.harness.data.sources import PathText
from hotloop.harness.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from hotloop.harness.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def words(seed: int, documents: int) -> list[str]:
    """Documents of made-up words, some with characters of several bytes."""
    rng = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "na", "té", "ru", "sö", "wa", "—", "字", " ", " ", "\n"]
    return ["".join(rng.choice(syllables, rng.integers(20, 900))) + f" {seed}-{i}" for i in range(documents)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    with open(folder / "a.jsonl", "w") as f:
        for text in words(1, 400):
            f.write(json.dumps({"text": text}) + "\n")
    (folder / "b.txt").write_text("\n".join(words(2, 3)))
    pq.write_table(pa.table({"text": words(3, 300)}), folder / "c.parquet")
    return folder


def make(source: Path | str, out: Path, **kwargs: Any) -> Dataset:
    return prepare(str(source), seq_len=32, vocab_size=320, out=out, **kwargs)


@pytest.fixture(scope="module")
def dataset(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(texts, tmp_path_factory.mktemp("out") / "data")


# ---- packing


def plain_packing(batches: list[list[list[int]]], width: int, buffer: int) -> list[list[int]]:
    """The algorithm as karpathy/autoresearch states it, by search through the whole buffer."""
    waiting: list[list[int]] = []
    queue = iter(batches)
    rows: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < width:
            while len(waiting) < buffer:
                batch = next(queue, None)
                if batch is None:
                    break
                waiting.extend(batch)
            if not waiting:
                return rows
            room = width - len(row)
            best = -1
            for i, document in enumerate(waiting):
                if len(document) <= room and (best < 0 or len(document) > len(waiting[best])):
                    best = i
            if best < 0:
                best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
            row += waiting.pop(best)[:room]
        rows.append(row)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), max_size=12),
    width=st.integers(2, 24),
    buffer=st.integers(1, 30),
)
def test_packing_is_the_plain_search(lengths: list[list[int]], width: int, buffer: int) -> None:
    count = 0
    batches: list[list[list[int]]] = []
    for batch in lengths:
        batches.append([[count := count + 1] * n for n in batch])
    arrays = iter([[np.array(d, dtype=np.uint16) for d in batch] for batch in batches])
    assert [r.tolist() for r in Packer(arrays, width, buffer).rows()] == plain_packing(batches, width, buffer)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=9), max_size=12),
    width=st.integers(2, 24),
    buffer=st.integers(1, 30),
)
def test_carry_loses_nothing_but_the_last_row(lengths: list[list[int]], width: int, buffer: int) -> None:
    """Each document is found whole: what is carried over stands in the next row, behind a BOS and before all else."""
    numbers = itertools.count(1)
    documents = [[0, *itertools.islice(numbers, n - 1)] for batch in lengths for n in batch]
    batches = iter([[np.array(d, dtype=np.uint16) for d in documents[i : i + 5]] for i in range(0, len(documents), 5)])
    packer = Packer(batches, width, buffer, packing="carry")
    rows = [r.tolist() for r in packer.rows()]
    assert all(len(r) == width and r[0] == 0 for r in rows)
    seen = [t for r in rows for t in r if t]
    assert len(set(seen)) == len(seen)
    following = {a: b for d in documents for a, b in itertools.pairwise(d[1:])}
    for row, after in itertools.pairwise(rows):
        for a, b in itertools.pairwise(row):
            assert b == 0 or a == 0 or following[a] == b
        if row[-1] in following:  # cut here
            assert after[1] == following[row[-1]]
    everything = sum(map(len, documents))
    assert packer.placed + packer.lost == everything
    # A BOS is added for each row that begins within a document, and less than a row is left at the end.
    assert packer.placed <= len(rows) * width
    assert packer.lost < width
    assert everything - width < packer.placed


def test_crop_counts_what_it_throws_away() -> None:
    documents = [np.zeros(n, dtype=np.uint16) for n in (10, 4, 30, 7)]
    packer = Packer(iter([documents]), 8)
    rows = sum(1 for _ in packer.rows())
    assert packer.placed == rows * 8
    assert packer.placed + packer.lost == 51


def test_one_long_document_is_packed_in_linear_time() -> None:
    """A book in one piece: its rest is not copied for every row."""
    document = np.arange(1_500_000, dtype=np.uint64).astype(np.uint16)
    packer = Packer(iter([[document]]), 33, packing="carry")
    began = time.process_time()
    rows = sum(1 for _ in packer.rows())
    assert packer.placed > len(document) - 33
    assert rows > 40_000
    assert time.process_time() - began < 30  # copied, it takes a thousand times as long as it does


def test_a_thousand_documents_in_the_buffer_cost_no_more_than_ten() -> None:
    rng = np.random.default_rng(0)
    documents = [np.zeros(n, dtype=np.uint16) for n in rng.integers(1, 400, 20_000)]

    def seconds(buffer: int) -> float:
        batches = iter([documents[i : i + 100] for i in range(0, len(documents), 100)])
        began = time.process_time()
        for _ in Packer(batches, 257, buffer).rows():
            pass
        return time.process_time() - began

    small, large = (min(seconds(b) for _ in range(3)) for b in (100, 10_000))
    assert large < 4 * small  # a search through the buffer takes a hundred times as long


# ---- tokenizer


def test_tokens_give_the_text_back_and_count_its_bytes(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    for text in ["naïve 字 — 1234 \n\n  x", *words(9, 5), ""]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    lone = tokenizer.ranks.index(b"\xc3")  # the first byte of é: one byte, not the three of a replacement character
    assert tokenizer.token_bytes[lone] == 1
    assert (tokenizer.token_bytes[-4:] == 0).all()


# nanochat's and autoresearch's, as published.
REFERENCE_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


@given(st.text(alphabet=" \t\r\n'aBſéİ字12½_.<|—\u3000\x85\x1c\u0301", max_size=60))
def test_the_pieces_are_the_references(text: str) -> None:
    assert regex.findall(SPLIT_PATTERN, text) == regex.findall(REFERENCE_PATTERN, text)


def test_a_lone_surrogate_and_a_special_token_are_text(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    assert tokenizer.decode(tokenizer.encode("a\ud800b")[1:]) == "a\ufffdb"
    text = f"x{SPECIAL_TOKENS[0]}y"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids[1:]) == text
    assert (ids[1:] < tokenizer.bos_id).all()


def test_training_the_tokenizer_twice_gives_the_same_one(tmp_path: Path) -> None:
    first, second = (Tokenizer.train(words(1, 200), 400).to_json() for _ in range(2))
    assert first == second
    (tmp_path / "t.json").write_bytes(first)
    assert Tokenizer.from_file(tmp_path / "t.json").to_json() == first


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("aaa")
    with pytest.raises(DataError):
        prepare(str(tmp_path / "short.txt"), seq_len=32, vocab_size=5000, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- prepared folders


def test_splits_share_no_document_and_rows_start_with_bos(dataset: Dataset, texts: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = PathText(texts, Fields()).corpus(Path(folder), lambda _: None)
        documents = {s: {text for _, text in corpus.documents(s)} for s in SPLITS}
        corpus.close()
    assert all(documents.values())
    assert not documents["train"] & documents["val"]
    assert not documents["train"] & documents["holdout"]
    assert not documents["val"] & documents["holdout"]
    for split in SPLITS:
        rows = dataset.rows(split)
        assert rows.dtype == np.uint16
        assert rows.shape[1] == 33
        assert (rows[:, 0] == dataset.tokenizer.bos_id).all()
        assert not rows.flags.writeable


def test_the_same_input_gives_the_same_files(texts: Path, dataset: Dataset, tmp_path: Path) -> None:
    assert make(texts, tmp_path / "again").manifest["sha256"] == dataset.manifest["sha256"]


def test_a_second_preparation_changes_nothing(dataset: Dataset, texts: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in dataset.path.iterdir()}
    assert make(texts, dataset.path).digest == dataset.digest
    assert {p.name: p.stat().st_mtime_ns for p in dataset.path.iterdir()} == before
    assert all(p.stat().st_mode & 0o077 == 0 for p in dataset.path.iterdir())


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_corrupt_file_is_found_and_named(texts: Path, tmp_path: Path, name: str) -> None:
    made = make(texts, tmp_path / "data")
    made.verify()
    path = made.path / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name} is not what was prepared.*prepare it again"):
        made.verify()
    path.write_bytes(raw[:-2])
    if name != "tokenizer.json":
        with pytest.raises(DataError, match="not those of"):
            load_dataset(made.path).rows(name.removesuffix(".bin"))
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(made.path).verify()


def test_verify_hashes_again_only_what_changed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = load_dataset(dataset.path)
    fresh.verify()
    monkeypatch.setattr(hotloop.harness.data.dataset.hashlib, "file_digest", None)  # would raise if it were called
    fresh.verify()
    os.utime(fresh.path / "val.bin")
    with pytest.raises(TypeError):
        fresh.verify()


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("{}", "cannot be read"), ('{"format": 99}', "cannot be read")]
)
def test_a_broken_manifest(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=words):
        load_dataset(tmp_path)


def test_another_format(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(dataset.manifest | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="hotloop prepare"):
        load_dataset(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"vocab_size": 200}, "vocab-size"), ({"vocab_size": 70000}, "vocab-size"), ({"seq_len": 1}, "seq-len"),
     ({"workers": 0}, "workers")],
)  # fmt: skip
def test_parameters_out_of_range(tmp_path: Path, kwargs: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare("stdlib", **({"seq_len": 32, "vocab_size": 320, "out": tmp_path / "x"} | kwargs))  # type: ignore[arg-type]


def test_killed_at_any_moment_it_leaves_nothing_half_written(texts: Path, tmp_path: Path) -> None:
    """Neither a first preparation nor one that would replace what is there."""
    out = tmp_path / "data"
    options = {"--source": str(texts), "--seq-len": "32", "--vocab-size": "320", "--out": str(out)}
    command = [sys.executable, str(ROOT / "prepare.py"), *(word for pair in options.items() for word in pair)]

    def kill(*flags: str) -> None:
        for delay in (0.2, 0.4, 0.5, 0.6, 0.7):
            with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
            if out.exists():
                load_dataset(out).verify()

    kill()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = load_dataset(out)
    made.verify()
    caps = {"val": 200, "holdout": 96}  # the preset's
    assert made.manifest["sha256"] == make(texts, tmp_path / "at once", max_rows=caps).manifest["sha256"]
    kill("--packing", "crop")
    assert load_dataset(out).manifest["sha256"]
    make(texts, out, packing="crop", max_rows=caps).verify()
    assert not list(tmp_path.glob(".data.tmp-*"))


def test_two_preparations_of_one_folder(texts: Path, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / ".data.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            make(texts, tmp_path / "data")


# ---- climbmix


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges, and cuts the first answer for each file short."""

    served: dict[str, int]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.served[path.name] = self.served.get(path.name, 0) + 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = len(data) // 2 if self.served[path.name] == 1 else len(data)
        self.wfile.write(data[start:cut] if start < cut else b"")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    folder = tmp_path / "served"
    folder.mkdir()
    for i, seed in ((0, 1), (1, 2), (6541, 3), (6542, 4)):
        pq.write_table(pa.table({"text": words(seed, 200)}), folder / f"shard_{i:05d}.parquet")
    served: dict[str, int] = {}
    handler = functools.partial(type("H", (Handler,), {"served": served}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", served
        httpd.shutdown()
        thread.join()


def test_climbmix_goes_on_after_a_cut_connection(
    server: tuple[str, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    monkeypatch.setattr(hotloop.harness.data.download.time, "sleep", lambda _: None)
    made = make("climbmix", tmp_path / "out" / "data", num_shards=2, base_url=url)
    assert set(served.values()) == {2}  # half, then the rest
    shards = tmp_path / "out" / "climbmix-shards"
    for i in (0, 1, 6541, 6542):
        name = f"shard_{i:05d}.parquet"
        assert (shards / name).read_bytes() == (tmp_path / "served" / name).read_bytes()
    assert made.manifest["splits"]["val"]["documents"] == 200
    make("climbmix", tmp_path / "out" / "other", num_shards=2, base_url=url)
    assert set(served.values()) == {2}  # nothing was fetched again


def test_without_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotloop.harness.data.download.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"check the network.*--source packages"):
        make("climbmix", tmp_path / "data", num_shards=1, base_url="http://127.0.0.1:9")
    assert not (tmp_path / "data").exists()


def test_the_command_line_says_one_line_and_exits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), "--source", str(tmp_path / "none"), "--out", str(tmp_path / "o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.startswith("hotloop: ")
    assert len(done.stderr.splitlines()) == 1
