"""Conditions of a run (clocks, strangers on the GPU, a slow feed) and faults of its machine; NVML is a stand-in."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import train
from hotloop.agent_loop.agents.brief import _fusions
from hotloop.bench import baseline
from hotloop.harness import Batch, doctor, experiment, machine, single
from hotloop.harness.errors import DeviceError, TrialError
from hotloop.harness.experiment import Job, Settings, run_experiment, summary
from hotloop.harness.gpu import devices, neighbours, nvml
from hotloop.harness.gpu.devices import Signs
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import ClockMhz, Conditions, Ledger, Training
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.settings import PRESETS, Spec
from hotloop.harness.training import conditions
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.conditions import Watch, clock_words, clocks, is_machines_fault, warnings
from hotloop.harness.training.feed import RowOrder
from hotloop.harness.training.session import Event, Session, SessionConfig
from tests.builders import make_run
from tests.harness.conftest import LENGTH, VOCAB, tiny_dataset, tiny_preset, tiny_rows, tiny_source
from tests.harness.fake_nvml import DROPPED, H100, SMALL, FakeNvml

pytestmark = pytest.mark.usefixtures("warm_children")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "PERIOD_S", 0.02)


TRAINED = Training(wall_s=300.0)


def settings(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of the tiny train.py; the data is made up, so it is not verified."""
    splits = {"train": tiny_rows(256, 0), "val": tiny_rows(64, 1), "holdout": tiny_rows(16, 2)}

    return Settings(
        dataclasses.replace(tiny_preset(), device=device),
        device,
        tiny_dataset(splits, tmp_path / "data"),
        1,
        Sandbox(0),
    )


def job(tmp_path: Path, **changes: str) -> Job:
    return Job(make_run(0, "single"), tiny_source(**changes), "t", tmp_path / "run")


# ---- what the driver says


def test_clocks_of_new_and_old_drivers_and_of_none(gpus: FakeNvml) -> None:
    found = {
        "sm_mhz": 1410,
        "memory_mhz": 2619,
        "reasons": ["power cap", "temperature (software)"],
        "temperature_c": 88,
    }
    gpus.says(H100 | {"uuid": "GPU-bb", "sm": 990}, H100 | DROPPED)
    ours = Gpu(1, "GPU-aa")
    assert clocks(ours) == found
    gpus.says(H100 | DROPPED, missing=["nvmlDeviceGetCurrentClocksEventReasons"])
    assert clocks(ours) == found == clocks()
    assert clock_words(found) == "SM 1410 MHz, memory 2619 MHz, 88 C; held back by: power cap, temperature (software)"
    assert "held back by: nothing" in clock_words(found | {"reasons": []})
    # What a driver does not tell is left out, and the rest is kept.
    gpus.says(H100 | {"memory_mhz": None, "temperature": None, "reasons": None})
    partly = clocks(ours)
    assert partly == {"sm_mhz": 1980, "memory_mhz": None, "temperature_c": None, "reasons": []}
    assert clock_words(partly) == "SM 1980 MHz, memory unknown, unknown; held back by: nothing"
    for card, special in ((H100 | {"sm": None}, {}), (H100 | {"error": 15}, {}), (H100, {"trouble": 9})):
        nvml._open = None
        gpus.says(card, **special)
        assert clocks(ours) is None


def test_a_slice_has_its_cards_clocks(gpus: FakeNvml) -> None:
    part = {"uuid": "MIG-1", "memory_mib": 40000, "gi": 1, "ci": 0, "sm": None, "apps": []}
    gpus.says(H100 | {"slices": [part]})
    (ours,) = machine.gpus()
    assert ours.uuid == "MIG-1"
    now = clocks(ours)
    assert now is not None and now["sm_mhz"] == 1980


def looks(watch: Watch, phase: str, times: int = 3) -> None:
    """Be in a phase while it is looked at."""
    watch(Event(phase))
    for _ in range(times):
        watch.look()


