"""What comes in from outside, bytes, text, clocks, git, a terminal, is taken as it is: nothing of it ends a night."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import git
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hotloop.agent_loop import source
from hotloop.agent_loop.agents.agent import AgentError, Context, Turn, described, hypothesis
from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.decide import judge
from hotloop.agent_loop.folder import Flight, NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.loop import watchdog
from hotloop.agent_loop.loop.driver import Driver
from hotloop.agent_loop.loop.live import View, sparkline
from hotloop.agent_loop.report import files as report
from hotloop.agent_loop.source import MAX_DEPTH, ProposalError, check_source, merge, size_of, syntax_hash
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.experiment import Event
from hotloop.harness.preflight import lint
from hotloop.harness.records.model import Outcome, Status
from hotloop.harness.scoring.score import Noise
from hotloop.harness.text import cut, forgiving, one_line, printable, shorten
from tests.agent_loop.test_loop import SOURCE, repo, scripted  # noqa: F401 - a fixture
from tests.builders import make_outcome, make_run

anyhow = settings(deadline=None, max_examples=60)
BASE = SOURCE.encode() if isinstance(SOURCE, str) else SOURCE
WORDS = [
    "trains on [/INST] as a token", "drop [lr], k[i] and [b]wd[/b]", "half a surrogate \udce9",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe", "an arrow \u2192 and a rocket \U0001f680", '"opened and never closed', "=HYPERLINK(1)",
    "NA", "$x_{$",
    "two\ttabs and\n a line\u2028more", "\ufeffmark", "null \0 byte", "",
]  # fmt: skip
# Edits that the parser, the tokenizer, or what walks the tree cannot take; on some Pythons they are plain code.
ODD = {
    "one byte": b"X = 1  # \xb5 is small\n",
    "a long sum": b"X = " + b"+".join([b"1"] * 1500) + b"\n",
    "line ends": b"X = 1\r\r\n",
    "a NUL": b"X = 1  # \0\n",
    "brackets": b"X = " + b"(" * 500 + b")" * 500 + b"\n",
    "signs": b"X = " + b"-" * 20_000 + b"1\n",
    "attributes": b"X = a" + b".b" * 3000 + b"\n",
    "a big number": b"X = " + b"9" * 5000 + b"\n",
    "a form feed": b"\x0cX = 1\n",
    "another encoding": b"# -*- coding: utf-7 -*-\nX = 1\n",
    "no encoding": b"# -*- coding: nonsense -*-\nX = 1\n",
    "many lines": b"\n" * 60_000,
    "elif": b"if 1: pass\n" + b"elif 1: pass\n" * 400,
}


def drive_edits(repo: Path, edits: list[tuple[str, bytes]], count: int, **options: Any) -> NightFolder:  # noqa: F811
    """A night of an agent that appends these to train.py, one after the other; a score is in a comment."""

    class Script:
        name, ahead = "scripted", False

        def propose(self, context: Context) -> Turn:
            place = context.number - 1
            if place >= len(edits):
                raise AgentError("nothing left", permanent=True)
            path = context.worktree / "train.py"
            path.write_bytes(path.read_bytes() + edits[place][1] + f"Y{place} = {place}\n".encode())
            return Turn(edits[place][0], why=edits[place][0])

    return scripted.drive(repo, "t", count, agent=[Script()], runner=scored, noise_seeds=0, patience_s=60.0, **options)


def scored(job: Any, settings: Any, on_event: Any) -> Outcome:
    on_event(Event("train", 0.5, 2.0, 1000.0))
    job.folder.mkdir(parents=True, exist_ok=True)
    if b"crash" in job.source.splitlines()[-1]:
        return scripted.outcome_of(job, status=Status.CRASH, reason=job.run.description, log_tail=[job.run.description])
    (job.folder / "weights.safetensors").write_bytes(b"w")
    bpb = 2.0 - 0.1 * job.run.number
    return scripted.outcome_of(job, val_bpb=bpb, holdout_bpb=bpb, peak_mb=1.0, tokens=1)


# Bytes.


@pytest.mark.parametrize("name", ODD)
def test_an_edit_that_cannot_be_read_is_refused_or_can_be_decided(name: str) -> None:
    edited = BASE + ODD[name]
    try:
        check_source(edited)
    except ProposalError as e:
        assert str(e).isprintable() and len(str(e)) < 400
    else:  # what may be run is measured, compared and merged
        size_of(edited)
        merge(BASE, BASE, edited)
        lint.problem(edited)
    assert len(syntax_hash(edited)) == 64


def test_a_night_goes_on_after_edits_that_cannot_be_read_and_can_be_started_again(
    repo: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hotloop.agent_loop.agents.turn_order.FIRST_WAIT_S", 0.01)
    edits = [(name, ODD[name]) for name in ("one byte", "a long sum", "line ends", "a NUL")]
    night = drive_edits(repo, [*edits, ("the next", b"")], 1)
    assert night.rows()[0].decision == "keep" and night.experiments == 1
    assert night.insisted >= 2
    again = drive_edits(repo, [*edits, ("the next", b""), ("one more", b"")], 2)
    assert again.experiments == 2


@anyhow
@given(st.binary(max_size=300), st.integers(0, len(BASE)))
def test_any_bytes_are_refused_or_can_be_decided(data: bytes, place: int) -> None:
    edited = BASE[:place] + data + BASE[place:]
    syntax_hash(edited)
    lint.problem(edited)
    try:
        check_source(edited)
    except ProposalError as e:
        assert str(e).isprintable()
    else:
        size_of(edited)
        assert merge(BASE, edited, BASE) == edited


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), MemoryError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "no")]
)
@pytest.mark.parametrize("place", ["problem", "merge", "size_of", "_dumped"])
def test_whatever_looking_at_an_edit_raises_is_a_refusal(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object) -> Any:
        raise error

    monkeypatch.setattr(source, place, raises)
    with pytest.raises(ProposalError if place != "problem" else (ProposalError, type(error))):
        check_source(BASE)


def test_the_depth_is_bounded_without_recursion() -> None:
    nested = BASE + b"X = " + b"[" * 90 + b"]" * 90 + b"\n"
    check_source(nested)
    with pytest.raises(ProposalError, match=f"deeper than {MAX_DEPTH}"):
        check_source(BASE + b"X = " + b"+".join([b"1"] * (MAX_DEPTH + 1)) + b"\n")


def test_what_is_recorded_is_decided_although_it_cannot_be_measured(repo: Path) -> None:  # noqa: F811
    """A record of another version of Python, say."""
    night = drive_edits(repo, [], 0)
    broken = {"b" * 40: b"X = 1\r\r\n\xb5", night.rows()[0].commit: BASE}
    run = make_outcome(make_run(1, commit="b" * 40, parent=night.rows()[0].commit), 1.0)
    made = judge(night, run, night.incumbent(), broken.__getitem__, Noise(0.01, 3), True)
    assert made.decision == "keep"


@pytest.mark.parametrize("flight", [b"", b"\xff", b"[]", b'{"runs": [{"new": 1}], "proposals": []}', b"[" * 5000])
def test_a_flight_that_cannot_be_read_is_none(tmp_path: Path, flight: bytes) -> None:
    (tmp_path / "flight.json").write_bytes(flight)
    assert Flight.load(tmp_path / "flight.json") == Flight()


def test_whatever_a_turn_raises_is_its_agents_failure(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    real, calls = NightRepo.proposed, []

    def proposed(self: NightRepo, commit: str) -> bytes:
        calls.append(commit)
        if len(calls) == 1:
            raise RuntimeError("of a library [/b]")
        if len(calls) == 2:
            raise SystemExit(3)
        return real(self, commit)

    monkeypatch.setattr(NightRepo, "proposed", proposed)
    monkeypatch.setattr("hotloop.agent_loop.agents.turn_order.FIRST_WAIT_S", 0.01)
    night = scripted.drive(repo, "t", 1)
    assert night.experiments == 1
    assert [t.reason for t in night.turns] == [
        "its turn raised RuntimeError: of a library [/b]", "its turn raised SystemExit: 3",
    ]  # fmt: skip


def test_words_of_another_agent_do_not_stop_the_builtin_one(tmp_path: Path) -> None:
    tried = SimpleNamespace(description="DEPTH eight -> nine, LR 1 -> 1e", decision="keep")
    BuiltinAgent._weights(SimpleNamespace(history=[tried]))  # type: ignore[arg-type]


# Text.


@anyhow
@given(st.text(st.characters(), max_size=200), st.none() | st.integers(4, 80))
def test_any_text_becomes_one_that_can_be_printed(text: str, most: int | None) -> None:
    line = one_line(text, most)
    assert line.isprintable() and (most is None or len(line) <= most)
    line.encode()
    assert all(row.isprintable() for row in printable(text).replace("\t", " ").split("\n"))
    if text.isprintable() and most is None:
        assert line == " ".join(text.split())


def test_what_is_left_out_of_a_text_is_shown() -> None:
    assert one_line("x" * 10**6, 20) == "x" * 17 + "..." and one_line(" a\n b ", 20) == "a b"
    assert one_line("a" + " " * 99 + "b", 20) == "a..."
    assert (cut("  x = 1", 7), cut("  x = 12", 7)) == ("  x = 1", "  x...")


def test_what_could_drive_a_terminal_is_seen() -> None:
    assert (
        printable("\x1b[31ma\x1b]0;t\x07\u202e\udce9\r\nb\tc\xa0d")
        == "\\x1b[31ma\\x1b]0;t\\x07\\u202e\\udce9\\r\nb\tc d"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_every_view_shows_words_as_they_are(
    repo: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    edits = [(w, b"" if i % 2 else b"# crash\n") for i, w in enumerate(WORDS)]
    night = drive_edits(repo, edits, len(WORDS))
    assert night.experiments == len(WORDS)
    from hotloop.agent_loop.cli import main

    monkeypatch.chdir(repo)
    for verb in (["report"], ["best"], ["show", "1"], ["show", "3"], ["show", "4"], ["diff", "2"], ["checkout"]):
        assert main(verb) == 0, verb
    stdout.flush()
    shown = raw.getvalue().decode(encoding)
    for words in ("[/INST]", "k[i]", "[b]wd[/b]", "\\x1b[31mred", "\\u202egnp.exe", "\\udce9"):
        assert words in " ".join(shown.split()) or words in shown
    assert not set(shown) & {"\x1b", "\u202e", "\udce9", "\x07", "\0"}
    page = (night.folder / "report.html").read_text()
    assert "[/INST]" in page and not set(page) & {"\x1b", "\u202e"}
    log = (night.folder / "night.log").read_bytes().decode()
    assert "[/INST]" in log and not set(log) & {"\x1b", "\u202e", "\0"}


def test_notifications_are_lines_that_can_be_printed(repo: Path, tmp_path: Path) -> None:  # noqa: F811
    told: list[str] = []
    driver = Driver.__new__(Driver)
    driver.notifier = SimpleNamespace(tell=lambda event, text: told.append(text))  # type: ignore[assignment]
    for words in WORDS:
        driver._tell("kept", words)
    assert all(t.isprintable() for t in told) and len(told) == len(WORDS)


@anyhow
@given(st.lists(st.text(st.characters(), max_size=40) | st.sampled_from(WORDS), min_size=1, max_size=8))
def test_results_tsv_has_a_row_a_line_and_each_description_whole(descriptions: list[str]) -> None:
    rows = [
        SimpleNamespace(
            val_bpb=1.0, outcome=make_outcome(val_bpb=1.0), description=d, commit="abcdef1" + "0" * 33, decision="keep"
        )
        for d in descriptions
    ]
    text = report.tsv_text(SimpleNamespace(tried=lambda: rows))  # type: ignore[arg-type]
    lines = text.splitlines()
    assert len(lines) == len(descriptions) + 1
    for line, words in zip(lines[1:], descriptions, strict=True):
        *_, cell = line.split("\t")
        assert line.count("\t") == 4
        assert one_line(words) in cell or not one_line(words)
        assert cell[0] not in '"=+-@' and cell.lower() not in ("na", "nan", "null", "none", "n/a", "")


def test_a_description_and_a_hypothesis_are_told_apart() -> None:
    words = "It is done.\n\n**Description: raise the rate**\n*Why: it was low*\n"
    assert (described(words), hypothesis(words)) == ("raise the rate", "it was low")
    assert described("raise the rate\nWhy: low\nmore", first=True) == "raise the rate"
    assert (described(""), hypothesis("no reason")) == ("an edit without a description", "")


# Time.


def test_a_driver_that_beats_is_left_alone_whatever_the_wall_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = (
        "import os, sys, time\nfor i in range(8): os.utime(sys.argv[1], (i % 3 * 9999, i % 3 * 9999)); time.sleep(0.1)"
    )
    (tmp_path / "heartbeat").touch()
    monkeypatch.setattr(time, "time", lambda: 0.0 if time.monotonic_ns() // 10**7 % 2 else 1e12)
    argv = [sys.executable, "-c", beat, str(tmp_path / "heartbeat")]
    assert watchdog._once(argv, tmp_path, 30.0, 0.02) == 0


def test_a_driver_without_a_beat_is_ended_whatever_the_wall_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heartbeat").touch()
    os.utime(tmp_path / "heartbeat", (4e9, 4e9))  # of a clock that was ahead
    assert watchdog._once([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path, 0.5, 0.05) < 0


@anyhow
@given(st.lists(st.floats(allow_nan=True), max_size=40), st.integers(1, 30))
def test_a_sparkline_is_as_long_as_its_series_or_its_width(values: list[float], width: int) -> None:
    import math

    finite = [v for v in values if math.isfinite(v)]
    assert len(sparkline(values, width)) == min(len(finite), width)


def test_a_short_sparkline_shows_all_of_its_series() -> None:
    assert sparkline([1.0, 2.0, 3.0], 16) == "▁▄█"
    assert sparkline([0.0, *[5.0] * 98, 10.0], 2) == "▁█"
    assert sparkline([-1.7e308, 1.7e308, 1.7e308]) == "▁██"


# Git.


def commit_of(repo: Path) -> str:  # noqa: F811
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repo, check=True, capture_output=True, text=True
    ).stdout.strip()


def in_git(repo: Path, *args: str) -> str:  # noqa: F811
    return subprocess.run(["git", *args], cwd=repo, check=True, capture_output=True, text=True).stdout.strip()


def test_a_branch_in_the_way_is_named(repo: Path) -> None:  # noqa: F811
    in_git(repo, "branch", "autoresearch")
    with pytest.raises(UsageError, match="git branch -m autoresearch my-autoresearch"):
        scripted.drive(repo, "t", 1)
    in_git(repo, "branch", "-m", "autoresearch", "mine")
    in_git(repo, "branch", "autoresearch/t/x")
    with pytest.raises(UsageError, match="in the way of 'autoresearch/t'"):
        scripted.drive(repo, "t", 1)


def test_a_branch_of_the_users_is_not_taken_over(repo: Path) -> None:  # noqa: F811
    in_git(repo, "branch", "autoresearch/mine")
    with pytest.raises(UsageError, match="there is a branch autoresearch/mine and no night mine"):
        scripted.drive(repo, "mine", 1)
    assert not (repo / "runs" / "mine" / "records.jsonl").read_bytes()
    in_git(repo, "branch", "-D", "autoresearch/mine")
    scripted.drive(repo, "mine", 1)
    in_git(repo, "symbolic-ref", "HEAD", "refs/heads/autoresearch/mine")
    with pytest.raises(UsageError, match="the checkout is on autoresearch/mine"):
        NightRepo(git.Repo(repo), "mine", repo / "runs" / "mine").check_name()


def test_a_tag_named_like_the_branch_is_not_taken_for_it(repo: Path) -> None:  # noqa: F811
    (repo / "other.py").write_text("an older state\n")
    in_git(repo, "commit", "-qam", "older")
    in_git(repo, "tag", "autoresearch/t")
    (repo / "other.py").write_text("a newer state\n")
    in_git(repo, "commit", "-qam", "newer")
    night = scripted.drive(repo, "t", 3)
    assert night.rows()[0].commit == commit_of(repo)
    best = night.incumbent()
    assert best is not None
    assert in_git(repo, "rev-parse", "refs/heads/autoresearch/t^{tree}") == in_git(
        repo, "rev-parse", f"{best.commit}^{{tree}}"
    )


def test_git_says_itself_why_it_refuses(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "65534", str(repo)], check=True)
    else:
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(UsageError, match=r"git refuses .*safe\.directory"):
        open_repo(repo)


def test_a_repository_by_sha256_is_called_that(tmp_path: Path) -> None:
    done = subprocess.run(["git", "init", "-q", "--object-format=sha256", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip("this git knows no SHA-256")
    with pytest.raises(UsageError, match="names its objects by sha256"):
        open_repo(tmp_path)


def test_line_ends_of_the_users_git_change_nothing(repo: Path) -> None:  # noqa: F811
    in_git(repo, "config", "core.autocrlf", "true")
    night = drive_edits(repo, [("a line", b"X = 1\n")], 1)
    row = night.rows()[-1]
    assert in_git(repo, "diff", "--numstat", row.run.parent, row.commit) == "2\t0\ttrain.py"  # type: ignore[union-attr]


def test_a_commit_that_is_gone_is_a_line_and_what_was_begun_is_left(repo: Path) -> None:  # noqa: F811
    night = scripted.drive(repo, "t", 1)
    flight = (
        '{"runs": [{"number": 9, "kind": "experiment", "commit": "%s", "parent": "", "description": "d", "seed": 1}], '
    )
    (night.folder / "flight.json").write_text(flight % ("d" * 40) + '"proposals": []}')
    assert scripted.drive(repo, "t", 2).experiments == 2
    with pytest.raises(HotloopError, match="git has no commit dddd"):
        NightRepo(git.Repo(repo), "t", night.folder).source("d" * 40)


@anyhow
@given(words=st.text(st.characters(), max_size=60))
def test_any_words_of_git_are_one_line(words: str) -> None:
    from hotloop.agent_loop.gitrepo import said

    assert said(git.GitCommandError("x", 1, words.encode("utf-8", "surrogatepass"), b"")).isprintable()


# Stdout.


class _Bad(io.StringIO):
    """An output that fails in one of the ways in which outputs do."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error, self.free = error, threading.Event()

    def write(self, text: str) -> int:
        if self.error is None:
            self.free.wait(60.0)
            return len(text)
        raise self.error


