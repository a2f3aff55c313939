"""The relu^2 MLP from the residual stream back into it: norm, MLP, residual mix, without a normalised activation; or
the MLP alone.

    r = 1 / sqrt(mean(x^2) + 2^-23);  y = relu(r x W_fc^T)^2;  out = lam (x + y W_proj^T) + mu x0

The first product's epilogue scales its rows by r and squares, so the pre-activation is never written; the second
(`kernels.block.residual`) mixes in its epilogue. Backward needs only y: relu(pre) = sqrt(y), so dpre' = r (g W_proj) 2
sqrt(y), in the epilogue of the product that forms g W_proj, which also sums up `share` = r <dpre, pre> = 2 r <g W_proj,
y> by rows: the norm's gradient, and with 1 / 2r the branch's part of dlam. Then, by `kernels.block.stream`:

    dx = lam (dpre' W_fc + g - r share / D x);  dW_fc = lam dpre'^T x;  dW_proj = lam g^T y
    dx0 = mu g;  dlam = <g, x> + sum(share / 2r);  dmu = <g, x0>

Alone (`mlp_alone`), out = y W_proj^T with r = 1: its second product, out and dx are the vendor library's.

Bytes, elements of b bytes, M tokens, widths D and N: forward read x twice and x0, write y, read y, write out: M (4 D +
2 N) b. Backward read g and y, write dpre'; g and y again for dW_proj; dpre' and x twice, g and x0, write dx and dx0: M
(7 D + 5 N) b. Alone M (2 D + 2 N) b and M (4 D + 5 N) b. The weights come on top. Operations: two products of 2 M D N
forward, four backward.

Saving the squared activation alone is this project's; the epilogue that squares is that of modded-nanogpt's and
Liger-Kernel's relu^2 (the idea, not the code).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference
from hotloop.kernels.architectures import BY_DESCRIPTORS
from hotloop.kernels.block import residual, stream
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.fuse.terms import Term
from hotloop.kernels.gemm import product
from hotloop.kernels.gemm.weight_gradient import weight_gradient

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.block.stream import row_root
    from hotloop.kernels.gemm.product import halves, multiply, tile_order

__all__ = ["NAME", "compile_cases", "default_config", "find", "mlp", "mlp_alone", "search_space"]

NAME = "mlp"


def launch_config(dtype: torch.dtype, dim: int, width: int) -> dict[str, int]:
    """Tile, warps and stages of both directions, which are tuned as one: on this GPU, else by architecture. Both sum
    over `dim`.
    """
    default = functools.partial(default_config, dim)
    return product.launch_config("mlp", product.config_key(dim), default, dtype, dim, width)


def default_config(dim: int, modern: bool = True) -> dict[str, int]:
    """PROGRAMS for each multiprocessor, each walking over tiles, or 0 for one a tile."""
    return product.default_config(dim, modern) | {"PROGRAMS": 0}


def persistent(config: dict[str, int]) -> dict[str, int]:
    """The same tile with as many programs as a multiprocessor has room for."""
    return config | {"PROGRAMS": 2 if config["ROWS"] * config["COLUMNS"] <= 128 * 128 else 1}


def search_space(dim: int) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    plain = [config | {"PROGRAMS": 0} for config in product.search_space(product.tiles(dim), (8, 16))]
    return [*plain, *(persistent(config) for config in plain if config["TMA"])]


# ---- kernel -----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _mlp_product_kernel(
        a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps,
        BACKWARD: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        GROUP: tl.constexpr, TMA: tl.constexpr, PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        """Forward: a = x [M, D], w = W_fc [N, D] -> out = relu(a w^T)^2 [M, N].
        Backward: a = dout [M, D], w = W_proj [D, N], y [M, N] -> out = (a w) 2 sqrt(y) [M, N].

        NORM: the a of the forward pass was x, not norm(x). By squares fp32 [PARTS, M] each row is scaled by r, which
        normalises it; backward, share fp32 [halves of tiles of N, M] becomes the rows' sums of out relu(pre): r <dpre,
        pre>.
        """
        if PROGRAMS:  # each walks over tiles, and loads for the next while it finishes one
            tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, COLUMNS)
            for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
                _mlp_tile(tile, a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps, BACKWARD, NORM, ROWS,
                          COLUMNS, DEPTH, GROUP, TMA)  # fmt: skip
        else:
            _mlp_tile(tl.program_id(0), a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps, BACKWARD,
                      NORM, ROWS, COLUMNS, DEPTH, GROUP, TMA)  # fmt: skip

    @triton.jit
    def _mlp_tile(
        tile, a, w, y_ptr, out_ptr, squares_ptr, share_ptr, M, N, D, PARTS, eps,
        BACKWARD: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        tile_m, tile_n = tile_order(tile, tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
        first = tile_m * ROWS
        column = tile_n * COLUMNS
        total = multiply(a, w, first, column, M, N, D, ROWS, COLUMNS, DEPTH, TMA, not BACKWARD)
        row = first + tl.arange(0, ROWS)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if NORM:
            scale = row_root(squares_ptr, row, PARTS, M, D, eps, ROWS)
        # In two halves, so that the epilogue's temporaries fit beside the accumulator.
        left, right = halves(total, ROWS, COLUMNS)
        at = column + tl.arange(0, COLUMNS // 2)
        p_share = share_ptr + tile_n * 2 * M
        _finish(left, row, at, scale, y_ptr, out_ptr, p_share, M, N, BACKWARD, NORM)
        _finish(right, row, at + COLUMNS // 2, scale, y_ptr, out_ptr, p_share + M, M, N, BACKWARD, NORM)

    @triton.jit
    def _finish(
        total, row, column, scale, y_ptr, out_ptr, p_share, M, N, BACKWARD: tl.constexpr, NORM: tl.constexpr
    ):  # fmt: skip
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        if BACKWARD:
            active = tl.sqrt(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32))
            result = total * (2.0 * active)
            if NORM:
                result *= scale[:, None]
                tl.store(p_share + row, tl.sum(result * active, 1), mask=row < M)
        else:
            if NORM:
                total *= scale[:, None]
            active = tl.maximum(total, 0.0)
            result = active * active
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """Both directions for 16-bit elements, of normalised rows and of others: default and tuned."""
    cases = []
    for backward, norm in ((False, False), (True, False), (False, True), (True, True)):
        key = f"{'backward' if backward else 'forward'}{' norm' if norm else ''} 16 bit"
        shipped = product.shipped("mlp", default_config)
        shipped += [(persistent(config), given) for config, given in shipped if given == BY_DESCRIPTORS]
        for config, capabilities in shipped:
            rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
            types = {"*bf16": "y_ptr out_ptr", "*fp32": "squares_ptr share_ptr", "i32": "M N D PARTS", "fp32": "eps"}
            tiles = {"a": (rows, depth), "w": (depth, columns) if backward else (columns, depth)}
            name = f"{key} {product.tile_name(config)}{' persistent' if config['PROGRAMS'] else ''}"
            way = {"BACKWARD": backward, "NORM": norm}
            cases.append(product.case(name, _mlp_product_kernel, config, capabilities, types, tiles, way))
    return cases


def launch(a: Tensor, w: Tensor, y: Tensor | None, partial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a [M, D], w -> [M, N]; with y the backward product. With the forward pass's `partial` sums of squares fp32 [S, M]
    of rows yet to be normalised, each is scaled by r; backward, r <dpre, pre> follows, fp32 [halves of tiles of N, M].
    """
    m, d = a.shape
    n = w.shape[0] if y is None else w.shape[1]
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    config = launch_config(a.dtype, d, n)
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    share = empty_share(a, n) if partial is not None and y is not None else out
    if m:
        tiles = -(-m // rows) * -(-n // columns)
        _mlp_product_kernel[product.grid(tiles, config["PROGRAMS"], a.device)](
            product.operand(a, rows, depth, tma),
            product.operand(w, *((columns, depth) if y is None else (depth, columns)), tma),
            a if y is None else y, out, a if partial is None else partial, share, m, n, d,
            0 if partial is None else partial.shape[0], reference.NORM_EPS, BACKWARD=y is not None,
            NORM=partial is not None, **config,
        )  # fmt: skip
    return out, share


def empty_share(a: Tensor, n: int) -> Tensor:
    """For a product of a [M, D] with N columns."""
    tiles = -(-n // launch_config(a.dtype, a.shape[1], n)["COLUMNS"])
    return torch.empty(2 * tiles, a.shape[0], dtype=torch.float32, device=a.device)


# ---- operator: the MLP alone ------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::mlp_alone_dpre", mutates_args=())
def _alone_dpre_op(dout: Tensor, w_proj: Tensor, y: Tensor) -> Tensor:
    """dout [M, D], w_proj [D, N], y [M, N] -> gradient of the pre-activation [M, N]."""
    return launch(dout, w_proj, y)[0]


@_alone_dpre_op.register_fake
def _(dout: Tensor, w_proj: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("hotloop::mlp_alone", mutates_args=())
def _alone_op(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, D], w_fc [N, D], w_proj [E, N] -> (out [M, E], y [M, N])."""
    y = launch(x, w_fc, None)[0]
    return y @ w_proj.T, y


@_alone_op.register_fake
def _(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w_proj.shape[0]), x.new_empty(x.shape[0], w_fc.shape[0])


def _alone_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _alone_backward(ctx: Any, dout: Tensor | None, _unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_fc, w_proj, y = ctx.saved_tensors
    if dout is None:
        return None, None, None
    dout = dout.contiguous()
    dpre = _alone_dpre_op(dout, w_proj, y)
    return dpre @ w_fc, weight_gradient(dpre, x), weight_gradient(dout, y)


_alone_op.register_autograd(_alone_backward, setup_context=_alone_context)


@register_flop_formula(torch.ops.hotloop.mlp_alone)
def _alone_flops(x: Any, w_fc: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * w_fc[0] * (x[1] + w_proj[0]))


@register_flop_formula(torch.ops.hotloop.mlp_alone_dpre)
def _alone_dpre_flops(dout: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * dout[0] * dout[1] * w_proj[1])


# ---- operator: from the stream into it ---------------------------------------------------------------------------


@torch.library.custom_op("hotloop::mlp", mutates_args=())
def _op(
    x: Tensor, partial: Tensor, w_fc: Tensor, w_proj: Tensor, x0: Tensor | None, lam: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, x0 [M, D], partial fp32 [S, M], w_fc [N, D], w_proj [D, N] -> out [M, D], its squares, y [M, N]."""
    y, _ = launch(x, w_fc, None, partial)
    return *residual.launch(y, w_proj, x, x0, lam, mu), y


@_op.register_fake
def _(
    x: Tensor, partial: Tensor, w_fc: Tensor, w_proj: Tensor, x0: Any, lam: Any, mu: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n = w_fc.shape[0]
    return torch.empty_like(x), residual.squares_like(x, n), x.new_empty(x.shape[0], n)


@torch.library.custom_op("hotloop::mlp_dpre", mutates_args=())
def _dpre_op(g: Tensor, w_proj: Tensor, y: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    """g [M, D], w_proj [D, N], y [M, N], partial fp32 [S, M] -> dpre' [M, N], share fp32 [P, M]."""
    return launch(g, w_proj, y, partial)


@_dpre_op.register_fake
def _(g: Tensor, w_proj: Tensor, y: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), empty_share(g, y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, g: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    x, partial, w_fc, w_proj, x0, lam, mu, y = ctx.saved_tensors
    g = g.contiguous()
    dpre, share = _dpre_op(g, w_proj, y, partial)
    dx, dx0, sums = stream.gradient(dpre, w_fc, g, x, x0, lam, mu, partial, share, None, None)
    dw_fc, dw_proj = weight_gradient(dpre, x), weight_gradient(g, y)
    if x0 is None:
        return dx, None, dw_fc, dw_proj, None, None, None
    dlam = sums[0] + (share.sum(0) / (2 * stream.reciprocal_root(partial, x.shape[1]))).sum()
    dw_fc, dw_proj = ((lam * dw.float()).to(dw.dtype) for dw in (dw_fc, dw_proj))
    return dx, None, dw_fc, dw_proj, dx0, dlam.to(lam.dtype), sums[1].to(mu.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hotloop.mlp)
def _flops(x: Any, partial: Any, w_fc: Any, *args: Any, **kwargs: Any) -> int:
    return int(4 * x[0] * x[1] * w_fc[0])


@register_flop_formula(torch.ops.hotloop.mlp_dpre)
def _dpre_flops(g: Any, w_proj: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * g[0] * g[1] * w_proj[1])


def mlp(
    x: Tensor,
    squares: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    x0: Tensor | None = None,
    lam: Tensor | None = None,
    mu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """lam (x + MLP(norm(x))) + mu x0, or without the mix, and its squares.

    Args:
        x: [..., D]; the weights are taken in its type.
        squares: fp32 [S, M], of x.
        w_fc: [N, D]; w_proj: [D, N].
        x0: as x; with scalars lam and mu [].

    Returns:
        [..., D] of x's type; fp32 [S, M], without a gradient.
    """
    flat, x0 = (None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, x0))
    weights = (w.to(x.dtype).contiguous() for w in (w_fc, w_proj))
    out, partial, _y = _op(flat, squares, *weights, x0, lam, mu)
    return out.view(x.shape), partial


def mlp_alone(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """relu(x W_fc^T)^2 W_proj^T: x [..., D], w_fc [N, D], w_proj [E, N] -> [..., E], all in x's type."""
    weights = (w.to(x.dtype).contiguous() for w in (w_fc, w_proj))
    out: Tensor = _alone_op(x.reshape(-1, x.shape[-1]).contiguous(), *weights)[0]
    return out.view(*x.shape[:-1], w_proj.shape[0])


# ---- pattern ------------------------------------------------------------------------------------------------------


def _mixed(x: Tensor, w_fc: Tensor, w_proj: Tensor, x0: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
    return lam * _plain(x, w_fc, w_proj) + mu * x0


def _plain(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    return x + reference.mlp_alone(reference.rms_norm(x), w_fc, w_proj)


def find(graph: Graph) -> tuple[list[Found], int]:
    """MLPs with the norm before and the mix behind them, then those without the mix, then without either."""
    found = []
    for pattern in (_mixed, _plain, reference.mlp_alone):
        for node, given, nodes in graph.matches(pattern):
            values = {name: term.value for name, term in given.items()}
            x, w_fc, w_proj, out = values["x"], values["w_fc"], values["w_proj"], node.meta["example_value"]
            fits = w_fc.ndim == w_proj.ndim == 2 and x.ndim > 1
            if pattern is not reference.mlp_alone:
                fits = fits and stream.mixes(x, out, *(values.get(name) for name in ("x0", "lam", "mu")))
            if not fits or not graph.fits(nodes, [node], given, x.dtype):
                continue
            graph.taken |= nodes
            if pattern is reference.mlp_alone:
                found.append(Found(NAME, [node], nodes, given, mlp_alone, counts=(NAME,)))
            else:
                counts = (NAME, residual.NAME)
                found.append(Found(NAME, [node], nodes, given, mlp, "squares", wants_squares=True, counts=counts))
    return found, len(_places(graph))


def _places(graph: Graph) -> set[fx.Node]:
    """Products of what was made of a wider product, element by element."""

    def comes_from_a_product(node: fx.Node | None, shape: torch.Size, steps: int = 8) -> bool:
        value = node.meta.get("example_value") if node else None
        if node is None or not isinstance(value, Tensor) or value.shape != shape or not steps:
            return False
        op = graph.terms[node].op
        if op in ("rms_norm", "add"):  # of the stream
            return False
        return op == "linear" or any(comes_from_a_product(n, shape, steps - 1) for n in node.all_input_nodes)

    def is_place(node: fx.Node) -> bool:
        term = graph.terms[node]
        if term.op != "linear" or len(term.nodes) > 1 or not isinstance(term.args[0], Term) or not term.args[0].node:
            return False
        inner = term.args[0]
        wider = inner.op != "linear" and inner.shape[-1] > term.shape[-1]
        return wider and comes_from_a_product(inner.node, inner.value.shape)

    return {node for node in graph.nodes if is_place(node)}
