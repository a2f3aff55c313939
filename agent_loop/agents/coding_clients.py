"""Coding agents that come as programs of their own, run headless: Claude Code and Codex.

Each turn is one run of the client, in the sandbox with the network on: the prompt by its standard input, its events in
the proposal's agent.log. HOME and the client's own settings are a private folder that is made for the turn and removed
after it, so that nothing an agent writes there reaches the next turn or the user; of the environment the client gets
the path, the locale, proxies, certificates and its key.

Claude Code gets tools that read, search and edit files, and none that runs anything. Codex works through a shell, so
it can run commands: in the sandbox, as `--agent command` can, but with the network, and its key is in its own process's
environment. Codex's own sandbox is off: it would need namespaces, which ours does not allow. At sandbox level 0 there
is none at all, and Codex is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hotloop.agent_loop.agents.agent import (
    AgentError,
    Context,
    Turn,
    described,
    fresh_handover,
    hypothesis,
    overstepped,
)
from hotloop.agent_loop.agents.sandbox import FILE_BYTES, AgentSandbox
from hotloop.agent_loop.agents.service_errors import WORDS, service_error
from hotloop.agent_loop.agents.transcript import Said, from_claude, from_codex
from hotloop.agent_loop.source import MAX_BYTES
from hotloop.harness.errors import UsageError
from hotloop.harness.files import read_ordinary
from hotloop.harness.sandbox.bounds import Bounds
from hotloop.harness.sandbox.process import ProcessTree, tail
from hotloop.harness.text import one_line

__all__ = ["PROMPT", "ClaudeAgent", "CodexAgent"]

PROMPT = """\
You are the researcher of an automated night of experiments; nobody is there to answer questions.

Your working folder holds program.md, your instruction, and train.py. Read program.md (you are called by the driver:
its first way of working), then train.py. Make one change to train.py that you expect to lower val_bpb, and stop.

- Change train.py only. Any other changed file makes the proposal invalid.
- Do not try to train or to test: there is no data here, and the driver does it.
- Do not commit; the driver does.
- Finish your last message with two lines, on what you changed and why you expect it to help; later turns read them:
  Description: ...
  Why: ...

