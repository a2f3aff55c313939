"""The API agent against scripted services on this machine: its edits, and every way a service can fail it."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hotloop.agent_loop.agents.agent import AgentError, Context, Turn
from hotloop.agent_loop.agents.api import ApiAgent
from hotloop.agent_loop.agents.edits import Draft, EditError, without_thoughts
from hotloop.agent_loop.agents.registry import _extra
from hotloop.agent_loop.source import MAX_BYTES
from hotloop.harness.errors import UsageError
from hotloop.harness.files import write_whole
from tests.agent_loop.services import Reply, Scripted, chat, serve, slowly

SOURCE = "MATRIX_LR = 0.04\nDEPTH = 4\nWIDTH = 4\n\n\ndef build_model(spec): ...\n\n\ndef train(run): ...\n"
EDIT = ("edit", {"old": "0.04", "new": "0.07"})
DONE = ("done", {"description": "raise the rate"})


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    worktree = tmp_path / "worktree"
    worktree.mkdir()
    (worktree / "train.py").write_text(SOURCE)
    (worktree / "program.md").write_text("you are a researcher\n")
    return Context(worktree, 1, "laptop", SOURCE.encode(), [], frozenset(), tmp_path / "proposal", "the brief")


def propose(context: Context, *replies: Reply, **options: Any) -> tuple[Turn, Scripted, str]:
    with serve(*replies) as service:
        turn = ApiAgent(service.url + "/v1/", "m", options.pop("timeout_s", 10.0), **options).propose(context)
    return turn, service, (context.worktree / "train.py").read_text()


def failure(context: Context, *replies: Reply, **options: Any) -> AgentError:
    """Nothing is edited, and the reason is one line."""
    with pytest.raises(AgentError) as raised:
        propose(context, *replies, **options)
    assert (context.worktree / "train.py").read_text() == SOURCE
    assert str(raised.value).isprintable()
    return raised.value


def told(service: Scripted, request: int) -> str:
    """What the model was told last."""
    return str(service.requests[request][2]["messages"][-1]["content"])


# Edits.


def test_a_turn_by_function_calls(context: Context) -> None:
    turn, service, text = propose(
        context, chat(None, EDIT), chat("so", DONE), key="sk-1", prices=(1.0, 10.0), max_cost_usd=1.0
    )
    assert text == SOURCE.replace("0.04", "0.07")
    assert turn == Turn("raise the rate", pytest.approx(2 * (1000 * 1.0 + 200 * 10.0) / 1e6), 2400)
    path, headers, first = service.requests[0]
    assert (path, headers["Authorization"], first["model"]) == ("/v1/chat/completions", "Bearer sk-1", "m")
    assert [t["function"]["name"] for t in first["tools"]] == ["edit", "write", "done"]
    asked = first["messages"][1]["content"]
    assert "you are a researcher" in asked and "the brief" in asked and SOURCE in asked
    second = service.requests[1][2]["messages"]
    assert second[-2]["tool_calls"][0]["id"] == second[-1]["tool_call_id"] == "c0"


def test_several_calls_in_one_message(context: Context) -> None:
    _, _, text = propose(context, chat(None, EDIT, ("edit", {"old": "DEPTH = 4", "new": "DEPTH = 6"}), DONE))
    assert text == SOURCE.replace("0.04", "0.07").replace("DEPTH = 4", "DEPTH = 6")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("edit", {"old": "= 4", "new": "= 5"}), "stands in 2 places"),
        (("edit", {"old": "DEPTH  = 4", "new": "x"}), "The nearest line is 'DEPTH = 4'"),
        (("edit", {"old": "", "new": "x"}), "is empty"),
        (("edit", {"old": "DEPTH", "new": "DEPTH"}), "are the same"),
        (("edit", {"old": "DEPTH"}), "edit needs these texts: old, new"),
        (("edit", {"old": "DEPTH", "new": 4}), "edit needs these texts"),
        (("edit", '{"old": '), "not JSON"),
        (("edit", "[1]"), "edit needs these texts"),
        (("edit", {"old": "DEPTH", "new": "x" * (MAX_BYTES + 1)}), "bytes; at most"),
        (("edit", {"old": "DEPTH", "new": "\ud800"}), "lone surrogate"),
        (("write", {"content": "x = 1"}), "must define build_model() and train()"),
        (("bash", {"command": "rm -rf /"}), "no such tool"),
        (DONE, "Nothing is changed yet"),
    ],
)
def test_a_call_that_cannot_be_done_is_explained_to_the_model(context: Context, call: Any, words: str) -> None:
    _, service, text = propose(context, chat(None, call), chat(None, EDIT, DONE))
    assert words in told(service, 1)
    assert text == SOURCE.replace("0.04", "0.07")


def test_a_whole_file(context: Context) -> None:
    whole = SOURCE.replace("DEPTH = 4", "DEPTH = 9")
    assert propose(context, chat(None, ("write", {"content": whole}), DONE))[2] == whole


BLOCKS = """I raise the rate.

