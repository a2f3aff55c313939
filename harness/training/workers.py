"""What a DataLoader's workers need inside the sandbox: they work, or the run ends with their reason."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import sys
import traceback
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

__all__ = ["let_workers_answer"]


def let_workers_answer() -> None:
    """For this process and the workers that it starts.

    Their tensors travel through the pipe, byte by byte: torch would pass descriptors over a new socket, which the
    sandbox refuses. A worker that cannot send what it made ends, which its loader notices; otherwise it would wait for
    ever. Workers are forked, for a fresh interpreter could not import train.py (the default from Python 3.14 on).
    """
    ForkingPickler.register(torch.UntypedStorage, _as_bytes)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)


def _as_bytes(storage: torch.UntypedStorage) -> tuple[Any, tuple[bytearray]]:
    return _from_bytes, (bytearray(torch.empty(0, dtype=torch.uint8).set_(storage).numpy()),)


def _from_bytes(data: bytearray) -> torch.UntypedStorage:
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)


def _end(error: BaseException, what: Any) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    if multiprocessing.parent_process() is not None:
        os._exit(1)
