"""Claude Code and Codex as agents, with stand-ins that speak their command lines; every agent by its name."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hotloop.agent_loop.agents.agent import AgentError, Context, Turn
from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.agents.coding_clients import ClaudeAgent, CodexAgent, described
from hotloop.agent_loop.agents.registry import AGENTS, make_agent
from hotloop.agent_loop.agents.sandbox import FILE_BYTES, AgentSandbox
from hotloop.agent_loop.agents.service_errors import retry_after_s, service_error
from hotloop.agent_loop.agents.transcript import Said, from_claude, from_codex
from hotloop.harness.errors import UsageError
from tests.agent_loop.test_loop import repo, scripted  # noqa: F401 - a fixture
from tests.needs import at, sandbox

SOURCE = "MATRIX_LR = 0.04\n\n\ndef build_model(spec): ...\n\n\ndef train(run): ...\n"
STANDIN = Path(__file__).with_name("standin.py").read_text()
KINDS = {"claude": ClaudeAgent, "codex": CodexAgent}
KEYS = {"claude": "ANTHROPIC_API_KEY", "codex": "CODEX_API_KEY"}
both = pytest.mark.parametrize("name", ["claude", "codex"])


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the stand-ins, first on PATH; a home and keys of the test's own."""
    for variable in list(os.environ):
        if variable.upper().startswith(("ANTHROPIC_", "OPENAI_", "CLAUDE", "CODEX", "HOTLOOP_")):
            monkeypatch.delenv(variable)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in KINDS:
        (folder / name).write_text(f"#!{sys.executable} -IB\n{STANDIN}")
        (folder / name).chmod(0o755)
        monkeypatch.setenv(KEYS[name], "sk-dummy")
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SECRET", "not for agents")
    return folder


@pytest.fixture
def context(tmp_path: Path) -> Context:
    worktree, folder = tmp_path / "worktree", tmp_path / "proposal"
    worktree.mkdir()
    folder.mkdir()
    (worktree / "train.py").write_text(SOURCE)
    (worktree / "program.md").write_text("lower val_bpb\n")
    return Context(worktree, 1, "laptop", SOURCE.encode(), [], frozenset(), folder, "nothing was tried yet")


def inside(level: int = 1, network: bool = True) -> AgentSandbox:
    return AgentSandbox(sandbox(level), (), network=network)


def propose(
    installed: Path, context: Context, name: str, variant: str, level: int = 1, timeout_s: float = 30.0, **options: Any
) -> Turn:
    (installed / "variant").write_text(variant)
    return KINDS[name](timeout_s, inside(level), **options).propose(context)


def failure(installed: Path, context: Context, name: str, variant: str, **options: Any) -> AgentError:
    with pytest.raises(AgentError) as raised:
        propose(installed, context, name, variant, **options)
    assert str(raised.value).isprintable()
    return raised.value


def text_of(context: Context) -> str:
    return (context.worktree / "train.py").read_text()


@both
@pytest.mark.parametrize("level", [at(3), at(1)])
def test_a_turn(installed: Path, context: Context, name: str, level: int) -> None:
    turn = propose(installed, context, name, "edit", level)
    assert turn == Turn("raise the rate", 0.007 if name == "claude" else 0.0, 750)
    assert text_of(context) == SOURCE.replace("0.04", "0.07")
    seen = json.loads((context.folder / "handover" / "seen.json").read_text())
    assert seen["cwd"] == str(context.worktree)
    assert "Make one change to train.py" in seen["prompt"]
    assert seen["prompt"].endswith("nothing was tried yet")
    env = seen["env"]
    assert env[KEYS[name]] == "sk-dummy"
    assert not {"SECRET", KEYS["codex" if name == "claude" else "claude"]} & set(env)
    assert env["HOME"].startswith(str(context.folder / "handover"))
    assert env["CLAUDE_CONFIG_DIR" if name == "claude" else "CODEX_HOME"].startswith(env["HOME"])
    assert not Path(env["HOME"]).exists()  # nothing of it reaches the next turn
    assert not os.listdir(Path.home())


def test_the_flags_of_claude(installed: Path, context: Context) -> None:
    propose(installed, context, "claude", "edit", model="opus", max_cost_usd=0.5)
    argv = json.loads((context.folder / "handover" / "seen.json").read_text())["argv"]
    assert argv[:5] == ["-p", "--output-format", "stream-json", "--verbose", "--restricted"]
    given = dict(pairwise(argv))
    assert given["--tools"] == "Read,Edit,Write,Grep,Glob"
    assert given["--permission-mode"] == "acceptEdits"
    assert given["--permission-prompts"] == "none"
    assert given["--add-dir"] == str(context.folder / "handover")
    assert given["--max-budget-usd"] == "0.5"
    assert given["--model"] == "opus"
    assert "--max-turns" in argv


