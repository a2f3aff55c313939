"""Each implementation of an operator on the device at hand: right by fp64, the same bits each time, and how fast beside
the compiled reference, at the shapes of the preset. What is wrong, varies, faults or hangs is out with its reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.harness.proof import device as dev
from hotloop.harness.proof.accuracy import bitwise_repeats, check, fresh, outputs, upstream
from hotloop.harness.proof.operators import OPERATORS, Operator
from hotloop.harness.tuning.children import die_with_parent, faults_are_reasons, in_children
from hotloop.harness.tuning.notes import UNFINISHED, Notes
from hotloop.harness.tuning.search import entry
from hotloop.harness.tuning.selection import Unfit, fastest_quantile
from hotloop.kernels import attend, dispatch, operators, reference

__all__ = ["Case", "Verdict", "function_of", "largest_first", "prove", "verdicts"]

RUNS = 100  # that must give the same bits
ROUNDS = 25
HANG_S = 180.0  # the truth in fp64 and a first compilation are part of it
MARGIN = 0.01  # of the time: less is no gain
TABLE = f"{__name__}:cases"


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        key: the operator's name in a selection, its own, and the shape.
        names: of the implementations beside the reference.
        prove: raises Unfit for one that is wrong or varies.
        rounds: the reference's time over its own, of some rounds in turns.
    """

    key: str
    names: tuple[str, ...]
    prove: Callable[[str], None]
    rounds: Callable[[str], list[float]]


@dataclass(frozen=True)
class Verdict:
    """Of an implementation, over all shapes of its operator.

    Attributes:
        ratio: the reference's time over its own, the geometric mean over the shapes.
        wins: at every shape by more than the spread and the margin.
        reason: why it is out; empty where it is proven.
    """

    ratio: float = 0.0
    wins: bool = False
    reason: str = ""


def function_of(op: Operator, implementation: str) -> Callable[..., Any]:
    """An implementation as a function of `op.make`'s arguments."""
    if implementation == "reference":
        return op.bind(reference)
    if op.name == "attention" and implementation != "triton":
        return functools.partial(attend.attention, backend=implementation)
    return op.bind(operators, implementation.removeprefix("triton").removeprefix("-"))


def largest_first(names: Iterable[str]) -> list[str]:
    """Attention, then by what they take at the least, so that little time proves what matters most."""

    def least_s(name: str) -> float:
        ops = [(op, op.shapes["baseline"], op.passes[-1]) for op in OPERATORS.values() if op.switch == name]
        return sum(floor_of(op.flops[way](sizes), op.bytes[way](sizes)) for op, sizes, way in ops)

    return sorted(names, key=lambda name: (name != "attention", -least_s(name), name))


def floor_of(flops: float, moved: float) -> float:
    """Seconds, at the rates of an H100: only their order counts."""
    return max(flops / 6e14, moved / 2.8e12)


