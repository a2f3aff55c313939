"""Is an implementation right? Error against fp64, next to plain PyTorch's error in the same dtype, on the same tensors.

The fp64 truth goes through the rows in pieces, so that the baseline's 262,144 x 8,192 logits need no fp64 copy. No
speed is reported beside a wrong answer: the benchmarks call `check` first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.harness.proof.operators import Operator
from hotloop.kernels import operators, reference

__all__ = ["Errors", "bitwise_repeats", "check", "fresh", "poisoned_memory", "results"]

Function = Callable[..., Any]
TRUTH_ELEMENTS = 1 << 26  # fp64 elements of one intermediate: 512 MiB
# Below so many elements a relative error is chance, and plain PyTorch may be exact where another order of sums is not.
FEW = 4096


@dataclass(frozen=True)
class Errors:
    """One output or gradient: relative L2 errors against fp64, and what is allowed."""

    what: str
    ours: float
    plain: float
    allowed: float

    @property
    def fine(self) -> bool:
        return self.ours <= self.allowed  # False for NaN


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin give NaN, so that what a kernel does not write shows."""
    real: list[tuple[Any, str, Function]] = [(torch, n, getattr(torch, n)) for n in ("empty", "empty_like")]
    real.append((torch.Tensor, "new_empty", torch.Tensor.new_empty))

    def poisoned(make: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return call

    for owner, name, make in real:
        setattr(owner, name, poisoned(make))
    try:
        yield
    finally:
        for owner, name, make in real:
            setattr(owner, name, make)


def fresh(args: list[Any], op: Operator) -> list[Any]:
    """Arguments that may be differentiated and overwritten; the originals stay as they are."""
    made = list(args)
    for i in op.gradients:
        made[i] = args[i].detach().clone().requires_grad_()
    for i in op.mutates:
        made[i] = args[i].clone()
    return made


def outputs(out: Any) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return () if out is None else tuple(out) if isinstance(out, tuple | list) else (out,)


def results(function: Function, args: list[Any], op: Operator, grads: list[Tensor]) -> dict[str, Tensor]:
    """Every output and gradient of one call, by name; `grads` flow in, one for each output."""
    given = fresh(args, op)
    outs = outputs(function(*given))
    found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    found |= {f"overwritten {i}": given[i] for i in op.mutates}
    if op.gradients:
        seeds = [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)]
        flown = torch.autograd.grad(outs, [given[i] for i in op.gradients], seeds)
        found |= {f"gradient {i}": g for i, g in zip(op.gradients, flown, strict=True)}
    return found


def upstream(op: Operator, args: list[Any]) -> list[Tensor]:
    """The gradients that flow in: 3 for a mean, else random tensors of the outputs' shapes."""
    if not op.gradients:
        return []
    if op.mean:
        return [torch.tensor(3.0, device=args[0].device)]
    with torch.no_grad():
        outs = outputs(op.bind(reference)(*args))
    return [torch.randn(out.shape, device=out.device).to(out.dtype) for out in outs]


def check(op: Operator, args: list[Any], ours: Function | None = None, *, loose: float | None = None) -> list[Errors]:
    """Errors of `ours` (default: the function of `kernels.operators`) and of plain PyTorch, against fp64.

    Args:
        args: in the dtype under test.
        loose: a limit in place of the table's, for an interpreter that rounds otherwise than the hardware.
    """
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    grad = upstream(op, args)
    with poisoned_memory():
        mine = results(ours or op.bind(operators), args, op, grad)
    # Where nothing adds up over the rows, plain PyTorch goes in pieces as well, for its memory's sake.
    piecewise = not op.mean and all(i in op.rows for i in op.gradients)
    try:
        plain = None if piecewise else results(op.bind(reference), args, op, grad)
    except torch.OutOfMemoryError:  # plain PyTorch does not fit; then the limit alone binds
        plain = {}
        torch.cuda.empty_cache()
    squares = _compare(op, *_folded(op, args, grad, mine), plain)
    limit = loose or op.tolerance[dtype].limit
    found = []
    for what, (true, mine_off, plain_off) in squares.items():
        # What is zero in truth (the gradient of a single score) has no relative error; there it is the RMS.
        scale = math.sqrt(true) if true > 1e-20 else math.sqrt(mine[what].numel())
        ours_error, plain_error = math.sqrt(mine_off) / scale, math.sqrt(plain_off) / scale
        # fp32 results (a loss) are held to fp32's own limit by 1.5 times the plain error or 1e-5.
        strict = mine[what].numel() > FEW and loose is None
        allowed = min(limit, max(1.5 * plain_error, 1e-5)) if strict else max(limit, 1.5 * plain_error)
        found.append(Errors(what, ours_error, plain_error, allowed))
    return found


