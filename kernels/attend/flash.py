"""FlashAttention in Triton: causal, sliding windows, grouped heads, documents; forward and a repeatable backward.

    s = q k^T / sqrt(K);  p = softmax(s over the visible keys);  o = p v;  lse = log sum exp(s)
    delta = rowsum(do o);  ds = p (do v^T - delta);  dq = ds k / sqrt(K);  dk = ds^T q / sqrt(K);  dv = p^T do

Scores never leave the chip (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691): forward keeps a running
maximum and sum, backward rebuilds p from q, k and lse. Query i sees key j where max(i - window, first[i]) <= j <= i;
blocks of keys that no query of a tile sees are never loaded, and only blocks that a boundary crosses are masked.

Backward is two kernels, one that owns tiles of dq and one that owns tiles of dk and dv, so that nothing is added by
atomics and two runs give the same bits; the price is that s and do v^T are formed twice (seven products where five
would do). The first also writes delta, unless it is given from outside.

Bytes, elements of b bytes, M = B T: forward M K (2 H + 2 G) b, backward M K (4 H + 4 G) b, plus 4 M H for each of lse
and delta. Operations, of the visible pairs: 4 K forward, 10 K backward (14 K as made here).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotloop.kernels import tuning
from hotloop.kernels.architectures import ARCHITECTURES, serves_descriptors
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase
from hotloop.kernels.gemm import product

if HAVE_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from hotloop.kernels.gemm.product import dot, tile_order

__all__ = [
    "HEAD_DIMS",
    "KERNELS",
    "backward",
    "compile_cases",
    "config_key",
    "default_config",
    "forward",
    "kind_of",
    "search_space",
]

HEAD_DIMS = (16, 32, 64, 128)
KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")
HIDDEN = -1.0e30  # a score that is not seen: finite, so that a row whose first block is all hidden gives no NaN
LOG2E = 1.4426950408889634


class Documents(NamedTuple):
    """Bounds of each token's document within its row, int32 [B, T]: its first token, and one past its last."""

    first: Tensor
    last: Tensor


# ---- launch configurations ----------------------------------------------------------------------------------------


def config_key(head_dim: int, banded: bool, grouped: bool) -> str:
    return f"K={head_dim} {'band' if banded else 'full'}{' grouped' if grouped else ''}"


def launch_config(kernel: str, head_dim: int, key: str, dtype: torch.dtype, t: int) -> dict[str, int]:
    """As tuned on this GPU, else by architecture."""
    kind, tuned = kind_of(dtype, t), tuning.config(kernel, key)
    fits = tuned and kind != "fp32" and (kind not in ("ampere", "pointers") or not tuned["TMA"])
    return tuned if tuned and fits else default_config(kernel, head_dim, key, kind)


def kind_of(dtype: torch.dtype, t: int) -> str:
    """Which of `default_config`'s kinds serves rows of `t` tokens on this device. Rows of numbers (lse) need a multiple
    of 16 bytes for descriptors.
    """
    if dtype == torch.float32:
        return "fp32"
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if t % 4 or not serves_descriptors():
        return "ampere" if capability < 10 else "pointers"
    return "hopper" if capability == 9 else "blackwell"


