"""What would be launched on the card that `offline.pretend` plays: every kernel, in order, with the bytes it moves.

    with Recorder() as seen:
        step(batch)

A fake tensor mode in which compiled code runs. Inductor's kernels are compiled when they would be launched; so are
ours, through their operators' own code, with the launch configurations of this card; what the vendor's libraries
compute is noted as the operation that torch calls.

Bytes: of an Inductor kernel its own estimate (each buffer once, of a slice what is sliced). Of any other operation its
tensors read once and written once, so of an operator of ours what goes in and comes out, not what it hands from one of
its launches to the next. That is a floor: a product reads its factors more than once, past the L2.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch._inductor.fx_passes.pad_mm as pad_mm
import triton
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from hotloop.kernels.compiling import resources

__all__ = ["Recorder"]

# They make or name memory, and launch nothing.
_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "alias", "detach", "set_",
    "lift_fresh", "_reshape_alias", "record_stream",
}  # fmt: skip
_ACCUMULATE = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}


class Recorder(FakeTensorMode):
    """torch's mode of tensors without memory, which notes what compiled code would launch on a GPU.

    Attributes:
        stage: what is going on, "" for what does not count; launches carry it.
        launches: (stage, name, the operator of ours that it is part of, bytes) -> how often.
        kernels: name -> of each configuration: registers, stack, shared (bytes), warps.
        accumulated: stage and name of what adds into one place from many, in no order or one by one.
        timed: what torch would decide by timing it on the device, and another decision gives other bits.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.stage = ""
        self.launches: Counter[tuple[str, str, str, int]] = Counter()
        self.kernels: dict[str, list[dict[str, int]]] = {}
        self.accumulated: set[str] = set()
        self.timed: set[str] = set()
        self._inside = ""  # the operator of ours whose code is running
        self._names: dict[str, str] = {}  # source of an Inductor kernel -> its name here
        counters.clear()
        _hook(self)

    @contextlib.contextmanager
    def at(self, stage: str) -> Iterator[None]:
        was, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = was

    def facts(self, broken: str = "") -> dict[str, Any]:
        """For JSON: {"breaks": why graphs broke, `broken` among them, "accumulated", "timed", "kernels", "launches":
        [[stage, name, the operator of ours that it is part of, bytes, times]]}.
        """
        return {
            "breaks": sorted({*map(str, counters["graph_break"]), *([broken] if broken else [])}),
            "accumulated": sorted(self.accumulated),
            "timed": sorted(self.timed),
            "kernels": self.kernels,
            "launches": [[*key, times] for key, times in self.launches.items() if key[0]],
        }

    def name_of(self, tuner: CachingAutotuner) -> str:
        """Of an Inductor kernel; each graph counts from 0, so equal names of other code get a number."""
        if tuner.fn.src not in self._names:
            name = tuner.inductor_meta["kernel_name"]
            same = sum(other == name or other.startswith(f"{name} (") for other in self._names.values())
            self._names[tuner.fn.src] = f"{name} ({same + 1})" if same else name
        return self._names[tuner.fn.src]

    def note(self, name: str, moved: int) -> None:
        self.launches[self.stage, name, self._inside, 0 if self._inside else moved] += 1

    def compiled(self, name: str, made: list[Any]) -> None:
        known = self.kernels.setdefault(name, [])
        for k in made:
            facts = resources(k.asm["cubin"]) | {"shared": k.metadata.shared, "warps": k.metadata.num_warps}
            if facts not in known:
                known.append(facts)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if TracingContext.try_get() is not None:  # torch.compile is at work on a graph
            return super().dispatch(func, types, args, kwargs)
        name = f"{func.namespace}::{func._schema.name.partition('::')[2]}"
        if func.namespace == "hotloop":
            return self._ours(name, func, args, kwargs)
        out = super().dispatch(func, types, args, kwargs)
        if self.in_kernel_invocation or func.namespace == "prim" or func.is_view or name.partition("::")[2] in _NOTHING:
            return out
        if moved := _moved(func, args, kwargs, out):
            self.note(f"{name} {_shapes(args)}", moved)
        if name.partition("::")[2] in _ACCUMULATE and _argument(func, args, kwargs, "accumulate"):
            self.accumulated.add(f"{self.stage}: {name}(accumulate=True)")
        return out

    def _ours(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator of ours on fakes, by its own code."""
        inside, self._inside = self._inside, name
        try:
            with self:
                out = OPDEFS[name]._init_fn(*args, **kwargs)
        finally:
            self._inside = inside
        self.note(f"{name} {_shapes(args)}", _moved(func, args, kwargs, out))
        return out


def _shapes(args: Any) -> str:
    """Of the first two tensors: 262144x512 512x1536"""
    found = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)][:2]
    return " ".join("x".join(map(str, x.shape)) or "scalar" for x in found)


def _label(function: JITFunction[Any], kernel: Any) -> str:
    """One of ours with its constants, and with the sizes that are no multiple of 16, by which its code differs."""
    names = function.arg_names
    constants = {names[i]: value for (i,), value in kernel.src.constants.items() if value is not None}
    whole = {path[0] for path, facts in kernel.src.attrs.items() if facts}
    odd = [n for n, kind in kernel.src.signature.items() if kind in ("i32", "i64") and names.index(n) not in whole]
    words = [f"{n}={value}" for n, value in constants.items() if n.isupper()]
    return " ".join([function.fn.__name__, *words, *(f"{n}%16" for n in odd)])


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    names = [a.name for a in func._schema.arguments]
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else kwargs.get(name)


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of an operation's tensors on the device: read once, written once; `out=` is written only."""
    total, seen = 0, set()
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only = written and (argument.is_out or func._schema.name.endswith(("::copy_", "::zero_", "::fill_")))
        for x in tree_leaves(value):
            if isinstance(x, torch.Tensor) and id(x) not in seen:
                seen.add(id(x))
                total += _bytes(x) * (2 if written and not only else 1)
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor) and id(x) not in seen:
            seen.add(id(x))
            total += _bytes(x)
    return total


