"""Attention: our kernels through the interpreter where tiles, windows and documents meet; the choice of a backend; the
wrappers of other people's packages, against stand-ins that have their signatures.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hotloop import kernels
from hotloop.kernels import attend as chosen
from hotloop.kernels import reference
from hotloop.kernels.attend import flash
from hotloop.kernels.attend import libraries as others
from tests import warm

PREAMBLE = """
import torch, contextlib
from hotloop import kernels
from unittest import mock
from hotloop.kernels import reference
from hotloop.kernels.attend import flash
torch.manual_seed(0)

def with_config(t, **config):
    config = dict(num_warps=4, num_stages=1, PROGRAMS=0) | config
    if t % 4:  # as the launcher has it: descriptors need aligned rows
        config["TMA"] = 0
    return mock.patch.object(flash, "launch_config", lambda *a: config)

def inputs(b, t, h, g, k):
    made = [torch.randn(b, t, n, k, requires_grad=True) for n in (h, g, g)]
    return made, torch.randn(b, t, h, k)

def errors(qkv, do, window, cu=None, config={}):
    with with_config(qkv[0].shape[1], **config):
        out = kernels.attention(*qkv, window, cu)
        mine = [out, *torch.autograd.grad(out, qkv, do)]
    wide = [x.detach().double().requires_grad_() for x in qkv]
    true = reference.attention(*wide, window, cu)
    true = [true, *torch.autograd.grad(true, wide, do.double())]
    # What is zero in truth (the gradient of a single score) has no relative error; there it is of a tenth.
    return [float((a - b).norm() / max(b.norm().item(), 0.1 * b.numel() ** 0.5)) for a, b in zip(mine, true)]

SMALL = dict(ROWS=16, COLUMNS=32, TMA=1, SPLIT=1)
WIDE = dict(ROWS=32, COLUMNS=16, TMA=1, SPLIT=0, PROGRAMS=1)
PLAIN = dict(ROWS=32, COLUMNS=32, TMA=0, SPLIT=1)
"""


def run(script: str, **env: str) -> str:
    pytest.importorskip("triton")
    return warm.output(PREAMBLE + script, **{"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1"} | env)


def test_windows_lengths_and_groups() -> None:
    """Windows of 0, 1, within a tile, of a tile, across tiles, and wider than the row; rows that no tile divides."""
    run("""
for shape, windows in (((1, 37, 4, 2, 16), (0, 1, 31, 10**9)), ((1, 64, 1, 1, 16), (32, 40)), ((2, 1, 2, 2, 16), (1,))):
    qkv, do = inputs(*shape)
    for window in windows:
        for config in (SMALL, WIDE, PLAIN):
            assert max(errors(qkv, do, window, config=config)) < 1e-5, (shape, window, config)
""")


def test_head_dims_of_the_baseline() -> None:
    run("""
for k in (64, 128):
    qkv, do = inputs(1, 72, 2, 1, k)
    for config in (SMALL, PLAIN):
        assert max(errors(qkv, do, 33, config=config)) < 1e-5
    half = [x.detach().half().requires_grad_() for x in qkv]
    assert max(errors(half, do.half(), 33, config=SMALL)) < 2e-3
""")


def test_documents() -> None:
    """Documents that end within a tile, at its end, that are empty, and one that the end of a row cuts."""
    run("""
b, t = 2, 64
qkv, do = inputs(b, t, 2, 1, 16)
for cu in ([0, b * t], [0, 7, 7, 50, 64, 100, b * t], [0, 32, 90, b * t], list(range(b * t + 1))):
    cu = torch.tensor(cu)
    for window in (3, t):
        for config in (SMALL, WIDE):
            assert max(errors(qkv, do, window, cu, config)) < 1e-5, (cu, window, config)
tokens = torch.randint(0, 9, (b, t))
offsets = kernels.document_offsets(tokens, 3)
starts = sorted({0, t, *(i for i, x in enumerate(tokens.flatten().tolist()) if x == 3)})
assert offsets.tolist() == starts + [b * t] * (b * t + 1 - len(starts))
assert max(errors(qkv, do, 40, offsets, SMALL)) < 1e-5
short = kernels.document_offsets(tokens, 3, most=len(starts) + 2)
assert short.tolist() == starts + [b * t] * 3
assert kernels.document_offsets(tokens, 3, most=2).tolist() == [*starts[:2], b * t]
part = torch.randn(8 * 16 * 3 + 1)[1:].view(1, 8, 3, 16)  # whole, and where no descriptor may begin
assert flash._tokenwise(part).data_ptr() % 16 == 0 and torch.equal(flash._tokenwise(part), part)
""")


def test_keys_out_of_sight_are_never_touched() -> None:
    """NaN among keys and queries that a tile cannot see would spoil it if its block were loaded and masked."""
    run("""
