"""A graph as what it computes: what is only written in another way becomes one term.

`x ** 2`, `x * x` and `x.square()` are one term, so are a chunk and a slice, three products and the parts of one with
their weights joined. Conversions of the type are seen through (whoever matches checks the types of all that lies in
between), and what reshapes goes outside of what works on each element. A node that is nothing known is a term of its
own. Patterns are functions in plain PyTorch, traced by `torch.fx` and turned into terms by the same rules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["COMMUTATIVE", "Term", "Terms", "pattern_of", "same"]

COMMUTATIVE = ("add", "mul")
_ELEMENTWISE = ("relu", "square", "tanh", "sigmoid", "mul", "div")  # of one tensor, and a number if two

# What a graph's node may call, functions and methods -> what it is here.
_KNOWN: dict[Any, str] = {
    call: name
    for name, calls in {
        "linear": (F.linear,),
        "relu": (F.relu, torch.relu, "relu"),
        "square": (torch.square, "square"),
        "pow": (operator.pow, torch.pow, "pow"),
        "tanh": (torch.tanh, F.tanh, "tanh"),
        "sigmoid": (torch.sigmoid, F.sigmoid, "sigmoid"),
        "add": (operator.add, torch.add, "add"),
        "sub": (operator.sub, torch.sub, "sub"),
        "mul": (operator.mul, torch.mul, "mul"),
        "div": (operator.truediv, torch.div, "div"),
        "rms_norm": (F.rms_norm, torch.rms_norm),
        "embedding": (F.embedding,),
        "cross_entropy": (F.cross_entropy,),
        "cat": (torch.cat, torch.concat),
        "chunk": (torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split"),
        "item": (operator.getitem,),
        "narrow": (torch.narrow, "narrow"),
        "reshape": (
            torch.reshape, "view", "reshape", "unflatten", torch.unflatten, "flatten", torch.flatten, "view_as",
            "reshape_as", "unsqueeze", torch.unsqueeze, "squeeze", torch.squeeze,
        ),
        "cast": ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous"),
    }.items()
    for call in calls
}  # fmt: skip


@dataclass(eq=False, repr=False)
class Term:
    """A value of a graph, by what it computes of others.

    Attributes:
        op: what it computes; `node` for nothing known, `leaf` for an argument of a pattern.
        args: terms and numbers.
        node: of the graph, that has this value; None where no single one has.
        nodes: of the graph, that belong to this term alone: `node`, and those that were seen through below it.
    """

    op: str
    args: tuple[Any, ...] = ()
    node: fx.Node | None = None
    nodes: frozenset[fx.Node] = field(default_factory=frozenset)

    @property
    def value(self) -> Tensor:
        """A fake tensor of its shape and type."""
        if self.op == "rows":
            whole, start, stop = self.args
            part: Tensor = whole.value[start:stop]
            return part
        assert self.node is not None
        found: Tensor = self.node.meta["example_value"]
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments have one value, because they are one or are computed alike."""
    if a is b or not (isinstance(a, Term) and isinstance(b, Term)):
        return a is b or (type(a) is type(b) and a == b)
    if a.op == b.op == "node":  # the same part of the same tensor, taken twice
        picks = a.node is not None and b.node is not None and a.node.target is b.node.target is operator.getitem
        return picks and a.node.args == b.node.args  # type: ignore[union-attr]
    return a.op == b.op and a.op != "leaf" and len(a.args) == len(b.args) and all(map(same, a.args, b.args))


