"""Every operator of the table: its function against fp64, with and without the interpreter; opcheck; one compiled
graph.

The interpreter must be asked for before Triton is imported, so what needs it runs in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hotloop import kernels
from hotloop.harness.proof.accuracy import check, results, upstream
from hotloop.harness.proof.operators import OPERATORS, Operator
from hotloop.kernels import operators, reference
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1"}
# "baseline" is a size for a GPU; "long" keeps what is long about it (a vocabulary, a row) with few rows.
SMALL = ("odd", "tiny", "long")
FEW = {"M": 3, "B": 1, "T": 260}
# The interpreter runs a program for each token, and for each tile of a product.
FEW_OF = {
    "embedding": {"V": 300}, "loss": {"V": 8200}, "mlp": {"D": 128, "N": 256}, "mlp_alone": {"D": 128, "N": 256},
    "muon_": {"R": 150, "C": 70}, "qkv": {"D": 128}, "residual": {"D": 128, "N": 128},
}  # fmt: skip
CPU = torch.device("cpu")


def sizes_of(op: Operator, shape: str) -> dict[str, int]:
    sizes = op.shapes[shape]
    few = FEW | FEW_OF.get(op.name, {}) if shape == "long" else FEW_OF.get(op.name, {})
    return {k: min(v, few.get(k, v)) for k, v in sizes.items()}


def test_the_table_names_what_there_is() -> None:
    assert set(OPERATORS) == set(reference.__all__) == set(operators.__all__)
    assert {op.switch for op in OPERATORS.values()} | {"step"} == set(kernels.implementations())
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
        results(op.bind(reference), args, op, grad)
    assert counter.get_total_flops() == op.flops["both"](sizes)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_runs_here_is_right(name: str, shape: str) -> None:
    torch.manual_seed(0)
    op = OPERATORS[name]
    asks = name in ("adamw_", "attention", "embedding", "linear_fp8", "muon_")  # the others are put in where they run
    function = op.bind(operators if asks else reference)
    for errors in check(op, op.make(sizes_of(op, shape), torch.float32, CPU), function):
        assert errors.fine, errors


def test_a_wrong_kernel_is_found() -> None:
    """The check is no formality: each fault that kernels are prone to fails it."""
    torch.manual_seed(0)
    op = OPERATORS["mlp_alone"]
    args = op.make(op.shapes["odd"], torch.bfloat16, CPU)

    def unwritten(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = reference.mlp_alone(x, w, v)
        hole = torch.empty_like(y)
        mask = torch.ones_like(y, dtype=torch.bool)
        mask[-1, -1, -1] = False
        return torch.where(mask, y, hole)

    def coarse(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.mlp_alone(x.to(torch.float8_e4m3fn).to(x.dtype), w, v)

    def detached(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.mlp_alone(x, w.detach(), v) + 0 * w.sum()

    for wrong in (unwritten, coarse, detached):
        assert not all(e.fine for e in check(op, args, wrong)), wrong.__name__
    assert all(e.fine for e in check(op, args, reference.mlp_alone))


def run(script: str, kernels: str = "triton") -> str:
    return warm.output(script, **INTERPRETER | {"HOTLOOP_KERNELS": kernels})


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if op.module])
def test_the_kernel_is_right_through_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    sizes = {shape: sizes_of(OPERATORS[name], shape) for shape in SMALL}
    # bfloat16 is allowed the interpreter's truncation at every step where hardware rounds.
    run(
        f"""
import torch
from hotloop import kernels
from hotloop.kernels import operators
from hotloop.harness.proof.accuracy import check
from hotloop.harness.proof.operators import OPERATORS
torch.manual_seed(0)
op = OPERATORS[{name!r}]
assert kernels.implementations()[op.switch] == "triton: interpreter"
for shape, sizes in {sizes}.items():
    for dtype in op.dtypes:
        loose = 1e-2 if dtype == torch.bfloat16 else None
        args = op.make(sizes, dtype, torch.device("cpu"))
        for variant in ("", *op.variants):
            if variant == "exp" and dtype != torch.float32:
                continue  # an fp16 sum of exp(15) is out of its range
            for errors in check(op, args, op.bind(operators, variant), loose=loose):
                assert errors.fine, (shape, dtype, variant, errors)
