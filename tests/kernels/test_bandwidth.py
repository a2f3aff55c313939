"""What the table's shapes do not reach: many tensors in one launch, tokens of many pieces, what is refused, chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import warm

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(script: str, which: str = "triton") -> str:
    script = (
        "import torch\nfrom hotloop import kernels\nfrom hotloop.kernels import operators, reference\n"
        "from hotloop.kernels.head.embedding import token_order\ntorch.manual_seed(0)\n" + script
    )
    return warm.output(script, **{"HOTLOOP_KERNELS": which, "TRITON_INTERPRET": "1"})


def test_adamw_over_tensors_of_all_sizes_and_both_types() -> None:
    """Steps and rates of their own, a size past one block, a tensor of two dimensions, an empty one."""
    run("""
shapes = [(1,), (4097,), (3, 5), (8192,), (0,), (7,)]
types = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
def make(positive=False):
    ts = [torch.randn(s).to(d) for s, d in zip(shapes, types)]
    return [t.square() for t in ts] if positive else ts
lists = [make(), make(), make(), make(True)]
hyper = torch.tensor([[0.01 * (i + 1), 0.8, 0.95, 1e-10, 1 - 0.8 ** (i + 1), 1 - 0.95 ** (i + 1)] for i in range(6)])
truth = [[t.double() for t in ts] for ts in lists]
reference.adamw_(*truth, hyper.double())
kernels.adamw_(*lists, hyper)
for ours, true in zip((lists[0], lists[2], lists[3]), (truth[0], truth[2], truth[3])):
    for o, t in zip(ours, true):
        # one rounding: half a unit in the last place, a whole one in the interpreter, which truncates
        unit = 2.0**-7 if o.dtype == torch.bfloat16 else 2.0**-21
        assert ((o.double() - t).abs() <= unit * t.abs() + 1e-6).all(), (o.dtype, o.shape)
before = [t.clone() for t in lists[0]]
kernels.adamw_(*lists, hyper * torch.tensor([0.0, 1, 1, 1, 1, 1]))  # a rate of 0 on the device stops everything
assert all(torch.equal(a, b) for a, b in zip(before, lists[0]))
""")


def test_a_frequent_token_is_summed_over_its_pieces_in_order() -> None:
    """Counts of 0, 1, one piece to the last row, one row more, and many pieces; bit for bit the same each time."""
    run("""
