"""What an agent in its sandbox sees, may change, and may reach: real programs, real sandboxes."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from pathlib import Path

import git
import pytest

from hotloop.agent_loop.agents.agent import CommandAgent
from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.agents.sandbox import AgentSandbox, everything_but, outermost, text_of, try_sandbox
from hotloop.agent_loop.commands.start import NightCommand
from hotloop.agent_loop.loop.planner import Options
from hotloop.harness.data.readers import kind_of
from hotloop.harness.errors import SandboxError, UsageError
from hotloop.harness.sandbox.bounds import Bounds
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.process import ProcessTree
from tests.agent_loop.test_loop import SOURCE, repo, scripted  # noqa: F401 - a fixture
from tests.needs import at, sandbox

TRIES = """
import os, socket, time
def attempt(name, call):
    try: call()
    except OSError as e: print('REFUSED', name, e, flush=True)
    else: print('DONE', name, flush=True)
attempt('val', lambda: open('{data}/val.bin').read())
attempt('records', lambda: open('{runs}/t/records.jsonl').read())
attempt('forge', lambda: open('{runs}/t/records.jsonl', 'a').write('x'))
attempt('other night', lambda: open('{runs}/other/records.jsonl').read())
attempt('git', lambda: open('{repo}/.git/config').read())
attempt('hook', lambda: open('{repo}/.git/hooks/post-commit', 'w'))
attempt('checkout', lambda: open('{repo}/train.py', 'a').write('x'))
attempt('home', lambda: open('{home}/new', 'w'))
attempt('tcp', lambda: socket.create_connection(('127.0.0.1', {port}), timeout=1))
attempt('udp', lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})))
attempt('allowed', lambda: open('{allowed}/state', 'w').write('mine'))
print('PROGRAM', len(open('other.py').read()), len(open(os.environ['HOTLOOP_BRIEF']).read()) > 50, flush=True)
open(os.environ['TMPDIR'] + '/x', 'w').write('scratch')
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(600)
    os._exit(0)
