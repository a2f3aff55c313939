"""Text to packed rows on one core: `make bench`. CPU figures.

`extra_info` has the rate in 10^6 bytes of text a second: `mb_per_s` at the median of the rounds, `mb_per_s_best` at the
fastest, which on a shared machine is the one nearest to the code's own cost.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hotloop.harness.data.building import BATCH_DOCUMENTS
from hotloop.harness.data.packing import BUFFER_DOCUMENTS, Packer
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
