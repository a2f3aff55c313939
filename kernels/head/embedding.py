"""Embedding with a backward pass that repeats to the bit: sorted segments instead of atomics.

    y[i] = weight[tokens[i]];   dweight[v] = sum of dy[i] over the i with tokens[i] = v, in fp32, in the order of i

One stable sort of the tokens serves every table that is looked up with them (`token_order`). A token's segment is cut
into pieces of PIECE rows, so that a frequent token does not keep one program busy while the others are done; pieces
of one token are summed in order by a second kernel. At most V + M / PIECE pieces exist, so every shape is known
beforehand.

Where the kernel is off, a GPU gets the same sums in plain PyTorch (`sorted_embedding`): what torch has for this adds in
any order, or, asked for results that repeat, walks a frequent token's rows one after the other and keeps them all in
fp32. On a CPU torch's own backward pass is in order already.

Bytes, elements of b bytes: backward read M D b and 4 M, write V D b; tokens of several pieces add 8 D bytes a piece. In
plain PyTorch (V + M / PLAIN_PIECE) D 8 bytes of pieces more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from hotloop.kernels import reference, tuning
from hotloop.kernels.architectures import ARCHITECTURES
from hotloop.kernels.dispatch import HAVE_TRITON, CompileCase, KernelError, choose
from hotloop.kernels.fuse.matching import Found, Graph

if HAVE_TRITON:
    import triton
    import triton.language as tl

__all__ = [
    "NAME",
    "TokenOrder",
    "TokenRows",
    "compile_cases",
    "default_config",
    "embedding",
    "find",
    "search_space",
    "token_order",
]

NAME = "embedding"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PIECE, PLAIN_PIECE = 256, 32


class TokenOrder(NamedTuple):
    """One micro-batch's tokens, sorted.

    Attributes:
        order: int32 [M], positions of the tokens by token, then by position.
        offsets: int32 [V + 1], where each token's segment of `order` begins.
        pieces: int32 [V + 1], where each token's pieces begin.
        piece_token: int32 [V + M // piece], the token of a piece; V past the last.
    """

    order: Tensor
    offsets: Tensor
    pieces: Tensor
    piece_token: Tensor


class TokenRows(NamedTuple):
    """The same for plain PyTorch.

    Attributes:
        rows: int32 [PLAIN_PIECE, V + M // PLAIN_PIECE], the positions of each piece, in order; -1 past its end.
        pieces: int64 [V + 1], where each token's pieces begin.
    """

    rows: Tensor
    pieces: Tensor


def token_order(tokens: Tensor, vocab: int) -> TokenOrder | TokenRows | None:
    """Sort a micro-batch once for all tables; None where that is not needed: without gradients, and on a CPU.

    Args:
        tokens: int64 [...], M in all, each in [0, vocab).
    """
    if not torch.is_grad_enabled():
        return None
    if choose("embedding", tokens.device.type):
        return _sort(tokens, vocab, PIECE)
    return TokenRows(*token_rows(tokens, vocab)) if tokens.is_cuda else None


def _sort(tokens: Tensor, vocab: int, piece: int) -> TokenOrder:
    """Pieces of so many rows."""
    values, order = torch.sort(tokens.flatten(), stable=True)
    ids = torch.arange(vocab + 1, device=tokens.device)
    offsets = torch.searchsorted(values, ids)
    count = offsets.diff()
    pieces = torch.cat((offsets.new_zeros(1), ((count + piece - 1) // piece).cumsum(0)))
    most = vocab + tokens.numel() // piece
    piece_token = torch.searchsorted(pieces, torch.arange(most, device=tokens.device), right=True) - 1
    return TokenOrder(order.int(), offsets.int(), pieces.int(), piece_token.int())


def launch_config(dim: int) -> dict[str, int]:
    """Columns and rows a step and warps: as tuned on this GPU, else whole rows of up to 1,024 columns."""
    return tuning.config("embedding", f"D={dim}") or default_config(dim)


def default_config(dim: int) -> dict[str, int]:
    """By size."""
    block = min(1024, max(16, 1 << (dim - 1).bit_length()))
    return {"ROWS": max(1, 4096 // block), "BLOCK": block, "num_warps": 4}


def search_space(dim: int) -> list[dict[str, int]]:
    """Configurations worth timing."""
    block = min(1024, max(16, 1 << (dim - 1).bit_length()))
    return [
        {"ROWS": rows, "BLOCK": columns, "num_warps": warps}
        for columns in sorted({256, 512, block})
        for rows in (4, 8, 16)
        for warps in (4, 8)
        if 4 <= rows * columns // (32 * warps) <= 64
    ]


# ---- kernels ----------------------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def _embedding_pieces_kernel(
        grad_ptr, order_ptr, offsets_ptr, pieces_ptr, piece_token_ptr, dweight_ptr, partial_ptr, D, V,
        PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """grad [M, D] -> a piece's sum: into dweight [V, D] where it is its token's only one, else partial fp32."""
        piece = tl.program_id(0)
        token = tl.load(piece_token_ptr + piece)
        if token < V:
            first = tl.load(pieces_ptr + token)
            only = tl.load(pieces_ptr + token + 1) - first == 1
            begin = tl.load(offsets_ptr + token) + (piece - first) * PIECE
            end = tl.minimum(begin + PIECE, tl.load(offsets_ptr + token + 1))
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(begin, end, ROWS):
                place = start + tl.arange(0, ROWS)
                row = tl.load(order_ptr + place, mask=place < end, other=0).to(tl.int64)
                inside = (place < end)[:, None] & (column < D)[None, :]
                block = tl.load(grad_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
                total += tl.sum(block.to(tl.float32), 0)
            if only:
                at = token.to(tl.int64) * D + column
                tl.store(dweight_ptr + at, total.to(dweight_ptr.dtype.element_ty), mask=column < D)
            else:
                tl.store(partial_ptr + piece.to(tl.int64) * D + column, total, mask=column < D)

    @triton.jit
    def _embedding_tokens_kernel(pieces_ptr, dweight_ptr, partial_ptr, D, BLOCK: tl.constexpr):
        """A token's pieces, in order, into its row of dweight; zero where it has none."""
        token = tl.program_id(0)
        first = tl.load(pieces_ptr + token)
        last = tl.load(pieces_ptr + token + 1)
        if last - first != 1:
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            p_partial = partial_ptr + first.to(tl.int64) * D + column
            for _ in range(first, last):
                total += tl.load(p_partial, mask=column < D, other=0.0)
                p_partial += D
            at = token.to(tl.int64) * D + column
            tl.store(dweight_ptr + at, total.to(dweight_ptr.dtype.element_ty), mask=column < D)


def compile_cases() -> list[CompileCase]:
    """Both kernels at the widths that people use."""
    cases = []
    for dim in (512, 768, 2048):
        tuned = tuning.of_all_gpus("embedding", f"D={dim}")
        for config, capabilities in [(default_config(dim), tuple(ARCHITECTURES)), *tuned]:
            tables = dict.fromkeys(("order_ptr", "offsets_ptr", "pieces_ptr", "piece_token_ptr"), "*i32")
            outs = {"dweight_ptr": "*bf16", "partial_ptr": "*fp32"}
            options = {"num_warps": config["num_warps"]}
            block = {"BLOCK": config["BLOCK"]}
            key = f"D={dim} ROWS={config['ROWS']} BLOCK={config['BLOCK']} warps={config['num_warps']}"
            cases.append(
                CompileCase(
                    f"pieces {key}", _embedding_pieces_kernel,
                    {"grad_ptr": "*bf16", **tables, **outs, "D": "i32", "V": "i32"},
                    {"PIECE": PIECE, "ROWS": config["ROWS"], **block}, options, capabilities,
                )
            )  # fmt: skip
            signature = {"pieces_ptr": "*i32", **outs, "D": "i32"}
            tokens = CompileCase(f"tokens {key}", _embedding_tokens_kernel, signature, block, options, capabilities)
            cases.append(tokens)
    return cases


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("hotloop::embedding", mutates_args=())
def _forward_op(tokens: Tensor, weight: Tensor, order: list[Tensor]) -> Tensor:
    return torch.nn.functional.embedding(tokens, weight)


@_forward_op.register_fake
def _(tokens: Tensor, weight: Tensor, order: list[Tensor]) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("hotloop::embedding_backward", mutates_args=())
def _backward_op(grad: Tensor, order: list[Tensor], vocab: int) -> Tensor:
    d = grad.shape[-1]
    plan = TokenOrder(*order)
    dweight = torch.empty(vocab, d, dtype=grad.dtype, device=grad.device)
    partial = torch.empty(len(plan.piece_token), d, dtype=torch.float32, device=grad.device)
    config = launch_config(d)
    columns = -(-d // config["BLOCK"])
    _embedding_pieces_kernel[(len(plan.piece_token), columns)](
        grad, *plan, dweight, partial, d, vocab, PIECE=PIECE, **config
    )
    _embedding_tokens_kernel[(vocab, columns)](
        plan.pieces, dweight, partial, d, BLOCK=config["BLOCK"], num_warps=config["num_warps"]
    )
    return dweight


@_backward_op.register_fake
def _(grad: Tensor, order: list[Tensor], vocab: int) -> Tensor:
    return grad.new_empty(vocab, grad.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, order = inputs
    ctx.save_for_backward(*order)
    ctx.vocab = weight.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    order = list(ctx.saved_tensors)
    return None, _backward_op(grad.contiguous(), order, ctx.vocab), [None] * len(order)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hotloop::token_rows", mutates_args=())
def token_rows(tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """See `TokenRows`. An operator, so that it is done once, and not anew in every sum that reads it."""
    order, offsets, pieces, piece_token = (t.long() for t in _sort(tokens, vocab, PLAIN_PIECE))
    token = piece_token.clamp_max(vocab - 1)
    begin = offsets[token] + (torch.arange(len(token), device=tokens.device) - pieces[token]) * PLAIN_PIECE
    end = torch.where(piece_token < vocab, offsets[token + 1], 0)
    place = begin + torch.arange(PLAIN_PIECE, device=tokens.device)[:, None]
    rows = torch.nn.functional.pad(order, (0, 1))[place.clamp_max(len(order))]
    return torch.where(place < end, rows, -1).int(), pieces


@token_rows.register_fake
def _(tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    rows = tokens.new_empty(PLAIN_PIECE, vocab + tokens.numel() // PLAIN_PIECE, dtype=torch.int32)
    return rows, tokens.new_empty(vocab + 1, dtype=torch.int64)


@torch.library.custom_op("hotloop::sorted_embedding", mutates_args=())
def sorted_embedding(tokens: Tensor, weight: Tensor, rows: Tensor, pieces: Tensor) -> Tensor:
    """Rows of a table; its gradient by `sum_rows`. rows and pieces: see `TokenRows`."""
    return torch.nn.functional.embedding(tokens, weight)


@sorted_embedding.register_fake
def _(tokens: Tensor, weight: Tensor, rows: Tensor, pieces: Tensor) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@sorted_embedding.register_torch_dispatch(FunctionalTensorMode)
def _(mode: FunctionalTensorMode, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """In a graph that is compiled: torch's own, which Inductor fuses with what takes the rows."""
    with mode:
        return torch.nn.functional.embedding(args[0], args[1])


def sum_rows(grad: Tensor, rows: Tensor, pieces: Tensor) -> Tensor:
    """grad [M, D] -> [V, D]: each token's rows, in fp32 (fp64 for fp64).

    Compiled, the first sum gathers rows as it adds them: nothing of M D elements is written.
    """
    if not len(grad):
        return grad.new_zeros(len(pieces) - 1, grad.shape[1])
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = grad[rows.clamp_min(0).long()].to(wide)
    parts = torch.where((rows >= 0)[..., None], found, 0.0).sum(0)
    # One thread adds the pieces of a token in a column, in order, on every device.
    sums = torch.segment_reduce(parts, "sum", offsets=pieces, axis=0, unsafe=True, initial=0)
    return sums.to(grad.dtype)


def _setup_sorted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _sorted_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return None, sum_rows(grad.flatten(0, -2), *ctx.saved_tensors), None, None


sorted_embedding.register_autograd(_sorted_backward, setup_context=_setup_sorted)


# ---- function and pattern ---------------------------------------------------------------------------------------


def embedding(tokens: Tensor, weight: Tensor, order: TokenOrder | TokenRows | None = None) -> Tensor:
    """Rows of a table; see `reference`.

    Args:
        tokens: int64 [...], each in [0, V).
        weight: [V, D], bfloat16, float16 or float32.
        order: `token_order(tokens, V)`, where several tables share it; None sorts here.

    Returns:
        [..., D], of weight's dtype.

    Raises:
        KernelError: inputs that the kernel does not serve.
    """
    kernel = choose("embedding", weight.device.type)
    if kernel and (weight.ndim != 2 or weight.dtype not in DTYPES or tokens.dtype != torch.int64):
        raise KernelError(
            f"embedding serves int64 tokens and a bfloat16, float16 or float32 table [V, D], not {tokens.dtype} and "
            f"{weight.dtype} {list(weight.shape)}"
        )
    plan = order if order is not None else token_order(tokens, weight.shape[0])
    if plan is None:
        return reference.embedding(tokens, weight)
    vocab = weight.shape[0]
    if isinstance(plan, TokenRows):
        if plan.rows.shape[1] != vocab + tokens.numel() // PLAIN_PIECE or len(plan.pieces) != vocab + 1:
            raise KernelError(f"the order is one of other tokens than {tokens.numel()} of {vocab}")
        rows: Tensor = sorted_embedding(tokens, weight, *plan)
        return rows
    if len(plan.order) != tokens.numel() or len(plan.offsets) != vocab + 1:
        raise KernelError(
            f"the order is one of {len(plan.order)} tokens and {len(plan.offsets) - 1} rows, not of {tokens.numel()} "
            f"and {vocab}"
        )
    found: Tensor = _forward_op(tokens, weight, list(plan))
    return found


def find(graph: Graph) -> tuple[list[Found], int]:
    """Tables that are looked up and have a gradient; those of one tokens' share their order."""
    found = []
    for node, given, nodes in graph.matches(reference.embedding):
        tokens, weight = given["tokens"].value, given["weight"].value
        fits = weight.ndim == 2 and weight.dtype in DTYPES and weight.requires_grad and tokens.dtype == torch.int64
        if fits and torch.is_grad_enabled() and graph.fits(nodes, [node], given, weight.dtype):
            found.append(Found(NAME, [node], nodes, dict(given), embedding, counts=(NAME,), wants_order=True))
            graph.taken |= nodes
    return found, sum(node.target is torch.nn.functional.embedding for node in graph.nodes)
