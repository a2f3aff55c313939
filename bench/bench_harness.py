"""What an experiment costs besides training, on a CPU: `make bench`. CPU figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hotloop.harness.sandbox.process import SharedMemory
from hotloop.harness.scoring.audit import compare, surprise
from hotloop.harness.scoring.evaluation import bits_per_byte
from hotloop.harness.scoring.weights import check_weights
from hotloop.harness.settings import BudgetRule, Preset, Spec, preset_named
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring, RowOrder
from hotloop.harness.training.session import Session, SessionConfig

ROWS, LENGTH, VOCAB = 256, 2048, 8192  # one optimizer step of the GPU preset: 524,288 tokens

SOURCE = b"""
import torch
def build_model(spec):
    return torch.nn.Embedding(spec.vocab_size, spec.vocab_size)
def train(run):
    model = build_model(run.spec)
    def step(batch):
        return model.weight[:2, :2].float().mm(model.weight[:2, :2]).mean()
    run.warmup(step, rows=1, restore=(model,))
    for batch in run.batches(rows=1):
        run.log(step(batch))
    run.submit(model)
"""


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (4096, LENGTH + 1), dtype=np.uint16)


def test_feed_of_one_step(benchmark: BenchmarkFixture, rows: np.ndarray) -> None:
    """From the map of rows into shared memory: the parent's work for one step."""
    memory = SharedMemory(SLOTS * SLOT_BYTES)
    ring, order = Ring(memory), RowOrder(rows, 1)
    benchmark.pedantic(lambda: ring.put(0, order.take(ROWS, LENGTH)), rounds=50, warmup_rounds=3)
    benchmark.extra_info["tokens_per_s"] = round(ROWS * LENGTH / benchmark.stats.stats.median)
    memory.close()


def test_score_of_the_gpu_presets_val_rows(benchmark: BenchmarkFixture) -> None:
    """Bits per byte from 10,240 rows of losses: what the parent adds to an evaluation."""
    rng = np.random.default_rng(0)
    n = preset_named("h100").eval_rows
    nll = rng.random((n, LENGTH), dtype=np.float32)
    targets = rng.integers(0, VOCAB, (n, LENGTH), dtype=np.uint16)
    lengths = rng.integers(0, 9, VOCAB).astype(np.int32)
    assert benchmark.pedantic(bits_per_byte, (nll, targets, lengths), rounds=5, warmup_rounds=1) > 0


def test_audit_of_the_gpu_presets_cuts(benchmark: BenchmarkFixture) -> None:
    """10,240 rows of logits normalised in fp64 and compared."""
    n = preset_named("h100").eval_rows
    logits = np.random.default_rng(0).standard_normal((n, VOCAB), dtype=np.float32)
    true = np.zeros(n, dtype=np.uint16)
    wide = logits.astype(np.float64)
    nll = (np.log(np.exp(wide).sum(1)) - wide[:, 0]).astype(np.float32)
    assert benchmark.pedantic(lambda: compare(nll, surprise(logits, true), 2e-3), rounds=3)["mismatches"] == 0


def test_a_training_of_no_work(benchmark: BenchmarkFixture, tmp_path: Path, rows: np.ndarray) -> None:
    """Process start to weights of 256 MiB, checked: an experiment's fixed cost, phase by phase in `extra_info`."""
    preset: Preset = preset_named("laptop").with_limits(overtime=1e6)
    spec = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
    ledgers = []

    def run() -> int:
        rule = BudgetRule("tokens", 4 * LENGTH)
        trained = Session(SessionConfig(
            source=SOURCE, spec=spec, preset=preset, rows=rows, budget=Budget(rule), folder=tmp_path, threads=1
        )).run()  # fmt: skip
        ledgers.append(trained.ledger)
        return check_weights(trained.weights)

    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1) == VOCAB * VOCAB
    for phase in ledgers[0]:
        benchmark.extra_info[f"{phase}_s"] = round(float(np.median([ledger[phase] for ledger in ledgers[1:]])), 3)
