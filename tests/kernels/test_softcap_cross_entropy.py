"""The cross-entropy kernel through the interpreter, at more sizes than the table has, and what it refuses.

The interpreter must be asked for before Triton is imported, so each check is a script of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import warm

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, **env: str) -> str:
    return warm.output(script, **env)


INTERPRETER = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1"}

PRELUDE = """
import torch
from hotloop import kernels
from hotloop.kernels import operators, reference
from hotloop.kernels.head.in_place import launch
torch.manual_seed(0)
real_empty = torch.empty
def poisoned(*a, **k):  # what a kernel does not write is no number
    t = real_empty(*a, **k)
    return t.fill_(float("nan")) if t.is_floating_point() else t
torch.empty = poisoned
def truth_of(logits, targets, cap):
    # (losses, gradients of their sum) in the logits' type
    logits = logits.clone().requires_grad_()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    capped = wide if cap is None else cap * torch.tanh(wide / cap)
    loss = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]
def distance(x, y):
    return float((x.double() - y).norm() / y.norm().clamp_min(1e-30))
assert kernels.implementations()["loss"] == "triton: interpreter"
"""


def test_loss_and_gradient_in_place_against_fp64() -> None:
    run(
        PRELUDE
        + """
for v in (1, 7, 2048, 5003, 20000):  # 20000 takes two passes over a row
    for m in (1, 3, 130) if v < 5000 else (3,):
        for cap in (15.0, 30.0, None):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                logits = (torch.randn(m, v) * 6).to(dtype)
                targets = torch.randint(0, v, (m,))
                if m > 1:
                    targets[1] = -1
                want, truth = truth_of(logits.double(), targets, cap)
                _, plain = truth_of(logits, targets, cap)
                ours = logits.clone()
                loss = launch(ours, targets, cap, torch.ones(1))
                what = (v, m, cap, dtype)
                assert (loss - want).abs().max() < 1e-5, what
                # No worse than plain PyTorch's rounding to the same dtype, but for bfloat16, where the interpreter
                # truncates and hardware rounds: at most one unit in the last place, 2^-7 of a number.
                if dtype == torch.bfloat16:
                    assert ((ours.double() - truth).abs() <= truth.abs() * 2**-7 + 1e-6).all(), what
                else:
                    # An fp32 probability near 1 is off by up to 2e-7, whatever is left of it after the target's 1.
                    off, allowed = (ours.double() - truth).norm(), 1.5 * (plain.double() - truth).norm()
                    assert off <= allowed + 1e-6 * truth.norm() + 2e-7 * truth.numel() ** 0.5, what
                if m > 1:
                    assert loss[1] == 0 and not ours[1].any(), what
""",
        **INTERPRETER,
    )


def test_linear_cross_entropy_and_every_gradient_against_fp64() -> None:
    run(
        PRELUDE
        + """
for b, t, d, v in ((2, 65, 48, 203), (1, 1, 16, 7), (4, 32, 64, 2048)):
    for cap in (15.0, None):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(b, t, d).to(dtype)
            w = (torch.randn(v, d) * 0.3).to(dtype)
            targets = torch.randint(0, v, (b, t))
            if t > 1:
                targets[0, :5] = -1
            def both(function, x, w):
                x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
                loss = function(x, w, targets, cap)
                (loss * 3.0).backward()
                return loss.detach(), x.grad, w.grad
            truth = both(reference.loss, x.double(), w.double())
            plain = both(reference.loss, x, w)
            ours = both(operators.loss, x, w)
            for name, o, p, y in zip(("loss", "dx", "dw"), ours, plain, truth):
                # bfloat16 is allowed the interpreter's truncation at every step where hardware rounds.
                least = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
                limit = max(1.5 * distance(p, y), least)
                assert distance(o, y) <= limit, (name, b, t, d, v, cap, dtype, distance(o, y), distance(p, y))
""",
        **INTERPRETER,
    )


def test_the_operator_has_a_flop_formula() -> None:
    """A budget in FLOPs must not depend on which implementation runs."""
    run(
        """
import torch
from hotloop.kernels import operators
from torch.utils.flop_counter import FlopCounterMode
x, w = torch.randn(12, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    operators.loss(x, w, torch.randint(0, 33, (12,))).backward()
assert counter.get_total_flops() == 3 * 2 * 12 * 16 * 33
for method in ("exp", "chunked"):
    with FlopCounterMode(display=False) as counter:
        operators.loss(x, w, torch.randint(0, 33, (12,)), method=method).backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 16 * 33, method
""",
        **INTERPRETER,
    )


def test_what_cannot_be_served_is_refused() -> None:
    run(
        PRELUDE
        + """
def refused(words, *a):
    try:
        operators.loss(*a)
    except kernels.KernelError as e:
        assert words in str(e), e
    else:
        raise AssertionError(words)
x, w, t = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.int64)
refused("float64", x.double(), w.double(), t)
refused("int64 targets [4]", x, w, t[:3])
refused("int64 targets [4]", x, w, t.int())
refused("does not fit", x, w[:, :7], t)
refused("softcap must be", x, w, t, 100.0)
refused("softcap must be", x, w, t, -1.0)
""",
        **INTERPRETER,
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("triton", "cannot run"),
        ("embedding,adamw_", "cannot run"),
        ("fast", "'fast' is no kernel; say auto, reference, triton, or some of adamw_,"),
    ],
)
def test_what_was_asked_for_and_cannot_run_is_an_error(asked: str, words: str) -> None:
    script = "from hotloop import kernels\ntry: kernels.implementations()\nexcept kernels.KernelError as e: print(e)"
    assert words in run(script, HOTLOOP_KERNELS=asked, CUDA_VISIBLE_DEVICES="")


def test_kernels_can_be_asked_for_one_by_one() -> None:
    script = "from hotloop import kernels\nfor k, v in kernels.implementations().items(): print(k, v)"
    found = run(script, HOTLOOP_KERNELS="embedding,adamw_", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    on = {line.split()[0] for line in found.splitlines() if " triton: interpreter" in line}
    assert on == {"embedding", "adamw_"}
    assert "residual reference: asked for" in found
