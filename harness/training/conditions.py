"""The conditions under which an experiment ran: the GPU's clocks, who else was on it, whether the feed kept up.

None of it decides anything; it goes into the record, so that a score that was made under worse conditions can be told
from a worse train.py. The parent asks the driver (NVML) every few seconds, in a thread of its own, out of the clock's
way; on a CPU nothing is asked.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from typing import Any, Self

from hotloop.harness.gpu import nvml
from hotloop.harness.gpu.devices import chosen
from hotloop.harness.gpu.neighbours import strangers
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.records.model import ClockMhz, Conditions, Training
from hotloop.harness.training.session import Event

__all__ = ["SLOWED", "Watch", "clock_words", "clocks", "is_machines_fault", "strangers", "warnings"]

PERIOD_S = 2.5
# Bits of NVML's reasons why clocks are not higher. At full load a power cap is the rule, so it is shown only.
REASONS = {
    0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "temperature (software)", 0x40: "temperature (hardware)", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip
SLOWED = ("hardware slowdown", "temperature (software)", "temperature (hardware)", "power brake")
CLOCK_SHARE = 0.95  # of the calibration's clock; below that the training was slower than its budget says
LATE_SHARE, LATE_S = 0.01, 0.5  # of the training, and seconds, that the trainer may wait for its rows
APART_SHARE, APART_S = 0.01, 0.5  # the same, by which the device's clock may differ from the parent's
# What the driver says, through an innocent program, of hardware that failed. Words that a faulty kernel of train.py's
# causes as well ("unspecified launch failure", "illegal memory access") are not among them.
_FAULTS = (
    "uncorrectable ecc", "gpu is lost", "device lost", "fallen off the bus", "hardware stack error", "nvlink",
    "busy or unavailable", "no cuda-capable device", "system not yet initialized",
)  # fmt: skip


def is_machines_fault(reason: str) -> bool:
    """Whether a failure's text tells of broken hardware. It is the trainer's word: all that it buys is a second try."""
    return any(words in reason.lower() for words in _FAULTS)


def clocks(gpu: Gpu | None = None) -> dict[str, Any] | None:
    """What the GPU (by default the chosen one) does now; None where the driver does not tell.

    Returns:
        sm_mhz, memory_mhz, reasons (why clocks are not higher) and temperature_c; the second and the last may be None.
    """
    gpu = gpu or chosen()
    found = gpu and nvml.clocks(gpu)
    if not found:
        return None
    bits = found["reasons"] or 0
    return {**found, "reasons": [words for bit, words in REASONS.items() if bits & bit]}


def clock_words(now: dict[str, Any]) -> str:
    """One line of what `clocks` found."""

    def told(key: str, unit: str) -> str:
        return "unknown" if now[key] is None else f"{now[key]} {unit}"

    held = ", ".join(now["reasons"]) or "nothing"
    memory, temperature = told("memory_mhz", "MHz"), told("temperature_c", "C")
    return f"SM {now['sm_mhz']} MHz, memory {memory}, {temperature}; held back by: {held}"


class Watch:
    """Looks at the GPU while an experiment runs; a context manager that passes events on and reads the phase off them.

    Args:
        device: on a CPU there is nothing to look at, and no thread.
        gpu: the one that is meant; None for the chosen one.
    """

    def __init__(self, device: str, gpu: Gpu | None, on_event: Callable[[Event], None]) -> None:
        self._gpu, self._on_event = gpu, on_event
        self._phase = ""
        self._seen: list[tuple[str, dict[str, Any]]] = []
        self._strangers: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True) if device == "cuda" else None

    def __call__(self, event: Event) -> None:
        self._phase = event.phase
        self._on_event(event)

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()

    def _look(self) -> None:
        while not self._end.wait(PERIOD_S):
            self.look()

    def look(self) -> None:
        """Ask once; what the thread does every few seconds."""
        phase = self._phase
        if phase not in ("calibrate", "train"):
            return
        now, others = clocks(self._gpu), strangers(self._gpu)
        if phase == self._phase:  # what was seen at a change of phases belongs to neither
            self._strangers.update(others)
            if now:
                self._seen.append((phase, now))

    def facts(self) -> Conditions:
        """What was seen, for the record."""
        others, seen = sorted(tuple(self._strangers)), tuple(self._seen)  # the thread may still add to them
        if not seen:
            return Conditions(others=others)
        calibrate = [s["sm_mhz"] for phase, s in seen if phase == "calibrate"]
        train = [s["sm_mhz"] for phase, s in seen if phase == "train"] or calibrate
        return Conditions(
            looks=len(seen),
            sm_mhz=ClockMhz(
                calibrate=statistics.median(calibrate or train[:1]), train=statistics.median(train),
                last=statistics.median(train[-3:]), least=min(train),
            ),
            reasons=sorted({r for _, s in seen for r in s["reasons"]}),
            temperature_c=max((t for _, s in seen if (t := s["temperature_c"]) is not None), default=None),
            others=others,
        )  # fmt: skip


def warnings(conditions: Conditions, training: Training) -> list[str]:
    """What to tell the user of an experiment's conditions, one line each; none where all was well."""
    told = []
    if sm := conditions.sm_mhz:
        slow = min(sm.train, sm.last)
        if slow < CLOCK_SHARE * sm.calibrate:
            told.append(f"the GPU's clock fell from {sm.calibrate:.0f} MHz in the calibration to {slow:.0f} MHz")
    if held := [r for r in conditions.reasons if r in SLOWED]:
        hottest = conditions.temperature_c
        told.append(
            f"the GPU was slowed down: {', '.join(held)}"
            + (f" (at most {hottest:.0f} C)" if hottest is not None else "")
        )
    if others := conditions.others:
        told.append(f"other processes computed on the GPU: {'; '.join(others[:3])}")
    late_s = training.feed_late_s
    if late_s > max(LATE_S, LATE_SHARE * training.wall_s):
        told.append(
            f"the trainer waited {late_s:.1f} s of {training.wall_s:.1f} s for its rows; is the disk or memory busy?"
        )
    device_s, wall_s = training.device_s, training.device_wall_s
    if device_s is not None and abs(device_s - wall_s) > max(APART_S, APART_SHARE * wall_s):
        told.append(
            f"by the device's clock the training took {device_s:.1f} s, by the parent's {wall_s:.1f} s; one of them is "
            f"wrong, or the device was not what the time went into"
        )
    if was := conditions.corrected:
        told.append(
            f"its calibration promised {was.promised_s:.1f} s of training and it took {was.training_s:.1f} s, so "
            f"it was run once more, with as many tokens as its budget holds at that speed"
        )
    if conditions.tried_again:
        told.append(f"it was run twice; the first time it ended as a broken device does: {conditions.tried_again}")
    return told
