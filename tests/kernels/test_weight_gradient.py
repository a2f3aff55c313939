"""Weight gradients in parts: how a sum is cut, and the kernels through the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.kernels.gemm import weight_gradient as wg
from tests import warm

ROOT = Path(__file__).resolve().parents[2]


def run(script: str) -> None:
    pytest.importorskip("triton")
    script = (
        "import torch\nfrom hotloop.kernels import operators, tuning\n"
        "from hotloop.kernels.block.stream import squares\n"
        "from hotloop.kernels.gemm import weight_gradient as wg\n"
        "torch.manual_seed(0)\n" + script
    )
    warm.output(script, **{"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1"})


def test_parts_fill_whole_waves_at_the_baselines_shapes() -> None:
    for n, d in ((512, 512), (2048, 512), (512, 2048), (1536, 512), (8192, 512)):
        tiles = -(-n // 128) * -(-d // 256)
        count = wg.parts(262144, n, d, 128, 256, 64)
        waves = -(-tiles * count // wg.MULTIPROCESSORS)
        assert tiles * count >= 0.9 * waves * wg.MULTIPROCESSORS, (n, d, count)


@given(st.integers(1, 1 << 20), st.integers(1, 9000), st.integers(1, 9000))
def test_parts_are_few_and_each_is_long(m: int, n: int, d: int) -> None:
    count = wg.parts(m, n, d, 128, 128, 32)
    assert 1 <= count <= wg.MOST_PARTS
    assert count == 1 or m // count >= (wg.OVERHEAD - 1) * 32


def test_sums_in_parts_against_fp64_in_poisoned_memory_and_to_the_bit() -> None:
    """One part, several, a last one that is shorter, and lengths that no block divides; sizes and tiles alike."""
    run("""
from hotloop.harness.proof.accuracy import poisoned_memory
seen = set()
for rows, columns in ((32, 64), (64, 32)):
    config = dict(VENDOR=0, ROWS=rows, COLUMNS=columns, DEPTH=16, GROUP=4, TMA=0, num_warps=4, num_stages=3)
    for m, n, d in ((1, 1, 1), (300, 40, 70), (513, 72, 33), (2000, 8, 8), (1041, 65, 130)):
        for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 6e-4)):
            dy, x = torch.randn(m, n).to(dtype), torch.randn(m, d).to(dtype)
            with poisoned_memory(), tuning.trial("weight_gradient", config):
                found, again = (torch.ops.hotloop.weight_gradient(dy, x) for _ in range(2))
            if dtype == torch.float32:  # takes no tuned configuration
                count = wg.parts(m, n, d, 128, 128, 32)
            else:
                count = wg.parts(m, n, d, rows, columns, 16)
            seen.add(count)
            want = dy.double().T @ x.double()
            assert found.dtype == dtype and torch.equal(found, again)
            assert float((found.double() - want).norm() / want.norm()) < limit, (m, n, d, dtype, count)
assert len(seen) >= 4 and 1 in seen, seen
assert torch.equal(torch.ops.hotloop.weight_gradient(torch.randn(0, 3), torch.randn(0, 5)), torch.zeros(3, 5))
""")


def test_the_vendors_product_can_be_what_was_tuned() -> None:
    run("""
dy, x = torch.randn(50, 9).half(), torch.randn(50, 7).half()
def never(*a): raise AssertionError
wg.parts = never
with tuning.trial("weight_gradient", {"VENDOR": 1, "TMA": 0}):
    assert torch.equal(torch.ops.hotloop.weight_gradient(dy, x), dy.T @ x)
""")


def test_every_operator_with_a_weight_sums_in_parts_while_linear_is_on() -> None:
    run("""
calls = []
real = wg.parts
wg.parts = lambda *a: calls.append(a[:3]) or real(*a)
def grads(function, *args):
    args = [torch.randn(a, requires_grad=True) for a in args]
    return torch.autograd.grad(function(*args).square().sum(), args)
grads(operators.linear, (12, 16), (9, 16))
assert calls == [(12, 9, 16)], calls
grads(operators.mlp_alone, (3, 4, 16), (9, 16), (5, 9))
assert calls[1:] == [(12, 9, 16), (12, 5, 9)], calls
targets = torch.randint(0, 33, (12,))
grads(lambda x, w: operators.loss(x, w, targets), (12, 16), (33, 16))
assert calls[3:] == [(12, 33, 16)], calls
cos, sin = torch.randn(2, 4, 1, 8)
parts = lambda x, *w: torch.cat(operators.qkv(x, squares(x), *w, cos, sin)[:3], 2)
grads(parts, (3, 4, 16), (32, 16), (32, 16), (32, 16))
assert calls[4:] == [(12, 96, 16)], calls
""")
