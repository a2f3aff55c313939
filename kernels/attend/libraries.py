"""The implementations of attention that `kernels.attention` chooses from, each behind the same two functions.

    forward(q, k, v, window, offsets, bounds) -> (o, lse)
    backward(do, q, k, v, o, lse, window, offsets, bounds) -> (dq, dk, dv)

Shapes: q, o, do [B, T, H, K]; k and v [B, T, G, K]; lse fp32 [B, H, T], natural logarithms. `offsets` (int32
[N + 1], of all tokens) and `bounds` (two int32 [B, T]) say where documents begin and end, or are None.

What other people wrote runs with its deterministic flag where it has one, since runs must repeat to the bit: cuDNN's
whole rows through torch have none, and what was measured to vary is ranked nowhere. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.architectures import MAJORS
from hotloop.kernels.attend import flash

__all__ = ["BACKENDS", "Backend"]

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: for HOTLOOP_ATTENTION and `backend=`.
        module: that must be importable; "" for torch itself.
        install: how to get it.
        band_module: that must be importable for windows narrower than the row.
        capabilities: major compute capabilities of NVIDIA GPUs that it runs on.
        dtypes: that it takes.
        documents: how many it takes in all rows together; 0 for none.
        forward, backward: see above; None for one that differentiates itself (`own`).
        head_dims: that it takes; () for any multiple of 8 up to 256.
        trusted: ours or torch's; what others wrote is tried on a small example before it is used.
        unasked: whether it is taken on a GPU where nothing was measured.
    """

    name: str
    module: str
    install: str
    capabilities: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = HALVES
    band_module: str = ""
    documents: int = 65_535  # those of FlashAttention launch a grid with that as its limit
    forward: Forward | None = None
    backward: Backward | None = None
    own: Callable[..., Tensor] | None = None
    head_dims: tuple[int, ...] = ()
    trusted: bool = False
    unasked: bool = True

    def missing(self, banded: bool = False) -> str:
        """Why it is not installed, and how to mend that; empty where it is. `banded`: for narrower windows."""
        if not _importable(self.module):
            return f"{self.module} is not installed; {self.install}"
        if banded and not _importable(self.band_module):
            return f"windows narrower than the row need {self.band_module}; {self.install}"
        return ""

    def refusal(self, dtype: torch.dtype, head_dim: int, documents: int) -> str:
        """Why it does not serve such a call; empty where it does. `documents`: 0 for none."""
        if dtype not in self.dtypes:
            return f"it takes {', '.join(str(d)[6:] for d in self.dtypes)}, not {str(dtype)[6:]}"
        if (self.head_dims and head_dim not in self.head_dims) or head_dim % 8 or head_dim > 256:
            return f"it takes head dims {', '.join(map(str, self.head_dims)) or '8, 16, .. 256'}, not {head_dim}"
        if documents > self.documents:
            most = f"up to {self.documents} documents, not {documents}; document_offsets has an argument for that"
            return f"it takes {most}" if self.documents else "it has no documents"
        return ""


@functools.cache
def _importable(module: str) -> bool:
    try:
        return not module or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package that is not there, or is broken
        return False


def _left(window: int, t: int) -> int:
    """FlashAttention's left window: -1 for all."""
    return window if window < t - 1 else -1


def _lse_by_row(lse: Tensor, b: int, t: int) -> Tensor:
    """[H, B T], as it comes where documents are packed -> [B, H, T]."""
    return lse.view(-1, b, t).transpose(0, 1)


def _lse_packed(lse: Tensor) -> Tensor:
    """The way back."""
    return lse.transpose(0, 1).flatten(1)


def _packed(*tensors: Tensor) -> list[Tensor]:
    """[B, T, heads, K] -> [B T, heads, K]."""
    return [x.contiguous().flatten(0, 1) for x in tensors]


# ---- ours ---------------------------------------------------------------------------------------------------------


def _documents(bounds: tuple[Tensor, Tensor] | None) -> flash.Documents | None:
    return flash.Documents(*bounds) if bounds else None


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    return flash.forward(q, k, v, window, _documents(bounds))


