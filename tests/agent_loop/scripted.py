"""A real driver on a real repository, with a runner that scores a train.py by its constants, in no time.

    python scripted.py REPO TAG EXPERIMENTS [KILL_AT]

KILL_AT n: SIGKILL this process at the n-th write to the records, to git, or to the proposal in flight; odd ones
before the write, even ones after it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from hotloop.agent_loop import folder, gitrepo
from hotloop.agent_loop.agents.agent import Agent
from hotloop.agent_loop.agents.builtin import BuiltinAgent, constants
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.loop.driver import Driver
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.planner import Options
from hotloop.agent_loop.report.files import print_results
from hotloop.harness.experiment import Event, Job, Settings
from hotloop.harness.records.chain import Chain, Lock
from hotloop.harness.records.model import FixedBudget, Ledger, Outcome, Status
from hotloop.harness.settings import PRESETS
from tests.builders import make_outcome

DATA: Any = SimpleNamespace(digest="d", path=Path("nowhere"), source="packages", vocab_size=2048)
SETTINGS = Settings(PRESETS["laptop"], "cpu", DATA, 1)


def outcome_of(job: Job, **changes: Any) -> Outcome:
    """`tokens`: of the training, and of its budget."""
    budget = FixedBudget(tokens=changes.get("tokens", 0))
    return make_outcome(job.run, **{"budget": budget, "ledger": Ledger(start=1.0, train=20.0)} | changes)


def run(job: Job, settings: Settings, on_event: Callable[[Event], None]) -> Outcome:
    """Best at MATRIX_LR 0.1 and DEPTH 6; a DEPTH of 5 crashes; each seed is off by 0.001."""
    found = {k: c.value for k, c in constants(job.source, "laptop").items()}
    on_event(Event("train", 0.5, 2.0, 1000.0))
    job.folder.mkdir(parents=True, exist_ok=True)
    if found["DEPTH"] == 5:
        return outcome_of(job, status=Status.CRASH, reason="five is not a depth", log_tail=["Traceback"])
    bpb = 1.0 + abs(found["MATRIX_LR"] - 0.1) + 0.02 * abs(found["DEPTH"] - 6) + 0.001 * (job.run.seed - 1)
    (job.folder / "weights.safetensors").write_bytes(b"w")
    return outcome_of(job, val_bpb=bpb, peak_mb=512.0, tokens=4096)


def drive(
    repo: Path,
    tag: str,
    experiments: int | None,
    agent: Agent | list[Agent] | None = None,
    runner: Any = run,
    slots: int = 1,
    quiet: bool = False,
    **options: Any,
) -> NightFolder:
    lock = Lock(repo / "runs" / tag / "lock")
    try:
        state = NightFolder(repo / "runs" / tag)
        chosen = Options(**{"experiments": experiments, "noise_seeds": 2, "patience_s": 0.0, **options})
        console = Console(force_terminal=False, width=160, quiet=quiet)
        agents = agent if isinstance(agent, list) else [agent or BuiltinAgent(1)]
        with View(console, state.folder / "night.log") as view:
            night_repo = NightRepo(open_repo(repo), tag, state.folder)
            Driver(state, night_repo, agents, [SETTINGS] * slots, chosen, view, runner).run()
        if not quiet:
            print_results(state, console)
        return state
    finally:
        lock.release()


def _die_at(count: int) -> None:
    calls = 0

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    for owner, name in (
        (Chain, "append"),
        (gitrepo.NightRepo, "commit"),
        (gitrepo.NightRepo, "prepare"),
        (gitrepo.NightRepo, "set_branch"),
        (folder.NightFolder, "set_flight"),
    ):
        wrap(owner, name)


if __name__ == "__main__":
    if len(sys.argv) > 4:
        _die_at(int(sys.argv[4]))
    drive(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
