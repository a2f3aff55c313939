"""What a night does next, as a function of what is known: no thread, no git, no clock, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from hotloop.agent_loop.folder import Flight, NightFolder, Proposal
from hotloop.agent_loop.loop.turns import Preflight
from hotloop.agent_loop.night import Row
from hotloop.agent_loop.race import lessons, stopper
from hotloop.harness.experiment import LOSSES, Job
from hotloop.harness.records.model import Kind, Origin, Trial
from hotloop.harness.settings import BudgetRule
from hotloop.harness.training.budget import held_against

__all__ = ["Options", "Planner"]


@dataclass(frozen=True)
class Options:
    """How long the night goes on, and with what.

    Attributes:
        experiments: stop after so many decided ones; None for no end.
        hours: start none after so long; None for no end.
        max_cost_usd: ask no agent that costs anything once they have cost this much; None for no limit.
        least_gain: the noise floor, given instead of measured.
        noise_seeds: further seeds of the baseline that measure it.
        second_seed: try a marginal gain again under another seed, and keep it when it holds on average.
        race: stop runs that cannot win (agent_loop.race).
        patience_s: how long a fault of the machine (a full disk, git's lock, a lost GPU) is waited out.
        preflight: of an edit, before it gets time on the device; None for none.
    """

    seed: int = 1
    experiments: int | None = None
    hours: float | None = None
    max_cost_usd: float | None = None
    budget: BudgetRule | None = None
    least_gain: float | None = None
    noise_seeds: int = 0
    second_seed: bool = True
    race: bool = False
    patience_s: float = 3600.0
    preflight: Preflight | None = None


@dataclass(frozen=True)
class Planner:
    """Which run is next, and whether an edit is to be asked for.

    Attributes:
        night, flight: the state: what was recorded, and what is under way.
        base: the commit that the night starts from.
    """

    night: NightFolder
    flight: Flight
    options: Options
    base: str

    def next_run(self, on_devices: Collection[int], late: bool) -> Trial | Proposal | Row | None:
        """The most pressing run.

        Args:
            on_devices: the numbers of the runs that have a device.
            late: whether the night's hours are over, so that nothing new is begun.

        Returns:
            A run; or, not committed yet, an agent's proposal, or the experiment whose edit is to be tried once more
            on top of the incumbent of now; None where nothing is to be run.
        """
        begun = [r for r in self.flight.runs if r.number not in on_devices]
        if run := next((r for r in begun if r.number not in self.night.outcomes), None):
            return run
        if late:
            return None
        if not self.night.rows():
            return None if self.flight.runs else self._new(Kind.BASELINE, self.base, "baseline", self.options.seed)
        return self._noise_run() or self._second_seed_run() or self._edit()

    def _noise_run(self) -> Trial | None:
        commit, first = self.night.rows()[0].commit, self.options.seed + 1
        for seed in range(first, first + self.options.noise_seeds):
            if not self._was_begun(commit, seed):
                return self._new(Kind.REPEAT, commit, f"baseline, seed {seed}", seed)
        return None

    def _second_seed_run(self) -> Trial | None:
        """Of a marginal gain, and of its incumbent before, where that was never run with this seed."""
        incumbent, seed = self.incumbent, self.options.seed + 1
        for row in self.night.waiting() if self.options.second_seed else []:
            if not self._was_begun(incumbent.commit, seed):
                return self._new(Kind.REPEAT, incumbent.commit, f"the incumbent, seed {seed}", seed)
            if not self._was_begun(row.commit, seed):
                words = f"{row.description} (seed {seed})"
                return self._new(Kind.CONFIRM, row.commit, words, seed, incumbent.commit, row.origin.agent)
        return None

    def _edit(self) -> Proposal | Row | None:
        """One that was better than what it was made from, before something else was kept; else the oldest proposal."""
        if self.enough():
            return None
        under_way = {r.origin.again_of for r in self.flight.runs}
        again = (r for r in self.night.to_try_again() if r.number not in under_way)
        return next(again, None) or next(iter(self.flight.proposals), None)

    def _new(self, kind: Kind, commit: str, words: str, seed: int, parent: str = "", agent: str = "") -> Trial:
        return Trial(self.next_number, kind, commit, parent, words, seed, Origin(agent))

    def _was_begun(self, commit: str, seed: int) -> bool:
        under_way = any((r.commit, r.seed) == (commit, seed) for r in self.flight.runs)
        return under_way or self.night.was_run(commit, seed)

    @property
    def incumbent(self) -> Row:
        row = self.night.incumbent()
        assert row is not None  # a night without a baseline ends
        return row

    @property
    def next_number(self) -> int:
        return max([self.night.next_number - 1, *(r.number for r in self.flight.runs)]) + 1

    def job(self, run: Trial, source: bytes, cold: bool) -> Job:
        """What the harness is told of a run of `source`; `cold`: whether its device stood idle."""
        night, options, tag = self.night, self.options, self.night.folder.name
        incumbent = night.incumbent()
        baseline = next((r.outcome for r in night.rows() if r.kind == Kind.BASELINE), None)
        parent = night.outcome_of(run.parent) if run.kind == Kind.EXPERIMENT else None
        stop = None
        if options.race and parent is not None:
            stop = stopper(parent, lessons(night, night.noise(options.least_gain).floor_bpb), tag, run.number)
        pace, late = 1.0, 1.0
        if baseline and baseline.device == "cuda":  # a CPU's wall time is who else is there
            pace, late = held_against(baseline.budget, baseline.training.wall_s)
        return Job(
            run=run,
            source=source,
            tag=tag,
            folder=night.experiment_folder(run.number),
            incumbent_tokens=incumbent.outcome.budget.tokens if incumbent else None,
            baseline_cpu_s=baseline.training.cpu_s if baseline else None,
            pace=pace,
            late=late,
            cold=cold,
            budget=options.budget,
            stop=stop,
            reference=night.experiment_folder(incumbent.number) / LOSSES if incumbent else None,
            baseline_time=baseline.conditions.evaluate if baseline else None,
            keep_below=self._keep_below(run),
        )

    def _keep_below(self, run: Trial) -> float | None:
        """The score above which a run cannot be kept; None where any may be."""
        if run.kind == Kind.REPEAT:
            return -math.inf
        if run.kind != Kind.EXPERIMENT or any(r.kind == Kind.REPEAT for r in self.flight.runs):  # the floor may grow
            return None
        best = self.night.score_of(self.incumbent.commit, self.options.seed)
        return None if best is None else best + self.night.noise(self.options.least_gain).floor_bpb

    # Agents.

    def wants_edits(self, late: bool) -> bool:
        return self.night.incumbent() is not None and not late and not self.enough(with_proposals=True)

    def has_room(self, ahead: bool, devices: int, free: bool) -> bool:
        """Whether an agent may be asked.

        Args:
            ahead: whether it works ahead, a proposal a device; else it is asked for what is run at once.
            free: whether a device waits.
        """
        return len(self.flight.proposals) < devices if ahead else free and not self.flight.proposals

    @property
    def money_is_spent(self) -> bool:
        most = self.options.max_cost_usd
        return most is not None and self.night.cost_usd >= most

    # The end.

    def enough(self, with_proposals: bool = False) -> bool:
        if self.options.experiments is None:
            return False
        count = self.night.experiments + sum(r.kind == Kind.EXPERIMENT for r in self.flight.runs)
        return count + with_proposals * len(self.flight.proposals) >= self.options.experiments

    def over(self, late: bool) -> bool:
        return not self.flight.runs and (late or self.enough())

    @property
    def next_is_known(self) -> bool:
        return bool(self.flight.runs or self.flight.proposals or self.night.to_try_again())
