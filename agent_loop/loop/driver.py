"""The night: propose -> check -> commit -> run -> record -> decide, until it is told to stop.

One thread decides and writes; each device's run and the agent's turn have threads of their own, which tell it how they
ended. Runs are numbered when they begin and decided in the order of their numbers.

Order on disk: what is under way (`flight.json`), the outcome, the decision, the branch. Each is written whole, and each
can be made up for from the ones before it, so the driver may be killed between any two.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from git.exc import GitError

from hotloop.agent_loop.agents.agent import Agent, AgentError
from hotloop.agent_loop.agents.brief import Facts, quoted, write_brief
from hotloop.agent_loop.agents.turn_order import Rota
from hotloop.agent_loop.decide import Decision, judge
from hotloop.agent_loop.gitrepo import Kept, NightRepo, said
from hotloop.agent_loop.loop.background import Notifier, Reporter
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.turns import Preflight, Refused, Task, take_turn
from hotloop.agent_loop.night import Flight, Night, Proposal, Row, Run
from hotloop.agent_loop.race import lessons, stopper
from hotloop.agent_loop.report.files import write_tsv
from hotloop.agent_loop.source import ProposalError, check_source, syntax_hash
from hotloop.harness.errors import DeviceError, HotloopError, RecordError, SandboxError
from hotloop.harness.experiment import LOSSES, Event, Job, Settings, forget_weights, record, run_experiment
from hotloop.harness.records.record import Outcome
from hotloop.harness.sandbox.process import end_all
from hotloop.harness.scoring.bound import Cost
from hotloop.harness.settings import BudgetRule
from hotloop.harness.text import one_line
from hotloop.harness.training.budget import held_against

__all__ = ["HEARTBEAT", "Driver", "Options", "Runner", "Slot"]

Runner = Callable[[Job, Settings, Callable[[Event], None]], Outcome]
HEARTBEAT = "heartbeat"
COLD_AFTER_S = 60.0  # without a run a card has cooled down, so it is warmed before the next calibration
BEAT_S = 2.0  # how often the driver looks around while nothing happens
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
# What may pass by itself or be mended while the driver waits.
FAULTS = (RecordError, DeviceError, SandboxError, GitError, OSError)


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


@dataclass
class Trouble:
    """Faults of the machine, one after the other, that are being waited out."""

    since: float | None = None
    pause_s: float = FIRST_PAUSE_S


@dataclass
class Slot:
    """A device that runs one experiment at a time."""

    index: int
    settings: Settings
    run: Run | None = None
    free_since: float = field(default_factory=time.monotonic)
    idle_s: float = 0.0  # before the run that is on it
    used: bool = False  # by this driver
    not_before: float = 0.0  # after a fault
    trouble: Trouble = field(default_factory=Trouble)


class Driver:
    """Args:
    agents: in the order in which they are asked.
    slots: the settings of each device.
    """

    def __init__(
        self,
        night: Night,
        repo: NightRepo,
        agents: Sequence[Agent],
        slots: Sequence[Settings],
        options: Options,
        view: View,
        runner: Runner = run_experiment,
        notifier: Notifier | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.night, self.repo, self.options, self.view, self.runner = night, repo, options, view, runner
        self.rota = Rota(agents)
        self.settings = slots[0]
        self.slots = [Slot(i, s) for i, s in enumerate(slots)]
        self.notifier, self.reporter = notifier, reporter
        self.flight = Flight()
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._turn: threading.Thread | None = None
        self._hashes: dict[int, str] = {}  # of the runs under way
        self._began = time.monotonic()
        self._decided_slots: dict[int, tuple[int, float]] = {}  # number -> slot and its idle seconds before
        self._base = ""

    def run(self) -> None:
        """Raises HotloopError where the night cannot go on; everything so far is on disk."""
        try:
            self.repo.check_name(new=self.night.settings is None)
            self.night.check_settings(self._night_settings())
            self.night.set_agents([a.name for a in self.rota.agents])
            for words in self.night.unheard():
                self.view.warn(words)
            base = self.repo.start()
            self._catch_up(base)
            self._loop()
        except HotloopError as e:
            self._tell("stopped", str(e))
            raise
        else:
            self._tell("finished", f"{self.night.folder.name}: {self.view.standing(self.night)}")
        finally:
            self._leave()

    def _loop(self) -> None:
        while True:
            self._beat()
            self._patiently(self._begin_runs)
            self._patiently(self._begin_turn)
            busy = any(s.run for s in self.slots)
            if not busy and self._over():  # also where an agent is still thinking of what would never run
                return
            busy = busy or self._turn is not None
            if not busy and self.rota.wait_s() is None and not self._next_is_known():
                raise HotloopError(
                    f"no agent has anything left to propose ({self.rota.names}); give another one and start the same "
                    f"command again"
                )
            with contextlib.suppress(queue.Empty):
                kind, *rest = self._events.get(timeout=BEAT_S if busy else min(BEAT_S, self._until_next()))
                self._patiently(lambda: getattr(self, f"_on_{kind}")(*rest))  # noqa: B023 - called at once

    def _leave(self) -> None:
        """End what still runs; what it was stays in `flight.json`."""
        end_all()
        deadline = time.monotonic() + 30.0
        for thread in (t for t in threading.enumerate() if t.name.startswith("hotloop-")):
            thread.join(max(0.0, deadline - time.monotonic()))
        if best := self.night.incumbent():  # what branch and worktree show in the morning, whatever an agent did there
            with contextlib.suppress(GitError, OSError, HotloopError):
                self._set_branch()
                self.repo.prepare(best.commit)
        if self.reporter and (problem := self.reporter.finish()):
            self.view.note(f"no report was drawn ({problem}); later: hotloop report")
        if self.notifier:
            self.notifier.finish()

    # What can be begun.

    def _begin_runs(self) -> None:
        for slot in self.slots:
            if slot.run is None and time.monotonic() >= slot.not_before:
                run = self._next_run()
                if run is None:
                    return
                self._begin(slot, run)

    def _next_run(self) -> Run | None:
        """The most pressing run that is not under way, entered into the flight."""
        active = {s.run.number for s in self.slots if s.run}
        recorded = self.night.outcomes()
        for run in self.flight.runs:
            if run.number not in active and run.number not in recorded:
                return run
        if self._late():
            return None
        if not self.night.rows():
            return None if self.flight.runs else self._new("baseline", self._base, "baseline", self.seed)
        if self.night.incumbent() is None:
            raise self._no_baseline()
        return self._noise_run() or self._second_seed_run() or self._experiment_run()

    def _noise_run(self) -> Run | None:
        commit = self._baseline_commit()
        for seed in range(self.seed + 1, self.seed + 1 + self.options.noise_seeds):
            if not self._was_begun(commit, seed):
                return self._new("repeat", commit, f"baseline, seed {seed}", seed)
        return None

    def _second_seed_run(self) -> Run | None:
        """Of a marginal gain, and of its incumbent before, where that was never run with this seed."""
        incumbent, seed = self._incumbent(), self.seed + 1
        for row in self.night.waiting() if self.options.second_seed else []:
            if not self._was_begun(incumbent.commit, seed):
                return self._new("repeat", incumbent.commit, f"the incumbent, seed {seed}", seed)
            if not self._was_begun(row.commit, seed):
                words = f"{row.description} (seed {seed})"
                return self._new("confirm", row.commit, words, seed, incumbent.commit, row.agent)
        return None

    def _experiment_run(self) -> Run | None:
        while not self._enough():
            proposal = self._again() or (self.flight.proposals[0] if self.flight.proposals else None)
            if proposal is None:
                return None
            if run := self._committed(proposal):
                return run
        return None

    def _again(self) -> Proposal | None:
        """An edit that was better than what it was made from, before something else was kept."""
        under_way = {r.again_of for r in self.flight.runs}
        for row in self.night.to_try_again():
            if row.number not in under_way and row.outcome:
                source = self.repo.source(row.commit)
                words = row.description.removesuffix(f" (seed {row.outcome.seed})")
                return Proposal(row.outcome.parent, source, words, row.agent, row.number, why=row.why)
        return None

    def _committed(self, proposal: Proposal) -> Run | None:
        """The run of a proposal, on top of the incumbent of now; None where it has become pointless."""
        incumbent = self._incumbent()
        source, words = proposal.source, proposal.description
        rest = [p for p in self.flight.proposals if p is not proposal]
        try:
            if proposal.base != incumbent.commit:
                merged = self.repo.merged(proposal.base, incumbent.commit, source)
                if merged is None:
                    raise ProposalError("discard", f"it does not fit on top of experiment {incumbent.number}")
                source, words = merged, f"{words} (on top of {incumbent.number})"
            check_source(source)
            if (digest := syntax_hash(source)) in self._seen():
                raise ProposalError("discard", f"not run, it was tried before: {words}")
        except ProposalError as e:
            self._note_turn(proposal.agent, "refused", str(e), proposal)
            self.flight.proposals = rest
            self.night.set_flight(self.flight)
            return None
        number = self._next_number()
        commit = self.repo.commit(
            source, incumbent.commit, f"{words}\n\nExperiment {number} of {self.repo.tag}.", number
        )
        self.flight.proposals = rest
        self._hashes[number] = digest
        if proposal.folder:
            self._move_turn(Path(proposal.folder), self.night.experiment_folder(number))
        p = proposal
        return self._enter(Run(
            number, "experiment", commit, incumbent.commit, words, self.seed, p.agent, p.again_of, p.agent_s,
            p.cost_usd, p.tokens, p.why,
        ))  # fmt: skip

    @staticmethod
    def _move_turn(folder: Path, to: Path) -> None:
        """The turn goes with its run; it is there to be looked at, so that it is missing is no fault."""
        with contextlib.suppress(OSError):
            to.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(to / "turn", ignore_errors=True)
            folder.rename(to / "turn")

    def _new(self, kind: str, commit: str, words: str, seed: int, parent: str = "", agent: str = "") -> Run:
        return self._enter(Run(self._next_number(), kind, commit, parent, words, seed, agent))

    def _enter(self, run: Run) -> Run:
        self.flight.runs.append(run)
        self.night.set_flight(self.flight)
        return run

    def _begin(self, slot: Slot, run: Run) -> None:
        source = self.repo.source(run.commit)
        self._hashes.setdefault(run.number, syntax_hash(source))
        incumbent = self.night.incumbent()
        budget = incumbent.outcome.budget if incumbent and incumbent.outcome else {}
        baseline = next((r.outcome for r in self.night.rows() if r.kind == "baseline" and r.outcome), None)
        parent = self.night.outcome_of(run.parent) if run.kind == "experiment" else None
        race = None
        if self.options.race and parent is not None:
            known = lessons(self.night, self.night.noise(self.options.least_gain).floor_bpb)
            race = stopper(parent, known, self.repo.tag, run.number)
        pace, late = 1.0, 1.0
        if baseline and run.kind != "baseline" and baseline.device == "cuda":  # a CPU's wall time is who else is there
            pace, late = held_against(baseline.budget, baseline.training_s)
        slot.idle_s = time.monotonic() - slot.free_since
        job = Job(
            source=source,
            number=run.number,
            tag=self.repo.tag,
            kind=run.kind,
            commit=run.commit,
            parent=run.parent,
            description=run.description,
            seed=run.seed,
            folder=self.night.experiment_folder(run.number),
            incumbent_tokens=budget.get("tokens"),
            baseline_cpu_s=baseline.training_cpu_s if baseline else None,
            pace=pace,
            late=late,
            cold=not slot.used or slot.idle_s > COLD_AFTER_S,
            budget=self.options.budget,
            stop=race,
            reference=self.night.experiment_folder(incumbent.number) / LOSSES if incumbent else None,
            baseline_cost=Cost.recorded(baseline.conditions) if baseline else None,
            keep_below=self._keep_below(run, incumbent),
        )
        slot.run, slot.used = run, True
        self.view.started(slot.index, job)
        self._thread(self._train, slot, job)

    def _keep_below(self, run: Run, incumbent: Row | None) -> float | None:
        """The score above which a run cannot be kept, whatever is kept and measured while it runs; None to say none."""
        best = self.night.score_of(incumbent.commit, self.seed) if incumbent and run.kind == "experiment" else None
        return None if best is None else best + 2.0 * self.night.noise(self.options.least_gain).floor_bpb

    def _train(self, slot: Slot, job: Job) -> None:
        """In the slot's thread."""
        try:
            outcome = self.runner(job, slot.settings, lambda event: self.view.event(slot.index, event))
        except BaseException as e:
            self._events.put(("fault", slot, e))
        else:
            self._events.put(("ran", slot, outcome))

    # Turns.

    def _begin_turn(self) -> None:
        incumbent = self.night.incumbent()
        if self._turn or incumbent is None or self._late() or self._enough(with_proposals=True):
            return
        most = self.options.max_cost_usd
        agent = self.rota.pick(free_of_cost=most is not None and self.night.cost_usd >= most)
        if agent is None or len(self.flight.proposals) >= (len(self.slots) if agent.ahead else 1):
            return
        free = [s for s in self.slots if s.run is None and time.monotonic() >= s.not_before]
        if not agent.ahead and (not free or self.flight.proposals):
            return
        number = self._next_number() + self.night.insisted  # so that whoever goes by it makes another edit at last
        source = self.repo.source(incumbent.commit)
        task = Task(
            number, incumbent.commit, source, self.settings.preset.name, self.night.history(),
            frozenset(self._seen()), self.night.new_turn_folder(), self._brief(agent, source), self.options.preflight,
        )  # fmt: skip
        self.view.turn(agent.name)
        self._turn = self._thread(self._take_turn, agent, task)

    def _take_turn(self, agent: Agent, task: Task) -> None:
        """In the turn's thread."""
        began = time.monotonic()
        try:
            made: Any = take_turn(agent, self.repo, task)
        except BaseException as e:
            made = e
        self._events.put(("turn", agent, task, made, time.monotonic() - began))

    def _on_turn(self, agent: Agent, task: Task, made: Any, seconds: float) -> None:
        self._turn = None
        self.view.turn("")
        if isinstance(made, FAULTS):
            made = AgentError(f"its worktree could not be made ready: {said(made)}")
        elif isinstance(made, BaseException) and not isinstance(made, AgentError | Refused):
            made = AgentError(f"its turn raised {type(made).__name__}: {made}")  # whatever it is, it is that agent's
        if isinstance(made, Proposal):
            self.rota.worked(agent)
            if made not in self.flight.proposals:  # this is done again after a fault
                self.flight.proposals.append(made)
            self.night.set_flight(self.flight)
        elif isinstance(made, Refused):
            self.rota.refused(agent)
            syntax = syntax_hash(made.proposal.source) if made.proposal.source != task.source else ""
            self._note_turn(agent.name, "refused", str(made), made.proposal, made.status, syntax)
            self.view.note(f"an edit of {agent.name} was refused ({made.status}): {made}")
        elif isinstance(made, AgentError):
            wait = self.rota.failed(agent, made)
            spent = Proposal("", b"", "", agent.name, None, seconds, made.cost_usd, made.tokens)
            self._note_turn(agent.name, "failed", str(made), spent)
            later = "it is not asked again" if wait == float("inf") else f"it is asked again in {wait:.0f} s"
            self.view.note(f"{agent.name}: {made}; {later}")
            if agent.ahead and (words := [w for w in self.night.unheard() if w.startswith(f"the agent {agent.name} ")]):
                self.view.warn(words[0])

    def _note_turn(
        self, agent: str, result: str, reason: str, spent: Proposal, status: str = "", syntax: str = ""
    ) -> None:
        """`syntax`: of an edit that cannot run, whatever the incumbent is."""
        self.night.chain.append(
            "turn",
            {
                "agent": agent, "result": result, "status": status, "reason": reason,
                "description": spent.description, "seconds": spent.agent_s, "cost_usd": spent.cost_usd,
                "tokens": spent.tokens, "why": spent.why, "again_of": spent.again_of,
                "syntax": syntax,
            },
        )  # fmt: skip

    def _brief(self, agent: Agent, incumbent: bytes) -> Callable[[str], str]:
        """Written here, while nothing is appended; a refusal is put in later, by the turn's own thread."""
        settings = self.settings
        device = f"{len(self.slots)} GPUs" if len(self.slots) > 1 else settings.device
        facts = Facts(
            self.options.budget or settings.preset.budget,
            settings.preset.seq_len,
            getattr(settings.dataset, "vocab_size", settings.preset.vocab_size),
            getattr(settings.dataset, "source", settings.preset.source),
            f"{device}, {settings.threads} threads",
            self.repo.source(self._baseline_commit()),
            incumbent,
            getattr(agent, "blind", False),
        )

        def written(refused: str) -> str:
            return write_brief(
                self.night, settings.preset.name, list(self.flight.runs), refused, self.options.least_gain, facts=facts
            )

        ready, mark = written(""), "%" * 400  # as long as what takes its place
        with_refusal = written(mark)
        return lambda refused: with_refusal.replace(quoted(mark, 400), quoted(refused, 400)) if refused else ready

    # What has ended.

    def _on_ran(self, slot: Slot, outcome: Outcome) -> None:
        if outcome.number not in self.night.outcomes():
            record(self.night.chain, outcome)
            if note := outcome.compiled.get("note"):
                self.view.note(f"experiment {outcome.number}: {note}")
        if slot.run is not None:
            self._decided_slots[outcome.number] = (slot.index, slot.idle_s)
            slot.run, slot.free_since, slot.trouble = None, time.monotonic(), Trouble()
        self._decide_in_order()

    def _on_fault(self, slot: Slot, error: BaseException) -> None:
        """A run that the machine spoiled is begun again; what the user must mend ends the night."""
        if slot.run is None:
            return
        slot.not_before = time.monotonic() + self._wait_for(error, slot.trouble)
        slot.run, slot.free_since = None, time.monotonic()

    def _decide_in_order(self) -> None:
        for run in sorted(self.flight.runs, key=lambda r: r.number):
            outcome = self.night.outcomes().get(run.number)
            if outcome is None:
                return
            self._decide(run, outcome)

    def _decide(self, run: Run, outcome: Outcome) -> None:
        """Record the decision where that was not done, then do what follows from it."""
        if all(r.number != run.number for r in self.night.rows()[-len(self.flight.runs) :]):
            self._record(run, outcome, self._decision(outcome))
        row = next(r for r in reversed(self.night.rows()) if r.number == run.number)
        if row.decision == "keep":
            self._set_branch()
            self.rota.incumbent_changed()
        elif row.kind == "confirm":  # with it goes what it was to confirm
            first = next(r.number for r in self.night.rows() if r.commit == outcome.commit)
            forget_weights(self.night.experiment_folder(first))
        if self.settings.store:
            folder = self.night.experiment_folder(row.number)
            self.settings.store.settle(folder, outcome.compiled.get("left"), kept=row.decision == "keep")
        if row.decision not in ("keep", "marginal") and row.kind != "baseline":
            forget_weights(self.night.experiment_folder(row.number))
        self.flight.runs = [r for r in self.flight.runs if r.number != run.number]
        self.night.set_flight(self.flight)
        self._hashes.pop(run.number, None)
        self.view.finished(row, self.night)
        self._reports()
        if row.kind == "baseline" and row.decision != "keep":
            raise self._no_baseline()
        if row.decision == "keep" and row.number > 0:
            self._tell("kept", f"{self.repo.tag} #{row.number} {row.val_bpb:.6f}: {row.description}; {row.reason}")

    def _decision(self, outcome: Outcome) -> Decision:
        noise, incumbent = self.night.noise(self.options.least_gain), self.night.incumbent()
        return judge(self.night, outcome, incumbent, self.repo.source, noise, self.options.second_seed)

    def _record(self, run: Run, outcome: Outcome, decision: Decision) -> None:
        incumbent, gain = self.night.incumbent(), None
        if incumbent and outcome.val_bpb is not None:
            # A confirmation compares under its own seed; all others with the incumbent's score.
            best = self.night.score_of(incumbent.commit, outcome.seed if outcome.kind == "confirm" else self.seed)
            gain = None if best is None else best - outcome.val_bpb
        slot, idle_s = self._decided_slots.pop(run.number, (0, 0.0))
        self.night.chain.append(
            "decision",
            {
                "number": run.number,
                "kind": run.kind,
                "commit": run.commit,
                "description": run.description,
                "decision": decision.decision,
                "reason": decision.reason,
                "gain": gain,
                "noise_bpb": self.night.noise(self.options.least_gain).floor_bpb,
                "syntax": self._hashes.get(run.number) or self._syntax(run.commit),
                "again": decision.again,
                "again_of": run.again_of,
                "agent": run.agent,
                "agent_s": run.agent_s,
                "cost_usd": run.cost_usd,
                "tokens": run.tokens,
                "why": run.why,
                "slot": slot,
                "idle_s": idle_s,
            },
        )

    def _syntax(self, commit: str) -> str:
        """Empty where git has the commit no more: what is recorded is decided all the same."""
        try:
            return syntax_hash(self.repo.source(commit))
        except HotloopError:
            return ""

    # The state.

    def _night_settings(self) -> dict[str, Any]:
        rule = self.options.budget or self.settings.preset.budget
        return {
            "preset": self.settings.preset.name,
            "device": self.settings.device,
            "threads": self.settings.threads,
            "data": self.settings.dataset.digest,
            "budget": [rule.kind, rule.amount],
            "seed": self.seed,
            "sandbox": self.settings.sandbox.level,
            "repeatable": self.settings.repeatable,
        }

    def _catch_up(self, base: str) -> None:
        """Make up for what a killed driver left undone."""
        if self.night.chain.cut_bytes:
            self.view.note(
                f"cut {self.night.chain.cut_bytes} bytes of a record that was being written when the driver died"
            )
        rows = self.night.rows()
        self._base = rows[0].commit if rows else base
        self.flight = self.night.flight()
        decided = {r.number for r in rows}
        self.flight.runs = [r for r in self.flight.runs if r.number not in decided]
        known = {r.number for r in self.flight.runs}
        for o in self.night.undecided():
            if o.number not in known:
                self.flight.runs.append(Run(o.number, o.kind, o.commit, o.parent, o.description, o.seed))
        for run in [r for r in self.flight.runs if r.number not in self.night.outcomes()]:
            try:
                self.repo.source(run.commit)
            except HotloopError as e:
                self.view.note(f"experiment {run.number} was begun and cannot be begun again: {e}")
                self.flight.runs.remove(run)
        if rows and self.night.incumbent() is None:
            raise self._no_baseline()
        for o in self.night.undecided():
            self.view.note(f"experiment {o.number} was run and not decided; deciding now")
        self._decide_in_order()
        if self.night.rows():
            self._set_branch()
            self._reports()

    def _no_baseline(self) -> HotloopError:
        row = self.night.rows()[0]
        return HotloopError(
            f"the baseline itself ended as {row.decision}: {row.reason}; see "
            f"{self.night.experiment_folder(row.number) / 'log.txt'}, mend train.py, commit, and give another --tag"
        )

    @property
    def seed(self) -> int:
        return self.options.seed

    def _incumbent(self) -> Row:
        row = self.night.incumbent()
        assert row is not None
        return row

    def _baseline_commit(self) -> str:
        return self.night.rows()[0].commit

    def _was_begun(self, commit: str, seed: int) -> bool:
        under_way = any((r.commit, r.seed) == (commit, seed) for r in self.flight.runs)
        return under_way or self.night.was_run(commit, seed)

    def _next_number(self) -> int:
        return max([self.night.next_number - 1, *(r.number for r in self.flight.runs)]) + 1

    def _seen(self) -> set[str]:
        return self.night.seen | set(self._hashes.values())

    def _late(self) -> bool:
        return self.options.hours is not None and time.monotonic() - self._began >= self.options.hours * 3600

    def _enough(self, with_proposals: bool = False) -> bool:
        if self.options.experiments is None:
            return False
        count = self.night.experiments + sum(r.kind == "experiment" for r in self.flight.runs)
        return count + with_proposals * len(self.flight.proposals) >= self.options.experiments

    def _over(self) -> bool:
        return not self.flight.runs and (self._late() or self._enough())

    def _next_is_known(self) -> bool:
        return bool(self.flight.runs or self.flight.proposals or self.night.to_try_again())

    def _until_next(self) -> float:
        """Seconds until a device or an agent may be asked again."""
        now = time.monotonic()
        waits = [s.not_before - now for s in self.slots if s.not_before > now]
        if (wait := self.rota.wait_s()) is not None:
            waits.append(wait)
        return max(0.01, min(waits, default=BEAT_S))

    def _set_branch(self) -> None:
        """Its commits are those of the kept rows, with their numbers."""
        kept, before = [], None
        for row in self.night.rows():
            if row.decision != "keep":
                continue
            if before is not None:
                kept.append(Kept(row.commit, kept_message(self.repo.tag, row, before), row.ended))
            before = row
        self.repo.set_branch(self._baseline_commit(), kept)

    # Waiting, telling, threads.

    def _patiently(self, step: Callable[[], None]) -> None:
        """Do a step that may be done again; faults of the machine are waited out."""
        trouble = Trouble()
        while True:
            try:
                return step()
            except FAULTS as e:
                time.sleep(self._wait_for(e, trouble))
                self._beat()

    def _wait_for(self, error: BaseException, trouble: Trouble) -> float:
        """How long to wait before the next try. Raises the error where waiting does not help, or not any more."""
        now = time.monotonic()
        trouble.since = now if trouble.since is None else trouble.since
        plain = isinstance(error, FAULTS) or type(error) is HotloopError
        if not plain or now - trouble.since + trouble.pause_s > self.options.patience_s:
            raise error
        wait, trouble.pause_s = trouble.pause_s, min(2 * trouble.pause_s, LONGEST_PAUSE_S)
        words = said(error)
        self.view.note(f"{words}; trying again in {wait:.0f} s")
        if trouble.pause_s >= 30.0:
            self._tell("trouble", f"{self.repo.tag}: {words}")
        return wait

    def _beat(self) -> None:
        """A sign of life for the watchdog, and for the user."""
        with contextlib.suppress(OSError):
            (self.night.folder / HEARTBEAT).touch()
        if self.reporter:
            self.reporter.look()
        if self.notifier:
            self.notifier.look()
        idle = [(time.monotonic() - s.free_since) if s.run is None else 0.0 for s in self.slots]
        self.view.state(self.night, len(self.flight.proposals), idle)

    def _tell(self, event: str, text: str) -> None:
        if self.notifier:
            self.notifier.tell(event, one_line(text))

    def _reports(self) -> None:
        """The records hold everything, so a report that cannot be written ends nothing."""
        try:
            write_tsv(self.night)
        except OSError as e:
            self.view.note(f"{e.filename or self.night.folder}: {e.strerror or e}; later: hotloop report")
        if self.reporter:
            self.reporter.want()

    def _thread(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=f"hotloop-{target.__name__}", daemon=True)
        thread.start()
        return thread


def kept_message(tag: str, row: Row, before: Row) -> str:
    """Of the branch's commit for a kept experiment: what, how much, why."""
    assert row.outcome is not None
    o = row.outcome
    gain = "" if row.gain is None else f" ({row.gain:+.6f} against the incumbent)"
    return (
        f"{row.description}\n\n"
        f"val_bpb {row.val_bpb:.6f}{gain}\n"
        f"{row.reason}\n"
        f"{o.tokens:,} tokens in {o.training_s:.1f} s, {o.num_params / 1e6:.1f} M parameters, {o.peak_mb:,.0f} MB\n\n"
        f"Experiment {row.number} of {tag}, after {before.number}"
        + (f", by {row.agent}" if row.agent else "")
        + f"; as it was run: {row.commit}\nRecord: {row.record}"
    )
