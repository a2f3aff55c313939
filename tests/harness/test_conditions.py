"""Conditions of a run (clocks, strangers on the GPU, a slow feed) and faults of its machine; nvidia-smi is a script."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from bench import baseline
from harness import Batch, conditions, doctor, experiment, machine, single
from harness.budget import Budget
from harness.conditions import Watch, clock_words, clocks, is_machines_fault, strangers, warnings
from harness.errors import DeviceError, TrialError
from harness.experiment import Job, Settings, run_experiment, summary
from harness.feed import RowOrder
from harness.machine import Gpu
from harness.record import Outcome
from harness.sandbox import Sandbox
from harness.session import Event, Session
from harness.spec import PRESETS, Spec
from kernels import attend
from prepare import Dataset
from tests.harness.conftest import LENGTH, VOCAB, tiny_preset, tiny_rows, tiny_source

SMI = """#!/bin/sh
case "$1" in
  *clocks_event_reasons*) [ -e {0}/new ] && cat {0}/clocks || {{ echo 'not a valid field' >&2; exit 2; }} ;;
  *clocks_throttle_reasons*) cat {0}/clocks ;;
  --query-gpu=name*) cat {0}/gpus ;;
  --query-compute*) cat {0}/apps ;;
esac
"""
FULL, DROPPED = "GPU-aa, 1980 MHz, 2619 MHz, 0x0000000000000004, 61\n", "GPU-aa, 1410 MHz, 2619 MHz, 0x24, 88\n"


class Smi:
    """The folder of a fake nvidia-smi; what it says is in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says()

    def says(self, clocks: str = FULL, apps: str = "", memory: str = "81559 MiB") -> None:
        machine.gpus.cache_clear()
        gpus = f"NVIDIA H100 80GB HBM3, {memory}, 580.65.06\n"
        for name, text in (("clocks", clocks), ("apps", apps), ("gpus", gpus)):
            (self.folder / "next").write_text(text)
            (self.folder / "next").rename(self.folder / name)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Smi]:
    folder = tmp_path / "smi"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(SMI.format(folder))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(conditions, "PERIOD_S", 0.02)
    machine.gpus.cache_clear()
    yield Smi(folder)
    machine.gpus.cache_clear()


