"""A trainer process: what it is started with, how it is started and ended.

It begins with nothing but trusted code: train.py, the seed and every token come later, over the wire, from
`harness.training.session`. `harness.training.child` is what runs in it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hotloop.harness.machine import environment
from hotloop.harness.records.model import Start
from hotloop.harness.records.seal import verify_seal
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, SharedMemory, child_environment
from hotloop.harness.sandbox.wire import Closed
from hotloop.harness.settings import Limits
from hotloop.harness.training.feed import SLOT_BYTES, SLOTS

__all__ = ["Setup", "Trainer"]


@dataclass(frozen=True)
class Setup:
    """All that a trainer process is started with; the same for every experiment of a night on one device.

    Attributes:
        repeatable: whether its results must repeat to the bit.
    """

    sandbox: Sandbox
    device: str
    limits: Limits
    threads: int
    repeatable: bool = True

    def facts(self) -> dict[str, Any]:
        """What a process of this setup depends on, as it is now. Raises SealError."""
        return {
            "setup": self,
            "seal": verify_seal(),
            "machine": environment(self.device, self.threads, self.sandbox.gpu),
            "environment": child_environment(self.threads, self.repeatable),
        }


class Trainer:
    """A trainer process and the shared memory of its batches. A context manager: leaving it ends both.

    Args:
        folder: for its scratch folder, at sandbox levels that need one.
        log: file that takes its stdout and stderr.
        modules: what it imports beside torch before it is ready.

    Attributes:
        how: it was started, for the record.

    Raises:
        SandboxError: it cannot be started.
    """

    def __init__(self, setup: Setup, folder: Path, log: Path, modules: Sequence[str] = ()) -> None:
        self.how = Start()
        self.own_folder: Path | None = None  # removed with it
        self._closed = False
        policy = Policy.of("hotloop.harness.training.child", folder, None, setup.device, setup.limits)
        self.memory = SharedMemory(SLOTS * SLOT_BYTES)
        try:
            self.child = Child(setup.sandbox, policy, [self.memory.fd], log, setup.threads, setup.repeatable)
        except BaseException:
            self.memory.close()
            raise
        with contextlib.suppress(Closed):  # who reads next finds it dead
            self.child.wire.send("prepare", modules=list(modules))

    def close(self) -> None:
        """End it; idempotent. Raises SandboxError where something of it does not end."""
        if self._closed:
            return
        self._closed = True
        try:
            self.child.kill()
        finally:
            self.memory.close()
            if self.own_folder is not None:
                shutil.rmtree(self.own_folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