def test_clocks_that_drop_and_strangers_get_into_the_record(gpus: FakeNvml) -> None:
    events: list[Event] = []
    watch = Watch("cuda", Gpu(0, "GPU-aa"), events.append)
    gpus.says(H100 | DROPPED | {"apps": [[1, "early"], [2, "early"]]})
    for phase in ("start", "import", "compile", "warm"):
        looks(watch, phase)  # none of it matters before the calibration
    assert watch.facts() == Conditions()
    gpus.says()
    looks(watch, "calibrate")
    assert warnings(watch.facts(), TRAINED) == []
    looks(watch, "train")
    gpus.says(H100 | DROPPED | {"apps": [[1, "miner"], [2, "python"]]})
    looks(watch, "train", 6)
    looks(watch, "submit")
    assert list(dict.fromkeys(e.phase for e in events))[-1] == "submit"
    facts = watch.facts()
    assert facts.looks == 12
    assert facts.sm_mhz == ClockMhz(calibrate=1980, train=1410, last=1410, least=1410)
    assert (facts.temperature_c, facts.others) == (88, ["1 miner", "2 python"])
    told = warnings(facts, TRAINED)
    assert told == [
        "the GPU's clock fell from 1980 MHz in the calibration to 1410 MHz",
        "the GPU was slowed down: temperature (software) (at most 88 C)",
        "other processes computed on the GPU: 1 miner; 2 python",
    ]


@pytest.mark.parametrize(
    ("bits", "told"),
    [(0x0, ""), (0x1, ""), (0x2, ""), (0x4, ""), (0x10, ""), (0x100, ""), (0x8, "hardware slowdown"),
     (0x20, "temperature (software)"), (0x40, "temperature (hardware)"), (0x80, "power brake"),
     (0xC8, "hardware slowdown, power brake, temperature (hardware)")],
)  # fmt: skip
def test_what_slows_a_card_is_warned_of_and_what_caps_it_is_not(gpus: FakeNvml, bits: int, told: str) -> None:
    watch = Watch("cuda", Gpu(0, "GPU-aa"), lambda _: None)
    for temperature, more in ((61, " (at most 61 C)"), (None, "")):
        gpus.says(H100 | {"reasons": bits, "temperature": temperature})
        watch._seen.clear()
        looks(watch, "train")
        found = warnings(watch.facts(), TRAINED)
        assert found == ([f"the GPU was slowed down: {told}{more}"] if told else [])


def test_a_gpu_that_is_lost_or_silent_meanwhile_leaves_what_was_seen(gpus: FakeNvml) -> None:
    watch = Watch("cuda", Gpu(0, "GPU-aa"), lambda _: None)
    looks(watch, "calibrate")
    seen = watch.facts()
    for card, special in ((H100 | {"error": 15}, {}), (H100 | {"sm": None, "apps": None}, {}), (H100, {"trouble": 9})):
        gpus.says(card, **special)
        nvml._open = None
        looks(watch, "train")
        assert watch.facts() == seen
    gpus.says(H100 | {"sm": None, "apps": [[1, "miner"], [2, "python"]]})  # strangers, and no clocks
    alone = Watch("cuda", Gpu(0, "GPU-aa"), lambda _: None)
    looks(alone, "train")
    assert alone.facts() == Conditions(others=["1 miner", "2 python"])


