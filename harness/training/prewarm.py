"""Trainer processes made ready ahead: started in the sandbox, imports made, waiting for a train.py.

What waits here has run trusted code only: the train.py of its job, the seed and every token come later, over the wire,
and it has not touched the GPU. It is the ordinary trainer in the ordinary sandbox, only started earlier, so what it
computes is the same; where it is not at hand, or anything has changed since, a trainer is started cold.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError
from hotloop.harness.records.model import Start
from hotloop.harness.sandbox.process import tail
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut
from hotloop.harness.training.trainer import Setup, Trainer

__all__ = ["Prewarmer"]

# What a train.py for a GPU imports anyway: seconds of Python. Not `kernels`, which takes a tenth of one: whether it is
# there tells the record what a train.py used. On a CPU the compiler would be memory that not every train.py needs.
AHEAD: dict[str, tuple[str, ...]] = {"cuda": ("triton", "torch._dynamo", "torch._inductor.compile_fx"), "cpu": ()}
# From when on a process may be made ready beside a run. On a GPU the budget is calibrated by then, and imports take
# one core for seconds; on a CPU the training's processor time is measured, so nothing may run beside it.
FROM = {"cuda": ("train", "submit", "evaluate", "audit", "done"), "cpu": ("evaluate", "audit", "done")}
ANSWER_S = 5.0  # how long one that waits may take to say that it is there


class Prewarmer:
    """Keeps one trainer ready for a device's next experiment, by a thread that lives as long as it does.

    The kernel ends a child when the thread that started it ends, so `close` comes after the last run.

    Args:
        folder: where logs and scratch folders are made; what an earlier driver left there is removed.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        shutil.rmtree(folder, ignore_errors=True)
        self._orders: queue.SimpleQueue[Future[tuple[Trainer, dict[str, Any]]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._next: Future[tuple[Trainer, dict[str, Any]]] | None = None
        self._starting: Trainer | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prewarm", daemon=True)
        self._thread.start()

    def saw(self, phase: str) -> None:
        """Told the phases of the run on its device; makes one ready as soon as that cannot disturb it."""
        if phase in FROM[self._setup.device]:
            self.prepare()

    def prepare(self) -> None:
        """Begin to make one ready, unless there is one; returns at once."""
        with self._lock:
            if self._next is None and not self._closed:
                self._next = Future()
                self._orders.put(self._next)

    def take(self, setup: Setup, log: Path) -> tuple[Trainer | None, str]:
        """The trainer that is ready, or the reason why there is none, which then has been discarded.

        One that is still importing is waited for: that is sooner than another start.

        Args:
            setup: that the experiment wants; one started with anything else is not used.
            log: file that takes its stdout and stderr from now on.
        """
        with self._lock:
            future, self._next = self._next, None
        if future is None:
            return None, "none was made ready"
        try:
            trainer, facts = future.result()
        except (HotloopError, OSError, _NotUsed) as e:
            return None, str(e)
        try:
            if facts != setup.facts():
                raise _NotUsed("it was started under another seal or other settings")
            try:
                trainer.child.wire.send("ping")
                if trainer.child.wire.recv(ANSWER_S)["kind"] != "pong":
                    raise _NotUsed("it did not answer")
            except TimedOut:
                raise _NotUsed("it did not answer") from None
            except (Closed, Malformed):
                raise _NotUsed("it had ended") from None
            os.replace(trainer.own_folder / "log.txt", log)  # type: ignore[operator]
        except (_NotUsed, OSError) as e:
            trainer.close()
            return None, str(e)
        except BaseException:
            trainer.close()
            raise
        return trainer, ""

    def close(self) -> None:
        """End what is ready or getting ready, and the thread. What was taken must have ended."""
        with self._lock:
            self._closed = True
            future, self._next = self._next, None
            if self._starting is not None:
                self._starting.child.end()
        self._orders.put(None)
        self._thread.join()
        if future is not None:
            with contextlib.suppress(HotloopError, OSError, _NotUsed):
                future.result()[0].close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order.set_result(self._start())
            except BaseException as e:
                order.set_exception(e)

    def _start(self) -> tuple[Trainer, dict[str, Any]]:
        began, facts = time.monotonic(), self._setup.facts()
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            trainer = Trainer(self._setup, folder, folder / "log.txt", AHEAD[self._setup.device])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        trainer.own_folder = folder
        try:
            with self._lock:
                self._starting = trainer
                if self._closed:
                    raise _NotUsed("the night is over")
            if trainer.child.wire.recv(self._setup.limits.load_s)["kind"] != "ready":
                raise Closed
        except TimedOut:
            trainer.close()
            raise _NotUsed(f"it was not ready within {self._setup.limits.load_s:g} s") from None
        except (Closed, Malformed):
            words = ": ".join(["it ended before it was ready", *tail(folder / "log.txt", 1)])
            trainer.close()
            raise _NotUsed(words) from None
        except BaseException:
            trainer.close()
            raise
        finally:
            with self._lock:
                self._starting = None
        trainer.how = Start("warm", prepared_s=round(time.monotonic() - began, 3))
        return trainer, facts


class _NotUsed(Exception):
    """Why a trainer that was made ready is not taken."""
