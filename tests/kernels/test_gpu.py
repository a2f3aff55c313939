"""What only a GPU can show. Skipped where there is none; `make gpu-check` runs it first."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch

from hotloop import kernels
from hotloop.harness.paths import project_root
from hotloop.harness.proof import device as dev
from hotloop.harness.proof.accuracy import bitwise_repeats, check
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.settings import PRESETS, Spec
from hotloop.harness.training.child import load_train_module
from hotloop.kernels import attend, operators, reference
from hotloop.kernels.attend.libraries import BACKENDS
from hotloop.kernels.head import in_place

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    kernels.implementations()  # packages are tried before anything is compiled
    return load_train_module(str(project_root() / "train.py"))


def model_of(train: ModuleType) -> torch.nn.Module:
    torch.manual_seed(1)
    preset = PRESETS["h100"]
    return train.build_model(Spec("h100", "cuda", 1, preset.vocab_size, preset.seq_len))


def some_tokens(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    tokens = torch.randint(0, 8192, (rows, 2049), device=CUDA)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("name", OPERATORS)
def test_what_runs_here_is_right(name: str) -> None:
    torch.manual_seed(0)
    op = OPERATORS[name]
    for shape in ("odd", "tiny"):
        for dtype in op.dtypes:
            args = op.make(op.shapes[shape], dtype, CUDA)
            for variant in ("", *op.variants):
                if variant == "exp" and dtype == torch.float16:  # its cap is too high for fp16's range
                    continue
                for errors in check(op, args, op.bind(operators, variant)):
                    assert errors.fine, (shape, dtype, variant, errors)


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if op.module])
def test_a_kernel_of_ours_runs_and_repeats_to_the_bit(name: str) -> None:
    op = OPERATORS[name]
    if not kernels.implementations()[op.switch].startswith("triton"):
        pytest.skip("HOTLOOP_KERNELS=triton asks for it, as make gpu-check does")
    args = op.make(op.shapes["odd"], torch.bfloat16, CUDA)
    assert bitwise_repeats(op, args, op.bind(operators), 50) == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_an_attention_backend_is_right_and_compiles(name: str) -> None:
    """Whole rows and packed documents, both windows and head dimensions, grouped heads, against fp64."""
    if why := attend.backends("cuda")[1].get(name):
        pytest.skip(why)
    compiled = dev.compiled(kernels.attention, fullgraph=True)
    torch.manual_seed(0)
    for head_dim, window, documents in itertools.product((64, 128), (100, 512), (False, True)):
        backend = BACKENDS[name]
        if backend.missing(banded=window < 511) or backend.refusal(torch.bfloat16, head_dim, documents):
            continue
        q, k, v, do = (torch.randn(2, 512, h, head_dim, device=CUDA).bfloat16() for h in (4, 2, 2, 4))
        cuts = torch.tensor([0, 30, 30, 201, 600, 1024], device=CUDA) if documents else None
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        true = reference.attention(wide[0], wide[1], wide[2], window, cuts)
        truth = [true, *torch.autograd.grad(true, wide, do.double())]
        for function in (kernels.attention, compiled):
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            out = function(*given, window, cuts, backend=name)
            for mine, want in zip([out, *torch.autograd.grad(out, given, do)], truth, strict=True):
                error = float((mine.double() - want).norm() / want.norm())
                assert error < 8e-3, (head_dim, window, documents, function is compiled, error)


def test_the_models_loss_compiles_whole_and_agrees_with_eager(train: ModuleType) -> None:
    model = model_of(train)
    tokens, targets = some_tokens(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # the first weights are mostly zeros
    losses, grads = [], []
    for function in (model.loss, kernels.compile(model.loss)):
        model.zero_grad()
        loss = function(tokens, targets)
        loss.backward()
        losses.append(float(loss))
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 3e-2


def test_the_training_loss_is_the_scored_one(train: ModuleType) -> None:
    """`loss`, which forms no fp32 logits, and `forward`, which the evaluators call, are one function."""
    model = model_of(train)
    tokens, targets = some_tokens(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        logits = model(tokens)
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert float(model.loss(tokens, targets)) == pytest.approx(float(want), rel=1e-3)


def test_passes_as_a_cuda_graph_give_what_launched_ones_give(train: ModuleType) -> None:
    """Four passes of two steps, gradients taken away between them as the warm-up's restore does."""
    found = []
    for graphs in (False, True):
        model = model_of(train)
        loss_of = kernels.compile(model.loss)

        def one_pass(tokens: torch.Tensor, targets: torch.Tensor, loss_of: Any = loss_of) -> torch.Tensor:
            loss = loss_of(tokens, targets)
            loss.backward()
            return loss.detach()

        graphed = train.GraphedPass(one_pass, list(model.parameters()))
        values = []
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            if graphs:
                graphed.begin()
            total = torch.zeros((), device=CUDA)
            for rows in (some_tokens(4), some_tokens(4)):
                total += (graphed if graphs else one_pass)(*rows)
            values += [total, *(p.grad.float().clone() for p in model.parameters() if p.grad is not None)]
        found.append(values)
    for launched, replayed in zip(*found, strict=True):
        torch.testing.assert_close(replayed, launched, rtol=1e-5, atol=1e-7)


def test_two_steps_of_one_seed_give_the_same_bits(train: ModuleType) -> None:
    tokens, targets = some_tokens(8)

    def weights() -> list[torch.Tensor]:
        model = model_of(train)
        hp = train.hyperparameters(Spec("h100", "cuda", 1, 8192, 2048))
        optimizer = train.build_optimizer(model, hp, compiled=True)
        loss = kernels.compile(model.loss)
        for _ in range(3):
            loss(tokens, targets).backward()
            optimizer.set_schedule(1.0, 0.9, 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [p.detach().clone() for p in model.parameters()]

    torch.use_deterministic_algorithms(True, warn_only=True)  # as the trainer does
    try:
        first, second = weights(), weights()
    finally:
        torch.use_deterministic_algorithms(False)
    different = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(a, b)]
    assert not different, f"{len(different)} of {len(first)} parameters differ"


def test_m_times_v_past_two_to_the_31_elements() -> None:
    """Offsets of the baseline's logits need 64 bits: the last rows must come out as they do alone."""
    rows, vocab = 262_144 + 64, 8192
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * vocab:
        pytest.skip("too little memory is free")
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=CUDA, dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), device=CUDA)
    last = logits[-64:].clone()
    one = torch.ones(1, device=CUDA)
    loss = in_place.launch(logits, targets, 15.0, one)
    alone = in_place.launch(last, targets[-64:], 15.0, one)
    assert torch.equal(loss[-64:], alone)
    assert torch.equal(logits[-64:], last)
