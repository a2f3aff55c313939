"""Which implementations are chosen, on a device whose times are given: no clock, no process, no GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hotloop.harness.errors import HotloopError
from hotloop.harness.tuning.notes import Notes
from hotloop.harness.tuning.selection import Answer, Member, Members, Selection, TimeIsUp, Unfit

PLAIN: Members = frozenset()


def member(name: str) -> Member:
    part, _, implementation = name.partition("=")
    return Member(part, implementation or "ours")


def some(*names: str) -> Members:
    return frozenset(map(member, names))


@dataclass
class Device:
    """Runs sets at given speeds.

    Attributes:
        gains: member -> factor of the speed; several multiply, but for `together`.
        together: set -> factor of the whole.
        drift: what each turn of any set costs the device's speed for ever.
        noise: deviation of each turn.
        wrong: added to the loss of what has it. varies, faults, hangs: what does. poisons: what ends the one beside it.
    """

    gains: dict[str, float] = field(default_factory=dict)
    together: dict[frozenset[str], float] = field(default_factory=dict)
    drift: float = 0.0
    noise: float = 0.0
    wrong: dict[str, float] = field(default_factory=dict)
    varies: str = ""
    faults: str = ""
    hangs: str = ""
    poisons: str = ""
    turns: int = 0
    ready: int = 0
    most: int = 0
    started: list[Members] = field(default_factory=list)
    poisoned: bool = False
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def start(self, members: Members) -> Run:
        self.started.append(members)
        if any(str(m).startswith(self.faults) for m in members if self.faults):
            raise Unfit("it fails: an illegal memory access")
        self.poisoned = False
        self.ready += 1
        self.most = max(self.most, self.ready)
        return Run(self, members)

    def speed(self, names: frozenset[str]) -> float:
        found = 1000.0
        for name in names:
            found *= self.gains.get(name, 1.0)
        return found * self.together.get(names, 1.0)


@dataclass
class Run:
    device: Device
    members: Members
    answers: int = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(m.part if m.implementation == "ours" else str(m) for m in self.members)

    def answer(self) -> Answer:
        self.answers += 1
        off = sum(self.device.wrong.get(n, 0.0) for n in self.names)
        bits = self.answers if self.device.varies in self.names else 0
        return Answer((9.0 + off, 8.0 + off), f"{sorted(self.names)} {bits}")

    def turn(self) -> float:
        d = self.device
        d.turns += 1
        if d.hangs in self.names:
            raise Unfit("it hangs: no answer within 90 s")
        if d.poisoned:
            d.poisoned = False
            raise Unfit("it fails: CUDA error: unspecified launch failure")
        d.poisoned = d.poisons in self.names
        return d.speed(self.names) * (1 - d.drift) ** d.turns * (1 + d.random.gauss(0, d.noise))

    def close(self) -> None:
        self.device.ready -= 1


def select(
    device: Device, *names: str, notes: Notes | None = None, over: Callable[[], bool] = lambda: False
) -> Members:
    with Selection(device.start, notes or Notes(None, {}), lambda _: None, over) as selection:
        return selection.forward([member(n) for n in names], PLAIN)


def test_what_gains_together_is_chosen_and_what_loses_is_not() -> None:
    device = Device({"a": 1.05, "b": 0.97, "c": 1.20})
    assert select(device, "a", "b", "c") == some("a", "c")
    assert device.most == 2  # each takes the device's memory
    assert device.ready == 0


def test_the_best_alone_comes_first_and_what_adds_nothing_to_it_stays_out() -> None:
    """b serves what a serves too: together they are no faster than a."""
    device = Device({"a": 1.10, "b": 1.08}, {frozenset("ab"): 1 / 1.08})
    assert select(device, "b", "a") == some("a")
    # And what hurts beside another, though it gains alone.
    device = Device({"a": 1.10, "b": 1.08}, {frozenset("ab"): 0.9})
    assert select(device, "b", "a") == some("a")


def test_a_tie_alone_may_gain_beside_another() -> None:
    device = Device({"a": 1.10, "b": 1.0}, {frozenset("ab"): 1.05})
    assert select(device, "b", "a") == some("a", "b")


@pytest.mark.parametrize("drift", [-0.01, 0.01, 0.03])
def test_drift_makes_no_gain_and_hides_none(drift: float) -> None:
    """A device that loses or gains a per cent each turn, which is more than what is to be told apart."""
    assert select(Device({"same": 1.0, "slower": 0.99}, drift=drift), "same", "slower") == PLAIN
    assert select(Device({"faster": 1.01}, drift=drift), "faster") == some("faster")


def test_ties_stay_out_whatever_the_noise() -> None:
    names = [f"m{i}" for i in range(40)]
    assert select(Device(noise=0.004), *names) == PLAIN
    assert select(Device({"m0": 1.001}), "m0") == PLAIN  # steady, and not worth it
    assert select(Device({"m7": 1.03}, noise=0.004), *names) == some("m7")


def test_a_loser_is_not_timed_to_the_end() -> None:
    quick, whole = Device({"a": 0.9}), Device({"a": 1.0})
    select(quick, "a"), select(whole, "a")
    assert quick.turns < whole.turns


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"wrong": {"bad": 0.5}}, "it is wrong: the loss of step 0 is 9.5000, and plain's 9.0000"),
        ({"wrong": {"bad": float("nan")}}, "it is wrong: the loss of step 0 is nan"),
        ({"varies": "bad"}, "it varies"),
        ({"faults": "bad"}, "an illegal memory access"),
        ({"hangs": "bad"}, "it hangs"),
        ({"poisons": "bad"}, "what ran beside it ended"),
    ],
)
def test_what_cannot_be_used_is_out_with_its_reason_and_the_rest_is_chosen(
    fault: dict[str, object], reason: str
) -> None:
    device = Device({"bad": 2.0, "good": 1.1}, **fault)  # type: ignore[arg-type]
    said: list[str] = []
    with Selection(device.start, Notes(None, {}), said.append) as selection:
        assert selection.forward([member("bad"), member("good")], PLAIN) == some("good")
    assert any(line.startswith("bad=ours: out: ") and reason in line for line in said)
    assert sum(some("bad") <= s for s in device.started) == 1  # it is not tried again
    assert device.ready == 0


def test_plain_that_does_not_run_is_an_error() -> None:
    class Broken(Device):
        def start(self, members: Members) -> Run:
            raise Unfit("it fails: out of memory")

    with pytest.raises(HotloopError, match="plain, does not run: it fails: out of memory"):
        select(Broken(), "a")


def test_one_implementation_of_a_part() -> None:
    """Each alone beside plain, and then the second best in the place of the best, not on top of it."""
    device = Device({"attention=x": 1.1, "attention=y": 1.2, "attention=z": 1.2, "mlp": 1.05})
    assert select(device, "attention=x", "attention=y", "attention=z", "mlp") == some("attention=y", "mlp")
    assert not any(len({m.part for m in s}) < len(s) for s in device.started)


def test_a_selection_that_is_cut_short_anywhere_goes_on_and_chooses_the_same(tmp_path: Path) -> None:
    gains = {"a": 1.05, "b": 0.97, "c": 1.20, "d": 1.0}
    whole = Device(gains)
    chosen = select(whole, *gains)
    for seed in range(10):
        path, chance, compared = tmp_path / f"{seed}.json", random.Random(seed), 0
        while True:
            device = Device(gains)
            left = chance.randrange(1, 4)

            def over() -> bool:
                nonlocal left
                left -= 1
                return left < 0

            notes = Notes(path, {"gpu": "x"})
            try:
                found = select(device, *gains, notes=notes, over=over)
            except TimeIsUp:
                assert len(notes.body["comparisons"]) > compared  # each call gets further
                compared = len(notes.body["comparisons"])
                continue
            assert found == chosen
            break


def test_what_was_compared_on_another_machine_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    select(Device({"a": 1.1}), "a", notes=Notes(path, {"gpu": "x", "driver": "1"}))
    assert Notes(path, {"gpu": "x", "driver": "1"}).body["comparisons"]
    other = Notes(path, {"gpu": "y", "driver": "1"})
    assert not other.body and other.why == f"{path} was found with another gpu"
    path.write_text(path.read_text()[:-30])
    damaged = Notes(path, {"gpu": "x", "driver": "1"})
    assert not damaged.body and "is damaged" in damaged.why
    damaged.save()
    assert not Notes(path, {"gpu": "x", "driver": "1"}).why
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]  # no part of a file is left
