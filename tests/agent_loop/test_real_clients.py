"""The real Claude Code and Codex in their sandbox, against a scripted service on this machine: no key, no network.

`make clients` installs them; HOTLOOP_CLIENTS names another folder with the two programs.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hotloop.agent_loop.agents.agent import Agent, AgentError, Context
from hotloop.agent_loop.agents.coding_clients import ClaudeAgent, CodexAgent
from hotloop.agent_loop.agents.sandbox import AgentSandbox
from hotloop.agent_loop.commands.start import hidden_from_agents
from tests.agent_loop.services import Reply, anthropic, responses, serve, tool_use
from tests.needs import at, clients, sandbox

SOURCE = "MATRIX_LR = 0.04\n\n\ndef build_model(spec): ...\n\n\ndef train(run): ...\n"
pytestmark = pytest.mark.clients


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("ANTHROPIC_", "OPENAI_", "CLAUDE", "CODEX")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    data = tmp_path / "user" / ".cache" / "hotloop" / "packages-t256-v2048"  # where prepare puts it
    data.mkdir(parents=True)
    (data / "val.bin").write_text("the text that scores")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("HOTLOOP_DATA", "HOTLOOP_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{clients()}:{os.environ['PATH']}")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    night = tmp_path / "runs" / "t"
    worktree, folder = night / "worktree", night / "turns" / "000001"
    for made in (worktree, folder):
        made.mkdir(parents=True)
    (night / "records.jsonl").write_text("the records")
    (worktree / "train.py").write_text(SOURCE)
    (worktree / "program.md").write_text("lower val_bpb\n")
    return Context(worktree, 1, "laptop", SOURCE.encode(), [], frozenset(), folder, "nothing was tried yet")


def made(kind: type[ClaudeAgent] | type[CodexAgent], level: int, context: Context, model: str = "") -> Agent:
    """With everything where it is in a night that was started without a flag."""
    data, runs = Path.home() / ".cache" / "hotloop" / "packages-t256-v2048", context.worktree.parents[1]
    made = AgentSandbox(sandbox(level), (data, *hidden_from_agents(runs, None)), network=True)
    return kind(60.0, made, model=model)


@pytest.mark.parametrize("level", [at(3), at(1)])
def test_claude_edits_in_its_sandbox(context: Context, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    train, words = str(context.worktree / "train.py"), str(context.folder / "handover" / "description.txt")
    last = anthropic(5, {"type": "text", "text": "It is done.\nDescription: not this one"}, stop="end_turn")
    script = (
        tool_use(1, "Read", file_path=train),
        tool_use(2, "Edit", file_path=train, old_string="0.04", new_string="0.07"),
        tool_use(3, "Bash", command="touch ran"),
        tool_use(4, "Write", file_path=words, content="raise the rate\n"),
        last,
    )
    with serve(*script) as service:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-dummy")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
        turn = made(ClaudeAgent, level, context).propose(context)
    assert (turn.description, turn.tokens) == ("raise the rate", 5 * 150)
    assert turn.cost_usd > 0
    assert "0.07" in (context.worktree / "train.py").read_text()
    assert sorted(os.listdir(context.worktree)) == ["program.md", "train.py"]
    asked = json.dumps(service.requests[0][2])
    assert "nothing was tried yet" in asked
    assert "No such tool available: Bash" in json.dumps(service.requests[3][2])
    assert os.listdir(Path.home()) == [".cache"]
    assert sorted(os.listdir(context.folder / "handover")) == [
        "brief.md", "description.txt", "prompt.md", "stderr.txt"
    ]  # fmt: skip


@pytest.mark.parametrize("level", [at(3), at(1)])
def test_codex_edits_in_its_sandbox(context: Context, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    patch = "*** Begin Patch\n*** Update File: train.py\n@@\n-MATRIX_LR = 0.04\n+MATRIX_LR = 0.07\n*** End Patch\n"
    shell = 'cat train.py; echo "key=$CODEX_API_KEY."; echo raise the rate > $HOTLOOP_DESCRIPTION; touch ~/mine'
    command = json.dumps({"cmd": shell})
    script = (
        responses({"type": "function_call", "name": "exec_command", "arguments": command, "call_id": "c1"}),
        responses({"type": "custom_tool_call", "name": "apply_patch", "input": patch, "call_id": "c2"}),
        responses({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]}),
    )
    with serve(*script) as service:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-dummy")
        monkeypatch.setenv("OPENAI_BASE_URL", service.url + "/v1")
        turn = made(CodexAgent, level, context).propose(context)
    assert (turn.description, turn.tokens) == ("raise the rate", 3 * 150)
    assert "0.07" in (context.worktree / "train.py").read_text()
    said = json.dumps(service.requests[1][2])
    assert "MATRIX_LR = 0.04" in said
    assert "key=." in said
    assert os.listdir(Path.home()) == [".cache"]


@pytest.mark.parametrize(
    ("kind", "status", "error", "permanent", "words"),
    [
        (ClaudeAgent, 401, "authentication_error", True, "Failed to authenticate"),
        (ClaudeAgent, 404, "not_found_error", True, "selected model"),
        (ClaudeAgent, 429, "rate_limit_error", False, "429"),
        (ClaudeAgent, 529, "overloaded_error", False, "Overloaded"),
        (CodexAgent, 401, "invalid_api_key", True, "401"),
        (CodexAgent, 404, "model_not_found", True, "does not exist"),
        (CodexAgent, 429, "insufficient_quota", True, "Quota exceeded"),
        (CodexAgent, 503, "server_error", False, "503"),
    ],
)
def test_a_service_that_says_no(
    context: Context, monkeypatch: pytest.MonkeyPatch, kind: type[ClaudeAgent] | type[CodexAgent], status: int,
    error: str, permanent: bool, words: str,
) -> None:  # fmt: skip
    problem = {"type": error, "code": error, "message": "the model `m` does not exist, or so"}
    with serve(Reply({"type": "error", "error": problem}, status)) as service:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-dummy")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-dummy")
        monkeypatch.setenv("OPENAI_BASE_URL", service.url + "/v1")
        with pytest.raises(AgentError, match=words) as raised:
            made(kind, 3, context, "no-such-model" if status == 404 else "").propose(context)
    assert raised.value.permanent == permanent
    assert (raised.value.retry_after_s > 0) == (not permanent)


def test_claude_reads_its_folders_only(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("not for agents")
    train = str(context.worktree / "train.py")
    script = (
        tool_use(1, "Read", file_path=str(tmp_path / "elsewhere")),
        tool_use(2, "Write", file_path=str(tmp_path / "new"), content="x"),
        tool_use(3, "Read", file_path=train),
        tool_use(4, "Edit", file_path=train, old_string="0.04", new_string="0.07"),
        anthropic(5, {"type": "text", "text": "Description: raise the rate"}, stop="end_turn"),
    )
    with serve(*script) as service:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-dummy")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
        assert (
            made(ClaudeAgent, 0, context).propose(context).description == "raise the rate"
        )  # outside of ours: in its own sandbox
    assert "not for agents" not in json.dumps([body for _, _, body in service.requests])
    assert not (tmp_path / "new").exists()


def test_a_refusal_of_claude(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(anthropic(1, {"type": "text", "text": "No."}, stop="refusal")) as service:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-dummy")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
        with pytest.raises(AgentError, match="the model refused") as raised:
            made(ClaudeAgent, 3, context).propose(context)
    assert raised.value.cost_usd > 0


@pytest.mark.parametrize("kind", [ClaudeAgent, CodexAgent])
def test_a_service_that_is_not_there(
    context: Context, monkeypatch: pytest.MonkeyPatch, kind: type[ClaudeAgent] | type[CodexAgent]
) -> None:
    with serve(Reply(b"")) as service:
        pass
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-dummy")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-dummy")
    monkeypatch.setenv("OPENAI_BASE_URL", service.url + "/v1")
    with pytest.raises(AgentError, match=r"[Cc]onnection (refused|failed)") as raised:
        made(kind, 3, context).propose(context)
    assert raised.value.retry_after_s > 0 and not raised.value.permanent


def test_claude_says_when_a_limit_ends(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {
        "anthropic-ratelimit-unified-status": "rejected",
        "anthropic-ratelimit-unified-reset": str(int(time.time()) + 5000),
        "anthropic-ratelimit-unified-representative-claim": "five_hour",
    }
    body = {"type": "error", "error": {"type": "rate_limit_error", "message": "limit"}}
    with serve(Reply(body, 429, limit)) as service:
        monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-dummy")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
        with pytest.raises(AgentError, match="hit your 5-hour limit") as raised:
            made(ClaudeAgent, 3, context).propose(context)
    assert 4900 < raised.value.retry_after_s <= 5000
