"""One agent's turn: the worktree is put to the incumbent, the agent edits it, and its edit is checked.

It runs beside a training, in a thread: everything that it needs of the records is handed to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotloop.agent_loop.agents.agent import Agent, AgentError, Context, Tried, Turn
from hotloop.agent_loop.agents.brief import Facts, quoted, write_brief
from hotloop.agent_loop.folder import Proposal
from hotloop.agent_loop.gitrepo import NightRepo
from hotloop.agent_loop.night import Night
from hotloop.agent_loop.source import ProposalError, check_source, syntax_hash
from hotloop.harness.errors import HotloopError
from hotloop.harness.experiment import Settings
from hotloop.harness.records.model import Origin, Trial
from hotloop.harness.settings import BudgetRule
from hotloop.harness.text import one_line, shorten

__all__ = ["Preflight", "Refused", "Task", "brief_writer", "take_turn"]

Preflight = Callable[[bytes, Path], None]
LOG_BYTES = 256 * 1024  # of a turn's log, kept once it has ended
DESCRIPTION = 400  # characters


@dataclass(frozen=True)
class Task:
    """What a turn starts from.

    Attributes:
        base, source: the incumbent's commit and train.py.
        brief: a function of why the agent's last edit was refused (empty at first).
        seen: syntax hashes of what was tried or is under way.
        preflight: raises ProposalError for an edit that would crash; None for no such check.
    """

    number: int
    base: str
    source: bytes
    preset: str
    history: list[Tried]
    seen: frozenset[str]
    folder: Path
    brief: Callable[[str], str]
    preflight: Preflight | None = None


class Refused(ProposalError):
    """An edit that cannot be run, with what it took to make it."""

    def __init__(self, error: ProposalError, proposal: Proposal) -> None:
        super().__init__(error.status, str(error))
        self.proposal = proposal


def brief_writer(
    night: Night, under_way: list[Trial], settings: Settings, budget: BudgetRule | None, least_gain: float | None,
    devices: int, baseline: bytes, incumbent: bytes, blind: bool,
) -> Callable[[str], str]:  # fmt: skip
    """The brief, as a function of why the agent's last edit was refused.

    It is written here, while nothing is appended; a refusal is put in later, by the turn's own thread.

    Args:
        baseline, incumbent: their train.py.
    """
    preset, dataset = settings.preset, settings.dataset
    facts = Facts(
        budget or preset.budget,
        preset.seq_len,
        dataset.vocab_size,
        dataset.source,
        f"{f'{devices} GPUs' if devices > 1 else settings.device}, {settings.threads} threads",
        baseline,
        incumbent,
        blind,
    )

    def written(refused: str) -> str:
        return write_brief(night, preset.name, list(under_way), refused, least_gain, facts=facts)

    ready, mark = written(""), "%" * 400  # as long as what takes its place
    with_refusal = written(mark)
    return lambda refused: with_refusal.replace(quoted(mark, 400), quoted(refused, 400)) if refused else ready


def take_turn(agent: Agent, repo: NightRepo, task: Task) -> Proposal:
    """Raises AgentError (no edit) or Refused (one that cannot be run)."""
    task.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cost, tokens, refused, source = 0.0, 0, "", task.source
    repo.prepare(task.base)
    for attempt in (1, 2):
        context = Context(
            repo.worktree, task.number, task.preset, source, task.history, task.seen, task.folder, task.brief(refused)
        )
        turn = _asked(agent, context, cost, tokens)
        words = one_line(turn.description, DESCRIPTION) or "an edit without a description"
        cost, tokens = cost + turn.cost_usd, tokens + turn.tokens
        origin = Origin(agent.name, time.monotonic() - began, cost, tokens, one_line(turn.why, DESCRIPTION))
        try:
            source = repo.proposed(task.base)
            if source == task.source:
                raise AgentError("the agent left train.py as it was", cost_usd=cost, tokens=tokens)
            _check(source, words, task)
            return Proposal(task.base, source, words, origin, str(task.folder))
        except ProposalError as e:
            (task.folder / "refused.py").write_bytes(source)
            if attempt == 2 or not agent.ahead or e.status != "crash":
                raise Refused(e, Proposal(task.base, source, words, origin, str(task.folder))) from None
            refused = str(e)  # it goes back to its agent once
            repo.prepare(task.base)
            (repo.worktree / "train.py").write_bytes(source)
    raise AssertionError("unreachable")


def _asked(agent: Agent, context: Context, cost: float, tokens: int) -> Turn:
    """Raises AgentError, with the cost of all attempts of the turn."""
    try:
        turn = agent.propose(context)
    except AgentError as e:
        e.cost_usd, e.tokens = e.cost_usd + cost, e.tokens + tokens
        raise
    except ProposalError:
        raise
    except Exception as e:  # an agent may fail in every way
        words = str(e) if isinstance(e, HotloopError) else f"{type(e).__name__}: {e}"
        raise AgentError(words, cost_usd=cost, tokens=tokens) from e
    finally:
        shorten(context.folder / "agent.log", LOG_BYTES)
    return turn


def _check(source: bytes, description: str, task: Task) -> None:
    check_source(source)
    if syntax_hash(source) in task.seen:
        raise ProposalError("discard", f"not run, it was tried before: {description}")
    if task.preflight:
        task.preflight(source, task.folder)