def _folded(
    op: Operator, args: list[Any], grad: list[Tensor], mine: dict[str, Tensor]
) -> tuple[list[Any], list[Tensor], dict[str, Tensor]]:
    """The same in smaller rows, where the operator has a way to."""
    if op.fold is None:
        return args, grad, mine
    rows = [op.fold(a, args) if i in op.rows else a for i, a in enumerate(args)]
    return rows, [op.fold(g, args) for g in grad], {what: op.fold(x, args) for what, x in mine.items()}


def _compare(
    op: Operator, args: list[Any], grad: list[Tensor], mine: dict[str, Tensor], plain: dict[str, Tensor] | None
) -> dict[str, list[float]]:
    """What -> sums of squares: of the truth, of ours minus it, of plain minus it. `plain` None: piece by piece; what it
    lacks counts as infinitely far.
    """
    sums: dict[str, list[float]] = {}
    totals: dict[str, Tensor] = {}  # what adds up over the pieces: a mean, gradients of shared arguments

    def note(what: str, truth: Tensor, ours: Tensor, plainly: Tensor | None) -> None:
        entry = sums.setdefault(what, [0.0, 0.0, 0.0])
        entry[0] += float(truth.square().sum())
        entry[1] += float((ours.double() - truth).square().sum())
        entry[2] += math.inf if plainly is None else float((plainly.double() - truth).square().sum())

    n = args[op.rows[0]].shape[0]
    counted = _counted(op, args, slice(0, n))
    for piece in _pieces(op, args, n):
        part = [a[piece] if i in op.rows else a for i, a in enumerate(args)]
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in part]
        share = _counted(op, args, piece) / counted if op.mean else 1.0
        if op.mean and not share:
            continue
        seeds = [g.double() * share if op.mean else g[piece].double() for g in grad]
        truth = results(op.truth, wide, op, seeds)
        narrow = results(op.bind(reference), part, op, [g[piece] for g in grad]) if plain is None else {}
        for what, value in truth.items():
            position = int(what.split()[1]) if what.startswith("gradient") else None
            mean = op.mean and what.startswith("out")
            if mean or (position is not None and position not in op.rows):
                value = value * share if mean else value
                totals[what] = totals[what] + value if what in totals else value
            else:
                whole = plain.get(what) if plain else None
                note(what, value, mine[what][piece], narrow.get(what) if whole is None else whole[piece])
    for what, value in totals.items():
        note(what, value, mine[what], plain.get(what) if plain else None)
    return sums


def _counted(op: Operator, args: list[Any], piece: slice) -> int:
    """Rows that a mean counts: those with a target."""
    return int((args[op.rows[-1]][piece] >= 0).sum()) if op.mean else 1


def _pieces(op: Operator, args: list[Any], n: int) -> Iterator[slice]:
    widest = max(a.numel() // n for i, a in enumerate(args) if i in op.rows)
    shared = max(
        (a.shape[0] for i, a in enumerate(args) if isinstance(a, Tensor) and a.ndim and i not in op.rows), default=1
    )
    first = args[op.rows[0]]
    per_row = max(widest, shared * (first.numel() // n // first.shape[-1] if first.ndim > 1 else 1))
    if op.name == "attention":
        per_row = first.shape[1] ** 2 * first.shape[2]  # the scores
    step = max(1, TRUTH_ELEMENTS // max(1, per_row))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def bitwise_repeats(op: Operator, args: list[Any], function: Function, runs: int) -> int:
    """How many of `runs` calls gave other bits than the first, gradients included."""
    grad = upstream(op, args)
    first = results(function, args, op, grad)
    different = 0
    for _ in range(runs - 1):
        again = results(function, args, op, grad)
        different += any(not torch.equal(first[k], again[k]) for k in first)
    return different
