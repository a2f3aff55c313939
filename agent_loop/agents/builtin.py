"""The built-in agent: a seeded search over train.py's constants. Needs no network and no model.

It changes one constant at a time, sometimes two, by a fixed step up or down. What was kept is tried further in the same
direction; what was discarded is avoided, and its opposite favoured. It is a function of the seed, the experiment's
number and the history alone, so a night can be killed, resumed or repeated and makes the same proposals.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from hotloop.agent_loop.agents.agent import AgentError, Context, Turn
from hotloop.agent_loop.source import syntax_hash

__all__ = ["KNOBS", "BuiltinAgent", "Constant", "constants", "replace_constant"]

Number = int | float


@dataclass(frozen=True)
class Knob:
    """A constant that is searched.

    `up` and `down` are how promising each direction is at first; `step` gives the next value up (+1) or down (-1), or
    None.
    """

    name: str
    up: float
    down: float
    step: Callable[[Number, int], Number | None]


def _times(factor: float, low: float, high: float) -> Callable[[Number, int], Number | None]:
    def step(value: Number, way: int) -> Number | None:
        new = float(f"{value * factor**way:.3g}")
        return new if low <= new <= high and new != value else None

    return step


def _plus(amount: Number, low: Number, high: Number) -> Callable[[Number, int], Number | None]:
    def step(value: Number, way: int) -> Number | None:
        new = round(value + way * amount, 6)
        return new if low <= new <= high else None

    return step


def _doubled(low: int, high: int) -> Callable[[Number, int], Number | None]:
    def step(value: Number, way: int) -> Number | None:
        new = int(value) * 2 if way > 0 else int(value) // 2
        return new if low <= new <= high and int(value) % 2 == 0 else None

    return step


# In the order in which a researcher would try them on a short budget: the sizes that decide how many tokens and steps
# there are, then the rates, then the rest. Too short a budget for the model is the common case, so sizes are tried
# downwards first.
KNOBS = (
    Knob("ASPECT_RATIO", 2.0, 5.0, _doubled(8, 256)),
    Knob("TOTAL_BATCH_SIZE", 1.0, 5.0, _doubled(2**10, 2**21)),
    Knob("MATRIX_LR", 2.5, 1.5, _times(1.5, 1e-4, 1.0)),
    Knob("EMBEDDING_LR", 1.5, 1.0, _times(1.5, 1e-3, 5.0)),
    Knob("UNEMBEDDING_LR", 1.5, 1.0, _times(2.0, 1e-5, 1.0)),
    Knob("WARMDOWN_RATIO", 1.5, 1.0, _plus(0.15, 0.05, 1.0)),
    Knob("DEPTH", 1.0, 1.0, _plus(1, 1, 64)),
    Knob("FINAL_LR_FRAC", 1.0, 0.5, _plus(0.05, 0.0, 0.5)),
    Knob("WEIGHT_DECAY", 0.5, 0.5, _times(2.0, 0.01, 2.0)),
    Knob("SCALAR_LR", 0.5, 0.5, _times(2.0, 0.01, 5.0)),
    Knob("MUON_RAMP", 0.5, 0.5, _doubled(4, 2000)),
    Knob("MUON_MOMENTUM", 0.5, 0.5, _plus(0.02, 0.8, 0.99)),
    Knob("MUON_BETA2", 0.25, 0.25, _plus(0.03, 0.8, 0.99)),
    Knob("SOFTCAP", 0.25, 0.25, _times(1.5, 5.0, 60.0)),
    Knob("WARMUP_RATIO", 0.25, 0.25, _plus(0.05, 0.0, 0.4)),
    Knob("ROPE_BASE", 0.25, 0.25, _times(4.0, 100.0, 1e6)),
)


@dataclass(frozen=True)
class Constant:
    """A number in train.py: its value and where its literal stands (line from 1, columns in bytes)."""

    name: str
    value: Number
    line: int
    begin: int
    end: int
    as_power: bool  # written 2**k


def _number(node: ast.expr) -> Number | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _number(node.left), _number(node.right)
        if base == 2 and isinstance(exponent, int) and 0 <= exponent < 64:
            return int(2**exponent)
    return None


def constants(source: bytes, preset: str) -> dict[str, Constant]:
    """The numbers in force: upper-case assignments of the module; for the laptop preset LAPTOP's entries on top."""
    found: dict[str, Constant] = {}

    def note(name: str, node: ast.expr) -> None:
        value = _number(node)
        if value is not None and node.lineno == node.end_lineno:
            power = isinstance(node, ast.BinOp)
            found[name] = Constant(name, value, node.lineno, node.col_offset, node.end_col_offset or 0, power)

    table: ast.Call | None = None
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name == "LAPTOP" and isinstance(statement.value, ast.Call):
                table = statement.value
            elif name.isupper():
                note(name, statement.value)
    if preset == "laptop" and table is not None:
        for keyword in table.keywords:
            if keyword.arg:
                note(keyword.arg, keyword.value)
    return found