qkv, do = inputs(1, 128, 1, 1, 16)
q, k, v = (x.detach() for x in qkv)
with with_config(128, ROWS=16, COLUMNS=16, TMA=1, SPLIT=1):
    o, lse = flash.forward(q, k, v, 20)
    want = flash.backward(do, q, k, v, o, lse, 20)
    far = slice(0, 80)  # queries from 112 on see keys from 92 on; keys to 16 are seen by queries to 36
    k2, v2 = k.clone(), v.clone()
    k2[:, far], v2[:, far] = torch.nan, torch.nan
    o2, lse2 = flash.forward(q, k2, v2, 20)
    assert torch.equal(o2[:, 112:], o[:, 112:])
    assert torch.equal(flash.backward(do, q, k2, v2, o, lse, 20)[0][:, 112:], want[0][:, 112:])
    late = slice(64, 128)
    q2, do2 = q.clone(), do.clone()
    q2[:, late], do2[:, late] = torch.nan, torch.nan
    for ours, true in zip(flash.backward(do2, q2, k, v, o, lse, 20)[1:], want[1:]):
        assert torch.equal(ours[:, :16], true[:, :16])
""")


def test_row_sums_from_outside_and_log_sum_exp() -> None:
    run("""
qkv, do = inputs(2, 40, 2, 2, 16)
q, k, v = (x.detach() for x in qkv)
with with_config(40, **SMALL):
    o, lse = flash.forward(q, k, v, 12)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT).double() / 4
    i = torch.arange(40)
    hidden = (i[:, None] < i) | (i[:, None] - i > 12)
    torch.testing.assert_close(lse.double(), scores.masked_fill(hidden, -torch.inf).logsumexp(-1), rtol=1e-5, atol=1e-5)
    own = flash.backward(do, q, k, v, o, lse, 12)
    delta = (do * o).sum(-1).transpose(1, 2)
    for a, b in zip(own, flash.backward(do, q, k, v, o, lse, 12, delta=delta)):
        torch.testing.assert_close(a, b)
    zero = flash.backward(do, q, k, v, o, lse, 12, delta=torch.zeros_like(lse))  # it is used, not formed again
    assert not torch.allclose(own[0], zero[0])
""")


def test_parts_of_one_product_are_taken_as_they_lie() -> None:
    """q, k and v as slices of a QKV product are not copied; what descriptors cannot address is."""
    run("""
qkv = torch.randn(2, 40, 6, 16)
parts = [x.clone().requires_grad_() for x in qkv.split(2, dim=2)]
views = qkv.split(2, dim=2)
for x in views:
    assert flash._tokenwise(x) is x
odd = torch.randn(2, 40, 2, 17)[..., :16]
assert flash._tokenwise(odd).is_contiguous() and flash._tokenwise(odd.transpose(1, 2)).is_contiguous()
for config in (SMALL, PLAIN):
    with with_config(40, **config):
        assert torch.equal(kernels.attention(*views, 9), kernels.attention(*parts, 9))
