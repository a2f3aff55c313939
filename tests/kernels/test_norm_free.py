"""The residual stream without normalised activations: its algebra in fp64, then what the kernels make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
EPS = 2.0**-23
M, D, N, E = 7, 12, 20, 5


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def root(x: Tensor) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_the_norms_gradient_needs_one_number_a_row_of_what_follows() -> None:
    """dx = r dpre W - r^2 <dpre, pre> / D x, whatever product reads the normalised x."""
    torch.manual_seed(0)
    for size in (1.0, 1e-4):  # the second: as large as sqrt(eps), where the norm is no norm any more
        x, w, dpre = wide(M, D), wide(N, D), torch.randn(M, N, dtype=torch.float64)
        x = (x.detach() * size).requires_grad_()
        pre = (x * root(x)) @ w.T
        wanted = torch.autograd.grad(pre, (x, w), dpre)
        with torch.no_grad():
            r = root(x)
            c = (dpre * pre).sum(-1, keepdim=True) / D
            agree(((r * dpre) @ w - r.square() * c * x, (r * dpre).T @ x), wanted)


def test_the_mlps_gradients_by_its_squared_activation_and_row_sums() -> None:
    """share = r <dpre, pre> serves the norm, and the branch's part of dlam."""
    torch.manual_seed(1)
    x, x0, lam, mu = wide(M, D), wide(M, D), wide(), wide()
    w_fc, w_proj, g = wide(N, D), wide(D, N), torch.randn(M, D, dtype=torch.float64)
    y = F.relu((x * root(x)) @ w_fc.T).square()
    mixed = lam * (x + y @ w_proj.T) + mu * x0
    wanted = torch.autograd.grad(mixed, (x, w_fc, w_proj, x0, lam, mu), g)
    with torch.no_grad():
        r = root(x)
        dpre = r * (g @ w_proj) * 2 * y.sqrt()
        share = (dpre * y.sqrt()).sum(-1, keepdim=True)
        dx = lam * (dpre @ w_fc + g - r * share / D * x)
        dlam = (g * x).sum() + (share / (2 * r)).sum()
        agree((dx, lam * (dpre.T @ x), lam * (g.T @ y), mu * g, dlam, (g * x0).sum()), wanted)