def test_the_flags_of_codex(installed: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", 'http://127.0.0.1:1/"v1"')
    propose(installed, context, "codex", "edit", model="gpt-5")
    argv = json.loads((context.folder / "handover" / "seen.json").read_text())["argv"]
    assert (argv[0], argv[-3:]) == ("exec", ["-m", "gpt-5", "-"])
    assert {"--json", "--skip-git-repo-check", "--ephemeral", "--ignore-user-config", "--ignore-rules"} <= set(argv)
    assert argv[argv.index("--sandbox") + 1] == "danger-full-access"
    settings = tomllib.loads("\n".join(value for flag, value in pairwise(argv) if flag == "-c"))
    assert settings["approval_policy"] == "never"
    assert settings["model_providers"]["hotloop"]["base_url"] == 'http://127.0.0.1:1/"v1"'
    assert settings["shell_environment_policy"]["inherit"] == "core"
    handover = context.folder / "handover"
    assert settings["shell_environment_policy"]["set"]["HOTLOOP_DESCRIPTION"] == str(handover / "description.txt")


@both
def test_the_description_file_comes_first(installed: Path, context: Context, name: str) -> None:
    assert propose(installed, context, name, "description").description == "by its \\x1b[1mfile"


@both
def test_an_exit_without_fault_and_an_edit_is_a_turn_whatever_was_printed(
    installed: Path, context: Context, name: str
) -> None:
    assert propose(installed, context, name, "garbage and an edit") == Turn("an edit without a description")
    assert "0.07" in text_of(context)


@both
def test_a_huge_output_is_read_at_its_end(installed: Path, context: Context, name: str) -> None:
    assert propose(installed, context, name, "huge").tokens == 750


@both
def test_an_endless_output_is_stopped(installed: Path, context: Context, name: str) -> None:
    error = failure(installed, context, name, "endless")
    assert f"printed more than {FILE_BYTES >> 20} MiB" in str(error)


@both
@pytest.mark.parametrize("level", [at(3), at(1)])
def test_edits_elsewhere_are_no_edit_of_train_py(installed: Path, context: Context, name: str, level: int) -> None:
    error = failure(installed, context, name, "elsewhere", level=level)
    assert "left train.py as it was; I changed program.md" in str(error)
    untouched = (context.worktree / "program.md").read_text() == "lower val_bpb\n"
    assert untouched == (level == 3)  # below that the driver finds it


@both
def test_no_edit_says_what_it_cost(installed: Path, context: Context, name: str) -> None:
    error = failure(installed, context, name, "no edit")
    assert "left train.py as it was; I looked, and all is well." in str(error)
    assert (error.tokens, error.cost_usd, error.permanent) == (750, 0.007 if name == "claude" else 0.0, False)


@both
@pytest.mark.bubblewrap
def test_a_train_py_that_is_gone_is_for_the_driver_to_judge(installed: Path, context: Context, name: str) -> None:
    propose(installed, context, name, "gone", level=3)
    assert not (context.worktree / "train.py").exists()


@both
def test_a_hang_is_ended(installed: Path, context: Context, name: str) -> None:
    error = failure(installed, context, name, "hang", timeout_s=1.0)
    assert str(error) == f"{name} took longer than 1 s"
    assert error.retry_after_s == 0
    assert not list((context.folder / "handover").glob("home-*"))


@both
def test_a_client_that_waits_for_its_service_says_so(installed: Path, context: Context, name: str) -> None:
    error = failure(installed, context, name, "wait", timeout_s=1.0)
    words = "took longer than 1 s; the service's last status: 529" if name == "claude" else "429 Too Many Requests"
    assert words in str(error)
    assert error.retry_after_s == (90 if name == "claude" else 60)


NO = {
    # variant: (words, permanent, least and most seconds to wait) for claude; then for codex
    "garbage": (("it said: \\x1b[31m", False, 0, 0), ("it said: \\x1b[31m", False, 0, 0)),
    "crash": (("Segmentation fault", False, 0, 0), ("Segmentation fault", False, 0, 0)),
    "option": (("unknown option '--restricted'", True, 0, 0), ("unknown option", True, 0, 0)),
    "refusal": (("the model refused: API Error: Opus", False, 0, 0), ("refused to answer", False, 0, 0)),
    "bad key": (("Invalid API key", True, 0, 0), ("401 Unauthorized", True, 0, 0)),
    "not logged in": (("Not logged in", True, 0, 0), ("Not logged in", True, 0, 0)),
    "model": (("issue with the selected model", True, 0, 0), ("`x` does not exist", True, 0, 0)),
    "credit": (("Credit balance is too low", True, 0, 0), ("Quota exceeded", True, 0, 0)),
    "rate": (("Request rejected (429)", False, 7, 7), ("Rate limit reached", False, 7, 7)),
    "overloaded": (("529 Overloaded", False, 60, 60), ("429 Too Many Requests", False, 60, 60)),
    "usage limit": (("hit your 5-hour limit", False, 4900, 5000), ("hit your usage limit", False, 1800, 1800)),
    "unreachable": (("Connection refused", False, 60, 60), ("Connection failed", False, 60, 60)),
}


@both
@pytest.mark.parametrize("variant", NO)
def test_what_a_client_says_when_it_gives_up(installed: Path, context: Context, name: str, variant: str) -> None:
    words, permanent, least_s, most_s = NO[variant][name == "codex"]
    error = failure(installed, context, name, variant)
    assert words in str(error)
    assert error.permanent == permanent
    assert least_s <= error.retry_after_s <= most_s
    assert text_of(context) == SOURCE


@pytest.mark.parametrize(
    ("variant", "words"), [("turns", "maximum number of turns (80)"), ("budget", "maximum budget ($0.5)")]
)
def test_limits_of_claude_say_what_the_turn_cost(installed: Path, context: Context, variant: str, words: str) -> None:
    error = failure(installed, context, "claude", variant)
    assert words in str(error)
    assert (error.cost_usd, error.tokens, error.permanent, error.retry_after_s) == (0.007, 750, False, 0)


def test_a_log_of_an_earlier_try_is_not_read_again(installed: Path, context: Context) -> None:
    propose(installed, context, "claude", "edit")
    (context.worktree / "train.py").write_text(SOURCE)
    error = failure(installed, context, "claude", "garbage")
    assert (error.tokens, error.cost_usd) == (0, 0)


@pytest.mark.parametrize("level", [at(3), at(1)])
def test_secrets_of_the_user_are_out_of_sight(context: Context, installed: Path, level: int) -> None:
    (Path.home() / ".ssh").mkdir()
    (Path.home() / ".ssh" / "id").write_text("secret")
    (Path.home() / ".netrc").write_text("secret")
    (installed / "claude").write_text(
        f"#!{sys.executable} -I\nimport os\n"
        f"for path in ('{Path.home()}/.ssh/id', '{Path.home()}/.netrc'):\n"
        "    try: assert open(path).read() != 'secret'\n    except OSError: pass\n"
        "open('train.py', 'a').write('# seen\\n')\n"
    )
    (context.worktree / "train.py").write_text(SOURCE)
    propose(installed, context, "claude", "", level)
    assert text_of(context).endswith("# seen\n")


# At the start.


@both
def test_a_client_that_is_not_installed(installed: Path, name: str) -> None:
    (installed / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is not installed; run: npm install -g @"):
        KINDS[name](30.0, inside())


@both
def test_a_key_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS[name])
    with pytest.raises(UsageError, match=f"{name} has no key; export {KEYS[name]}="):
        KINDS[name](30.0, inside())


@pytest.mark.parametrize("variable", ["ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"])
def test_other_keys_of_claude(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setenv(variable, "token")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    assert ClaudeAgent(30.0, inside()).keys == {variable: "token", "ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}


@pytest.mark.parametrize("login", ['{"OPENAI_API_KEY": "sk-login"}', '{"OPENAI_API_KEY": null}', "[1]", "{", ""])
def test_the_login_of_codex(login: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEX_API_KEY")
    (Path.home() / ".codex").mkdir()
    (Path.home() / ".codex" / "auth.json").write_text(login)
    if "sk-login" in login:
        assert CodexAgent(30.0, inside()).keys == {"CODEX_API_KEY": "sk-login"}
        monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
        assert CodexAgent(30.0, inside()).keys == {"CODEX_API_KEY": "sk-env"}
    else:
        with pytest.raises(UsageError, match="has no key"):
            CodexAgent(30.0, inside())


@both
def test_a_sandbox_without_a_network_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="needs a sandbox with a network"):
        KINDS[name](30.0, inside(network=False))


def test_codex_is_refused_where_nothing_would_hold_its_shell() -> None:
    with pytest.raises(UsageError, match="without a sandbox"):
        CodexAgent(30.0, inside(0))
    assert ClaudeAgent(30.0, inside(0)).name == "claude"


def test_every_agent_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "command": "true", "timeout_s": 5.0, "sandbox": inside(network=False), "seed": 1,
        "model": "m", "api_url": "http://127.0.0.1:1/v1", "max_cost_usd": 0.5,
    }  # fmt: skip
    assert [make_agent(name, **given).name for name in AGENTS] == list(AGENTS)
    with pytest.raises(UsageError, match="no agent 'gemini'; there are: builtin, command, claude, codex, api"):
        make_agent("gemini", **given)
    needs = (("command", "command", "--command"), ("api", "model", "a model"), ("api", "api_url", "--api-url"))
    for name, missing, words in needs:
        with pytest.raises(UsageError, match=words):
            make_agent(name, **given | {missing: None})
    monkeypatch.setenv("HOTLOOP_API_PRICES", "0.5,1.5")
    assert make_agent("api", **given).prices == (0.5, 1.5)  # type: ignore[attr-defined]
    for prices in ("cheap", "-1,0", "0,inf", "nan,0", "1"):
        monkeypatch.setenv("HOTLOOP_API_PRICES", prices)
        with pytest.raises(UsageError, match="is not two numbers"):
            make_agent("api", **given)


# Words.


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("I did.\n\nDescription: a lower rate\n", "a lower rate"),
        ("**Description:** a *lower* rate", "a *lower* rate"),
        ("Description: one\nDescription: two\nbye", "two"),
        ("first\n\n- last line\n\n", "- last line"),
        ("Description:\n", "an edit without a description"),
        ("", "an edit without a description"),
        ("x" * 500, "x" * 197 + "..."),
        ("Description: a\x1b[1m b", "a\\x1b[1m b"),
    ],
)
def test_a_description_out_of_the_last_words(message: str, line: str) -> None:
    assert described(message) == line


