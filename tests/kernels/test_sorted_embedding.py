"""The embedding's default backward pass: sums over sorted tokens in plain PyTorch, and on a CPU torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hotloop.kernels import reference
from hotloop.kernels.head.embedding import PLAIN_PIECE, embedding, sorted_embedding, token_order, token_rows
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
COUNTS = [0, 1, PLAIN_PIECE, PLAIN_PIECE + 1, 5 * PLAIN_PIECE + 5, 0]  # of each token


def tokens_of(counts: list[int]) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.full((c,), v) for v, c in enumerate(counts)])[torch.randperm(sum(counts))]


def test_on_a_cpu_nothing_is_sorted_and_gradients_are_torchs_to_the_bit() -> None:
    tokens = tokens_of(COUNTS).view(3, -1)
    assert token_order(tokens, len(COUNTS)) is None
    weight, grad = torch.randn(len(COUNTS), 24, requires_grad=True), torch.randn(*tokens.shape, 24)
    ours = torch.autograd.grad(embedding(tokens, weight), weight, grad)[0]
    theirs = torch.autograd.grad(torch.nn.functional.embedding(tokens, weight), weight, grad)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(-1,), (3, -1)])
def test_sorted_sums_are_right_and_repeat_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens = tokens_of(COUNTS).view(shape)
    order = token_rows(tokens, len(COUNTS))
    weight = torch.randn(len(COUNTS), 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(*tokens.shape, 24).to(dtype)
    out = sorted_embedding(tokens, weight, *order)
    assert torch.equal(out, reference.embedding(tokens, weight))
    found = [torch.autograd.grad(out, weight, grad, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    want = torch.zeros(len(COUNTS), 24, dtype=torch.float64)
    want.index_add_(0, tokens.flatten(), grad.double().flatten(0, -2))
    # Sums are fp32 at least, and rounded once to the table's type.
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.5e-3}[dtype]
    assert (found[0].double() - want).norm() <= limit * want.norm()
    assert not found[0][0].any() and not found[0][5].any()


def test_no_tokens_give_no_gradient() -> None:
    tokens, weight = torch.zeros(0, dtype=torch.int64), torch.randn(5, 8, requires_grad=True)
    sorted_embedding(tokens, weight, *token_rows(tokens, 5)).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_compiled_for_results_that_repeat_nothing_accumulates_by_index() -> None:
    """As in a model of two tables: one sort, forward passes that fuse, no index_put_, and no row is copied."""
    script = """
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import embedding
from hotloop.kernels.head.embedding import PLAIN_PIECE, sorted_embedding, token_rows
torch._C._set_deterministic_algorithms(True, warn_only=True)
torch.manual_seed(0)
V, M, D = 300, 5000, 16
tokens = (V * torch.rand(M) ** 3).long()
tables = [torch.randn(V, D, requires_grad=True) for _ in range(2)]

def loss(how, a, b):
    order = token_rows(tokens, V)
    rows = [how(tokens, t, *order) for t in (a, b)]
    return (rows[0].sin() * rows[1]).sum()

def both(how):
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    return run_and_get_code(lambda: torch.autograd.grad(compiled(how, *tables), tables))

found, (forward, backward) = both(sorted_embedding)
truth = loss(lambda n, t, *_: embedding(n, t), *(t.double() for t in tables))
for ours, true in zip(found, torch.autograd.grad(truth, tables)):
    torch.testing.assert_close(ours, true.float(), rtol=1e-5, atol=1e-4)
code = forward + backward
assert "index_put" not in code and "sorted_embedding" not in code, code
assert code.count("hotloop.token_rows.default(") == 1
assert f"({PLAIN_PIECE}, {V + M // PLAIN_PIECE}, {D})" not in backward, backward
_, (_, plain) = both(lambda n, t, *_: embedding(n, t))
assert "index_put" in plain  # what this is instead of
"""
    warm.output(script, **{"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "CUDA_VISIBLE_DEVICES": ""})
