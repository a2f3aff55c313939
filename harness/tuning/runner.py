"""A whole step of train.py, kept ready in a process of its own and run in turns.

A comparison of two ways to run the step wants them in turns, and a way is chosen once a process; so each has a process,
compiled once, that waits between its turns and gives back the memory that it does not need meanwhile. What faults ends
its own process, and what hangs is ended.

    python -c "from hotloop.harness.tuning.runner import serve; serve()" TRAIN PRESET REPEATABLE [NAME=VALUE ...]
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError
from hotloop.harness.machine import threads_default
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox.process import child_environment, tail
from hotloop.harness.tuning.selection import Answer, Unfit

__all__ = ["Setting", "StepRunner", "die_with_parent", "serve"]

READY_S = 400.0  # imports, the first step with its compilation, and two answers' steps
TURN_S = 90.0
ANSWER_STEPS = 5
_CODE = "from hotloop.harness.tuning.runner import serve; serve()"


@dataclass(frozen=True)
class Setting:
    """A way to run the step.

    Attributes:
        environment: variables that choose an implementation.
        constants: of train.py, as `NAME=VALUE`.
        repeatable: as the trainer asks for it.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    repeatable: bool = True


class StepRunner:
    """A setting's step in its process; see `harness.tuning.selection.Runner`.

    Args:
        ready_s, turn_s: after which what does not answer counts as hanging.

    Attributes:
        asked: operators of which the step had to choose an implementation.
        implementations: what ran.

    Raises:
        Unfit: the step fails, or hangs.
    """

    def __init__(
        self, setting: Setting, train: Path, preset: str, ready_s: float = READY_S, turn_s: float = TURN_S
    ) -> None:
        self._turn_s, self._ready_s = turn_s, ready_s
        self._log = tempfile.NamedTemporaryFile(prefix="hotloop-step-", suffix=".log")  # noqa: SIM115 - until `close`
        # What a shell of the user's asks for must not decide which step this is.
        threads = threads_default()
        unwanted = child_environment(threads).keys() - child_environment(threads, False).keys()
        unwanted |= {"HOTLOOP_KERNELS", "HOTLOOP_ATTENTION"} & setting.environment.keys()
        env = {k: v for k, v in os.environ.items() if k not in unwanted}
        env |= child_environment(threads, setting.repeatable) | setting.environment
        command = [sys.executable, "-c", _CODE, str(train), preset, str(int(setting.repeatable)), *setting.constants]
        self._process = subprocess.Popen(
            command, env=env, cwd=project_root(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        try:
            ready = self._said(ready_s)
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its compile workers too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _ask(self, what: str, limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n".encode())
            self._process.stdin.flush()
        except OSError:
            raise Unfit(self._last_words()) from None
        return self._said(limit_s)

    def _said(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Unfit(f"it hangs: no answer within {limit_s:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise Unfit(self._last_words())
            line += part
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        words = (tail(Path(self._log.name), 1, 200) or ["no words"])[-1].removeprefix("hotloop: ")
        return f"it fails: {words}" + (f" (signal {-code})" if code < 0 else "")


def die_with_parent() -> None:
    """Whatever ends the parent, nothing of ours stays on the device."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def serve() -> None:
    """The process of a StepRunner."""
    die_with_parent()
    # Replies go where the parent reads them; what train.py prints does not.
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    train, preset, repeatable, *constants = sys.argv[1:]
    try:
        step = _Turns(Path(train), preset, constants, repeatable == "1")
        reply.write(json.dumps(step.ready()) + "\n")
        for line in sys.stdin:
            reply.write(json.dumps(step.answer() if line.strip() == "answer" else step.turn()) + "\n")
    except HotloopError as e:
        sys.exit(f"hotloop: {e}")


class _Turns:
    def __init__(self, train: Path, preset: str, constants: Sequence[str], repeatable: bool) -> None:
        import torch

        from hotloop.harness.tuning.step import settle, step_of

        settle(repeatable)
        self._torch = torch
        self._on_gpu = torch.cuda.is_available()
        self._step = step_of(train, preset, constants)
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

        step_s = time_step(self._step.once, 3 if self._on_gpu else 1)
        self._pause()
        return {"tokens_per_s": self._step.tokens / step_s}

    def _pause(self) -> None:
        """The other process needs the memory until it is our turn again."""
        if self._on_gpu:
            self._torch.cuda.synchronize()
            self._torch.cuda.empty_cache()
