"""A whole step of a train.py, kept ready in a process of its own and run in turns.

A comparison of two ways to run the step wants them in turns, and a way is chosen once a process; so each has a process,
compiled once, that waits between its turns and gives back the memory that it does not need meanwhile. It is an
agent's code perhaps, so the process stands in the sandbox of a trainer's. What faults ends its own process, and what
hangs is ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotloop.harness.errors import SandboxError
from hotloop.harness.machine import threads_default
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, tail
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut, Wire
from hotloop.harness.settings import Preset
from hotloop.harness.tuning.selection import Answer, Unfit

__all__ = ["Setting", "StepRunner", "child_main"]

READY_S = 400.0  # imports, the first step with its compilation, and two answers' steps
TURN_S = 90.0
ANSWER_STEPS = 5


@dataclass(frozen=True)
class Setting:
    """A way to run the step.

    Attributes:
        environment: variables that choose an implementation.
        repeatable: as the trainer asks for it.
        threads: of the CPU; 0 for as many as a trainer has by default.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    repeatable: bool = True
    threads: int = 0


class StepRunner:
    """A setting's step in its process; see `harness.tuning.selection.Runner`.

    Args:
        source: train.py.
        device: `cuda` or `cpu`.
        ready_s, turn_s: after which what does not answer counts as hanging.

    Attributes:
        asked: operators of which the step had to choose an implementation.
        implementations: what ran.

    Raises:
        Unfit: the step fails, or hangs.
    """

    def __init__(
        self, setting: Setting, source: bytes, preset: Preset, device: str, sandbox: Sandbox, ready_s: float = READY_S,
        turn_s: float = TURN_S,
    ) -> None:  # fmt: skip
        self._turn_s, self._ready_s = turn_s, ready_s
        self._folder = tempfile.TemporaryDirectory(prefix="hotloop-step-")
        self._log = Path(self._folder.name) / "log.txt"
        policy = Policy.of("hotloop.harness.tuning.runner", Path(self._folder.name), source, device, preset.limits)
        threads = setting.threads or threads_default()
        try:
            with _environment(setting.environment):
                self._child = Child(sandbox, policy, [], self._log, threads, setting.repeatable)
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            how = {"preset": preset.name, "device": device, "batch_divisor": preset.batch_divisor}
            ready = self._ask("step", ready_s, **how, threads=threads, repeatable=setting.repeatable)
            self.asked, self.implementations = frozenset(ready["asked"]), dict(ready["implementations"])
        except BaseException:
            self.close()
            raise

    def answer(self) -> Answer:
        found = self._ask("answer", self._ready_s)
        return Answer(tuple(found["losses"]), found["digest"])

    def turn(self) -> float:
        return float(self._ask("turn", self._turn_s)["tokens_per_s"])

    def close(self) -> None:
        try:
            self._child.kill()  # its compile workers too
        except SandboxError as e:
            raise Unfit(str(e)) from None
        finally:
            self._folder.cleanup()

    def _ask(self, what: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        try:
            self._child.wire.send(what, **fields)
            found = self._child.wire.recv(limit_s)
        except TimedOut:
            raise Unfit(f"it hangs: no answer within {limit_s:.0f} s") from None
        except (Closed, Malformed):
            code = self._child.wait()
            words = self._child.fault or (tail(self._log, 1, 200) or ["no words"])[-1]
            raise Unfit(f"it fails: {words}" + (f" (signal {-code})" if code and code < 0 else "")) from None
        if found["kind"] == "error":
            raise Unfit(f"it fails: {found['reason']}")
        return found


@contextlib.contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """This process's, which a child that is started meanwhile gets."""
    was = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in was.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def child_main(wire: Wire, memories: list[int]) -> None:
    """The process of a StepRunner."""
    try:
        step = _Turns(wire.recv())
        wire.send("ready", **step.ready())
        while True:
            answer = step.answer if wire.recv()["kind"] == "answer" else step.turn
            wire.send("found", **answer())
    except BaseException as e:
        from hotloop.harness.training.child import failure

        traceback.print_exc()
        sys.stderr.flush()
        wire.send("error", reason=failure(e)[1])
        os._exit(1)


class _Turns:
    def __init__(self, how: Mapping[str, Any]) -> None:
        import torch

        from hotloop.harness.tuning.step import settle, step_of

        settle(how["repeatable"], how["threads"])
        self._torch = torch
        self._on_gpu = how["device"] == "cuda"
        self._step = step_of(Path("train.py"), how["preset"], how["batch_divisor"])
        self._modules = [o for o in self._step.restore if isinstance(o, torch.nn.Module)]
        self._optimizers = [o for o in self._step.restore if isinstance(o, torch.optim.Optimizer)]
        self._first = [(t, t.detach().clone()) for m in self._modules for t in (*m.parameters(), *m.buffers())]

    def ready(self) -> dict[str, Any]:
        from hotloop.kernels import dispatch

        self._step.once()
        self._pause()
        return {"asked": sorted(dispatch.asked()), "implementations": dispatch.implementations()}

    def answer(self) -> dict[str, Any]:
        with self._torch.no_grad():
            for tensor, was in self._first:
                tensor.copy_(was)
                tensor.grad = None
        for optimizer in self._optimizers:
            optimizer.state.clear()
        self._torch.manual_seed(1)
        self._step.restart()
        losses = [self._step.once() for _ in range(ANSWER_STEPS)]
        digest = hashlib.sha256()
        for tensor, _ in self._first:
            digest.update(tensor.detach().cpu().reshape(-1).view(self._torch.uint8).numpy().data)
        found = {"losses": [float(x) for x in losses if x is not None], "digest": digest.hexdigest()}
        self._pause()
        return found

    def turn(self) -> dict[str, Any]:
        from hotloop.harness.tuning.step import time_step

        step_s = time_step(self._step.once, 3)
        self._pause()
        return {"tokens_per_s": self._step.tokens / step_s}

    def _pause(self) -> None:
        """The other process needs the memory until it is our turn again."""
        if self._on_gpu:
            self._torch.cuda.synchronize()
            self._torch.cuda.empty_cache()
