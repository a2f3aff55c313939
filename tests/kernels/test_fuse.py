"""What the compiler pass finds in train.py and edits of it, what it leaves alone, and that neither changes an answer.

Edits are lines of train.py, replaced. Each is run twice at a tiny size: eagerly as it is written, and after the pass,
with every kernel through Triton's interpreter; loss and every gradient must agree. No Inductor: the pass alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]

# name -> ((lines of train.py, what takes their place), ..., what is found in its two blocks)
ALL = "qkv 2 of 2, mlp 2 of 2, residual 4 of 4, loss 1 of 1, embedding 2 of 2"
MLP = "return self.proj(F.relu(self.fc(x)).square())"
ATTEND = "x = x + self.attention(norm(x), ve, cos, sin, window)"
FEED = "return x + self.mlp(norm(x))"
MIX = "x = self.resid_scalars[i] * x + self.x0_scalars[i] * x0"
VE = "v = v + 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))[..., None] * ve.view_as(v)"
QKV = """        qkv = F.linear(x, torch.cat((self.q.weight, self.k.weight, self.v.weight)))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv.chunk(3, dim=-1))  # [B, T, H, K]
"""
LOSS = "return kernels.loss(self.hidden(tokens), self.lm_head.weight, targets, self.softcap, fp8=self.head_fp8)"
NO_MLP = ALL.replace("mlp 2 of 2", "mlp 0 of 2")
NO_QKV = ALL.replace("qkv 2 of 2", "qkv 0 of 2")
SAME = {
    "as it is": (("", ""), ALL),
    "written otherwise": ((MLP, "return self.proj(torch.relu(self.fc(x)) ** 2)"), ALL),
    "multiplied by itself": ((MLP, "y = F.relu(self.fc(x))\n        return self.proj(y * y)"), ALL),
    "another order of terms": ((FEED, "return self.mlp(norm(x)) + x"), ALL),
    "three products": ((QKV, "        qkv = self.q, self.k, self.v\n"
                        "        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in qkv)\n"), ALL),
    "heads before parts": ((QKV, "        qkv = F.linear(x, torch.cat((self.q.weight, self.k.weight, self.v.weight)))\n"
                            "        q, k, v = qkv.unflatten(-1, (3 * self.heads, -1)).split(self.heads, dim=2)\n"),
                           ALL),
    "halves by slices": (("a, b = x.chunk(2, dim=-1)", "h = x.size(-1) // 2\n    a, b = x[..., :h], x[..., h:]"), ALL),
    "cross-entropy of its own": ((LOSS, "return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())"), ALL),
    "no softcap": ((LOSS, LOSS.replace("self.softcap", "None")), ALL),
    "a wider MLP": (("self.fc = nn.Linear(dim, 4 * dim", "self.fc = nn.Linear(dim, 6 * dim"),
                    ("self.proj = nn.Linear(4 * dim", "self.proj = nn.Linear(6 * dim"), ALL),
    "no value embeddings": (("gated = [i % 2 == (hp.DEPTH - 1) % 2 for", "gated = [False for"),
                            ALL.replace("embedding 2 of 2", "embedding 1 of 1")),
    "no mix": ((MIX, "pass"), ALL),
    "another schedule of mixes": ((MIX, "x = self.resid_scalars[i] * x + self.x0_scalars[0] * x0"), ALL),
}  # fmt: skip
LESS = {
    "gelu": ((MLP, "return self.proj(F.gelu(self.fc(x)))"), NO_MLP),
    "leaky relu squared": ((MLP, "return self.proj(F.leaky_relu(self.fc(x), 0.01).square())"), NO_MLP),
    "relu cubed": ((MLP, "return self.proj(F.relu(self.fc(x)) ** 3)"), NO_MLP),
    "a cast": ((MLP, "return self.proj(F.relu(self.fc(x).double()).square().float())"), NO_MLP),
    "a scale": ((MLP, "return self.proj(2 * F.relu(self.fc(x)).square())"), NO_MLP),
    "a gated MLP": ((MLP, "y = self.fc(x)\n        return self.proj(F.relu(y).square() * torch.sigmoid(y))"), NO_MLP),
    "one more user": ((MLP, "y = F.relu(self.fc(x)).square()\n        return self.proj(y) + 1e-3 * y.mean()"),
                      "qkv 2 of 2, mlp 0 of 2, residual 2 of 2, loss 1 of 1, embedding 2 of 2"),
    "a bias": (("self.fc = nn.Linear(dim, 4 * dim, bias=False)", "self.fc = nn.Linear(dim, 4 * dim)"),
               ALL.replace("mlp 2 of 2", "mlp 0 of 0")),
    "another eps": (("eps=2.0**-23", "eps=1e-5"),
                    "qkv 0 of 2, mlp 2 of 2, residual 2 of 4, loss 1 of 1, embedding 2 of 2"),
    "a centred norm": ((ATTEND, ATTEND.replace("norm(x)", "F.layer_norm(x, (x.size(-1),))")), NO_QKV),
    "half a branch": ((FEED, "return x + 0.5 * self.mlp(norm(x))"),
                      "qkv 2 of 2, mlp 2 of 2, residual 2 of 4, loss 1 of 1, embedding 2 of 2"),
    "an extra branch": ((ATTEND, "n = norm(x)\n        x = x + self.attention(n, ve, cos, sin, window) + 0.1 * n"),
                        NO_QKV),
    "written in place": ((FEED, "y = self.mlp(norm(x))\n        y += x\n        return y"),
                         "qkv 2 of 2, mlp 0 of 2, residual 0 of 2, loss 1 of 1, embedding 2 of 2"),
    "a broadcast branch": ((FEED, "n = norm(x[:1])\n        return x + self.mlp(n)"),
                           "qkv 2 of 2, mlp 2 of 2, residual 2 of 4, loss 1 of 1, embedding 2 of 2"),
    "another gate": ((VE, VE.replace("2 * torch", "3 * torch")), ALL.replace("qkv 2 of 2", "qkv 1 of 2")),
    "a norm of queries alone": (("norm(rotate(k, cos, sin))", "rotate(k, cos, sin)"), NO_QKV),
    "rotated backwards": (("b * cos - a * sin), dim", "b * cos + a * sin), dim"), NO_QKV),
    "a smoothed loss": ((LOSS, "return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), "
                         "label_smoothing=0.1)"), ALL.replace("loss 1 of 1", "loss 0 of 1")),
    "two softcaps": ((LOSS, "h = F.linear(self.hidden(tokens), self.lm_head.weight).float().flatten(0, 1)\n"
                      "            return F.cross_entropy(15.0 * torch.tanh(h / 14.0), targets.flatten())"),
                     ALL.replace("loss 1 of 1", "loss 0 of 1")),
    "a padding token": (("self.wte = nn.Embedding(vocab_size, dim)", "self.wte = nn.Embedding(vocab_size, dim, 0)"),
                        ALL.replace("embedding 2 of 2", "embedding 1 of 2")),
    "a detached branch": ((FEED, "with torch.no_grad():\n            y = F.relu(self.mlp.fc(norm(x))).square()\n"
                           "        return x + self.mlp.proj(y)"), NO_MLP),
}  # fmt: skip

SCRIPT = """
import json, sys
import torch
from hotloop.harness.settings import Spec
from hotloop.kernels import compiler
from tests import warm
source = open("train.py").read()
for name, changes in edits.items():
    torch._dynamo.reset()
    text = source
    for old, new in changes:
        assert text.count(old) >= 1, (name, old)
        text = text.replace(old, new)
    module = sys.modules["edited"] = type(sys)("edited")
    exec(compile(text, name, "exec"), module.__dict__)
    hp = module.hyperparameters(Spec("laptop", "cpu", 1, 48, 12))
    hp.DEPTH, hp.ASPECT_RATIO, hp.HEAD_DIM, hp.GATE_CHANNELS, hp.WINDOW_PATTERN = 2, 16, 16, 8, "SL"
    torch.manual_seed(3)
    model = module.GPT(hp, 48, 12)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tokens = torch.randint(0, 48, (2, 13))
    def results(loss):
        model.zero_grad()
        value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        return [value.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
    said = []
    def backend(graph, inputs):
        said.append(compiler.put_in(graph))
        return graph
    want = results(model.loss)
    found = results(torch.compile(model.loss, backend=backend, fullgraph=True, dynamic=False))
    assert len(want) == len(found) and len(said) == 1
    off = max(float((a - b).norm() / b.norm().clamp_min(1e-3)) for a, b in zip(found, want))
    assert off < 2e-5, (name, off)
    print(json.dumps([name, said[0]]))
"""


INTERPRETER = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1", "HOTLOOP_ATTENTION": "reference"}


def fused(edits: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    said = warm.output(f"edits = {edits!r}\n{SCRIPT}", **INTERPRETER)
    return dict(json.loads(line) for line in said.splitlines() if line.startswith("["))


@pytest.mark.parametrize("group", [SAME, LESS], ids=["the same", "less"])
def test_edits_lose_the_fusions_that_they_change_and_no_other(group: dict[str, tuple]) -> None:
    pytest.importorskip("triton")
    found = fused({name: [*changes] for name, (*changes, _) in group.items()})
    wanted = {name: what for name, (*_, what) in group.items()}
    assert {name: said.partition(";")[0] for name, said in found.items()} == wanted


SECOND = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
from hotloop.kernels import compiler

class Layer(nn.Module):
    def __init__(self, width, heads, groups, size):
        super().__init__()
        self.size, self.norm = size, nn.RMSNorm(width, elementwise_affine=False)
        self.wq, self.wk, self.wv = (nn.Linear(width, n * size, bias=False) for n in (heads, groups, groups))
        self.wo = nn.Linear(heads * size, width, bias=False)
        self.up, self.down = nn.Linear(width, 3 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def rotary(self, y, table):
        b, t, _ = y.shape
        y = y.view(b, t, -1, self.size)
        first, second = torch.split(y, self.size // 2, dim=-1)
        cos, sin = table
        turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
        return F.rms_norm(turned, (self.size,))

    def forward(self, x, table):
        n = self.norm(x)
        q, k = self.rotary(self.wq(n), table), self.rotary(self.wk(n), table)
        v = self.wv(n).view(k.shape)
        y = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True, enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).reshape(x.size(0), x.size(1), -1))
        return x + 0.5 * self.down(torch.square(torch.relu(self.up(self.norm(x)))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(41, 64)
        self.layers = nn.ModuleList(Layer(64, 4, 2, 16) for _ in range(3))
        angle = torch.arange(9)[:, None] * torch.rand(8)
        self.cos, self.sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def forward(self, tokens, targets):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, (self.cos, self.sin))
        return F.cross_entropy((x @ self.table.weight.T).view(-1, 41), targets.reshape(-1))

torch.manual_seed(0)
model = Model()
tokens = torch.randint(0, 41, (2, 10))
def results(loss):
    model.zero_grad()
    value = loss(tokens[:, :-1], tokens[:, 1:])
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]
def backend(graph, inputs):
    print(compiler.put_in(graph))
    return graph
want, found = results(model), results(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))
assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, want)) < 2e-5
"""


def test_what_a_larger_pattern_would_take_is_left_to_a_smaller_one_that_is_selected() -> None:
    pytest.importorskip("triton")
    for chosen, names in (("residual", "residual"), ("linear,qkv", "linear, qkv")):
        said = warm.output(SECOND, **INTERPRETER | {"HOTLOOP_KERNELS": chosen})
        assert said.startswith("qkv 3 of 3, mlp 3 of 3, residual 3 of 6, ") and said.strip().endswith(
            f"put in: {names}"
        )


def test_another_model_fuses_what_is_the_same() -> None:
    """Three blocks, grouped heads, no value embeddings, half a branch; its head is a product with the table."""
    pytest.importorskip("triton")
    said = warm.output(SECOND, **INTERPRETER)
    words = "qkv 3 of 3, mlp 3 of 3, residual 3 of 6, loss 0 of 1, embedding 1 of 1"
    assert said.partition(";")[0] == words
