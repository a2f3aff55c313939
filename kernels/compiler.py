"""torch.compile, with operators of ours in place of what they compute.

Dynamo's graph, before autograd is traced, is searched for each operator's pattern, the largest first; what the
selection (`kernels.dispatch`) names is put in, and Inductor compiles the rest. What is not found runs as it is written,
so an edit that loses a fusion costs speed and nothing else; how much was found is in `implementations()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from hotloop.kernels import dispatch
from hotloop.kernels.block import mlp, qkv, residual, stream
from hotloop.kernels.fuse.matching import Found, Graph
from hotloop.kernels.fuse.terms import Term
from hotloop.kernels.gemm import weight_gradient
from hotloop.kernels.head import cross_entropy, embedding

__all__ = ["compile", "found_in", "put_in", "search"]

Function = TypeVar("Function", bound=Callable[..., Any])

# Largest first: what one has taken is no part of another.
PATTERNS = (qkv, mlp, residual, cross_entropy, embedding, weight_gradient)
SAID = ("qkv", "mlp", "residual", "loss", "embedding")  # of these, how many of how many; others by number alone


def compile(function: Function) -> Function:
    """torch.compile of a function of tensors, as one graph of fixed shapes, with the selected operators put in."""
    compiled: Any = torch.compile(function, backend=_backend, dynamic=False, fullgraph=True)
    return compiled  # type: ignore[no-any-return]


def _backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
    put_in(module)
    return torch._inductor.compile(module, inputs)


def search(graph: Graph, patterns: Sequence[Any] = PATTERNS) -> tuple[list[Found], dict[str, int]]:
    """All that is there of these, and of each how many places there are that could be one."""
    places: dict[str, int] = {}
    found: list[Found] = []
    for pattern in patterns:
        here, places[pattern.NAME] = pattern.find(graph)
        found += here
    return found, places


def found_in(found: list[Found], places: dict[str, int]) -> str:
    """mlp 8 of 8, qkv 8 of 8, residual 16 of 16, loss 1 of 1, embedding 5 of 5"""
    counts = [name for one in found for name in one.counts]
    return ", ".join(f"{name} {counts.count(name)} of {max(places[name], counts.count(name))}" for name in SAID)


def put_in(module: fx.GraphModule) -> str:
    """Put the selected operators into a graph of Dynamo's, and say what was found."""
    graph = Graph(module.graph)
    found, places = search(graph)
    here = {name for one in found for name in one.counts}
    if places[weight_gradient.NAME]:  # any product can be one, alone or within another operator
        here.add(weight_gradient.NAME)
    selected = [pattern for pattern in PATTERNS if pattern.NAME in here and _selected(pattern, graph.device)]
    chosen = found
    if len(selected) < len(PATTERNS):  # what a larger pattern has taken, a smaller one may take in its place
        graph = Graph(module.graph)
        chosen, _ = search(graph, selected)
    _replace(graph, chosen)
    module.graph.lint()
    module.recompile()
    said = f"{found_in(found, places)}; put in: {', '.join(sorted({one.name for one in chosen})) or 'none'}"
    dispatch.told["fusions"] = said
    return said


def _selected(pattern: Any, device: str) -> bool:
    # Tables in plain PyTorch too: a GPU adds their gradients in any order otherwise.
    return dispatch.choose(pattern.NAME, device) or (pattern is embedding and device == "cuda")


def _replace(graph: Graph, chosen: list[Found]) -> None:
    now: dict[fx.Node, fx.Node] = {}  # a node of the old graph -> what has its value
    squares: dict[fx.Node, fx.Node] = {}  # of a node of the old graph
    orders: dict[tuple[fx.Node, int], fx.Node] = {}

    def at(one: Found) -> int:
        """Before the first output, or else after the last input."""
        inputs = [graph.at[t.node] + 1 for t in one.inputs.values() if isinstance(t, Term) and t.node]
        return max(min(graph.at[node] for node in one.outputs), *inputs, 0)

    for one in sorted(chosen, key=at):
        place = at(one)
        with graph.graph.inserting_before(graph.nodes[place]):
            given = {name: _emit(graph.graph, value, now) for name, value in one.inputs.items()}
            stream_in = one.inputs["x"].node if "x" in one.inputs else None
            if one.wants_squares and stream_in is not None:
                if stream_in not in squares:
                    squares[stream_in] = _call(graph.graph, stream.squares, {"x": given["x"]})
                given["squares"] = squares[stream_in]
            if one.wants_order:
                key = (one.inputs["tokens"].node, one.inputs["weight"].shape[0])
                if key not in orders:
                    sorted_by = {"tokens": given["tokens"], "vocab": key[1]}
                    orders[key] = _call(graph.graph, embedding.token_order, sorted_by)
                given["order"] = orders[key]
            made = _call(graph.graph, one.put_in, given)
            values, count = [made], len(one.outputs) + bool(one.gives)
            if count > 1:
                values = [graph.graph.call_function(operator.getitem, (made, i)) for i in range(count)]
        for old, new in zip(one.outputs, values, strict=False):
            new.meta.update(old.meta)
            old.replace_all_uses_with(new)
            now[old] = new
        if one.gives == "squares":
            squares[one.outputs[0]] = values[-1]
        if one.gives == "x" and stream_in is not None:
            nodes = one.nodes
            now.get(stream_in, stream_in).replace_all_uses_with(
                values[-1], delete_user_cb=lambda u, n=nodes, p=place: graph.at.get(u, -1) >= p and u not in n
            )
            values[-1].meta.update(stream_in.meta)
            now[stream_in] = values[-1]
    dead = {node for one in chosen for node in one.nodes}
    for node in reversed(graph.nodes):
        if node in dead:
            graph.graph.erase_node(node)


def _call(graph: fx.Graph, function: Callable[..., Any], given: dict[str, Any]) -> fx.Node:
    # AOTAutograd's cache takes no graph with functions that it does not know; what these do is in its key already
    # (`kernels.cache_key`).
    known = torch._inductor.config.unsafe_marked_cacheable_functions
    known.setdefault(f"{function.__module__}.{function.__name__}", "")
    return graph.call_function(function, kwargs=given)


def _emit(graph: fx.Graph, value: Any, now: dict[fx.Node, fx.Node]) -> Any:
    """A term as a node, a tuple of rows of weights as one."""
    if not isinstance(value, Term):
        return value
    if value.node is not None:
        return now.get(value.node, value.node)
    whole, start, stop = value.args  # rows
    return _call(graph, _rows, {"weight": now.get(whole.node, whole.node), "start": start, "stop": stop})


def _rows(weight: Tensor, start: int, stop: int) -> Tensor:
    return weight[start:stop]
