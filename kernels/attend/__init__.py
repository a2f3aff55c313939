"""Attention: one function, many implementations, chosen by capability and by what was measured.

    o[i] = sum_j softmax_j(q[i] k[j] / sqrt(K)) v[j],  max(i - window, start of i's document) <= j <= i

Which implementation runs (`kernels.attend.libraries`), in this order:
1. what the call names (`backend=`), or HOTLOOP_ATTENTION, or ours where HOTLOOP_KERNELS names `attention`;
2. the fastest of those that are installed, by the order that `hotloop tune` measured on this GPU;
3. where nothing was measured, the first of BACKENDS that runs here; on a CPU the reference.
What is named and cannot run is an error that says how to get it.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import cache_key, dispatch, reference, tuning
from hotloop.kernels.attend.libraries import BACKENDS, Backend
from hotloop.kernels.dispatch import KernelError

__all__ = ["attention", "backends", "document_offsets", "ranking_key"]

ASKED = os.environ.get("HOTLOOP_ATTENTION", "")
NAMES = (*BACKENDS, "reference")


# ---- which one ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is known of one device type.

    Attributes:
        forced: the name that was asked for; "" for none.
        able: backends that run on this device, in the order of BACKENDS.
        unable: the others -> why.
        unbanded: backends that take no window narrower than the row here -> why.
        ranking: by shape, backends from the fastest, as measured on this GPU.
        device: in words.
    """

    forced: str
    able: tuple[str, ...]
    unable: dict[str, str]
    unbanded: dict[str, str]
    ranking: dict[str, list[str]]
    device: str


_plans: dict[str, Plan] = {}


def _plan(device: str) -> Plan:
    """Decided once a process."""
    if device not in _plans:
        cache_key.mark()
        _plans[device] = _make_plan(device)
    return _plans[device]


def _make_plan(device: str) -> Plan:
    # HOTLOOP_KERNELS speaks of our kernels alone: it asks for ours by name, leaves ours out, or (auto, triton) leaves
    # the choice to the ranking. Through the interpreter, on a CPU, nothing else runs that could be ranked.
    chosen = dispatch.selection().get("attention", "")
    ours = dispatch.auto() or chosen == "triton"
    named = chosen and (dispatch.ASKED != "triton" or device != "cuda")
    forced = ASKED or (chosen if named else "")
    if forced and forced not in NAMES:
        raise KernelError(f"HOTLOOP_ATTENTION={forced!r} is no backend; they are {', '.join(NAMES)}")
    unable = {name: why for name, backend in BACKENDS.items() if (why := _unable(backend, device))}
    if not ours and forced != "triton":
        unable.setdefault("triton", f"HOTLOOP_KERNELS={dispatch.ASKED} leaves it out")
    ranking: dict[str, list[str]] = {}
    words = "interpreter" if forced == "triton" else device
    if device == "cuda":
        ranking = tuning.measured("attention")
        words = f"cuda sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        unasked = [name for name, backend in BACKENDS.items() if backend.unasked]
        for names in [[forced]] if forced else [*ranking.values(), unasked]:  # in each, down to one that is right
            for name in names:
                if name == "reference" or name in unable:
                    continue
                if BACKENDS[name].trusted or not (wrong := _wrong(name)):
                    break
                unable[name] = wrong
    if forced in unable:
        raise KernelError(f"attention backend {forced} was asked for and cannot run: {unable[forced]}")
    able = tuple(name for name in BACKENDS if name not in unable)
    unbanded = {name: why for name in able if (why := BACKENDS[name].missing(banded=True))}
    return Plan(forced, able, unable, unbanded, ranking, words)


def _first(unable: dict[str, str]) -> str:
    """The backend of a GPU that was never measured."""
    return next((name for name, backend in BACKENDS.items() if name not in unable and backend.unasked), "")


def _unable(backend: Backend, device: str) -> str:
    """Why a backend cannot run on this device type; empty where it can."""
    if missing := backend.missing():
        return missing
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        known = ", ".join(f"{c}.x" for c in backend.capabilities)
        return "" if major in backend.capabilities else f"it runs on compute capability {known}, not {major}.{minor}"
    if backend.name == "triton" and dispatch.HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"it needs CUDA, and the tensors are on {device}"


