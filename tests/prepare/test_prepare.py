"""Preparation: the reference's packing, disjoint splits, nothing half-written, and every fault in one line."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
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

import prepare as prep
from harness.errors import DataError, UsageError
from prepare import Packer, Tokenizer, default_data_dir, load_dataset, prepare

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


def make(source: Path | str, out: Path, **kwargs: Any) -> prep.Dataset:
    return prepare(str(source), seq_len=32, vocab_size=320, out=out, **kwargs)


@pytest.fixture(scope="module")
def dataset(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> prep.Dataset:
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


def test_tokens_give_the_text_back_and_count_its_bytes(dataset: prep.Dataset) -> None:
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
    assert regex.findall(prep.SPLIT_PATTERN, text) == regex.findall(REFERENCE_PATTERN, text)


def test_a_lone_surrogate_and_a_special_token_are_text(dataset: prep.Dataset) -> None:
    tokenizer = dataset.tokenizer
    assert tokenizer.decode(tokenizer.encode("a\ud800b")[1:]) == "a\ufffdb"
    text = f"x{prep.SPECIAL_TOKENS[0]}y"
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


def test_splits_share_no_document_and_rows_start_with_bos(dataset: prep.Dataset, texts: Path) -> None:
    documents = {s: set(prep.path_source(texts).documents(s)) for s in prep.SPLITS}
    assert all(documents.values())
    assert not documents["train"] & documents["val"]
    assert not documents["train"] & documents["holdout"]
    assert not documents["val"] & documents["holdout"]
    for split in prep.SPLITS:
        rows = dataset.rows(split)
        assert rows.dtype == np.uint16
        assert rows.shape[1] == 33
        assert (rows[:, 0] == dataset.tokenizer.bos_id).all()
        assert not rows.flags.writeable


def test_the_same_input_gives_the_same_files(texts: Path, dataset: prep.Dataset, tmp_path: Path) -> None:
    assert make(texts, tmp_path / "again").manifest["sha256"] == dataset.manifest["sha256"]


def test_a_second_preparation_changes_nothing(dataset: prep.Dataset, texts: Path) -> None:
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


def test_verify_hashes_again_only_what_changed(dataset: prep.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = load_dataset(dataset.path)
    fresh.verify()
    monkeypatch.setattr(prep.hashlib, "file_digest", None)  # would raise if it were called
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


def test_another_format(dataset: prep.Dataset, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(dataset.manifest | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="hotloop prepare"):
        load_dataset(tmp_path / "nothing")


@pytest.mark.parametrize("change", [{"seq_len": 16}, {"vocab_size": 300}])
def test_a_folder_that_holds_other_data_is_not_overwritten(
    dataset: prep.Dataset, texts: Path, change: dict[str, int]
) -> None:
    with pytest.raises(DataError, match="give another --out"):
        prepare(str(texts), **({"seq_len": 32, "vocab_size": 320, "out": dataset.path} | change))
    load_dataset(dataset.path).verify()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"vocab_size": 200}, "vocab-size"), ({"vocab_size": 70000}, "vocab-size"), ({"seq_len": 1}, "seq-len"),
     ({"workers": 0}, "workers")],
)  # fmt: skip
def test_parameters_out_of_range(tmp_path: Path, kwargs: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare("stdlib", **({"seq_len": 32, "vocab_size": 320, "out": tmp_path / "x"} | kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\nnot json\n', r"x.jsonl:2 is no JSON"),
        ("x.jsonl", b'{"txt": "a"}\n', r"x.jsonl:1 is no JSON object with a field text"),
        ("x.jsonl", b'{"text": 5}\n', r"x.jsonl:1: the field text is no string"),
        ("x.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("x.parquet", b"PAR1 broken", "no parquet file"),
        ("x.csv", b"a,b", "none of .txt"),
        ("x.txt", b"", "too little text|vocabulary"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as e:
        make(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        make(tmp_path / "missing", tmp_path / "out")


def test_killed_at_any_moment_it_leaves_nothing_half_written(
    texts: Path, dataset: prep.Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    options = {"--source": str(texts), "--seq-len": "32", "--vocab-size": "320", "--out": str(out)}
    command = [sys.executable, str(ROOT / "prepare.py"), *(word for pair in options.items() for word in pair)]
    for delay in (0.25, 0.4, 0.5, 0.6, 0.7, 0.8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if out.exists():
            load_dataset(out).verify()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = load_dataset(out)
    made.verify()
    assert made.manifest["sha256"] == dataset.manifest["sha256"]
    assert not list(tmp_path.glob(".data.tmp-*"))


def test_two_preparations_of_one_folder(texts: Path, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / ".data.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            make(texts, tmp_path / "data")


def test_the_laptop_preset_gets_its_rows_from_any_standard_library() -> None:
    """Also from one without the `test` package, as some distributions ship it: counted in bytes."""
    source = prep.stdlib_source()
    sizes = {s: sum(len(t) for t in source.documents(s)) for s in prep.SPLITS}
    assert sizes["val"] > 512 * 257 * 2
    assert sizes["holdout"] > 256 * 257 * 2
    assert default_data_dir("stdlib", 256, 2048).name == f"stdlib-py3.{sys.version_info.minor}-t256-v2048"


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
    monkeypatch.setattr(prep.time, "sleep", lambda _: None)
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
    monkeypatch.setattr(prep.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"check the network.*--source stdlib"):
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
