"""What the table's shapes do not reach: many tensors in one launch, tokens of many pieces, what is refused, chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import warm

pytest.importorskip("triton")


def run(script: str, which: str = "triton") -> str:
    script = (
        "import torch\nfrom hotloop import kernels\nfrom hotloop.kernels import reference\ntorch.manual_seed(0)\n"
        + script
    )
    return warm.output(script, HOTLOOP_KERNELS=which, TRITON_INTERPRET="1")


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
from hotloop.kernels.token_embedding import PIECE
counts = [0, 1, PIECE, PIECE + 1, 5 * PIECE + 3, 0]
tokens = torch.cat([torch.full((c,), v) for v, c in enumerate(counts)])[torch.randperm(sum(counts))]
for dim in (8, 300, 1030):
    w = torch.randn(len(counts), dim, requires_grad=True)
    grad = torch.randn(len(tokens), dim)
    found = []
    for _ in range(3):
        w.grad = None
        kernels.embedding(tokens, w).backward(grad)
        found.append(w.grad.clone())
    want = torch.zeros(len(counts), dim, dtype=torch.float64).index_add_(0, tokens, grad.double())
    torch.testing.assert_close(found[0].double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not found[0][0].any() and not found[0][5].any()
""")


def test_tables_share_one_order() -> None:
    run("""
tokens = torch.randint(0, 9, (3, 11))
order = kernels.token_order(tokens, 9)
tables = [torch.randn(9, 4, requires_grad=True) for _ in range(3)]
sum((kernels.embedding(tokens, t, order) * (i + 1)).sum() for i, t in enumerate(tables)).backward()
for i, t in enumerate(tables):
    want = torch.zeros(9, 4).index_add_(0, tokens.flatten(), torch.full((33, 4), i + 1.0))
    torch.testing.assert_close(t.grad, want)
""")


