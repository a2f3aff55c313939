"""What the kernels with a matrix product share: the order of tiles, loads by pointer or TMA descriptor, the product."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import tuning
from hotloop.kernels.architectures import ARCHITECTURES, BY_DESCRIPTORS, serves_descriptors
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase

if HAVE_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The interpreter multiplies the bits of bfloat16.
    WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def dot(left, right, total=None):
        """left right, added to total if given; fp32 operands at their full precision."""
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, total, input_precision="ieee")

    @triton.jit
    def tile_order(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
        """(row, column) of a tile: down GROUP rows of tiles before the next column, so that both operands stay in the
        L2.
        """
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        return group * GROUP + (tile % (GROUP * tiles_n)) % height, (tile % (GROUP * tiles_n)) // height

    @triton.jit
    def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """[ROWS, COLUMNS] -> its left and its right half; in registers, as an accumulator lies."""
        return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()

    @triton.jit
    def load_tile(
        x, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
    ):  # fmt: skip
        """[ROWS, COLUMNS] of x [rows, columns] from (row, column) on, zeros outside; x a pointer or a descriptor."""
        if TMA:
            tile = x.load([row, column])
        else:
            r = row + tl.arange(0, ROWS)
            c = column + tl.arange(0, COLUMNS)
            p = x + (r.to(tl.int64)[:, None] * columns + c[None, :])
            tile = tl.load(p, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
        return tile

    @triton.jit
    def multiply(
        a, w, row, column, M, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
        TRANSPOSED: tl.constexpr,
    ):  # fmt: skip
        """The tile from (row, column) on of the product [M, N], fp32: a [M, D] times w [D, N], or TRANSPOSED [N, D]."""
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, DEPTH):
            a_tile = load_tile(a, row, start, M, D, ROWS, DEPTH, TMA)
            if TRANSPOSED:
                w_tile = load_tile(w, column, start, N, D, COLUMNS, DEPTH, TMA).T
            else:
                w_tile = load_tile(w, start, column, D, N, DEPTH, COLUMNS, TMA)
            total = dot(a_tile, w_tile, total)
        return total


__all__ = [
    "SHORT",
    "case",
    "config_key",
    "default_config",
    "grid",
    "launch_config",
    "operand",
    "search_space",
    "shipped",
    "tile_name",
    "tiles",
]

# A tile of 128 x 256 has a multiprocessor for itself. A sum of so few terms ends soon, and the tensor cores then idle
# beside its epilogue: 128 x 128 takes half the registers, so another program's sum runs meanwhile.
SHORT = 1024


def config_key(depth: int) -> str:
    """What products of 16-bit elements are tuned by: whether they sum over few terms."""
    return f"16 bit {'short' if depth <= SHORT else 'long'}"


def default_config(depth: int, modern: bool = True) -> dict[str, int]:
    """Of a sum over `depth` terms, where nothing was tuned: by descriptors where the accumulator is the tensor core's
    (Hopper and later), there 128 x 256 for long sums, else 128 x 128.
    """
    return {
        "ROWS": 128, "COLUMNS": 256 if modern and depth > SHORT else 128, "DEPTH": 64 if modern else 32, "GROUP": 16,
        "TMA": int(modern), "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def search_space(
    shapes: Iterable[tuple[int, int, int]],
    groups: tuple[int, ...] = (16,),
    depths: tuple[tuple[int, int], ...] = ((64, 3), (64, 4), (32, 4)),
) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper.

    Args:
        shapes: (rows, columns, warps).
        groups: of GROUP.
        depths: (DEPTH, stages).
    """
    return [
        {
            "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": group, "TMA": tma, "num_warps": warps,
            "num_stages": stages,
        }
        for rows, columns, warps in shapes
        for depth, stages in depths
        for group in groups
        for tma in (1, 0)
    ]  # fmt: skip


def case(
    words: str, function: Any, config: dict[str, int], capabilities: tuple[int, ...], types: dict[str, str],
    tiles: dict[str, tuple[int, int]], constants: dict[str, Any] | None = None,
) -> CompileCase:  # fmt: skip
    """A shipped configuration for the compile gate.

    Args:
        words: its name, but for warps and stages.
        types: Triton type -> the arguments of that type, with blanks between.
        tiles: the operands, which come by descriptor where the configuration says so -> their tiles.
        constants: beside the configuration's.
    """
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    signature = {name: kind for kind, names in types.items() for name in names.split()}
    signature |= dict.fromkeys(tiles, "*bf16")
    if config["TMA"]:
        signature |= {name: f"tensordesc<bf16[{rows},{columns}]>" for name, (rows, columns) in tiles.items()}
    fixed = (constants or {}) | {name: value for name, value in config.items() if name not in options}
    key = f"{words} warps={config['num_warps']} stages={config['num_stages']}"
    return CompileCase(key, function, signature, fixed, options, capabilities, tensor_cores=True)


def shipped(
    kernel: str, default: Callable[[int, bool], dict[str, int]], key: Callable[[int], str] = config_key
) -> list[tuple[dict[str, int], tuple[int, ...]]]:
    """(default or tuned configuration, architectures that it is for) of a product, for the compile gate."""
    found: list[tuple[dict[str, int], tuple[int, ...]]] = [(default(SHORT, False), tuple(ARCHITECTURES))]
    for depth in (SHORT, 2 * SHORT):
        found += [(default(depth, True), BY_DESCRIPTORS), *tuning.of_all_gpus(kernel, key(depth))]
    return [pair for i, pair in enumerate(found) if pair not in found[:i]]


def tiles(depth: int) -> tuple[tuple[int, int, int], ...]:
    """(rows, columns, warps) worth timing on Hopper for a sum over `depth` terms."""
    small = ((128, 128, 8), (128, 128, 4), (64, 256, 4), (128, 256, 8))
    return small if depth <= SHORT else (*small, (256, 128, 8))


def launch_config(
    kernel: str, key: str, default: Callable[[bool], dict[str, int]], dtype: torch.dtype, *widths: int
) -> dict[str, int]:
    """As tuned on this GPU, else `default` of whether descriptors serve: 16-bit elements in rows of a multiple of 16
    bytes, on a card of BY_DESCRIPTORS.
    """
    modern = serves_descriptors() and dtype != torch.float32 and not any(width % 8 for width in widths)
    tuned = tuning.config(kernel, key) if dtype != torch.float32 else None
    return tuned if tuned and (modern or not tuned["TMA"]) else default(modern)


def operand(x: Tensor, rows: int, columns: int, tma: int) -> Any:
    """x [M, N] as `load_tile` takes it. Descriptors need rows of a multiple of 16 bytes, and an address of one: a part
    of a tensor may be contiguous and begin elsewhere.
    """
    if not tma:
        return x
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def grid(tiles: int, programs: int, device: torch.device) -> tuple[int]:
    """Of a launch over tiles: one program each, or `programs` for each multiprocessor that walk over them."""
    if not programs:
        return (tiles,)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return (min(tiles, programs * processors),)


def tile_name(config: dict[str, int]) -> str:
    """128x256x64 tma"""
    return f"{config['ROWS']}x{config['COLUMNS']}x{config['DEPTH']}{' tma' if config['TMA'] else ''}"
