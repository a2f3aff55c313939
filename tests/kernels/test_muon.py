"""Muon: train.py's arithmetic is what it was, the kernel's algebra in fp64, the kernels through the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from hotloop.kernels import reference
from tests import warm

POLYNOMIALS = train.POLAR_EXPRESS


def run(script: str) -> None:
    pytest.importorskip("triton")
    script = (
        "import torch\nfrom hotloop import kernels\nfrom hotloop.kernels import reference\n"
        "from hotloop.kernels.optimizer import muon\ntorch.manual_seed(0)\n" + script
    )
    warm.output(script, HOTLOOP_KERNELS="triton", TRITON_INTERPRET="1")


# ---- what train.py computed before the operator was one


def old_update(
    p: Tensor, grad: Tensor, buffer: Tensor, second: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor, beta2: float
) -> Tensor:
    """train.py's own function, as it stood there."""
    buffer.lerp_(grad, 1 - momentum)
    x = torch.lerp(grad, buffer, momentum)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLYNOMIALS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    g = x
    side = -1 if p.size(-2) >= p.size(-1) else -2
    mean = g.float().square().mean(dim=side, keepdim=True)
    norm = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
    second.lerp_(mean.to(second.dtype), 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    scaled_norm = (mean * scale.float().square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    g = g * (scale * (norm / scaled_norm.clamp_min(1e-10))).to(g.dtype)
    return p - lr * g - lr * decay * p * (g * p >= 0)


@pytest.mark.parametrize(("n", "rows", "cols"), [(16, 128, 128), (4, 512, 128), (4, 128, 512), (2, 4, 32), (1, 1, 8)])
def test_train_py_computes_what_it_did_to_the_bit(n: int, rows: int, cols: int) -> None:
    """The laptop preset's shapes, five steps of a schedule."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(rows, cols)) for _ in range(n)]
    groups = [dict(kind="muon", params=params, base_lr=0.04, beta2=0.95)]
    optimizer = train.MuonAdamW(groups, compiled=False)
    old = torch.stack([p.detach() for p in params])
    buffer, second = torch.zeros_like(old), torch.zeros(n, *((rows, 1) if rows >= cols else (1, cols)))
    for step in range(5):
        scale, momentum, decay = 1.0 - 0.13 * step, 0.85 + 0.017 * step, 0.2 - 0.03 * step
        grads = torch.randn(n, rows, cols) * 0.01
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.set_schedule(scale, momentum, decay)
        optimizer.step()
        lr = torch.tensor(0.04 * scale) * max(1.0, rows / cols) ** 0.5
        old = old_update(old, grads, buffer, second, lr, torch.tensor(decay), torch.tensor(momentum), 0.95)
        assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True)), step
    state = optimizer.state[params[0]]
    assert torch.equal(state["buffer"], buffer) and torch.equal(state["second"], second)


def test_the_reference_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="aot_eager", **k))
    reference._compiled_muon_update.cache_clear()
    torch.manual_seed(0)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params, grads = ([torch.randn(6, 4) for _ in range(2)] for _ in range(2))
        for lr in (0.1, 0.2):  # another rate is no other program
            hyper = torch.tensor([lr, 0.1, 0.9, 0.05])
            reference.muon_(
                params, grads, torch.zeros(2, 6, 4), torch.ones(2, 6, 1), hyper, POLYNOMIALS, compiled=compiled
            )
        found.append(params)
    reference._compiled_muon_update.cache_clear()
    for eager, made in zip(*found, strict=True):
        torch.testing.assert_close(made, eager)


# ---- the kernel's algebra, in fp64


@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (11, 4), (4, 11), (1, 5)])
def test_a_scale_in_gram_alone_is_normalisation(rows: int, cols: int) -> None:
    """y is not divided by its norm; x = s y at the end, and every gram and poly is symmetric."""
    torch.manual_seed(0)
    y = torch.randn(3, rows, cols, dtype=torch.float64) * 1e-3
    want = reference.orthogonalize(y, POLYNOMIALS)
    s = 1 / (1.02 * y.square().sum((1, 2), keepdim=True).sqrt() + 1e-6)
    for a, b, c in POLYNOMIALS:
        gram = s**2 * (y.mT @ y if rows > cols else y @ y.mT)
        poly = b * gram + c * gram @ gram.mT
        assert torch.allclose(poly, poly.mT, rtol=0, atol=1e-14)
        y = torch.baddbmm(y, *((y, poly) if rows > cols else (poly, y)), beta=a)
    torch.testing.assert_close(s * y, want, rtol=1e-11, atol=1e-12)


def test_the_triangles_tiles_are_each_found_once() -> None:
    """The kernel's root in fp32, as far as 4,000 rows of tiles: a side of 256,000."""
    tiles = 4000
    tile = np.arange(tiles * (tiles + 1) // 2, dtype=np.int32)
    r = ((np.sqrt(np.float32(8) * tile.astype(np.float32) + np.float32(1)) - np.float32(1)) * 0.5).astype(np.int32)
    r = np.where(r * (r + 1) // 2 > tile, r - 1, r)
    r = np.where((r + 1) * (r + 2) // 2 <= tile, r + 1, r)
    row, column = np.tril_indices(tiles)
    assert (r == row).all() and (tile - r * (r + 1) // 2 == column).all()


# ---- the kernels, through the interpreter


def test_symmetric_products_at_awkward_sizes_in_poisoned_memory() -> None:
    """fp32 and fp16, one tile to several, both tile sizes, all variants; the mirror has the tile's bits."""
    run("""
from hotloop.harness.proof.accuracy import poisoned_memory
from hotloop.kernels import tuning
cases = [(1, 1, 1), (2, 5, 3), (1, 64, 65), (2, 65, 64), (1, 130, 40), (1, 257, 20)]
for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 5e-4)):
    for tile in (64, 128):
        config = {"TILE": tile, "DEPTH": 32, "num_warps": 4, "num_stages": 3}
        for n, side, depth in cases:
            x = torch.randn(n, side, depth).to(dtype)
            partial = torch.rand(n, muon.CHUNKS)
            s = 1 / (1.02 * partial.double().sum(1).sqrt() + 1e-6)
            gram = s[:, None, None] ** 2 * (x.double() @ x.double().mT)
            with poisoned_memory(), tuning.trial("muon_product", config):
                mine = muon.product(x, partial)
                tall = muon.product(x.mT.contiguous(), partial, tall=True)
                poly = muon.product(mine, None, b=-2.5, c=0.5)
            wide = mine.double()
            for a, b in ((mine, gram), (tall, gram), (poly, -2.5 * wide + 0.5 * wide @ wide)):
                assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < limit, (dtype, tile, side)
                lower = torch.tril(torch.ones(side, side), -tile).bool()  # off the diagonal's tiles
                assert torch.equal(a[:, lower], a.mT[:, lower])
""")


def test_matrices_at_any_address_with_gradients_of_any_strides_repeat_to_the_bit() -> None:
    """Views into one bank whose addresses are no multiple of 16, three steps, against fp64; then the same again."""
    run("""
poly = [(3.4445, -4.775, 2.0315)] * 5
for n, rows, cols in ((3, 5, 7), (1, 33, 9), (2, 70, 70), (2, 1, 1), (1, 3, 300)):
    start = torch.randn(n * rows * cols + 1)
    grads = torch.randn(3, n, cols, rows)
    def train(kind, function):
        bank = start.to(kind)
        bank = bank.clone()[1:].view(n, rows, cols)
        side = (rows, 1) if rows >= cols else (1, cols)
        buffer, second = torch.zeros(n, rows, cols, dtype=kind), torch.zeros(n, *side, dtype=kind)
        for step, g in enumerate(grads.to(kind)):
            hyper = torch.tensor([0.1 / (step + 1), 0.05 * step, 0.9, 0.1]).to(kind)
            function(list(bank.unbind()), [x.T for x in g], buffer, second, hyper, poly)
        return bank, buffer, second
    found, again = train(torch.float32, kernels.muon_), train(torch.float32, kernels.muon_)
    truth = train(torch.float64, reference.muon_)
    for a, b, t in zip(found, again, truth):
        assert torch.equal(a, b)
        assert float((a.double() - t).norm() / t.norm()) < 2e-5, (n, rows, cols)
""")


def test_no_gradient_decays_alone_and_no_rate_changes_nothing() -> None:
    run("""
p, g = [torch.randn(9, 4)], [torch.zeros(9, 4)]
def step(lr, decay):
    before = p[0].clone()
    hyper = torch.tensor([lr, decay, 0.9, 0.05])
    kernels.muon_(p, g, torch.zeros(1, 9, 4), torch.zeros(1, 9, 1), hyper, [(3.0, -3.0, 1.0)])
    return before
torch.testing.assert_close(step(0.5, 0.2) * 0.9, p[0])
g[0].normal_()
assert torch.equal(step(0.0, 0.2), p[0])
kernels.muon_([], [], torch.zeros(0, 9, 4), torch.zeros(0, 9, 1), torch.zeros(4), [])
""")


def test_bf16_products_round_once_where_plain_pytorch_rounds_often() -> None:
    """All but the products themselves, which the interpreter cannot do in bf16: no polynomial, only the normalisation.

    The parameters' step is then s y, whose fp32 norm has no error of bf16.
    """
    run("""
g = torch.randn(2, 40, 30)
def step(function, kind, dtype):
    p = torch.zeros(2, 40, 30, dtype=kind)
    hyper = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=kind)
    second = torch.ones(2, 40, 1, dtype=kind)
    function(list(p), list(g.to(kind)), torch.zeros_like(p), second, hyper, [], dtype)
    return p.double()
truth = step(reference.muon_, torch.float64, torch.float64)
ours = float((step(kernels.muon_, torch.float32, torch.bfloat16) - truth).norm() / truth.norm())
assert 1e-4 < ours < 6e-3, ours  # one rounding; the interpreter truncates
""")


def test_what_cannot_be_served_is_refused_with_what_was_given() -> None:
    run("""
def refused(words, *changes, **more):
    given = [[torch.randn(5, 3)] * 2, [torch.randn(5, 3)] * 2, torch.zeros(2, 5, 3), torch.zeros(2, 5, 1),
             torch.zeros(4), [(1.0, 2.0, 3.0)]]
    for at, value in changes:
        given[at] = value
    try:
        kernels.muon_(*given, **more)
    except kernels.KernelError as e:
        assert words in str(e), e
    else:
        raise AssertionError(words)
refused("bfloat16 or float32, not torch.float16", dtype=torch.float16)
refused("not 1 and 2", (1, [torch.randn(5, 3)]))
refused("2 of 3 dims", (0, [torch.randn(5, 3, 1)] * 2))
refused("beside torch.float32 [3, 5]", (1, [torch.randn(5, 3), torch.randn(3, 5)]))
refused("beside torch.bfloat16 [5, 3]", (1, [torch.randn(5, 3).bfloat16()] * 2), dtype=torch.float32)
refused("buffer must be float32 [2, 5, 3]", (2, torch.zeros(1, 5, 3)))
refused("second must be float32 [2, 5, 1] on cpu, not torch.float32 [2, 1, 3]", (3, torch.zeros(2, 1, 3)))
refused("hyper must be float32 [4]", (4, torch.zeros(3)))
refused("hyper must be float32 [4]", (4, torch.zeros(4).double()))
refused("other strides", (0, [torch.randn(3, 5).T] * 2))
refused("three numbers", (5, [(1.0, 2.0)]))
""")


def test_a_bank_of_few_tiles_gets_small_ones() -> None:
    """The baseline's shapes: 32 squares of 512 fill a GPU with 128 x 128 tiles, 8 tall ones do not."""
    from hotloop.kernels.optimizer import muon

    assert muon.config_key(32, 512, False) == "16 bit many" and muon.default_config("16 bit many")["TILE"] == 128
    assert muon.config_key(8, 512, False) == "16 bit few" and muon.default_config("16 bit few")["TILE"] == 64
    assert muon.config_key(8, 512, True) == "fp32 few"
    # what is tried keeps at most four stages of the largest default's operands
    assert muon.search_space() and all(
        c["TILE"] * c["DEPTH"] * c["num_stages"] * 4 <= 131072 for c in muon.search_space()
    )