def test_scalars_of_another_type_and_first_block_where_x_is_x0() -> None:
    run("""
x = torch.randn(5, 3, 24, dtype=torch.float32, requires_grad=True)
lam, mu = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.1))
def both(f, x, lam, mu):
    mixed, normed = f(x, None, x, lam, mu)
    return torch.autograd.grad((mixed * 2 + normed.square() * torch.arange(24)).sum(), (x, lam, mu))
ours = both(kernels.residual_rms_norm, x, lam, mu)
want = both(reference.residual_rms_norm, x.double(), lam, mu)
for o, w in zip(ours, want):
    torch.testing.assert_close(o.double(), w, rtol=1e-4, atol=1e-4)
assert ours[1].dtype == torch.float64
""")


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_chunks_of_any_size_give_the_whole(rows: int) -> None:
    run(f"""
from hotloop.kernels import linear_cross_entropy as m
m.CHUNK_ELEMENTS = {rows} * 19
x, w, t = torch.randn(7, 12, requires_grad=True), torch.randn(19, 12, requires_grad=True), torch.randint(0, 19, (7,))
t[2] = -1
def both(**k):
    loss = kernels.softcap_linear_cross_entropy(x, w, t, **k)
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
x = torch.randn(2, 5, 8)
refused("not torch.float64 [2, 5, 8]", kernels.residual_rms_norm, x.double())
refused("up to 8192 columns", kernels.residual_rms_norm, torch.randn(1, 8193))
refused("does not fit x", kernels.residual_rms_norm, x, x[:, :4])
refused("come together", kernels.residual_rms_norm, x, None, x)
qkv, cos = torch.randn(2, 5, 6, 16), torch.randn(5, 8)
refused("K one of (16, 32, 64, 128, 256)", kernels.qkv_rope_norm, torch.randn(2, 5, 6, 24), torch.randn(5, 12), cos, 2)
refused("H = 3", kernels.qkv_rope_norm, qkv, cos, cos, 3)
refused("cos and sin must be [5, 8], not [4, 8]", kernels.qkv_rope_norm, qkv, cos[:4], cos[:4], 2)
refused("come together", kernels.qkv_rope_norm, qkv, cos, cos, 2, torch.randn(2, 5, 2, 16))
refused("gate must be", kernels.qkv_rope_norm, qkv, cos, cos, 2, torch.randn(2, 5, 2, 16), torch.randn(2, 5, 3))
w = torch.randn(96, 8)
refused("needs x [B, T, D] and weight [(H + 2G) 16, D], not [2, 5, 8] and [96, 9]",
        kernels.linear_qkv_rope_norm, x, torch.randn(96, 9), cos, cos, 2)
refused("6 heads are no H + 2G with H = 3", kernels.linear_qkv_rope_norm, x, w, cos, cos, 3)
refused("not torch.float32 and torch.float16", kernels.linear_qkv_rope_norm, x, w.half(), cos, cos, 2)
refused("come together", kernels.linear_qkv_rope_norm, x, w, cos, cos, 2, torch.randn(2, 5, 2, 16))
refused("int64 tokens", kernels.embedding, torch.zeros(3).int(), torch.randn(4, 4))
order = kernels.token_order(torch.zeros(3).long(), 4)
refused("not of 2 and 4", kernels.embedding, torch.zeros(2).long(), torch.randn(4, 4), order)
refused("all alike", kernels.mlp_relu2, x, torch.randn(9, 8).half(), torch.randn(8, 9))
refused("not torch.float64", kernels.mlp_relu2, x.double(), torch.randn(9, 8).double(), torch.randn(8, 9).double())
refused("not x [2, 5, 8], w_fc [9, 7], w_proj [8, 9]", kernels.mlp_relu2, x, torch.randn(9, 7), torch.randn(8, 9))
refused("w_proj [8, 8]", kernels.mlp_relu2, x, torch.randn(9, 8), torch.randn(8, 8))
p = [torch.randn(3)]
refused("hyper must be float32 [1, 6]", kernels.adamw_, p, p, p, p, torch.zeros(2, 6))
refused("not torch.float16", kernels.adamw_, *[[torch.randn(3).half()]] * 4, torch.zeros(1, 6))
refused("beside torch.float32 [4]", kernels.adamw_, p, [torch.randn(4)], p, p, torch.zeros(1, 6))
refused("other strides", kernels.adamw_, *[[torch.randn(3, 4).T]] * 4, torch.zeros(1, 6))
loss = kernels.softcap_linear_cross_entropy
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
optimizer = train.build_optimizer(model, hp, compiled=False)
found = []
for _ in range(3):
    loss = model.loss(tokens, targets)
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
        code = "import torch\nfrom hotloop import kernels\ntorch.manual_seed(0)\n" + script.replace(
            "PATH", repr(str(path))
        )
        warm.output(code, HOTLOOP_KERNELS=setting, TRITON_INTERPRET="1")
        found.append(torch.load(path))
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # they are different programs
    for i, (want, have) in enumerate(zip(*found, strict=True)):
        assert float((have - want).norm()) <= 2e-3 * float(want.norm()) + 1e-6, i


def test_train_pys_loss_has_no_graph_break_with_every_kernel_on() -> None:
    run(
        MODEL
        + """
explained = torch._dynamo.explain(model.loss)(tokens, targets)
assert explained.graph_break_count == 0, explained
torch._dynamo.reset()
eager = model.loss(tokens, targets)
compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(tokens, targets)
torch.testing.assert_close(compiled, eager)
names = {n.target.__name__ for g in explained.graphs for n in g.graph.nodes if "hotloop" in str(n.target)}
assert {"residual_rms_norm.default", "linear_residual.default", "norm_mlp_relu2.default"} < names, names
assert len(names) == 7, names
"""
    )


def test_every_tile_computes_the_same_by_descriptors_and_by_pointers() -> None:
    """Products in configurations that only a GPU would choose, at sizes that no tile divides, with an odd number of
    heads, with documents of one token.
    """
    run("""
import dataclasses
from hotloop.harness.proof.accuracy import check
from hotloop.harness.proof.operators import OPERATORS
from hotloop.kernels import linear_cross_entropy, linear_qkv, mlp
qkv = ("linear_qkv_rope_norm", linear_qkv, "", ((16, 1, 32), (16, 2, 16), (64, 1, 64), (32, 2, 32)))
heads = dict(H=3, G=1, K=64), dict(H=4, G=4, K=16), dict(H=2, G=1, K=128)
sized = [size | h for size, h in zip((dict(B=2, T=37, D=72), dict(B=1, T=33, D=48), dict(B=2, T=1, D=16)), heads)]
tiles = ((16, 32, 32), (64, 32, 16), (32, 128, 64))
cases = [(qkv, sized), (("mlp_relu2", mlp, "", tiles), (dict(B=2, T=37, D=72, N=136), dict(B=1, T=1, D=16, N=8)))]
cases.append((("softcap_linear_cross_entropy", linear_cross_entropy, "exp", tiles),
              (dict(M=70, D=48, V=133), dict(M=5, D=16, V=7))))  # one token alone may have a loss near 0
tried = 0
for (name, module, variant, tiles), shapes in cases:
    op = OPERATORS[name]
    for sizes in shapes:
        for rows, columns, depth in tiles:
            config = dict(ROWS=rows, DEPTH=depth, GROUP=2, num_warps=4, num_stages=1)
            config["HEADS" if module is linear_qkv else "COLUMNS"] = columns
            for tma, programs in ((0, 0), (1, 0), (1, 1))[: 3 if module is mlp else 2]:  # persistent too
                found = config | {"TMA": tma} | ({"PROGRAMS": programs} if module is mlp else {})
                module.launch_config = lambda *args: found
                args = op.make(sizes, torch.float32, torch.device("cpu"))
                for errors in check(op, args, op.bind(kernels, variant)):
                    assert errors.fine, (sizes, config, tma, errors)
                    tried += 1
assert tried == 2 * (3 * 4 * 7 + 2 * 3 * 3) + 3 * (2 * 3 * 4), tried
op, config = OPERATORS["linear_qkv_rope_norm"], linear_qkv.default_config(64, 128, False)
linear_qkv.launch_config = lambda *args: config  # and without value embeddings
plain = dataclasses.replace(op, gradients=(0, 1), rows=(0,))
args = [*op.make(sized[0], torch.float32, torch.device("cpu"))[:5], None, None]
assert all(errors.fine for errors in check(plain, args, op.bind(kernels)))
""")


@pytest.mark.parametrize("which", ["triton", "embedding,residual_rms_norm,softcap_linear_cross_entropy"])
def test_the_residual_stream_stays_bfloat16_under_autocast(which: str) -> None:
    """As on a GPU: tables in bf16, matrices in fp32, autocast. No operator may widen what it passes on."""
    script = (
        MODEL
        + """
for table in (model.wte, *model.value_embeds.values()):
    table.bfloat16()
model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
seen = set()
for name in ("embedding", "residual_rms_norm", "norm_linear_qkv", "attention", "linear_residual", "norm_mlp_relu2"):
    def watched(*args, f=getattr(kernels, name), name=name, **more):
        out = f(*args, **more)
        outs = out if isinstance(out, tuple) else (out,)
        seen.update((name, o.dtype) for o in outs if isinstance(o, torch.Tensor))
        return out
    setattr(kernels, name, watched)
with torch.autocast("cpu", torch.bfloat16):
    hidden = model.hidden(tokens)
    loss = kernels.softcap_linear_cross_entropy(hidden, model.lm_head.weight, targets, model.softcap)
assert len(seen) == 6 and {d for _, d in seen} == {torch.bfloat16}, seen
loss.backward()
assert loss.dtype == torch.float32 and torch.isfinite(loss)
for name, p in model.named_parameters():
    assert p.grad is not None and p.grad.dtype == p.dtype and torch.isfinite(p.grad).all(), name
"""
    )
    run(script, which)
