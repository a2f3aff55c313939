"""Every operator of the table: its function against fp64, with and without the interpreter; opcheck; one compiled
graph.

The interpreter must be asked for before Triton is imported, so what needs it runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from bench.accuracy import check, results, upstream
from bench.operators import OPERATORS, Operator
from kernels import reference

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1"}
# "baseline" is a size for a GPU; "long" keeps what is long about it (a vocabulary, a row) with few rows.
SMALL = ("odd", "tiny", "long")
FEW = {"M": 3, "B": 1, "T": 1100}
CPU = torch.device("cpu")


def sizes_of(op: Operator, shape: str) -> dict[str, int]:
    sizes = op.shapes[shape]
    return {k: min(v, FEW.get(k, v)) for k, v in sizes.items()} if shape == "long" else sizes


def test_the_table_names_what_kernels_exports() -> None:
    assert set(OPERATORS) == set(reference.__all__) == set(kernels.implementations())
    for op in OPERATORS.values():
        assert {"baseline", "odd", "long", "tiny"} <= set(op.shapes)
        for sizes in op.shapes.values():
            assert all(op.bytes[p](sizes) > 0 for p in op.passes)
            assert op.bytes["both"](sizes) == op.bytes["forward"](sizes) + op.bytes["backward"](sizes)


@pytest.mark.parametrize("name", OPERATORS)
def test_flops_are_what_pytorch_counts(name: str) -> None:
    """The formulas of the table against torch's counter, on the references."""
    from torch.utils.flop_counter import FlopCounterMode

    op = OPERATORS[name]
    sizes = op.shapes["odd"] | ({"W": 10**6} if name == "attention" else {})
    args = op.make(sizes, torch.float32, CPU)
    if name == "attention":  # its mask halves what the counter would take
        full = 4 * sizes["B"] * sizes["H"] * sizes["K"] * sizes["T"] ** 2
        assert op.flops["forward"](sizes) == pytest.approx(full * (sizes["T"] + 1) / (2 * sizes["T"]))
        return
    grad = upstream(op, args)
    with FlopCounterMode(display=False) as counter:
        results(getattr(reference, name), args, op, grad)
    assert counter.get_total_flops() == op.flops["both"](sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_runs_here_is_right(name: str, shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op = OPERATORS[name]
    for errors in check(op, op.make(sizes_of(op, shape), dtype, CPU)):
        assert errors.fine, errors


def test_a_wrong_kernel_is_found() -> None:
    """The check is no formality: each fault that kernels are prone to fails it."""
    torch.manual_seed(0)
    op = OPERATORS["linear_relu2"]
    args = op.make(op.shapes["odd"], torch.bfloat16, CPU)

    def unwritten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = reference.linear_relu2(x, w)
        hole = torch.empty_like(y)
        mask = torch.ones_like(y, dtype=torch.bool)
        mask[-1, -1, -1] = False
        return torch.where(mask, y, hole)

    def coarse(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reference.linear_relu2(x.to(torch.float8_e4m3fn).to(x.dtype), w)

    def detached(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reference.linear_relu2(x, w.detach()) + 0 * w.sum()

    for wrong in (unwritten, coarse, detached):
        assert not all(e.fine for e in check(op, args, wrong)), wrong.__name__
    assert all(e.fine for e in check(op, args, reference.linear_relu2))


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | INTERPRETER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if op.module])
def test_the_kernel_is_right_through_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    # bfloat16 is allowed the interpreter's truncation, which doubles the error of rounding.
    run(f"""
import torch, kernels
from bench.accuracy import check
from bench.operators import OPERATORS
torch.manual_seed(0)
op = OPERATORS[{name!r}]
assert kernels.implementations()[op.name] == "triton: interpreter"
for shape in {SMALL}:
    for dtype in op.dtypes:
        loose = 6e-3 if dtype == torch.bfloat16 else None
        sizes = op.shapes[shape]
        if shape == "long":
            sizes = {{k: min(v, {FEW}.get(k, v)) for k, v in sizes.items()}}
        for errors in check(op, op.make(sizes, dtype, torch.device("cpu")), loose=loose):
            assert errors.fine, (shape, dtype, errors)
""")


def test_every_registered_operator_passes_opcheck_and_is_in_the_table() -> None:
    pytest.importorskip("triton")
    run("""
import torch, kernels
from bench.operators import OPERATORS
registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("hotloop::")}
assert registered == {name for op in OPERATORS.values() for name in op.torch_ops}, registered
x, w = torch.randn(12, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
t = torch.randint(0, 33, (12,))
samples = {
    "softcap_linear_cross_entropy": (x, w, t, 15.0),
    "softcap_cross_entropy_": (torch.randn(12, 33), t, 15.0, torch.ones(1)),
}
for name in sorted(registered):
    torch.library.opcheck(getattr(torch.ops.hotloop, name).default, samples[name])
""")


def test_a_module_of_all_operators_compiles_without_a_graph_break() -> None:
    pytest.importorskip("triton")
    run("""
import torch, kernels
from torch import nn
class All(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Parameter(torch.randn(33, 16)), nn.Parameter(torch.randn(16, 16))
    def forward(self, tokens, targets, cos, sin):
        x = kernels.rms_norm(kernels.embedding(tokens, self.table))
        q = kernels.apply_rope_norm(x.unflatten(-1, (2, 8)), cos, sin)
        x = x + kernels.attention(q, q, q, 3).flatten(2)
        x = kernels.linear_relu2(x, self.up)
        with torch.no_grad():
            kernels.softcap_cross_entropy_((x.detach() @ self.table.T).flatten(0, 1), targets.flatten())
        return kernels.softcap_linear_cross_entropy(x, self.table, targets)
torch.manual_seed(0)
model = All()
tokens = torch.randint(0, 33, (2, 9))
inputs = (tokens[:, :-1], tokens[:, 1:], torch.randn(8, 4).cos(), torch.randn(8, 4).sin())
model(*inputs).backward()
want = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs).backward()
for p, w in zip(model.parameters(), want):
    torch.testing.assert_close(p.grad, w)
torch._dynamo.reset()
assert torch._dynamo.explain(model)(*inputs).graph_break_count == 0
""")