def default_config(kernel: str, head_dim: int, key: str, kind: str) -> dict[str, int]:
    """Of a `kind`: fp32, ampere and pointers (loads by pointers, up to sm_90 and from sm_100 on), hopper and blackwell
    (by descriptors).

    ROWS queries by COLUMNS keys a tile; SPLIT: boundary blocks in loops of their own, so that the others need no
    mask; PROGRAMS for each multiprocessor, each walking over tiles, or 0 for one a tile.
    """
    if kind == "fp32":
        return {"ROWS": 32, "COLUMNS": 32, "TMA": 0, "SPLIT": 1, "PROGRAMS": 0, "num_warps": 4, "num_stages": 1}
    rows, columns, warps, split = SHIPPED[kind][kernel][head_dim > 64]
    split &= not (kernel == "attention_dkdv" and "grouped" in key)  # the loop over heads takes the registers
    tma = int(kind in ("hopper", "blackwell"))
    return {
        "ROWS": rows, "COLUMNS": columns, "TMA": tma, "SPLIT": int(split), "PROGRAMS": 0,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


# kind -> kernel -> (ROWS, COLUMNS, num_warps, SPLIT) up to K = 64 and above: the largest tiles that do not spill.
SHIPPED = {
    "ampere": {
        "attention_forward": ((128, 64, 8, True), (64, 64, 4, True)),
        "attention_dq": ((64, 64, 8, True), (64, 64, 8, True)),
        "attention_dkdv": ((32, 64, 8, True), (32, 64, 8, True)),
    },
    "pointers": {
        "attention_forward": ((128, 64, 8, True), (64, 64, 8, True)),
        "attention_dq": ((64, 64, 8, True), (64, 64, 8, True)),
        "attention_dkdv": ((64, 64, 8, True), (32, 64, 8, True)),
    },
    "hopper": {
        "attention_forward": ((128, 128, 8, True), (128, 128, 8, True)),
        "attention_dq": ((128, 128, 8, True), (128, 64, 8, True)),
        "attention_dkdv": ((64, 128, 8, True), (64, 128, 8, True)),
    },
    "blackwell": {
        "attention_forward": ((128, 64, 8, True), (128, 64, 8, True)),
        "attention_dq": ((128, 64, 8, True), (128, 64, 8, True)),
        "attention_dkdv": ((64, 64, 4, True), (32, 128, 8, True)),
    },
}


def search_space(kernel: str) -> list[dict[str, int]]:
    """Configurations worth timing on Hopper."""
    tiles = {
        "attention_forward": ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)),
        "attention_dq": ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4)),
        "attention_dkdv": ((64, 128, 8), (128, 128, 8), (64, 64, 4), (32, 128, 4), (128, 64, 4)),
    }[kernel]
    return [
        {
            "ROWS": rows, "COLUMNS": columns, "TMA": tma, "SPLIT": split, "PROGRAMS": programs,
            "num_warps": warps, "num_stages": stages,
        }
        for rows, columns, warps in tiles
        for stages in (2, 3)
        for tma, split, programs in ((1, 1, 0), (1, 0, 0), (1, 1, 1), (0, 1, 0))
        if not (programs and kernel == "attention_dkdv")  # whose tiles have a program each
    ]  # fmt: skip


