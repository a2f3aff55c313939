"""What a model's service says when it does not answer, as an AgentError that the driver can act on."""

from __future__ import annotations

import email.utils
import re
import time

from hotloop.agent_loop.agents.agent import AgentError
from hotloop.harness.text import one_line

__all__ = ["retry_after_s", "service_error"]

_PERMANENT = re.compile(
    r"api key|not logged in|/login|authentication|oauth token|credit balance|quota exceeded|current quota|"
    r"billing|selected model|model\b.{0,80}\b(does not exist|not found|not supported)|unknown option|"
    r"unexpected argument",
    re.IGNORECASE,
)
_USAGE_LIMIT = re.compile(r"hit your .{0,30}limit|usage limit", re.IGNORECASE)
_BUSY = re.compile(
    r"rate.?limit|overloaded|too many requests|at capacity|temporarily|connection (?:refused|failed)", re.IGNORECASE
)
_STATUS = re.compile(r"\bstatus:? (\d{3})\b")
_AGAIN_IN = re.compile(r"\bagain in (\d+(?:\.\d+)?) ?(ms|s|sec|m|min|h|hour|d|day)", re.IGNORECASE)
_UNITS_S = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}
WORDS = 240  # characters of what a service said
_BUSY_S, _USAGE_LIMIT_S, _LONGEST_S = 60.0, 1800.0, 8 * 86400.0


def service_error(
    who: str, text: str, *, status: int = 0, after_s: float = 0.0, cost_usd: float = 0.0, tokens: int = 0
) -> AgentError:
    """The error to raise for what a service or its client said.

    Args:
        who: what the line begins with.
        status: of HTTP; 0 where only the text tells.
        after_s: how long the service asked to wait; 0 where it did not say.
    """
    if not status and (found := _STATUS.search(text)):
        status = int(found[1])
    limit = bool(_USAGE_LIMIT.search(text))
    busy = limit or status in (408, 429) or status >= 500 or bool(_BUSY.search(text))
    broke = "quota" in text.lower() or "credit" in text.lower()  # a 429 too, but one that no waiting mends
    permanent = status in (401, 403, 404) or (bool(_PERMANENT.search(text)) and (broke or not busy))
    wait_s = 0.0
    if busy and not permanent:
        wait_s = min(after_s or _again_in_s(text) or (_USAGE_LIMIT_S if limit else _BUSY_S), _LONGEST_S)
    return AgentError(
        f"{who}: {one_line(text, WORDS)}", retry_after_s=wait_s, permanent=permanent, cost_usd=cost_usd, tokens=tokens
    )


def retry_after_s(header: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 for none, or for one that says neither."""
    if not header:
        return 0.0
    try:
        return max(0.0, min(float(header), _LONGEST_S))
    except ValueError:
        pass
    try:
        return max(0.0, min(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), _LONGEST_S))
    except (ValueError, OverflowError, TypeError):
        return 0.0


def _again_in_s(text: str) -> float:
    found = _AGAIN_IN.search(text)
    return float(found[1]) * _UNITS_S[found[2].lower()] if found else 0.0