def settings(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of the tiny train.py; the data is made up, so it is not verified."""
    splits = {"train": tiny_rows(256, 0), "val": tiny_rows(64, 1), "holdout": tiny_rows(16, 2)}

    class Rows:
        path, digest, seq_len, vocab_size = tmp_path / "data", "d" * 64, LENGTH, VOCAB
        token_bytes = np.ones(VOCAB, dtype=np.int32)
        rows = staticmethod(splits.__getitem__)
        verify = staticmethod(lambda: None)

    dataset: Any = Rows()
    assert not isinstance(dataset, Dataset)
    return Settings(dataclasses.replace(tiny_preset(), device=device), device, dataset, 1, Sandbox(0))


def job(tmp_path: Path, **changes: str) -> Job:
    return Job(tiny_source(**changes), 0, "t", "single", "c" * 40, "", "tiny", 1, tmp_path / "run")


# ---- what nvidia-smi says


def test_clocks_of_new_and_old_drivers_and_of_none(smi: Smi) -> None:
    found = {
        "sm_mhz": 1410,
        "memory_mhz": 2619,
        "reasons": ["power cap", "temperature (software)"],
        "temperature_c": 88,
    }
    smi.says("GPU-bb, 990 MHz, 2619 MHz, 0x0, 40\n" + DROPPED)
    assert clocks(Gpu(1, "GPU-aa")) == found
    (smi.folder / "new").touch()
    assert clocks(Gpu(1, "GPU-aa")) == found
    assert clock_words(found) == "SM 1410 MHz, memory 2619 MHz, 88 C; held back by: power cap, temperature (software)"
    assert "held back by: nothing" in clock_words(clocks() or {})
    smi.says("GPU-aa, [N/A], [N/A], [N/A], [N/A]\n")
    assert clocks() is None
    smi.says("")
    assert clocks() is None


def test_a_stranger_is_who_is_not_below_this_process(smi: Smi) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        smi.says(apps=f"GPU-aa, {ours.pid}, python\nGPU-aa, 1, other\nGPU-bb, 1, elsewhere\n")
        assert strangers(Gpu(0, "GPU-aa")) == ["1 other"]
        assert strangers(None) == ["1 other", "1 elsewhere"]
        smi.says(apps=f"GPU-aa, {ours.pid}, python\n")
        assert strangers(Gpu(0, "GPU-aa")) == []
        ours.communicate(b"\n")
    smi.says(apps="GPU-aa, 1, [Not Found]\n")  # a container, which knows the trainer by another number
    assert strangers(Gpu(0, "GPU-aa")) == []
    smi.says(apps="GPU-aa, 1, [Not Found]\nGPU-aa, 2, [Not Found]\n")
    assert len(strangers(Gpu(0, "GPU-aa"))) == 2


def look(watch: Watch, phase: str) -> None:
    """Stay in a phase until it was looked at several times."""
    watch(Event(phase))
    deadline, before = time.monotonic() + 20, len(watch._seen)
    while len(watch._seen) < before + 3:
        assert time.monotonic() < deadline, "nobody looks"
        time.sleep(0.01)


def test_clocks_that_drop_and_strangers_get_into_the_record(smi: Smi) -> None:
    events: list[Event] = []
    with Watch("cuda", Gpu(0, "GPU-aa"), events.append) as watch:
        watch(Event("compile"))
        smi.says(DROPPED, "GPU-aa, 1, early\nGPU-aa, 2, early\n")
        time.sleep(0.2)  # neither of it matters before the calibration
        watch(Event("start"))
        smi.says(FULL)
        time.sleep(0.2)
        look(watch, "calibrate")
        assert warnings(watch.facts(), 300.0) == []
        look(watch, "train")
        smi.says(DROPPED, "GPU-aa, 1, miner\nGPU-aa, 2, python\n")
        look(watch, "train")
        look(watch, "train")
        watch(Event("submit"))
    assert [e.phase for e in events][-1] == "submit"
    facts = watch.facts()
    assert facts["sm_mhz"]["calibrate"] == 1980
    assert facts["sm_mhz"]["last"] == facts["sm_mhz"]["least"] == 1410
    assert (facts["temperature_c"], facts["others"]) == (88, ["1 miner", "2 python"])
    told = warnings(facts, 300.0)
    assert told == [
        "the GPU's clock fell from 1980 MHz in the calibration to 1410 MHz",
        "the GPU was slowed down: temperature (software) (at most 88 C)",
        "other processes computed on the GPU: 1 miner; 2 python",
    ]


def test_a_power_cap_and_a_small_drop_are_the_rule(smi: Smi) -> None:
    facts = {"sm_mhz": {"calibrate": 1980, "train": 1900, "last": 1890}, "reasons": ["power cap"], "others": []}
    assert warnings(facts, 300.0) == []
    facts["sm_mhz"] = {"calibrate": 1980, "train": 1980, "last": 1870}
    assert warnings(facts, 300.0) == ["the GPU's clock fell from 1980 MHz in the calibration to 1870 MHz"]


def test_on_a_cpu_nothing_is_asked(smi: Smi) -> None:
    smi.says(DROPPED, "GPU-aa, 1, miner\nGPU-aa, 2, python\n")
    with Watch("cpu", None, lambda _: None) as watch:
        watch(Event("train"))
        time.sleep(0.2)
    assert watch.facts() == {}


# ---- presets by memory, and the doctor


@pytest.mark.parametrize(
    ("memory", "preset", "divisor"),
    [("143771 MiB", "h100", 1), ("81559 MiB", "h100", 1), ("49140 MiB", "h100", 2), ("46068 MiB", "h100", 2),
     ("40960 MiB", "h100", 2), ("24564 MiB", "h100", 4), ("16376 MiB", "h100", 8), ("8192 MiB", "laptop", 1),
     ("[N/A]", "laptop", 1)],
)  # fmt: skip
def test_the_preset_follows_the_gpus_memory(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, preset: str, divisor: int
) -> None:
    smi.says(memory=memory)
    monkeypatch.setattr(single, "best", lambda *_: Sandbox(0))
    monkeypatch.setattr(single, "load_dataset", lambda _: None)
    found = single.settings_from(data=str(tmp_path))
    assert (found.preset.name, found.preset.batch_divisor) == (preset, divisor)
    assert found.device == found.preset.device
    laptop = single.settings_from(data=str(tmp_path), preset="laptop")
    assert (laptop.device, laptop.preset.batch_divisor) == ("cpu", 1)
    # Asked for, it is the same experiment on any GPU.
    assert single.settings_from(data=str(tmp_path), preset="h100").preset.batch_divisor == (
        divisor if preset == "h100" else 8 if "MiB" in memory else 1
    )
    assert dataclasses.replace(found.preset, batch_divisor=1) == PRESETS[preset]


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


def test_the_doctor_tells_preset_clocks_and_strangers(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, tuple[bool, str]]:
        return {name: (good, text) for name, good, text in doctor.checks()}

    monkeypatch.setattr(doctor, "_sandbox", lambda _: iter(()))
    monkeypatch.setattr(doctor, "_cuda", lambda: ("cuda", True, "works"))
    monkeypatch.setattr(doctor, "verify_seal", lambda: "0" * 64)
    smi.says(memory="24564 MiB")
    found = told()
    assert found["preset"] == (True, "h100, with 1/4 of DEVICE_BATCH_SIZE a pass (24 GiB of GPU memory)")
    assert found["clocks"] == (True, "SM 1980 MHz, memory 2619 MHz, 61 C; held back by: power cap")
    assert found["gpu use"] == (True, "nobody computes there")
    smi.says(DROPPED, "GPU-aa, 1, miner\nGPU-aa, 2, python\n", "8192 MiB")
    found = told()
    assert not found["preset"][0] and "too little for h100" in found["preset"][1]
    assert not found["clocks"][0] and "cool it" in found["clocks"][1]
    assert found["gpu use"] == (False, "computing there: 1 miner; 2 python; end them before a night")
    smi.says("", memory="[N/A]")
    found = told()
    assert not found["clocks"][0]
    assert not found["preset"][0] and "say --preset h100" in found["preset"][1]


def test_the_doctor_asks_the_kernels_for_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor._attention("cpu")) == [("attention", True, "reference")]
    plan = attend.Plan("", ("torch", "cudnn"), {"flash3": "not installed"}, {}, {}, "cuda")
    monkeypatch.setitem(attend._plans, "cuda", plan)
    assert list(doctor._attention("cuda")) == [
        ("attention", True, "torch, cudnn, reference"), ("  not flash3", True, "not installed")
    ]  # fmt: skip
    monkeypatch.setattr(attend, "ASKED", "fast")
    monkeypatch.setattr(attend, "_plans", {})
    assert next(iter(doctor._attention("cpu")))[:2] == ("attention", False)


# ---- the feed


def test_a_slow_feed_is_counted_and_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tiny_preset()

    def train() -> Session:
        budget = Budget(preset.budget)
        made = Session(
            tiny_source(), Spec("laptop", "cpu", 1, VOCAB, LENGTH), preset, tiny_rows(256, 0), budget, folder, 1
        )
        made.run()
        return made

    calm = train().result
    real = RowOrder.take

    def slow(self: RowOrder, count: int, seq_len: int) -> Any:
        time.sleep(0.05)
        return real(self, count, seq_len)

    monkeypatch.setattr(RowOrder, "take", slow)
    late = train().result
    assert late.weights == calm.weights
    assert calm.feed_late_s < late.feed_late_s < late.training_s
    # A tiny step is over before 50 ms are, so most of them are waited for.
    assert late.feed_late_s > 0.02 * late.steps
    assert warnings({"feed_late_s": 4.0}, 300.0) == [
        "the trainer waited 4.0 s of 300.0 s for its rows; is the disk or memory busy?"
    ]
    assert warnings({"feed_late_s": 2.9}, 300.0) == warnings({"feed_late_s": 0.4}, 1.0) == []


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
    assert outcome.conditions["feed_late_s"] > 0.5
    (words,) = outcome.conditions["warnings"]
    assert "for its rows" in words
    assert f"warning:          {words}" in summary(outcome)
    assert Outcome.from_dict(outcome.as_dict()).conditions == outcome.conditions
    body = outcome.as_dict()
    del body["conditions"]  # a record of before there were any
    assert Outcome.from_dict(body).conditions == {}


# ---- faults of the machine


def test_out_of_memory_tells_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own way out, with a peak that a GPU would have told."""
    gpu = (
        "torch.cuda.is_initialized = lambda: True; torch.cuda.max_memory_allocated = lambda: 71 << 30\n"
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')"
    )
    outcome = run_experiment(job(tmp_path, STEP=gpu), settings(tmp_path, "cpu", monkeypatch))
    assert (outcome.status, outcome.peak_mb) == ("oom", 71 * 1024)
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
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    smi.says(apps="GPU-aa, 1, miner\n")
    monkeypatch.setattr(experiment, "fresh", lambda device, gpu: experiment_fresh(device, 0.0, gpu))
    with pytest.raises(DeviceError, match="other processes compute on the GPU"):
        run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch))


experiment_fresh = experiment.fresh


def test_broken_hardware_gets_a_second_try_and_the_record_says_so(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [TrialError("crash", "CUDA error: uncorrectable ECC error encountered")]
    tries: list[Outcome] = []

    def once(job: Job, settings: Settings, outcome: Outcome, *rest: Any) -> None:
        tries.append(outcome)
        outcome.ledger["train"] = outcome.ledger.get("train", 0.0) + 1.0
        if ends:
            raise ends.pop(0)
        outcome.status = "ok"

    monkeypatch.setattr(experiment, "_try", once)
    monkeypatch.setattr(experiment, "fresh", lambda *a, **k: None)
    outcome = run_experiment(job(tmp_path), settings(tmp_path, "cuda", monkeypatch))
    assert (outcome.status, len(tries), outcome.ledger) == ("ok", 2, {"train": 1.0})
    assert "run twice" in outcome.conditions["warnings"][0] and "ECC" in outcome.conditions["warnings"][0]

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