# ---- forward kernel -----------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _load(x, b, start, head, T, stride, ROWS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
        """Tokens start .. start + ROWS of one row and head, [ROWS, K]; zeros past T. `x` is a pointer to [B, T, .., K]
        with `stride` elements between tokens, or a descriptor of it as [B, T, heads K].
        """
        if TMA:
            tile = x.load([b, start, head * K]).reshape(ROWS, K)
        else:
            token = start + tl.arange(0, ROWS)
            p = x + (b.to(tl.int64) * T * stride + head * K) + (token[:, None] * stride + tl.arange(0, K)[None, :])
            tile = tl.load(p, mask=(token < T)[:, None], other=0.0)
        return tile

    @triton.jit
    def _load_scalars(x, b, head, start, T, H, ROWS: tl.constexpr, TMA: tl.constexpr):
        """Of fp32 [B, H, T], the numbers of tokens start .. start + ROWS; zeros past T. Those need no other value:
        q and do are zero there too, and so is all that they add.
        """
        if TMA:
            numbers = x.load([b * H + head, start]).reshape(ROWS)
        else:
            token = start + tl.arange(0, ROWS)
            numbers = tl.load(x + (b.to(tl.int64) * H + head) * T + token, mask=token < T, other=0.0)
        return numbers

    @triton.jit
    def _store(p_x, value, b, start, head, T, heads, ROWS: tl.constexpr, K: tl.constexpr):
        """Into [B, T, heads, K], contiguous."""
        token = start + tl.arange(0, ROWS)
        p = p_x + (b.to(tl.int64) * T * heads + head) * K
        p += token[:, None] * (heads * K) + tl.arange(0, K)[None, :]
        tl.store(p, value.to(p_x.dtype.element_ty), mask=(token < T)[:, None])

    @triton.jit
    def _seen(row, column, window, bound, DOCUMENTS: tl.constexpr, BY_ROW: tl.constexpr):
        """Whether query `row` sees key `column`, both broadcast; `bound` is first[row], or last[column]."""
        distance = row - column
        seen = (distance >= 0) & (distance <= window)
        if DOCUMENTS:
            seen = seen & ((column >= bound) if BY_ROW else (row < bound))
        return seen

    @triton.jit
    def _keys_of(first_ptr, b, start, T, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
        """For the queries start .. start + ROWS: first key block, first block that all see whole, first block that the
        diagonal crosses, end; all but the end multiples of COLUMNS.
        """
        last_row = tl.minimum(start + ROWS, T) - 1
        low = tl.maximum(start - window, 0)  # the first query's first key, and the last's
        high = last_row - window
        if DOCUMENTS:
            low = tl.maximum(low, tl.load(first_ptr + b.to(tl.int64) * T + start))
            high = tl.maximum(high, tl.load(first_ptr + b.to(tl.int64) * T + last_row))
        begin = low // COLUMNS * COLUMNS
        diagonal = tl.maximum((start + 1) // COLUMNS * COLUMNS, begin)
        whole = tl.minimum(tl.maximum(tl.cdiv(high, COLUMNS) * COLUMNS, begin), diagonal)
        if not SPLIT:
            whole = begin
            diagonal = begin
        return begin, whole, diagonal, last_row + 1

    @triton.jit
    def _attend(acc, total, top, q, k_x, v_x, b, group, row, first, begin, end, T, stride_k, stride_v, window, scale,
                MASK: tl.constexpr, DOCUMENTS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
                TMA: tl.constexpr):  # fmt: skip
        """Take in the key blocks begin .. end: acc [ROWS, K], total and top [ROWS], in powers of two."""
        for start in range(begin, end, COLUMNS):
            k = _load(k_x, b, start, group, T, stride_k, COLUMNS, K, TMA)
            s = dot(q, k.T)
            if MASK:
                column = start + tl.arange(0, COLUMNS)
                s = tl.where(_seen(row[:, None], column[None, :], window, first[:, None], DOCUMENTS, True), s, -1.0e30)
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            v = _load(v_x, b, start, group, T, stride_v, COLUMNS, K, TMA)
            acc = dot(p.to(v.dtype), v, acc)
            top = higher
        return acc, total, top

    @triton.jit
    def _tile_of(tile, tiles, T, H, ROWS: tl.constexpr, HEADS: tl.constexpr):
        """(row of the batch, head, first query) of a tile of ROWS queries: the longest of HEADS heads first."""
        blocks = tl.cdiv(T, ROWS)
        head, block = tile_order(tile, tiles // blocks, blocks, HEADS)
        return head // H, head % H, (blocks - 1 - block) * ROWS

    @triton.jit
    def _attention_forward_kernel(
        q_x, k_x, v_x, o_ptr, lse_ptr, first_ptr, tiles, T, H, G, stride_q, stride_k, stride_v, window, scale,
        DOCUMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
        SPLIT: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        """q [B, T, H, K], k and v [B, T, G, K] -> o [B, T, H, K], lse fp32 [B, H, T]. `scale` is log2(e)/sqrt(K).

        Tiles of one head follow each other, so that its keys stay in the L2, the longest first; of HEADS heads where
        each program walks over many tiles, so that all have as much to do.
        """
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            b, head, start = _tile_of(tile, tiles, T, H, ROWS, HEADS)
            group = head // (H // G)
            row = start + tl.arange(0, ROWS)
            first = tl.zeros([ROWS], tl.int32)
            if DOCUMENTS:
                first = tl.load(first_ptr + b.to(tl.int64) * T + row, mask=row < T, other=0)
            q = _load(q_x, b, start, head, T, stride_q, ROWS, K, TMA)
            begin, whole, diagonal, end = _keys_of(first_ptr, b, start, T, window, ROWS, COLUMNS, DOCUMENTS, SPLIT)
            acc = tl.zeros([ROWS, K], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            top = tl.full([ROWS], -1.0e30, tl.float32)
            if SPLIT:
                acc, total, top = _attend(
                    acc, total, top, q, k_x, v_x, b, group, row, first, begin, whole, T, stride_k, stride_v,
                    window, scale, True, DOCUMENTS, COLUMNS, K, TMA,
                )  # fmt: skip
                acc, total, top = _attend(
                    acc, total, top, q, k_x, v_x, b, group, row, first, whole, diagonal, T, stride_k, stride_v,
                    window, scale, False, DOCUMENTS, COLUMNS, K, TMA,
                )  # fmt: skip
            acc, total, top = _attend(
                acc, total, top, q, k_x, v_x, b, group, row, first, diagonal, end, T, stride_k, stride_v,
                window, scale, True, DOCUMENTS, COLUMNS, K, TMA,
            )  # fmt: skip
            _store(o_ptr, acc / total[:, None], b, start, head, T, H, ROWS, K)
            lse = (top + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_ptr + (b.to(tl.int64) * H + head) * T + row, lse, mask=row < T)


# ---- backward kernels ---------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _dq_of(dq, q, do, lse, delta, k_x, v_x, b, group, row, first, begin, end, T, stride_k, stride_v, window, scale,
               MASK: tl.constexpr, DOCUMENTS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
        """Add the key blocks begin .. end to dq [ROWS, K]; lse in powers of two."""
        for start in range(begin, end, COLUMNS):
            k = _load(k_x, b, start, group, T, stride_k, COLUMNS, K, TMA)
            p = tl.exp2(dot(q, k.T) * scale - lse[:, None])
            if MASK:
                column = start + tl.arange(0, COLUMNS)
                p = tl.where(_seen(row[:, None], column[None, :], window, first[:, None], DOCUMENTS, True), p, 0.0)
            v = _load(v_x, b, start, group, T, stride_v, COLUMNS, K, TMA)
            below = tl.zeros([q.shape[0], COLUMNS], tl.float32) - delta[:, None]
            ds = p * dot(do, v.T, below)
            dq = dot(ds.to(k.dtype), k, dq)
        return dq

    @triton.jit
    def _attention_dq_kernel(
        q_x, k_x, v_x, o_x, do_x, dq_ptr, lse_ptr, delta_ptr, first_ptr, tiles, T, H, G,
        stride_q, stride_k, stride_v, stride_do, window, scale,
        DELTA_GIVEN: tl.constexpr, DOCUMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        """do [B, T, H, K] and what forward saw -> dq [B, T, H, K]; writes delta fp32 [B, H, T] unless it is given."""
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            b, head, start = _tile_of(tile, tiles, T, H, ROWS, HEADS)
            group = head // (H // G)
            row = start + tl.arange(0, ROWS)
            first = tl.zeros([ROWS], tl.int32)
            if DOCUMENTS:
                first = tl.load(first_ptr + b.to(tl.int64) * T + row, mask=row < T, other=0)
            q = _load(q_x, b, start, head, T, stride_q, ROWS, K, TMA)
            do = _load(do_x, b, start, head, T, stride_do, ROWS, K, TMA)
            at = (b.to(tl.int64) * H + head) * T + row
            lse = tl.load(lse_ptr + at, mask=row < T, other=0.0) * 1.4426950408889634
            if DELTA_GIVEN:
                delta = tl.load(delta_ptr + at, mask=row < T, other=0.0)
            else:
                o = _load(o_x, b, start, head, T, H * K, ROWS, K, TMA)
                delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
                tl.store(delta_ptr + at, delta, mask=row < T)
            begin, whole, diagonal, end = _keys_of(first_ptr, b, start, T, window, ROWS, COLUMNS, DOCUMENTS, SPLIT)
            dq = tl.zeros([ROWS, K], tl.float32)
            if SPLIT:
                dq = _dq_of(
                    dq, q, do, lse, delta, k_x, v_x, b, group, row, first, begin, whole, T, stride_k, stride_v,
                    window, scale, True, DOCUMENTS, COLUMNS, K, TMA,
                )  # fmt: skip
                dq = _dq_of(
                    dq, q, do, lse, delta, k_x, v_x, b, group, row, first, whole, diagonal, T, stride_k, stride_v,
                    window, scale, False, DOCUMENTS, COLUMNS, K, TMA,
                )  # fmt: skip
            dq = _dq_of(
                dq, q, do, lse, delta, k_x, v_x, b, group, row, first, diagonal, end, T, stride_k, stride_v,
                window, scale, True, DOCUMENTS, COLUMNS, K, TMA,
            )  # fmt: skip
            _store(dq_ptr, dq * (scale * 0.6931471805599453), b, start, head, T, H, ROWS, K)

    @triton.jit
    def _dkdv_of(dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, begin, end, T, H, stride_q, stride_do,
                 window, scale, MASK: tl.constexpr, DOCUMENTS: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
        """Add the query blocks begin .. end to dk and dv [COLUMNS, K]; everything transposed: keys by queries."""
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            q = _load(q_x, b, start, head, T, stride_q, ROWS, K, TMA)
            lse = _load_scalars(lse_x, b, head, start, T, H, ROWS, TMA) * 1.4426950408889634
            p = tl.exp2(dot(k, q.T) * scale - lse[None, :])
            if MASK:
                p = tl.where(_seen(row[None, :], column[:, None], window, last[:, None], DOCUMENTS, False), p, 0.0)
            do = _load(do_x, b, start, head, T, stride_do, ROWS, K, TMA)
            dv = dot(p.to(do.dtype), do, dv)
            # The sum starts at -delta: one register an element less than a difference afterwards.
            delta = _load_scalars(delta_x, b, head, start, T, H, ROWS, TMA)
            below = tl.zeros([COLUMNS, ROWS], tl.float32) - delta[None, :]
            ds = p * dot(v, do.T, below)
            dk = dot(ds.to(q.dtype), q, dk)
        return dk, dv

    @triton.jit
    def _dkdv_of_head(dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, begin, whole, edge, end, T, H,
                      stride_q, stride_do, window, scale, DOCUMENTS: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
        """Add all queries of one head."""
        if SPLIT:
            dk, dv = _dkdv_of(
                dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, begin, whole, T, H,
                stride_q, stride_do, window, scale, True, DOCUMENTS, ROWS, COLUMNS, K, TMA,
            )  # fmt: skip
            dk, dv = _dkdv_of(
                dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, whole, edge, T, H,
                stride_q, stride_do, window, scale, False, DOCUMENTS, ROWS, COLUMNS, K, TMA,
            )  # fmt: skip
        return _dkdv_of(
            dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, edge, end, T, H,
            stride_q, stride_do, window, scale, True, DOCUMENTS, ROWS, COLUMNS, K, TMA,
        )  # fmt: skip

    @triton.jit
    def _attention_dkdv_kernel(
        q_x, k_x, v_x, do_x, dk_ptr, dv_ptr, lse_x, delta_x, last_ptr, T, H, G,
        stride_q, stride_k, stride_v, stride_do, window, scale,
        GROUPED: tl.constexpr, DOCUMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
        TMA: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        """do and what forward saw -> dk and dv [B, T, G, K]. The heads of a group are added one after another.

        One program a tile: a loop over tiles, as the other kernels have it, costs registers that this one lacks. Early
        keys are seen by the most queries, so the tiles' own order is the longest first.
        """
        blocks = tl.cdiv(T, COLUMNS)
        tile = tl.program_id(0)
        group = tile // blocks % G
        b = tile // blocks // G
        start = tile % blocks * COLUMNS
        column = start + tl.arange(0, COLUMNS)
        # Queries that see the first key of the block, and any of it, end here.
        short = tl.minimum(start + window + 1, T)
        end = tl.minimum(start + COLUMNS + window, T)
        last = tl.full([COLUMNS], 0, tl.int32)
        if DOCUMENTS:
            p_last = last_ptr + b.to(tl.int64) * T
            last = tl.load(p_last + column, mask=column < T, other=0)
            short = tl.minimum(short, tl.load(p_last + start))
            end = tl.minimum(end, tl.load(p_last + tl.minimum(start + COLUMNS, T) - 1))
        begin = start // ROWS * ROWS
        whole = tl.minimum(tl.cdiv(start + COLUMNS - 1, ROWS) * ROWS, tl.cdiv(end, ROWS) * ROWS)
        edge = tl.maximum(short // ROWS * ROWS, whole)
        if not SPLIT:
            whole = begin
            edge = begin
        k = _load(k_x, b, start, group, T, stride_k, COLUMNS, K, TMA)
        v = _load(v_x, b, start, group, T, stride_v, COLUMNS, K, TMA)
        dk = tl.zeros([COLUMNS, K], tl.float32)
        dv = tl.zeros([COLUMNS, K], tl.float32)
        if GROUPED:
            for head in range(group * (H // G), (group + 1) * (H // G)):
                dk, dv = _dkdv_of_head(
                    dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, head, column, last, begin, whole, edge, end, T, H,
                    stride_q, stride_do, window, scale, DOCUMENTS, ROWS, COLUMNS, K, TMA, SPLIT,
                )  # fmt: skip
        else:
            dk, dv = _dkdv_of_head(
                dk, dv, k, v, q_x, do_x, lse_x, delta_x, b, group, column, last, begin, whole, edge, end, T, H,
                stride_q, stride_do, window, scale, DOCUMENTS, ROWS, COLUMNS, K, TMA, SPLIT,
            )  # fmt: skip
        _store(dk_ptr, dk * (scale * 0.6931471805599453), b, start, group, T, G, COLUMNS, K)
        _store(dv_ptr, dv, b, start, group, T, G, COLUMNS, K)


# ---- launcher -----------------------------------------------------------------------------------------------------


def _tokenwise(x: Tensor) -> Tensor:
    """x [B, T, heads, K] itself where only the distance between tokens is unusual (a part of a QKV product), else a
    copy. Descriptors need that distance and the address in multiples of 16 bytes.
    """
    _, t, heads, k = x.shape
    step = x.stride(1)
    usual = x.stride() == (t * step, step, k, 1) and step >= heads * k
    if usual and step * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() would leave a part of a tensor where it is


def _operand(x: Tensor, rows: int, tma: int) -> Any:
    """What the kernel gets of x [B, T, heads, K]: itself, or a descriptor of tiles of `rows` tokens and one head."""
    if not tma:
        return x
    b, t, heads, k = x.shape
    return TensorDescriptor(x, [b, t, heads * k], [x.stride(0), x.stride(1), 1], [1, rows, k])


def heads_together(programs: int) -> int:
    """Of how many heads a launch takes the longest tiles first. With 16, none of 132 programs has more than 1.03 times
    the average to do at the baseline's lengths, 8k and 16k; with one, 1.19 times. Their keys and values are 16 MB at
    T = 2048.
    """
    return 16 if programs else 1


def _scalars(x: Tensor, rows: int, tma: int) -> Any:
    """The same of x fp32 [B, H, T]."""
    if not tma:
        return x
    b, heads, t = x.shape
    return TensorDescriptor(x, [b * heads, t], [t, 1], [1, rows])


def _plan(kernel: str, q: Tensor, groups: int, window: int) -> tuple[dict[str, int], int, int]:
    """(the launch's constants and options, programs for each multiprocessor, window no wider than the row)."""
    t, heads, head_dim = q.shape[1:]
    key = config_key(head_dim, window < t - 1, kernel == "attention_dkdv" and groups != heads)
    config = dict(launch_config(kernel, head_dim, key, q.dtype, t))
    return config, config.pop("PROGRAMS"), min(window, t)


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K], k and v [B, T, G, K], all of one dtype -> (o [B, T, H, K], lse fp32 [B, H, T], natural)."""
    b, t, heads, head_dim = q.shape
    groups = k.shape[2]
    config, programs, window = _plan("attention_forward", q, groups, window)
    q, k, v = _tokenwise(q), _tokenwise(k), _tokenwise(v)
    o = torch.empty(b, t, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, heads, t, dtype=torch.float32, device=q.device)
    tiles = b * heads * -(-t // config["ROWS"])
    if tiles:
        rows, columns, tma = config["ROWS"], config["COLUMNS"], config["TMA"]
        _attention_forward_kernel[product.grid(tiles, programs, q.device)](
            _operand(q, rows, tma), _operand(k, columns, tma), _operand(v, columns, tma), o, lse,
            documents.first if documents else lse, tiles, t, heads, groups, q.stride(1), k.stride(1), v.stride(1),
            window, LOG2E * head_dim**-0.5, DOCUMENTS=documents is not None, K=head_dim,
            HEADS=heads_together(programs), **config,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    documents: Documents | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`'s q, k and v.

    Args:
        do: [B, T, H, K].
        delta: fp32 [B, H, T], row sums of do times o, where they are known already; formed here otherwise.
    """
    b, t, heads, head_dim = q.shape
    groups = k.shape[2]
    q, k, v, do = _tokenwise(q), _tokenwise(k), _tokenwise(v), _tokenwise(do)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sums = torch.empty_like(lse) if delta is None else delta.contiguous()
    scale = LOG2E * head_dim**-0.5
    strides = (q.stride(1), k.stride(1), v.stride(1), do.stride(1))
    if not q.numel():
        return dq, dk, dv
    config, programs, window = _plan("attention_dq", q, groups, window)
    rows, columns, tma = config["ROWS"], config["COLUMNS"], config["TMA"]
    tiles = b * heads * -(-t // rows)
    _attention_dq_kernel[product.grid(tiles, programs, q.device)](
        _operand(q, rows, tma), _operand(k, columns, tma), _operand(v, columns, tma), _operand(o, rows, tma),
        _operand(do, rows, tma), dq, lse, sums, documents.first if documents else lse, tiles, t, heads, groups,
        *strides, window, scale, DELTA_GIVEN=delta is not None, DOCUMENTS=documents is not None, K=head_dim,
        HEADS=heads_together(programs), **config,
    )  # fmt: skip
    config, _, window = _plan("attention_dkdv", q, groups, window)
    rows, columns, tma = config["ROWS"], config["COLUMNS"], config["TMA"]
    _attention_dkdv_kernel[(b * groups * -(-t // columns),)](
        _operand(q, rows, tma), _operand(k, columns, tma), _operand(v, columns, tma), _operand(do, rows, tma),
        dk, dv, _scalars(lse, rows, tma), _scalars(sums, rows, tma), documents.last if documents else lse,
        t, heads, groups, *strides, window, scale,
        GROUPED=heads != groups, DOCUMENTS=documents is not None, K=head_dim, **config,
    )  # fmt: skip
    return dq, dk, dv


# ---- what ships, for the compile gate -----------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every kernel for 16-bit elements and head dims 64 and 128: defaults with and without documents and groups, and
    what was tuned.
    """
    cases = {}
    for kernel in KERNELS:
        for head_dim in (64, 128):
            for grouped in (False, True):
                full, band = (config_key(head_dim, banded, grouped) for banded in (False, True))
                shipped = [
                    (default_config(kernel, head_dim, full, "ampere"), tuple(c for c in ARCHITECTURES if c < 100)),
                    (default_config(kernel, head_dim, full, "pointers"), tuple(c for c in ARCHITECTURES if c >= 100)),
                    (default_config(kernel, head_dim, full, "hopper"), (90,)),
                    (default_config(kernel, head_dim, full, "blackwell"), (100,)),
                ]
                shipped += [found for key in (full, band) for found in tuning.of_all_gpus(kernel, key)]
                for config, capabilities in shipped:
                    for documents in (False, True):
                        case = compile_case(kernel, head_dim, config, documents, grouped, capabilities)
                        cases[case.key, capabilities] = case
    return list(cases.values())


def compile_case(
    kernel: str, head_dim: int, config: dict[str, int], documents: bool, grouped: bool, capabilities: tuple[int, ...]
) -> CompileCase:
    """One configuration of one kernel for bf16."""
    function, by_rows, by_columns, rest = {
        "attention_forward": (_attention_forward_kernel, ("q",), ("k", "v"), ("o_ptr", "lse_ptr", "first_ptr")),
        "attention_dq": (
            _attention_dq_kernel, ("q", "o", "do"), ("k", "v"), ("dq_ptr", "lse_ptr", "delta_ptr", "first_ptr"),
        ),
        "attention_dkdv": (
            _attention_dkdv_kernel, ("q", "do"), ("k", "v"), ("dk_ptr", "dv_ptr", "lse_x", "delta_x", "last_ptr"),
        ),
    }[kernel]  # fmt: skip
    dkdv = kernel == "attention_dkdv"
    words = [
        kernel, f"K={head_dim}", "documents" if documents else "", "grouped" if dkdv and grouped else "",
        f"{config['ROWS']}x{config['COLUMNS']}", f"warps={config['num_warps']} stages={config['num_stages']}",
        *(name.lower() for name in ("TMA", "SPLIT", "PROGRAMS") if config[name]),
    ]  # fmt: skip
    constants: dict[str, Any] = {"DOCUMENTS": documents, "K": head_dim} | config
    programs = constants.pop("PROGRAMS")
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
    if dkdv:
        constants["GROUPED"] = grouped
    else:
        constants["HEADS"] = heads_together(programs)
    if kernel == "attention_dq":
        constants["DELTA_GIVEN"] = False
    tma, rows = config["TMA"], config["ROWS"]
    signature = dict.fromkeys(function.arg_names, "i32") | {"scale": "fp32"}
    for x in (*by_rows, *by_columns):
        tokens = rows if x in by_rows else config["COLUMNS"]
        signature[f"{x}_x"] = f"tensordesc<bf16[1,{tokens},{head_dim}]>" if tma else "*bf16"
    numbers = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "first_ptr": "*i32", "last_ptr": "*i32"}
    numbers |= dict.fromkeys(("lse_x", "delta_x"), f"tensordesc<fp32[1,{rows}]>" if tma else "*fp32")
    signature |= {x: numbers.get(x, "*bf16") for x in rest}
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    key = " ".join(filter(None, words))
    return CompileCase(key, function, signature, constants, options, capabilities, tensor_cores=True)
