"""What happens at the same time: proposals while a device trains, several devices, faults of the machine, killers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import git
import pytest

import hotloop.agent_loop.loop.driver
from hotloop.agent_loop.agents.agent import AgentError, Turn
from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.agents.turn_order import FIRST_WAIT_S, LONGEST_WAIT_S, TurnOrder
from hotloop.agent_loop.commands.start import NightCommand
from hotloop.agent_loop.commands.verify import checks
from hotloop.agent_loop.loop.background import Notifier
from hotloop.agent_loop.loop.planner import Options
from hotloop.agent_loop.loop.watchdog import CRASHED, watch
from hotloop.harness.errors import DeviceError, HotloopError, UsageError
from hotloop.harness.machine import Gpu
from hotloop.harness.records.chain import Lock
from hotloop.harness.sandbox.policy import Sandbox
from tests.agent_loop.test_loop import night_of, repo, scripted, table  # noqa: F401 - a fixture


class Edits:
    """Proposes the given edits, one a turn: (pattern, replacement, words)."""

    name, ahead = "edits", True

    def __init__(self, *edits: tuple[str, str]) -> None:
        self.edits = list(edits)
        self.briefs: list[str] = []
        self.during: list[set[str]] = []

    def propose(self, context: Any) -> Turn:
        self.briefs.append(context.brief)
        self.during.append({t.name for t in threading.enumerate()})
        if not self.edits:
            raise AgentError("out of ideas", permanent=True)
        old, new = self.edits.pop(0)
        text = context.source.decode().replace(old, new)
        (context.worktree / "train.py").write_text(text)
        return Turn(f"{old} to {new}", cost_usd=0.5, tokens=1000)


def test_each_gpu_gets_a_trainer_of_its_own_ahead_of_time(tmp_path: Path) -> None:
    gpus = [Gpu(i, f"GPU-{i}") for i in (0, 1)]
    slots = [replace(scripted.SETTINGS, device="cuda", sandbox=Sandbox(0, gpu=gpu)) for gpu in gpus]
    command = NightCommand("t", tmp_path, None, [], slots, Options(), "", prewarm=True)  # type: ignore[arg-type]
    with command._prewarmed() as made:
        prewarmers = [s.prewarmer for s in made]
        assert [p._setup.sandbox.gpu for p in prewarmers] == gpus
        assert len({p._folder for p in prewarmers}) == 2
        assert made == slots  # nothing else is different
    assert all(p._closed for p in prewarmers)
    with replace(command, prewarm=False)._prewarmed() as made:
        assert made is slots


def slow(job: Any, settings: Any, on_event: Any) -> Any:
    time.sleep(0.4)
    return scripted.run(job, settings, on_event)


def test_the_next_proposal_is_made_while_the_device_trains(repo: Path) -> None:  # noqa: F811
    agent = Edits(("0.04", "0.01"), ("0.04", "0.02"), ("0.04", "0.03"))
    night = scripted.drive(repo, "t", 3, agent=agent, runner=slow, noise_seeds=1)
    assert [r.decision for r in night.rows()[2:]] == ["discard"] * 3
    beside = sum("hotloop-_train" in names for names in agent.during)
    assert beside == 3  # the first beside the noise run already
    assert night.cost_usd == 1.5
    assert "Under way now" in agent.briefs[1]


def test_a_proposal_for_an_older_incumbent_is_put_on_top_of_the_new_one(repo: Path) -> None:  # noqa: F811
    agent = Edits(("0.04", "0.07"), ("DEPTH=4", "DEPTH=3"))
    night = scripted.drive(repo, "t", 2, agent=agent, runner=slow, noise_seeds=0, least_gain=0.001)
    first, second = night.rows()[1:]
    assert first.decision == "keep"
    assert second.description == "DEPTH=4 to DEPTH=3 (on top of 1)"
    with git.Repo(repo) as made:
        source = made.git.show(f"{second.commit}:train.py")
    assert "MATRIX_LR = 0.07" in source and "DEPTH=3" in source
    assert {name: good for name, good, _ in checks(night.folder, git.Repo(repo), None)}["decisions"]


def test_a_proposal_that_does_not_fit_the_new_incumbent_is_made_again(repo: Path) -> None:  # noqa: F811
    agent = Edits(("0.04", "0.07"), ("0.04", "0.05"), ("0.07", "0.09"))
    night = scripted.drive(repo, "t", 2, agent=agent, runner=slow, noise_seeds=0, least_gain=0.001)
    assert [r.description for r in night.rows()[1:]] == ["0.04 to 0.07", "0.07 to 0.09"]
    assert [(t.result, t.reason) for t in night.turns] == [
        ("refused", "it does not fit on top of experiment 1")
    ]  # fmt: skip


def test_two_devices_have_one_incumbent_and_decide_in_order(repo: Path) -> None:  # noqa: F811
    running, most, lock = 0, 0, threading.Lock()
    ended = defaultdict(threading.Event)

    def uneven(job: Any, settings: Any, on_event: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if job.run.number % 2:  # the later one ends first, where there is one
            ended[job.run.number + 1].wait(1.0)
        with lock:
            running -= 1
        ended[job.run.number].set()
        return scripted.run(job, settings, on_event)

    night = scripted.drive(repo, "t", 6, runner=uneven, slots=2)
    assert most == 2
    rows = night.rows()
    assert [r.number for r in rows] == list(range(len(rows)))
    assert {r.decided.slot for r in rows} == {0, 1}
    kept = [r.val_bpb for r in rows if r.decision == "keep"]
    assert kept == sorted(kept, reverse=True)
    good = {name: ok for name, ok, _ in checks(night.folder, git.Repo(repo), None)}
    assert good["decisions"] and good["branch"]


def test_a_gain_over_an_older_incumbent_is_tried_again_on_top_of_the_new_one(repo: Path) -> None:  # noqa: F811
    """Both are better than the baseline and run at the same time; the second to be decided is not better than the
    first, so that both together are tried."""

    both = threading.Barrier(2)

    def together(job: Any, settings: Any, on_event: Any) -> Any:
        if job.run.kind == "experiment" and job.run.number < 3:
            both.wait(60)
        return scripted.run(job, settings, on_event)

    agent = Edits(("0.04", "0.07"), ("DEPTH=4", "DEPTH=6"), ("x", "y"))
    agent.edits[1] = ("DEPTH=4", "DEPTH=4.5")
    night = scripted.drive(repo, "t", 3, agent=agent, runner=together, slots=2, noise_seeds=0, least_gain=0.001)
    rows = night.rows()[1:]
    assert [(r.decision, r.judgement.again, r.origin.again_of) for r in rows] == [
        ("keep", False, None), ("discard", True, None), ("keep", False, 2)
    ]  # fmt: skip
    with git.Repo(repo) as made:
        best = made.git.show("autoresearch/t:train.py")
    assert "MATRIX_LR = 0.07" in best and "DEPTH=4.5" in best
    assert {name: good for name, good, _ in checks(night.folder, git.Repo(repo), None)}["decisions"]


def test_faults_of_the_machine_are_waited_out(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811

    monkeypatch.setattr(hotloop.agent_loop.loop.driver, "FIRST_PAUSE_S", 0.05)
    faults = [DeviceError("the GPU fell off the bus"), OSError(28, "No space left on device"), HotloopError("no disk")]
    real, calls = os.write, 0

    def full(fd: int, data: bytes) -> int:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{fd}").endswith("records.jsonl"):
            calls += 1
            if calls in (4, 5, 9):
                raise OSError(28, "No space left on device")
        return real(fd, data)

    def faulty(job: Any, settings: Any, on_event: Any) -> Any:
        if faults and job.run.number > 1:
            raise faults.pop()
        return scripted.run(job, settings, on_event)

    scripted.drive(repo, "calm", 3)
    monkeypatch.setattr(os, "write", full)
    ref = repo / ".git" / "refs" / "heads" / "autoresearch" / "t.lock"
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.touch()  # of a git that was killed
    scripted.drive(repo, "t", 3, runner=faulty, patience_s=30.0)
    monkeypatch.undo()
    assert not faults
    assert table(repo, "t") == table(repo, "calm")


def test_a_gpu_that_stays_lost_ends_the_night_with_its_line_and_nothing_is_lost(
    repo: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip

    monkeypatch.setattr(hotloop.agent_loop.loop.driver, "FIRST_PAUSE_S", 0.05)
    tried: list[int] = []

    def lost(job: Any, settings: Any, on_event: Any) -> Any:
        if job.run.number > 1:
            tried.append(job.run.number)
            raise DeviceError("the GPU's memory could not be cleared (cuInit failed); see: nvidia-smi")
        return scripted.run(job, settings, on_event)

    scripted.drive(repo, "calm", 3)
    with pytest.raises(DeviceError, match="cuInit failed"):
        scripted.drive(repo, "t", 3, runner=lost, patience_s=0.5)
    assert len(tried) > 1 and set(tried) == {2}  # waited for, and the same run again
    scripted.drive(repo, "t", 3)
    assert table(repo, "t") == table(repo, "calm")


def test_the_night_does_not_wait_for_an_agent_whose_edit_would_never_run(repo: Path) -> None:  # noqa: F811
    from hotloop.agent_loop.agents.agent import CommandAgent
    from hotloop.agent_loop.agents.sandbox import AgentSandbox
    from hotloop.harness.sandbox.levels import best

    agent = CommandAgent("sleep 1000", 1000.0, AgentSandbox(best(0), ()))
    scripted.drive(repo, "t", None, agent=agent, hours=1.5 / 3600)
    assert not [t for t in threading.enumerate() if t.name.startswith("hotloop-")]


def test_what_waiting_cannot_mend_ends_the_night_at_once(repo: Path) -> None:  # noqa: F811
    def broken(job: Any, settings: Any, on_event: Any) -> Any:
        raise UsageError("no such thing")

    with pytest.raises(UsageError, match="no such thing"):
        scripted.drive(repo, "t", 1, runner=broken, patience_s=3600.0)


def test_paid_agents_are_not_asked_beyond_the_limit(repo: Path) -> None:  # noqa: F811
    agent = Edits(*[("0.04", f"0.0{i}") for i in range(1, 9) if i != 4])
    night = scripted.drive(repo, "t", 5, agent=[agent, BuiltinAgent(1)], max_cost_usd=1.0)
    who = [r.origin.agent for r in night.rows() if r.kind == "experiment"]
    assert who.count("edits") in (2, 3)  # one may have been asked ahead, before the second was decided
    assert who[-1] == "builtin"


def test_a_marginal_gain_waits_for_its_seed_on_two_devices_too(repo: Path) -> None:  # noqa: F811
    agent = Edits(("0.04", "0.0425"), ("0.04", "0.01"))
    night = scripted.drive(repo, "t", 2, agent=agent, slots=2, runner=slow)
    ends = {t.description.split(" (on")[0]: t.decision for t in night.tried()[1:]}
    assert ends == {"0.04 to 0.0425": "keep", "0.04 to 0.01": "discard"}


# ---- whose turn it is


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_an_agent_that_fails_is_paused_for_ever_longer_and_the_next_takes_over() -> None:
    first, last, now = Edits(), BuiltinAgent(1), Now()
    turn_order = TurnOrder([first, last], now)
    waits = []
    for _ in range(9):
        assert turn_order.pick() is first
        waits.append(turn_order.failed(first, AgentError("down")))
        assert turn_order.pick() is last
        now.s += waits[-1]
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits[-1] == LONGEST_WAIT_S
    turn_order.worked(first)
    assert turn_order.failed(first, AgentError("slow down", retry_after_s=100.0)) == 100.0
    turn_order.failed(first, AgentError("wrong key", permanent=True))
    now.s += 1e9
    assert turn_order.pick() is last
    turn_order.failed(last, AgentError("nothing left", permanent=True))
    assert (turn_order.pick(), turn_order.wait_s()) == (None, None)
    turn_order.incumbent_changed()
    assert turn_order.pick() is last  # which has new constants to try


def test_an_agent_whose_runs_are_invalid_again_and_again_is_paused_for_ever_longer() -> None:
    first, last, now = Edits(), BuiltinAgent(1), Now()
    turn_order = TurnOrder([first, last], now)
    turn_order.ran(first.name, "invalid")
    assert turn_order.pick() is first  # a slip
    for wait_s in (2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S):
        turn_order.worked(first)  # that it has an edit to run says nothing for it
        turn_order.ran(first.name, "invalid")
        assert turn_order.pick() is last and turn_order.wait_s() == 0.0
        now.s += wait_s - 1
        assert turn_order.pick() is last
        now.s += 1
        assert turn_order.pick() is first
    turn_order.ran(first.name, "discard")
    turn_order.ran(first.name, "invalid")
    assert turn_order.pick() is first


# ---- the watchdog


DRIVER = """
import os, signal, sys, time
from pathlib import Path
folder, deaths = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
lives = folder / "lives"
n = len(lives.read_text()) if lives.exists() else 0
lives.write_text("x" * (n + 1))
if sys.argv[3] == "gets somewhere":
    with open(folder / "records.jsonl", "a") as f: f.write("line\\n")
