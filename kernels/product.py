"""What the kernels with a matrix product share: the order of tiles, and loads by pointer or by TMA descriptor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.dispatch import HAVE_TRITON

if HAVE_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def tile_order(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
        """(row, column) of a tile: down GROUP rows of tiles before the next column, so that both operands stay in the
        L2.
        """
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        return group * GROUP + (tile % (GROUP * tiles_n)) % height, (tile % (GROUP * tiles_n)) // height

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


__all__ = ["operand"]


def operand(x: Tensor, rows: int, columns: int, tma: int) -> Any:
    """x [M, N] as `load_tile` takes it. Descriptors need rows of a multiple of 16 bytes."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]) if tma else x