def _bytes(x: torch.Tensor) -> int:
    if x.device.type != "cuda":
        return 0
    places = functools.reduce(lambda n, d: n * (d[0] if d[1] else 1), zip(x.shape, x.stride(), strict=True), 1)
    return places * x.element_size()  # what is broadcast is there once


def _hook(seen: Recorder) -> None:
    """Put the recorder in the place of launches and of timings on the device; for the rest of the process."""
    made: list[Any] = []
    compile_source, run = triton.compile, JITFunction.run

    def compile_and_keep(*args: Any, **kwargs: Any) -> Any:
        made.append(compile_source(*args, **kwargs))
        return made[-1]

    def precompile(tuner: Any, *args: Any, **kwargs: Any) -> None:
        if not tuner.compile_results:
            made.clear()
            tuner.compile_results = [tuner._precompile_config(c) for c in tuner.configs]
            name = seen.name_of(tuner)
            seen.compiled(name, made)
            if len(made) > 1 and tuner.inductor_meta.get("num_reduction"):
                seen.timed.add(f"{name}: {len(made)} ways to sum")
            if tuner.inductor_meta.get("atomic_add_found"):
                seen.accumulated.add(f"{name}: atomic additions")

    def launch(tuner: Any, *args: Any, **kwargs: Any) -> None:
        seen.note(seen.name_of(tuner), round(tuner.inductor_meta.get("kernel_num_gb", 0) * 1e9))

    def launch_ours(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        name = _label(function, kernel)
        seen.compiled(name, [kernel])
        seen.note(name, 0)
        return kernel

    def should_pad(match: Any, left: Any, right: Any, op: Any, *args: Any) -> bool:
        seen.timed.add(f"{op} of {list(left.shape)} and {list(right.shape)}: whether padded")
        return False

    places: list[tuple[Any, str, Any]] = [
        (triton, "compile", compile_and_keep), (CachingAutotuner, "precompile", precompile),
        (CachingAutotuner, "run", launch), (JITFunction, "run", launch_ours), (pad_mm, "_should_pad", should_pad),
    ]  # fmt: skip
    for owner, name, replacement in places:
        setattr(owner, name, replacement)