class Terms:
    """The terms of a graph's nodes."""

    def __init__(self, graph: fx.Graph, known: bool = True, numbers: Collection[str] = ()) -> None:
        """`known`: every node says its value's shape and type, as Dynamo's do; a pattern's do not. `numbers`: arguments
        of a pattern that are no tensors.
        """
        self.known, self.numbers = known, numbers
        self._terms: dict[fx.Node, Term] = {}
        for node in graph.nodes:
            self._terms[node] = self._make(node)

    def __getitem__(self, node: fx.Node) -> Term:
        return self._terms[node]

    def arg(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self._terms[arg]
        return tuple(self.arg(a) for a in arg) if isinstance(arg, tuple | list) else arg

    def _make(self, node: fx.Node) -> Term:
        own = frozenset((node,))
        if node.op == "placeholder" and not self.known:
            return Term("number" if node.target in self.numbers else "leaf", (node.target,), node, own)
        name = _KNOWN.get(node.target, "") if node.op in ("call_function", "call_method") else ""
        if self.known and not _is_tensor(node) and name != "chunk":
            name = ""
        args = [self.arg(a) for a in node.args]
        kwargs = {k: self.arg(v) for k, v in node.kwargs.items()}
        made = getattr(self, f"_{name}")(node, args, kwargs) if name else None
        return made or Term("node", (), node, own)

    # ---- each of these: the term of a node, or None where it is not quite what it is called --------------------

    def _plain(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        """Two operands at most, each a tensor or a number."""
        name = _KNOWN[node.target]
        if kwargs.get("inplace") or (set(kwargs) - {"inplace"}) or len(args) > 2:
            return None
        if name == "mul" and len(args) == 2 and args[0] is args[1]:
            name, args = "square", args[:1]
        return _outside(name, tuple(args), node)

    _tanh = _sigmoid = _add = _sub = _mul = _div = _square = _plain

    def _relu(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        return None if True in args or kwargs.get("inplace") else _outside("relu", tuple(args[:1]), node)

    def _pow(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        return _outside("square", tuple(args[:1]), node) if len(args) == 2 and args[1] in (2, 2.0) else None

    def _linear(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        x, weight, bias = _given(args, kwargs, "input", "weight", "bias")
        return Term("linear", (x, weight), node, frozenset((node,))) if bias is None else None

    def _rms_norm(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        x, shape, weight, eps = _given(args, kwargs, "input", "normalized_shape", "weight", "eps")
        if weight is not None or len(shape) != 1:
            return None
        if eps is None and self.known and x.value.dtype == torch.float32:  # torch's default depends on the type
            eps = torch.finfo(torch.float32).eps
        return Term("rms_norm", (x, eps), node, frozenset((node,)))

    def _embedding(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        tokens, weight, padding, most, _, scaled, sparse = _given(args, kwargs, *names)
        if padding is not None or most is not None or scaled or sparse:
            return None
        return Term("embedding", (tokens, weight), node, frozenset((node,)))

    def _cross_entropy(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        logits, targets, weight, average, ignored, reduce, reduction, smoothing = _given(args, kwargs, *names)
        if (
            any(given is not None for given in (weight, average, reduce))
            or smoothing
            or reduction not in (None, "mean")
        ):
            return None
        return Term("cross_entropy", (logits, targets, -100 if ignored is None else ignored), node, frozenset((node,)))

    def _cat(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        parts, dim = _given(args, kwargs, "tensors", "dim")
        dim = 0 if dim is None else dim
        if self.known and dim >= 0:
            dim -= node.meta["example_value"].ndim
        return Term("cat", (*parts, dim), node, frozenset((node,)))

    def _chunk(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        """Known by its items."""
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if self.known and dim >= 0:
            dim -= args[0].value.ndim
        return Term("chunk", (args[0], dim), node, frozenset((node,)))

    def _narrow(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        x, dim, start, length = _given(args, kwargs, "input", "dim", "start", "length")
        if not isinstance(start, int):
            return None
        dim = dim - x.value.ndim if dim >= 0 else dim
        return self._slice(node, x, frozenset((node,)), dim, start, start + length)

    def _item(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        x, key = args
        if isinstance(x, Term) and x.op == "chunk":
            whole, dim = x.args
            if not self.known:  # a pattern's chunks are halves
                return Term("half", (whole, key), node, x.nodes | {node})
            parts = x.node.meta["example_value"] if x.node else ()
            start = sum(part.shape[dim] for part in parts[:key])
            return self._slice(node, whole, x.nodes | {node}, dim, start, start + parts[key].shape[dim])
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is None or k is ... or k == slice(None) for k in keys):
            return _reshaped(x, node)
        if not self.known or not _is_tensor(x.node):
            return None
        if ... in keys:
            at = keys.index(...)
            fill = x.value.ndim - sum(k is not None and k is not ... for k in keys)
            keys = (*keys[:at], *[slice(None)] * fill, *keys[at + 1 :])
        cut = [(i, k) for i, k in enumerate(keys) if k != slice(None)]
        if len(cut) != 1 or not isinstance(cut[0][1], slice):
            return None
        i, part = cut[0]
        if any(isinstance(end, fx.Node | Term | torch.SymInt) for end in (part.start, part.stop, part.step)):
            return None
        start, stop, step = part.indices(x.shape[i])
        return self._slice(node, x, frozenset((node,)), i - x.value.ndim, start, stop) if step == 1 else None

    def _slice(self, node: fx.Node, x: Term, nodes: frozenset[fx.Node], dim: int, start: int, stop: int) -> Term:
        size = x.shape[dim] if x.node else -1
        if (start, stop) == (0, size):
            return Term(x.op, x.args, node, x.nodes | nodes)
        if x.op == "reshape" and x.node and dim == -2 and x.args[0].node is not None:  # whole heads
            width, inner = x.shape[-1], x.args[0]
            if inner.shape == (*x.shape[:-2], x.shape[-2] * width):
                part = self._part(inner, start * width, stop * width, x.nodes | nodes)
                return Term("reshape", (part,), node, frozenset((node,)))
        if dim == -1 and x.op == "linear":
            part = self._part(x, start, stop, nodes)
            return Term(part.op, part.args, node, part.nodes)
        if dim == -1 and 2 * (stop - start) == size and start in (0, stop - start):
            return Term("half", (x, int(start > 0)), node, nodes)
        return Term("slice", (x, dim, start, stop), node, nodes)

    def _part(self, x: Term, start: int, stop: int, nodes: frozenset[fx.Node]) -> Term:
        """Columns of a product: a product with rows of its weight."""
        if x.op != "linear":
            return Term("slice", (x, -1, start, stop), None, nodes)
        weight: Term = x.args[1]
        if weight.op == "cat" and weight.args[-1] == -2:
            at = 0
            for part in weight.args[:-1]:
                if (at, at + part.shape[0]) == (start, stop):
                    return Term("linear", (x.args[0], part), None, x.nodes | weight.nodes | nodes)
                at += part.shape[0]
        return Term("linear", (x.args[0], Term("rows", (weight, start, stop))), None, x.nodes | nodes)

    def _reshape(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        return _reshaped(args[0], node)

    def _cast(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Term | None:
        x: Term = args[0]
        own = frozenset((node,))
        if self.known and node.meta["example_value"].device != x.value.device:
            return None
        if x.op == "leaf":
            return x
        return Term(x.op, x.args, node, own if x.op == "node" else x.nodes | own)


def _is_tensor(node: fx.Node | None) -> bool:
    return node is not None and isinstance(node.meta.get("example_value"), Tensor)


def _given(args: list[Any], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """A call's arguments by name; None for what is not given."""
    found = dict(zip(names, args, strict=False)) | kwargs
    return [found.get(name) for name in names]


def _reshaped(x: Term, node: fx.Node) -> Term:
    if x.op == "reshape":
        return Term("reshape", x.args, node, x.nodes | {node})
    return Term("reshape", (x,), node, frozenset((node,)))


def _outside(name: str, args: tuple[Any, ...], node: fx.Node) -> Term:
    """An operation on each element; a reshape of its one tensor comes after it."""
    tensors = [a for a in args if isinstance(a, Term) and a.op != "number"]
    if name in _ELEMENTWISE and len(tensors) == 1 and tensors[0].op == "reshape":
        inner = tuple(a.args[0] if a is tensors[0] else a for a in args)
        return Term("reshape", (Term(name, inner, None, frozenset((node,))),), node, tensors[0].nodes | {node})
    return Term(name, args, node, frozenset((node,)))


def pattern_of(function: Callable[..., Any]) -> Any:
    """The term that a function in plain PyTorch computes of its arguments, or a tuple of terms. What it takes as a
    `float` is a number of a graph, all else a tensor.
    """
    numbers = [name for name, kind in function.__annotations__.items() if kind == "float"]
    graph = fx.symbolic_trace(function).graph
    terms = Terms(graph, known=False, numbers=numbers)
    (output,) = (node for node in graph.nodes if node.op == "output")
    return terms.arg(output.args[0])