def cases(operator: str, divisor: int) -> Iterator[Case]:
    """What an operator stands for, at the shapes of the h100 preset, rows divided; on a CPU, as a trial, at the tiny
    one.
    """
    on_gpu = torch.cuda.is_available()
    for op in OPERATORS.values():
        for shape, sizes in op.shapes.items() if op.switch == operator else ():
            if shape.startswith("baseline") if on_gpu else shape == "tiny":
                rows = {k: n // divisor for k, n in sizes.items() if k == "B" or (k == "M" and "D" in sizes)}
                yield _case(op, shape, dict(sizes) | (rows if on_gpu else {}))


def _case(op: Operator, shape: str, sizes: dict[str, int]) -> Case:
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    args = op.make(sizes, torch.bfloat16 if on_gpu else torch.float32, dev.device())
    names = tuple(n for n in dispatch.OPERATORS[op.switch].implementations if n != "reference")
    if op.name == "attention":
        able = attend.backends(dev.device().type)[0]
        names = tuple(n for n in names if n in able)
    grads = upstream(op, args)
    compiled = functools.cache(lambda: dev.compiled(op.bind(reference)) if on_gpu else op.bind(reference))

    def work(function: Callable[..., Any], given: list[Any]) -> None:
        outs = outputs(function(*given))
        if op.gradients:
            torch.autograd.grad(outs, [given[i] for i in op.gradients], grads)

    def prove(name: str) -> None:
        function = function_of(op, name)
        wrong = [e for e in check(op, args, function) if not e.fine]
        if wrong:
            worst = max(wrong, key=lambda e: e.ours)
            raise Unfit(f"it is wrong: {worst.what} off by {worst.ours:.1e}, {worst.allowed:.1e} is allowed ({shape})")
        runs = RUNS if on_gpu else 3
        if different := bitwise_repeats(op, args, function, runs):
            raise Unfit(f"it varies: {different} of {runs} runs gave other bits ({shape})")

    def rounds(name: str) -> list[float]:
        found = []
        for _ in range((ROUNDS if on_gpu else 3) + 2):  # the first two compile and allocate
            marks = []
            for function in (compiled(), function_of(op, name)):
                given = fresh(args, op)
                dev.flush()
                start = dev.now()
                work(function, given)
                marks.append((start, dev.now()))
            found.append((marks[0][1] - marks[0][0]) / (marks[1][1] - marks[1][0]))
        return found[2:]

    return Case(f"{op.switch} {op.name} {shape}", names, prove, rounds)


def prove(
    names: Sequence[str], notes: Path, stamp: dict[str, Any], divisor: int, deadline: float,
    say: Callable[[str], None], step: Callable[[str], None], table: str = TABLE, hang_s: float = HANG_S,
) -> None:  # fmt: skip
    """Prove and time what is not yet, each operator in a process of its own, until the deadline (time.time()).

    Args:
        step: told each operator before it begins.
        table: `module:name` of a function like `cases`.
    """
    env = {"HOTLOOP_KERNELS": "triton", "HOTLOOP_ATTENTION": "", "HOTLOOP_PROFILE": ""}
    for operator in names:
        step(operator)
        if time.time() < deadline:
            arguments = [operator, str(notes), json.dumps(stamp), str(divisor), str(deadline), table]
            in_children(f"{__name__}:child", arguments, notes, deadline, hang_s, say, env)


def child() -> None:
    die_with_parent()
    operator, path, stamp, divisor, deadline, table = sys.argv[1:]
    module, _, name = table.partition(":")
    notes = Notes(Path(path), json.loads(stamp))
    if notes.body.pop("trying", None):  # of a run that was ended from outside
        notes.save()
    for case in getattr(importlib.import_module(module), name)(operator, int(divisor)):
        here = entry(notes, case.key)
        for implementation in case.names:
            if implementation in here["out"] or implementation in here["ratios"]:
                continue
            if time.time() > float(deadline):
                sys.exit(UNFINISHED)
            notes.body["trying"] = [case.key, implementation]
            notes.save()
            try:
                with faults_are_reasons():
                    case.prove(implementation)
                    here["ratios"][implementation] = case.rounds(implementation)
            except Unfit as e:
                here["out"][implementation] = str(e)
            notes.body.pop("trying")
            notes.save()


def verdicts(notes: Notes, operator: str) -> dict[str, Verdict]:
    """Implementation -> what was found of it; those that were not reached are left out."""
    by_shape = [here for key, here in notes.body.items() if key.split()[0] == operator and isinstance(here, dict)]
    found = {}
    for name in dict.fromkeys(n for here in by_shape for n in (*here["out"], *here["ratios"])):
        reason = next((here["out"][name] for here in by_shape if name in here["out"]), "")
        ratios = [here["ratios"].get(name, []) for here in by_shape]
        if reason:
            found[name] = Verdict(reason=reason)
        elif all(ratios):
            ratio = statistics.geometric_mean(statistics.median(r) for r in ratios)
            found[name] = Verdict(ratio, all(fastest_quantile(r) > 1 + MARGIN for r in ratios))
    return found
