"""From the residual stream to what attention takes: norm, QKV projection, rotary positions, QK-norm, gated value
embeddings, in the epilogue of one product.

    r = 1 / sqrt(mean(x^2) + 2^-23);  s = r x W^T, head by head;  gate = r x[:C] W_gate^T
    q, k: rotate(s) / sqrt(mean(rotate(s)^2) + 2^-23);  v: s + 2 sigmoid(gate) ve

rotate takes the halves (a, b) of a head to (a cos + b sin, b cos - a sin). A tile is one or two whole heads wide, so
norm and rotation stay inside of it and s is never written. Backward (`kernels.block.qkv_backward`) needs no s either,
but q, k, v as attention took them and the heads' reciprocal roots, saved in fp32; then dx and dW = ds^T x, by
`kernels.block.stream`. x itself goes through this operator, so that the gradient of what the stream becomes next is
added in the epilogue of that of x, and no pass adds the two.

Bytes, elements of b bytes, M tokens, width D, N = (H + 2G) K: forward read x and ve, write q, k, v: M (D + G K + N) b.
Backward read the three gradients, q, k, v and ve, write ds and dve: M (2 N + (H + G) K + 3 G K) b; then ds twice, x
twice, g, write dx: M (2 N + 4 D) b. Weights, roots and gates come on top. Operations: 2 M D N forward, twice that
backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference
from hotloop.kernels.block import qkv_backward, stream
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.fuse.terms import Term, same
from hotloop.kernels.gemm import product
from hotloop.kernels.gemm.weight_gradient import weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.block.stream import row_root
    from hotloop.kernels.gemm.product import halves, multiply, tile_order

__all__ = ["NAME", "compile_cases", "default_config", "find", "qkv", "search_space"]

NAME = "qkv"
HEAD_DIMS = (16, 32, 64, 128)


def launch_config(head_dim: int, dtype: torch.dtype, width: int) -> dict[str, int]:
    """As tuned on this GPU, else by architecture."""
    default = functools.partial(default_config, head_dim, width)
    return product.launch_config("qkv", config_key(head_dim, width), default, dtype, width)


def config_key(head_dim: int, width: int) -> str:
    """What is tuned apart: sizes of heads, sums over few and over many."""
    return f"K={head_dim} {product.config_key(width)}"


def default_config(head_dim: int, width: int, modern: bool = True) -> dict[str, int]:
    """By descriptors on Hopper and later, there two heads a tile for long sums; else as many, up to two, as 128 columns
    hold.
    """
    config = product.default_config(width, modern)
    return config | {"HEADS": 2 if 2 * head_dim <= config.pop("COLUMNS") else 1}


def search_space(head_dim: int, width: int) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    found = product.search_space(product.tiles(width), (8, 16), ((64, 3), (64, 4), (32, 4), (128, 2)))
    sized = [config | {"HEADS": config.pop("COLUMNS") // head_dim} for config in found]
    return [config for config in sized if config["HEADS"] in (1, 2)]


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
    def _qkv_kernel(
        x, w, squares_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_ptr, k_ptr, v_ptr, r_ptr, M, D, T, PARTS, eps,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, VE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
        DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """x [M, D], w [(H + 2G) K, D], squares fp32 [PARTS, M] -> q [M, H, K], k and v [M, G, K], r fp32 [M, H + G]."""
        N: tl.constexpr = (H + 2 * G) * K
        tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), (H + 2 * G + HEADS - 1) // HEADS, GROUP)
        first = tile_m * ROWS
        head = tile_n * HEADS
        s = multiply(x, w, first, head * K, M, N, D, ROWS, HEADS * K, DEPTH, TMA, True)
        row = first + tl.arange(0, ROWS)
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
    """For 16-bit elements and heads of 64 and 128, with and without value embeddings: default and tuned."""
    types = {
        "*bf16": "cos_ptr sin_ptr ve_ptr gate_ptr q_ptr k_ptr v_ptr", "*fp32": "squares_ptr r_ptr", "fp32": "eps",
        "i32": "M D T PARTS",
    }  # fmt: skip
    cases = []
    for head_dim in (64, 128):
        default = functools.partial(default_config, head_dim)
        for config, capabilities in product.shipped(NAME, default, functools.partial(config_key, head_dim)):
            rows, columns, depth = config["ROWS"], config["HEADS"] * head_dim, config["DEPTH"]
            tiles = {"x": (rows, depth), "w": (columns, depth)}
            for ve in (True, False):
                words = f"K={head_dim}{' ve' if ve else ''} {product.tile_name(config | {'COLUMNS': columns})}"
                way = {"H": 4, "G": 4, "K": head_dim, "VE": ve}
                cases.append(product.case(words, _qkv_kernel, config, capabilities, types, tiles, way))
    return cases


def launch(
    x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, T, D], weight [(H + 2G) K, D], its rows' sums of squares fp32 [S, B T], gate before the sigmoid ->
    q [B, T, H, K], k, v [B, T, G, K], r fp32 [B, T, H + G].
    """
    b, t, d = x.shape
    q, k, v, r = empty(x, weight, cos, heads)
    groups, head_dim = k.shape[2:]
    if b * t:
        config = launch_config(head_dim, x.dtype, d)
        rows, columns, depth, tma = config["ROWS"], config["HEADS"], config["DEPTH"], config["TMA"]
        grid = (-(-b * t // rows) * -(-(heads + 2 * groups) // columns),)
        _qkv_kernel[grid](
            product.operand(x.view(-1, d), rows, depth, tma),
            product.operand(weight, columns * head_dim, depth, tma), partial, cos, sin,
            x if ve is None else ve, x if gate is None else gate, q, k, v, r, b * t, d, t,
            len(partial), reference.NORM_EPS, H=heads, G=groups, K=head_dim, VE=ve is not None, **config,
        )  # fmt: skip
    return q, k, v, r


def empty(x: Tensor, weight: Tensor, cos: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch` returns, uninitialised."""
    (b, t, _), k = x.shape, 2 * cos.shape[1]
    g = (weight.shape[0] // k - heads) // 2
    q, keys, v = (x.new_empty(b, t, n, k) for n in (heads, g, g))
    return q, keys, v, x.new_empty(b, t, heads + g, dtype=torch.float32)


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::qkv", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, T, D], weight [(H + 2G) K, D], partial fp32 [S, B T], ve [B, T, G, K], gate [B, T, G] ->
    q [B, T, H, K], k, v [B, T, G, K], r fp32 [B, T, H + G].
    """
    return launch(x, weight, partial, cos, sin, ve, gate, heads)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(x, weight, cos, heads)


@torch.library.custom_op("hotloop::qkv_backward", mutates_args=())
def _backward_op(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, root: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None,
    gate: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v -> those of the product [B, T, H + 2G, K] and the gate, both times root fp32 [B T], that
    of ve, and share fp32 [H + 2G, B T].
    """
    return qkv_backward.launch(q, k, v, r, root, cos, sin, ve, gate, dq, dk, dv)


@_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, root: Tensor, cos: Tensor, sin: Tensor, ve: Any, gate: Any, dq: Tensor,
    dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv, dve, dgate = qkv_backward.empty_gradients(dq, dk, ve, gate)
    return dqkv, dve, dgate, dq.new_empty(dqkv.shape[2], len(root), dtype=torch.float32)


class _QKV(torch.autograd.Function):
    """No operator of torch.library: those may not return what they were given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, partial: Tensor, cos: Tensor, sin: Tensor, heads: int,
        ve: Tensor | None, w_gate: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        root = stream.reciprocal_root(partial, x.shape[-1])
        gate = None
        if w_gate is not None:
            gate = F.linear(x[..., : w_gate.shape[1]], w_gate)
            gate = (gate.float() * root.view(*x.shape[:2], 1)).to(x.dtype)
        q, k, v, r = _op(x, weight, partial, cos, sin, ve, gate, heads)
        ctx.save_for_backward(x, weight, partial, root, cos, sin, ve, w_gate, gate, q, k, v, r)
        return x.view_as(x), q, k, v

    @staticmethod
    def backward(ctx: Any, g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, partial, root, cos, sin, ve, w_gate, gate, q, k, v, r = ctx.saved_tensors
        given = (dq.contiguous(), dk.contiguous(), dv.contiguous())
        dqkv, dve, dgate, share = _backward_op(q, k, v, r, root, cos, sin, ve, gate, *given)
        flat, ds = x.view(-1, x.shape[-1]), dqkv.view(-1, weight.shape[0])
        if w_gate is None:
            dve, dgate, dw_gate = None, None, None
        else:
            dgate = dgate.view(-1, w_gate.shape[0])
            dw_gate = dgate.T @ flat[:, : w_gate.shape[1]]
        g = g.contiguous().view_as(flat)
        dx, _, _ = stream.gradient(ds, weight, g, flat, None, None, None, partial, share, dgate, w_gate)
        return dx.view_as(x), weight_gradient(ds, flat), None, None, None, None, dve, dw_gate


@register_flop_formula(torch.ops.hotloop.qkv)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * x[2] * weight[0])


def qkv(
    x: Tensor,
    squares: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    ve: Tensor | None = None,
    w_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of the norm of x, and x, with which the residual stream goes on.

    Args:
        x: [B, T, D]; the weights are taken in its type.
        squares: fp32 [S, B T], of x.
        w_q: [H K, D]; w_k, w_v: [G K, D]; K one of 16, 32, 64, 128.
        cos, sin: T K / 2 elements, by tokens; no gradient.
        ve: [B, T, G K] in elements; w_gate: [G, C], whose gates are products with the first C columns of norm(x).

    Returns:
        q [B, T, H, K], k, v [B, T, G, K], x [B, T, D].
    """
    b, t, _ = x.shape
    head_dim = 2 * cos.numel() // t
    weight = torch.cat((w_q, w_k, w_v)).to(x.dtype)
    cos, sin = (y.reshape(t, head_dim // 2).contiguous() for y in (cos, sin))
    ve = None if ve is None else ve.reshape(b, t, -1, head_dim).contiguous()
    w_gate = None if w_gate is None else w_gate.to(x.dtype).contiguous()
    heads = len(w_q) // head_dim
    with torch.autocast(x.device.type, enabled=False):
        made: tuple[Tensor, Tensor, Tensor, Tensor] = _QKV.apply(  # type: ignore[no-untyped-call]
            x.contiguous(), weight, squares, cos, sin, heads, ve, w_gate
        )
    return *made[1:], made[0]


# ---- pattern ------------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    made: Tensor = reference.rope_norm(_value(x, weight), cos, sin)
    return made


def _value(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = F.linear(reference.rms_norm(x), weight).unflatten(-1, (-1, 1))  # to whichever heads it has
    return made


def _gated(x: Tensor, weight: Tensor, ve: Tensor, first: Tensor, w_gate: Tensor) -> Tensor:
    return reference.gated(_value(x, weight), ve.unflatten(-1, (-1, 1)), F.linear(first, w_gate))


def find(graph: Graph) -> tuple[list[Found], int]:
    """Where one normalised x makes two rotated heads' tensors and a third, of values."""
    rotated, gated, values = (_first(graph, pattern) for pattern in (_rotated, _gated, _value))
    found = []
    for x in {id(given["x"].node): given["x"] for _, given, _ in rotated}.values():
        pair = [one for one in rotated if one[1]["x"].node is x.node]
        if len(pair) != 2:
            continue
        pair.sort(key=lambda one: -one[0].meta["example_value"].shape[-2])  # of grouped heads, queries have more
        for value in [one for one in (*gated, *values) if one[1]["x"].node is x.node]:
            one = _whole(graph, pair[0], pair[1], value)
            if one is not None:
                found.append(one)
                graph.taken |= one.nodes
                break
    return found, sum("attention" in str(node.target) for node in graph.nodes if node.op == "call_function")


_Match = tuple[fx.Node, dict[str, Any], frozenset[fx.Node]]


def _first(graph: Graph, pattern: Any) -> list[_Match]:
    """Matches that end in [B, T, heads, K]; of a value and its conversions, the first that has x's type."""
    made: list[_Match] = []
    for node, given, nodes in graph.matches(pattern):
        out = node.meta["example_value"]
        alike = out.ndim == 4 and out.dtype == given["x"].value.dtype
        again = any(n in nodes and n.meta["example_value"].shape == out.shape and seen <= nodes for n, _, seen in made)
        if alike and not again:
            made.append((node, given, nodes))
    return made


def _whole(graph: Graph, q: _Match, k: _Match, v: _Match) -> Found | None:
    """The three of them as one, where all fits."""
    x, w_q, w_k, w_v = q[1]["x"], q[1]["weight"], k[1]["weight"], v[1]["weight"]
    nodes = q[2] | k[2] | v[2]
    inputs = {"x": x, "w_q": w_q, "w_k": w_k, "w_v": w_v, "cos": q[1]["cos"], "sin": q[1]["sin"]}
    (b, t, _, head_dim), (_, _, groups, _) = (one[0].meta["example_value"].shape for one in (q, k))
    fits = x.value.ndim == 3 and tuple(x.shape[:2]) == (b, t) and head_dim in HEAD_DIMS and not same(w_q, w_v)
    fits = fits and not same(w_k, w_v) and v[0].meta["example_value"].shape == k[0].meta["example_value"].shape
    for name in ("cos", "sin"):
        angle = inputs[name].value
        fits = fits and same(k[1][name], inputs[name]) and not angle.requires_grad and angle.is_floating_point()
        fits = fits and angle.shape[-3:] == (t, 1, head_dim // 2) and angle.numel() == t * head_dim // 2
    if "ve" in v[1]:
        ve, first, w_gate = (v[1][name] for name in ("ve", "first", "w_gate"))
        normed = _columns(first, nodes)
        fits = fits and normed is not None and ve.value.dtype == x.value.dtype
        fits = fits and ve.value.numel() == b * t * groups * head_dim and tuple(ve.shape[:2]) == (b, t)
        fits = fits and w_gate.shape == (groups, first.shape[-1]) and groups != head_dim  # whichever [..., None] it was
        inputs |= {"ve": ve, "w_gate": w_gate}
        nodes |= normed or frozenset()
    if not fits or not graph.fits(nodes, [q[0], k[0], v[0]], inputs, x.value.dtype):
        return None
    outputs = [q[0], k[0], v[0]]
    return Found(NAME, outputs, nodes, inputs, qkv, gives="x", wants_squares=True, counts=(NAME,))


def _columns(first: Term, nodes: frozenset[fx.Node]) -> frozenset[fx.Node] | None:
    """The nodes that take the first columns of a norm among `nodes`; None where `first` is something else."""
    if first.op == "rms_norm" and first.node in nodes:
        return frozenset()
    begins = (first.op == "half" and first.args[1] == 0) or (first.op == "slice" and first.args[1:3] == (-1, 0))
    if not begins or first.args[0].op != "rms_norm" or first.args[0].node not in nodes:
        return None
    return first.nodes
