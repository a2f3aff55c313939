"""Mean cross-entropy of softcap(x W^T), without fp32 logits: two ways, and a third for little memory.

    l = x W^T;  t = tanh(l / c);  s = c t;  Z = sum exp(s);  loss = log Z - s[target]
    dl = g (exp(s) / Z - onehot) (1 - t^2);  dx = dl W;  dW = dl^T x

`inplace`: the product by the vendor's library, then one pass over its bf16 logits that leaves their gradient in their
place (`kernels.softcap_cross_entropy`). The loss is a mean, so g is known in the forward pass.

`exp`: the cap bounds s by c, so exp(s) needs no row maximum, and a product's epilogue can write E = exp(s) (1 - t^2)
and its tile's share of Z at once; logits are never written at all. A small pass adds up Z and mends E at the target:
E[target] -= Z (1 - t^2). Then dx = g / Z (E W) and dW = E^T (x g / Z).

`chunked`: either of them over blocks of rows, dx and dW formed in the forward pass, where M V elements do not fit.

In 8 bits (`fp8`) the product is `linear_fp8`'s, and the pass over its logits that of `inplace`. Its factors are rounded
outside of the operator, for torch.compile to fuse with what made them.

Bytes, elements of b bytes, beside the products' own x, W, dx and dW: `inplace` writes M V b, reads and writes it,
reads it twice; `exp` writes it and reads it twice. Operations: three products of 2 M D V.

The in-place loss is an idea of Liger-Kernel and modded-nanogpt (the idea, not the code).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES, BY_DESCRIPTORS
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose, implementation
from hotloop.kernels.fp8 import check_fp8, input_gradient, linear_fp8, scaled_product
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.gemm import product
from hotloop.kernels.gemm.weight_gradient import weight_gradient
from hotloop.kernels.head.in_place import check as check_logits
from hotloop.kernels.head.in_place import launch

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.gemm.product import halves, multiply, tile_order

__all__ = ["METHODS", "NAME", "compile_cases", "default_config", "find", "kernel_loss", "loss", "search_space"]

NAME = "loss"

METHODS = ("inplace", "exp", "chunked")
# exp(s) of every s <= the cap, summed over 2^20 columns, stays within the dtype's range.
EXP_MAX_CAP = {torch.bfloat16: 60.0, torch.float32: 60.0, torch.float16: 8.0}
# More elements than this go in chunks: a quarter of an 80 GB card in bf16.
MAX_ELEMENTS = 10 * 2**30
CHUNK_ELEMENTS = 2**28


def launch_config(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile, warps and stages of the product: as tuned on this GPU, else by architecture."""
    return product.launch_config("exp_product", "16 bit", default_config, dtype, width)


def default_config(modern: bool = True) -> dict[str, int]:
    """Small enough for one tile's epilogue beside another's products."""
    return product.default_config(0, modern)


