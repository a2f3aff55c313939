"""What the coding agents' own clients print, one JSON object a line, read for what a turn came to.

The shapes are those that Claude Code 2.1 (`--output-format stream-json`) and Codex 0.169 (`exec --json`) were seen to
print. Nothing here is relied on for the edit: that is read from the worktree.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Said", "from_claude", "from_codex", "objects"]


@dataclass
class Said:
    """What a client's output says of its turn.

    Attributes:
        message: the model's last words.
        error: why the client gave up; empty where it did not, or did not say.
        trouble: what it was waiting for when its output ended: a service that it would have asked again.
        status: of HTTP, 0 where unknown.
        after_s: how long the service asked to wait; 0 where it did not say.
    """

    message: str = ""
    error: str = ""
    trouble: str = ""
    status: int = 0
    after_s: float = 0.0
    cost_usd: float = 0.0
    tokens: int = 0


def objects(output: bytes) -> Iterable[dict[str, Any]]:
    """The JSON objects among the lines of an output; whatever else it holds is passed over."""
    for line in output.splitlines():
        if line.startswith(b"{"):
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(line)


def from_claude(output: bytes) -> Said:
    said = Said()
    for event in objects(output):
        kind = event.get("type")
        if kind == "rate_limit_event":
            info = _mapping(event.get("rate_limit_info"))
            if info.get("status") == "rejected":
                said.after_s = max(0.0, _number(info.get("resetsAt")) - time.time())
        elif kind == "system" and event.get("subtype") == "api_retry":
            said.after_s = max(said.after_s, _number(event.get("retry_delay_ms")) / 1000)
            status = int(_number(event.get("error_status")))
            said.trouble = f"the service's last status: {status}" if status else "connection failed"
        elif kind == "assistant":
            said.trouble = ""
        elif kind == "result":
            _claude_result(event, said)
    return said


def _claude_result(event: dict[str, Any], said: Said) -> None:
    said.cost_usd = _number(event.get("total_cost_usd"))
    # The totals by model hold what the main conversation's leave out.
    models = _mapping(event.get("modelUsage")).values()
    counts = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
    said.tokens = int(sum(_number(_mapping(m).get(c)) for m in models for c in counts))
    said.status = int(_number(event.get("api_error_status")))
    text = event.get("result")
    said.message = text if isinstance(text, str) else ""
    if event.get("is_error"):
        errors = event.get("errors")
        listed = "; ".join(map(str, errors)) if isinstance(errors, list) else ""
        said.error = said.message or listed or str(event.get("subtype"))
        if event.get("stop_reason") == "refusal":
            said.error = f"the model refused: {said.error}"


def from_codex(output: bytes) -> Said:
    said = Said()
    for event in objects(output):
        kind = event.get("type")
        if kind == "item.completed":
            item = _mapping(event.get("item"))
            said.trouble = ""
            if item.get("type") == "agent_message":
                said.message = str(item.get("text") or "")
        elif kind == "error":
            said.trouble = str(event.get("message"))
        elif kind == "turn.completed":
            usage = _mapping(event.get("usage"))
            said.tokens += int(_number(usage.get("input_tokens")) + _number(usage.get("output_tokens")))
        elif kind == "turn.failed":
            said.error = str(_mapping(event.get("error")).get("message") or "the turn failed")
    return said


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """A count that can be added up; 0 for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    number = float(value) if abs(value) < 1e15 else 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