```
<<<<<<< SEARCH
MATRIX_LR = 0.04
=======
MATRIX_LR = 0.07
>>>>>>> REPLACE
```

**Description: raise the rate**
"""


def test_without_tool_calls_blocks_in_the_text_serve(context: Context) -> None:
    turn, _, text = propose(context, chat(BLOCKS))
    assert (turn.description, text) == ("raise the rate", SOURCE.replace("0.04", "0.07"))


def test_without_tool_calls_a_whole_file_serves(context: Context) -> None:
    whole = SOURCE.replace("0.04", "0.07")
    turn, _, text = propose(context, chat(f"Here:\n\n```python\n{whole}```\n\nA higher rate.\n"))
    assert (turn.description, text) == ("A higher rate.", whole)


def test_blocks_are_made_all_or_none_and_the_model_may_try_again(context: Context) -> None:
    two = BLOCKS + "<<<<<<< SEARCH\nnot there\n=======\nx\n>>>>>>> REPLACE\n"
    _, service, text = propose(context, chat(two), chat(BLOCKS.replace("0.07", "0.08")))
    assert "not in train.py" in told(service, 1)
    assert text == SOURCE.replace("0.04", "0.08")


def test_a_service_without_tools_is_asked_again_without(context: Context) -> None:
    no = Reply({"error": {"message": "'tools' is not supported by this model"}}, 400)
    turn, service, _ = propose(context, no, chat(BLOCKS))
    assert turn.description == "raise the rate"
    assert "tools" not in service.requests[1][2]


def test_train_py_that_became_a_link_is_replaced_and_not_followed(context: Context, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (context.worktree / "train.py").unlink()
    (context.worktree / "train.py").symlink_to(outside)
    propose(context, chat(None, EDIT, DONE))
    assert outside.read_text() == "mine"
    assert not (context.worktree / "train.py").is_symlink()
    assert sorted(os.listdir(context.worktree)) == ["program.md", "train.py"]


def test_a_place_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "train.py").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "train.py", b"x")
    assert os.listdir(tmp_path) == ["train.py"]


def test_a_source_that_is_not_text_is_an_error() -> None:
    with pytest.raises(EditError, match="not UTF-8"):
        Draft(b"# \xff\n")


# Models that do not do it.


def test_no_edit_is_asked_for_once_more_and_then_an_error(context: Context) -> None:
    error = failure(context, chat("I would rather talk."), chat("About the weather."), prices=(1.0, 1.0))
    assert "made no edit; it said: About the weather." in str(error)
    assert error.tokens == 2400 and error.cost_usd > 0 and not error.permanent


def test_a_model_that_goes_round_in_circles(context: Context) -> None:
    replies = [chat(None, ("edit", {"old": f"nowhere {i}", "new": "x"})) for i in range(24)]
    error = failure(context, *replies)
    assert "not done after 24 rounds" in str(error)
    assert error.tokens == 24 * 1200


def test_a_cost_limit(context: Context) -> None:
    error = failure(context, chat(None, EDIT), prices=(1.0, 10.0), max_cost_usd=0.005)
    assert "cost more than 0.005 USD" in str(error)
    assert error.cost_usd == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (chat(None, refusal="I can't help with that"), "refused: I can't help"),
        (chat("", reason="content_filter"), "refused: content_filter"),
        (chat("MATRIX", reason="length"), "cut off at its limit of tokens"),
        (Reply({"choices": []}), "did not answer with a chat completion"),
        (Reply({"choices": [{"message": "hello"}]}), "did not answer with a chat completion"),
        (Reply([1]), "did not answer with a chat completion"),
        (Reply(b"{"), "did not answer with a chat completion"),
        (Reply(b""), "but with: nothing"),
        (Reply(b"<html>\x1b[31m\xff\xfe"), r"<html>\x1b[31m"),
        (Reply(b"[" * 100_000), "did not answer with a chat completion"),
        (Reply(b"x" * ((8 << 20) + 1)), "more than 8 MiB"),
        (chat(None, tool_calls=["x"]), "not in the form of the API"),
    ],
)
def test_an_answer_that_is_none(context: Context, reply: Reply, words: str) -> None:
    error = failure(context, reply)
    assert words in str(error)
    assert not error.permanent


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": "many"}, {"prompt_tokens": -5, "completion_tokens": 1e300}])
def test_a_usage_that_is_none_counts_nothing(context: Context, usage: Any) -> None:
    reply = chat(None, EDIT, DONE)
    reply.body["usage"] = usage
    assert propose(context, reply, prices=(1.0, 1.0))[0] == Turn("raise the rate", 0.0, 0)


# Services that say no.


@pytest.mark.parametrize(
    ("status", "header", "message", "permanent", "least_s", "most_s"),
    [
        (401, None, "Incorrect API key", True, 0, 0),
        (403, None, "not your model", True, 0, 0),
        (404, None, "The model `m` does not exist", True, 0, 0),
        (400, None, "model m not found", True, 0, 0),
        (400, None, "context too long", False, 0, 0),
        (429, "7", "slow down", False, 7, 7),
        (429, None, "Rate limit reached. Please try again in 2.5s.", False, 2.5, 2.5),
        (429, None, "slow down", False, 60, 60),
        (429, "soon", "slow down", False, 60, 60),
        (429, "Fri, 31 Dec 2038 23:59:59 GMT", "slow down", False, 86400, 8 * 86400),
        (429, None, "You exceeded your current quota", True, 0, 0),
        (500, None, "oops", False, 60, 60),
        (503, "3", "loading the model", False, 3, 3),
        (529, None, "Overloaded", False, 60, 60),
    ],
)
def test_a_status_says_whether_and_when_to_come_again(
    context: Context, status: int, header: str | None, message: str, permanent: bool, least_s: float, most_s: float
) -> None:
    error = failure(context, Reply({"error": {"message": message}}, status, {"Retry-After": header} if header else {}))
    assert error.permanent == permanent
    assert least_s <= error.retry_after_s <= most_s
    assert f"status {status}: {message}" in str(error)


def test_a_redirect_is_not_followed(context: Context) -> None:
    with serve(chat(None, EDIT, DONE)) as other:
        error = failure(context, Reply(b"", 307, {"Location": other.url + "/v1/chat/completions"}), key="sk-1")
    assert error.permanent
    assert f"redirects to {other.url}" in str(error)
    assert other.requests == []


def test_nobody_listens(context: Context) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(AgentError, match=f"http://127.0.0.1:{port}/v1 cannot be reached: .*refused") as raised:
        ApiAgent(f"http://127.0.0.1:{port}/v1", "m", 5.0).propose(context)
    assert raised.value.retry_after_s > 0


def test_what_listens_never_shakes_hands(context: Context) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        agent = ApiAgent(f"https://127.0.0.1:{listener.getsockname()[1]}/v1", "m", 0.5)
        with pytest.raises(AgentError, match="did not answer in time"):
            agent.propose(context)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(slowly(b"", 30.0, 1), id="silence"),
        pytest.param(slowly(b" ", 0.05, 600), id="trickle"),
        pytest.param(slowly(b"b", 0.05, 600, headers=True), id="trickling headers"),
    ],
)
def test_a_turn_has_an_end_however_slow_the_answer(context: Context, body: Any) -> None:
    start = time.monotonic()
    error = failure(context, Reply(body), timeout_s=0.5)
    assert "did not answer in time" in str(error)
    assert time.monotonic() - start < 29  # the answer would have taken 30 s


def test_all_rounds_together_have_one_time(context: Context) -> None:
    def late(handler: Any) -> None:
        time.sleep(0.3)
        data = json.dumps(chat(None, ("edit", {"old": "no", "new": "x"})).body).encode()
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    error = failure(context, Reply(late), timeout_s=0.8)
    assert "in time" in str(error) or "longer than" in str(error)
    assert error.tokens == 2 * 1200


def test_a_proxy_of_the_environment_is_used(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(chat(None, EDIT, DONE)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://me:secret@"))
        ApiAgent("http://model.invalid:8000/v1", "m", 5.0, key="sk-1").propose(context)
    path, headers, _ = proxy.requests[0]
    assert path == "http://model.invalid:8000/v1/chat/completions"
    assert headers["Host"] == "model.invalid:8000"
    assert headers["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("localhost:8000", "m", 5.0), {}, "not an address"),
        (("http://", "m", 5.0), {}, "not an address"),
        (("http://h:99999999/v1", "m", 5.0), {}, "not an address"),
        (("http://u:p@h/v1", "m", 5.0), {}, "not an address"),
        (("http://h/v1", "", 5.0), {}, "needs a model"),
        (("http://h/v1", "m", 5.0), {"key": "sk\nHost: x"}, "characters that no key has"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ApiAgent(*arguments, **options)


# What models and services do beside the plain case.


@pytest.mark.parametrize("tag", ["think", "thinking"])
@pytest.mark.parametrize("begin", ["<{tag}>\n", ""])
def test_thoughts_are_no_edits(context: Context, tag: str, begin: str) -> None:
    if not begin and tag != "think":
        pytest.skip("a template that opens the block itself is known of <think> alone")
    thought = begin.format(tag=tag) + BLOCKS.replace("0.07", "0.5") + f"Or rather less.\n</{tag}>\n\n"
    turn, _, text = propose(context, chat(thought + BLOCKS))
    assert (turn.description, text) == ("raise the rate", SOURCE.replace("0.04", "0.07"))


def test_a_thought_that_never_ends_is_no_edit() -> None:
    assert without_thoughts("<think>\n" + BLOCKS) == ""
    assert without_thoughts("x = '<think>'\n") == "x = '<think>'"


@pytest.mark.parametrize("plain", [False, True])
def test_three_equal_failures_end_the_turn(context: Context, plain: bool) -> None:
    wrong = (
        chat(BLOCKS.replace("0.04", "0.05")) if plain else chat(None, ("edit", {"old": "MATRIX_LR = 0.05", "new": "x"}))
    )
    words = r"3 times.*nearest line is 'MATRIX_LR = 0\.04', line 1"
    with serve(*[wrong] * 24) as service, pytest.raises(AgentError, match=words) as raised:
        ApiAgent(service.url, "m", 10.0).propose(context)
    assert len(service.requests) == 3 and not raised.value.permanent


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens.",
        "the request exceeds the available context size, try increasing it",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "Input tokens exceed the configured limit: context_length_exceeded",
    ],
)
def test_a_context_that_is_too_small_is_permanent_and_says_what_is_needed(context: Context, message: str) -> None:
    error = failure(context, Reply({"error": {"message": message}}, 400))
    assert error.permanent and message[:40] in str(error)
    assert re.search(r"this request has up to \d{3,} tokens|up to [\d,]+ tokens", str(error))


def test_a_conversation_that_grew_too_long_is_one_turns_failure(context: Context) -> None:
    error = failure(context, chat(None, EDIT), Reply({"error": {"message": "maximum context length is 9"}}, 400))
    assert not error.permanent


def test_content_in_parts_is_text(context: Context) -> None:
    parts = [
        {"type": "thinking", "thinking": "0.5"},
        {"type": "text", "text": BLOCKS[:40]},
        {"type": "text", "text": BLOCKS[40:]},
    ]
    turn, _, text = propose(context, chat(parts))
    assert (turn.description, text) == ("raise the rate", SOURCE.replace("0.04", "0.07"))


def events(*values: Any) -> Reply:
    lines = [f"data: {json.dumps(v)}\n\n" for v in values]
    return Reply((": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n").encode())


def delta(finish: str | None = None, **given: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": given, "finish_reason": finish}]}


def test_server_sent_events_are_put_together(context: Context) -> None:
    arguments = json.dumps(EDIT[1])
    call = {"index": 0, "id": "c1", "function": {"name": "edit", "arguments": arguments[:7]}}
    first = events(
        delta(role="assistant", reasoning_content="Hm"), delta(tool_calls=[call]),
        delta("tool_calls", tool_calls=[{"index": 0, "function": {"arguments": arguments[7:]}}]),
        {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}},
    )  # fmt: skip
    second = events(delta(content="Description: raise "), delta("stop", content="the rate\nWhy: it was low"))
    turn, service, text = propose(context, first, second, extra={"stream": True})
    assert (turn.description, turn.why, turn.tokens) == ("raise the rate", "it was low", 15)
    assert text == SOURCE.replace("0.04", "0.07")
    assert service.requests[0][2]["stream"] is True
    assert service.requests[1][2]["messages"][2]["reasoning_content"] == "Hm"


@pytest.mark.parametrize(
    "body", [b"data: {\n\n", b"data: [DONE]\n\n", b'data: {"error": {"message": "no"}}\n\n', b"event: x\n"]
)
def test_events_that_are_none_are_a_line(context: Context, body: bytes) -> None:
    assert "did not answer with a chat completion" in str(failure(context, Reply(body)))


DIFF = """\
--- a/train.py
+++ b/train.py
@@ -1,3 +1,3 @@
-MATRIX_LR = 0.04
+MATRIX_LR = 0.07
 DEPTH = 4
