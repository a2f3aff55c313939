"""A CUDA card played on a CPU build of torch, so that torch.compile makes the very code that the card would run.

Tensors are torch's fakes: shapes and types on a device `cuda`, no memory, no arithmetic. `pretend` gives a process the
words of one card for good, so it is for a process of its own. Then what `bench.gate.launches.Recorder` watches runs as
on the card up to each launch: Dynamo, AOTAutograd and Inductor, their code called with fakes, each Triton kernel
compiled.

What is no public name of torch or Triton stands in PRIVATE and is used here and in bench/gate/launches.py alone, so
that a release that moves one is told of in words. Two things differ from a run on the card: Inductor's own patterns of
attention are not looked for (they are made of real tensors; train.py calls its attention by name), and what would be
decided by timing on the device is noted instead, and Inductor's first choice stands.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hotloop.harness.errors import HotloopError

__all__ = ["PRIVATE", "environment", "missing", "pretend"]

# module -> names in it, with dots where they are a class's or a module's.
PRIVATE = {
    "torch": (
        "_C._dynamo.guards._empty_strided_cuda",
        "_C._dynamo.guards._reinterpret_tensor", "_C._set_deterministic_algorithms", "cuda._DeviceGuard",
        "cuda._lazy_init", "nn.Module._apply",
    ),
    "torch._dynamo.utils": ("counters",),
    "torch._guards": ("TracingContext.try_get",),
    "torch._inductor.config": ("benchmark_kernel",),
    "torch._inductor.fx_passes.fuse_attention": ("_sfdp_init",),
    "torch._inductor.fx_passes.joint_graph": ("constant_fold_uniform_value",),
    "torch._inductor.fx_passes.pad_mm": ("_should_pad",),
    "torch._inductor.runtime.triton_helpers": ("set_driver_to_gpu",),
    "torch._inductor.runtime.triton_heuristics": (
        "CachingAutotuner.run", "CachingAutotuner.precompile", "CachingAutotuner._precompile_config",
    ),
    "torch._library.custom_ops": ("OPDEFS",),
    "torch._subclasses.fake_tensor": ("FakeTensorMode.dispatch", "init_gpu_context"),
    "triton.runtime.driver": ("driver.set_active",),
    "triton.runtime.jit": ("JITFunction.run",),
}  # fmt: skip


def missing() -> list[str]:
    """What of PRIVATE the installed torch and Triton do not have."""
    return [f"{module}.{name}" for module, names in PRIVATE.items() for name in names if not _has(module, name)]


def _has(module: str, name: str) -> bool:
    try:
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


# ---- the card -----------------------------------------------------------------------------------------------------


def environment(kernels: str, caches: Path) -> dict[str, str]:
    """Of a process that will call `pretend`: a repeatable training's, with empty compiler caches of its own."""
    from hotloop.harness.sandbox.process import child_environment

    return (
        os.environ
        | child_environment(1)
        | {
            "HOTLOOP_KERNELS": kernels,
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a worker would not know the card
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        }
    )


