"""What a user is told (wrong flags, how to go on, which agent worked, other versions' records) and what agents are."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hotloop.agent_loop.commands.start
from hotloop.agent_loop.agents.agent import AgentError, Context, Tried, Turn
from hotloop.agent_loop.agents.brief import MAX_TOKENS, Facts, most_tokens, write_brief
from hotloop.agent_loop.agents.contract import in_force, signatures
from hotloop.agent_loop.cli import main
from hotloop.agent_loop.commands.start import NightCommand
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.race import Lesson, Rate, false_stops, lessons, thresholds
from hotloop.agent_loop.report.files import tsv_text
from hotloop.agent_loop.report.page import page
from hotloop.harness.records.chain import canonical
from hotloop.harness.settings import BudgetRule
from tests.agent_loop.nights import Synthetic, realistic
from tests.agent_loop.test_loop import SOURCE, cli, repo, scripted  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (ROOT / "train.py").read_bytes()

# Flags.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--min-gain", "nan"], "--min-gain must be a finite number"),
        (["--hours", "nan"], "--hours must be a finite number"),
        (["--hours", "inf"], "--hours must be a finite number"),
        (["--hours", "0"], "--hours 0 would try nothing"),
        (["--max-cost", "nan"], "--max-cost must be a finite number"),
        (["--patience", "nan"], "--patience must be a finite number"),
        (["--agent-timeout", "nan"], "--agent-timeout must be a positive number"),
        (["--agent-max-cost", "-1"], "--agent-max-cost must not be negative"),
        (["--budget-tokens", "5"], "--budget-tokens 5 is less than a row of 256 tokens"),
        (["--budget-tokens", "nan"], "--budget-tokens must be a positive number"),
        (["--model", "x"], "--model goes with --agent claude, codex or api"),
        (["--api-url", "http://localhost"], "--api-url and --api-extra go with --agent api"),
        (["--agent", "command", "--command", "echo 'x"], '--command "echo \'x" is not a command'),
        (["--agent", "api", "--api-url", "http://localhost:1", "--model", "m", "--api-extra", "{"], "is not JSON"),
    ],
)
def test_a_wrong_flag_is_one_line(
    repo: Path,  # noqa: F811
    args: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import hotloop.harness.single

    monkeypatch.setattr(hotloop.harness.single, "settings_from", lambda **_: scripted.SETTINGS)
    monkeypatch.chdir(repo)
    assert main(["loop", "--preset", "laptop", *args]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["runs", "runs/t"])
def test_a_file_where_nights_are_kept_is_one_line(
    repo: Path,  # noqa: F811
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    (repo / name).parent.mkdir(exist_ok=True)
    (repo / name).write_text("x")
    monkeypatch.setattr(hotloop.agent_loop.commands.start, "settings_of", lambda _: scripted.SETTINGS)
    monkeypatch.chdir(repo)
    assert main(["loop", "--tag", "t"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_package_is_the_command(repo: Path) -> None:  # noqa: F811
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "hotloop", "best"], cwd=repo, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no night" in done.stderr


@pytest.mark.parametrize("named", [False, True])
def test_after_ctrl_c_the_very_command_is_printed(
    repo: Path,  # noqa: F811
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(hotloop.agent_loop.commands.start, "settings_of", lambda _: scripted.SETTINGS)
    monkeypatch.setattr(NightCommand, "drive", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(repo)
    tag = ["--tag", "my night"[:2]] if named else []
    assert main(["loop", "--no-watchdog", "--notify", "echo 'a b'", *tag]) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("hotloop: stopped; to go on: hotloop loop --no-watchdog --notify 'echo '")
    assert said.count("--tag") == 1 and (not named or said.endswith("--tag my"))


# Agents.


class Never:
    name, ahead = "codex", True

    def propose(self, context: Context) -> Turn:
        raise AgentError("its box [/b] does not start", permanent=True)


def test_an_agent_that_never_worked_is_said_loudly(
    repo: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hotloop.agent_loop.agents.builtin import BuiltinAgent

    words = "the agent codex was asked for and never made an edit; 1 turns failed, lastly: its box [/b] does not start"
    night = scripted.drive(repo, "t", 1, agent=[Never(), BuiltinAgent(1)])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(f"WARNING: {words}") == 2  # when it failed, and at the end
    assert night.asked == ["codex", "builtin"]
    shown = page(night, None)
    assert words in shown and "builtin (1), codex (0)" in shown
    scripted.drive(repo, "t", 2, agent=[Never(), BuiltinAgent(1)])
    assert capsys.readouterr().out.splitlines()[0].startswith("WARNING: the agent codex")  # at the start


def test_tokens_cost_and_hypotheses_of_good_turns_are_on_record(repo: Path) -> None:  # noqa: F811
    class Spends:
        name, ahead = "api", True

        def propose(self, context: Context) -> Turn:
            text = context.source.replace(b"0.04", f"0.0{4 + context.number}".encode())
            (context.worktree / "train.py").write_bytes(text)
            return Turn("a rate", 0.25, 1500, "it was\nlow \x1b[1m")

    night = scripted.drive(repo, "t", 1, agent=[Spends()])
    row = night.rows()[-1]
    assert (row.origin.tokens, row.origin.cost_usd, row.origin.why) == (1500, 0.25, "it was low \\x1b[1m")
    assert night.tokens == 1500 and night.cost_usd == 0.25
    assert NightFolder.reading(night.folder).tokens == 1500
    assert "1,500" in page(night, None) and "api (1)" in page(night, None)
    brief = write_brief(night, "laptop")
    assert "## Hypotheses, and what became of them" in brief and "`it was low" in brief


def test_what_a_turn_without_an_edit_cost_is_on_record(repo: Path) -> None:  # noqa: F811
    class Idle:
        name, ahead = "api", True

        def propose(self, context: Context) -> Turn:
            return Turn("nothing", 0.5, 700)

    from hotloop.agent_loop.agents.builtin import BuiltinAgent

    night = scripted.drive(repo, "t", 1, agent=[Idle(), BuiltinAgent(1)])
    assert (night.turns[0].origin.tokens, night.cost_usd) == (700, 0.5)


# Records of another version.


def forge(path: Path, change: Any) -> None:
    """Append an entry as another hotloop might have: `change` is done to the last experiment's."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    entry = next(e for e in reversed(lines) if e["kind"] == "experiment")
    entry |= {"seq": len(lines), "prev": lines[-1]["hash"]}
    entry["body"]["run"]["number"] = 9
    entry["body"]["environment"]["versions"] = {"hotloop": "7.8.9"}
    change(entry)
    entry.pop("hash")
    entry["hash"] = hashlib.sha256(canonical(entry)).hexdigest()
    with open(path, "ab") as f:
        f.write(canonical(entry) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["body"].update(a_new_field=1), lambda e: e["body"]["run"].pop("seed"),
        lambda e: e.update(version=3), lambda e: e.update(kind="dream"), lambda e: e["body"].update(status="sleepy"),
    ],
)  # fmt: skip
def test_a_record_of_another_version_says_which(
    repo: Path,  # noqa: F811
    change: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    night = scripted.drive(repo, "t", 1)
    forge(night.chain.path, change)
    monkeypatch.chdir(repo)
    capsys.readouterr()
    for verb in (["report"], ["best"], ["show", "1"], ["diff", "1"], ["checkout"], ["verify"], ["replay", "9"]):
        status = main(verb)
        said = capsys.readouterr()
        assert status and "written by hotloop 7.8.9" in said.err + said.out, verb
        assert "Traceback" not in said.err


def test_each_record_says_its_version() -> None:
    from hotloop.harness.experiment import _environment

    assert _environment(scripted.SETTINGS).versions["hotloop"]


# The brief.


def facts(**changes: Any) -> Facts:
    given = {
        "budget": BudgetRule("flops", 1.8e12), "seq_len": 256, "vocab_size": 2048, "data": "stdlib", "device": "cpu",
        "baseline": TRAIN, "incumbent": TRAIN.replace(b"DEPTH=4", b"DEPTH=6"),
    }  # fmt: skip
    return Facts(**(given | changes))


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Synthetic:
    folder = tmp_path / "runs" / "nov23"
    folder.mkdir(parents=True)
    return Synthetic(folder, monkeypatch)


def test_the_brief_says_what_a_researcher_needs(night: Synthetic) -> None:
    realistic(night, 40)
    text = write_brief(night.state, "laptop", facts=facts(blind=True))
    assert most_tokens(text) <= MAX_TOKENS
    for words in (
        "Budget: 1.8e+12 operations of training", "T = 256 tokens a row, V = 2048, data: stdlib, on cpu",
        "LAPTOP's entries stand instead", "in LAPTOP: `DEPTH = 6,", "    -    DEPTH=4,\n    +    DEPTH=6,",
        "- kernels.attention(", "Why:",
    ):  # fmt: skip
        assert words in text, words
    assert "DEPTH = 8" not in text  # not in force
    sighted = write_brief(night.state, "h100", facts=facts())
    assert "kernels.attention(" not in sighted and "DEPTH = 8" in sighted and "is not in force" in sighted


@pytest.mark.parametrize(("kind", "words"), [("seconds", "300 s of training"), ("tokens", "speed wins nothing")])
def test_the_brief_says_how_the_budget_is_counted(night: Synthetic, kind: Any, words: str) -> None:
    realistic(night, 5)
    rule = BudgetRule(kind, 300.0)
    assert words in write_brief(night.state, "h100", facts=facts(budget=rule))


def test_no_part_of_the_brief_crowds_out_another(night: Synthetic) -> None:
    """Each part is there, with rows, in a long night in which very much was kept."""
    night.settings()
    for i in range(1500):
        kept = not i or i % 2 == 0
        words = f"MATRIX_LR 0.04 -> 0.06 and the schedule with it, try {i}"
        why = f"because of {i} " * 10
        night.run("experiment" if i else "baseline", "keep" if kept else "discard", 2.0 - i / 1e4, words,
                  "better, " * 12, gain=1e-4 if kept else -1e-5, why=why)  # fmt: skip
    changed = TRAIN.replace(b"    ", b"  ")
    text = write_brief(night.state, "laptop", facts=facts(incumbent=changed, blind=True), least_gain=0.01)
    assert 0.9 * MAX_TOKENS < most_tokens(text) <= MAX_TOKENS
    least = {
        "The last results": 5, "Near misses": 3, "How it got there": 3, "The diff from": 8, "Hypotheses": 2,
        "The values in force": 2, "Tried by theme": 1, "What `kernels` offers": 5,
    }  # fmt: skip
    parts = {part.partition("\n")[0]: part.splitlines() for part in text.split("## ")}
    for name, count in least.items():
        found = next(rows for heading, rows in parts.items() if heading.startswith(name))
        assert len([r for r in found if r.startswith(("- ", "| ", "    "))]) >= count, name


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=200))
def test_any_train_py_can_be_told_of(data: bytes) -> None:
    hostile = facts(incumbent=TRAIN + b"\n# `code`\n# " + data)
    lines = list(in_force(hostile.incumbent, "laptop"))
    assert all("\n" not in line for line in lines)
    assert len(signatures(hostile.incumbent)) > 5
    from hotloop.agent_loop.agents.brief import _changes

    for line in _changes(hostile.baseline, hostile.incumbent):
        assert line.startswith("    ") and line.isprintable() and "`" not in line and len(line) < 160