@functools.cache
@torch.inference_mode(False)  # the first call may be an evaluation's
@torch.enable_grad()
@torch.autocast("cuda", enabled=False)
def _wrong(name: str, device: str = "cuda") -> str:
    """What is wrong with a backend that others wrote, tried on a small example; empty where nothing is. A package of
    another version can take its arguments otherwise, and then computes something else without a word.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (
        torch.randn(2, 256, heads, 64, device=device, generator=generator).bfloat16() for heads in (2, 1, 1, 2)
    )
    for window in (256, 100):
        if BACKENDS[name].missing(banded=window < 255):
            continue
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        wide = [x.float().requires_grad_() for x in (q, k, v)]
        try:
            mine, _lse = _op(inputs[0], inputs[1], inputs[2], window, name, None, None, None)
            found, again = ([mine, *torch.autograd.grad(mine, inputs, do, retain_graph=True)] for _ in range(2))
        except Exception as e:  # whatever somebody else's package raises
            return f"it fails here: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        if not all(map(torch.equal, found, again)):
            return f"its gradients do not repeat to the bit at a window of {window}"
        true = reference.attention(wide[0], wide[1], wide[2], window)
        for ours, theirs in zip(found, [true.detach(), *torch.autograd.grad(true, wide, do.float())], strict=True):
            error = float((ours.detach().float() - theirs).norm() / theirs.norm())
            if not error < 2e-2:
                return f"its answers are wrong here: off by {error:.1e} at a window of {window}"
    return ""


def ranking_key(head_dim: int, t: int, window: int) -> str:
    return f"K={head_dim} T={t} W={min(window, t)}"


def _ranked(plan: Plan, head_dim: int, t: int, window: int) -> list[str]:
    """Backends from the fastest for such a call: the measured ranking of the nearest length, then the rest in order."""
    banded, best, nearest = window < t - 1, [], math.inf
    for key, names in plan.ranking.items():
        k, measured_t, w = (int(part.split("=")[1]) for part in key.split())
        distance = max(measured_t / t, t / measured_t)
        if k == head_dim and (w < measured_t - 1) == banded and distance < nearest:
            best, nearest = names, distance
    return [*best, *(name for name in plan.able if name not in best and BACKENDS[name].unasked)]


@torch.compiler.assume_constant_result
def _choose(
    device: str, dtype: torch.dtype, t: int, head_dim: int, window: int, documents: int, named: str | None
) -> str:
    """The backend of one call, decided outside of the graph that is compiled; `documents`: at most so many, 0 for none.
    Raises KernelError where the one that is asked for cannot serve it.
    """
    dispatch.note("attention")
    plan = _plan(device)

    def refusal(name: str) -> str:
        why = plan.unable.get(name, "") or (plan.unbanded.get(name, "") if window < t - 1 else "")
        return why or BACKENDS[name].refusal(dtype, head_dim, documents)

    key = ranking_key(head_dim, t, window)
    forced = named or plan.forced
    if forced not in ("", *NAMES):
        raise KernelError(f"attention has no backend {forced!r}; they are {', '.join(NAMES)}")
    if forced not in ("", "reference") and (why := refusal(forced)):
        raise KernelError(f"attention backend {forced} was asked for and cannot run: {why}")
    if forced or device != "cuda":
        return _noted(device, key, forced or "reference")
    found = next((name for name in _ranked(plan, head_dim, t, window) if not refusal(name)), "")
    if not found:
        warnings.warn(
            f"no fast attention serves {dtype} with head dim {head_dim}{' and documents' if documents else ''}: the "
            "reference runs, which forms all scores",
            stacklevel=2,
        )
    return _noted(device, key, found or "reference")


_ran: dict[str, set[str]] = {}  # device type -> what was chosen for its calls


def _noted(device: str, key: str, name: str) -> str:
    _ran.setdefault(device, set()).add(f"{key}: {name}")
    return name


def backends(device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(backends that run on this device type, the others with why not)."""
    plan = _plan(device)
    return plan.able, plan.unable


def _first_of(plan: Plan, key: str, names: list[str]) -> str:
    """Of a measured order, what runs here."""
    t, w = (int(part.split("=")[1]) for part in key.split()[1:])
    here = [name for name in plan.able if w >= t - 1 or name not in plan.unbanded]
    return next((name for name in names if name in here), "reference")


def _describe(device: str) -> str:
    """For `kernels.implementations` and every record: on a GPU what ran; before that, what would."""
    plan = _plan(device)
    if plan.forced:
        return "reference: asked for" if plan.forced == "reference" else f"{plan.forced}: {plan.device}"
    if device != "cuda":
        return f"reference: {device} tensors"
    told = sorted(_ran.get(device, ())) or [
        f"{key}: {_first_of(plan, key, names)}" for key, names in plan.ranking.items()
    ]
    if not told:
        return f"{_first(plan.unable) or 'reference'}: {plan.device}, where none was measured"
    return "; ".join(told) + f" ({'; '.join(filter(None, (plan.device, tuning.notice())))})"


dispatch.describe["attention"] = _describe


