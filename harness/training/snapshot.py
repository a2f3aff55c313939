"""What the warm-up may change, kept and put back: modules, optimizers, and every source of random numbers.

Tensors are put back in place, so that compiled code and CUDA graphs that hold their addresses stay right. What the
warm-up put in the place of a tensor or a number, by assignment, makes way for what was there.
"""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["Snapshot"]

PutBack = Callable[[], object]


class Snapshot:
    """The state of modules and optimizers, and of all random numbers, at the time when it is made.

    Args:
        objects: modules, optimizers, and what else has a `state_dict` and a `load_state_dict` (a learning rate's
            schedule, a gradient scaler).
        code: functions beside train.py's globals from which generators of its own can be reached.

    Raises:
        TypeError: for an object that is none of these.
    """

    def __init__(self, objects: tuple[Any, ...], code: tuple[Any, ...] = ()) -> None:
        self._put_back: list[PutBack] = []
        for o in objects:
            if isinstance(o, torch.nn.Module):
                self._put_back += [_module(m) for m in o.modules()]
            elif isinstance(o, torch.optim.Optimizer):
                self._put_back += [_optimizer(o), _plain(o)]
            elif hasattr(o, "state_dict") and hasattr(o, "load_state_dict"):
                self._put_back.append(_stateful(o))
            else:
                raise TypeError(f"restore takes modules and optimizers, not {type(o).__name__}")
        self._put_back += _random_states()
        own = [vars(sys.modules[name]) for name in ("train", "__main__") if name in sys.modules]
        self._put_back += [p for g in _generators([*objects, *code, *own]) if (p := _generator(g))]

    @torch.no_grad()
    def put_back(self) -> None:
        for put_back in self._put_back:
            put_back()
        sys.stdout.flush()


def _module(module: torch.nn.Module) -> PutBack:
    """Its own parameters, buffers and attributes, not its children's."""
    both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    tables = [(table, dict(table)) for table in both]
    tensors = [(t, t.detach().clone()) for _, was in tables for t in was.values() if t is not None]
    plain, not_saved = _plain(module), set(module._non_persistent_buffers_set)

    def put_back() -> None:
        for table, was in tables:
            table.clear()
            table.update(was)
        module._non_persistent_buffers_set = set(not_saved)
        for tensor, value in tensors:
            tensor.copy_(value)
            tensor.grad = None
        plain()

    return put_back


def _plain(o: Any) -> PutBack:
    """Attributes that are numbers or tensors: `training`, counters, running means that nobody registered.

    One that was None, or not there, stays what it became: a cache, or what was compiled or recorded once.
    """
    attributes = vars(o)
    was = {k: _copied(v) for k, v in attributes.items() if isinstance(v, bool | int | float | torch.Tensor)}
    held = {k: attributes[k] for k in was}

    def put_back() -> None:
        for key, value in was.items():
            if isinstance(held[key], torch.Tensor):
                held[key].copy_(value)
            attributes[key] = held[key]

    return put_back


def _optimizer(optimizer: torch.optim.Optimizer) -> PutBack:
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    states = {p: {k: _copied(v) for k, v in s.items()} for p, s in optimizer.state.items()}

    def put_back() -> None:
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            _fill(group, kept, keep="params")
        for p in list(optimizer.state):
            if p in states:
                _fill(optimizer.state[p], states[p])
            else:
                del optimizer.state[p]

    return put_back


def _fill(now: dict[str, Any], then: dict[str, Any], keep: str = "") -> None:
    for key in [k for k in now if k not in then and k != keep]:
        del now[key]
    for key, value in then.items():
        if isinstance(value, torch.Tensor) and isinstance(now.get(key), torch.Tensor):
            now[key].copy_(value)
        else:
            now[key] = value


def _stateful(o: Any) -> PutBack:
    state = copy.deepcopy(o.state_dict())
    return lambda: o.load_state_dict(state)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _random_states() -> list[PutBack]:
    """The generators that need no name: Python's, NumPy's, and torch's for each device in use."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    put_back: list[PutBack] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy_state),
        lambda: torch.set_rng_state(cpu),
    ]
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        put_back.append(lambda: torch.cuda.set_rng_state_all(cuda))
    return put_back


_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


def _generator(g: Any) -> PutBack | None:
    """None for one without a state (the operating system's)."""
    if isinstance(g, torch.Generator):
        torch_state = g.get_state()
        return lambda: g.set_state(torch_state)
    if isinstance(g, random.Random):
        try:
            python_state = g.getstate()
        except NotImplementedError:
            return None
        return lambda: g.setstate(python_state)
    if isinstance(g, np.random.RandomState):
        old_state = g.get_state()
        return lambda: g.set_state(old_state)
    bits = g if isinstance(g, np.random.BitGenerator) else g.bit_generator
    state = copy.deepcopy(bits.state)
    return lambda: setattr(bits, "state", state)


def _generators(roots: Iterable[Any]) -> Iterator[Any]:
    """Every generator that can be reached from the roots by way of train.py's own objects.

    Libraries are left out: modules, classes and the globals of functions that are not train.py's.
    """
    waiting, seen = list(roots), set[int]()
    while waiting:
        o = waiting.pop()
        if id(o) in seen:
            continue
        seen.add(id(o))
        if isinstance(o, _GENERATORS):
            yield o
            continue
        if isinstance(o, ModuleType) or (isinstance(o, type) and o.__module__ not in ("train", "__main__")):
            continue
        if isinstance(o, FunctionType):  # its globals are a root where they are train.py's
            waiting += [o.__closure__, o.__defaults__, o.__kwdefaults__, vars(o)]
        else:
            waiting += [x for x in gc.get_referents(o) if not isinstance(x, str | bytes | int | float | None)]
