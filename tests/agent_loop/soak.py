"""A night of many experiments under faults of every kind, for test_soak.py.

    python soak.py REPO TAG EXPERIMENTS FAULTS

The training is scripted (its outcome is a function of train.py alone), the driver, git and records are real. With
FAULTS, agents fail and disks fill at random moments; whoever started this kills it at random moments too. Prints what
the driver itself takes an experiment, and how many descriptors and how much memory it has at the end.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hotloop.agent_loop.agents.turn_order
import hotloop.agent_loop.loop.driver
from hotloop.agent_loop.agents.agent import AgentError, Turn
from hotloop.agent_loop.agents.builtin import BuiltinAgent, constants
from hotloop.harness.errors import DeviceError
from hotloop.harness.records.model import Status

_spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
assert _spec is not None
assert _spec.loader is not None
scripted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted)

WAYS = ("raise", "hang up", "empty", "elsewhere", "garbage", "no git", "rate limit", "refused")


class Flaky:
    """The built-in agent, whose turn fails in some way three times of ten."""

    name, ahead = "flaky", False

    def __init__(self, faults: bool) -> None:
        self._inner, self._faults = BuiltinAgent(1), faults

    def propose(self, context: Any) -> Turn:
        way = random.choice(WAYS) if self._faults and random.random() < 0.3 else ""
        work = context.worktree
        if way == "raise":
            raise RuntimeError("the client crashed")
        if way in ("hang up", "rate limit", "refused"):
            raise AgentError(f"{way}", retry_after_s=0.01)
        if way == "elsewhere":
            (work / "other.py").write_text("mine now")
        if way == "garbage":
            (work / "train.py").write_bytes(os.urandom(100))
        if way == "no git":
            (work / ".git").unlink()
        if way:
            return Turn(f"an edit that is {way}")
        turn: Turn = self._inner.propose(context)
        return turn


def run(job: Any, settings: Any, on_event: Any) -> Any:
    """Scores depend on the constants; one train.py in eight fails, in one of the ways that there are."""
    digest = hashlib.sha256(job.source).digest()
    if FAULTS and random.random() < 0.05:
        raise random.choice([DeviceError("lost"), OSError(28, "No space left on device")])
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.run.kind == "experiment" and digest[0] % 8 == 0:
        status = ("crash", "oom", "nan", "timeout", "overtime", "invalid")[digest[1] % 6]
        return scripted.outcome_of(
            job, status=Status(status), reason=f"{status} of {digest.hex()[:6]}", log_tail=["Traceback"]
        )
    found = {k: float(c.value) for k, c in constants(job.source, "laptop").items()}
    bpb = 1.0 + sum(abs(v - 0.3) % 1.0 for v in found.values()) / len(found) + job.run.seed * 1e-4
    curve = [(i / 20, 5.0 - i / 10) for i in range(20)]
    (job.folder / "weights.safetensors").write_bytes(b"w" * 1000)
    return scripted.outcome_of(job, val_bpb=bpb, holdout_bpb=bpb, tokens=4096, curve=curve)


def fill_the_disk_now_and_then() -> None:
    real = os.write

    def write(fd: int, data: Any) -> int:
        begun = os.readlink(f"/proc/self/fd/{fd}").endswith("records.jsonl") and os.fstat(fd).st_size
        if begun and random.random() < 0.02:  # before, a full disk is an answer to the user, not a fault of the night
            raise OSError(28, "No space left on device")
        return real(fd, data)

    os.write = write


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    repo, tag, experiments, FAULTS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "faults"
    hotloop.agent_loop.agents.turn_order.FIRST_WAIT_S = 0.01
    hotloop.agent_loop.agents.turn_order.LONGEST_WAIT_S = 0.05
    hotloop.agent_loop.loop.driver.FIRST_PAUSE_S = 0.01
    hotloop.agent_loop.loop.driver.LONGEST_PAUSE_S = 0.05
    if FAULTS:
        fill_the_disk_now_and_then()
    night = scripted.drive(
        repo, tag, experiments, agent=[Flaky(FAULTS)], runner=run, patience_s=60.0, race=True, quiet=True
    )
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime  # others on the machine have no part
    facts = {
        "driver_s": seconds / max(1, night.next_number),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memory_mb": status("VmRSS:") / 1024,
    }
    print(json.dumps(facts), file=sys.stderr)
