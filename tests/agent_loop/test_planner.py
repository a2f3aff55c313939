"""What is run next, for each state that a night can be in; and the event loop, by a clock that tests set."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hotloop.agent_loop.agents.builtin import BuiltinAgent
from hotloop.agent_loop.folder import Flight, NightFolder, Proposal
from hotloop.agent_loop.loop.driver import Driver, Ran, Spoiled
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.planner import Options, Planner
from hotloop.harness.errors import DeviceError, UsageError
from hotloop.harness.records.chain import Entry
from hotloop.harness.records.model import Body, Conditions, EvaluatorTime, FixedBudget, Origin, Outcome, Trial
from tests.builders import make_decision, make_outcome, make_run

BASE = "b"


def outcome(number: int, kind: str, commit: str, seed: int, bpb: float, parent: str = "") -> Outcome:
    return make_outcome(run(number, kind, commit, parent, seed), bpb)


def night(*runs: tuple[str, str, int, str], cost_usd: float = 0.0) -> NightFolder:
    """Of runs (kind, commit, seed, decision); `again` for a discard whose edit is to be tried again."""
    bodies: list[Body] = []
    parent = ""
    for number, (kind, commit, seed, decision) in enumerate(runs):
        again, said = decision == "again", "discard" if decision == "again" else decision
        made = make_run(number, kind, commit=commit, parent=parent, description=commit, seed=seed, cost_usd=cost_usd)
        bodies += [make_outcome(made, 1.0), make_decision(made, said, again=again)]
        if decision == "keep":
            parent = commit
    return recorded_night(bodies)


def recorded_night(bodies: list[Body]) -> NightFolder:
    entries = [Entry("", body, "") for body in bodies]
    return NightFolder(Path("nowhere"), SimpleNamespace(entries=entries))  # type: ignore[arg-type]


BEGUN = ("baseline", BASE, 1, "keep")
NOISE = ("repeat", BASE, 2, "measured")
BETTER = ("experiment", "c1", 1, "keep")
MARGINAL = ("experiment", "c1", 1, "marginal")
EDIT = Proposal(BASE, b"x = 1", "an edit", Origin("claude"))


def run(number: int, kind: str, commit: str, parent: str = "", seed: int = 1, again_of: int | None = None) -> Trial:
    return make_run(number, kind, seed=seed, commit=commit, parent=parent, description=commit, again_of=again_of)


@pytest.mark.parametrize(
    ("recorded", "flight", "want"),
    [
        ([], Flight(), (0, "baseline", BASE, 1)),
        ([], Flight([run(0, "baseline", BASE)]), None),  # it is on a device
        ([BEGUN], Flight(), (1, "repeat", BASE, 2)),
        ([BEGUN], Flight([run(1, "repeat", BASE, seed=2)]), None),
        ([BEGUN, NOISE], Flight(), None),
        ([BEGUN, NOISE], Flight([], [EDIT]), EDIT),
        ([BEGUN, NOISE, MARGINAL], Flight([], [EDIT]), (3, "confirm", "c1", 2)),  # before any new edit
        ([BEGUN, NOISE, MARGINAL], Flight([run(3, "confirm", "c1", BASE, 2)], [EDIT]), EDIT),
        ([BEGUN, NOISE, MARGINAL, ("confirm", "c1", 2, "discard")], Flight(), None),
        ([BEGUN, NOISE, BETTER, ("experiment", "c2", 1, "marginal")], Flight(), (4, "repeat", "c1", 2)),
        ([BEGUN, NOISE, BETTER, ("experiment", "c2", 1, "again")], Flight([], [EDIT]), "the row of 3"),
        (
            [BEGUN, NOISE, BETTER, ("experiment", "c2", 1, "again")],
            Flight([run(4, "experiment", "c3", "c1", again_of=3)], [EDIT]),
            EDIT,
        ),
        ([BEGUN, NOISE, *[BETTER] * 4], Flight([], [EDIT]), None),  # as many as were asked for
        ([BEGUN, NOISE, *[BETTER] * 3], Flight([run(5, "experiment", "c9", "c1")], [EDIT]), None),
    ],
)
def test_the_most_pressing_run(recorded: list[Any], flight: Flight, want: Any) -> None:
    planner = Planner(night(*recorded), flight, Options(experiments=4, noise_seeds=1), BASE)
    found = planner.next_run({r.number for r in flight.runs}, late=False)
    if isinstance(want, tuple):
        assert isinstance(found, Trial)
        assert (found.number, found.kind, found.commit, found.seed) == want
    else:
        assert found == (planner.night.rows()[3] if isinstance(want, str) else want)


def test_what_was_begun_is_begun_again_even_when_the_hours_are_over() -> None:
    flight = Flight([run(1, "repeat", BASE, seed=2)], [EDIT])
    planner = Planner(night(BEGUN), flight, Options(), BASE)
    assert planner.next_run(set(), late=True) == flight.runs[0]
    assert planner.next_run({1}, late=True) is None
    assert not planner.over(late=True)
    flight.runs.clear()
    assert planner.over(late=True) and not planner.over(late=False)


def test_without_second_seeds_a_marginal_gain_waits_for_none() -> None:
    planner = Planner(night(BEGUN, NOISE, MARGINAL), Flight(), Options(noise_seeds=1, second_seed=False), BASE)
    assert planner.next_run(set(), late=False) is None


@pytest.mark.parametrize(
    ("ahead", "waiting", "devices", "free", "room"),
    [
        (True, 0, 1, False, True), (True, 1, 1, True, False), (True, 1, 2, False, True),
        (False, 0, 1, True, True), (False, 0, 2, False, False), (False, 1, 2, True, False),
    ],
)  # fmt: skip
def test_who_may_be_asked(ahead: bool, waiting: int, devices: int, free: bool, room: bool) -> None:
    planner = Planner(night(BEGUN), Flight([], [EDIT] * waiting), Options(), BASE)
    assert planner.has_room(ahead, devices, free) is room


def test_no_edit_is_asked_for_that_would_never_run() -> None:
    begun = night(BEGUN, BETTER, cost_usd=0.75)
    assert not Planner(night(), Flight(), Options(), BASE).wants_edits(late=False)  # no baseline yet
    assert Planner(begun, Flight(), Options(experiments=2), BASE).wants_edits(late=False)
    assert not Planner(begun, Flight(), Options(experiments=2), BASE).wants_edits(late=True)
    assert not Planner(begun, Flight([], [EDIT]), Options(experiments=2), BASE).wants_edits(late=False)
    spent = [Planner(begun, Flight(), Options(max_cost_usd=most), BASE).money_is_spent for most in (None, 1.5, 1.6)]
    assert spent == [False, True, False]


def test_a_job_knows_its_incumbents_budget_and_its_baselines_pace() -> None:
    baseline = make_outcome(
        run(0, "baseline", BASE), 1.0, device="cuda", budget=FixedBudget(tokens=4096), wall_s=300.0, cpu_s=80.0
    )  # fmt: skip
    begun = recorded_night([baseline, make_decision(baseline.run, "keep")])
    job = Planner(begun, Flight(), Options(), BASE).job(run(2, "experiment", "c1", BASE), b"x", cold=True)
    assert (job.tag, job.incumbent_tokens, job.baseline_cpu_s, job.cold) == ("nowhere", 4096, 80.0, True)
    assert job.folder == Path("nowhere/experiments/0002") and job.stop is None


def test_a_job_is_audited_by_what_its_incumbent_lost_and_fully_where_it_may_be_kept() -> None:
    baseline = make_outcome(run(0, "baseline", BASE), 1.0, conditions=Conditions(evaluate=EvaluatorTime(2.0, 3.0)))
    better = make_outcome(run(2, "experiment", "c1", BASE), 1.0)
    begun = recorded_night([
        baseline, make_decision(baseline.run, "keep"), better, make_decision(better.run, "keep")
    ])  # fmt: skip
    planner = Planner(begun, Flight(), Options(least_gain=0.01), BASE)
    job = planner.job(run(3, "experiment", "c2", "c1"), b"x", cold=True)
    assert job.reference == Path("nowhere/experiments/0002/losses.npy")
    assert job.baseline_time == EvaluatorTime(2.0, 3.0) and job.keep_below == pytest.approx(1.01)
    assert planner.job(run(3, "confirm", "c1", BASE, 2), b"x", cold=True).keep_below is None
    assert planner.job(run(3, "repeat", "c1", "", 2), b"x", cold=True).keep_below == -math.inf
    growing = Planner(begun, Flight([run(3, "repeat", BASE, "", 3)]), Options(least_gain=0.01), BASE)
    assert growing.job(run(4, "experiment", "c2", "c1"), b"x", cold=True).keep_below is None
    first = Planner(night(), Flight(), Options(), BASE).job(run(0, "baseline", BASE), b"x", cold=True)
    assert (first.reference, first.baseline_time, first.keep_below) == (None, None, None)


# ---- the event loop, without a thread


class Clock:
    s = 1000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """A driver with one device and nothing to do; its threads never start, and its clock stands."""
    state = night(BEGUN)
    state.folder = tmp_path
    settings: Any = SimpleNamespace(store=None)
    view = View(Console(quiet=True))
    driver = Driver(
        state, SimpleNamespace(), [BuiltinAgent(1)], [settings], Options(patience_s=100.0), view, clock=Clock()
    )  # type: ignore[arg-type]
    driver.planner = Planner(state, driver.recorder.flight, driver.options, BASE)
    monkeypatch.setattr(driver, "_begin_runs", lambda: None)
    monkeypatch.setattr(driver, "_begin_turn", lambda: None)
    driver.slots[0].run = run(1, "experiment", "c1", BASE)
    return driver


def test_a_write_that_fails_is_tried_again_at_its_time_and_no_sooner(
    idle: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def full(*_: object) -> None:
        tries.append(idle.clock.s)  # type: ignore[attr-defined]
        if len(tries) < 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(idle.recorder, "outcome", full)
    idle._take(Ran(idle.slots[0], outcome(1, "experiment", "c1", 1, 1.0)))
    for _ in range(40):
        idle.step()
        idle.clock.s += 0.5  # type: ignore[attr-defined]
        if idle.slots[0].run is None:
            break
    assert tries == [1000.0, 1002.0, 1006.0, 1014.0]


def test_patience_ends_by_the_clock(idle: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    began = idle.clock()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def until_it_ends() -> None:
        while True:
            idle.clock.s += idle.step() or 0.01  # type: ignore[attr-defined]

    monkeypatch.setattr(idle.recorder, "outcome", full)
    idle._take(Ran(idle.slots[0], outcome(1, "experiment", "c1", 1, 1.0)))
    with pytest.raises(OSError, match="No space"):
        until_it_ends()
    assert 60.0 < idle.clock() - began < 100.0  # the next pause would have been longer than what is left


def test_a_spoiled_run_is_begun_again_ever_later_until_patience_ends(idle: Driver) -> None:
    slot, waits = idle.slots[0], []
    lost = Spoiled(slot, DeviceError("the GPU fell off the bus"))
    for _ in range(5):
        idle._take(lost)
        assert slot.run is None
        waits.append(slot.not_before - idle.clock())
        idle.clock.s = slot.not_before  # type: ignore[attr-defined]
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0]
    with pytest.raises(DeviceError, match="off the bus"):
        idle._take(lost)
    with pytest.raises(UsageError):
        idle._take(Spoiled(slot, UsageError("what waiting does not mend")))