def _triton_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return flash.backward(do, q, k, v, o, lse, window, _documents(bounds))


# ---- FlashAttention 2: the copy in torch, and the package ---------------------------------------------------------


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    shape, left = q.shape, _left(window, t)
    if offsets is not None:
        q, k, v = _packed(q, k, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, t, t, 0.0, True, False,
        window_size_left=None if left < 0 else left, window_size_right=None if left < 0 else 0,
    )  # fmt: skip
    return out.view(shape), lse if offsets is None else _lse_by_row(lse, *shape[:2])


def _torch_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    t = q.shape[1]
    shapes, left = (q.shape, k.shape, v.shape), _left(window, t)
    if offsets is not None:
        do, q, k, v, o = _packed(do, q, k, v, o)
        lse = _lse_packed(lse)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a generator that nothing is drawn from
    with _deterministic():
        grads = torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, lse, offsets, offsets, t, t, 0.0, True, state, state.new_empty(0),
            window_size_left=None if left < 0 else left, window_size_right=None if left < 0 else 0,
        )  # fmt: skip
    dq, dk, dv = (g.view(shape) for g, shape in zip(grads, shapes, strict=True))
    return dq, dk, dv


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """The mode that torch's flash attention takes as an order: under warn_only it warns, and adds by atomics. What the
    mode fills anew is memory that is written anyway.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _flash2_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    t, shape, scale = q.shape[1], q.shape, q.shape[-1] ** -0.5
    rest = dict(
        dropout_p=0.0, softmax_scale=scale, causal=True, window_size_left=_left(window, t), window_size_right=0,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    if offsets is None:
        out, lse, *_ = interface._flash_attn_forward(q, k, v, **rest)
    else:
        q, k, v = _packed(q, k, v)
        out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, offsets, offsets, t, t, **rest)
    return out.view(shape), lse if offsets is None else _lse_by_row(lse, *shape[:2])


def _flash2_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    t, scale = q.shape[1], q.shape[-1] ** -0.5
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rest = dict(
        dropout_p=0.0, softmax_scale=scale, causal=True, window_size_left=_left(window, t), window_size_right=0,
        softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    if offsets is None:
        interface._flash_attn_backward(do, q, k, v, o, lse, dq, dk, dv, **rest)
    else:
        do, q, k, v, o = _packed(do, q, k, v, o)
        lse = _lse_packed(lse)
        flat = [x.flatten(0, 1) for x in (dq, dk, dv)]
        interface._flash_attn_varlen_backward(do, q, k, v, o, lse, *flat, offsets, offsets, t, t, **rest)
    return dq, dk, dv


# ---- FlashAttention 3 and 4 ---------------------------------------------------------------------------------------


def _flash3_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn_interface")
    t, shape = q.shape[1], q.shape
    rest: dict[str, Any] = dict(causal=True, window_size_left=_left(window, t), window_size_right=0)
    if offsets is not None:
        q, k, v = _packed(q, k, v)
        rest |= dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=t, max_seqlen_k=t)
    out, lse, *_ = interface._flash_attn_forward(q, k, v, softmax_scale=shape[-1] ** -0.5, **rest)
    return out.view(shape), lse if offsets is None else _lse_by_row(lse, *shape[:2])


def _flash3_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn_interface")
    t, scale = q.shape[1], q.shape[-1] ** -0.5
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rest: dict[str, Any] = dict(
        softmax_scale=scale, is_causal=True, window_size_left=_left(window, t), window_size_right=0, deterministic=True,
        dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    if offsets is not None:
        do, q, k, v, o = _packed(do, q, k, v, o)
        lse = _lse_packed(lse)
        rest |= dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=t, max_seqlen_k=t)
        rest |= {name: rest[name].flatten(0, 1) for name in ("dq", "dk", "dv")}
    interface._flash_attn_backward(do, q, k, v, o, lse, **rest)
    return dq, dk, dv


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    t, shape = q.shape[1], q.shape
    rest: dict[str, Any] = dict(causal=True)
    if window < t - 1:
        rest = dict(causal=False, window_size_left=window, window_size_right=0)
    if offsets is not None:
        q, k, v = _packed(q, k, v)
        rest |= dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=t, max_seqlen_k=t)
    out, lse, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=shape[-1] ** -0.5, return_lse=True, **rest)
    return out.view(shape), lse if offsets is None else _lse_by_row(lse, *shape[:2])


def _flash4_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    t, scale, shapes = q.shape[1], q.shape[-1] ** -0.5, (q.shape, k.shape, v.shape)
    rest: dict[str, Any] = dict(causal=True)
    if window < t - 1:
        rest = dict(causal=False, window_size_left=window, window_size_right=0)
    if offsets is not None:
        do, q, k, v, o = _packed(do, q, k, v, o)
        lse = _lse_packed(lse)
        rest |= dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=t, max_seqlen_k=t)
    found = interface._flash_attn_bwd(
        q, k, v, o, do.contiguous(), lse, softmax_scale=scale, deterministic=True, **rest
    )  # fmt: skip
    dq, dk, dv = (g.view(shape) for g, shape in zip(found[:3], shapes, strict=True))
    return dq, dk, dv


# ---- cuDNN: full windows through torch, bands through its front end ------------------------------------------------


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, offsets: Tensor | None, bounds: Any
) -> tuple[Tensor, Tensor]:
    if window < q.shape[1] - 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], 1, dtype=torch.float32, device=q.device)
        _execute(_graph("forward", q.shape, k.shape[2], q.dtype, window), q=q, k=k, v=v, o=o, stats=lse)
        return o, lse.squeeze(-1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True, False
    )
    return out.transpose(1, 2), lse.view(q.shape[0], q.shape[2], q.shape[1])


def _cudnn_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    offsets: Tensor | None,
    bounds: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    t, stats = q.shape[1], lse.unsqueeze(-1).contiguous()
    if window < t - 1:
        do, q, k, v, o = (x.contiguous() for x in (do, q, k, v, o))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        graph = _graph("backward", q.shape, k.shape[2], q.dtype, window)
        _execute(graph, do=do, q=q, k=k, v=v, o=o, stats=stats, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv
    state = torch.zeros((), dtype=torch.int64, device=q.device)  # of a generator that nothing is drawn from
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (do, q, k, v, o)), stats, state, state, None, None, None, t, t, 0.0, True
    )
    dq, dk, dv = (g.transpose(1, 2) for g in found)
    return dq, dk, dv


@functools.cache
def _graph(way: str, shape: torch.Size, groups: int, dtype: torch.dtype, window: int) -> tuple[Any, dict[str, Any]]:
    """(a built cuDNN graph of banded attention, its tensors by name), for contiguous [B, T, heads, K]."""
    cudnn = importlib.import_module("cudnn")
    b, t, heads, head_dim = shape
    kind = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT
    )

    def of(name: str, n: int) -> Any:
        stride = [t * n * head_dim, head_dim, n * head_dim, 1]
        return graph.tensor(name=name, dim=[b, n, t, head_dim], stride=stride, data_type=kind)

    def out(tensor: Any, n: int) -> Any:
        return tensor.set_output(True).set_dim([b, n, t, head_dim]).set_stride(
            [t * n * head_dim, head_dim, n * head_dim, 1]
        )  # fmt: skip

    tensors = {"q": of("q", heads), "k": of("k", groups), "v": of("v", groups)}
    # Its left bound counts the query's own key, which ours does not.
    band = dict(
        attn_scale=head_dim**-0.5, diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        diagonal_band_left_bound=window + 1, diagonal_band_right_bound=0,
    )  # fmt: skip
    if way == "forward":
        o, stats = graph.sdpa(**tensors, **band, generate_stats=True)
        tensors |= {"o": out(o, heads), "stats": stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)}
    else:
        stats = graph.tensor(
            name="stats", dim=[b, heads, t, 1], stride=[heads * t, t, 1, 1], data_type=cudnn.data_type.FLOAT
        )
        tensors |= {"o": of("o", heads), "do": of("do", heads), "stats": stats}
        dq, dk, dv = graph.sdpa_backward(
            q=tensors["q"], k=tensors["k"], v=tensors["v"], o=tensors["o"], dO=tensors["do"], stats=stats, **band,
            use_deterministic_algorithm=True,
        )  # fmt: skip
        tensors |= {"dq": out(dq, heads), "dk": out(dk, groups), "dv": out(dv, groups)}
    graph.build([cudnn.heur_mode.A])
    return graph, tensors


def _execute(built: tuple[Any, dict[str, Any]], **values: Tensor) -> None:
    cudnn = importlib.import_module("cudnn")
    graph, tensors = built
    device = values["q"].device
    handle = _cudnn_handle(device.index or 0)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    space = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    graph.execute({tensors[name]: value for name, value in values.items()}, space, handle=handle)


@functools.cache
def _cudnn_handle(index: int) -> Any:
    return importlib.import_module("cudnn").create_handle()


# ---- FlexAttention ------------------------------------------------------------------------------------------------


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """torch's FlexAttention. Inside torch.compile it is part of the graph; outside, on a GPU, compiled by itself."""
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    if torch.compiler.is_compiling():
        mask = _flex_mask(q.shape[0], q.shape[1], window, q.device.type, bounds)
    else:
        known = _flex_mask if bounds else _flex_mask_kept
        mask = known(q.shape[0], q.shape[1], window, q.device.type, bounds)
        function = _flex_compiled() if q.is_cuda else flex_attention
    heads = q.shape[2]
    out: Tensor = function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=k.shape[2] != heads
    )
    return out.transpose(1, 2)