"""

_PASSED = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TERM", "TZ",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS", "CODEX_CA_CERTIFICATE",
)  # fmt: skip
# The sandbox shows an agent the machine, and these agents have a network.
_SECRETS = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config/gcloud", ".config/gh", ".netrc", ".npmrc",
    ".pypirc", ".git-credentials", ".cache/huggingface/token", ".claude.json", ".claude/.credentials.json",
    ".claude/projects", ".codex/auth.json", ".codex/sessions",
)  # fmt: skip
_MOST_READ = 16 << 20
_MAX_ROUNDS = 80
_START = 'prompt=$1 errors=$2; shift 2; exec "$@" <"$prompt" 2>"$errors"'


class _CodingClient:
    """What the two have in common: one run in the sandbox, and what its end means.

    Args:
        timeout_s: for one turn.
        sandbox: with the network on.
        model: as the client names it; empty for its own default.
        max_cost_usd: for one turn, where the client can hold it; 0 for none.

    Raises:
        UsageError: the client is not installed, there is no key, the sandbox has no network.
    """

    name = ""
    package = ""
    ahead = True

    def __init__(self, timeout_s: float, sandbox: AgentSandbox, *, model: str = "", max_cost_usd: float = 0.0) -> None:
        if not sandbox.network:
            raise UsageError(f"--agent {self.name} needs a sandbox with a network, to reach its model")
        found = shutil.which(self.name)
        if found is None:
            raise UsageError(f"--agent {self.name}: {self.name} is not installed; run: npm install -g {self.package}")
        self.program = os.path.abspath(found)
        self.timeout_s, self.model, self.max_cost_usd = timeout_s, model, max_cost_usd
        self.keys = self._keys()
        secrets = tuple((Path.home() / name).resolve() for name in _SECRETS if (Path.home() / name).exists())
        programs = (*sandbox.programs, *_folders(self.program))
        self.sandbox = replace(sandbox, hidden=(*sandbox.hidden, *secrets), programs=programs)

    def _keys(self) -> dict[str, str]:
        """The client's own variables. Raises UsageError where no key is among them."""
        raise NotImplementedError

    def _argv(self, handover: Path) -> list[str]:
        raise NotImplementedError

    def _settings(self, home: Path) -> dict[str, str]:
        """The variables that name its private folders and turn off what is not its task."""
        raise NotImplementedError

    def _read(self, output: bytes) -> Said:
        raise NotImplementedError

    def propose(self, context: Context) -> Turn:
        """Raises AgentError."""
        handover = fresh_handover(context.folder)
        home = handover / f"home-{self.name}"
        home.mkdir()
        try:
            return self._turn(context, handover, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _turn(self, context: Context, handover: Path, home: Path) -> Turn:
        prompt, errors, description = handover / "prompt.md", handover / "stderr.txt", handover / "description.txt"
        prompt.write_text(PROMPT + context.brief, encoding="utf-8")
        (handover / "brief.md").write_text(context.brief, encoding="utf-8")
        env = {name: os.environ[name] for name in _PASSED if name in os.environ}
        env |= {"HOME": str(home), "HOTLOOP_BRIEF": str(handover / "brief.md"), "HOTLOOP_DESCRIPTION": str(description)}
        env |= self.keys | self._settings(home)
        argv = ["/bin/sh", "-c", _START, "sh", str(prompt), str(errors), self.program, *self._argv(handover)]
        log = context.folder / "agent.log"
        before = log.stat().st_size if log.exists() else 0
        with ProcessTree(
            self.sandbox.launch(argv, context.worktree.resolve(), handover, env), log, Bounds(log=FILE_BYTES)
        ) as process:
            code = process.wait(self.timeout_s)
        output = _end_of(log, before)
        said = self._read(output)
        spent: dict[str, Any] = {"cost_usd": said.cost_usd, "tokens": said.tokens}
        if why := overstepped(process, log):
            raise AgentError(f"{self.name} {why}", **spent)
        if code is None:
            words = f"took longer than {self.timeout_s:.0f} s"
            if not said.trouble:
                raise AgentError(f"{self.name} {words}", **spent)
            raise service_error(self.name, f"{words}; {said.trouble}", after_s=said.after_s, **spent)
        unchanged = read_ordinary(context.worktree / "train.py", MAX_BYTES + 1) == context.source
        if code or (unchanged and said.error):
            words = said.error or f"ended with exit status {code}; {_last_words(output, errors)}; see {log}"
            raise service_error(self.name, words, status=said.status, after_s=said.after_s, **spent)
        if unchanged:
            words = one_line(said.message, WORDS) or _last_words(output, errors)
            raise AgentError(f"{self.name} left train.py as it was; {words}", **spent)
        written = (read_ordinary(description, 4000) or b"").decode("utf-8", "replace").strip()
        words = described(written, first=True) if written else described(said.message)
        why = hypothesis(written) or hypothesis(said.message)
        return Turn(words, said.cost_usd, said.tokens, why)


class ClaudeAgent(_CodingClient):
    """Claude Code: reads, searches and edits files; runs nothing, and asks nothing.

    Its key is ANTHROPIC_API_KEY, ANTHROPIC_AUTH_TOKEN or CLAUDE_CODE_OAUTH_TOKEN; ANTHROPIC_BASE_URL is passed on.
    """

    name = "claude"
    package = "@anthropic-ai/claude-code"

    def _keys(self) -> dict[str, str]:
        keys = _given("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN")
        if not keys:
            raise UsageError(
                "--agent claude has no key; export ANTHROPIC_API_KEY=..., or, with a subscription, run "
                "`claude setup-token` and export CLAUDE_CODE_OAUTH_TOKEN=..."
            )
        return keys | _given("ANTHROPIC_BASE_URL")

    def _settings(self, home: Path) -> dict[str, str]:
        return {
            "CLAUDE_CONFIG_DIR": str(home / ".claude"),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            # Its own ten tries take minutes, at a wrong key too; the driver knows better what to do meanwhile.
            "CLAUDE_CODE_MAX_RETRIES": "2",
        }

    def _argv(self, handover: Path) -> list[str]:
        argv = [
            "-p", "--output-format", "stream-json", "--verbose", "--restricted", "--tools", "Read,Edit,Write,Grep,Glob",
            "--permission-mode", "acceptEdits", "--permission-prompts", "none", "--add-dir", str(handover),
            "--strict-mcp-config", "--disable-slash-commands", "--no-session-persistence",
            "--max-turns", str(_MAX_ROUNDS),
        ]  # fmt: skip
        if self.max_cost_usd:
            argv += ["--max-budget-usd", f"{self.max_cost_usd:g}"]
        return argv + (["--model", self.model] if self.model else [])

    def _read(self, output: bytes) -> Said:
        return from_claude(output)


class CodexAgent(_CodingClient):
    """Codex: works through a shell of its own inside the sandbox.

    Its key is CODEX_API_KEY, OPENAI_API_KEY or the OPENAI_API_KEY of ~/.codex/auth.json; OPENAI_BASE_URL says where
    the Responses API is. It does not say what a turn cost, so that `max_cost_usd` cannot be held.
    """

    name = "codex"
    package = "@openai/codex"

    def __init__(self, timeout_s: float, sandbox: AgentSandbox, *, model: str = "", max_cost_usd: float = 0.0) -> None:
        if sandbox.base.level == 0:
            raise UsageError("--agent codex runs commands, and without a sandbox (level 0) nothing would hold them")
        super().__init__(timeout_s, sandbox, model=model, max_cost_usd=max_cost_usd)

    def _keys(self) -> dict[str, str]:
        given = _given("CODEX_API_KEY", "OPENAI_API_KEY")
        key = next(iter(given.values()), "") or _codex_login()
        if not key:
            raise UsageError("--agent codex has no key; export CODEX_API_KEY=... (or OPENAI_API_KEY)")
        return {"CODEX_API_KEY": key}

    def _settings(self, home: Path) -> dict[str, str]:
        folder = home / ".codex"
        folder.mkdir()
        return {"CODEX_HOME": str(folder)}

    def _argv(self, handover: Path) -> list[str]:
        # A provider of our own: the built-in one tries web sockets first, and its retries cannot be bounded.
        provider = {
            "name": "hotloop",
            "base_url": os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
            "env_key": "CODEX_API_KEY",
            "wire_api": "responses",
            "request_max_retries": 2,
            "stream_max_retries": 2,
        }
        variables = {"HOTLOOP_BRIEF": handover / "brief.md", "HOTLOOP_DESCRIPTION": handover / "description.txt"}
        settings = {
            "model_provider": "hotloop",
            **{f"model_providers.hotloop.{key}": value for key, value in provider.items()},
            "approval_policy": "never",
            "web_search": "disabled",
            "shell_environment_policy.inherit": "core",  # not the key
            **{f"shell_environment_policy.set.{key}": str(value) for key, value in variables.items()},
            "analytics.enabled": False,
            "check_for_update_on_startup": False,
        }
        argv = [
            "exec", "--json", "--sandbox", "danger-full-access", "--skip-git-repo-check", "--ephemeral",
            "--ignore-user-config", "--ignore-rules", "--disable", "unbounded_connection_retries",
        ]  # fmt: skip
        for key, value in settings.items():
            argv += ["-c", f"{key}={json.dumps(value)}"]  # a JSON string is a TOML string
        return [*argv, *(["-m", self.model] if self.model else []), "-"]

    def _read(self, output: bytes) -> Said:
        return from_codex(output)


def _given(*names: str) -> dict[str, str]:
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _codex_login() -> str:
    path = Path(os.environ.get("CODEX_HOME") or Path.home() / ".codex") / "auth.json"
    try:
        key = json.loads(read_ordinary(path, 1 << 20) or b"{}").get("OPENAI_API_KEY")
    except (ValueError, AttributeError):
        return ""
    return key if isinstance(key, str) else ""


def _folders(program: str) -> tuple[Path, ...]:
    """Where a program and what it loads lie: npm links to a file deep below node_modules."""
    real = Path(program).resolve()
    modules = [parent for parent in real.parents if parent.name == "node_modules"]
    return (Path(program).parent, modules[-1] if modules else real.parent)


def _end_of(log: Path, start: int) -> bytes:
    with open(log, "rb") as f:
        f.seek(max(start, os.fstat(f.fileno()).st_size - _MOST_READ))
        return f.read()


def _last_words(output: bytes, errors: Path) -> str:
    """The end of what a client printed, for a reader who wonders why it failed."""
    lines = [*tail(errors, 3), *output[-2000:].decode("utf-8", "replace").splitlines()[-1:]]
    words = one_line(" ".join(line for line in lines if line.strip()), 200)
    return f"it said: {words}" if words else "it said nothing"
