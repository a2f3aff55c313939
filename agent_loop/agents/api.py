"""An agent that is a model alone: any OpenAI-compatible chat-completions endpoint, and three tools to edit with.

It runs in the driver's process, over plain HTTP, and runs nothing that a model says: the model sees program.md, the
brief and train.py, and asks for edits of a copy, by function calls or, where it has none, by SEARCH/REPLACE blocks or
a whole file in its text. The copy becomes the worktree's train.py when the model is done.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

from hotloop.agent_loop.agents.agent import AgentError, Context, Turn, described, hypothesis
from hotloop.agent_loop.agents.brief import most_tokens
from hotloop.agent_loop.agents.chat import from_events, text_of
from hotloop.agent_loop.agents.edits import Draft, EditError, without_thoughts
from hotloop.agent_loop.agents.service import Service
from hotloop.agent_loop.agents.service_errors import WORDS, retry_after_s, service_error
from hotloop.harness.errors import UsageError
from hotloop.harness.files import read_ordinary, write_whole
from hotloop.harness.text import one_line

__all__ = ["ApiAgent"]

_MAX_ROUNDS = 24
_FAILURES = 3  # of one and the same edit, which end the turn
# What services say of a request that is too long for the model.
_TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size|limit)|context_length|maximum context|too many (input )?tokens|"
    r"(prompt|input|request).{0,30}too (long|large)|max_model_len|n_ctx",
    re.IGNORECASE,
)
_REASONING = ("reasoning_content", "reasoning", "reasoning_details")
_INSTRUCTION = """\
You are the researcher of an automated night of experiments; nobody is there to answer questions. Make one change to
train.py that you expect to lower val_bpb. You cannot run anything and see no other file; the driver trains and decides.

With tools: call `edit` (as often as the change needs; `old` must stand in train.py exactly once), or `write` with the
whole file, then `done` with one line that says what you changed, and one that says why it should help.
Without tools, answer with blocks of this form (or a unified diff), then the lines "Description: ..." and "Why: ...":

