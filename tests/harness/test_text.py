"""What a run says of its text: who could read it, how much of it is in rows, how often it was gone through."""

from __future__ import annotations

import dataclasses
import json
import site
from pathlib import Path

import pytest
from rich.console import Console

from hotloop.agent_loop.commands.verify import checks
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.report.files import print_results
from hotloop.harness.data.building import prepare
from hotloop.harness.data.dataset import Dataset
from hotloop.harness.errors import DataError
from hotloop.harness.experiment import Event, Job, Settings, data_warnings, run_experiment
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import OPEN_TEXT, DataFacts
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.visible import readable_text
from hotloop.harness.settings import BudgetRule
from tests.builders import LAPTOP, make_decision, make_run
from tests.harness.conftest import tiny_preset, tiny_source

pytestmark = pytest.mark.usefixtures("warm_children")


PRESET = tiny_preset(seq_len=64, vocab_size=320)


def text(folder: Path) -> Path:
    from pydoc_data.topics import topics

    def rare(words: str) -> str:
        """With a character of three bytes, of which there are too many to be tokens, for every e."""
        return "".join(chr(0x4E00 + i * 7919 % 5000) if c == "e" else c for i, c in enumerate(words))

    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": rare(topics[t])}) for t in sorted(topics)))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("text")
    caps = {"train": 40, "val": 64, "holdout": 16}
    return prepare(str(text(folder)), seq_len=64, vocab_size=320, out=folder / "data", max_rows=caps)


def job(folder: Path, tokens: int) -> Job:
    return Job(make_run(0, "baseline"), tiny_source(), "t", folder, budget=BudgetRule("tokens", tokens))


def test_a_run_without_a_sandbox_says_so_in_every_view(tmp_path: Path, dataset: Dataset) -> None:
    settings = Settings(PRESET, "cpu", dataset, 1, Sandbox(0))
    events: list[Event] = []
    epoch = 40 * 64
    outcome = run_experiment(job(tmp_path / "experiments" / "0000", 5 * epoch), settings, events.append)
    assert outcome.status == "ok", outcome.log_tail
    # The data, in the record.
    assert outcome.data == DataFacts(dataset.source, "carry", 1.0, epoch)
    assert outcome.training.tokens > 4 * epoch
    words = f"times through the {epoch:,} tokens of its rows"
    assert any(words in w for w in outcome.conditions.warnings)
    said = next(i for i, e in enumerate(events) if words in e.message)
    assert all(e.loss is None for e in events[: said + 1])  # before anything was trained
    # Two scores: the reference counts more bytes for the same loss.
    assert outcome.scores is not None and outcome.scores.val_bpb_reference is not None
    val = dataset.rows("val")[:, 1:]
    ratio = dataset.reference_bytes[val].sum() / dataset.token_bytes[val].sum()
    assert ratio > 1.1
    assert outcome.val_bpb == pytest.approx(outcome.scores.val_bpb_reference * ratio, rel=1e-12)
    # Whoever could read the text is told everywhere.
    assert outcome.open_text.startswith(OPEN_TEXT)
    chain = Chain.open(tmp_path / "records.jsonl")
    chain.append(LAPTOP)
    chain.append(outcome)
    found = {name: (good, words) for name, good, words in checks(tmp_path, None, None)}
    assert found["text"] == (False, f"{outcome.open_text} (1 of 1 runs)")
    chain.append(make_decision(outcome.run, "keep"))
    night = NightFolder.reading(tmp_path)
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_results(night, console)
    assert f"WARNING: {outcome.open_text}" in console.export_text()
    console.file.close()


@pytest.mark.parametrize(
    ("source", "level", "words"),
    [("stdlib", 3, "Python's own library"), ("stdlib", 1, "Python's own library"), ("packages", 0, "level L0"),
     ("/some/where", 0, "level L0"), ("packages", 1, ""), ("climbmix", 3, ""), ("/some/where", 2, "")],
)  # fmt: skip
def test_who_can_read_which_text(source: str, level: int, words: str) -> None:
    told = readable_text(source, Sandbox(level))
    assert words in told
    assert bool(told) == bool(words)


def test_little_of_the_text_in_rows_is_a_warning(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(PRESET, "cpu", dataset, 1, Sandbox(3))
    assert data_warnings(settings) == []
    monkeypatch.setitem(dataset.manifest["splits"]["train"], "share_in_rows", 0.266)
    assert data_warnings(settings) == ["only 26.6 % of the text is in rows (carry packing)"]


def test_text_that_lies_where_train_py_reads_is_refused(tmp_path: Path) -> None:
    """Beside the packages, a place that every child needs."""
    folder = Path(site.getsitepackages()[0]) / f"hotloop-test-{tmp_path.name}"
    folder.mkdir()
    try:
        dataset = prepare(str(text(folder)), seq_len=64, vocab_size=320, out=tmp_path / "data", max_rows={"train": 9})
        settings = Settings(dataclasses.replace(PRESET), "cpu", dataset, 1, best(None, True))
        if settings.sandbox.level == 0:
            pytest.skip("no sandbox works here")
        with pytest.raises(DataError, match=r"text\.jsonl, a part of the text, lies in a folder that train\.py must"):
            run_experiment(job(tmp_path / "run", 1000), settings)
    finally:
        (folder / "text.jsonl").unlink()
        folder.rmdir()