if n < deaths:
    how = sys.argv[4]
    if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if how == "stuck": time.sleep(60)
    raise SystemExit(int(how))
raise SystemExit(int(sys.argv[5]))
"""


@pytest.mark.parametrize(
    ("deaths", "progress", "how", "last", "lives", "code"),
    [
        (6, "gets somewhere", "killed", 0, 7, 0),
        (2, "no", "killed", 0, 3, 0),
        (9, "no", "killed", 0, 4, 1),  # three more tries, then it gives up
        (1, "no", str(CRASHED), 3, 2, 3),
        (1, "no", "2", 0, 1, 2),  # what the user must mend
        (1, "no", "stuck", 0, 2, 0),
    ],
)
def test_a_driver_that_dies_is_started_again(
    tmp_path: Path, deaths: int, progress: str, how: str, last: int, lives: int, code: int
) -> None:
    folder = tmp_path / "night"
    argv = [sys.executable, "-c", DRIVER, str(folder), str(deaths), progress, how, str(last)]
    assert watch(argv, folder, stuck_s=1.5, first_wait_s=0.01, look_s=0.05) == code
    assert len((folder / "lives").read_text()) == lives


def test_a_night_under_watch_survives_the_end_of_its_driver(repo: Path) -> None:  # noqa: F811
    """The real command line: the driver is killed in the middle, and the night is what it would have been."""
    script = Path(__file__).with_name("scripted.py")
    scripted.drive(repo, "calm", 4)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from hotloop.agent_loop.loop.watchdog import watch\n"
        "n = Path(sys.argv[3]) / 'starts'\n"
        "import subprocess; from hotloop.agent_loop.loop import watchdog as w\n"
        "real = subprocess.Popen\n"
        "def started(argv, **more):\n"
        "    count = len(n.read_text()) if n.exists() else 0\n"
        "    n.write_text('x' * (count + 1))\n"
        "    return real([*argv, *(['17'] if count == 0 else ['9'] if count == 1 else [])], **more)\n"
        "w.subprocess.Popen = started\n"
        "sys.exit(watch([sys.executable, sys.argv[2], sys.argv[3], 'storm', '4'], Path(sys.argv[3]) / 'runs/storm',"
        " first_wait_s=0.01, look_s=0.05))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script.parents[2]), str(script), str(repo)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was ended by SIGKILL; it goes on from its records") == 2
    assert table(repo, "storm") == table(repo, "calm")


def test_ctrl_c_while_two_devices_run_leaves_nothing_behind(repo: Path) -> None:  # noqa: F811
    def interrupted(job: Any, settings: Any, on_event: Any) -> Any:
        if job.run.number == 4:
            raise KeyboardInterrupt
        time.sleep(0.2)
        return scripted.run(job, settings, on_event)

    with pytest.raises(KeyboardInterrupt):
        scripted.drive(repo, "t", 6, runner=interrupted, slots=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("hotloop-")]
    Lock(repo / "runs" / "t" / "lock").release()
    night = scripted.drive(repo, "t", 6, slots=2)
    assert [r.number for r in night.rows()] == list(range(night.next_number))


# ---- telling the user


def test_the_user_is_told_by_a_command_of_theirs(tmp_path: Path) -> None:
    said, complaints = tmp_path / "said", []
    script = tmp_path / "tell.sh"
    script.write_text(f'#!/bin/sh\necho "$HOTLOOP_EVENT $HOTLOOP_TAG $1 $2" >> {said}\n')
    script.chmod(0o755)
    notifier = Notifier(f"{script} --flag", "t", complaints.append)
    notifier.tell("kept", "better; $(rm -rf /)")
    notifier.finish()
    assert said.read_text() == "kept t --flag better; $(rm -rf /)\n"
    broken = Notifier("false", "t", complaints.append)
    broken.tell("kept", "x")
    broken.finish()
    Notifier("/no/such/program", "t", complaints.append).tell("kept", "x")
    assert [re.sub(r"\(.*", "", c).strip() for c in complaints] == [
        "--notify: false ended with 1", "--notify: /no/such/program cannot be started"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="is not a command"):
        Notifier("'", "t", complaints.append)


def test_sigterm_reaches_the_driver_through_its_watchdog(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from hotloop.agent_loop.loop.watchdog import watch\n"
        "child = 'import signal, sys, time; signal.signal(15, lambda *_: sys.exit(130))'\n"
        "child += '\\nprint(1, flush=True); time.sleep(60)'\n"
        "sys.exit(watch([sys.executable, '-c', child], Path(sys.argv[2]), look_s=0.05))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    process.stdout.close()