from hotloop.kernels.head.embedding import PIECE
counts = [0, 1, PIECE, PIECE + 1, 5 * PIECE + 3, 0]
tokens = torch.cat([torch.full((c,), v) for v, c in enumerate(counts)])[torch.randperm(sum(counts))]
for dim in (8, 300, 1030):
    w = torch.randn(len(counts), dim, requires_grad=True)
    grad = torch.randn(len(tokens), dim)
    found = []
    for _ in range(3):
        w.grad = None
        operators.embedding(tokens, w).backward(grad)
        found.append(w.grad.clone())
    want = torch.zeros(len(counts), dim, dtype=torch.float64).index_add_(0, tokens, grad.double())
    torch.testing.assert_close(found[0].double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not found[0][0].any() and not found[0][5].any()
""")


def test_tables_share_one_order() -> None:
    run("""
tokens = torch.randint(0, 9, (3, 11))
order = token_order(tokens, 9)
tables = [torch.randn(9, 4, requires_grad=True) for _ in range(3)]
sum((operators.embedding(tokens, t, order) * (i + 1)).sum() for i, t in enumerate(tables)).backward()
for i, t in enumerate(tables):
    want = torch.zeros(9, 4).index_add_(0, tokens.flatten(), torch.full((33, 4), i + 1.0))
    torch.testing.assert_close(t.grad, want)
""")


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_chunks_of_any_size_give_the_whole(rows: int) -> None:
    run(f"""
from hotloop.kernels.head import cross_entropy as m
m.CHUNK_ELEMENTS = {rows} * 19
x, w, t = torch.randn(7, 12, requires_grad=True), torch.randn(19, 12, requires_grad=True), torch.randint(0, 19, (7,))
t[2] = -1
def both(**k):
    loss = operators.loss(x, w, t, **k)
    return loss.detach(), *torch.autograd.grad(loss * 2, (x, w))
for a, b in zip(both(method="chunked"), both(method="inplace")):
    torch.testing.assert_close(a, b)
m.MAX_ELEMENTS = 7 * 19 - 1
torch.testing.assert_close(both()[1], both(method="exp")[1])  # past the limit, chunks are taken unasked
""")


def test_what_cannot_be_served_is_refused_with_what_was_given() -> None:
    run("""
def refused(words, f, *a, **k):
    try:
        f(*a, **k)
    except kernels.KernelError as e:
        assert words in str(e), e
    else:
        raise AssertionError(words)
refused("int64 tokens", operators.embedding, torch.zeros(3).int(), torch.randn(4, 4))
order = token_order(torch.zeros(3).long(), 4)
refused("not of 2 and 4", operators.embedding, torch.zeros(2).long(), torch.randn(4, 4), order)
p = [torch.randn(3)]
refused("hyper must be float32 [1, 6]", kernels.adamw_, p, p, p, p, torch.zeros(2, 6))
refused("not torch.float16", kernels.adamw_, *[[torch.randn(3).half()]] * 4, torch.zeros(1, 6))
refused("beside torch.float32 [4]", kernels.adamw_, p, [torch.randn(4)], p, p, torch.zeros(1, 6))
refused("other strides", kernels.adamw_, *[[torch.randn(3, 4).T]] * 4, torch.zeros(1, 6))
loss = operators.loss
x, w, t = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.int64)
refused("no method is called 'fast'", loss, x, w, t, method="fast")
refused("needs a softcap", loss, x, w, t, None, method="exp")
refused("at most 8.0 for torch.float16, not 15.0", loss, x.half(), w.half(), t, method="exp")
""")


MODEL = """
import sys
from types import SimpleNamespace
import train
from hotloop.harness.settings import Spec
hp = SimpleNamespace(**(vars(train.hyperparameters(Spec("h100", "cpu", 1, 61, 24)))
    | dict(DEPTH=3, ASPECT_RATIO=16, HEAD_DIM=16, WINDOW_PATTERN="SL", GATE_CHANNELS=4)))
model = train.GPT(hp, 61, 24)
model.init_weights()
with torch.no_grad():
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)
tokens, targets = torch.randint(0, 61, (2, 3, 24))
"""


def test_train_py_computes_the_same_with_every_kernel_on(tmp_path: Path) -> None:
    """Loss, gradients and three optimizer steps: all kernels of a step together, against the references."""
    script = (
        MODEL
        + """
from hotloop.kernels import compiler
def backend(graph, inputs):
    compiler.put_in(graph)
    return graph