""")


def test_what_is_named_and_cannot_run_says_why() -> None:
    q = torch.randn(1, 8, 2, 16)
    for name, words in (
        ("flash3", "flash_attn_interface is not installed; hotloop install flash3"),
        ("flash4", "pip install 'hotloop\\[flash\\]'"),
        ("torch", "it needs CUDA, and the tensors are on cpu"),
        ("nonsense", "no backend 'nonsense'; they are flash3, flash4, torch"),
    ):
        with pytest.raises(kernels.KernelError, match=words):
            kernels.attention(q, q, q, 8, backend=name)
    for bad, words in (
        ((q, q[:, :4], q, 8), r"needs q \[B, T, H, K\]"),
        ((q, q.double(), q, 8), "of one type"),
        ((torch.randn(1, 8, 3, 16), q, q, 8), "heads in equal groups, not 3 in 2"),
        ((q, q, q, -1), "a window of 0 or more"),
    ):
        with pytest.raises(kernels.KernelError, match=words):
            kernels.attention(*bad)
    script = "from hotloop import kernels; print(kernels.implementations())"
    for asked, words in (("nonsense", "is no backend; they are"), ("flash3", "cannot run: flash_attn_interface")):
        done = warm.run(script, HOTLOOP_ATTENTION=asked)
        assert done.returncode
        assert words in done.stderr
    assert kernels.implementations()["attention"].startswith("reference: ")


def test_the_fastest_measured_backend_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = {
        "K=128 T=2048 W=2048": ["flash4", "cudnn", "torch"],
        "K=128 T=2048 W=1024": ["cudnn", "triton", "torch"],
        "K=128 T=16384 W=16384": ["triton", "torch"],
    }
    plan = chosen.Plan("", ("torch", "cudnn", "triton"), {"flash4": "not here"}, {"cudnn": "no bands"}, ranking, "cuda")
    monkeypatch.setitem(chosen._plans, "cuda", plan)

    def pick(t: int, window: int, dtype: torch.dtype = torch.bfloat16, documents: int = 0, k: int = 128) -> str:
        return chosen._choose("cuda", dtype, t, k, window, documents, None)

    assert pick(2048, 2048) == "cudnn"  # flash4 is not installed
    assert pick(2048, 1024) == "triton"  # cudnn was measured to be faster, and lacks what bands need
    assert pick(4096, 4096) == "cudnn"  # the nearest length that was measured, in proportion
    assert pick(8192, 8192) == "triton"
    assert pick(2048, 2048, documents=9) == "torch"
    assert pick(2048, 2048, k=64) == "torch"  # never measured
    with pytest.warns(UserWarning, match="the reference runs"):
        assert pick(2048, 2048, torch.float32) == "reference"  # nobody else takes it unasked
    with pytest.warns(UserWarning, match="the reference runs"):
        assert pick(2048, 2048, k=36) == "reference"


def _probabilities(q: Tensor, k: Tensor, left: int, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K], k [B, T, H, K] -> (p [B, H, T, T], lse [B, H, T])."""
    i = torch.arange(q.shape[1])
    seen = (i[:, None] >= i) & ((i[:, None] - i <= left) if left >= 0 else torch.tensor(True))
    if cu is not None:
        assert cu.dtype == torch.int32
        document = torch.searchsorted(cu.long(), i, right=True)
        seen = seen & (document[:, None] == document)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def plain_flash(q: Tensor, k: Tensor, v: Tensor, left: int, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """What FlashAttention computes, dense or packed: (out, lse)."""
    q, k, v = (x if cu is None else x[None] for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    p, lse = _probabilities(q, k, left, cu)
    out = torch.einsum("bhij,bjhk->bihk", p, v)
    return (out, lse) if cu is None else (out[0], lse[0])


def plain_flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, left: int, cu: Tensor | None
) -> tuple[Tensor, ...]:
    """(dq, dk, dv). `lse` must be what forward gave, in its layout."""
    packed, groups = cu is not None, k.shape[-2]
    do, q, k, v, lse = (x[None] if packed else x for x in (do, q, k, v, lse))
    k, v = (x.repeat_interleave(q.shape[2] // groups, 2) for x in (k, v))
    p, again = _probabilities(q, k, left, cu)
    torch.testing.assert_close(lse, again)
    dv = torch.einsum("bhij,bihk->bjhk", p, do)
    dp = torch.einsum("bihk,bjhk->bhij", do, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq, dk = torch.einsum("bhij,bjhk->bihk", ds, k), torch.einsum("bhij,bihk->bjhk", ds, q)
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return tuple(x[0] if packed else x for x in (dq, dk, dv))


class Flash2:
    """Signatures of flash_attn 2.8's flash_attn_interface."""

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert causal
        assert softmax_scale == q.shape[-1] ** -0.5
        return (*plain_flash(q, k, v, window_size_left, None), None, None)

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
    ):  # fmt: skip
        return (*plain_flash(q, k, v, window_size_left, cu_seqlens_q), None, None)

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert deterministic
        for to, grad in zip(
            (dq, dk, dv), plain_flash_backward(dout, q, k, v, softmax_lse, window_size_left, None), strict=True
        ):
            to.copy_(grad)

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert deterministic
        grads = plain_flash_backward(dout, q, k, v, softmax_lse, window_size_left, cu_seqlens_q)
        for to, grad in zip((dq, dk, dv), grads, strict=True):
            to.copy_(grad)


class Flash3:
    """Signatures of FlashAttention 3's flash_attn_interface."""

    def _flash_attn_forward(
        self, q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        assert causal
        return (*plain_flash(q, k, v, window_size_left, cu_seqlens_q), None, None)

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert deterministic
        assert is_causal
        grads = plain_flash_backward(dout, q, k, v, softmax_lse, window_size_left, cu_seqlens_q)
        for to, grad in zip((dq, dk, dv), grads, strict=True):
            to.copy_(grad)


class Flash4:
    """The parts of flash-attn-4's signatures (flash_attn.cute.interface) that are used."""

    def _flash_attn_fwd(
        self, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=None, window_size_right=None, return_lse=False,
    ):  # fmt: skip
        assert return_lse
        assert causal == (window_size_left is None)  # it takes a window or the flag
        out = plain_flash(q, k, v, -1 if window_size_left is None else window_size_left, cu_seqlens_q)
        return (*out, None, None, None)

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):  # fmt: skip
        assert deterministic
        return plain_flash_backward(
            dout, q, k, v, lse, -1 if window_size_left is None else window_size_left, cu_seqlens_q
        )


@pytest.mark.parametrize(
    ("name", "module", "stand_in"),
    [
        ("flash2", "flash_attn.flash_attn_interface", Flash2()),
        ("flash3", "flash_attn_interface", Flash3()),
        ("flash4", "flash_attn.cute.interface", Flash4()),
    ],
)
def test_wrappers_of_other_peoples_packages(
    name: str, module: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, groups and packed documents reach them as they want them, and come back in our shapes."""
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setitem(chosen._plans, "cpu", chosen.Plan("", (name,), {}, {}, {}, "cpu"))
    monkeypatch.setitem(
        others.BACKENDS, name, others.BACKENDS[name].__class__(**(vars(others.BACKENDS[name]) | {
            "dtypes": (torch.float64,), "head_dims": (16,),
        }))
    )  # fmt: skip
    torch.manual_seed(0)
    shape = (2, 24)
    q, k, v = (torch.randn(*shape, n, 16, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    do = torch.randn(q.shape, dtype=torch.float64)
    for cu in (None, torch.tensor([0, 5, 5, 30, 48])):
        for window in (4, 23, 100):
            mine = kernels.attention(q, k, v, window, cu, backend=name)
            true = reference.attention(q, k, v, window, None if cu is None else torch.tensor([0, 5, 24, 30, 48]))
            torch.testing.assert_close(mine, true)
            for a, b in zip(*(torch.autograd.grad(x, (q, k, v), do) for x in (mine, true)), strict=True):
                torch.testing.assert_close(a, b)


def test_programs_that_walk_over_tiles_have_as_much_to_do(tmp_path: Path) -> None:
    """Static strides over the launcher's order, at a GPU's number of programs: the longest against the average."""
    jitted = tmp_path / "order.py"  # Triton reads the source from a file
    jitted.write_text("""
import triton, triton.language as tl
from hotloop.kernels.attend.flash import _tile_of
@triton.jit
def order(out, tiles, T, H, ROWS: tl.constexpr, HEADS: tl.constexpr, ALL: tl.constexpr):
    tile = tl.arange(0, ALL)
    b, head, start = _tile_of(tile, tiles, T, H, ROWS, HEADS)
    tl.store(out + tile, (b * H + head) * T + start)
""")
    run(
        f"import sys; sys.path.append({str(tmp_path)!r})"
        + """
from order import order
def load(t, window, rows, heads, together):
    tiles = rows * heads * (t // 128)
    out = torch.empty(tiles, dtype=torch.int64)
    order[(1,)](out, tiles, t, heads, ROWS=128, HEADS=together, ALL=tiles)
    assert torch.equal(out.sort().values, torch.arange(0, rows * heads * t, 128))  # each tile once
    first = out % t
    blocks = (first + 128) // 128 - (first - window).clamp(min=0) // 128 + 1
    work = torch.zeros(132).scatter_add_(0, torch.arange(tiles) % 132, blocks.float())
    return float(work.max() / work.mean())
for t, window, rows in ((2048, 2048, 128), (2048, 1024, 128), (8192, 8192, 16)):
    assert load(t, window, rows, 4, flash.heads_together(1)) < 1.06, (t, window)
assert load(2048, 2048, 128, 4, flash.heads_together(0)) > 1.15
"""
    )


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_package_is_tried_whatever_mode_asks_first(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation asks under inference_mode. A right package passes, one that computes something else does not."""
    monkeypatch.setattr(others, "_importable", lambda module: True)
    cases = ((Flash2(), ""), (Wrong(), "its answers are wrong here"), (Drifting(), "its gradients do not repeat"))
    for stand_in, wanted in cases:
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in)
        with mode():
            found = chosen._wrong.__wrapped__("flash2", "cpu")
        assert found.startswith(wanted) and bool(found) == bool(wanted), found


class Drifting(Flash2):
    """Of one whose deterministic flag does not keep its word: right, and another last bit each time."""

    def _flash_attn_backward(self, dout, q, k, v, out, lse, dq, dk, dv, **rest: Any) -> None:
        super()._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **rest)
        self.calls = getattr(self, "calls", 0) + 1
        dq.mul_(1 + self.calls * 2.0**-7)


class Wrong(Flash2):
    """Of a version that scales otherwise."""

    def _flash_attn_forward(self, *args: Any, **rest: Any) -> Any:
        out, *more = super()._flash_attn_forward(*args, **rest)
        return (out * 1.1, *more)


def test_the_first_right_package_of_a_measured_order_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(others, "_importable", lambda module: True)
    monkeypatch.setattr(chosen, "_unable", lambda backend, device: "" if "flash" in backend.name else "not here")
    monkeypatch.setattr(chosen, "_wrong", lambda name: (tried.append(name), "wrong" if name == "flash4" else "")[1])
    monkeypatch.setattr(chosen.tuning, "measured", lambda _: {"K=128 T=2048 W=1024": ["flash4", "flash2", "flash3"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plan = chosen._make_plan("cuda")
    assert tried == ["flash4", "flash2", "flash3"]  # the last for calls that none was measured for
    assert plan.unable["flash4"] == "wrong"
    monkeypatch.setitem(chosen._plans, "cuda", plan)
    monkeypatch.setattr(chosen, "_ran", {})
    assert chosen._describe("cuda").startswith("K=128 T=2048 W=1024: flash2")


@pytest.mark.parametrize(
    ("installed", "first"),
    [(("flash3", "flash4"), "flash3"), (("flash4",), "flash4"), ((), "torch")],
)
def test_on_a_hopper_that_was_never_measured_fa3_comes_before_fa4_and_that_before_torchs(
    installed: tuple[str, ...], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(backend: others.Backend, device: str) -> str:
        there = backend.name in (*installed, "torch", "flex", "triton")
        return "" if there and 9 in backend.capabilities else "not here"

    monkeypatch.setattr(others, "_importable", lambda module: True)
    monkeypatch.setattr(chosen, "_unable", unable)
    monkeypatch.setattr(chosen, "_wrong", lambda name: "")
    monkeypatch.setattr(chosen.tuning, "measured", lambda _: {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(chosen._plans, "cuda", chosen._make_plan("cuda"))
    monkeypatch.setattr(chosen, "_ran", {})
    for window in (1024, 2048):
        assert chosen._choose("cuda", torch.bfloat16, 2048, 128, window, 0, None) == first
    assert chosen._describe("cuda").startswith(f"K=128 T=2048 W=1024: {first}")


@pytest.mark.parametrize(
    ("asked", "forced", "able"),
    [
        ("auto", "", True),
        ("triton", "", True),  # all our kernels, and attention as it was ranked
        ("attention", "triton", True),
        ("embedding,attention", "triton", True),
        ("embedding", "", False),
        ("reference", "", False),
    ],
)
def test_only_its_name_asks_for_our_attention(
    monkeypatch: pytest.MonkeyPatch, asked: str, forced: str, able: bool
) -> None:
    """On a GPU; on a CPU `triton` asks for what the interpreter can run."""
    monkeypatch.setattr(chosen.dispatch, "ASKED", asked)
    monkeypatch.setattr(chosen, "ASKED", "")
    monkeypatch.setattr(chosen, "_unable", lambda backend, device: "" if backend.name in ("torch", "triton") else "no")
    monkeypatch.setattr(chosen.tuning, "measured", lambda _: {"K=128 T=2048 W=1024": ["torch", "triton"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plan = chosen._make_plan("cuda")
    assert (plan.forced, "triton" in plan.able) == (forced, able)
    monkeypatch.setitem(chosen._plans, "cuda", plan)
    assert chosen._choose("cuda", torch.bfloat16, 2048, 128, 1024, 0, None) == (forced or "torch")
    assert chosen._make_plan("cpu").forced == ("triton" if "triton" in asked or forced else "")


def test_the_record_names_no_backend_that_lacks_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = {"K=128 T=2048 W=1024": ["cudnn", "flash3"], "K=128 T=2048 W=2048": ["cudnn", "flash3"]}
    plan = chosen.Plan("", ("flash3", "cudnn"), {}, {"cudnn": "no front end"}, ranking, "cuda sm_90")
    monkeypatch.setitem(chosen._plans, "cuda", plan)
    monkeypatch.setattr(chosen, "_ran", {})
    assert chosen._describe("cuda").startswith("K=128 T=2048 W=1024: flash3; K=128 T=2048 W=2048: cudnn")
    chosen._choose("cuda", torch.bfloat16, 1024, 128, 100, 0, None)  # and in the end what ran
    chosen._choose("cuda", torch.bfloat16, 1024, 128, 2048, 0, "reference")
    assert chosen._describe("cuda") == "K=128 T=1024 W=100: flash3; K=128 T=1024 W=1024: reference (cuda sm_90; no GPU)"
    monkeypatch.setitem(chosen._plans, "cuda", plan._replace(forced="triton", able=("triton",)))
    assert chosen._describe("cuda") == "triton: cuda sm_90"  # by which tests and benchmarks know that ours runs


def test_a_reference_on_a_gpu_is_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chosen._plans, "cuda", chosen.Plan("", ("torch",), {}, {}, {}, "cuda sm_90"))
    with pytest.warns(UserWarning, match=r"no fast attention serves torch\.float32 with head dim 64"):
        assert chosen._choose("cuda", torch.float32, 256, 64, 256, 0, None) == "reference"
    assert chosen._choose("cuda", torch.bfloat16, 256, 64, 256, 65_535, None) == "torch"
    with pytest.warns(UserWarning, match="and documents"):
        assert chosen._choose("cuda", torch.bfloat16, 256, 64, 256, 65_536, None) == "reference"
    with pytest.raises(kernels.KernelError, match=r"up to 65535 documents, not 70000; document_offsets"):
        chosen._choose("cuda", torch.bfloat16, 256, 64, 256, 70_000, "torch")


def test_torchs_flash_attention_is_ordered_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under warn_only, as a training runs, it would warn and add by atomics."""
    seen = []

    def spy(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **rest: Any) -> Any:
        mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append((*mode, torch.utils.deterministic.fill_uninitialized_memory))
        return q, k, v

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", spy, raising=False)
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        q = torch.randn(1, 8, 2, 16)
        others._torch_backward(q, q, q, q, q, q[..., 0].transpose(1, 2), 8, None, None)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False)
    assert seen == [(True, False, False)]
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_torchs_own_kernels_take_what_they_are_given() -> None:
    """Shapes and arguments of torch's FlashAttention and cuDNN operators, without computing."""
    q = torch.empty(2, 256, 4, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 256, 2, 64, device="meta", dtype=torch.bfloat16)
    offsets = torch.empty(7, device="meta", dtype=torch.int32)
    for forward, backward, window, packed in (
        (others._torch_forward, others._torch_backward, 100, None),
        (others._torch_forward, others._torch_backward, 256, offsets),
        (others._cudnn_forward, others._cudnn_backward, 256, None),
    ):
        out, lse = forward(q, k, k, window, packed, None)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 256), torch.float32)
        grads = backward(out, q, k, k, out, lse, window, packed, None)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_sees_what_the_reference_sees() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 41, n, 16) for n in (4, 2, 2))
    cu = torch.tensor([0, 7, 7, 50, 82])
    for window in (0, 5, 100):
        torch.testing.assert_close(others._flex(q, k, v, window, None), reference.attention(q, k, v, window))
        bounds = chosen._bounds(cu, 2, 41)
        rows = torch.tensor([0, 7, 41, 50, 82])  # the end of a row ends a document
        torch.testing.assert_close(
            others._flex(q, k, v, window, bounds[1:]), reference.attention(q, k, v, window, rows)
        )


def test_operations_are_those_of_the_visible_pairs() -> None:
    for t, window in ((37, 5), (64, 0), (64, 10**6)):
        i = torch.arange(t)
        seen = int(((i[:, None] >= i) & (i[:, None] - i <= window)).sum())
        shape = (3, t, 4, 16)
        assert chosen._flops(shape, None, None, window) == 4 * 16 * 3 * 4 * seen
        assert chosen._backward_flops(None, shape, None, None, None, None, window) == 10 * 16 * 3 * 4 * seen


def test_every_default_says_what_it_needs() -> None:
    for kernel in flash.KERNELS:
        for kind in ("fp32", *flash.SHIPPED):
            for head_dim in flash.HEAD_DIMS:
                for key in ("", "grouped"):
                    config = flash.default_config(kernel, head_dim, key, kind)
                    assert config.keys() == flash.search_space(kernel)[0].keys()
