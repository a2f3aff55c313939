"""A train.py that trains in a second, and hostile ones made from it by replacing a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hotloop.harness.records.model import DataFacts
from hotloop.harness.settings import BudgetRule, Limits, Preset
from tests.harness.fake_nvml import FakeNvml

TINY = '''
import torch
from torch import nn
import torch.nn.functional as F

class Model(nn.Module):
    """Predicts from the running mean of the embeddings so far: causal, and cheap."""
    def __init__(self, vocab):
        super().__init__()
        self.embed = nn.Embedding(vocab, 16)
        self.head = nn.Linear(16, vocab)
    def forward(self, tokens):
        x = self.embed(tokens)
        count = torch.arange(1, tokens.shape[1] + 1, device=x.device)[None, :, None]
        x = x + x.cumsum(1) / count  # MIX
        return self.head(x)  # LOGITS

def build_model(spec):
    return Model(spec.vocab_size).to(spec.device)

def train(run):
    # START
    model = build_model(run.spec)
    def step(batch, lr=1.0):
        logits = model(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        with torch.no_grad():  # torch's optimizers import its compiler, which takes a second
            for p in model.parameters():
                p -= lr * p.grad
                p.grad = None
        return loss
    run.warmup(step, rows=8, restore=(model,))
    # WARM
    for batch in run.batches(rows=8):
        loss = step(batch)  # STEP
        run.log(loss)
    # SUBMIT
    run.submit(model, depth=1, flops_per_token=6.0 * 1000)
'''

VOCAB, LENGTH = 61, 32


def tiny_source(**changes: str) -> bytes:
    """TINY with the line that ends in each marker (MIX, LOGITS, START, ...) replaced, indentation kept."""
    lines = TINY.splitlines()
    for marker, text in changes.items():
        at = next(i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {marker}"))
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at : at + 1] = [indent + new for new in text.splitlines()]
    return "\n".join(lines).encode()


def tiny_preset(**changes: object) -> Preset:
    fields: dict[str, object] = {
        "name": "laptop", "device": "cpu", "source": "stdlib", "seq_len": LENGTH, "vocab_size": VOCAB, "eval_rows": 64,
        "holdout_rows": 16, "eval_batch_rows": 16, "budget": BudgetRule("flops", 4.0e8), "calibrate_s": 0.01,
        "calibrate_steps": 2, "noise_seeds": 0, "limits": Limits(overtime=50.0, stall_s=20.0, submission_bytes=1 << 24),
    }  # fmt: skip
    return Preset(**(fields | changes))  # type: ignore[arg-type]


def tiny_rows(n: int, seed: int) -> np.ndarray:
    """Rows of a little Markov chain, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    rows = np.empty((n, LENGTH + 1), dtype=np.uint16)
    rows[:, 0] = 0
    for t in range(LENGTH):
        jump = rng.integers(1, 5, n)
        rows[:, t + 1] = (rows[:, t].astype(np.int64) * 3 + jump) % VOCAB
    return rows


def tiny_dataset(splits: dict[str, np.ndarray], path: Path = Path("/nowhere/data")) -> Any:
    """What a run needs of a `Dataset`: rows in memory, of a text that no child can read."""
    facts = DataFacts("packages", "carry", 1.0, splits["train"].size)
    ones = np.ones(VOCAB, dtype=np.int32)
    return SimpleNamespace(
        path=path, source="packages", digest="d" * 64, vocab_size=VOCAB, seq_len=LENGTH, rows=splits.__getitem__,
        token_bytes=ones, reference_bytes=ones, verify=lambda: None, facts=lambda: facts,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """A machine with one H100, or with what the test makes of it."""
    fake = FakeNvml(tmp_path, monkeypatch)
    yield fake
    fake.end()
