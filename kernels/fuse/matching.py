"""Where a graph computes what an operator of ours computes, and the operator in its place.

An operator's file says what it looks like: a pattern in plain PyTorch, a check of shapes and types, and what takes its
place. It is found where the terms agree, constants included; where nothing else uses a value in between; where all of
it records gradients or none of it does; with no type in between that is neither the inputs' nor fp32, whether autocast
or a conversion made it; and where no tensor of it is written to in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hotloop.kernels.fuse.terms import COMMUTATIVE, Term, Terms, pattern_of, same

__all__ = ["FLOATS", "Found", "Graph", "match"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GRAD = torch._C._set_grad_enabled
_ENTER, _EXIT = torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode
_IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or")}


def match(pattern: Any, term: Any, bound: dict[str, Any]) -> Iterator[tuple[dict[str, Any], frozenset[fx.Node]]]:
    """Each way in which `term` is an instance of `pattern`: (its arguments by name, the nodes that it takes in)."""
    if not isinstance(pattern, Term):
        if not isinstance(term, Term) and (pattern is term or pattern == term):
            yield bound, frozenset()
        return
    if pattern.op in ("leaf", "number"):
        (name,) = pattern.args
        tensor = isinstance(term, Term) and (term.node is not None or term.op == "rows")
        fits = tensor if pattern.op == "leaf" else isinstance(term, int | float)
        if fits and (name not in bound or same(bound[name], term)):
            yield {**bound, name: term}, frozenset()
        return
    if not isinstance(term, Term):
        return
    if pattern.op == "reshape" != term.op:  # to the shape that it has
        yield from match(pattern.args[0], term, bound)
        return
    if pattern.op != term.op or len(pattern.args) != len(term.args):
        return
    orders = [term.args, term.args[::-1]] if term.op in COMMUTATIVE and len(term.args) == 2 else [term.args]
    for args in orders:
        for found, nodes in _all(pattern.args, args, bound):
            yield found, nodes | term.nodes


def _all(
    patterns: tuple[Any, ...], terms: tuple[Any, ...], bound: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], frozenset[fx.Node]]]:
    if not patterns:
        yield bound, frozenset()
        return
    for found, nodes in match(patterns[0], terms[0], bound):
        for rest, more in _all(patterns[1:], terms[1:], found):
            yield rest, nodes | more


@dataclass
class Found:
    """What an operator computes, found in a graph.

    Attributes:
        name: of the operator.
        outputs: the nodes whose values it gives, in order.
        nodes: all that it takes the place of, outputs included.
        inputs: what it takes, by name: terms, numbers, None. Where `x` is among them and the operator takes sums of its
            squares, those of the operator that makes x are handed on.
        put_in: the function in their place; it gives the outputs in order, then what `gives` names.
        gives: "squares" of the first output; "x", with which the stream goes on.
        wants_squares, wants_order: whether `put_in` takes `squares`, and the `order` of `tokens`.
        counts: operators' names -> how many of what they compute this is.
    """

    name: str
    outputs: list[fx.Node]
    nodes: frozenset[fx.Node]
    inputs: dict[str, Any]
    put_in: Callable[..., Any]
    gives: str = ""
    wants_squares: bool = False
    wants_order: bool = False
    counts: tuple[str, ...] = ()


class Graph:
    """A graph of Dynamo's, its terms, and what has been found in it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.nodes = graph, list(graph.nodes)
        self.terms = Terms(graph)
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.taken: set[fx.Node] = set()
        self.device = next((v.device.type for node in self.nodes for v in _tensors(node)), "cpu")
        self._state: dict[fx.Node, tuple[Any, ...]] = {}
        self._written: set[int] = set()
        grad: Any = torch.is_grad_enabled()
        inference = 0
        for node in self.nodes:
            if node.target is _GRAD:
                grad = node.args[0]
            inference += (node.target is _ENTER) - (node.target is _EXIT)
            self._state[node] = (grad, inference)
            if _writes(node):
                self._written |= {v.untyped_storage()._cdata for a in node.all_input_nodes for v in _tensors(a)}

    def matches(self, pattern: Callable[..., Any]) -> Iterator[tuple[fx.Node, dict[str, Any], frozenset[fx.Node]]]:
        """(node, the pattern's arguments, nodes that it takes in), where a node computes what the pattern does; of a
        value and its conversions, the first.
        """
        term = pattern_of(pattern)
        for node in self.nodes:
            for given, nodes in match(term, self.terms[node], {}):
                yield node, given, nodes

    def fits(
        self, nodes: frozenset[fx.Node], outputs: list[fx.Node], inputs: dict[str, Any], dtype: torch.dtype,
        out: torch.dtype | None = None,
    ) -> bool:  # fmt: skip
        """Whether an operator that computes in `dtype` can take the place of these nodes: see above.

        Args:
            out: the outputs' type, if not the same.
        """
        taken = [t.node for t in inputs.values() if isinstance(t, Term) and t.node]
        if nodes & self.taken or nodes.intersection(taken) or dtype not in FLOATS:
            return False
        if any(user not in nodes for node in nodes - set(outputs) for user in node.users):
            return False
        if len({self._state[node] for node in nodes}) != 1:
            return False
        inner = [v for node in nodes for v in _tensors(node)]
        if any(v.is_floating_point() and v.dtype not in (dtype, torch.float32) for v in inner):
            return False
        if any(v.dtype != (out or dtype) for node in outputs for v in _tensors(node)):
            return False
        values = [*inner, *(v for node in taken for v in _tensors(node))]
        if any(not isinstance(size, int) for v in values for size in v.shape):
            return False
        if self._written & {v.untyped_storage()._cdata for v in values}:
            return False
        # All that it takes is there before anything reads what it gives.
        last = max((self.at[node] for node in taken), default=-1)
        readers = [self.at[user] for node in outputs for user in node.users if user not in nodes]
        return last < min(readers, default=len(self.nodes))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("example_value")
    return [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Tensor)]


def _writes(node: fx.Node) -> bool:
    """Whether a node writes to one of its inputs."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if getattr(node.target, "__module__", "") == "_operator":
        return node.target in _IN_PLACE or node.target is operator.setitem
    ends = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return node.op in ("call_function", "call_method") and (
        ends or node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True
    )