"""


@pytest.mark.parametrize("fence", ["```diff\n{}```\n", "{}"])
@pytest.mark.parametrize("at", ["@@ -1,3 +1,3 @@", "@@ -77,9 +77,9 @@ def f():", "@@"])
def test_unified_diffs_are_understood(context: Context, fence: str, at: str) -> None:
    diff = DIFF.replace("@@ -1,3 +1,3 @@", at)
    turn, _, text = propose(context, chat(f"Here:\n{fence.format(diff)}\nDescription: raise the rate\n"))
    assert (turn.description, text) == ("raise the rate", SOURCE.replace("0.04", "0.07"))


def test_hunks_go_where_their_lines_stand_and_all_or_none() -> None:
    draft = Draft(b"a = 1\nb = 2\nc = 3\na = 1\nb = 2\nd = 4\n")
    assert draft.read_answer("@@ -4,2 +4,3 @@\n a = 1\n-b = 2\n+b = 5\n+e = 6\n")
    assert draft.text == "a = 1\nb = 2\nc = 3\na = 1\nb = 5\ne = 6\nd = 4\n"
    with pytest.raises(EditError, match=r"not in train\.py"):
        draft.read_answer("@@ -1 +1 @@\n-a = 1\n+a = 9\n@@ -9 +9 @@\n-zzz = 1\n+zzz = 2\n")
    assert "a = 9" not in draft.text


def test_what_the_model_thought_goes_back_to_it_unless_it_refuses(context: Context) -> None:
    no = Reply({"error": {"message": "reasoning_content is not allowed in messages"}}, 400)
    thoughtful = chat(None, EDIT, reasoning_content="a higher rate")
    _, service, _ = propose(context, thoughtful, no, chat(None, DONE))
    assert service.requests[1][2]["messages"][2]["reasoning_content"] == "a higher rate"
    assert "reasoning_content" not in service.requests[2][2]["messages"][2]


def test_extra_entries_go_into_each_request(context: Context) -> None:
    _, service, _ = propose(context, chat(None, EDIT), chat(None, DONE), extra={"temperature": 0.7})
    assert [r[2]["temperature"] for r in service.requests] == [0.7, 0.7]
    assert service.requests[0][2]["model"] == "m"


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": "x"}', "[" * 99999])
def test_extra_that_is_none_is_a_line(text: str) -> None:
    with pytest.raises(UsageError, match="--api-extra"):
        _extra(text)
