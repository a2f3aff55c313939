"""The QKV projection with all that follows up to attention in its epilogue: `kernels.qkv` with nothing in between.

    s = x W^T, head by head;  q, k: out = rotate(s) / sqrt(mean(rotate(s)^2) + 2^-23);  v: out = s + 2 sigmoid(gate) ve

A tile is one or two whole heads wide, so norm and rotation stay inside of it and s is never written. The backward pass
needs no s either: with n = q or k as attention took them and r the reciprocal root, saved in fp32, dy = r (h - n mean(h
n)), ds = rotate^-1(dy), by the kernel of `kernels.qkv`; then dx = ds W and dW = ds^T x, by
`kernels.weight_gradient` while `linear` is on, else the vendor library's.

Bytes, elements of b bytes, M tokens, width D, N = (H + 2G) K: forward read x and ve, write q, k, v: M (D + G K + N) b.
Backward read the three gradients, q, k and ve, write ds and dve: M (2 N + (H + G) K + 2 G K) b; then ds twice and x,
write dx: M (2 N + 2 D) b. Weights, r and gates come on top. Operations: 2 M D N forward, twice that backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import product, qkv, reference
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose
from hotloop.kernels.weight_gradient import weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.product import dot, halves, load_tile, tile_order
    from hotloop.kernels.residual_stream import row_root

__all__ = ["compile_cases", "default_config", "empty", "launch", "linear_qkv_rope_norm", "search_space"]

HEAD_DIMS = (16, 32, 64, 128)


def launch_config(head_dim: int, dtype: torch.dtype, width: int) -> dict[str, int]:
    """As tuned on this GPU, else by architecture."""
    default = functools.partial(default_config, head_dim, width)
    return product.launch_config("linear_qkv", config_key(head_dim, width), default, dtype, width)


def config_key(head_dim: int, width: int) -> str:
    """What is tuned apart: sizes of heads, sums over few and over many."""
    return f"K={head_dim} {product.config_key(width)}"


def default_config(head_dim: int, width: int, modern: bool = True) -> dict[str, int]:
    """By descriptors on Hopper and later, there two heads a tile for long sums; else as many, up to two, as 128 columns
    hold.
    """
    columns = 256 if modern and width > product.SHORT else 128
    heads = 2 if 2 * head_dim <= columns else 1
    return {
        "ROWS": 128, "HEADS": heads, "DEPTH": 64 if modern else 32, "GROUP": 16, "TMA": int(modern),
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def search_space(head_dim: int, width: int) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    return [
        {
            "ROWS": rows, "HEADS": heads, "DEPTH": depth, "GROUP": group, "TMA": tma, "num_warps": warps,
            "num_stages": stages,
        }
        for rows, columns, warps in product.tiles(width)
        for heads in {1, 2} & {columns // head_dim}
        for depth, stages in ((64, 3), (64, 4), (32, 4), (128, 2))
        for group in (8, 16)
        for tma in (1, 0)
    ]  # fmt: skip


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _finish(
        s, head, row, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, T, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """One head of the product, fp32 [ROWS, K], to its place in q, k or v."""
        a, b = halves(s, ROWS, K)
        half = tl.arange(0, K // 2)[None, :]
        wide = row.to(tl.int64)[:, None]
        inside = (row < M)[:, None]
        if head < H + G:
            angle = (row % T)[:, None] * (K // 2) + half
            cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
            y1 = a * cos + b * sin
            y2 = b * cos - a * sin
            r = tl.rsqrt((tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)) / K + eps)[:, None]
            p_out = q_ptr + (wide * H + head) * K + half
            if head >= H:
                p_out = k_ptr + (wide * G + head - H) * K + half
            tl.store(r_ptr + wide * (H + G) + head, r, mask=inside)
            tl.store(p_out, (y1 * r).to(q_ptr.dtype.element_ty), mask=inside)
            tl.store(p_out + K // 2, (y2 * r).to(q_ptr.dtype.element_ty), mask=inside)
        elif head < H + 2 * G:  # a tile may reach past the last head
            own = wide * G + head - H - G
            if VE:
                gate = 2.0 * tl.sigmoid(tl.load(gate_ptr + own, mask=inside, other=0.0).to(tl.float32))
                a += gate * tl.load(ve_ptr + own * K + half, mask=inside, other=0.0).to(tl.float32)
                b += gate * tl.load(ve_ptr + own * K + half + K // 2, mask=inside, other=0.0).to(tl.float32)
            tl.store(v_ptr + own * K + half, a.to(v_ptr.dtype.element_ty), mask=inside)
            tl.store(v_ptr + own * K + half + K // 2, b.to(v_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _linear_qkv_kernel(
        x, w, squares_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, D, T, PARTS, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
        HEADS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """x [M, D], w [(H + 2G) K, D] -> q [M, H, K], k and v [M, G, K], r fp32 [M, H + G]. NORM: rows of x are yet to
        be normalised, by squares fp32 [PARTS, M].
        """
        N: tl.constexpr = (H + 2 * G) * K
        tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), (H + 2 * G + HEADS - 1) // HEADS, GROUP)
        first = tile_m * ROWS
        head = tile_n * HEADS
        s = tl.zeros([ROWS, HEADS * K], tl.float32)
        for start in range(0, D, DEPTH):
            x_tile = load_tile(x, first, start, M, D, ROWS, DEPTH, TMA)
            w_tile = load_tile(w, head * K, start, N, D, HEADS * K, DEPTH, TMA)
            s = dot(x_tile, w_tile.T, s)
        row = first + tl.arange(0, ROWS)
        if NORM:
            s *= row_root(squares_ptr, row, PARTS, M, D, eps, ROWS)[:, None]
        if HEADS == 1:
            _finish(s, head, row, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, T, eps, H, G, K,
                    VE, ROWS)  # fmt: skip
        else:
            one, other = halves(s, ROWS, HEADS * K)
            _finish(one, head, row, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, T, eps, H, G, K,
                    VE, ROWS)  # fmt: skip
            _finish(other, head + 1, row, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, T, eps, H,
                    G, K, VE, ROWS)  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """For 16-bit elements and heads of 64 and 128, with and without value embeddings, of normalised rows and of others:
    default and tuned.
    """
    cases = []
    for head_dim in (64, 128):
        default = functools.partial(default_config, head_dim)
        shipped = product.shipped("linear_qkv", default, functools.partial(config_key, head_dim))
        for config, capabilities in shipped:
            for ve, norm in ((True, False), (False, False), (True, True), (False, True)):
                constants = {"H": 4, "G": 4, "K": head_dim, "VE": ve, "NORM": norm} | config
                options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
                depth, columns = config["DEPTH"], config["HEADS"] * head_dim
                names = ("x", "w", "cos_ptr", "sin_ptr", "ve_ptr", "gate_ptr", "q_ptr", "k_ptr", "v_ptr")
                signature = dict.fromkeys(names, "*bf16")
                if config["TMA"]:
                    signature["x"] = f"tensordesc<bf16[{config['ROWS']},{depth}]>"
                    signature["w"] = f"tensordesc<bf16[{columns},{depth}]>"
                signature |= {"squares_ptr": "*fp32", "r_ptr": "*fp32", "eps": "fp32"}
                signature |= dict.fromkeys(("M", "D", "T", "PARTS"), "i32")
                tile = f"{config['ROWS']}x{columns}x{depth}{' tma' if config['TMA'] else ''}"
                words = f"K={head_dim}{' ve' if ve else ''}{' norm' if norm else ''} {tile}"
                key = f"{words} warps={config['num_warps']} stages={config['num_stages']}"
                case = CompileCase(
                    key, _linear_qkv_kernel, signature, constants, options, capabilities, tensor_cores=True
                )
                cases.append(case)
    return cases


def launch(
    x: Tensor, weight: Tensor, partial: Tensor | None, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, T, D], weight [(H + 2G) K, D], and sums of squares fp32 [S, B T] where x is yet to be normalised ->
    q [B, T, H, K], k, v [B, T, G, K], r fp32 [B, T, H + G].
    """
    b, t, d = x.shape
    q, k, v, r = empty(x, weight, cos, heads)
    groups, head_dim = k.shape[2:]
    if b * t:
        config = launch_config(head_dim, x.dtype, d)
        rows, columns, depth, tma = config["ROWS"], config["HEADS"], config["DEPTH"], config["TMA"]
        grid = (-(-b * t // rows) * -(-(heads + 2 * groups) // columns),)
        _linear_qkv_kernel[grid](
            product.operand(x.view(-1, d), rows, depth, tma),
            product.operand(weight, columns * head_dim, depth, tma), x if partial is None else partial, cos, sin,
            x if ve is None else ve, x if gate is None else gate, q, k, v, r, b * t, d, t,
            0 if partial is None else partial.shape[0], reference.NORM_EPS,
            H=heads, G=groups, K=head_dim, VE=ve is not None, NORM=partial is not None, **config,
        )  # fmt: skip
    return q, k, v, r


def empty(x: Tensor, weight: Tensor, cos: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch` returns, uninitialised."""
    (b, t, _), k = x.shape, 2 * cos.shape[1]
    g = (weight.shape[0] // k - heads) // 2
    q, keys, v = (x.new_empty(b, t, n, k) for n in (heads, g, g))
    return q, keys, v, x.new_empty(b, t, heads + g, dtype=torch.float32)


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::linear_qkv_rope_norm", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, D], weight [(H + 2G) K, D] -> q [B, T, H, K], k, v [B, T, G, K], r fp32 [B, T, H + G]."""
    return launch(x, weight, None, cos, sin, ve, gate, heads)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(x, weight, cos, heads)


@torch.library.custom_op("hotloop::linear_qkv_rope_norm_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, r: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, dq: Tensor,
    dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k as they came out, r, and the gradients of q, k, v -> those of the product [B, T, H + 2G, K], ve and gate."""
    return qkv.launch_backward(None, (q, k, r), cos, sin, ve, gate, dq, dk, dv)[:3]


@_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, r: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.empty_gradients(dq, dk, ve, gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, cos, sin, ve, gate, _heads = inputs
    q, k, _v, r = output
    ctx.mark_non_differentiable(r)
    ctx.save_for_backward(x, weight, cos, sin, ve, gate, q, k, r)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, _unused: Any) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin, ve, gate, q, k, r = ctx.saved_tensors
    given = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    ds, dve, dgate = _backward_op(q, k, r, cos, sin, ve, gate, *given)
    flat = ds.view(-1, weight.shape[0])
    dx, dweight = (flat @ weight).view_as(x), weight_gradient(flat, x.view(-1, x.shape[-1]))
    return dx, dweight, None, None, dve if ve is not None else None, dgate if gate is not None else None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.linear_qkv_rope_norm)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * x[2] * weight[0])


# ---- public function --------------------------------------------------------------------------------------------


def check(
    name: str, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, ve: Tensor | None, gate: Tensor | None
) -> None:
    """Raises KernelError for what the kernel does not serve."""
    k = 2 * cos.shape[-1]
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] % k:
        raise KernelError(
            f"{name} needs x [B, T, D] and weight [(H + 2G) {k}, D], not {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype not in qkv.DTYPES or weight.dtype != x.dtype or k not in HEAD_DIMS:
        raise KernelError(
            f"{name} serves bfloat16, float16 and float32, x and weight alike, K one of {HEAD_DIMS}, not {x.dtype} and "
            f"{weight.dtype} with K = {k}"
        )
    qkv.check(x.shape[0], x.shape[1], weight.shape[0] // k, k, x.dtype, cos, sin, heads, ve, gate)


def linear_qkv_rope_norm(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    ve: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """QKV projection, rotary positions, QK-norm and gated value embeddings; see `reference`.

    Args:
        x: [B, T, D]; under autocast it, the weight, ve and gate are taken in the autocast dtype.
        weight: [(H + 2G) K, D]: rows of query heads, key heads, value heads; K one of 16, 32, 64, 128.
        cos, sin: [T, K/2]; no gradient.
        heads: H.
        ve: [B, T, G, K]; None for none. Comes with gate.
        gate: [B, T, G], before the sigmoid.

    Returns:
        q [B, T, H, K], k [B, T, G, K], v [B, T, G, K].

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    k = 2 * cos.shape[-1]
    if not choose("linear_qkv_rope_norm", x.device.type):
        return qkv.qkv_rope_norm(F.linear(x, weight).unflatten(-1, (-1, k)), cos, sin, heads, ve, gate)
    if (ve is None) != (gate is None):
        raise KernelError("ve and gate come together or not at all")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        ve, gate = (y if y is None else y.to(dtype) for y in (ve, gate))
    check("linear_qkv_rope_norm", x, weight, cos, sin, heads, ve, gate)
    x, weight, cos, sin = x.contiguous(), weight.contiguous(), cos.contiguous(), sin.contiguous()
    ve, gate = (y if y is None else y.contiguous() for y in (ve, gate))
    q, keys, v, _r = _op(x, weight, cos, sin, ve, gate, heads)
    return q, keys, v
