"""A trainer that hangs in native code and hears no signal, as behind a kernel that never ends: it is ended, whole."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from hotloop.harness.errors import SandboxError, TrialError
from hotloop.harness.processes import descendants
from hotloop.harness.sandbox import process
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child
from hotloop.harness.settings import Spec
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Session, SessionConfig
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source
from tests.needs import at, sandbox

SPEC = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
# Every signal that can be is blocked, a child shares the fate, and the interpreter's lock is held for good.
HANG = (
    "import ctypes, os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))\n"
    "print('HANGS', flush=True)\n"
    "os.fork()\n"
    "ctypes.PyDLL(None).sleep(1000)"
)


def train(folder: Path, sandbox: Sandbox, stall_s: float = 20.0, **changes: str) -> Session:
    preset = tiny_preset().with_limits(stall_s=stall_s)
    budget = Budget(preset.budget)
    return Session(SessionConfig(
        source=tiny_source(**changes), spec=SPEC, preset=preset, rows=tiny_rows(256, 0), budget=budget, folder=folder,
        threads=1, sandbox=sandbox,
    )).run()  # fmt: skip


def writers(log: Path) -> list[str]:
    """Processes whose output goes there: a trainer and whatever it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "fd" / "1") == str(log.resolve()):
                found.append(path.name)
    return found


@pytest.mark.usefixtures("warm_children")
@pytest.mark.parametrize("level", [at(3), at(2), at(1), at(0)])
def test_a_hung_kernel_is_a_timeout_and_nothing_of_it_is_left(
    folder: Path, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = sandbox(level)
    seen: list[list[str]] = []
    real = process.ProcessTree.kill

    def kill(self: process.ProcessTree) -> None:
        seen.append(writers(folder / "log.txt"))
        real(self)

    monkeypatch.setattr(process.ProcessTree, "kill", kill)
    with pytest.raises(TrialError) as e:
        train(folder, inside, 1.5, STEP=HANG)
    assert e.value.status == "timeout"
    assert re.fullmatch(r"no sign of life for \d+ s while training", e.value.reason)
    assert "HANGS" in (folder / "log.txt").read_text()
    assert max(map(len, seen)) >= 2, "the trainer and its child"
    assert writers(folder / "log.txt") == []
    assert train(folder, inside).training.steps > 0  # the next one is none the worse


def test_a_process_that_no_signal_ends_is_said_to_be_stuck(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an uninterruptible wait for its device: here it is stopped, and no signal is sent before the test does."""
    monkeypatch.setattr(process, "END_S", 0.3)
    monkeypatch.setattr(process, "subprocess", subprocess)  # a stopped child of a warm process never ends
    limits = tiny_preset().limits
    child = Child(
        best(), Policy.of("hotloop.harness.training.child", folder, None, "cpu", limits), [], folder / "log.txt", 1
    )
    real, tree = child.end, [child.pid, *descendants(child.pid)]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(child, "end", lambda: None)
            with pytest.raises(SandboxError, match="do not end"):
                child.kill()
    finally:
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        real()
