"""Muon over a bank of N equal matrices, which stay where they are: gradients and parameters go by their addresses.

    m <- m + (1 - mu) (g - m);  y = g + mu (m - g);  s = 1 / (1.02 |y| + 1e-6)
    gram = s^2 y y^T;  poly = b gram + c gram^2;  y <- a y + poly y       for each polynomial (a, b, c)
    x = s y, with x's variance along its longer side divided by a running mean, its norm kept
    p <- p - lr x - lr decay p where x p >= 0

(Muon: Jordan et al. 2024. Polar Express: Amsel et al. 2025, arXiv:2505.16932. NorMuon: Li et al. 2025,
arXiv:2510.05491.) The iteration is odd in y and its coefficients do not depend on y's scale, so y is never divided by
its norm: only gram carries s^2. For a tall matrix gram = s^2 y^T y and y <- a y + y poly. gram and poly are symmetric:
one kernel forms their tiles on and below the diagonal, and writes each twice. The product with y is the vendor
library's. The norm, the variances and their sums are sums of a fixed number of partial sums in fixed order: no atomics,
the same bits each time.

Bytes, P = N rows cols elements of fp32, y in b bytes, S and L the shorter and longer side: momentum reads g and m,
writes m and y: (12 + b) P. Each iteration reads y for gram, writes and reads gram and poly, reads y again and writes
it: 3 b P + 4 b N S^2. The end reads y twice, reads and writes p: (8 + 2 b) P. Operations of an iteration as the
reference has them: N (4 S^2 L + 2 S^3); the symmetric products do little more than half of theirs, N (3 S^2 L + S^3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose
from hotloop.kernels.optimizer.adamw import addresses

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from hotloop.kernels.gemm.product import dot

__all__ = ["compile_cases", "config_key", "default_config", "muon_", "search_space"]

DTYPES = (torch.bfloat16, torch.float32)  # of the products; fp16 has no room for gradients that are not normalised
CHUNKS, BLOCK = 64, 4096  # partial sums of a matrix's norm; elements a step of its momentum
LINES, ACROSS = 8, 512  # rows (or columns) of a variance's program, and elements of each a step
FEW_TILES = 132  # fewer tiles of 128 x 128 than this leave multiprocessors idle


def config_key(matrices: int, side: int, fp32: bool) -> str:
    """What the symmetric product is tuned by: the element, and whether large tiles fill a GPU."""
    tiles = -(-side // 128)
    few = matrices * tiles * (tiles + 1) // 2 < FEW_TILES
    return f"{'fp32' if fp32 else '16 bit'} {'few' if few else 'many'}"


def launch_config(matrices: int, side: int, fp32: bool) -> dict[str, int]:
    """Tile, warps and stages of the symmetric product: as tuned on this GPU, else by size."""
    key = config_key(matrices, side, fp32)
    return tuning.config("muon_product", key) or default_config(key)


def default_config(key: str) -> dict[str, int]:
    """By size."""
    if key.endswith("few") or key.startswith("fp32"):
        return {"TILE": 64, "DEPTH": 32 if key.startswith("fp32") else 64, "num_warps": 4, "num_stages": 3}
    return {"TILE": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def search_space() -> list[dict[str, int]]:
    """Configurations worth timing."""
    return [
        {"TILE": tile, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
        for tile, warps in ((64, 4), (64, 8), (128, 4), (128, 8))
        for depth in (32, 64, 128)
        for stages in (3, 4)
        if tile * depth * stages <= 128 * 64 * 4
    ]


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _muon_momentum_kernel(
        address_ptr, buffer_ptr, hyper_ptr, y_ptr, partial_ptr, SIZE,
        CHUNKS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    ):  # fmt: skip
        """address int64 [N, 2] of p and g; buffer, y [N, SIZE]; partial [N, CHUNKS], sums of squares of y."""
        matrix = tl.program_id(1).to(tl.int64)
        momentum = tl.load(hyper_ptr + 2)
        g_ptr = tl.load(address_ptr + matrix * 2 + 1).to(tl.pointer_type(tl.float32))
        g_ptr = tl.multiple_of(g_ptr, 16) if ALIGNED else g_ptr  # an address that is read says nothing of itself
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.program_id(0) * BLOCK, SIZE, CHUNKS * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < SIZE
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
            m = tl.load(buffer_ptr + matrix * SIZE + at, mask=inside, other=0.0)
            m += (g - m) * (1.0 - momentum)
            tl.store(buffer_ptr + matrix * SIZE + at, m, mask=inside)
            y = (g + (m - g) * momentum).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + matrix * SIZE + at, y, mask=inside)
            total += y.to(tl.float32) * y.to(tl.float32)
        tl.store(partial_ptr + matrix * CHUNKS + tl.program_id(0), tl.sum(total, 0))

    @triton.jit
    def _reciprocal_norm(partial_ptr, matrix, CHUNKS: tl.constexpr):
        """s of a matrix, from its partial sums."""
        squares = tl.sum(tl.load(partial_ptr + matrix * CHUNKS + tl.arange(0, CHUNKS)), 0)
        return 1.0 / (tl.sqrt(squares) * 1.02 + 1e-6)

    @triton.jit
    def _muon_product_kernel(
        x_ptr, partial_ptr, out_ptr, b, c, S, K,
        POLY: tl.constexpr, TALL: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """x [N, S, K] (TALL: [N, K, S]) -> out [N, S, S] = s^2 x x^T (TALL: x^T x).
        POLY: x = x^T [N, S, S] -> out = b x + c x x^T.

        Each program forms one tile on or below the diagonal, and writes it and its mirror.
        """
        matrix = tl.program_id(1).to(tl.int64)
        tile = tl.program_id(0)
        # Row r of the triangle begins at tile r (r + 1) / 2; the root is rounded, so its neighbours are looked at.
        r = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
        r = tl.where(r * (r + 1) // 2 > tile, r - 1, r)
        r = tl.where((r + 1) * (r + 2) // 2 <= tile, r + 1, r)
        q = tile - r * (r + 1) // 2
        row = r * TILE + tl.arange(0, TILE)
        column = q * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)
        x_ptr += matrix * S * K
        if TALL:
            p_a = x_ptr + depth.to(tl.int64)[None, :] * S + row[:, None]
            p_b = x_ptr + depth.to(tl.int64)[:, None] * S + column[None, :]
            step = DEPTH * S
        else:
            p_a = x_ptr + row.to(tl.int64)[:, None] * K + depth[None, :]
            p_b = x_ptr + column.to(tl.int64)[None, :] * K + depth[:, None]
            step = DEPTH
        total = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, K, DEPTH):
            deep = depth + start < K
            left = tl.load(p_a, mask=(row < S)[:, None] & deep[None, :], other=0.0)
            right = tl.load(p_b, mask=deep[:, None] & (column < S)[None, :], other=0.0)
            total = dot(left, right, total)
            p_a += step
            p_b += step
        out_ptr += matrix * S * S
        inside = (row < S)[:, None] & (column < S)[None, :]
        at = row.to(tl.int64)[:, None] * S + column[None, :]
        if POLY:
            total = c * total + b * tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            s = _reciprocal_norm(partial_ptr, matrix, CHUNKS)
            total *= s * s
        result = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, result, mask=inside)
        if r != q:
            mirror = column.to(tl.int64)[:, None] * S + row[None, :]
            tl.store(out_ptr + mirror, tl.trans(result), mask=(column < S)[:, None] & (row < S)[None, :])

    @triton.jit
    def _muon_variance_kernel(
        y_ptr, partial_ptr, second_ptr, sums_ptr, hyper_ptr, ROWS, COLS,
        WIDE: tl.constexpr, CHUNKS: tl.constexpr, LINES: tl.constexpr, ACROSS: tl.constexpr,
    ):  # fmt: skip
        """second [N, lines], updated; sums [N, programs, 2]: this program's share of the squared norm of x, and of x
        over its deviations. A line is a row, WIDE a column: what is as many as the longer side is long.
        """
        matrix = tl.program_id(1).to(tl.int64)
        lines = COLS if WIDE else ROWS
        across = ROWS if WIDE else COLS
        line = tl.program_id(0) * LINES + tl.arange(0, LINES)
        s = _reciprocal_norm(partial_ptr, matrix, CHUNKS)
        total = tl.zeros([LINES, ACROSS], tl.float32)
        for start in range(0, across, ACROSS):
            other = start + tl.arange(0, ACROSS)
            at = other.to(tl.int64)[None, :] * COLS + line[:, None] if WIDE else (
                line.to(tl.int64)[:, None] * COLS + other[None, :]
            )  # fmt: skip
            inside = (line < lines)[:, None] & (other < across)[None, :]
            x = tl.load(y_ptr + matrix * ROWS * COLS + at, mask=inside, other=0.0).to(tl.float32) * s
            total += x * x
        mean = tl.sum(total, 1) / across
        p_second = second_ptr + matrix * lines + line
        second = tl.load(p_second, mask=line < lines, other=1.0)
        second += (mean - second) * tl.load(hyper_ptr + 3)
        tl.store(p_second, second, mask=line < lines)
        p_sums = sums_ptr + (matrix * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(p_sums, tl.sum(mean, 0))
        tl.store(p_sums + 1, tl.sum(mean / tl.maximum(second, 1e-10), 0))

    @triton.jit
    def _muon_step_kernel(
        address_ptr, y_ptr, partial_ptr, second_ptr, sums_ptr, hyper_ptr, ROWS, COLS,
        WIDE: tl.constexpr, CHUNKS: tl.constexpr, LINES: tl.constexpr, ACROSS: tl.constexpr, PROGRAMS: tl.constexpr,
        ALIGNED: tl.constexpr,
    ):  # fmt: skip
        """The new parameters, at their addresses; PROGRAMS is at least the variance's number of programs."""
        matrix = tl.program_id(1).to(tl.int64)
        lines = COLS if WIDE else ROWS
        across = ROWS if WIDE else COLS
        lr = tl.load(hyper_ptr)
        decay = tl.load(hyper_ptr + 1)
        p_ptr = tl.load(address_ptr + matrix * 2).to(tl.pointer_type(tl.float32))
        p_ptr = tl.multiple_of(p_ptr, 16) if ALIGNED else p_ptr
        program = tl.arange(0, PROGRAMS)
        p_sums = sums_ptr + (matrix * tl.num_programs(0) + program) * 2
        norm = tl.sqrt(tl.sum(tl.load(p_sums, mask=program < tl.num_programs(0), other=0.0), 0))
        scaled = tl.sqrt(tl.sum(tl.load(p_sums + 1, mask=program < tl.num_programs(0), other=0.0), 0))
        line = tl.program_id(0) * LINES + tl.arange(0, LINES)
        second = tl.load(second_ptr + matrix * lines + line, mask=line < lines, other=1.0)
        factor = tl.rsqrt(tl.maximum(second, 1e-10)) * (norm / tl.maximum(scaled, 1e-10))
        factor *= _reciprocal_norm(partial_ptr, matrix, CHUNKS)
        for start in range(0, across, ACROSS):
            other = start + tl.arange(0, ACROSS)
            at = other.to(tl.int64)[None, :] * COLS + line[:, None] if WIDE else (
                line.to(tl.int64)[:, None] * COLS + other[None, :]
            )  # fmt: skip
            inside = (line < lines)[:, None] & (other < across)[None, :]
            x = tl.load(y_ptr + matrix * ROWS * COLS + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
            p = tl.load(p_ptr + at, mask=inside, other=0.0)
            tl.store(p_ptr + at, p - lr * x - tl.where(x * p >= 0.0, lr * decay * p, 0.0), mask=inside)


def _lines(wide: bool) -> tuple[int, int]:
    """LINES and ACROSS. Neighbours in memory are columns, so the block is long in that direction either way."""
    return (128, 32) if wide else (LINES, ACROSS)


def compile_cases() -> list[CompileCase]:
    """All four kernels, in every variant; the products for 16-bit elements, default and tuned."""
    cases = []
    table, fp32 = {"address_ptr": "*i64"}, dict.fromkeys(("hyper_ptr", "partial_ptr"), "*fp32")
    for aligned in (True, False):
        how = "" if aligned else ", any address"
        signature = table | {"buffer_ptr": "*fp32", "y_ptr": "*bf16", "SIZE": "i32"} | fp32
        constants = {"CHUNKS": CHUNKS, "BLOCK": BLOCK, "ALIGNED": aligned}
        cases.append(CompileCase(f"momentum{how}", _muon_momentum_kernel, signature, constants, {"num_warps": 8}))
        for wide in (False, True):
            lines, across = _lines(wide)
            constants = {"WIDE": wide, "CHUNKS": CHUNKS, "LINES": lines, "ACROSS": across}
            signature = fp32 | {"y_ptr": "*bf16", "second_ptr": "*fp32", "sums_ptr": "*fp32"}
            signature |= {"ROWS": "i32", "COLS": "i32"}
            name = f"{'wide' if wide else 'tall or square'}{how}"
            options = {"num_warps": 8}
            if aligned:
                cases.append(CompileCase(f"variance {name}", _muon_variance_kernel, signature, constants, options))
            constants = constants | {"PROGRAMS": 256, "ALIGNED": aligned}
            cases.append(CompileCase(f"step {name}", _muon_step_kernel, table | signature, constants, options))
    for key in ("16 bit many", "16 bit few"):
        for config, capabilities in [
            (default_config(key), tuple(ARCHITECTURES)),
            *tuning.of_all_gpus("muon_product", key),
        ]:
            for poly, tall in ((False, False), (False, True), (True, False)):
                signature = {"x_ptr": "*bf16", "partial_ptr": "*fp32", "out_ptr": "*bf16", "b": "fp32", "c": "fp32"}
                signature |= {"S": "i32", "K": "i32"}
                constants = {"POLY": poly, "TALL": tall, "CHUNKS": CHUNKS} | config
                options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
                name = "poly" if poly else "gram tall" if tall else "gram"
                name += f" {config['TILE']}x{config['TILE']}x{config['DEPTH']}"
                name += f" warps={options['num_warps']} stages={options['num_stages']}"
                cases.append(
                    CompileCase(
                        name, _muon_product_kernel, signature, constants, options, capabilities, tensor_cores=True
                    )
                )
    return cases


# ---- operator ---------------------------------------------------------------------------------------------------


def product(x: Tensor, partial: Tensor | None, tall: bool = False, b: float = 0.0, c: float = 1.0) -> Tensor:
    """[N, S, S]: s^2 x x^T of x [N, S, K] (tall: s^2 x^T x of [N, K, S]), s from `partial`; without it b x + c x x."""
    n, s, k = len(x), x.shape[2 if tall else 1], x.shape[1 if tall else 2]
    out = torch.empty(n, s, s, dtype=x.dtype, device=x.device)
    config = launch_config(n, s, x.dtype == torch.float32)
    tiles = -(-s // config["TILE"])
    _muon_product_kernel[(tiles * (tiles + 1) // 2, n)](
        x, x if partial is None else partial, out, b, c, s, k, POLY=partial is None, TALL=tall, CHUNKS=CHUNKS, **config
    )
    return out


@torch.library.custom_op("hotloop::muon_", mutates_args=("params", "buffer", "second"))
def _op(
    params: list[Tensor], grads: list[Tensor], buffer: Tensor, second: Tensor, hyper: Tensor, coefficients: list[float],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """`coefficients`: a, b, c of the first polynomial, of the second, and so on."""
    n, rows, cols = buffer.shape
    device, size, wide = buffer.device, rows * cols, cols > rows
    if not n or not size:
        return
    numbers = tuple((p.data_ptr(), g.data_ptr()) for p, g in zip(params, grads, strict=True))
    table = addresses(numbers, device)
    aligned = all(at % 16 == 0 for pair in numbers for at in pair)
    y = torch.empty(n, rows, cols, dtype=dtype, device=device)
    partial = torch.empty(n, CHUNKS, dtype=torch.float32, device=device)
    _muon_momentum_kernel[(CHUNKS, n)](
        table, buffer, hyper, y, partial, size, CHUNKS=CHUNKS, BLOCK=BLOCK, ALIGNED=aligned, num_warps=8
    )
    tall = rows > cols
    for a, b, c in zip(coefficients[::3], coefficients[1::3], coefficients[2::3], strict=True):
        poly = product(product(y, partial, tall), None, b=b, c=c)
        left, right = (y, poly) if tall else (poly, y)
        y = torch.baddbmm(y, left, right, beta=a)
    lines, across = _lines(wide)
    programs = -(-max(rows, cols) // lines)
    sums = torch.empty(n, programs, 2, dtype=torch.float32, device=device)
    shape = {"WIDE": wide, "CHUNKS": CHUNKS, "LINES": lines, "ACROSS": across, "num_warps": 8}
    _muon_variance_kernel[(programs, n)](y, partial, second, sums, hyper, rows, cols, **shape)
    _muon_step_kernel[(programs, n)](
        table, y, partial, second, sums, hyper, rows, cols, PROGRAMS=triton.next_power_of_2(programs), ALIGNED=aligned,
        **shape,
    )  # fmt: skip


@_op.register_fake
def _(
    params: list[Tensor], grads: list[Tensor], buffer: Tensor, second: Tensor, hyper: Tensor, coefficients: list[float],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    return None


@register_flop_formula(torch.ops.hotloop.muon_)
def _flops(params: Any, grads: Any, buffer: Any, second: Any, hyper: Any, coefficients: Any, *a: Any, **k: Any) -> int:
    """As the reference's are counted: a budget of operations buys the same with either."""
    n, short, long = buffer[0], min(buffer[1:]), max(buffer[1:])
    return int(len(coefficients) // 3 * n * (4 * short**2 * long + 2 * short**3))


# ---- public function --------------------------------------------------------------------------------------------


def muon_(
    params: list[Tensor],
    grads: list[Tensor],
    buffer: Tensor,
    second: Tensor,
    hyper: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> None:
    """One Muon step of N equal matrices, in place; see `reference`.

    Args:
        params, grads: lists of N matrices [rows, cols], fp32.
        buffer: fp32 [N, rows, cols], the momentum.
        second: fp32, the running mean of squares: [N, rows, 1] where rows >= cols, else [N, 1, cols].
        hyper: fp32 [4] on the same device: lr, decay, momentum, 1 - beta2.
        polynomials: (a, b, c) of each iteration that sends the singular values to 1.
        dtype: of the orthogonalisation, bfloat16 or float32; None for the gradients' own.
        compiled: let torch.compile fuse the update where the reference runs; the kernel needs none.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    if not params:
        return
    if not choose("muon_", params[0].device.type):
        reference.muon_(params, grads, buffer, second, hyper, polynomials, dtype, compiled)
        return
    p = params[0]
    dtype = dtype or grads[0].dtype
    if dtype not in DTYPES:
        raise KernelError(f"muon_ orthogonalises in bfloat16 or float32, not {dtype}")
    if p.ndim != 2 or len(grads) != len(params):
        raise KernelError(
            f"muon_ needs as many gradients as matrices, not {len(grads)} and {len(params)} of {p.ndim} dims"
        )
    rows, cols = p.shape
    for t in (*params, *grads):
        if t.dtype != torch.float32 or t.shape != p.shape or t.device != p.device:
            raise KernelError(
                f"muon_ serves float32 matrices of one shape and device, not {p.dtype} {list(p.shape)} on {p.device} "
                f"beside {t.dtype} {list(t.shape)} on {t.device}"
            )
    side = [len(params), rows, 1] if rows >= cols else [len(params), 1, cols]
    held = (("buffer", buffer, [len(params), rows, cols]), ("second", second, side), ("hyper", hyper, [4]))
    for name, t, shape in held:
        if list(t.shape) != shape or t.dtype != torch.float32 or t.device != p.device:
            raise KernelError(
                f"{name} must be float32 {shape} on {p.device}, not {t.dtype} {list(t.shape)} on {t.device}"
            )
    if not all(t.is_contiguous() for t in (*params, buffer, second, hyper)):
        raise KernelError(f"muon_ needs contiguous tensors; one for matrices of {list(p.shape)} has other strides")
    if any(len(abc) != 3 for abc in polynomials):
        raise KernelError("a polynomial of muon_ is three numbers: a, b, c")
    coefficients = [float(x) for abc in polynomials for x in abc]
    _op(params, [g.contiguous() for g in grads], buffer, second, hyper, coefficients, dtype)
