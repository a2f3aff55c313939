"""The night: propose -> check -> commit -> run -> record -> decide, until it is told to stop.

Order on disk: the proposal in flight, the outcome, the decision, the branch. Each is written whole, and each can be
made up for from the ones before it, so the driver may be killed between any two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent_loop.agents import Agent, Context
from agent_loop.decide import Decision, decide, decide_confirmed
from agent_loop.gitrepo import NightRepo
from agent_loop.live import View
from agent_loop.night import InFlight, Night, Row
from agent_loop.report import write_progress, write_tsv
from agent_loop.source import ProposalError, check_source, code_lines, syntax_hash
from harness.errors import HotloopError
from harness.experiment import Event, Job, Settings, forget_weights, record, run_experiment
from harness.record import Outcome
from harness.spec import BudgetRule

__all__ = ["Driver", "Options", "Runner"]

Runner = Callable[[Job, Settings, Callable[[Event], None]], Outcome]
MAX_FAILED_PROPOSALS = 5


@dataclass(frozen=True)
class Options:
    """How long the night goes on, and with what.

    Attributes:
        experiments: stop after so many decided ones, proposals that were not run included; None for no end.
        hours: start none after so long; None for no end.
        least_gain: the noise floor, given instead of measured.
        noise_seeds: further seeds of the baseline that measure it.
        second_seed: try a marginal gain again under another seed, and keep it when it holds on average.
    """

    seed: int = 1
    experiments: int | None = None
    hours: float | None = None
    budget: BudgetRule | None = None
    least_gain: float | None = None
    noise_seeds: int = 0
    second_seed: bool = True


class Driver:
    def __init__(
        self,
        night: Night,
        repo: NightRepo,
        agent: Agent,
        settings: Settings,
        options: Options,
        view: View,
        runner: Runner = run_experiment,
    ) -> None:
        self.night, self.repo, self.agent = night, repo, agent
        self.settings, self.options, self.view, self.runner = settings, options, view, runner

    def run(self) -> None:
        """Raises HotloopError where the night cannot go on; everything so far is on disk."""
        began = time.monotonic()
        base = self.repo.start()
        self.night.check_settings(self._night_settings())
        self._catch_up(base)
        failed = 0
        while not self._finished(began):
            number = self.night.next_number
            if number == 0:
                self._baseline(number, base, "baseline", "baseline", self.options.seed)
            elif number <= self.options.noise_seeds:
                seed = self.options.seed + number
                self._baseline(number, self._baseline_commit(), "repeat", f"baseline, seed {seed}", seed)
            elif waiting := self.night.waiting():
                self._second_seed(number, waiting)
            else:
                failed = 0 if self._experiment(number) else failed + 1
                if failed >= MAX_FAILED_PROPOSALS:
                    raise HotloopError(
                        f"{failed} proposals in a row could not be run; the last: {self.night.rows()[-1].reason}. Mend "
                        f"the agent and start the same command again"
                    )

    # The steps.

    def _night_settings(self) -> dict[str, Any]:
        rule = self.options.budget or self.settings.preset.budget
        return {
            "preset": self.settings.preset.name,
            "device": self.settings.device,
            "threads": self.settings.threads,
            "data": self.settings.dataset.digest,
            "budget": [rule.kind, rule.amount],
            "seed": self.options.seed,
            "noise_seeds": self.options.noise_seeds,
            "agent": self.agent.name,
            "sandbox": self.settings.sandbox.level,
        }

    def _finished(self, began: float) -> bool:
        experiments = sum(r.kind == "experiment" for r in self.night.rows())
        enough = self.options.experiments is not None and experiments >= self.options.experiments
        if enough and self.night.next_number > self.options.noise_seeds and not self.night.waiting():
            return True
        return self.options.hours is not None and time.monotonic() - began >= self.options.hours * 3600

    def _catch_up(self, base: str) -> None:
        """Make up for what a killed driver left undone."""
        if self.night.chain.cut_bytes:
            self.view.note(
                f"cut {self.night.chain.cut_bytes} bytes of a record that was being written when the driver died"
            )
        waiting = self.night.undecided()
        if waiting:
            self.view.note(f"experiment {waiting.number} was run and not decided; deciding now")
            self._decide(waiting)
        incumbent = self.night.incumbent()
        self.repo.reset(incumbent.commit if incumbent else base)
        if self.night.rows():
            self._reports()
            if incumbent is None:
                raise self._no_baseline()

    def _baseline_commit(self) -> str:
        return next(r.commit for r in self.night.rows() if r.kind == "baseline")

    def _baseline(self, number: int, commit: str, kind: str, description: str, seed: int) -> None:
        outcome = self._train(InFlight(number, commit, description), kind, "", seed)
        self._decide(outcome)
        if outcome.status != "ok" and kind == "baseline":
            raise self._no_baseline()

    def _no_baseline(self) -> HotloopError:
        row = self.night.rows()[0]
        return HotloopError(
            f"the baseline itself ended as {row.decision}: {row.reason}; see "
            f"{self.night.experiment_folder(row.number) / 'log.txt'}, mend train.py, commit, and give another --tag"
        )

    def _experiment(self, number: int) -> bool:
        """One experiment, proposal included; False where the proposal could not be run."""
        incumbent = self.night.incumbent()
        assert incumbent is not None
        proposal = self.night.in_flight()
        if proposal is None or proposal.number != number:
            description = ""
            try:
                description, source = self._propose(number, incumbent)
            except ProposalError as e:
                self.repo.reset(incumbent.commit)
                decision = Decision(e.status, str(e))
                self._record(
                    number, "experiment", "0" * 40, description or "a proposal that was not run", decision, None
                )
                return False
            gain_line = f"{description}\n\nExperiment {number} of {self.repo.tag}, on {incumbent.commit[:7]}."
            commit = self.repo.commit(source, incumbent.commit, gain_line, number)
            proposal = InFlight(number, commit, description)
            self.night.set_in_flight(proposal)
            self.repo.reset(incumbent.commit)
        self._decide(self._train(proposal, "experiment", incumbent.commit, self.options.seed))
        return True

    def _second_seed(self, number: int, row: Row) -> None:
        """Run a marginal gain under another seed, and its incumbent first where it was never run with that one."""
        incumbent = self.night.incumbent()
        assert incumbent is not None
        seed = self.options.seed + 1
        run = {(o.commit, o.seed) for o in self.night.outcomes().values()}
        if (incumbent.commit, seed) not in run:
            self._baseline(number, incumbent.commit, "repeat", f"the incumbent, seed {seed}", seed)
            return
        proposal = InFlight(number, row.commit, f"{row.description} (seed {seed})")
        self._decide(self._train(proposal, "confirm", incumbent.commit, seed))

    def _propose(self, number: int, incumbent: Row) -> tuple[str, bytes]:
        self.repo.reset(incumbent.commit)
        source = self.repo.source(incumbent.commit)
        seen = frozenset(syntax_hash(self.repo.source(r.commit)) for r in self.night.rows() if r.outcome)
        context = Context(
            self.repo.worktree, number, self.settings.preset.name, source, self.night.history(), seen,
            self.night.experiment_folder(number),
        )  # fmt: skip
        description = self.agent.propose(context)
        proposed = self.repo.proposed(incumbent.commit)
        if proposed == source:
            raise ProposalError("crash", "the agent left train.py as it was")
        check_source(proposed)
        if syntax_hash(proposed) in seen:
            raise ProposalError("discard", f"not run, it was tried before: {description}")
        return description, proposed

    def _train(self, proposal: InFlight, kind: str, parent: str, seed: int) -> Outcome:
        incumbent = self.night.incumbent()
        budget = incumbent.outcome.budget if incumbent and incumbent.outcome else {}
        baseline = next((r.outcome for r in self.night.rows() if r.kind == "baseline" and r.outcome), None)
        job = Job(
            source=self.repo.source(proposal.commit),
            number=proposal.number,
            tag=self.repo.tag,
            kind=kind,
            commit=proposal.commit,
            parent=parent,
            description=proposal.description,
            seed=seed,
            folder=self.night.experiment_folder(proposal.number),
            incumbent_tokens=budget.get("tokens"),
            baseline_cpu_s=baseline.training_cpu_s if baseline else None,
            budget=self.options.budget,
        )
        self.view.started(job)
        outcome = self.runner(job, self.settings, self.view.event)
        record(self.night.chain, outcome)
        return outcome

    def _decide(self, outcome: Outcome) -> None:
        if outcome.kind == "repeat" and outcome.status == "ok":
            whose = "baseline" if outcome.commit == self._baseline_commit() else "incumbent"
            decision = Decision("measured", f"the {whose}'s train.py with seed {outcome.seed}, for the noise floor")
        elif outcome.kind == "confirm":
            decision = decide_confirmed(outcome, self.night.gains(outcome), self.night.noise(self.options.least_gain))
        else:
            incumbent = self.night.incumbent()
            source = self.repo.source(outcome.commit)
            lines = code_lines(self.repo.source(incumbent.commit)) if incumbent else 0
            noise = self.night.noise(self.options.least_gain)
            decision = decide(
                outcome, code_lines(source), self.night.incumbent_score(), lines, noise, self.options.second_seed
            )
        kind, description = outcome.kind, outcome.description
        row = self._record(outcome.number, kind, outcome.commit, description, decision, outcome)
        if decision.decision == "keep":
            self.repo.reset(row.commit)
        elif kind == "confirm":  # with it goes what it was to confirm
            first = next(r.number for r in self.night.rows() if r.commit == outcome.commit)
            forget_weights(self.night.experiment_folder(first))
        if decision.decision not in ("keep", "marginal") and kind != "baseline":
            forget_weights(self.night.experiment_folder(outcome.number))

    def _record(
        self, number: int, kind: str, commit: str, description: str, decision: Decision, outcome: Outcome | None
    ) -> Row:
        incumbent, gain = self.night.incumbent(), None
        if incumbent and outcome and outcome.val_bpb is not None:
            # A confirmation compares under its own seed; all others with the incumbent's score.
            best = self.night.score_of(incumbent.commit, outcome.seed if kind == "confirm" else self.options.seed)
            gain = None if best is None else best - outcome.val_bpb
        self.night.chain.append(
            "decision",
            {
                "number": number,
                "kind": kind,
                "commit": commit,
                "description": description,
                "decision": decision.decision,
                "reason": decision.reason,
                "gain": gain,
                "noise_bpb": self.night.noise(self.options.least_gain).floor_bpb,
            },
        )
        self.night.set_in_flight(None)
        row = self.night.rows()[-1]
        self.view.finished(row)
        self._reports()
        return row

    def _reports(self) -> None:
        """The records hold everything, so a report that cannot be written ends nothing."""
        try:
            write_tsv(self.night)
            write_progress(self.night)
        except OSError as e:
            self.view.note(f"{e.filename or self.night.folder}: {e.strerror or e}; later: hotloop report")
