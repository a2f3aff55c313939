"""A long night whose agents fail, whose disk fills and whose driver is killed is the night that it would have been.

`make slow` takes all 300 experiments of it, `make test` a part.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import git
import pytest

from hotloop.agent_loop.agents.brief import MAX_TOKENS, most_tokens, write_brief
from hotloop.agent_loop.commands.verify import checks
from hotloop.agent_loop.folder import NightFolder
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Environment, SandboxFacts
from tests.builders import make_decision, make_outcome, make_run

SCRIPT = Path(__file__).with_name("soak.py")
TRAIN = SCRIPT.parents[2] / "train.py"


def new_repo(path: Path) -> Path:
    path.mkdir()
    (path / "train.py").write_bytes(TRAIN.read_bytes())
    (path / "other.py").write_text("x = 1\n")
    (path / ".gitignore").write_text("runs/\n")
    made = git.Repo.init(path, initial_branch="main")
    made.git.add("-A")
    made.git.execute(["git", "-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qm", "start"])
    made.close()
    return path


def start(repo: Path, tag: str, experiments: int, faults: str, scratch: Path) -> subprocess.Popen[str]:
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(repo), tag, str(experiments), faults], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(scratch)}, start_new_session=True,
    )  # fmt: skip


def what_happened(repo: Path, tag: str) -> list[tuple[object, ...]]:
    night = NightFolder.reading(repo / "runs" / tag)
    return [(r.number, r.kind, r.decision, r.reason, r.description, r.val_bpb) for r in night.rows()]


def strike(repo: Path, tag: str, rng: random.Random) -> None:
    """What a dying machine leaves: half a record, a lock of a git that is gone."""
    records = repo / "runs" / tag / "records.jsonl"
    if rng.random() < 0.5 and records.exists() and records.stat().st_size > 2000:
        os.truncate(records, records.stat().st_size - rng.randrange(1, 200))
    if rng.random() < 0.5:
        for lock in (f".git/refs/heads/autoresearch/{tag}.lock", f".git/refs/hotloop/{tag}/0003.lock"):
            with contextlib.suppress(FileNotFoundError):
                (repo / lock).touch()
    if rng.random() < 0.3 and (repo / "runs" / tag / "flight.json").exists():
        (repo / "runs" / tag / "flight.json.tmp").write_text("{half a fi")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("experiments", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_long_night_under_faults_is_the_night_without_them(tmp_path: Path, experiments: int) -> None:
    calm, storm = new_repo(tmp_path / "calm"), new_repo(tmp_path / "storm")
    with start(calm, "t", experiments, "none", tmp_path / "tmp1") as process:
        facts = json.loads(process.communicate()[1].splitlines()[-1])
        assert process.returncode == 0
    kills, rng = 0, random.Random(5)
    while True:
        with start(storm, "t", experiments, "faults", tmp_path / "tmp2") as process:
            try:
                _, err = process.communicate(timeout=rng.uniform(1.0, 2.5) if kills < experiments // 5 else None)
                assert process.returncode == 0, err
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        kills += 1
        strike(storm, "t", rng)
    assert kills >= 3
    assert what_happened(storm, "t") == what_happened(calm, "t")
    night = NightFolder.reading(storm / "runs" / "t")
    assert night.experiments == experiments
    reasons = {t.reason.split(":")[0].split("'")[0] for t in night.turns}
    assert len(reasons) >= 4, reasons  # agents did fail in many ways
    with git.Repo(storm) as repo:
        found = {name: good for name, good, _ in checks(storm / "runs" / "t", repo, None)}
        assert found["chain"] and found["decisions"] and found["branch"]
        assert repo.git.status("--porcelain") == ""
        assert len(repo.git.worktree("list").splitlines()) == 2
    _nothing_is_left(tmp_path, storm, night)
    cost = f"{facts['driver_s']:.3f} s an experiment, {facts['memory_mb']:.0f} MB, {facts['descriptors']} descriptors"
    turns = len(night.turns)
    print(f"\n{experiments} experiments, {kills} kills, {turns} turns that failed; driver {cost} (CPU figures)")
    assert facts["driver_s"] < 0.6  # of a processor, git's among them
    assert facts["descriptors"] < 20
    assert facts["memory_mb"] < 200
    brief = write_brief(night, "laptop")
    assert most_tokens(brief) <= MAX_TOKENS


def _nothing_is_left(tmp_path: Path, repo: Path, night: NightFolder) -> None:
    alive = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(tmp_path).encode() in entry.read_bytes() and entry.parent.name != str(os.getpid()):
                alive.append(entry.read_bytes())
    assert not alive
    assert not os.listdir(tmp_path / "tmp1")  # killed ones may leave what they were using, calm ones not
    kept = {r.number for r in night.rows() if r.decision in ("keep", "marginal")}
    weights = {int(p.parent.name) for p in (repo / "runs" / "t" / "experiments").glob("*/weights.safetensors")}
    assert weights <= kept
    assert not list((repo / ".git").rglob("*.lock"))


def test_a_night_of_many_records_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 of them: reading, checking and understanding them takes less than two seconds of processor time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    folder = tmp_path / "t"
    chain = Chain.open(folder / "records.jsonl")
    for number in range(10_000):
        curve = [(round(i / 150, 6), round(7.0 - i / 40 + number % 7 / 1e5, 6)) for i in range(150)]
        run = make_run(number, "experiment" if number else "baseline", description=f"MATRIX_LR 0.04 -> {number}")
        chain.append(make_outcome(
            run, 2.0 - number * 1e-6, 2.0, curve=curve, tokens=10**6, wall_s=1.0,
            environment=Environment(packages={k: "b" * 64 for k in "abcdef"}),
            sandbox=SandboxFacts(probes={f"p{i}": True for i in range(16)}),
        ))  # fmt: skip
        decision = "discard" if number % 100 else "keep"
        chain.append(make_decision(run, decision, "because of the numbers", noise_bpb=0.01, syntax=f"{number:064x}"))
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parents[2])!r}); from pathlib import Path\n"
        "from hotloop.agent_loop.folder import NightFolder; import time, hotloop.agent_loop.loop.driver\n"
        f"night = NightFolder(Path({str(folder)!r})); assert night.next_number == 10_000\n"
        "night.waiting(), night.to_try_again()\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = float(done.stdout)
    print(f"\n{(folder / 'records.jsonl').stat().st_size >> 20} MiB of records: {seconds:.2f} s of the processor")
    assert seconds < 5.0
    night = NightFolder.reading(folder)
    assert most_tokens(write_brief(night, "laptop")) <= MAX_TOKENS