ERRORS = [
    BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "Input/output error"),
    ValueError("I/O operation on closed file"), UnicodeEncodeError("ascii", "\u2192", 0, 1, "no"),
]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_a_view_that_fails_is_noticed_by_the_log_alone(
    repo: Path,  # noqa: F811
    terminal: bool,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = _Bad(error)
    made = Console
    monkeypatch.setattr(scripted, "Console", lambda **_: made(file=bad, force_terminal=terminal, width=80))
    monkeypatch.setattr(scripted, "print_results", lambda *_: None)
    night = drive_edits(repo, [("an edit", b""), ("a crash", b"# crash\n")], 2)
    assert night.experiments == 2
    assert (night.folder / "night.log").read_text().count("the view cannot be shown") == 1


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.sampled_from(ERRORS), min_size=1, max_size=4),
    st.lists(st.text(st.characters(), max_size=20), max_size=5),
)
def test_no_view_raises_whatever_its_output_does(errors: list[Exception], lines: list[str]) -> None:
    bad = _Bad(errors[0])
    with View(Console(file=bad, width=80)) as view:
        for i, line in enumerate(lines):
            bad.error = errors[i % len(errors)]
            view.note(line)
            view.warn(line)
            view.header([line])


def test_an_output_that_takes_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotloop.agent_loop.loop.live.END_S", 0.05)
    bad = _Bad(None)
    with View(Console(file=bad, width=80)) as view:
        for i in range(3000):  # more than wait
            view.note(f"line {i}")
    assert view.stuck
    bad.free.set()