""",
        OPERATORS[name].switch,
    )  # alone: with `linear` on, the others' weight gradients would be its products


def test_every_registered_operator_passes_opcheck_and_is_in_the_table() -> None:
    pytest.importorskip("triton")
    run("""
import torch
from hotloop import kernels
from hotloop.harness.proof.operators import OPERATORS
registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("hotloop::")}
assert registered == {name for op in OPERATORS.values() for name in op.torch_ops}, registered
def randn(*shape): return torch.randn(*shape, requires_grad=True)
x, w, t = randn(12, 16), randn(33, 16), torch.randint(0, 33, (12,))
from hotloop.kernels.head.embedding import token_order, token_rows
order = list(token_order(t, 33))
cos, sin, ve, gate = torch.randn(5, 8), torch.randn(5, 8), randn(2, 5, 2, 16), randn(2, 5, 2)
dq, dkv = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
lam, mu = torch.tensor(0.9, requires_grad=True), torch.tensor(0.2, requires_grad=True)
aq, ak, do = randn(2, 6, 4, 16), randn(2, 6, 2, 16), torch.randn(2, 6, 4, 16)
from hotloop.kernels.attend import _bounds
cuts = _bounds(torch.tensor([0, 2, 12]), 2, 6)
none, rows, h = (None, None, None), torch.rand(2, 12), torch.randn(12, 16)
lists = [[torch.rand(5), torch.rand(3, 3).bfloat16()] for _ in range(4)]
from hotloop.kernels.reference import E4M3, E5M2, quantize
q, s, b, z = (*quantize(x.detach(), E4M3), *quantize(torch.randn(32, 16), E4M3))
samples = {
    "loss": [(x, w, t, 15.0, "inplace"), (x, w, t, 15.0, "exp"), (x, w, t, None, "inplace")],
    "loss_chunked": [(x, w, t, 15.0, 5)],
    "loss_fp8": [
        (x, randn(32, 16), q, s, b, z, t - 1, c, how) for c, how in ((15.0, "bf16"), (None, "e5m2"))
    ],
    "scaled_product": [(q, b, s, z, torch.bfloat16), (q.float().to(E5M2), b, s, z, torch.float32)],
    "embedding": [(t, w, order)],
    "embedding_backward": [(torch.randn(12, 16), order, 33)],
    "token_rows": [(t, 33)],
    "sorted_embedding": [(t, w, *token_rows(t, 33))],
    "mlp_alone": [(x, w, randn(9, 33))],
    "mlp_alone_dpre": [(torch.randn(12, 9), torch.randn(9, 33), torch.rand(12, 33))],
    "linear": [(x, w)],
    "residual": [(randn(12, 33), randn(16, 33), x, x, lam, mu), (randn(12, 33), randn(16, 33), x, *none)],
    "mlp": [(x, rows, w, randn(16, 33), x, lam, mu), (x, rows, w, randn(16, 33), *none)],
    "mlp_dpre": [(x.detach(), torch.randn(16, 33), torch.rand(12, 33), rows)],
    "qkv": [
        (torch.randn(2, 5, 9), torch.randn(128, 9), torch.rand(1, 10), cos, sin, ve.detach(), gate.detach(), 4)
    ],
    "qkv_backward": [
        (dq, dkv, dkv, torch.rand(2, 5, 6), torch.rand(10), cos, sin, *embedded, dq, dkv, dkv)
        for embedded in ((ve.detach(), gate.detach()), (None, None))
    ],
    "stream_gradient": [
        (torch.randn(12, 33), w.detach(), h, h, h, lam.detach(), mu.detach(), rows, rows, None, None),
        (torch.randn(12, 33), w.detach(), h, h, *none, rows, rows, torch.randn(12, 2), torch.randn(2, 8)),
    ],
    "weight_gradient": [(torch.randn(12, 9), torch.randn(12, 16))],
    "adamw_": [(*lists, torch.rand(2, 6))],
    "muon_": [
        ([m[0], m[1]], [m[2], m[3]], torch.rand(2, *m.shape[1:]), second, torch.rand(4), [3.0, -3.0, 1.0] * 2, m.dtype)
        for m, second in ((torch.randn(4, 5, 3), torch.rand(2, 5, 1)), (torch.randn(4, 3, 5), torch.rand(2, 1, 5)))
    ],
    "attention": [(aq, ak, ak, 3, "triton", None, None, None), (aq, ak, ak, 9, "triton", *cuts)],
    "attention_backward": [
        (do, aq.detach(), ak.detach(), ak.detach(), do, torch.rand(2, 4, 6), w, "triton", *c)
        for w, c in ((3, (None, None, None)), (9, cuts))
    ],
}
every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
for name in sorted(registered):
    for sample in samples[name]:
        op = getattr(torch.ops.hotloop, name).default
        eight = [a for a in sample if getattr(a, "dtype", None) in (E4M3, E5M2)]
        # The schema's test cannot compare 8 bits, so there it is done here: nothing is overwritten, nothing is shared.
        torch.library.opcheck(op, sample, test_utils=every[1:] if eight else every)
        if eight:
            before = [a.view(torch.uint8).clone() for a in eight]
            made = op(*sample)
            assert all(torch.equal(a.view(torch.uint8), b) for a, b in zip(eight, before))
            given = {a.untyped_storage().data_ptr() for a in sample if isinstance(a, torch.Tensor)}
            for out in made if isinstance(made, tuple) else (made,):
                assert out.untyped_storage().data_ptr() not in given