def test_a_look_that_a_change_of_phases_overtook_counts_for_neither(
    gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch("cuda", Gpu(0, "GPU-aa"), lambda _: None)
    real = conditions.clocks

    def slow(gpu: Gpu | None) -> Any:
        watch(Event("submit"))
        return real(gpu)

    monkeypatch.setattr(conditions, "clocks", slow)
    looks(watch, "train", 1)
    assert watch.facts() == Conditions()


def test_a_thread_looks_by_itself_while_a_run_is_on_a_gpu(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(Watch, "look", lambda _: looked.set())
    with Watch("cuda", Gpu(0, "GPU-aa"), lambda _: None):
        assert looked.wait(60)


def test_a_power_cap_and_a_small_drop_are_the_rule(gpus: FakeNvml) -> None:
    facts = Conditions(sm_mhz=ClockMhz(1980, 1900, 1890, 1880), reasons=["power cap"])
    assert warnings(facts, TRAINED) == []
    facts = Conditions(sm_mhz=ClockMhz(1980, 1980, 1870, 1870))
    assert warnings(facts, TRAINED) == ["the GPU's clock fell from 1980 MHz in the calibration to 1870 MHz"]


def test_on_a_cpu_nothing_is_asked() -> None:
    with Watch("cpu", None, lambda _: None) as watch:
        assert watch._thread is None
        watch(Event("train"))
    assert watch.facts() == Conditions()


# ---- presets by memory, and the doctor


@pytest.mark.parametrize(
    ("memory", "divisor"), [(143771, 1), (81559, 1), (49140, 2), (46068, 2), (40960, 2), (24564, 4), (16376, 8)]
)  # fmt: skip
def test_the_preset_follows_the_gpus_memory(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, divisor: int
) -> None:
    gpus.says(H100 | {"memory_mib": memory}, SMALL)  # the second card changes nothing
    monkeypatch.setattr(single, "best", lambda *given: Sandbox(0, gpu=given[3]))
    monkeypatch.setattr(single, "load_dataset", lambda _: None)
    found = single.settings_from(data=str(tmp_path))
    assert (found.preset.name, found.preset.batch_divisor, found.device) == ("h100", divisor, "cuda")
    assert found.sandbox.gpu is not None and found.sandbox.gpu.uuid == "GPU-aa"
    laptop = single.settings_from(data=str(tmp_path), preset="laptop")
    assert (laptop.device, laptop.preset.batch_divisor, laptop.sandbox.gpu) == ("cpu", 1, None)
    assert dataclasses.replace(found.preset, batch_divisor=1) == PRESETS["h100"]
    monkeypatch.setattr(single, "PATIENCE_S", 0.0)
    monkeypatch.setattr(single, "best", lambda *given: told.wait(60) and Sandbox(0, gpu=given[3]))
    told = threading.Event()
    monkeypatch.setattr("builtins.print", lambda words, **_: told.set() if "may take minutes" in words else None)
    single.settings_from(data=str(tmp_path))
    assert told.is_set()
    # Side by side, as the smallest of those that are named.
    gpus.says(H100, H100 | {"uuid": "GPU-bb", "memory_mib": memory})
    both = single.settings_from(data=str(tmp_path), gpus="0,1")
    assert both.preset.batch_divisor == divisor


def test_a_gpu_is_claimed_and_touched_before_a_sandbox_is_probed_on_it(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a boot /dev/nvidia-uvm is made by what touches CUDA first, and no sandbox can."""
    gpus.says(SMALL, H100, H100 | {"uuid": "GPU-cc"})
    steps: list[str] = []
    monkeypatch.setattr(single, "claim", lambda gpu: steps.append(f"claim {gpu.uuid}"))
    monkeypatch.setattr(single, "touch", lambda gpu: steps.append(f"touch {gpu.uuid}"))
    monkeypatch.setattr(single, "best", lambda *given: steps.append(f"probe on {given[3] and given[3].uuid}"))
    monkeypatch.setattr(single, "load_dataset", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    single.settings_from(data=str(tmp_path))
    assert steps == ["claim GPU-aa", "touch GPU-aa", "probe on GPU-aa"]
    steps.clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine.gpus.cache_clear()
    single.settings_from(data=str(tmp_path), device="cuda", gpus="2,1")
    assert steps == [
        *(f"{what} {uuid}" for what in ("claim", "touch") for uuid in ("GPU-cc", "GPU-aa")),
        "probe on GPU-cc",
    ]
    steps.clear()
    assert single.settings_from(data=str(tmp_path), gpus="2,1").preset.name == "h100"  # whatever the first card is
    steps.clear()
    single.settings_from(data=str(tmp_path), device="cpu")
    assert steps == ["probe on None"]


def test_a_gpu_that_is_too_small_or_silent_is_refused_and_never_becomes_the_cpu(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "best", lambda *given: Sandbox(0, gpu=given[3]))
    monkeypatch.setattr(single, "load_dataset", lambda _: None)
    cuda_says = {"cuda": 13000, "memory": 0}
    monkeypatch.setattr("hotloop.harness.gpu.between_runs.touch", lambda gpu: cuda_says)
    for memory, words in ((8192, "8 GiB, too little for the preset h100.*--device cpu"),
                          (None, "does not tell its memory; say --preset h100")):  # fmt: skip
        gpus.says(H100 | {"memory_mib": memory})
        with pytest.raises(DeviceError, match=words):
            single.settings_from(data=str(tmp_path))
        # What is asked for is had: the CPU, or the same experiment on that GPU.
        assert single.settings_from(data=str(tmp_path), device="cpu").preset.name == "laptop"
        assert single.settings_from(data=str(tmp_path), preset="h100").preset.batch_divisor == (8 if memory else 1)
    cuda_says["memory"] = 120 << 30  # one that shares the machine's memory tells it to CUDA only
    assert single.settings_from(data=str(tmp_path)).preset.batch_divisor == 1


def test_a_smaller_gpu_takes_fewer_rows_a_pass_and_as_many_tokens_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that train.py hands to the warm-up, of a small model: how often the model runs, on how many rows."""
    small = dict(DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, GATE_CHANNELS=4)
    for module in (train, baseline):
        monkeypatch.setattr(module, "LAPTOP", module.LAPTOP | small)

    class Once:
        """A run that makes one step and ends."""

        def __init__(self, spec: Spec) -> None:
            self.spec, self.passes, self.loss = spec, [], 0.0  # type: ignore[var-annotated]

        def warmup(self, step: Any, *, rows: int, restore: Any) -> None:
            restore[0].blocks[0].mlp.register_forward_pre_hook(lambda _, x: self.passes.append(len(x[0])))
            tokens = torch.arange(rows * 256).view(rows, 256) % 64
            self.loss = float(step(Batch(tokens, tokens, 0.0, 0)))
            raise StopIteration

    for loop in (train.train, baseline.train):
        losses = []
        for divisor in (1, 2, 4):
            torch.manual_seed(1)
            run = Once(Spec("laptop", "cpu", 1, 64, 256, divisor))
            with pytest.raises(StopIteration):
                loop(run)
            assert run.passes == [16 // divisor] * divisor
            losses.append(run.loss)
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_doctor_tells_preset_clocks_and_strangers(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, tuple[bool, str]]:
        return {name: (good, text) for name, good, text in doctor.checks()}

    monkeypatch.setattr(doctor, "_sandbox", lambda *_: iter(()))
    tried: list[Gpu] = []
    monkeypatch.setattr(doctor, "touch", lambda gpu: tried.append(gpu))
    monkeypatch.setattr(doctor, "probe_cuda", lambda _: 1.5)
    monkeypatch.setattr(doctor, "best", lambda *_, **given: Sandbox(0, gpu=given.get("gpu")))
    monkeypatch.setattr(doctor, "verify_seal", lambda: "0" * 64)
    monkeypatch.setattr(neighbours, "_in_container", lambda: False)
    gpus.says(H100 | {"memory_mib": 24564}, SMALL)
    found = told()
    assert found["gpu"] == (
        True, "GPU 0, NVIDIA H100 80GB HBM3 (GPU-aa), 24564 MiB, driver 580.65.06; 1 more, to be chosen by "
        "CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    assert found["preset"] == (True, "h100, with 1/4 of DEVICE_BATCH_SIZE a pass (24 GiB of GPU memory)")
    assert found["clocks"] == (True, "SM 1980 MHz, memory 2619 MHz, 61 C; held back by: power cap")
    assert found["gpu use"] == (True, "nobody computes there")
    assert found["cuda"] == (True, "works, 1.5 s to a first product")
    assert "persistence" not in found
    gpus.says(H100 | DROPPED | {"apps": [[1, "miner"], [2, "python"]], "memory_mib": 8192, "persistence": 0})
    found = told()
    assert not found["preset"][0] and "too little for the preset h100" in found["preset"][1]
    assert not found["clocks"][0] and "cool it" in found["clocks"][1]
    assert found["gpu use"] == (False, "computing there: 1 miner; 2 python; end them before a night")
    assert found["cuda"] == (True, "not tried beside what computes there (1 miner; 2 python)")
    assert not found["persistence"][0] and "nvidia-smi -pm 1" in found["persistence"][1]
    assert len(tried) == 1  # not beside somebody's run
    gpus.says(H100 | {"sm": None, "apps": None})  # WSL
    found = told()
    assert not found["clocks"][0]
    assert found["gpu use"] == (True, "the driver does not tell who computes there; see to it that nobody else does")


def test_the_doctor_says_what_is_wrong_with_a_gpu_that_cannot_be_used(
    gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.says(trouble=9)
    monkeypatch.setattr(devices, "signs", lambda: Signs(module=True, nodes=True))
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: iter(()))
    found = {name: (good, text) for name, good, text in doctor.checks()}
    for name in ("gpu", "preset"):
        assert found[name][0] is False
        assert "its driver does not work (Driver Not Loaded)" in found[name][1] and "--device cpu" in found[name][1]
    assert "cuda" not in found and "clocks" not in found


def test_the_doctor_names_what_keeps_bubblewrap_from_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel").mkdir()
    setting = tmp_path / "kernel" / "apparmor_restrict_unprivileged_userns"
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    for value, level, lines in (("1\n", 1, 1), ("1\n", 3, 0), ("0\n", 1, 0)):
        setting.write_text(value)
        monkeypatch.setattr(doctor, "best", lambda level=level: Sandbox(level))
        found = list(doctor._user_namespaces(tmp_path))
        assert len(found) == lines
        for _, good, text in found:
            assert not good and "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0" in text
    setting.unlink()
    assert list(doctor._user_namespaces(tmp_path)) == []


# ---- the feed


def test_a_slow_feed_is_counted_and_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tiny_preset()

    def train() -> Session:
        budget = Budget(preset.budget)
        made = Session(SessionConfig(
            source=tiny_source(), spec=Spec("laptop", "cpu", 1, VOCAB, LENGTH), preset=preset, rows=tiny_rows(256, 0),
            budget=budget, folder=folder, threads=1,
        ))  # fmt: skip
        made.run()
        return made

    calm = train()
    real, pauses = RowOrder.take, [1.0] * 5

    def slow(self: RowOrder, count: int, seq_len: int) -> Any:
        time.sleep(pauses.pop() if pauses else 0.0)
        return real(self, count, seq_len)

    monkeypatch.setattr(RowOrder, "take", slow)
    late = train()
    assert late.weights == calm.weights
    assert calm.training.feed_late_s < late.training.feed_late_s < late.training.wall_s
    assert late.training.feed_late_s > 2.0  # a tiny step is over before a second is, also on a busy machine
    assert warnings(Conditions(), Training(wall_s=300.0, feed_late_s=4.0)) == [
        "the trainer waited 4.0 s of 300.0 s for its rows; is the disk or memory busy?"
    ]
    for wall_s, late_s in ((300.0, 2.9), (1.0, 0.4)):
        assert warnings(Conditions(), Training(wall_s=wall_s, feed_late_s=late_s)) == []


def test_a_warning_is_in_the_record_the_summary_and_every_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = RowOrder.take

    def slow(self: RowOrder, count: int, seq_len: int) -> Any:
        time.sleep(0.02)
        return real(self, count, seq_len)

    monkeypatch.setattr(RowOrder, "take", slow)
    outcome = run_experiment(job(tmp_path), settings(tmp_path, "cpu", monkeypatch))
    assert outcome.status == "ok", outcome.reason
    assert outcome.training.feed_late_s > 0.5
    (words,) = (w for w in outcome.conditions.warnings if "for its rows" in w)
    assert f"warning:          {words}" in summary(outcome)
    assert Chain.open(tmp_path / "records.jsonl").append(outcome).body == outcome
    assert Chain.read(tmp_path / "records.jsonl").outcome(0) == outcome
    assert "fusions" not in summary(outcome)  # nothing was compiled
    told = msgspec.structs.replace(outcome.training, implementations={"fusions": "mlp 8 of 8; put in: mlp"})
    fused = msgspec.structs.replace(outcome, training=told)
    assert "fusions:          mlp 8 of 8; put in: mlp" in summary(fused)
    assert "`mlp 8 of 8; put in: mlp`" in next(_fusions(fused, []))


# ---- faults of the machine


def test_out_of_memory_tells_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own way out, with a peak that a GPU would have told."""
    gpu = (
        "torch.cuda.is_initialized = lambda: True; torch.cuda.max_memory_allocated = lambda: 71 << 30\n"
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')"
    )
    outcome = run_experiment(job(tmp_path, STEP=gpu), settings(tmp_path, "cpu", monkeypatch))
    assert (outcome.status, outcome.training.peak_mb) == ("oom", 71 * 1024)
    assert "Tried to allocate 20.00 GiB." in outcome.reason
    assert outcome.reason.endswith("at most 72,704 MB were in use")
    assert "peak_vram_mb:     72704.0" in summary(outcome)


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "InductorError: OutOfMemoryError: CUDA out of memory",
              "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)  # fmt: skip
def test_out_of_memory_by_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    source = {"START": f"raise RuntimeError({words!r})"}
    assert run_experiment(job(tmp_path, **source), settings(tmp_path, "cpu", monkeypatch)).status == "oom"


def test_a_device_that_is_lost_is_no_fault_of_the_experiments(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer ends; what clears the GPU afterwards finds none (here: no driver), for real. Nothing is recorded."""
    tries: list[int] = []

    def lost(*args: Any) -> None:
        tries.append(1)
        raise TrialError("crash", "AcceleratorError: CUDA error: unspecified launch failure")

    monkeypatch.setattr(experiment, "_try", lost)
    with pytest.raises(DeviceError, match="could not be cleared") as e:
        run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch))
    assert len(str(e.value).splitlines()) == 1
    assert tries == [1]
    gpus.says(H100 | {"apps": [[1, "miner"]]})
    monkeypatch.setattr(experiment, "fresh", lambda device, gpu: experiment_fresh(device, 0.0, gpu))
    with pytest.raises(DeviceError, match="other processes compute on the GPU"):
        run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch))


experiment_fresh = experiment.fresh


def test_broken_hardware_gets_a_second_try_and_the_record_says_so(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [TrialError("crash", "CUDA error: uncorrectable ECC error encountered")]
    tries: list[Any] = []

    def once(job: Job, settings: Settings, found: Any, *rest: Any) -> None:
        tries.append(found)
        found.ledger.train += 1.0
        if ends:
            raise ends.pop(0)

    monkeypatch.setattr(experiment, "_try", once)
    monkeypatch.setattr(experiment, "fresh", lambda *a, **k: None)
    outcome = run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch))
    assert (outcome.status, len(tries), outcome.ledger) == ("ok", 2, Ledger(train=1.0))
    assert any("run twice" in words and "ECC" in words for words in outcome.conditions.warnings)

    tries.clear()
    ends[:] = [TrialError("crash", "uncorrectable ECC")] * 3  # once more, and not again
    assert run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch)).status == "crash"
    assert len(tries) == 2
    for error, device in (
        (TrialError("crash", "illegal memory access"), "cuda"),
        (TrialError("nan", "uncorrectable ECC"), "cuda"),
        (TrialError("crash", "uncorrectable ECC"), "cpu"),
    ):
        tries.clear()
        ends[:] = [error]
        run_experiment(job(tmp_path), settings(tmp_path, device, monkeypatch))
        assert len(tries) == 1, error


def test_what_is_a_fault_of_hardware() -> None:
    assert is_machines_fault("RuntimeError: CUDA error: uncorrectable ECC error encountered (train.py:3)")
    assert is_machines_fault("Unable to determine the device handle: GPU is lost")
    assert not is_machines_fault("CUDA error: an illegal memory access was encountered")
    assert not is_machines_fault("ValueError: unknown error")