def test_the_qkv_projections_gradients_by_what_attention_took() -> None:
    """Of a head that is normalised again nothing is left but eps; of values, what they were before their embedding."""
    torch.manual_seed(2)
    x, w_q, w_v, w_gate = wide(M, D), wide(N, D), wide(N, D), wide(1, E)
    ve, h, dv = wide(M, N), torch.randn(M, N, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    n = x * root(x)
    s_q, gate = n @ w_q.T, n[:, :E] @ w_gate.T
    q, v = s_q * root(s_q), n @ w_v.T + 2 * torch.sigmoid(gate) * ve
    g = torch.randn(M, D, dtype=torch.float64)
    wanted = torch.autograd.grad((q, v, x * 1), (x, w_q, w_v, w_gate), (h, dv, g))
    with torch.no_grad():
        r, r_q, s = root(x), root(s_q), torch.sigmoid(gate)
        mean = (h * q).mean(-1, keepdim=True)
        ds_q = r_q * (h - q * mean)
        dgate = 2 * s * (1 - s) * (dv * ve).sum(-1, keepdim=True)
        of_q = EPS * r_q.square() * N * mean
        of_v = (dv * (v - 2 * s * ve)).sum(-1, keepdim=True)
        agree((of_q,), ((ds_q * s_q).sum(-1, keepdim=True),))
        c = (of_q + of_v + dgate * gate) / D
        dx = r * (ds_q @ w_q + dv @ w_v) + g - r.square() * c * x
        dx[:, :E] += r * dgate @ w_gate
        found = (dx, (r * ds_q).T @ x, (r * dv).T @ x, (r * dgate).T @ x[:, :E])
        agree(found, wanted)


def run(script: str) -> None:
    pytest.importorskip("triton")
    script = (
        "import torch\nfrom hotloop.kernels import operators, reference\n"
        "from hotloop.kernels.block.stream import squares\ntorch.manual_seed(0)\n" + script
    )
    warm.output(script, **{"HOTLOOP_KERNELS": "qkv,mlp,residual", "TRITON_INTERPRET": "1"})


STREAM = """
from types import SimpleNamespace
b, t, d, heads, k, n = 2, 19, 48, 3, 16, 88
names = ("x", "x0", "q", "k", "v", "proj", "fc", "out", "ve", "gate", "lam", "mu")
shapes = (*[(b, t, d)] * 2, *[(heads * k, d)] * 3, (d, heads * k), (n, d), (d, n), (b, t, heads, k), (heads, 12))
shapes += (), ()
angle = torch.arange(t)[:, None, None] * torch.rand(k // 2)
def stream(f, p, blocks=2):
    x = p.lam * p.x0 + p.mu * p.x
    of_x = squares(x)
    for block in range(blocks):
        embedded = (p.ve, p.gate) if block else ()
        q, key, v, x = f.qkv(x, of_x, p.q, p.k, p.v, angle.cos(), angle.sin(), *embedded)
        x, of_x = f.residual(x, (q * key + v).flatten(2), p.proj)
        x, of_x = f.mlp(x, of_x, p.fc, p.out, *((p.x0, p.lam, p.mu) if block else ()))
    return reference.rms_norm(x)
"""


def test_a_stream_of_blocks_has_the_references_values_and_gradients() -> None:
    """Squares go from producer to consumer, gradients of stream and branches meet; with gates and mixes and without."""
    run(
        STREAM
        + """
values = [torch.randn(s, dtype=torch.float64) * 0.5 for s in shapes]
def results(f, dtype, **changes):
    p = SimpleNamespace(**{n: (v * changes.get(n, 1)).to(dtype).requires_grad_() for n, v in zip(names, values)})
    out = stream(f, p)
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return [out, *torch.autograd.grad(out, list(vars(p).values()), flow)]
for changes in ({}, {"x": 1e-3, "x0": 1e-3}, {"x": 100.0}, {"lam": 0.0}, {"mu": 0.0}):
    truth = results(reference, torch.float64, **changes)
    for what, mine, true in zip(("out", *names), results(operators, torch.float32, **changes), truth):
        least = (b * t * d) ** 0.5 if true.ndim == 0 else 1.0  # a scalar's is a sum that may cancel
        error = float((mine.detach().double() - true.detach()).norm() / true.detach().norm().clamp_min(least))
        assert error < 2e-5, (changes, what, error)
"""
    )


def test_one_graph_and_no_sum_of_the_streams_gradients() -> None:
    """The gradient of x after a projection is added in the epilogue of that before it: no pass adds the two."""
    run(
        STREAM
        + """
from functorch.compile import make_boxed_func, nop
from torch._dynamo.backends.common import aot_autograd
backward = []
def keep(graph, _): backward.append(graph); return make_boxed_func(graph)
p = SimpleNamespace(**{n: torch.randn(s, requires_grad=True) for n, s in zip(names, shapes)})
whole = lambda: stream(operators, p).square().sum()
eager = torch.autograd.grad(whole(), list(vars(p).values()))
compiled = torch.compile(whole, fullgraph=True, backend=aot_autograd(fw_compiler=nop, bw_compiler=keep))
found = torch.autograd.grad(compiled(), list(vars(p).values()))
for mine, want in zip(found, eager):
    torch.testing.assert_close(mine, want)
calls = [n for g in backward for n in g.graph.nodes if n.op == "call_function"]
assert sum("stream_gradient" in str(n.target) for n in calls) == 4
made = {n for n in calls if "stream_gradient" in str(n.target)}
for n in calls:  # in order: what only picks or views one of its results
    if any(word in str(n.target) for word in ("getitem", "view")) and made & set(n.all_input_nodes):
        made.add(n)
added = [n for n in calls if "aten.add" in str(n.target) and made & set(n.all_input_nodes)]
added = [n for n in added if n.meta["val"].shape == (b, t, d)]
assert len(added) <= 2, added  # of x0, which has a gradient from the last mix and from the first
"""
    )