def test_a_stream_that_cannot_encode_writes_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    forgiving(stream)
    stream.write("\u2192 \udce9")
    stream.flush()
    assert raw.getvalue() == b"\\u2192 \\udce9"
    forgiving(None)
    forgiving(io.StringIO())


def test_a_night_whose_output_is_full_ends_well(repo: Path) -> None:  # noqa: F811
    code = (
        f"import sys; sys.path[:0] = [{str(Path(scripted.__file__).parent)!r}]; import scripted; "
        f"from pathlib import Path; scripted.drive(Path({str(repo)!r}), 't', 1)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert NightFolder.reading(repo / "runs" / "t").experiments == 1


def test_a_long_log_keeps_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 5000 + b"the end")
    shorten(tmp_path / "log", 100)
    assert (tmp_path / "log").read_bytes().endswith(b"xthe end") and (tmp_path / "log").stat().st_size < 200
    shorten(tmp_path / "none", 100)


def test_the_warning_of_a_lesser_sandbox_ends_in_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of a traceback, and no piece of the lines before it."""
    from hotloop.harness.errors import SandboxError
    from hotloop.harness.sandbox import probe
    from hotloop.harness.sandbox.policy import Sandbox

    class Died:
        def __init__(self, sandbox: Any, policy: Any, fds: Any, log: Path, threads: int) -> None:
            log.write_text(
                'Traceback:\n  File "<frozen importlib._bootstrap>", line 241\nImportError: no \x1b[1m libc\n\n'
            )
            self.wire = SimpleNamespace(send=lambda *_, **__: None, recv=self.recv)

        def recv(self, timeout_s: float) -> Any:
            from hotloop.harness.sandbox.wire import Closed

            raise Closed

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("hotloop.harness.sandbox.probe.Child", Died)
    with pytest.raises(SandboxError) as raised:
        probe.probe(Sandbox(1))
    assert str(raised.value) == "a child could not be started (ImportError: no ?[1m libc)"
