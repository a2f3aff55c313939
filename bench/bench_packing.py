"""Text to packed rows on one core: `make bench`. CPU figures.

`extra_info` has the rate in 10^6 bytes of text a second: `mb_per_s` at the median of the rounds, `mb_per_s_best` at the
fastest, which on a shared machine is the one nearest to the code's own cost. With REFERENCE=FILE, that is
karpathy/autoresearch's prepare.py, its loader is timed on the same documents in turn with ours, at 10 and 100 MB, each
in a process of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hotloop.harness.data.building import BATCH_DOCUMENTS
from hotloop.harness.data.packing import BUFFER_DOCUMENTS, Packer
from hotloop.harness.data.readers import cut
from hotloop.harness.data.sources import CodeText
from hotloop.harness.data.tokenizer import Row, Tokenizer


def code() -> Iterator[str]:
    """The definitions in the built-in text."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = CodeText("packages").corpus(Path(folder), lambda _: None)
        yield from (text for _, text in corpus.documents("train"))
        corpus.close()


TEXTS = {
    "code": list(itertools.islice(code(), 6000)),
    "prose": [t for t in topics.values() if t.strip()],  # Python's language reference, in English
}


@pytest.fixture(scope="module", params=[2048, 8192])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(itertools.chain.from_iterable(TEXTS.values()), request.param)


def batches(tokenizer: Tokenizer, documents: list[str]) -> Iterator[list[Row]]:
    for i in range(0, len(documents), BATCH_DOCUMENTS):
        yield [tokenizer.encode(t) for t in documents[i : i + BATCH_DOCUMENTS]]


def note_rate(benchmark: BenchmarkFixture, documents: list[str]) -> None:
    megabytes = sum(len(t.encode()) for t in documents) / 1e6
    benchmark.extra_info["mb_per_s"] = round(megabytes / benchmark.stats.stats.median, 1)
    benchmark.extra_info["mb_per_s_best"] = round(megabytes / benchmark.stats.stats.min, 1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seq_len", [256, 2048])
def test_tokenise_and_pack(benchmark: BenchmarkFixture, tokenizer: Tokenizer, text: str, seq_len: int) -> None:
    def run() -> int:
        return sum(1 for _ in Packer(batches(tokenizer, TEXTS[text]), seq_len + 1).rows())

    assert benchmark.pedantic(run, rounds=7, warmup_rounds=1) > 10
    note_rate(benchmark, TEXTS[text])


@pytest.mark.parametrize("buffer", [BUFFER_DOCUMENTS, 4 * BUFFER_DOCUMENTS])
def test_pack_alone(benchmark: BenchmarkFixture, tokenizer: Tokenizer, buffer: int) -> None:
    """A larger buffer costs no more a document."""
    tokens = list(batches(tokenizer, TEXTS["code"]))

    def run() -> int:
        return sum(1 for _ in Packer(iter(tokens), 2049, buffer).rows())

    assert benchmark.pedantic(run, rounds=7, warmup_rounds=1) > 10
    note_rate(benchmark, TEXTS["code"])


# ---- beside the reference's loader


def documents(megabytes: int) -> Iterator[str]:
    """The built-in text in documents of at most 4,000 characters, over and over."""
    size = 0
    texts = list(code())
    for text in itertools.cycle(texts):
        for part in cut(text, 4000):
            size += len(part.encode())
            yield part
        if size > megabytes * 1e6:
            return


@pytest.mark.skipif("REFERENCE" not in os.environ, reason="REFERENCE names karpathy/autoresearch's prepare.py")
@pytest.mark.parametrize("megabytes", [10, 100])
def test_beside_the_references_loader(benchmark: BenchmarkFixture, tmp_path: Path, megabytes: int) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Tokenizer.train(documents(10), 8192).to_json())
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, documents(megabytes))))
    found: dict[str, list[str]] = {"reference": [], "crop": [], "carry": []}

    def run() -> None:
        for who, lines in found.items():
            command = [sys.executable, __file__, who, str(tmp_path)]
            env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            lines.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip())

    benchmark.pedantic(run, rounds=3)
    for who, lines in found.items():
        benchmark.extra_info[f"{who} (rows, MB/s, MB at the peak)"] = "; ".join(lines)


def main(who: str, folder: Path) -> None:
    """One way over one text on one core; prints rows, MB of text a processor second, MB of memory at the peak."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    path = folder / "text.jsonl"
    with open(path) as lines:
        size = sum(len(json.loads(line).encode()) for line in lines)

    def groups_of_texts() -> Iterator[list[str]]:
        with open(path) as lines:
            while group := [json.loads(line) for line in itertools.islice(lines, BATCH_DOCUMENTS)]:
                yield group

    groups = groups_of_texts()
    rows = 0
    if who == "reference":
        source = Path(os.environ["REFERENCE"]).read_text()
        for not_here in (", pin_memory=True", ', device="cuda"', "import requests\n"):
            source = source.replace(not_here, "")
        names: dict[str, Any] = {"__name__": "reference"}
        exec(compile(source, "reference", "exec"), names)
        names["_document_batches"] = lambda *_: ((group, 1) for group in groups)
        its = names["Tokenizer"].__new__(names["Tokenizer"])
        its.enc, its.bos_token_id = tokenizer._encoding, tokenizer.bos_id
        began = time.process_time()
        with contextlib.suppress(RuntimeError):  # it knows no end of the text
            for _ in names["make_dataloader"](its, 1, 2048, "train"):
                rows += 1
    else:
        began = time.process_time()
        tokens = ([tokenizer.encode(text) for text in group] for group in groups)
        for row in Packer(tokens, 2049, packing=who).rows():
            row.tobytes()
            rows += 1
    seconds = time.process_time() - began
    print(rows, round(size / 1e6 / seconds, 1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