def search_space() -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    return product.search_space(product.tiles(2 * product.SHORT), (8, 16))


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _exp_product_kernel(
        x, w, targets_ptr, e_ptr, share_ptr, at_ptr, M, V, D, softcap,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """x [M, D], w [V, D] -> e [M, V]; share fp32 [halves of tiles of V, M], their parts of Z; at fp32 [M],
        s[target].
        """
        tile_m, tile_v = tile_order(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(V, COLUMNS), GROUP)
        first = tile_m * ROWS
        logits = multiply(x, w, first, tile_v * COLUMNS, M, V, D, ROWS, COLUMNS, DEPTH, TMA, True)
        # In two halves, so that the epilogue's temporaries fit beside the accumulator.
        left, right = halves(logits, ROWS, COLUMNS)
        row = first + tl.arange(0, ROWS)
        _exp_half(left, row, tile_v * 2, targets_ptr, e_ptr, share_ptr, at_ptr, M, V, softcap, COLUMNS // 2)
        _exp_half(right, row, tile_v * 2 + 1, targets_ptr, e_ptr, share_ptr, at_ptr, M, V, softcap, COLUMNS // 2)

    @triton.jit
    def _exp_half(
        logits, row, part, targets_ptr, e_ptr, share_ptr, at_ptr, M, V, softcap, WIDE: tl.constexpr
    ):  # fmt: skip
        """Logits [ROWS, WIDE] of columns part WIDE and on."""
        column = part * WIDE + tl.arange(0, WIDE)
        t = 1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0)
        e = tl.where((column < V)[None, :], tl.exp(softcap * t), 0.0)
        tl.store(share_ptr + part.to(tl.int64) * M + row, tl.sum(e, 1), mask=row < M)
        target = tl.load(targets_ptr + row, mask=row < M, other=-1) - part * WIDE
        hit = tl.arange(0, WIDE)[None, :] == target[:, None]
        at = softcap * tl.sum(tl.where(hit, t, 0.0), 1)
        tl.store(at_ptr + row, at, mask=(row < M) & (target >= 0) & (target < WIDE))
        p_e = e_ptr + row.to(tl.int64)[:, None] * V + column[None, :]
        inside = (row < M)[:, None] & (column < V)[None, :]
        tl.store(p_e, (e * (1.0 - t * t)).to(e_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _finish_kernel(
        e_ptr, share_ptr, at_ptr, targets_ptr, loss_ptr, scale_ptr, count_ptr, M, V, TILES, softcap, ROWS: tl.constexpr
    ):  # fmt: skip
        """Add up Z, mend e at the target; loss fp32 [M], scale fp32 [M] = 1 / (Z count), 0 for no target."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < M
        z = tl.zeros([ROWS], tl.float32)
        p_share = share_ptr + row
        for _ in range(0, TILES):
            z += tl.load(p_share, mask=inside, other=0.0)
            p_share += M
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
        valid = inside & (target >= 0)
        s = tl.load(at_ptr + row, mask=valid, other=0.0)
        t = s / softcap
        mended = (tl.exp(s) - z) * (1.0 - t * t)
        tl.store(e_ptr + row.to(tl.int64) * V + target, mended.to(e_ptr.dtype.element_ty), mask=valid)
        tl.store(loss_ptr + row, tl.where(valid, tl.log(z) - s, 0.0), mask=inside)
        tl.store(scale_ptr + row, tl.where(valid, tl.load(count_ptr) / z, 0.0), mask=inside)


def compile_cases() -> list[CompileCase]:
    """The product for 16-bit inputs, default and tuned, and the finish."""
    cases = []
    types = {"*bf16": "e_ptr", "*fp32": "share_ptr at_ptr", "*i64": "targets_ptr", "i32": "M V D", "fp32": "softcap"}
    defaults = [(default_config(False), tuple(ARCHITECTURES)), (default_config(), BY_DESCRIPTORS)]
    for config, capabilities in [*defaults, *tuning.of_all_gpus("exp_product", "16 bit")]:
        tiles = {"x": (config["ROWS"], config["DEPTH"]), "w": (config["COLUMNS"], config["DEPTH"])}
        words = f"product {product.tile_name(config)}"
        cases.append(product.case(words, _exp_product_kernel, config, capabilities, types, tiles))
    signature = dict.fromkeys(("share_ptr", "at_ptr", "loss_ptr", "scale_ptr", "count_ptr"), "*fp32")
    signature |= {"e_ptr": "*bf16", "targets_ptr": "*i64", "M": "i32", "V": "i32", "TILES": "i32", "softcap": "fp32"}
    cases.append(CompileCase("finish", _finish_kernel, signature, {"ROWS": 128}, {"num_warps": 4}))
    return cases


# ---- launchers --------------------------------------------------------------------------------------------------


def _share(targets: Tensor) -> Tensor:
    """1 / (targets that count), fp32 []."""
    return 1.0 / (targets != reference.IGNORE).sum().float()


def _inplace(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss times share, d loss / d logits, its row scale []): one product and one pass."""
    return _pass(x @ weight.T, targets, softcap, share)


def _pass(logits: Tensor, targets: Tensor, softcap: float | None, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits, which are overwritten."""
    # One token's share of a mean underflows in fp16; there the products are scaled.
    late = logits.dtype == torch.float16
    loss = launch(logits, targets, softcap, torch.ones_like(share) if late else share)
    return loss.sum() * share, logits, share if late else torch.ones_like(share)


def _exp(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss times share, E, its row scale [M, 1])."""
    (m, d), v = x.shape, weight.shape[0]
    config = launch_config(x.dtype, d)
    rows, columns, depth, tma = config["ROWS"], config["COLUMNS"], config["DEPTH"], config["TMA"]
    tiles = -(-v // columns)
    e = torch.empty(m, v, dtype=x.dtype, device=x.device)
    shares = torch.empty(2 * tiles, m, dtype=torch.float32, device=x.device)
    at, loss, scale = (torch.empty(m, dtype=torch.float32, device=x.device) for _ in range(3))
    if m:
        _exp_product_kernel[(-(-m // rows) * tiles,)](
            product.operand(x, rows, depth, tma), product.operand(weight, columns, depth, tma), targets, e, shares, at,
            m, v, d, softcap, **config,
        )  # fmt: skip
        _finish_kernel[(-(-m // 128),)](
            e, shares, at, targets, loss, scale, share, m, v, 2 * tiles, softcap, ROWS=128, num_warps=4
        )
    return loss.sum() * share, e, scale[:, None]


def _gradients(x: Tensor, weight: Tensor, dlogits: Tensor, scale: Tensor, fp8: str = "") -> tuple[Tensor, Tensor]:
    """dx [M, D] and dW [V, D] from row-scaled gradients of the logits."""
    dx = input_gradient(dlogits, weight, fp8)
    return (dx * scale).to(x.dtype), weight_gradient(dlogits, (x * scale).to(x.dtype))


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::loss", mutates_args=())
def _whole_op(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, D], weight [V, D], targets [M] -> mean loss [], gradients of the logits [M, V] but for a row scale,
    that.
    """
    share = _share(targets)
    if method == "exp" and softcap is not None:
        return _exp(x, weight, targets, softcap, share)
    return _inplace(x, weight, targets, softcap, share)


@_whole_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, method: str) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((x.shape[0], 1) if method == "exp" else (), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape[0], weight.shape[0]), scale


def _whole_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])
    ctx.set_materialize_grads(False)


def _whole_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, dlogits, scale = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    dx, dw = _gradients(x, weight, dlogits, scale * grad)
    return dx, dw, None, None, None


_whole_op.register_autograd(_whole_backward, setup_context=_whole_context)


@torch.library.custom_op("hotloop::loss_chunked", mutates_args=())
def _chunked_op(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, D], weight [V, D], targets [M] -> mean loss [], dx [M, D], dW [V, D]; `rows` logits rows at a time."""
    share = _share(targets)
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    dx, dw = torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        here, dlogits, scale = _inplace(x[part], weight, targets[part], softcap, share)
        loss += here
        dx[part], dw_here = _gradients(x[part], weight, dlogits, scale)
        dw += dw_here
    return loss, dx, dw.to(weight.dtype)


@_chunked_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def _chunked_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _chunked_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    return dx * grad.to(dx.dtype), dw * grad.to(dw.dtype), None, None, None


_chunked_op.register_autograd(_chunked_backward, setup_context=_chunked_context)


@torch.library.custom_op("hotloop::loss_fp8", mutates_args=())
def _fp8_op(
    x: Tensor, weight: Tensor, xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, targets: Tensor,
    softcap: float | None, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, D] and weight [V, D], which the backward pass reads; both as `quantize` leaves them; targets [M] -> mean
    loss [], gradients of the logits [M, V] but for a scale, that.
    """
    return _pass(scaled_product(xq, wq, x_scale, w_scale, x.dtype), targets, softcap, _share(targets))


@_fp8_op.register_fake
def _(
    x: Tensor, weight: Tensor, xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, targets: Tensor,
    softcap: float | None, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scalar = x.new_empty((), dtype=torch.float32)
    return scalar, x.new_empty(x.shape[0], weight.shape[0]), torch.empty_like(scalar)


def _fp8_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])
    ctx.fp8 = inputs[-1]
    ctx.set_materialize_grads(False)


def _fp8_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, dlogits, scale = ctx.saved_tensors
    none = (None,) * 7
    return (None, None, *none) if grad is None else (*_gradients(x, weight, dlogits, scale * grad, ctx.fp8), *none)


_fp8_op.register_autograd(_fp8_backward, setup_context=_fp8_context)


@register_flop_formula([torch.ops.hotloop.loss, torch.ops.hotloop.loss_fp8])
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


@register_flop_formula(torch.ops.hotloop.loss_chunked)
def _chunked_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(6 * x[0] * x[1] * weight[0])


# ---- public functions -------------------------------------------------------------------------------------------


def loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = 15.0, *, fp8: str = "") -> Tensor:
    """Mean cross-entropy of softcap(x W^T). Where `kernels.compile` compiles it, no fp32 logits are formed.

    Args:
        x: [..., D].
        weight: [V, D].
        targets: int64 [...]; -1 is not counted.
        softcap: logits are squashed into (-softcap, softcap); None for no cap.
        fp8: `bf16` or `e5m2`: the product by `linear_fp8`, with that backward pass; "" for none.

    Returns:
        scalar fp32, nats, differentiable in x and weight.

    Raises:
        KernelError: in 8 bits, what cannot be served.
    """
    if not fp8:
        return reference.loss(x, weight, targets, softcap)
    if not choose(NAME, x.device.type):
        return reference.mean_cross_entropy(linear_fp8(x, weight, fp8), targets, softcap)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat, weight, aims = x.flatten(0, -2).contiguous(), weight.to(x.dtype).contiguous(), targets.flatten().contiguous()
    check(flat, weight, aims, softcap)
    check_fp8(flat, weight, fp8)
    if len(flat) * len(weight) > MAX_ELEMENTS:
        raise KernelError(
            f"in 8 bits the loss takes up to {MAX_ELEMENTS} logits a pass, not {len(flat)} x {len(weight)}"
        )
    factors = [t for a in (flat, weight) for t in reference.quantize(a.detach(), reference.E4M3)]
    mean: Tensor = _fp8_op(flat, weight, *factors, aims, softcap, fp8)[0]
    return mean


def kernel_loss(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = 15.0, method: str | None = None
) -> Tensor:
    """The same by the kernels, in x's type.

    Args:
        method: `inplace`, `exp` (bounded caps only) or `chunked`; None for `inplace` where M V elements fit, else
            `chunked`.

    Raises:
        KernelError: inputs or a method that cannot be served.
    """
    if method is not None and method not in METHODS:
        raise KernelError(f"no method is called {method!r}; there are {', '.join(METHODS)}")
    flat, weight, aims = x.flatten(0, -2).contiguous(), weight.to(x.dtype).contiguous(), targets.flatten().contiguous()
    check(flat, weight, aims, softcap)
    m, v = len(flat), len(weight)
    if method == "exp" and (softcap is None or softcap > EXP_MAX_CAP[flat.dtype]):
        raise KernelError(
            f"method exp needs a softcap of at most {EXP_MAX_CAP[flat.dtype]} for {flat.dtype}, not {softcap}"
        )
    mean: Tensor
    if method == "chunked" or (method is None and m * v > MAX_ELEMENTS):
        mean = _chunked_op(flat, weight, aims, softcap, max(1, min(m, CHUNK_ELEMENTS // v)))[0]
    else:
        mean = _whole_op(flat, weight, aims, softcap, method or "inplace")[0]
    return mean


def check(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> None:
    """Raises KernelError for what the kernels do not serve: x [M, D], weight [V, D], targets [M]."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise KernelError(f"weight {list(weight.shape)} does not fit x {list(x.shape)}")
    check_logits((len(x), len(weight)), x.dtype, targets, softcap)


# ---- pattern ------------------------------------------------------------------------------------------------------


def _capped(x: Tensor, weight: Tensor, targets: Tensor, inner: float, outer: float, ignored: float) -> Tensor:
    logits = outer * torch.tanh(F.linear(x, weight).flatten(0, -2).float() / inner)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=ignored)  # type: ignore[arg-type]


def _uncapped(x: Tensor, weight: Tensor, targets: Tensor, ignored: float) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2).float(), targets.flatten(), ignore_index=ignored)  # type: ignore[arg-type]


def _put_in(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignored: int) -> Tensor:
    if ignored != reference.IGNORE:
        targets = torch.where(targets == ignored, reference.IGNORE, targets)
    chosen = implementation(NAME, x.device.type).removeprefix("triton").removeprefix("-") or None
    bounded = softcap is not None and softcap <= EXP_MAX_CAP[x.dtype]
    return kernel_loss(x, weight, targets, softcap, chosen if bounded or chosen != "exp" else None)


def find(graph: Graph) -> tuple[list[Found], int]:
    """Mean cross-entropies of a product, softcapped or not."""
    found = []
    for pattern in (_capped, _uncapped):
        for node, given, nodes in graph.matches(pattern):
            x, weight, targets = (given[name].value for name in ("x", "weight", "targets"))
            cap = given.get("inner")
            inputs = {name: given[name] for name in ("x", "weight", "targets")}
            fits = cap == given.get("outer") and given["ignored"] < 0 and x.ndim > 1
            fits = fits and node.target is F.cross_entropy and node.all_input_nodes[0].meta["example_value"].ndim == 2
            if fits and _served(x, weight, targets, cap) and graph.fits(nodes, [node], inputs, x.dtype, torch.float32):
                inputs |= {"softcap": cap if cap is None else float(cap), "ignored": given["ignored"]}
                found.append(Found(NAME, [node], nodes, inputs, _put_in, counts=(NAME,)))
                graph.taken |= nodes
    return found, sum(node.target is F.cross_entropy for node in graph.nodes)


def _served(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> bool:
    try:
        check(x.flatten(0, -2), weight, targets.flatten(), softcap)
    except KernelError:
        return False
    return True
