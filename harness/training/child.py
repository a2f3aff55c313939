"""The trainer process: imports train.py, calls its `train(run)`, and says what became of it.

Whatever this process says is a claim; see `harness.training.session` for what the parent makes of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import random
import sys
import traceback
from typing import Any

from hotloop.harness.sandbox.wire import Wire
from hotloop.harness.text import one_line

__all__ = ["child_main", "failure", "load_train_module", "make_ready", "prepare_torch"]

SOURCE_S = 60.0  # the parent sends train.py and the compile cache right behind the message that says their lengths


# Of libraries below torch, and of an exception that a compiler wrapped into one of its own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def prepare_torch(spec: dict[str, Any], threads: int, repeatable: bool = True) -> Any:
    """Import torch and set it up, for results that repeat to the bit unless that is not wanted. Returns the module."""
    import numpy as np
    import torch

    from hotloop.harness.training.workers import let_workers_answer

    torch.set_num_threads(threads)
    torch.manual_seed(spec["seed"])
    np.random.seed(spec["seed"] % 2**32)
    random.seed(spec["seed"])
    torch.set_float32_matmul_precision("high")
    # What torch.use_deterministic_algorithms does, but for its import of the compiler, 0.8 s that not every train.py
    # needs; TORCHINDUCTOR_DETERMINISTIC in the environment tells that one.
    torch._C._set_deterministic_algorithms(repeatable, warn_only=True)
    # An uninitialised read must not be able to matter, but filling memory costs speed on every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if spec["device"] == "cuda":
        torch.zeros((), device="cuda")  # creates the context now, so that its cost is the start's
    let_workers_answer()
    return torch


def make_ready(modules: list[str]) -> None:
    """All that needs no job: the imports. It may be done beside a run on the same GPU, which it must not touch.

    Raises:
        RuntimeError: the GPU was touched.
    """
    for name in ("numpy", "torch", "hotloop.harness.training.run", *modules):
        importlib.import_module(name)
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("an import has made a CUDA context, which takes memory and time from the run on the GPU")


def load_train_module(path: str = "train.py") -> Any:
    """The file at `path` (in a run: its own copy in the working folder), imported as `train`."""
    path = os.path.abspath(path)
    module_spec = importlib.util.spec_from_file_location("train", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["train"] = module
    module_spec.loader.exec_module(module)
    for name in ("build_model", "train"):
        if not callable(getattr(module, name, None)):
            raise AttributeError(f"train.py has no function {name}()")
    return module


def failure(e: BaseException) -> tuple[str, str]:
    """The status and the one-line reason of an exception that reached the top."""
    names = {c.__name__ for c in type(e).__mro__}
    text = one_line(str(e), 300)
    reason = f"{type(e).__name__}: {text}" if text else type(e).__name__
    frames = [f for f in traceback.extract_tb(e.__traceback__) if os.path.basename(f.filename) == "train.py"]
    if frames:
        reason += f" (train.py:{frames[-1].lineno})"
    elif isinstance(e, SyntaxError) and e.lineno:
        reason = f"SyntaxError: {e.msg} (train.py:{e.lineno})"
    if "OutOfMemoryError" in names or isinstance(e, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return "oom", reason
    if "NonFiniteLossError" in names:
        return "nan", reason
    return "crash", reason


def peak_mb() -> float | None:
    """The most memory that tensors had on the GPU, MiB; None without one."""
    torch = sys.modules.get("torch")
    try:
        return torch.cuda.max_memory_allocated() / 2**20 if torch and torch.cuda.is_initialized() else None
    except Exception:  # on its way out because of a device that is lost, perhaps
        return None


def child_main(wire: Wire, memories: list[int]) -> None:
    try:
        _train(wire, memories)
    except BaseException as e:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        status, reason = failure(e)
        wire.send("error", status=status, reason=reason, peak_mb=peak_mb())
        os._exit(1)


def _train(wire: Wire, memories: list[int]) -> None:
    make_ready(wire.recv()["modules"])
    wire.send("ready")
    while (hello := wire.recv())["kind"] == "ping":  # this may be long before the job is there
        wire.send("pong")
    from hotloop.harness.settings import Spec
    from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring
    from hotloop.harness.training.run import Run, Submitted, implementations

    source = wire.recv_bytes(hello["source_bytes"], SOURCE_S)
    with open(os.open("train.py", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb") as f:
        f.write(source)
    compiled = wire.recv_bytes(hello["compiled_bytes"], SOURCE_S)
    if compiled:
        from hotloop.harness.training.compile_cache import lay_out

        lay_out(bytes(compiled))
    prepare_torch(hello["spec"], hello["threads"], hello["repeatable"])
    wire.send("started")
    module = load_train_module()
    wire.send("imported", implementations=implementations())

    class _Mapped:  # what Ring needs of a SharedMemory, from an inherited descriptor
        map = mmap.mmap(memories[0], SLOTS * SLOT_BYTES)

    run = Run(Spec(**hello["spec"]), wire, Ring(_Mapped))  # type: ignore[arg-type]
    try:
        module.train(run)
    except Submitted:
        sys.stdout.flush()
        wire.recv()  # the parent kills us; it never answers