text = open('train.py').read().replace('0.04', '0.07')
open('new', 'w').write(text)
os.replace('new', 'train.py')  # as editors save
open(os.environ['HOTLOOP_DESCRIPTION'], 'w').write('raise the rate')
"""


@pytest.fixture
def places(repo: Path, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    for name in ("data", "home", "allowed"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "val.bin").write_text("val")
    other = repo / "runs" / "other"
    other.mkdir(parents=True)
    (other / "records.jsonl").write_text("another night")
    return {
        "data": str(tmp_path / "data"), "home": str(tmp_path / "home"), "allowed": str(tmp_path / "allowed"),
        "runs": str(repo / "runs"), "repo": str(repo),
    }  # fmt: skip


def agent(level: int, code: str, places: dict[str, str], network: bool = False) -> CommandAgent:
    hidden = tuple(Path(p) for p in (places["data"], places["runs"], places["repo"] + "/.git"))
    made = CommandAgent("true", 30.0, AgentSandbox(sandbox(level), hidden, (Path(places["allowed"]),), network))
    made.argv = [sys.executable, "-c", code]
    return made


def test_the_text_that_data_was_made_of_is_hidden_with_it(tmp_path: Path) -> None:
    out, text = tmp_path / "else" / "rows", tmp_path / "text"
    for folder in (out, text, out.parent / "climbmix-shards", out.parent / ".rows.tmp-17"):
        folder.mkdir(parents=True)
    beside = [out.parent / "climbmix-shards", out.parent / ".rows.tmp-17"]
    assert text_of(out, "climbmix") == text_of(out, str(tmp_path / "gone")) == beside
    assert text_of(out, str(text)) == [*beside, text]
    # What the agent itself needs stays: of a folder that holds the interpreter only the files of text are hidden.
    found = text_of(out, sys.prefix)
    assert Path(sys.prefix) not in found and all(kind_of(p) for p in found[2:])


@pytest.mark.parametrize("level", [at(3), at(2), at(1)])
def test_what_an_agent_writes_is_bounded_while_it_grows(places: dict[str, str], level: int, tmp_path: Path) -> None:
    inside = agent(level, "", places).sandbox
    for name, code in {
        "log": "import time\nwhile True: print('x' * 4096, flush=True), time.sleep(0.001)",
        "files": "for n in range(10**6): open(f'{n}', 'w').close()",
        "hole": "import os; f = open('hole', 'wb'); os.ftruncate(f.fileno(), 200 << 30)",
    }.items():
        for folder in ("worktree", "handover"):
            (tmp_path / name / folder).mkdir(parents=True)
        launch = inside.launch(
            [sys.executable, "-c", code], tmp_path / name / "worktree", tmp_path / name / "handover", dict(os.environ)
        )
        with ProcessTree(launch, tmp_path / name / "log.txt", Bounds(files=1 << 20, log=1 << 20)) as process:
            process.wait(30.0)
        if name == "hole":
            assert process.returncode != 0 and not (tmp_path / name / "worktree" / "hole").stat().st_size
        else:
            assert process.fault == f"its {name} grew beyond 1 MiB"


@pytest.mark.parametrize("level", [at(3), at(2), at(1)])
def test_an_agent_may_change_train_py_and_nothing_else(repo: Path, places: dict[str, str], level: int) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = TRIES.format(**places, port=listener.getsockname()[1])
        night = scripted.drive(repo, "t", 1, agent=agent(level, code, places))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    row = night.rows()[-1]
    log = (night.experiment_folder(row.number) / "turn" / "agent.log").read_text()
    assert (row.decision, row.description) == ("keep", "raise the rate"), (row, log)
    refused = [line.split()[1] for line in log.splitlines() if line.startswith("REFUSED")]
    if "checkout" in refused:  # else it wrote to a private /tmp: the file itself is looked at below
        refused.remove("checkout")
    assert refused == ["val", "records", "forge", "other", "git", "hook", "home", "tcp", "udp"], log
    assert "DONE allowed" in log
    assert "PROGRAM 6 True" in log
    assert Path(places["allowed"], "state").read_text() == "mine"
    assert (repo / "train.py").read_text() == SOURCE
    assert not os.listdir(places["home"])
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if _reads(p).find(b"time.sleep(600)") > 0]
    assert not alive
    with git.Repo(repo) as made:
        assert b"0.07" in made.git.show("autoresearch/t:train.py").encode()


def _reads(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("level", [at(3), at(1)])
def test_the_network_is_there_when_it_is_asked_for(repo: Path, places: dict[str, str], level: int) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=5).close()"
        scripted.drive(repo, "t", 1, agent=[agent(level, code, places, network=True), BuiltinAgent(1)])
        listener.settimeout(5)
        listener.accept()[0].close()


def test_in_the_best_sandbox_other_files_of_the_worktree_are_read_only(repo: Path, places: dict[str, str]) -> None:  # noqa: F811
    code = "open('other.py', 'a')"
    night = scripted.drive(repo, "t", 1, agent=[agent(3, code, places), BuiltinAgent(1)])
    assert "exit status 1" in night.turns[0].reason
    logs = [p.read_text() for p in (night.folder / "turns").glob("*/agent.log")]
    assert len(logs) == 1 and "Read-only file system" in logs[0]


def test_a_folder_that_would_open_the_sandbox_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (tmp_path, tmp_path / "data"):
        with pytest.raises(UsageError, match="would give the agent"):
            AgentSandbox(best(0), (tmp_path / "data",), (path,))
    with pytest.raises(UsageError, match="no such file"):
        AgentSandbox(best(0), (), (tmp_path / "nowhere",))


def test_a_program_that_is_not_there_is_a_line(repo: Path, places: dict[str, str]) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="no such program; see --command"):
        CommandAgent("no-such-program --flag", 30.0, AgentSandbox(best(0), ()))
    made = agent(0, "", places)
    made.argv = ["gone-since"]
    night = scripted.drive(repo, "t", 1, agent=[made, BuiltinAgent(1)])
    assert "no such program" in night.turns[0].reason


def test_everything_but_leaves_out_what_is_hidden_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a/hidden/x", "a/seen/y", "b"):
        (tmp_path / name).mkdir(parents=True)
    paths = everything_but({tmp_path / "a" / "hidden"})
    ours = [p for p in paths if p.startswith(str(tmp_path))]
    assert ours == [str(tmp_path / "a" / "seen"), str(tmp_path / "b")]
    assert "/usr" in paths
    assert not any((tmp_path / "a" / "hidden").is_relative_to(p) for p in paths)


@pytest.mark.parametrize("level", [at(3), at(2), at(1)])
def test_a_folder_that_lies_in_a_hidden_one_is_hidden_with_it(tmp_path: Path, level: int) -> None:
    """As by default: the data, and the folder that all prepared data lies in; a key that lies beside nothing else."""
    runs, data = tmp_path / "runs", tmp_path / "cache" / "hotloop" / "stdlib"
    for folder in (runs, data):
        folder.mkdir(parents=True)
    (data / "val.bin").write_text("val")
    hidden = (data, data.parent, runs, runs / "none", data / "val.bin", runs)
    made = AgentSandbox(sandbox(level), hidden)
    assert made.hidden == (runs, data.parent)
    try_sandbox(made, runs)
    assert not os.listdir(runs)


def test_each_path_is_hidden_once_and_the_outermost_first(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    paths = [tmp_path / "a" / "b" / "c", tmp_path / "link", tmp_path / "a" / "b", tmp_path / "ab"]
    assert outermost(paths) == (tmp_path / "ab", tmp_path / "a" / "b")
    assert outermost([tmp_path / "a" / ".." / "a"]) == (tmp_path / "a",)


@pytest.mark.bubblewrap
def test_a_sandbox_that_cannot_start_is_said_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"no agent can start in its sandbox: .+"):
        try_sandbox(AgentSandbox(best(3), (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())), tmp_path)


def test_what_an_agent_prints_has_a_cap_while_it_runs(
    repo: Path,  # noqa: F811
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hotloop.agent_loop.agents.sandbox.FILE_BYTES", 1 << 20)
    monkeypatch.setattr("hotloop.agent_loop.agents.agent.FILE_BYTES", 1 << 20)
    shout = agent(1, "import os, sys\nfor i in range(10 ** 6): os.write(1, b'x' * 65536)", places)
    night = scripted.drive(repo, "t", 1, agent=[shout, BuiltinAgent(1)])
    assert night.turns[0].reason == "the agent printed more than 1 MiB"
    assert (night.folder / "turns" / "000001" / "agent.log").stat().st_size <= 300_000


def test_a_nights_sandboxes_are_tried_before_it_begins(repo: Path, places: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    def command(*agents: object) -> NightCommand:
        return NightCommand("t", repo / "runs" / "t", git.Repo(repo), list(agents), [], Options(), "")  # type: ignore[arg-type]

    command(BuiltinAgent(1)).try_sandboxes()
    assert not (repo / "runs" / "t").exists()
    good = agent(1, "pass", places)
    command(good, good, BuiltinAgent(1)).try_sandboxes()
    assert not list((repo / "runs" / "t").iterdir())
    bad = agent(1, "pass", places)
    bad.sandbox = dataclasses.replace(bad.sandbox, hidden=(Path(sys.base_prefix).resolve(), Path("/usr"), Path("/bin")))
    with pytest.raises(SandboxError, match="no agent can start in its sandbox"):
        command(bad).try_sandboxes()