# Growth.


def calls(work: Any) -> int:
    """How many Python functions a piece of work calls: the same on any machine, however busy."""
    count = 0

    def seen(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    was = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(was)
    return count


def test_nothing_that_a_night_does_with_its_records_grows_worse_than_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[int]] = {}
    for count in (200, 800):
        folder = tmp_path / str(count)
        folder.mkdir()
        made = Synthetic(folder, monkeypatch)
        made.settings()
        for i in range(count):
            kept, curve = i % 4 == 0, [(j / 10, 3.0) for j in range(11)]
            val = 1.0 - i / 1e4 * (1 if kept else 0.9)
            made.run("experiment" if i else "baseline", "keep" if kept else "discard", val, f"edit {i}",
                     gain=1e-4 if kept else -1e-4, curve=curve, holdout=1.0)  # fmt: skip
        state = NightFolder.reading(folder)
        work = {
            "reading": lambda folder=folder: NightFolder.reading(folder).tried(),
            "brief": lambda state=state: write_brief(state, "h100", facts=facts()),
            "tsv": lambda state=state: tsv_text(state),
            "page": lambda state=state: page(state, None),
            "race": lambda state=state: false_stops(lessons(state, 0.001)),
            "beat": lambda state=state: ([Tried.told(r) for r in state.tried()], state.to_try_again()),
        }
        for name, does in work.items():
            does()  # what is read or kept once
            found.setdefault(name, []).append(calls(does))
    for name, (few, many) in found.items():
        assert many <= 4 * 1.4 * few + 100, (name, few, many)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_false_stops_from_sums_are_those_of_leaving_each_out(data: Any) -> None:
    deficits = st.tuples(*[st.none() | st.sampled_from([-0.02, 0.0, 0.01, 0.05, 0.3])] * 6)
    gains = st.sampled_from([-0.02, -0.002, 0.001, 0.01])
    many = data.draw(st.lists(st.tuples(deficits, gains), max_size=24))
    known = [Lesson(i, d, g, g > -0.003) for i, (d, g) in enumerate(many)]
    gained = [lesson for lesson in known if lesson.gain > 0]
    stopped = 0
    for lesson in gained:
        limits = thresholds([o for o in known if o.number != lesson.number])
        pairs = zip(lesson.deficits, limits, strict=True)
        stopped += any(d is not None and most is not None and d > most + 1e-9 for d, most in pairs)
    assert false_stops(known) == Rate(stopped, len(gained))