<<<<<<< SEARCH
exact lines of train.py
=======
the lines that replace them
>>>>>>> REPLACE
"""


def _tool(name: str, what: str, **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": words} for key, words in arguments.items()}
    schema = {"type": "object", "properties": properties, "required": list(arguments), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": schema}}


_TOOLS = [
    _tool("edit", "Replace one exact piece of train.py.", old="text that stands there once", new="what replaces it"),
    _tool("write", "Replace all of train.py.", content="the whole new file"),
    _tool("done", "End the turn.", description="one line: what was changed", why="one line: why it should help"),
]


_MADE = "The edit is made."


class ApiAgent:
    """A model behind an OpenAI-compatible endpoint, which edits train.py by function calls or blocks of text.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        key: sent as a bearer token; none where it is empty.
        timeout_s: for one turn, all rounds together.
        prices: USD for a million tokens in, and out; without them a turn costs nothing.
        max_cost_usd: a turn ends without an edit once it cost more; 0 for no limit.
        extra: further entries of each request, such as a temperature.

    Raises:
        UsageError: no model, an address that is none, a key that is none.
    """

    name = "api"
    ahead = True
    blind = True  # it sees program.md, the brief and train.py

    def __init__(
        self, url: str, model: str, timeout_s: float, *, key: str = "", prices: tuple[float, float] = (0.0, 0.0),
        max_cost_usd: float = 0.0, extra: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not model:
            raise UsageError("--agent api needs a model; see which the service has: curl URL/models")
        if not key.isascii() or not key.isprintable():
            raise UsageError("the API's key holds characters that no key has; was it copied whole?")
        self.service = Service(url, key)
        self.model, self.timeout_s, self.prices, self.max_cost_usd = model, timeout_s, prices, max_cost_usd
        self.extra = extra or {}

    def propose(self, context: Context) -> Turn:
        """Raises AgentError."""
        context.folder.mkdir(parents=True, exist_ok=True)
        with open(context.folder / "agent.log", "a", encoding="utf-8", errors="replace") as log:
            turn = _Conversation(self, context, log)
            try:
                words = turn.run()
                write_whole(context.worktree / "train.py", turn.draft.data)
            except OSError as e:
                raise AgentError(
                    f"train.py cannot be written: {e}", cost_usd=turn.cost_usd, tokens=turn.tokens
                ) from None
            except AgentError as e:
                e.cost_usd, e.tokens = turn.cost_usd, turn.tokens
                raise
        return Turn(words, turn.cost_usd, turn.tokens, turn.why)


@dataclass
class _Conversation:
    """One turn: what was said so far, what it cost, and the copy of train.py."""

    agent: ApiAgent
    context: Context
    log: TextIO
    cost_usd: float = 0.0
    tokens: int = 0
    tools: bool = True
    reasoning: bool = True  # whether what the model thought goes back to it, which some want and some refuse
    why: str = ""
    failures: Counter[str] = field(default_factory=Counter)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.agent.timeout_s
        try:
            self.draft = Draft(self.context.source)
        except EditError as e:
            raise AgentError(str(e), permanent=True) from None
        program = (read_ordinary(self.context.worktree / "program.md", 1 << 18) or b"").decode("utf-8", "replace")
        task = f"{program}\n\n{self.context.brief}\n\n# train.py as it stands\n\n```python\n{self.draft.text}\n```\n"
        self.messages += [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": task}]

    def run(self) -> str:
        """The description. Raises AgentError."""
        told = False
        for _ in range(_MAX_ROUNDS):
            message = self._ask()
            calls = message.get("tool_calls")
            text = without_thoughts(text_of(message.get("content")))
            thought = {key: message[key] for key in _REASONING if message.get(key)}
            if isinstance(calls, list) and calls:
                if words := self._use(calls, text, thought):
                    return words
                continue
            reply = self._read(text)
            if not reply:
                self.why = hypothesis(_prose(text))
                return described(_prose(text))
            self._failed(text, reply)
            if told:
                raise AgentError(f"the model made no edit; it said: {one_line(_prose(text), WORDS)}")
            told = reply.startswith("There is no edit")
            self.messages += [{"role": "assistant", "content": text, **thought}, {"role": "user", "content": reply}]
        raise AgentError(f"the model was not done after {_MAX_ROUNDS} rounds")

    def _failed(self, edit: str, reply: str) -> None:
        """Count an edit that was not made. Raises AgentError once the same one has failed three times."""
        key = f"{edit}\0{reply}"
        self.failures[key] += 1
        if self.failures[key] >= _FAILURES:
            raise AgentError(f"the model made the same edit {_FAILURES} times, and each time it failed: {reply}")

    def _read(self, text: str) -> str:
        """Take the edits of a plain answer; what to tell the model, empty when it is done."""
        try:
            if self.draft.read_answer(text) and not self.draft.changed:
                return "There is no edit: train.py is as it was."
        except EditError as e:
            return f"That edit was not made: {e} Send all blocks again."
        return "" if self.draft.changed else "There is no edit in your answer. Use the tools, or SEARCH/REPLACE blocks."

    def _use(self, calls: list[Any], text: str, thought: dict[str, Any]) -> str:
        """Run the edit tools; the description when the model is done, else empty. Raises AgentError."""
        whole = [c for c in calls[:64] if isinstance(c, dict) and isinstance(c.get("function"), dict)]
        if not whole:
            raise AgentError("the model's tool calls are not in the form of the API")
        done = ""
        replies: list[dict[str, Any]] = []
        for number, call in enumerate(whole):
            call["id"] = str(call.get("id") or f"call-{len(self.messages)}-{number}")
            reply = self._tool_reply(call["function"])
            if reply.startswith("Done: "):
                done = described(reply[6:])
            elif reply != _MADE:
                self._failed(json.dumps(call["function"], default=str), reply)
            replies.append({"role": "tool", "tool_call_id": call["id"], "content": reply})
        self.messages += [{"role": "assistant", "content": text, "tool_calls": whole, **thought}, *replies]
        return done

    def _tool_reply(self, function: dict[str, Any]) -> str:
        name, given = function.get("name"), function.get("arguments")
        try:
            arguments = json.loads(given) if isinstance(given, str) else given
            function["arguments"] = given if isinstance(given, str) else json.dumps(given)
        except (ValueError, RecursionError):
            function["arguments"] = "{}"  # what is not JSON, the service would not take back
            return "The arguments are not JSON; nothing was done."
        wanted = {"edit": ("old", "new"), "write": ("content",), "done": ("description",)}.get(str(name))
        if wanted is None:
            return "There is no such tool; there are edit, write and done."
        if not isinstance(arguments, dict) or not all(isinstance(arguments.get(key), str) for key in wanted):
            return f"{name} needs these texts: {', '.join(wanted)}; nothing was done."
        try:
            if name == "done":
                self.why = hypothesis(f"Why: {arguments.get('why', '')}")
                return (
                    f"Done: {arguments['description']}" if self.draft.changed else "Nothing is changed yet; edit first."
                )
            getattr(self.draft, str(name))(*(arguments[key] for key in wanted))
        except EditError as e:
            return f"Not done: {e}"
        return _MADE

    # The service.

    def _ask(self) -> dict[str, Any]:
        """The model's next message. Raises AgentError."""
        limit = self.agent.max_cost_usd
        if limit and self.cost_usd > limit:
            raise AgentError(f"the turn cost more than {limit:g} USD")
        if time.monotonic() >= self.deadline:
            raise AgentError(f"the model took longer than {self.agent.timeout_s:.0f} s")
        messages = self.messages
        if not self.reasoning:
            messages = [{k: v for k, v in m.items() if k not in _REASONING} for m in messages]
        request: dict[str, Any] = {**self.agent.extra, "model": self.agent.model, "messages": messages}
        if self.tools:
            request["tools"] = _TOOLS
        service = self.agent.service
        answer = service.post("/chat/completions", request, self.deadline)
        self.log.write(answer.body[:100_000].decode("utf-8", "replace").rstrip() + "\n")
        if 300 <= answer.status < 400:
            where = one_line(str(answer.headers.get("Location")), WORDS)
            raise AgentError(f"{service.url} redirects to {where}; give --api-url that is not moved", permanent=True)
        text = answer.body[:2000].decode("utf-8", "replace")
        if self.tools and answer.status in (400, 422, 501) and "tool" in text.lower():
            self.tools = False  # the service has none; its instruction says what to do instead
            return self._ask()
        if self.reasoning and answer.status in (400, 422) and "reasoning" in text.lower():
            self.reasoning = False
            return self._ask()
        if answer.status in (400, 413, 422) and _TOO_LONG.search(text):
            raise AgentError(
                f"{service.url}: the model's context is too small ({one_line(_error_text(text), 160)}); this request "
                f"has up to {most_tokens(json.dumps(messages, ensure_ascii=False)):,} tokens, and the answer comes on "
                f"top; give a model, or a server, with more",
                permanent=len(messages) == 2,
            )
        if answer.status != 200:
            after_s = retry_after_s(answer.headers.get("Retry-After"))
            words = f"status {answer.status}: {_error_text(text)}"
            raise service_error(service.url, words, status=answer.status, after_s=after_s)
        return self._message(answer.body)

    def _message(self, body: bytes) -> dict[str, Any]:
        url = self.agent.service.url
        try:
            whole = from_events(body) if body.lstrip().startswith((b"data:", b"event:", b":")) else json.loads(body)
            choice = whole["choices"][0]
            message = choice["message"]
            if not isinstance(message, dict):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            words = one_line(body[:400].decode("utf-8", "replace"), WORDS)
            raise AgentError(f"{url} did not answer with a chat completion but with: {words or 'nothing'}") from None
        self._count(whole.get("usage"))
        reason = choice.get("finish_reason")
        if message.get("refusal") or reason == "content_filter":
            raise AgentError(f"the model refused: {one_line(str(message.get('refusal') or reason), WORDS)}")
        if reason == "length":
            raise AgentError("the model's answer was cut off at its limit of tokens")
        return message

    def _count(self, usage: Any) -> None:
        counts = usage if isinstance(usage, dict) else {}
        read, written = (
            n if isinstance(n := counts.get(key), int) and 0 <= n < 1 << 40 else 0
            for key in ("prompt_tokens", "completion_tokens")
        )
        self.tokens += read + written
        self.cost_usd += (read * self.agent.prices[0] + written * self.agent.prices[1]) / 1e6


def _prose(text: str) -> str:
    """A model's text without its edits."""
    return text.rpartition("```")[2].rpartition("REPLACE")[2].strip() or text[-400:]


def _error_text(body: str) -> str:
    """What an error says: {"error": {"message": ...}} of OpenAI, {"message"} or {"detail"} of others, or plain text."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)
