"""What chat-completions services answer with beside one plain JSON object: content in parts, server-sent events."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["from_events", "text_of"]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of which those of another kind are left out."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [p if isinstance(p, str) else p.get("text") for p in parts if isinstance(p, str | dict)]
    return "".join(t for t in texts if isinstance(t, str))


def from_events(body: bytes) -> dict[str, Any]:
    """The completion that a stream of server-sent events adds up to.

    Raises:
        ValueError, KeyError, TypeError, IndexError: an event that is none of a chat completion, or none at all.
    """
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    reason, usage, seen = None, None, False
    for line in body.decode("utf-8", "replace").splitlines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ValueError(str(event["error"]))
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            if choice.get("index", 0) != 0:
                continue
            seen = True
            reason = choice.get("finish_reason") or reason
            delta = choice.get("delta") or choice.get("message") or {}
            for key in ("content", "reasoning_content", "reasoning", "refusal"):
                if text := text_of(delta.get(key)):
                    message[key] = (message.get(key) or "") + text
            for place, call in enumerate(delta.get("tool_calls") or []):
                _add(calls.setdefault(call.get("index", place), {"function": {"name": "", "arguments": ""}}), call)
    if not seen:
        raise ValueError("no event holds a choice")
    if calls:
        message["tool_calls"] = [{"type": "function", **calls[i]} for i in sorted(calls)]
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


def _add(call: dict[str, Any], delta: dict[str, Any]) -> None:
    """A piece of a function call, which comes in many."""
    if delta.get("id"):
        call["id"] = delta["id"]
    for key in ("name", "arguments"):
        call["function"][key] += (delta.get("function") or {}).get(key) or ""