@pytest.mark.parametrize("read", [from_claude, from_codex])
def test_hostile_events_count_nothing(read: Any) -> None:
    lines = [
        '{"type": "result", "total_cost_usd": 1e999, "modelUsage": {"m": {"inputTokens": NaN}, "n": 3}, "result": []}',
        '{"type": "result", "total_cost_usd": -5, "modelUsage": [], "api_error_status": "x"}',
        '{"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": -1}}',
        '{"type": "turn.completed", "usage": {"input_tokens": 1e400, "output_tokens": true}}',
        '{"type": "item.completed", "item": {"type": "agent_message", "text": null}}',
        '{"type": {"a": 1}}',
        '{"a":' * 5000,
    ]
    assert read("\n".join(lines).encode()) == Said()


def test_waits_have_a_bound() -> None:
    assert service_error("x", "Try again in 900 days", status=429).retry_after_s == 8 * 86400
    assert service_error("x", "Please try again in 250ms", status=429).retry_after_s == 0.25
    assert retry_after_s("1e9") == 8 * 86400
    assert retry_after_s("nan") == 0
    assert retry_after_s("-3") == 0


# ---- whole nights


@pytest.mark.parametrize("level", [3, 1])
@both
def test_a_night_by_a_client_is_in_its_records(installed: Path, repo: Path, name: str, level: int) -> None:  # noqa: F811
    """The driver, git and the sandbox are real, with the night's own folders hidden as the command line hides them."""
    (installed / "variant").write_text("edit")
    hidden = (repo / "runs", repo / ".git")
    hidden_from = dataclasses.replace(inside(level), hidden=tuple(p.resolve() for p in hidden))
    night = scripted.drive(repo, "t", 1, agent=[KINDS[name](30.0, hidden_from), BuiltinAgent(1)])
    row = night.rows()[-1]
    assert (row.origin.agent, row.description, row.decision) == (name, "raise the rate", "keep"), night.turns
    assert row.origin.cost_usd == (0.007 if name == "claude" else 0.0)
    assert "Best val_bpb 1.100000" in (night.experiment_folder(3) / "turn/handover/prompt.md").read_text()


def test_a_client_at_its_limit_is_left_alone_and_another_goes_on(installed: Path, repo: Path) -> None:  # noqa: F811
    (installed / "variant").write_text("usage limit")
    agents = [ClaudeAgent(30.0, inside()), BuiltinAgent(1)]
    night = scripted.drive(repo, "t", 3, agent=agents)
    assert [t.origin.agent for t in night.turns] == ["claude"]  # asked once, and not before its limit ends
    assert [r.origin.agent for r in night.rows() if r.kind == "experiment"] == ["builtin"] * 3
