"""What an agent is, and the one that is any program.

An agent is given a worktree with the incumbent's train.py, edits that file, and returns one line that says what it
tried. It may fail in every way, and the night goes on: `AgentError` where it gave no edit (the next agent of the list
takes over while this one is paused), `ProposalError` where its edit cannot be run.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hotloop.agent_loop.agents.sandbox import FILE_BYTES, AgentSandbox
from hotloop.agent_loop.night import Row
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.files import read_ordinary
from hotloop.harness.sandbox.bounds import Bounds
from hotloop.harness.sandbox.process import ProcessTree
from hotloop.harness.text import one_line

__all__ = ["Agent", "AgentError", "CommandAgent", "Context", "Tried", "Turn", "described", "hypothesis"]


@dataclass(frozen=True)
class Tried:
    """One decided experiment, as agents see it: never the holdout."""

    number: int
    decision: str
    reason: str
    description: str
    val_bpb: float | None

    @classmethod
    def told(cls, row: Row) -> Tried:
        return cls(row.number, row.decision, row.reason, row.description, row.val_bpb)


@dataclass(frozen=True)
class Context:
    """What an agent has to go by.

    Attributes:
        worktree: holds the incumbent, with program.md; train.py in it is what the agent edits.
        number: of the proposal: that of the run that it would be, and one more each time that a refused
            edit was made again.
        preset: which of train.py's values are in force.
        source: train.py as it stands in the worktree.
        seen: syntax hashes of everything that was tried.
        folder: the proposal's own folder, for its brief and its log.
        brief: the task and the results so far, as Markdown, made from the records.
    """

    worktree: Path
    number: int
    preset: str
    source: bytes
    history: list[Tried]
    seen: frozenset[str]
    folder: Path
    brief: str = ""


@dataclass(frozen=True)
class Turn:
    """What an agent's turn came to.

    Attributes:
        description: one line on what was tried.
        cost_usd: what the model's service says that it cost; 0 where nothing is said.
        tokens: read and written by the model, where that is known.
        why: the hypothesis behind it, one line that later turns read; empty where none was said.
    """

    description: str
    cost_usd: float = 0.0
    tokens: int = 0
    why: str = ""


class AgentError(HotloopError):
    """A turn without an edit: a crash, a hang, a refusal, a rate limit, a service that is not there.

    Args:
        reason: one line.
        retry_after_s: how long the service asked to wait; 0 where it said nothing.
        permanent: another try cannot help (a wrong key, a model that does not exist).
        cost_usd, tokens: what the turn cost all the same.
    """

    def __init__(
        self, reason: str, *, retry_after_s: float = 0.0, permanent: bool = False, cost_usd: float = 0.0,
        tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(one_line(reason, 400))
        self.retry_after_s, self.permanent = retry_after_s, permanent
        self.cost_usd, self.tokens = cost_usd, tokens


class Agent(Protocol):
    """Whoever edits train.py: a program, a coding client, a model, or the built-in search.

    Attributes:
        name: as `--agent` has it.
        ahead: whether it thinks for so long that its next turn should come while the GPU trains.
    """

    name: str
    ahead: bool

    def propose(self, context: Context) -> Turn:
        """Edit `context.worktree / "train.py"`. Raises AgentError or ProposalError."""
        ...


class CommandAgent:
    """Any program that edits train.py in its working folder.

    It runs in the worktree, in a sandbox, with HOTLOOP_BRIEF (a file to read: the task and the results so far) and
    HOTLOOP_DESCRIPTION (a file to write: one line on what was tried, and one "Why: ...") in its environment.
    """

    name = "command"
    ahead = True

    def __init__(self, command: str, timeout_s: float, sandbox: AgentSandbox) -> None:
        try:
            self.argv = shlex.split(command)
        except ValueError as e:
            raise UsageError(f"--command {command!r} is not a command: {e}") from None
        self.timeout_s = timeout_s
        self.sandbox = sandbox
        if not self.argv:
            raise UsageError("--agent command needs --command 'PROGRAM ARGUMENTS'")
        if shutil.which(self.argv[0]) is None:
            raise UsageError(f"the agent {self.argv[0]!r} cannot be started: no such program; see --command")

    def propose(self, context: Context) -> Turn:
        handover = fresh_handover(context.folder)
        brief, description = handover / "brief.md", handover / "description.txt"
        brief.write_text(context.brief, encoding="utf-8")
        env = os.environ | {"HOTLOOP_BRIEF": str(brief), "HOTLOOP_DESCRIPTION": str(description)}
        log = context.folder / "agent.log"
        launch = self.sandbox.launch(self.argv, context.worktree.resolve(), handover, env)
        with ProcessTree(launch, log, Bounds(log=FILE_BYTES)) as process:
            code = process.wait(self.timeout_s)
        if code is None:
            raise AgentError(f"the agent took longer than {self.timeout_s:.0f} s")
        if why := overstepped(process, log):
            raise AgentError(f"the agent {why}")
        if code:
            raise AgentError(f"the agent ended with exit status {code}; see {log}")
        words = (read_ordinary(description, 4000) or b"").decode("utf-8", "replace")
        return Turn(described(words, first=True), why=hypothesis(words))


def overstepped(process: ProcessTree, log: Path) -> str:
    """What an agent took too much of, and was ended for; empty where it did not."""
    if log.stat().st_size >= FILE_BYTES:
        return f"printed more than {FILE_BYTES >> 20} MiB"
    return f"was ended: {process.fault}" if process.fault else ""


def fresh_handover(folder: Path) -> Path:
    """An empty folder that an agent may write to; one of a driver that was killed may hold anything."""
    handover = (folder / "handover").resolve()
    shutil.rmtree(handover, ignore_errors=True)
    handover.mkdir(parents=True)
    return handover


def described(words: str, first: bool = False) -> str:
    """One line on what was tried: what follows "Description:", else the last line, or the first.

    Args:
        words: an agent's last message, or the file that it wrote; its line on why is not among them.
    """
    lines = [line for line in _lines(words) if not line.lower().startswith("why:")]
    marked = [line[12:] for line in lines if line.lower().startswith("description:")]
    line = marked[-1] if marked else next(iter(lines if first else reversed(lines)), "")
    return one_line(line.strip("*`_# "), 200) or "an edit without a description"


def hypothesis(words: str) -> str:
    """What follows "Why:", in one line; empty where there is none."""
    found = [line[4:].strip("*`_# ") for line in _lines(words) if line.lower().startswith("why:")]
    return one_line(found[-1], 300) if found else ""


def _lines(words: str) -> list[str]:
    return [line for line in (line.strip().strip("*`_# ") for line in words.splitlines()) if line]