optimizer = train.build_optimizer(model, hp, compiled=False)
loss_of = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend)
found = []
for _ in range(3):
    loss = loss_of(tokens, targets)
    loss.backward()
    found += [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    optimizer.set_schedule(1.0, 0.9, 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
torch.save(found + [p.detach() for p in model.parameters()], PATH)
"""
    )
    found = []
    for setting in ("reference", "triton"):
        path = tmp_path / setting
        code = "import torch\ntorch.manual_seed(0)\n" + script.replace("PATH", repr(str(path)))
        warm.output(code, HOTLOOP_KERNELS=setting, TRITON_INTERPRET="1")
        found.append(torch.load(path))
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # they are different programs
    for i, (want, have) in enumerate(zip(*found, strict=True)):
        assert float((have - want).norm()) <= 2e-3 * float(want.norm()) + 1e-6, i


def test_every_tile_computes_the_same_by_descriptors_and_by_pointers() -> None:
    """Products in configurations that only a GPU would choose, at sizes that no tile divides, with an odd number of
    heads, with documents of one token.
    """
    run("""
import dataclasses
from hotloop.harness.proof.accuracy import check
from hotloop.harness.proof.operators import OPERATORS
from hotloop.kernels.block import mlp, qkv as heads_of
from hotloop.kernels.head import cross_entropy
qkv = ("qkv", heads_of, "", ((16, 1, 32), (16, 2, 16), (64, 1, 64), (32, 2, 32)))
heads = dict(H=3, G=1, K=64, C=12), dict(H=4, G=4, K=16, C=8), dict(H=2, G=1, K=128, C=16)
sized = [size | h for size, h in zip((dict(B=2, T=37, D=72), dict(B=1, T=33, D=48), dict(B=2, T=1, D=16)), heads)]
tiles = ((16, 32, 32), (64, 32, 16), (32, 128, 64))
cases = [(qkv, sized), (("mlp_alone", mlp, "", tiles), (dict(B=2, T=37, D=72, N=136), dict(B=1, T=1, D=16, N=8)))]
cases.append((("loss", cross_entropy, "exp", tiles),
              (dict(M=70, D=48, V=133), dict(M=5, D=16, V=7))))  # one token alone may have a loss near 0
tried = 0
for (name, module, variant, tiles), shapes in cases:
    op = OPERATORS[name]
    for sizes in shapes:
        for rows, columns, depth in tiles:
            config = dict(ROWS=rows, DEPTH=depth, GROUP=2, num_warps=4, num_stages=1)
            config["HEADS" if module is heads_of else "COLUMNS"] = columns
            for tma, programs in ((0, 0), (1, 0), (1, 1))[: 3 if module is mlp else 2]:  # persistent too
                found = config | {"TMA": tma} | ({"PROGRAMS": programs} if module is mlp else {})
                module.launch_config = lambda *args: found
                args = op.make(sizes, torch.float32, torch.device("cpu"))
                for errors in check(op, args, op.bind(operators, variant)):
                    assert errors.fine, (sizes, config, tma, errors)
                    tried += 1
assert tried == 2 * (3 * 4 * 10 + 2 * 3 * 3) + 3 * (2 * 3 * 4), tried
op, config = OPERATORS["qkv"], heads_of.default_config(64, 128, False)
heads_of.launch_config = lambda *args: config  # and without value embeddings
plain = dataclasses.replace(op, gradients=(0, 1, 2, 3), rows=(0,))
args = [*op.make(sized[0], torch.float32, torch.device("cpu"))[:6], None, None]
assert all(errors.fine for errors in check(plain, args, op.bind(operators)))
""")


@pytest.mark.parametrize("which", ["triton", "embedding,residual,loss"])
def test_the_residual_stream_stays_bfloat16_under_autocast(which: str) -> None:
    """As on a GPU: tables in bf16, matrices in fp32, autocast. No operator may widen what it passes on."""
    script = (
        MODEL
        + """
for table in (model.wte, *model.value_embeds.values()):
    table.bfloat16()
model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
from hotloop.kernels import compiler
said, seen = [], set()
def backend(graph, inputs):
    said.append(compiler.put_in(graph))
    class Watch(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            out = super().call_function(target, args, kwargs)
            if "hotloop" in getattr(target, "__module__", ""):
                first = out[0] if isinstance(out, tuple) else out
                seen.add((target.__name__, first.dtype))
            return out
    return Watch(graph).run
def whole(tokens, targets):
    with torch.autocast("cpu", torch.bfloat16):
        return kernels.loss(model.hidden(tokens), model.lm_head.weight, targets, model.softcap)
loss = torch.compile(whole, fullgraph=True, dynamic=False, backend=backend)(tokens, targets)
seen -= {(name, dtype) for name, dtype in seen if name in ("squares", "token_order", "_put_in")}
assert {d for _, d in seen} == {torch.bfloat16} and {"embedding", "residual"} <= {n for n, _ in seen}, seen
found = said[0].partition("; put in: ")
assert found[0] == "qkv 3 of 3, mlp 3 of 3, residual 6 of 6, loss 1 of 1, embedding 3 of 3", said
loss.backward()
assert loss.dtype == torch.float32 and torch.isfinite(loss)
for name, p in model.named_parameters():
    assert p.grad is not None and p.grad.dtype == p.dtype and torch.isfinite(p.grad).all(), name
"""
    )
    run(script, which)