# ---- operators ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, window: int, backend: str, offsets: Tensor | None, first: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, T, H, K], k and v [B, T, G, K]; offsets int32 [N + 1], first and last int32 [B, T], or None ->
    (o [B, T, H, K], lse fp32 [B, H, T]).
    """
    forward = BACKENDS[backend].forward
    assert forward is not None
    o, lse = forward(q, k, v, window, offsets, None if first is None else (first, last))
    return o.contiguous(), lse.contiguous()


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, window: int, backend: str, offsets: Tensor | None, first: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, t, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, t), dtype=torch.float32)


@torch.library.custom_op("hotloop::attention_backward", mutates_args=())
def _backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, backend: str,
    offsets: Tensor | None, first: Tensor | None, last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    backward = BACKENDS[backend].backward
    assert backward is not None
    dq, dk, dv = backward(do, q, k, v, o, lse, window, offsets, None if first is None else (first, last))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, backend: str,
    offsets: Tensor | None, first: Tensor | None, last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window, ctx.backend, offsets, first, last = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, first, last)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, _unused: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, offsets, first, last = ctx.saved_tensors
    if do is None:
        return (None,) * 8
    grads = _backward_op(do, q, k, v, o, lse, ctx.window, ctx.backend, offsets, first, last)
    return *grads, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _pairs(q: Any, window: int) -> int:
    """Query-key pairs under the causal mask and the window, all heads and rows; documents are data and not counted."""
    b, t, heads = q[0], q[1], q[2]
    w = min(window, t - 1)
    return int(b * heads * (t * (w + 1) - w * (w + 1) // 2))


@register_flop_formula(torch.ops.hotloop.attention)
def _flops(q: Any, k: Any, v: Any, window: int, *args: Any, **kwargs: Any) -> int:
    return 4 * int(q[3]) * _pairs(q, window)


@register_flop_formula(torch.ops.hotloop.attention_backward)
def _backward_flops(do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, window: int, *args: Any, **kwargs: Any) -> int:
    return 10 * int(q[3]) * _pairs(q, window)


# ---- public functions ---------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention with a sliding window, grouped heads and documents; see `reference`.

    Args:
        q: [B, T, H, K]; under autocast it, k and v are taken in the autocast dtype.
        k, v: [B, T, G, K], G dividing H.
        window: keys before the query's own that it sees; T - 1 or more is full attention.
        cu_seqlens: integers [N + 1], where the documents of the packed rows begin in the B T tokens: rising from 0 to
            B T, a value that comes twice is an empty document. The end of a row ends a document in any case.
        backend: one of flash3, torch, flash4, flash2, cudnn, flex, triton, reference; None for the best.

    Returns:
        [B, T, H, K].

    Raises:
        KernelError: shapes or types that cannot be, or a backend that was named and cannot run.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, window)
    t, head_dim = q.shape[1], q.shape[3]
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1 + q.shape[0]  # the ends of rows cut them
    name = _choose(q.device.type, q.dtype, t, head_dim, window, documents, backend)
    if name == "reference":
        return reference.attention(q, k, v, window, cu_seqlens)
    offsets, first, last = None, None, None
    if cu_seqlens is not None:
        offsets, first, last = _bounds(cu_seqlens, q.shape[0], t)
    own = BACKENDS[name].own
    if own is not None:
        return own(q, k, v, window, None if first is None else (first, last))
    out: Tensor = _op(q, k, v, window, name, offsets, first, last)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, window: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise KernelError(f"attention needs q [B, T, H, K] and k, v [B, T, G, K], not {shapes}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise KernelError(f"attention needs heads in equal groups, not {q.shape[2]} in {k.shape[2]}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise KernelError(f"attention needs q, k and v of one type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if window < 0:
        raise KernelError(f"attention needs a window of 0 or more, not {window}")


def _bounds(cu_seqlens: Tensor, b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets int32 [N + B + 2], the ends of rows among them; each token's document within its row, first token
    and one past its last, int32 [B, T]).
    """
    rows = torch.arange(0, b * t + 1, t, device=cu_seqlens.device)
    offsets = torch.cat((cu_seqlens.long().clamp(0, b * t), rows)).sort().values
    token = torch.arange(b * t, device=cu_seqlens.device)
    after = torch.searchsorted(offsets, token, right=True)
    row = token // t * t
    first, last = offsets[after - 1] - row, offsets[after] - row
    return offsets.int(), first.int().view(b, t), last.int().view(b, t)


def document_offsets(tokens: Tensor, start: int, most: int | None = None) -> Tensor:
    """Where documents begin, for `attention`'s cu_seqlens: at each row's beginning and at each token `start`.

    Args:
        tokens: int64 [B, T].
        start: the token that every document begins with.
        most: documents that there can be, rows that begin within one counted; None for B T, as if each token were one.
            The flash backends launch for each and serve up to 65,535. Where there are more after all, the last ones
            count as one.

    Returns:
        int32 [most + 1], the documents' first positions in the flattened tokens, filled up with B T, so that its shape
        depends on no value.
    """
    flat = tokens.flatten()
    begins = flat == start
    begins[:: tokens.shape[1]] = True
    position = torch.arange(len(flat) + 1, device=tokens.device, dtype=torch.int32)
    found = torch.where(begins, position[:-1], len(flat)).sort().values
    return torch.cat((found[:most], position[-1:]))