def replace_constant(source: bytes, constant: Constant, value: Number) -> bytes:
    """`source` with that one literal replaced; nothing else moves."""
    lines = source.split(b"\n")
    line = lines[constant.line - 1]
    text = f"2**{int(value).bit_length() - 1}" if constant.as_power and int(value).bit_count() == 1 else repr(value)
    lines[constant.line - 1] = line[: constant.begin] + text.encode() + line[constant.end :]
    return b"\n".join(lines)


_CHANGE = re.compile(r"([A-Z][A-Z0-9_]*) ([^\s,]+) -> ([^\s,]+)")


class BuiltinAgent:
    """A seeded search over train.py's constants: no model, no network."""

    name = "builtin"
    ahead = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(self, context: Context) -> Turn:
        """Raises AgentError where no constant is left to change."""
        here = constants(context.source, context.preset)
        weights = self._weights(context)
        rng = random.Random(f"{self.seed}:{context.number}")
        moves = [
            (knob.name, way, new)
            for knob in KNOBS
            if knob.name in here
            for way in (1, -1)
            if (new := knob.step(here[knob.name].value, way)) is not None
        ]
        while moves:
            first = rng.choices(moves, [weights[name, way] for name, way, _ in moves])[0]
            picked = [first]
            others = [m for m in moves if m[0] != first[0]]
            if others and len(context.history) > 8 and rng.random() < 0.3:
                picked.append(rng.choices(others, [weights[name, way] for name, way, _ in others])[0])
            source, words = context.source, []
            for name, _, new in picked:
                source = replace_constant(source, constants(source, context.preset)[name], new)
                words.append(f"{name} {here[name].value} -> {new}")
            if syntax_hash(source) not in context.seen:
                (context.worktree / "train.py").write_bytes(source)
                return Turn(", ".join(words))
            if len(picked) == 1:
                moves.remove(first)
        return self._further(context, rng)

    @staticmethod
    def _further(context: Context, rng: random.Random) -> Turn:
        """Where every single step was tried: several at once, ever more of them."""
        here = constants(context.source, context.preset)
        knobs = [k for k in KNOBS if k.name in here]
        for steps in range(2, 12 if knobs else 0):
            for _ in range(30):
                values: dict[str, Number] = {}
                for knob in rng.choices(knobs, k=steps):
                    new = knob.step(values.get(knob.name, here[knob.name].value), rng.choice((1, -1)))
                    if new is not None:
                        values[knob.name] = new
                source, words = context.source, []
                for name, value in values.items():
                    source = replace_constant(source, constants(source, context.preset)[name], value)
                    words.append(f"{name} {here[name].value} -> {value}")
                if words and syntax_hash(source) not in context.seen:
                    (context.worktree / "train.py").write_bytes(source)
                    return Turn(", ".join(words))
        raise AgentError("the built-in agent has no constant of train.py left to change", permanent=True)

    @staticmethod
    def _weights(context: Context) -> dict[tuple[str, int], float]:
        weights = {(knob.name, way): knob.up if way > 0 else knob.down for knob in KNOBS for way in (1, -1)}
        for tried in context.history:
            for name, old, new in _CHANGE.findall(tried.description):
                try:
                    way = 1 if float(new) > float(old) else -1
                except ValueError:  # another agent's words
                    continue
                if (name, way) not in weights:
                    continue
                if tried.decision == "keep":
                    weights[name, way] *= 3.0
                    weights[name, -way] *= 0.1
                else:
                    weights[name, way] *= 0.1
                    weights[name, -way] *= 1.5
        return weights
