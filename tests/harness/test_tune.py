"""`hotloop tune`: on a device whose times are given, and for real on this CPU, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness import profile
from hotloop.harness.profile import Machine, Profile
from hotloop.harness.sandbox.levels import best
from hotloop.harness.settings import PRESETS
from hotloop.harness.tuning import configurations, proving, tune
from hotloop.harness.tuning.members import candidates, setting_of
from hotloop.harness.tuning.notes import Notes
from hotloop.harness.tuning.selection import Answer, Member, Members, Unfit
from tests.harness.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))


def machine(device: str = "cpu") -> Machine:
    preset = PRESETS["laptop" if device == "cpu" else "h100"]
    facts = {"device": device, "preset": preset.name, "cpu": "a CPU"} | ({"gpu": "a GPU"} if device == "cuda" else {})
    return Machine(preset, device, best(0, True), facts, 2)


@dataclass
class Device:
    """Runs sets at given speeds; see `faults` for what else a member may do.

    Attributes:
        gains: member -> factor of the speed.
        faults: member -> wrong, varies, hangs or dies.
        drift: what each turn costs the device's speed for ever.
        noise: deviation of each turn.
    """

    gains: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    asked: tuple[str, ...] = ("step",)
    drift: float = 0.0
    noise: float = 0.0
    turns: int = 0
    started: list[str] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def start(self, members: Members) -> Run:
        self.started.append(" ".join(sorted(map(str, members))) or "plain")
        names = {str(m) for m in members}
        fault = next((self.faults[n] for n in names if n in self.faults), "")
        if fault == "dies":
            raise Unfit("it fails: CUDA error: an illegal memory access was encountered")
        return Run(self, names, fault)


@dataclass
class Run:
    device: Device
    names: set[str]
    fault: str
    answers: int = 0

    @property
    def asked(self) -> frozenset[str]:
        return frozenset(self.device.asked)

    def answer(self) -> Answer:
        self.answers += 1
        return Answer(
            (9.0, 8.0 + (self.fault == "wrong")), f"{sorted(self.names)} {self.answers * (self.fault == 'varies')}"
        )

    def turn(self) -> float:
        if self.fault == "hangs":
            raise Unfit("it hangs: no answer within 90 s")
        d = self.device
        d.turns += 1
        speed = 1e6 * (1 - d.drift) ** d.turns * (1 + d.chance.gauss(0, d.noise))
        for name in self.names:
            speed *= d.gains.get(name, 1.0)
        return speed

    def close(self) -> None: ...


def tuned(device: Device, on: str = "cpu", **how: Any) -> Profile:
    said: list[str] = []
    return tune.tune(machine(on), b"train.py", tune.Progress(said.append), start=device.start, **how)


def row(found: Profile, part: str, implementation: str) -> dict[str, Any]:
    rows = [r for r in found.body["table"] if (r["part"], r["implementation"]) == (part, implementation)]
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("quick", [False, True])
def test_what_gains_is_chosen_and_written(quick: bool) -> None:
    found = tuned(Device({"step=compiled": 1.3, "threads=4": 1.1, "threads=1": 0.6}), quick=quick)
    assert found.selection == {"step": "compiled", "threads": "4"}
    assert found.body["complete"]
    assert profile.read(profile.own_path(machine().facts)) == found
    assert not machine().work.exists()  # the next tuning measures anew
    assert found.body["whole"]["plain"]["new_rate"] == pytest.approx(1.43e6)
    assert found.threads == 4 and found.environment()["HOTLOOP_KERNELS"] == "auto,step=compiled"


@pytest.mark.parametrize("device", [Device(), Device(drift=0.01), Device({"step=compiled": 1.001}, noise=0.01)])
def test_a_tie_a_drift_and_noise_choose_nothing(device: Device) -> None:
    found = tuned(device)
    assert found.selection == {"step": "eager", "threads": "2"} and found.environment() == {}
    assert found.body["complete"] and found.body["whole"]["tokens_per_s"] > 0


def test_a_real_gain_is_seen_through_drift_and_noise() -> None:
    assert tuned(Device({"step=compiled": 1.1}, drift=0.01, noise=0.01)).selection["step"] == "compiled"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong", "it is wrong: the loss of step 1 is 9.0000, and plain's 8.0000"),
        ("varies", "it varies: the same steps from the same state gave other bits"),
        ("hangs", "it hangs: no answer within 90 s"),
        ("dies", "it fails: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_member_that_must_not_run_is_out_however_fast(fault: str, words: str) -> None:
    found = tuned(Device({"step=compiled": 9.0, "threads=4": 1.1}, {"step=compiled": fault}))
    assert found.selection == {"step": "eager", "threads": "4"}
    assert row(found, "step", "compiled") == {
        "part": "step", "implementation": "compiled", "chosen": False, "reason": words,
    }  # fmt: skip


def test_when_the_time_is_over_what_was_found_decides_and_the_next_goes_on() -> None:
    """Of the comparisons of a whole tuning only as many are made as fit; none is made twice."""
    device = Device({"step=compiled": 1.2, "threads=4": 1.5})
    left = iter([0.0, 0.0, 0.0, *[1e9] * 100])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune.time, "time", lambda: next(left))
        first = tuned(device)
    assert not first.body["complete"] and first.selection == {"step": "compiled", "threads": "2"}
    assert machine().work.exists()
    before = list(device.started)
    second = tuned(device)
    assert second.body["complete"] and second.selection == {"step": "compiled", "threads": "4"}
    assert "step=compiled" in before and "step=compiled" not in device.started[len(before) :][:1]
    assert device.started.count("threads=4") <= 2  # compared with plain, and what others were compared with


def test_another_train_py_begins_anew() -> None:
    notes = Notes(machine().work / "step.json", machine().facts | {"train.py": "of another"})
    notes.body["comparisons"] = {"step=compiled | plain": {}}
    notes.save()
    assert tuned(Device({"step=compiled": 1.2})).selection["step"] == "compiled"


# ---- a GPU's way, with what its processes would find


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """implementation -> ratio alone, or the reason why it is out; what was searched is under `configs`."""
    given: dict[str, Any] = {}

    def prove(operators: list[str], path: Path, stamp: dict[str, Any], *_: Any) -> None:
        notes = Notes(path, stamp)
        for name, found in given.items():
            operator, _, implementation = name.partition("=")
            here = notes.body.setdefault(f"{operator} {operator} baseline", {"ratios": {}, "out": {}})
            here["out" if isinstance(found, str) else "ratios"][implementation] = (
                found if isinstance(found, str) else [found] * 25
            )
        notes.save()

    monkeypatch.setattr(proving, "prove", prove)
    monkeypatch.setattr(configurations, "main", lambda *_: {"embedding": {"D=512": {"ROWS": 4}}})
    facts = {
        "identity()": {"device": "a GPU", "capability": [9, 0], "multiprocessors": 132},
        "ceilings()": [7e14, 3e12],
    }
    monkeypatch.setattr(tune, "asked", lambda expression, module: facts[expression])
    monkeypatch.setattr(tune, "installed_hash", lambda package: "f" * 64)
    return given


ASKED = ("step", "attention", "adamw_", "embedding")
PROVEN = {
    "attention=flash3": 3.0, "attention=torch": 2.0, "attention=triton": "it varies: 3 of 100 runs gave other bits",
    "attention=flash4": "it fails here", "attention=flash2": "it fails here", "attention=cudnn": "it fails here",
    "attention=flex": "it fails here", "adamw_=triton": 0.9, "embedding=triton": 2.0,
}  # fmt: skip
GAINS = {"attention=flash3": 1.2, "attention=torch": 1.1, "embedding=triton": 1.05, "adamw_=triton": 0.98}


def test_a_gpu_chooses_greedily_among_what_it_has_proven(proven: dict[str, Any]) -> None:
    proven.update(PROVEN)
    device = Device(GAINS, asked=ASKED)
    found = tuned(device, "cuda")
    assert found.selection == {"attention": "flash3", "embedding": "triton"}
    assert found.body["configs"] == {"embedding": {"D=512": {"ROWS": 4}}}
    assert set(found.body["packages"]) == {"flash_attn_3", "hotloop-flash3"}
    order = found.body["measured"]["attention"]
    assert order["K=128 T=2048 W=1024"] == ["flash3", "torch"]  # the next serves what the first refuses
    assert row(found, "attention", "triton")["reason"] == "it varies: 3 of 100 runs gave other bits"
    assert not [s for s in device.started if "triton" in s and "attention=triton" in s]
    assert row(found, "embedding", "triton")["alone"] == 2.0 and row(found, "embedding", "triton")["chosen"]
    whole = found.body["whole"]
    assert whole["plain"]["new_rate"] == pytest.approx(1.26e6)
    assert whole["plain with the best attention"]["old"] == "attention=flash3"
    assert 0 < whole["share_of_floor"] < 1


def test_a_quick_tuning_confirms_what_won_alone_once_together(proven: dict[str, Any]) -> None:
    proven.update(PROVEN)
    device = Device(GAINS, asked=ASKED)
    found = tuned(device, "cuda", quick=True)
    assert found.selection == {"attention": "flash3", "embedding": "triton"} and found.body["configs"] == {}
    together = "attention=flash3 embedding=triton"
    # Against plain, and against plain with the best attention.
    assert [s for s in device.started if s != "plain"] == [together, "attention=flash3", together]


def test_what_wins_alone_and_not_together_is_not_chosen_quickly(proven: dict[str, Any]) -> None:
    proven.update(PROVEN)
    assert tuned(Device({"embedding=triton": 0.7}, asked=ASKED), "cuda", quick=True).selection == {}


def test_what_was_not_proven_in_time_is_no_candidate(proven: dict[str, Any]) -> None:
    proven.update({"embedding=triton": 2.0})
    found = tuned(Device(GAINS, asked=("step", "adamw_", "embedding")), "cuda")
    assert found.selection == {"embedding": "triton"}
    assert row(found, "adamw_", "triton")["reason"] == "it was not proven in time"
    assert not found.body["complete"] and found.body["measured"] == {}


def test_the_largest_is_proven_first_and_a_quick_choice_falls_back_on_attention(proven: dict[str, Any]) -> None:
    order = proving.largest_first(["adamw_", "embedding", "attention", "muon_", "mlp", "loss", "qkv"])
    assert order[0] == "attention" and set(order[1:4]) == {"mlp", "loss", "qkv"}, order
    proven.update(PROVEN)
    device = Device(GAINS | {"embedding=triton": 0.7}, asked=ASKED)
    found = tuned(device, "cuda", quick=True)
    assert found.selection == {"attention": "flash3"}
    assert found.body["measured"]["attention"]["K=128 T=2048 W=1024"] == ["flash3", "torch"]


def test_what_can_be_chosen_is_what_the_step_asks_for_and_how_it_is_run() -> None:
    assert [str(m) for m in candidates(("step", "adamw_", "linear_fp8", "loss"), "cuda", 2)] == [
        "adamw_=triton", "loss=triton", "loss=triton-exp", "loss=triton-chunked",
    ]  # fmt: skip
    some = frozenset({Member("mlp", "triton"), Member("attention", "flash3"), Member("threads", "4")})
    setting = setting_of(some, {"configs": {"k": {}}})
    assert setting.threads == 4
    assert setting.environment == {
        "HOTLOOP_KERNELS": "reference,mlp=triton", "HOTLOOP_ATTENTION": "flash3",
        "HOTLOOP_PROFILE": '{"configs": {"k": {}}, "measured": {}}',
    }  # fmt: skip
    assert setting_of(frozenset({Member("attention", "triton")})).environment["HOTLOOP_ATTENTION"] == ""


# ---- proving, in processes that what is proven may end


def scripted(operator: str, divisor: int) -> Any:
    def prove(name: str) -> None:
        with open(os.environ["TRACE"], "a") as f:
            f.write(f"{name}\n")
        if name == "faults":
            print("CUDA error: an illegal memory access was encountered", flush=True)
            os._exit(1)
        if name == "hangs":
            time.sleep(600)
        if name == "wrong":
            raise Unfit("it is wrong: out 0 off by 1.0e+00, 1.0e-02 is allowed (baseline)")

    yield proving.Case(
        f"{operator} mlp_alone baseline", ("faults", "good", "wrong", "hangs", "slow"), prove,
        lambda name: [0.5 if name == "slow" else 2.0 / divisor] * 5,
    )  # fmt: skip


def test_what_faults_while_it_is_proven_takes_its_process_and_not_the_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said: list[str] = []
    path, table = tmp_path / "prove.json", "tests.harness.test_tune:scripted"
    for _ in range(2):  # the second time all is known
        proving.prove(["mlp"], path, {}, 1, time.time() + 600, said.append, lambda _: None, table, hang_s=6.0)
    assert (tmp_path / "trace").read_text().split() == ["faults", "good", "wrong", "hangs", "slow"]
    found = proving.verdicts(Notes(path, {}), "mlp")
    assert {n: (v.ratio, v.wins) for n, v in found.items() if not v.reason} == {
        "good": (2.0, True),
        "slow": (0.5, False),
    }
    assert found["faults"].reason == "it ended the process (CUDA error: an illegal memory access was encountered)"
    assert found["hangs"].reason == "it hangs" and found["wrong"].reason.startswith("it is wrong: out 0")


# ---- for real


COMMAND = [sys.executable, "-c", "import sys; from hotloop.agent_loop.cli import main; sys.exit(main())", "tune"]


def killed_and_gone_on_with(tmp_path: Path, kills: int, source: str, more: list[str]) -> None:
    """Each time at a random moment; what is on disk is whole, what was compared is not compared again."""
    (tmp_path / "train.py").write_text(source)
    command = [*COMMAND, "train.py", "--device", "cpu", *more]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    chance, cache = random.Random(1), tmp_path / "cache" / "profiles"
    seen: dict[str, Any] = {}

    def look() -> None:
        for path in cache.rglob("*.json"):
            found = json.loads(path.read_text())  # whole at any moment
            if path.name == "step.json":
                now = found["body"].get("comparisons", {})
                assert {k: now.get(k) for k in seen} == seen
                seen.update(now)
            elif path.parent == cache:
                profile.read(path)

    for _ in range(kills):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        began = time.monotonic()
        while process.poll() is None and not list(cache.rglob("step.json")) and time.monotonic() < began + 300:
            time.sleep(0.1)
        time.sleep(chance.random() * 20 if kills > 1 else 1.0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        look()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    look()
    (path,) = cache.glob("*.json")
    found = profile.read(path)
    assert found.body["complete"] and set(found.selection) == {"step", "threads"}
    assert "whole step" in done.stdout and "(CPU figures), preset laptop" in done.stdout


@pytest.mark.timeout(900)  # a bound for a busy machine
def test_a_real_tuning_that_is_killed_goes_on(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, 1, TINY, [])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_tuning_of_train_py_survives_ten_kills(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, 10, (ROOT / "train.py").read_text(), ["--minutes", "60"])


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("--minutes must be a positive number, not -1.0", ["--minutes", "-1"]),
        ("none.py cannot be read", ["none.py"]),
        ("the preset h100 needs a GPU", ["--preset", "h100"]),
    ],
)
def test_bad_input_is_one_line(words: str, args: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from hotloop.agent_loop.cli import main

    (tmp_path / "train.py").write_text(TINY)
    train = [] if "none.py" in args else [str(tmp_path / "train.py")]
    assert main(["tune", *train, *args]) != 0
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
