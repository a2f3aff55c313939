"""The whole step compiled without a GPU: what fails it, each fault planted in code that torch really compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hotloop.bench.gate import offline
from hotloop.bench.gate import step as gate_step
from hotloop.harness.errors import UsageError
from hotloop.kernels.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[2]
FINE = {"registers": 40, "stack": 0, "shared": 1024, "warps": 4}
CLEAN: dict[str, Any] = {"breaks": [], "accumulated": [], "timed": [], "kernels": {"k": [FINE]}, "launches": []}


def test_every_private_name_is_there() -> None:
    pytest.importorskip("triton")
    assert offline.missing() == []


def test_a_private_name_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(offline.PRIVATE, "torch", ("nn.Module._apply", "nn.Module._gone"))
    monkeypatch.setitem(offline.PRIVATE, "torch.gone", ("anything",))
    assert offline.missing() == ["torch.nn.Module._gone", "torch.gone.anything"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"breaks": ["print"]}, "a graph break: print"),
        ({"accumulated": ["backward: aten::index_put_"]}, "adds into one place from many, backward: aten::index_put_"),
        ({"timed": ["mm"]}, "would be decided by timing: mm"),
        ({"kernels": {"k": [FINE, FINE | {"stack": 16}]}}, "k spills: 16 bytes of stack; spills.json has no reason"),
        ({"kernels": {"known": [FINE | {"stack": 16}]}}, ""),
        ({"kernels": {"empty": [FINE | {"stack": 16}]}}, "empty spills"),
        ({"kernels": {"k": [FINE | {"shared": 101_377}]}}, "a block gets 101376"),
    ],
)
def test_what_fails_the_step(change: dict[str, Any], words: str) -> None:
    found = gate_step.faults(CLEAN | change, 101_376, {"known": "a reason", "empty": ""})
    assert len(found) == (1 if words else 0)
    assert words in "".join(found)


PLANTS = """
import json, sys
from hotloop.bench.gate import offline
offline.pretend(120)
import torch
from torch.nn import functional as F
from hotloop.bench.gate.launches import Recorder
from hotloop.kernels.optimizer.muon import _muon_product_kernel
from hotloop.kernels.head.in_place import _softcap_cross_entropy_kernel
torch._inductor.config.shape_padding = True

def breaks(x):
    y = x + 1
    print("a print is no part of a graph")
    return y * 2

seen = Recorder()
with seen, seen.at("planted"):
    x = torch.zeros(512, 512, dtype=torch.bfloat16, device="cuda")
    numbers, tokens = torch.zeros(512, device="cuda"), torch.zeros(512, dtype=torch.int64, device="cuda")
    torch.compile(breaks)(numbers)
    table = torch.zeros(64, 32, device="cuda", requires_grad=True)
    torch.compile(lambda: F.embedding(tokens, table).square().sum())().backward()
    torch.compile(torch.mm)(torch.zeros(8192, 8192, device="cuda"), torch.zeros(8192, 4093, device="cuda"))
    _softcap_cross_entropy_kernel[(512,)](
        x, tokens, numbers, numbers, 512, 512, 15.0, CAPPED=True, BLOCK=32768, ONE_BLOCK=True, num_warps=4
    )
    _muon_product_kernel[(1, 1)](
        x, numbers, x, 0.0, 1.0, 512, 512, POLY=False, TALL=False, CHUNKS=64, TILE=128, DEPTH=128, num_warps=8,
        num_stages=4,
    )
json.dump(seen.facts(), open(sys.argv[1], "w"))
"""


def test_each_planted_fault_is_seen(tmp_path: Path) -> None:
    """A graph break, an accumulating index_put_, a timing, a spill, and shared memory that an RTX 5090 has not."""
    pytest.importorskip("triton")
    out, env = tmp_path / "facts.json", offline.environment("triton", tmp_path)
    command = [sys.executable, "-c", PLANTS, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.exists(), done.stderr[-3000:]
    facts = json.loads(out.read_text())
    wrong = gate_step.faults(facts, ARCHITECTURES[120].shared, {})
    for words in (
        "a graph break: ", "index_put_(accumulate=True)", "decided by timing: aten.mm of [8192, 8192]",
        "_softcap_cross_entropy_kernel CAPPED=True BLOCK=32768 ONE_BLOCK=True spills",
        "bytes of shared memory; a block gets 101376",
    ):  # fmt: skip
        assert [line for line in wrong if words in line], (words, wrong)
    names = {name for _, name, _, _, _ in facts["launches"]}
    assert any(name.startswith("triton_") for name in names) and any(name.startswith("aten::mm ") for name in names)


def test_the_whole_step_compiles_as_committed(capfd: pytest.CaptureFixture[str]) -> None:
    """train.py at its full depth for an H100, with kernels of ours and without."""
    pytest.importorskip("triton")
    assert gate_step.main() == 0, capfd.readouterr()


def test_the_page_says_what_is_committed() -> None:
    committed = gate_step.read(gate_step.COMMITTED)
    pages = [gate_step.page(committed, versions) for versions in committed]
    text = gate_step.DOCS.read_text()
    assert any(gate_step.in_docs(text, made) == text for made in pages), "run: make gate-step-write"
    with pytest.raises(UsageError, match="to write between"):
        gate_step.in_docs("another page", pages[0])


def test_bytes_and_launches_are_of_the_step_and_by_group() -> None:
    launches = [
        ["forward", "aten::mm 8x4 4x8", "", 100, 2], ["forward", "aten::mm 8x4 4x8192", "", 50, 1],
        ["backward", "hotloop::attention_backward 2x4", "", 30, 1],
        ["backward", "_attention_dq_kernel K=64", "hotloop::attention_backward", 0, 3],
        ["forward", "triton_per_fused_embedding_0", "", 20, 1], ["adamw", "aten::mul 8", "", 10, 4],
        ["evaluation", "aten::mm 8x4 4x8", "", 1000, 1],
    ]  # fmt: skip
    found = gate_step.summary(CLEAN | {"launches": launches, "tokens": 8})
    assert found["groups"] == {
        "attention": [3, 30], "fused elementwise": [1, 20], "loss": [1, 50], "matrix products": [2, 200],
        "optimizer": [4, 40],
    }  # fmt: skip
    assert found["stages"]["evaluation"] == [1, 1000]
    assert found["most"][0] == [
        "forward",
        "aten::mm 8x4 4x8",
        2,
        100,
        "",
    ]