def pretend(capability: int) -> None:
    """Make this process one with a GPU of an architecture (a key of ARCHITECTURES), before anything imports torch.

    Raises:
        HotloopError: torch was imported already, g++ is missing, or a name of PRIVATE.
    """
    if "torch" in sys.modules:
        raise HotloopError("hotloop.bench.gate.offline.pretend comes before the import of torch")
    ctypes.CDLL(str(_guard()), ctypes.RTLD_GLOBAL)
    import torch

    torch.version.cuda = "13.0"  # type: ignore[misc]  # before kernels.dispatch asks
    card = SimpleNamespace(
        major=capability // 10, minor=capability % 10, warp_size=32, regs_per_multiprocessor=65536,
        max_threads_per_block=1024, shared_memory_per_block=49152, L2_cache_size=50 << 20, gcnArchName="",
        is_integrated=False, is_multi_gpu_board=False,
    )  # fmt: skip
    words = {
        "is_available": True, "is_initialized": False, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_properties": card, "get_device_capability": (card.major, card.minor), "synchronize": None,
        "is_bf16_supported": True, "memory_allocated": 0, "_lazy_init": None, "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    for word, answer in words.items():  # before torch._dynamo takes hold of them
        setattr(torch.cuda, word, _says(answer))
    if gone := missing():
        raise HotloopError(
            f"torch {torch.__version__} has no {', '.join(gone)}, which bench/gate/offline.py plays a card by"
        )
    from hotloop.kernels.architectures import ARCHITECTURES

    known = ARCHITECTURES[capability]
    card.__dict__.update(
        name=known.card, multi_processor_count=known.multiprocessors, total_memory=known.memory_gib << 30,
        max_threads_per_multi_processor=known.threads, shared_memory_per_block_optin=known.shared,
        shared_memory_per_multiprocessor=known.shared + 1024,
    )  # fmt: skip
    torch.cuda.get_device_name = _says(known.card)
    _settle(torch, capability)


def _says(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _guard() -> Path:
    """guard.cpp, built for the installed torch, once; in the user's cache."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise HotloopError("the whole step is compiled by torch; run: make install")
    source, folder = Path(__file__).with_name("guard.cpp"), Path(found.origin).parent
    version = (folder / "version.py").read_bytes()
    name = hashlib.sha256(source.read_bytes() + version + str(folder).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotloop"
    built = cache / f"guard-{name}.so"
    if built.exists():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        new = Path(scratch) / "guard.so"
        include, lib = folder / "include", folder / "lib"
        command = [
            "g++", "-std=c++20", "-shared", "-fPIC", str(source), f"-I{include}", f"-L{lib}", f"-Wl,-rpath,{lib}",
            "-ltorch_cpu", "-lc10", "-o", str(new),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise HotloopError("compiling the whole step without a GPU needs g++; apt-get install g++") from None
        except subprocess.CalledProcessError as e:
            raise HotloopError(f"bench/guard.cpp does not compile with this torch: {e.stderr.strip()[:500]}") from None
        os.replace(new, built)  # whole or not at all, also when two do it at once
    return built


class _Driver:
    """Triton's word for a GPU, as far as compiling needs it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


class _NoGuard(contextlib.nullcontext[None]):
    def __init__(self, *args: Any) -> None:
        super().__init__()


def _convert(module: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """nn.Module._apply for fakes, which it would swap in place: parameters are replaced."""
    import torch

    for child in module.children():
        _convert(child, fn)
    for key, p in module._parameters.items():
        if p is not None:
            module._parameters[key] = torch.nn.Parameter(fn(p.detach()), p.requires_grad)
    for key, b in module._buffers.items():
        if b is not None:
            module._buffers[key] = fn(b)
    return module


def _settle(torch: Any, capability: int) -> None:
    """What a trainer's process is set to, and the hooks into torch and Triton."""
    import torch._dynamo.utils
    import torch._inductor.config
    import torch._subclasses.fake_tensor as fake
    import triton.runtime
    from torch._inductor.fx_passes import fuse_attention, joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch.overrides import TorchFunctionMode

    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.benchmark_kernel = True  # for the bytes that each kernel moves

    torch.nn.Module._apply = _convert
    torch.cuda._DeviceGuard = torch.cuda.device = _NoGuard
    torch._C._cuda_getCurrentRawStream = _says(0)
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset
    )
    triton.runtime.driver.set_active(_Driver(capability))  # type: ignore[arg-type]
    setattr(fake, "init_gpu_context", _says(None))  # noqa: B010  # these three are cached functions
    setattr(triton_helpers, "set_driver_to_gpu", _says(None))  # noqa: B010
    setattr(fuse_attention, "_sfdp_init", _says(None))  # noqa: B010

    class _OnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if getattr(kwargs.get("device"), "type", "") == "cuda":
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    fold = joint_graph.constant_fold_uniform_value

    def fold_on_cpu(gm: Any) -> Any:
        with _OnCpu():  # it computes constants of one element, on the device
            return fold(gm)

    joint_graph.constant_fold_uniform_value = fold_on_cpu
    real = torch.tensor

    def tensor(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)  # of numbers, which are laid on the CPU first, and pinned by a CUDA build alone
        return made if device is None else made.to(device)

    torch.tensor = tensor
