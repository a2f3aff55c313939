"""Trainers that are made ready ahead of time: the same results, no orphan, no sight of what they will run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hotloop.harness.paths import project_root
from hotloop.harness.processes import descendants
from hotloop.harness.records.model import Start
from hotloop.harness.sandbox import process
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.settings import Spec
from hotloop.harness.training import child, prewarm, trainer
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.prewarm import AHEAD, Prewarmer
from hotloop.harness.training.session import Session, SessionConfig
from hotloop.harness.training.trainer import Setup
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source
from tests.needs import at, sandbox

pytestmark = pytest.mark.usefixtures("warm_children")


SPEC = Spec("laptop", "cpu", 1, VOCAB, LENGTH)
PRESET = tiny_preset()
ROWS = tiny_rows(256, 0)


def setup(sandbox: Sandbox | None = None, **limits: Any) -> Setup:
    return Setup(sandbox or best(), "cpu", replace(PRESET.limits, **limits), 1)


def train(folder: Path, prewarmer: Prewarmer | None = None, source: bytes | None = None) -> Session:
    folder.mkdir(exist_ok=True)
    budget = Budget(PRESET.budget)
    return Session(SessionConfig(
        source=source or tiny_source(), spec=SPEC, preset=PRESET, rows=ROWS, budget=budget, folder=folder, threads=1,
        prewarmer=prewarmer,
    )).run()  # fmt: skip


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Prewarmer]:
    """With one that is ready."""
    made = Prewarmer(setup(), tmp_path / "warm")
    made.prepare()
    next_one(made)
    yield made
    made.close()
    assert not (tmp_path / "warm").exists()


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return train(tmp_path_factory.mktemp("cold"))


def next_one(prewarmer: Prewarmer) -> prewarm.Trainer:
    assert prewarmer._next is not None
    return prewarmer._next.result(60)[0]


def inside(pid: int) -> Path:
    """The working folder of the process that is furthest down, as seen from here."""
    return Path(f"/proc/{max(descendants(pid))}/cwd")


def test_a_warm_start_gives_the_weights_of_a_cold_one_and_its_log(
    ready: Prewarmer, cold: Session, tmp_path: Path
) -> None:
    result = train(tmp_path / "run", ready, tiny_source(START="print('said in train.py', flush=True)"))
    assert result.training.start.how == "warm"
    assert result.training.start.prepared_s > 0
    assert cold.training.start == Start("cold")
    assert result.weights == cold.weights
    assert result.training.curve == cold.training.curve
    assert result.ledger.start < cold.ledger.start
    assert "said in train.py" in (tmp_path / "run" / "log.txt").read_text()


def test_what_is_still_importing_is_waited_for(cold: Session, tmp_path: Path) -> None:
    prewarmer = Prewarmer(setup(), tmp_path / "warm")
    try:
        prewarmer.prepare()
        result = train(tmp_path / "run", prewarmer)
    finally:
        prewarmer.close()
    assert result.training.start.how == "warm"
    assert result.weights == cold.weights


@pytest.mark.parametrize(
    ("fate", "because"), [("ended", "it had ended"), ("killed", "it had ended"), ("stopped", "it did not answer")]
)
def test_one_that_is_dead_is_replaced_by_a_cold_start(
    ready: Prewarmer, cold: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str, because: str
) -> None:
    waiting = next_one(ready)
    if fate == "ended":  # all of it, and it was noticed
        waiting.child.end()
        waiting.child.wait(20)
    else:
        monkeypatch.setattr(prewarm, "ANSWER_S", 0.5)
        os.kill(max(descendants(waiting.child.pid)), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    result = train(tmp_path / "run", ready)
    assert result.training.start == Start("cold", because)
    assert result.weights == cold.weights


def test_one_that_does_not_get_ready_is_replaced_by_a_cold_start(
    cold: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "subprocess", subprocess)  # one that is forked is ready at once
    prewarmer = Prewarmer(setup(load_s=0.001), tmp_path / "warm")
    try:
        prewarmer.prepare()
        result = train(tmp_path / "run", prewarmer)
    finally:
        prewarmer.close()
    assert result.training.start == Start("cold", "it was not ready within 0.001 s")
    assert result.weights == cold.weights


def test_one_whose_imports_fail_is_replaced_by_a_cold_start(
    cold: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AHEAD, "cpu", ("no_such_module",))
    prewarmer = Prewarmer(setup(), tmp_path / "warm")
    try:
        prewarmer.prepare()
        result = train(tmp_path / "run", prewarmer)
    finally:
        prewarmer.close()
    assert result.training.start.because.startswith("it ended before it was ready: ModuleNotFoundError")
    assert result.weights == cold.weights


@pytest.mark.parametrize("what", ["seal", "versions", "threads", "limits", "variable", "repeatable"])
def test_one_of_another_seal_or_other_settings_is_not_used(
    ready: Prewarmer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    wanted, waiting = setup(), next_one(ready)
    if what == "seal":
        monkeypatch.setattr(trainer, "verify_seal", lambda: "another")
    elif what == "versions":
        monkeypatch.setattr(trainer, "environment", lambda *_: {"versions": {"torch": "0.1"}})
    elif what == "threads":
        wanted = replace(wanted, threads=2)
    elif what == "repeatable":
        wanted = replace(wanted, repeatable=False)
    elif what == "limits":
        wanted = setup(processes=77)
    else:
        monkeypatch.setenv("HOTLOOP_ATTENTION", "another")
    assert ready.take(wanted, tmp_path / "log.txt") == (None, "it was started under another seal or other settings")
    assert waiting.child.returncode is not None
    assert not waiting.own_folder.exists()  # type: ignore[union-attr]
    assert ready.take(wanted, tmp_path / "log.txt") == (None, "none was made ready")


@pytest.mark.parametrize("level", [at(3), at(1)])
def test_train_py_is_not_in_sight_before_the_job_is_there(tmp_path: Path, level: int) -> None:
    """Its working folder is empty, and what it was started with cannot carry one: there is no argument for it."""
    chosen = sandbox(level)
    prewarmer = Prewarmer(setup(chosen), tmp_path / "warm")
    try:
        prewarmer.prepare()
        waiting = next_one(prewarmer)
        folder = inside(waiting.child.pid)
        assert list(folder.iterdir()) == []
        taken, why = prewarmer.take(setup(chosen), tmp_path / "log.txt")
        assert taken is not None, why
        with taken:
            source = tiny_source(START="import time; time.sleep(60)")
            sizes = {"source_bytes": len(source), "compiled_bytes": 0}
            taken.child.wire.send("hello", spec=SPEC.as_dict(), threads=1, repeatable=True, **sizes)
            taken.child.wire.send_bytes(source)
            assert [taken.child.wire.recv(60)["kind"] for _ in range(2)] == ["started", "imported"]
            assert (folder / "train.py").read_bytes() == source
    finally:
        prewarmer.close()


def test_nothing_is_started_beside_a_training_on_a_cpu_and_all_the_earlier_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def start(self: Prewarmer) -> Any:
        began.append(self._setup.device)
        return SimpleNamespace(close=lambda: None), {}

    monkeypatch.setattr(Prewarmer, "_start", start)
    for device, first in (("cpu", "evaluate"), ("cuda", "train")):
        one = Prewarmer(replace(setup(), device=device), tmp_path / device)
        for phase in ("start", "import", "compile", "calibrate", "train", "submit", "evaluate", "audit", "done"):
            one.saw(phase)
            if phase == first:
                assert one._next is not None
                one._next.result(10)
            assert (one._next is None) == (device not in began), phase
        one.close()
    assert began == ["cpu", "cuda"]  # one each, however often they are told


def test_what_is_imported_ahead_for_a_gpu_makes_no_context_and_draws_no_random_number() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(project_root())!r})\n"
        "import random, numpy, torch\n"
        "from hotloop.harness.training.prewarm import AHEAD\n"
        "from hotloop.harness.training.child import make_ready\n"
        "def touched(*a, **k): raise SystemExit('the GPU was touched')\n"
        "torch.cuda._lazy_init = torch.cuda.init = touched\n"
        "torch.cuda.get_device_properties = torch.cuda.current_device = touched\n"
        "random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n"
        "def state(): return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()\n"
        "before = state()\n"
        "make_ready(list(AHEAD['cuda']))\n"
        "assert state() == before\n"
        "assert all(name in sys.modules for name in AHEAD['cuda'])\n"
        "assert 'train' not in sys.modules and 'hotloop.kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_import_that_touches_the_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA context"):
        child.make_ready([])


@pytest.mark.parametrize("level", [at(3), at(1), at(0)])
def test_no_orphan_is_left_where_the_driver_is_killed(tmp_path: Path, level: int) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(project_root())!r})\n"
        "import time\n"
        "from pathlib import Path\n"
        "from hotloop.harness.training.prewarm import Prewarmer\n"
        "from hotloop.harness.training.trainer import Setup\n"
        "from hotloop.harness.processes import descendants\n"
        "from hotloop.harness.sandbox.levels import best\n"
        "from hotloop.harness.settings import Limits\n"
        f"p = Prewarmer(Setup(best({level}, True), 'cpu', Limits(), 1), Path({str(tmp_path / 'warm')!r}))\n"
        "p.prepare()\n"
        "pid = p._next.result(60)[0].child.pid\n"
        "print(pid, *descendants(pid), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) > 1
        parent.send_signal(signal.SIGKILL)
    assert all_gone(pids)


@pytest.mark.parametrize("when", ["ready", "getting ready"])
def test_closing_ends_what_waits(tmp_path: Path, when: str) -> None:
    prewarmer = Prewarmer(setup(), tmp_path / "warm")
    prewarmer.prepare()
    if when == "ready":
        pid = next_one(prewarmer).child.pid
    else:
        while prewarmer._starting is None:
            time.sleep(0.005)
        pid = prewarmer._starting.child.pid
    pids = [pid, *descendants(pid)]
    prewarmer.close()
    assert all_gone(pids)
    assert not (tmp_path / "warm").exists()
    prewarmer.prepare()  # too late: nothing is started any more
    assert prewarmer._next is None


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_the_compiler_is_no_part_of_a_cpu_start() -> None:
    """It would be memory that the record calls the training's."""
    assert AHEAD["cpu"] == ()
