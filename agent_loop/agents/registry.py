"""The agents by name: what `--agent` can say."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import Any

from hotloop.agent_loop.agents.agent import Agent, CommandAgent
from hotloop.agent_loop.agents.api import ApiAgent
from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.agents.coding_clients import ClaudeAgent, CodexAgent
from hotloop.agent_loop.agents.sandbox import AgentSandbox
from hotloop.harness.errors import UsageError

__all__ = ["AGENTS", "make_agent"]

AGENTS = ("builtin", "command", "claude", "codex", "api")


def make_agent(
    name: str, *, command: str | None, timeout_s: float, sandbox: AgentSandbox, seed: int, model: str | None,
    api_url: str | None, max_cost_usd: float | None, api_extra: str | None = None,
) -> Agent:  # fmt: skip
    """The agent of that name.

    Args:
        command: for `command`, what to run.
        sandbox: for `command`; the coding clients get it with a network, since they talk to their models.
        model, max_cost_usd: for those that have a model.
        api_url: for `api`; else HOTLOOP_API_URL.
        api_extra: for `api`: a JSON object whose entries go into each request, such as {"temperature": 0.7}.

    Raises:
        UsageError: no such agent, or it cannot work here: a program, a key, an address or a model is missing.
    """
    cost = max_cost_usd or 0.0
    if name == "builtin":
        return BuiltinAgent(seed)
    if name == "command":
        return CommandAgent(command or "", timeout_s, sandbox)
    if name in ("claude", "codex"):
        client = ClaudeAgent if name == "claude" else CodexAgent
        return client(timeout_s, replace(sandbox, network=True), model=model or "", max_cost_usd=cost)
    if name == "api":
        url = api_url or os.environ.get("HOTLOOP_API_URL", "")
        if not url:
            raise UsageError("--agent api needs --api-url, such as http://localhost:8000/v1 (or HOTLOOP_API_URL)")
        key = os.environ.get("HOTLOOP_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        return ApiAgent(
            url, model or "", timeout_s, key=key, prices=_prices(), max_cost_usd=cost, extra=_extra(api_extra)
        )
    raise UsageError(f"there is no agent {name!r}; there are: {', '.join(AGENTS)}")


def _extra(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        raise UsageError(f"--api-extra {text!r} is not JSON ({e}); such as '{{\"temperature\": 0.7}}'") from None
    if not isinstance(value, dict):
        raise UsageError(f"--api-extra {text!r} is not a JSON object, such as '{{\"temperature\": 0.7}}'")
    if taken := sorted({"model", "messages", "tools"} & value.keys()):
        raise UsageError(f"--api-extra: {', '.join(taken)} are hotloop's own; see --model")
    return value


def _prices() -> tuple[float, float]:
    given = os.environ.get("HOTLOOP_API_PRICES", "0,0")
    try:
        read, written = map(float, given.split(","))
        if not (0 <= read < math.inf and 0 <= written < math.inf):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"HOTLOOP_API_PRICES={given!r} is not two numbers, USD for a million tokens in and out, such as 0.5,1.5"
        ) from None
    return read, written
