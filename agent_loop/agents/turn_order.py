"""Whose turn it is: the agents in the user's order, each paused for a while after it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hotloop.agent_loop.agents.agent import Agent, AgentError
from hotloop.agent_loop.backoff import Backoff

__all__ = ["FIRST_WAIT_S", "LONGEST_WAIT_S", "REFUSALS", "TurnOrder"]

FIRST_WAIT_S = 15.0
LONGEST_WAIT_S = 1800.0
REFUSALS = 3  # edits in a row that cannot be run, which count as a failure


@dataclass
class _State:
    agent: Agent
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_WAIT_S, LONGEST_WAIT_S))
    refusals: int = 0
    invalid: Backoff = field(default_factory=lambda: Backoff(FIRST_WAIT_S, LONGEST_WAIT_S))
    until: float = 0.0  # infinite: it has nothing more to give


class TurnOrder:
    """Whose turn it is: the first agent of a list that is not paused.

    Args:
        agents: the first that is not paused takes the turn.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, agents: Sequence[Agent], clock: Callable[[], float] = time.monotonic) -> None:
        self._states = [_State(a) for a in agents]
        self._clock = clock

    @property
    def agents(self) -> list[Agent]:
        return [s.agent for s in self._states]

    @property
    def names(self) -> str:
        return ", ".join(s.agent.name for s in self._states)

    def pick(self, free_of_cost: bool = False) -> Agent | None:
        """Whose turn it is; None where all are paused.

        Args:
            free_of_cost: only those that no model's service is paid for.
        """
        able = [s.agent for s in self._states if s.until <= self._clock()]
        return next((a for a in able if not (free_of_cost and a.ahead)), None)

    def wait_s(self) -> float | None:
        """How long until somebody may be asked; None where nobody has anything more to give."""
        until = min(s.until for s in self._states)
        return None if until == float("inf") else max(0.0, until - self._clock())

    def worked(self, agent: Agent) -> None:
        state = self._of(agent)
        state.backoff.tries = state.refusals = 0

    def failed(self, agent: Agent, error: AgentError) -> float:
        """Pause it for twice as long as the last time, and for what its service asks; returns the seconds."""
        state = self._of(agent)
        wait = float("inf") if error.permanent else max(state.backoff.next_s(), error.retry_after_s)
        state.until = self._clock() + wait
        return wait

    def refused(self, agent: Agent) -> None:
        """Its edit could not be run. One is a slip; several in a row, and another agent takes over for a while."""
        state = self._of(agent)
        state.refusals += 1
        if state.refusals >= REFUSALS:
            state.refusals = 0
            self.failed(agent, AgentError(f"{REFUSALS} edits in a row could not be run"))

    def ran(self, name: str, decision: str) -> None:
        """A run of its edit is decided. One that is `invalid` is a slip; one after the other pauses it, ever longer."""
        for state in self._states:
            if state.agent.name == name and decision != "invalid":
                state.invalid.tries = 0
            elif state.agent.name == name:
                slip, wait_s = state.invalid.tries == 0, state.invalid.next_s()
                state.until = state.until if slip else max(state.until, self._clock() + wait_s)

    def incumbent_changed(self) -> None:
        """Who had nothing left to give for the old one may have for the new one."""
        for state in self._states:
            if state.until == float("inf") and not state.agent.ahead:
                state.until, state.backoff.tries = 0.0, 0

    def _of(self, agent: Agent) -> _State:
        return next(s for s in self._states if s.agent is agent)
