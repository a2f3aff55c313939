"""Which launch configuration wins, on a device whose times are given."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hotloop.harness.tuning.notes import Notes
from hotloop.harness.tuning.search import RUNGS, blame, entry, halving, out_of
from hotloop.harness.tuning.selection import TimeIsUp, Unfit


class Device:
    """Times rounds: name -> the default's time over its own, with noise."""

    def __init__(self, ratios: dict[str, float], noise: float = 0.0, seed: int = 1) -> None:
        self.ratios, self.noise, self.random = ratios, noise, random.Random(seed)
        self.rounds: Counter[str] = Counter()
        self.proven: list[str] = []
        self.wrong: set[str] = set()
        self.faults: set[str] = set()

    def prove(self, name: str) -> None:
        self.proven.append(name)
        if name in self.wrong:
            raise Unfit("another answer than the default's")

    def round(self, name: str) -> float:
        self.rounds[name] += 1
        if name in self.faults:
            raise Unfit("OutOfResources: shared memory")
        return self.ratios[name] * (1 + self.random.gauss(0, self.noise))


def found(device: Device, notes: Notes | None = None, over: Callable[[], bool] = lambda: False) -> str | None:
    return halving("k", list(device.ratios), device.prove, device.round, notes or Notes(None, {}), over)


def test_the_fastest_wins_and_losers_stop_after_five_rounds() -> None:
    device = Device({f"slow{i}": 0.5 + i / 100 for i in range(40)} | {"good": 1.2, "best": 1.3})
    assert found(device) == "best"
    assert {device.rounds[f"slow{i}"] for i in range(40)} == {RUNGS[0]} == {5}
    assert device.rounds["best"] == device.rounds["good"] == RUNGS[-1]
    assert len(device.proven) == 42  # each once


def test_of_many_that_are_faster_few_are_timed_to_the_end() -> None:
    device = Device({f"m{i}": 1.05 + i / 1000 for i in range(64)})
    assert found(device) == "m63"
    assert sorted(Counter(device.rounds.values()).items()) == [(RUNGS[0], 48), (RUNGS[1], 12), (RUNGS[2], 4)]


@pytest.mark.parametrize("seed", range(5))
def test_the_default_stays_where_nothing_is_faster_beyond_the_spread(seed: int) -> None:
    assert found(Device(dict.fromkeys("abcdefgh", 1.0), noise=0.02, seed=seed)) is None
    assert found(Device(dict.fromkeys("abcdefgh", 1.005), seed=seed)) is None  # steady, and not worth it
    assert found(Device({"a": 1.0, "b": 1.08, "c": 0.99}, noise=0.02, seed=seed)) == "b"


def test_what_is_wrong_or_cannot_be_launched_is_out() -> None:
    device, notes = Device({"wrong": 3.0, "faulty": 2.0, "good": 1.1, "spills": 9.0}), Notes(None, {})
    device.wrong, device.faults = {"wrong"}, {"faulty"}
    out_of(notes, "k", "spills", "spills: 8 bytes of stack")
    assert found(device, notes) == "good"
    assert device.rounds["spills"] == device.rounds["wrong"] == 0
    assert entry(notes, "k")["out"] == {
        "spills": "spills: 8 bytes of stack", "wrong": "another answer than the default's",
        "faulty": "OutOfResources: shared memory",
    }  # fmt: skip


def test_a_search_that_is_cut_short_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    ratios = {f"m{i}": 0.9 + i / 50 for i in range(12)}
    for seed in range(10):
        chance, calls, rounds = random.Random(seed), 0, Counter[str]()
        while True:
            device, left = Device(ratios), chance.randrange(1, 8)

            def over() -> bool:
                nonlocal left
                left -= 1
                return left < 0

            calls += 1
            try:
                assert found(device, Notes(tmp_path / f"{seed}.json", {}), over) == "m11"
            except TimeIsUp:
                rounds += device.rounds
                continue
            rounds += device.rounds
            break
        assert calls > 1
        assert max(rounds.values()) == RUNGS[-1]  # nothing is timed twice


def test_what_ends_the_process_is_blamed_and_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"

    class Fatal(Device):
        def round(self, name: str) -> float:
            if name == "fatal":
                raise KeyboardInterrupt  # the end of the process
            return super().round(name)

    ratios = {"good": 1.2, "fatal": 5.0, "late": 1.1}
    with pytest.raises(KeyboardInterrupt):
        found(Fatal(ratios), Notes(path, {}))
    assert blame(Notes(path, {}), "it ended the process") == "fatal"
    assert blame(Notes(path, {}), "again") == ""
    device = Fatal(ratios)
    assert found(device, Notes(path, {})) == "good"
    assert entry(Notes(path, {}), "k")["out"] == {"fatal": "it ended the process"}
    assert "good" not in device.proven  # what it had before was noted


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    for ratios, best in (({"a": 1.5}, "a"), ({"a": 0.5}, None)):
        path = tmp_path / f"{best}.json"
        assert found(Device(ratios), Notes(path, {})) == best
        again = Device(ratios)
        assert found(again, Notes(path, {})) == best
        assert not again.rounds
