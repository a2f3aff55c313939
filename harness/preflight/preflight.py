"""The pre-flight: whether a train.py can run at all, found on the CPU in seconds, before it gets any GPU time.

    import   the file is imported
    shapes   the preset's real sizes, without memory and arithmetic: set-up, warm-up, real batches, submission, and the
             evaluator's forward (only where the preset's device is not a CPU)
    step     one small run with real numbers: the experiment itself where the preset's device is a CPU, else the
             laptop preset's values of the same file, and only where `shapes` found nothing certain

The child (`harness.preflight.child`) runs an agent's code in the sandbox, without any data. What it says is a claim,
and it can only harm itself: `ok` gives it the run that it would have had anyway. `harness.preflight.rules` says what
counts as a crash. Everything else, a hang or a death included, is `inconclusive`: the experiment gets its turn.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hotloop.harness.errors import HotloopError
from hotloop.harness.sandbox.policy import Policy, Sandbox
from hotloop.harness.sandbox.process import Child, tail
from hotloop.harness.sandbox.wire import Closed, Malformed, TimedOut
from hotloop.harness.settings import Preset, Spec
from hotloop.harness.text import one_line

__all__ = ["STAGES", "PreflightResult", "Stage", "preflight"]

Status = Literal["ok", "crash", "inconclusive"]

STAGES = ("import", "shapes", "step")
MEMORY_BYTES = 8 << 30  # what the child may allocate: running out is never held against a train.py
_MESSAGES = 16  # more than an honest child sends


@dataclass(frozen=True)
class Stage:
    """One stage as the child told it; `seconds` by the parent's clock."""

    name: str
    status: Status
    reason: str
    seconds: float
    did: str = ""


@dataclass
class PreflightResult:
    """What the pre-flight found.

    Attributes:
        status: `crash` where the run would certainly fail; `ok` where every stage passed; else `inconclusive`.
        reason: one line, as a crash of a real run has it; empty for `ok`.
        log: the last lines of what train.py printed, with the traceback.
    """

    status: Status = "inconclusive"
    reason: str = ""
    seconds: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


def preflight(
    source: bytes,
    preset: Preset,
    vocab_size: int,
    seq_len: int,
    threads: int,
    sandbox: Sandbox,
    folder: Path,
    timeout_s: float = 60.0,
) -> PreflightResult:
    """Check `source`, the bytes of a train.py; never raises for what it does, and ends by itself.

    Args:
        vocab_size, seq_len: of the prepared data.
        folder: for the log (`preflight.txt`) and, at levels without a file system of their own, a scratch folder; not
            one that a running experiment uses.
        timeout_s: for everything but the end of the child, by the parent's clock.
    """
    began = time.monotonic()
    found = PreflightResult()
    log = folder / "preflight.txt"
    limits = replace(preset.limits, memory_bytes=min(preset.limits.memory_bytes or MEMORY_BYTES, MEMORY_BYTES))
    spec = Spec(preset.name, preset.device, 1, vocab_size, seq_len, preset.batch_divisor)
    policy = replace(
        Policy.of("hotloop.harness.preflight.child", folder, source, "cpu", limits),
        send_s=min(limits.send_s, timeout_s),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        with Child(sandbox, policy, [], log, threads) as child:
            found.reason = _converse(child, spec, preset, threads, began + timeout_s, found.stages)
    except (HotloopError, OSError) as e:  # of this machine, not of train.py: its own run will say it again
        found.reason = f"the pre-flight could not run: {e}"
    found.log = tail(log)
    found.seconds = time.monotonic() - began
    return _conclude(found)


def _conclude(found: PreflightResult) -> PreflightResult:
    """The status and the reason from the stages; `found.reason` says why there are no more of them."""
    crash = next((s for s in found.stages if s.status == "crash"), None)
    doubt = next((s for s in found.stages if s.status == "inconclusive"), None)
    if crash:
        found.status, found.reason = "crash", crash.reason
    elif not found.reason and doubt:
        found.reason = f"{doubt.name}: {doubt.reason}"
    elif not found.reason:
        found.status = "ok"
    return found


def _converse(child: Child, spec: Spec, preset: Preset, threads: int, deadline: float, stages: list[Stage]) -> str:
    """Collect what the child says in `stages`; returns why it said no more, or nothing where it came to its end."""
    mark = time.monotonic()
    own = preset.device == "cpu"
    try:
        child.wire.send(
            "hello", spec=spec.as_dict(), threads=threads, eval_rows=preset.eval_batch_rows, own=own,
        )  # fmt: skip
        for _ in range(_MESSAGES):
            message = child.wire.recv(max(0.001, deadline - time.monotonic()))
            if message["kind"] == "end":
                # A child that ends without the stages that it should have made says nothing.
                due = {"import", "step" if own else "shapes"}
                done = {s.name for s in stages}
                return "" if due <= done or _failed(stages) else "the pre-flight ended early"
            now = time.monotonic()
            stage = _stage(message, now - mark)
            if stage is None or any(s.name == stage.name for s in stages):
                return "the pre-flight sent what is no message of it"
            stages.append(stage)
            mark = now
        return "the pre-flight sent too many messages"
    except TimedOut:
        return "the pre-flight took too long"
    except Malformed as e:
        return f"the pre-flight sent {e}"
    except Closed:
        code = child.wait()
        how = child.fault or (_signal(-code) if code is not None and code < 0 else f"exit status {code}")
        reason = f"the pre-flight died ({how})"
        # At its own size and on its own device it would die so in its run; SIGKILL is the system's, short of memory.
        if own and not child.fault and code is not None and code != -signal.SIGKILL and len(stages) < 2:
            name = "step" if stages else "import"
            stages.append(Stage(name, "crash", f"train.py ended the process ({how})", time.monotonic() - mark))
        return reason


def _failed(stages: list[Stage]) -> bool:
    return any(s.status != "ok" for s in stages)


def _signal(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"


def _stage(message: dict[str, Any], seconds: float) -> Stage | None:
    """A stage from the child's words, bounded; None where they are none."""
    name, status = message.get("name"), message.get("status")
    if message["kind"] != "stage" or not isinstance(name, str) or name not in STAGES:
        return None
    if status not in ("ok", "crash", "inconclusive") or not math.isfinite(seconds):
        return None
    words = [one_line(str(message.get(key, "")), 400) for key in ("reason", "did")]
    if status != "ok" and not words[0]:
        words[0] = "no reason given"
    return Stage(name, status, words[0], seconds, words[1])
