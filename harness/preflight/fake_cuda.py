"""A GPU run without a GPU: tensors without memory on the CPU, and the words of a machine that has CUDA.

torch's FakeTensorMode carries shapes and types through every operation and computes nothing. A torch without CUDA
cannot carry them for a CUDA device (its autograd ends the process), so here everything is on the CPU, and train.py is
told otherwise: `spec.device` is `cuda`, its tensors say that they are on `cuda:0`, and where it names a CUDA device the
CPU is taken. So the branches that the real run takes are the ones that are checked.

What is made up: a floating-point value that train.py reads (`loss.item()`) is 1.0, and `doubt` is set, because what it
does from there on need not be what the real run does. Other values, and shapes that depend on values, raise.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

__all__ = ["Pretence", "eager_compile", "pretend_cuda"]

CUDA = torch.device("cuda", 0)
_GIVING_UP = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class Pretence(FakeTensorMode):
    """torch's mode of tensors without memory, which makes up the numbers that train.py reads.

    Attributes:
        doubt: a value was made up, or an operation gave up (train.py may have caught that).
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.doubt = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = _on_cpu(kwargs or {})
        try:
            return super().dispatch(func, types, args, kwargs)
        except _GIVING_UP:
            self.doubt = True
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
                return 1.0
            raise


class _Anywhere(TorchFunctionMode):
    """Takes the CPU where a CUDA device is named, and says `cuda` to those who ask."""

    inside = 0  # calls under way: torch's own code, which must see what is true

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _IS_CUDA:
            return True if _asked_by_train(2) else func(*args)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs = _on_cpu(kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            first = ["cpu"] if len(args) > 1 and _is_device_index(args[1]) else []
            args = (args[0], *first, *(_cpu(a) for a in args[1 + len(first) :]))
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("device") is None:
        return kwargs
    device = kwargs["device"]
    return kwargs | {"device": "cpu" if _is_device_index(device) else _cpu(device)}


def _is_device_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cpu(value: Any) -> Any:
    """`value`, or the CPU where it is a CUDA device."""
    named = isinstance(value, str) and value.partition(":")[0] == "cuda"
    return torch.device("cpu") if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def _asked_by_train(depth: int) -> bool:
    """Whether the caller `depth` frames up is train.py or one of the kernels that it calls."""
    name = str(sys._getframe(depth).f_globals.get("__name__", ""))
    return name == "train" or name.startswith("hotloop.kernels.")


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Event:
    """Stands for torch.cuda.Event and Stream: everything is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("record", "synchronize", "wait", "wait_stream", "wait_event", "record_event", "query"):
            raise AttributeError(f"the stand-in for a CUDA event or stream has no {name}")
        return lambda *args, **kwargs: None


def _swap(old: torch.Tensor, new: torch.Tensor) -> None:
    """torch.utils.swap_tensors, which the mode's own references to its tensors would make fail in Module.to."""
    old.data = new.detach()


class _Graph(contextlib.nullcontext[None]):
    """Stands for a CUDA graph, for its capture, and for a stream that is made current: what is inside is done once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def replay(self) -> None: ...

    def reset(self) -> None: ...


@contextlib.contextmanager
def pretend_cuda(mode: Pretence) -> Iterator[None]:
    """Run the body as on one H100, without memory and arithmetic."""
    anywhere = _Anywhere()
    true_device = FakeTensor.device

    def device(self: FakeTensor) -> torch.device:
        real = true_device.fget(self)  # type: ignore[attr-defined]
        return CUDA if real.type == "cpu" and not anywhere.inside and _asked_by_train(2) else real

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    cuda: dict[str, Any] = dict.fromkeys(
        ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "set_device"), nothing
    )
    cuda |= dict.fromkeys(("current_device", "memory_allocated", "memory_reserved", "max_memory_allocated"), zero)
    name = "NVIDIA H100 80GB HBM3"
    card = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)

    def says(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    words: dict[str, Any] = {
        **cuda, "manual_seed_all": nothing, "max_memory_reserved": zero, "Event": _Event, "Stream": _Event,
        "current_stream": _Event, "stream": _Graph, "graph": _Graph, "CUDAGraph": _Graph,
        "is_available": says(True), "is_initialized": says(False), "device_count": says(1),
        "is_bf16_supported": says(True), "get_device_name": says(name), "get_device_capability": says((9, 0)),
        "get_device_properties": says(card), "mem_get_info": says((79 << 30, 80 << 30)),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for word, value in words.items():
            stack.enter_context(mock.patch.object(torch.cuda, word, value))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap))
        stack.enter_context(mock.patch.object(FakeTensor, "device", property(device)))
        for place in (torch, torch.amp):
            stack.enter_context(mock.patch.object(place, "autocast", _Autocast))
        stack.enter_context(mode)
        stack.enter_context(anywhere)
        yield


class EagerModule(torch.nn.Module):
    """What torch.compile makes of a module, without the compiler."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


def eager_compile(real: Callable[..., Any]) -> Callable[..., Any]:
    """A torch.compile that compiles nothing; its arguments must fit the real one's."""
    signature = inspect.signature(real)

    def compile(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments.pop("model", None)
        if model is None:
            return lambda f: compile(f, **bound.arguments)
        return EagerModule(model) if isinstance(model, torch.nn.Module) else model

    return compile