def _flex_mask(b: int, t: int, window: int, device: str, bounds: tuple[Tensor, Tensor] | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i) & (i - j <= window)
        return inside if bounds is None else inside & (j >= bounds[0][b, i])

    return create_block_mask(seen, b if bounds else None, None, t, t, device=device)


_flex_mask_kept = functools.lru_cache(maxsize=8)(_flex_mask)  # without documents it depends on sizes alone


@functools.cache
def _flex_compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# ---- the table ----------------------------------------------------------------------------------------------------

# In the order in which they are taken on a GPU that was never measured: what its makers measured to be faster first.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "flash3", "flash_attn_interface",
            "hotloop install flash3, or build it from the hopper folder of github.com/Dao-AILab/flash-attention",
            (9,), forward=_flash3_forward, backward=_flash3_backward,
        ),
        Backend(
            "flash4", "flash_attn.cute", "pip install 'hotloop[flash]'", (9, 10), head_dims=(64, 128),
            forward=_flash4_forward, backward=_flash4_backward,
        ),
        Backend(
            "torch", "", "", (8, 9, 10, 12), forward=_torch_forward, backward=_torch_backward, trusted=True,
        ),
        Backend(
            "flash2", "flash_attn.flash_attn_interface", "pip install flash-attn (it builds for an hour)",
            (8, 9, 10, 12), forward=_flash2_forward, backward=_flash2_backward,
        ),
        Backend(
            "cudnn", "", "pip install nvidia-cudnn-frontend", (8, 9, 10), band_module="cudnn", documents=0,
            head_dims=(64, 128), forward=_cudnn_forward, backward=_cudnn_backward,
        ),
        Backend(
            "flex", "", "", (8, 9, 10, 12), dtypes=(*HALVES, torch.float32), own=_flex, trusted=True, unasked=False,
            documents=2**31,
        ),
        Backend(
            "triton", "triton", "make install", MAJORS, dtypes=(*HALVES, torch.float32),
            head_dims=flash.HEAD_DIMS, forward=_triton_forward, backward=_triton_backward, trusted=True, unasked=False,
            documents=2**31,
        ),
    )
}  # fmt: skip