""")


def test_a_module_of_all_operators_compiles_without_a_graph_break() -> None:
    pytest.importorskip("triton")
    run("""
import torch
from torch import nn
from hotloop import kernels
from hotloop.kernels import operators, reference
from hotloop.kernels.block.stream import squares
from hotloop.kernels.head.embedding import token_order
class All(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Parameter(torch.randn(33, 16)), nn.Parameter(torch.randn(16, 16))
        self.qkv, self.lam = nn.Parameter(torch.randn(96, 16)), nn.Parameter(torch.ones(2))
    def forward(self, tokens, targets, cos, sin):
        order = token_order(tokens, 33)
        x = x0 = reference.rms_norm(operators.embedding(tokens, self.table, order))
        ve = operators.embedding(tokens, self.up.repeat(3, 2)[:33], order).unflatten(-1, (2, 16))
        x = x + operators.mlp_alone(operators.linear(x, self.up), self.up, self.up)
        x = x + kernels.linear_fp8(x, self.up, "e5m2")
        gated = ve, self.up[:2, :9]
        q, k, v, x = operators.qkv(x, squares(x), *self.qkv.split(32), cos, sin, *gated)
        x, of_x = operators.residual(x, kernels.attention(q, k, v, 3).flatten(2), self.up.repeat(1, 2))
        x, _ = operators.mlp(x, of_x, self.up, self.up, x0, self.lam[0], self.lam[1])
        with torch.no_grad():
            lists = [self.lam.detach() + 0], [x[0, 0, :2]], [x[0, 1, :2] + 0], [x[0, 2, :2].square()]
            kernels.adamw_(*lists, torch.rand(1, 6))
            bank = [x.detach()[0] + 0, x.detach()[1] + 0]
            kernels.muon_(bank, [x[1], x[0]], x + 0, x[:, :1].square(), torch.rand(4), [(3.0, -3.0, 1.0)])
        return operators.loss(x, self.table, targets) + kernels.loss(x, self.table[:32], targets, fp8="e5m2")
torch.manual_seed(0)
model = All()
tokens = torch.randint(0, 32, (2, 9))
inputs = (tokens[:, :-1], tokens[:, 1:], *torch.randn(2, 8, 1, 8).sin())
model(*inputs).backward()
want = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs).backward()
for p, w in zip(model.parameters(), want):
    torch.testing.assert_close(p.grad, w)
torch._dynamo.reset()
assert torch._dynamo.explain(model)(*inputs).graph_break_count == 0
""")
