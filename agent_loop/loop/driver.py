"""The night: propose -> check -> commit -> run -> record -> decide, until it is told to stop.

One thread decides and writes: the planner says what is next, the recorder writes what happened. Each device's run and
the agent's turn have threads of their own, which tell it by an event how they ended. Runs are numbered when they begin
and decided in the order of their numbers.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from git.exc import GitError

from hotloop.agent_loop.agents.agent import Agent, AgentError, Tried
from hotloop.agent_loop.agents.turn_order import TurnOrder
from hotloop.agent_loop.backoff import Backoff
from hotloop.agent_loop.folder import NightFolder, Proposal
from hotloop.agent_loop.gitrepo import NightRepo, said
from hotloop.agent_loop.loop.background import Notifier, Reporter
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.planner import Options, Planner
from hotloop.agent_loop.loop.recorder import Recorder
from hotloop.agent_loop.loop.turns import Refused, Task, brief_writer, take_turn
from hotloop.agent_loop.loop.watchdog import HEARTBEAT
from hotloop.agent_loop.night import Row
from hotloop.agent_loop.source import syntax_hash
from hotloop.harness.errors import DeviceError, HotloopError, RecordError, SandboxError
from hotloop.harness.experiment import Event, Job, Settings, run_experiment
from hotloop.harness.records.model import Decision, Kind, Origin, Outcome, Trial, TurnResult
from hotloop.harness.sandbox.process import end_all
from hotloop.harness.text import one_line

__all__ = ["Driver", "Runner"]

Runner = Callable[[Job, Settings, Callable[[Event], None]], Outcome]
COLD_AFTER_S = 60.0  # without a run a card has cooled down, so it is warmed before the next calibration
BEAT_S = 2.0  # how often the driver looks around while nothing happens
FIRST_PAUSE_S, LONGEST_PAUSE_S, TROUBLE_S = 2.0, 300.0, 15.0  # the user is told of a pause as long as the last
# What may pass by itself or be mended while the driver waits.
PASSING = (RecordError, DeviceError, SandboxError, GitError, OSError)


class Trouble:
    """Faults of the machine, one after the other, that are being waited out."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)

    def pause_s(self, error: BaseException, now: float, patience_s: float) -> float:
        """Until the next try. Raises the error where waiting does not help, or not any more."""
        self._since = now if self._since is None else self._since
        pause_s = self._backoff.next_s()
        if not (isinstance(error, PASSING) or type(error) is HotloopError) or now - self._since + pause_s > patience_s:
            raise error
        return pause_s


@dataclass
class Slot:
    """A device that runs one experiment at a time; times are of the driver's clock."""

    index: int
    settings: Settings
    free_since: float
    run: Trial | None = None
    idle_s: float = 0.0  # before the run that is on it
    used: bool = False  # by this driver
    not_before: float = 0.0  # after a fault
    trouble: Trouble = field(default_factory=Trouble)


@dataclass(frozen=True)
class Ran:
    """A run has ended, whatever its status."""

    slot: Slot
    outcome: Outcome


@dataclass(frozen=True)
class Spoiled:
    """A run has no outcome, by no fault of its train.py."""

    slot: Slot
    error: BaseException


@dataclass(frozen=True)
class TurnEnded:
    """An agent's turn has ended with a proposal, or with what it raised."""

    agent: Agent
    task: Task
    made: Proposal | BaseException
    seconds: float


class Driver:
    """The event loop of a night: it begins what the planner names and waits for what ends.

    Args:
        agents: in the order in which they are asked.
        slots: the settings of each device.
        clock: seconds, monotonic.
    """

    def __init__(
        self, night: NightFolder, repo: NightRepo, agents: Sequence[Agent], slots: Sequence[Settings], options: Options,
        view: View, runner: Runner = run_experiment, notifier: Notifier | None = None,
        reporter: Reporter | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.night, self.repo, self.options, self.view, self.runner = night, repo, options, view, runner
        self.notifier, self.reporter, self.clock = notifier or Notifier("", "", view.note), reporter, clock
        self.turn_order = TurnOrder(agents, clock)
        self.slots = [Slot(i, s, clock()) for i, s in enumerate(slots)]
        self.recorder = Recorder(night, repo, slots[0], options, view.note, reporter)
        self._events: queue.SimpleQueue[Ran | Spoiled | TurnEnded] = queue.SimpleQueue()
        self._unhandled: deque[Ran | TurnEnded] = deque()
        self._turn: threading.Thread | None = None
        self._began = clock()
        self._trouble, self._not_before = Trouble(), 0.0

    def run(self) -> None:
        """Raises HotloopError where the night cannot go on; everything so far is on disk."""
        try:
            self._start()
            while (wait_s := self.step()) is not None:
                with contextlib.suppress(queue.Empty):
                    self._take(self._events.get(timeout=wait_s))
        except HotloopError as e:
            self._tell("stopped", str(e))
            raise
        else:
            self._tell("finished", f"{self.night.folder.name}: {self.view.standing(self.night)}")
        finally:
            self._leave()

    def _start(self) -> None:
        self.recorder.open([a.name for a in self.turn_order.agents])
        for words in self.night.unheard():
            self.view.warn(words)
        base, rows = self.repo.start(), self.night.rows()
        if rows and self.night.incumbent() is None:
            raise self._no_baseline(rows[0])
        self.recorder.catch_up()
        self.planner = Planner(self.night, self.recorder.flight, self.options, rows[0].commit if rows else base)
        self._decide()
        if self.night.rows():
            self.recorder.set_branch()
            self.recorder.reports()

    def step(self) -> float | None:
        """Do all that can be done now; faults of the machine are waited out.

        Returns:
            How many seconds to wait for an event before the next step; None at the end of the night.
        """
        self._beat()
        if (pause_s := self._not_before - self.clock()) > 0:
            return min(BEAT_S, pause_s)
        try:
            while self._unhandled:
                self._handle(self._unhandled[0])
                self._unhandled.popleft()
            self._begin_runs()
            self._begin_turn()
        except PASSING as e:
            self._not_before = self._wait_for(e, self._trouble)
            return 0.0
        self._trouble = Trouble()
        busy = any(s.run for s in self.slots)
        if not busy and self.planner.over(self._late()):
            return None  # what an agent may still be thinking of would never run
        if busy or self._turn is not None:
            return BEAT_S
        if self.turn_order.wait_s() is None and not self.planner.next_is_known:
            raise HotloopError(
                f"no agent has anything left to propose ({self.turn_order.names}); give another one and start the same "
                f"command again"
            )
        return min(BEAT_S, self._until_next())

    def _leave(self) -> None:
        """End what still runs; what it was stays in `flight.json`."""
        end_all()
        deadline = time.monotonic() + 30.0
        for thread in (t for t in threading.enumerate() if t.name.startswith("hotloop-")):
            thread.join(max(0.0, deadline - time.monotonic()))
        if best := self.night.incumbent():  # what branch and worktree show in the morning, whatever an agent did there
            with contextlib.suppress(GitError, OSError, HotloopError):
                self.recorder.set_branch()
                self.repo.prepare(best.commit)
        if self.reporter and (problem := self.reporter.finish()):
            self.view.note(f"the report could not be drawn ({problem}); to try again: hotloop report")
        self.notifier.finish()

    # Runs.

    def _begin_runs(self) -> None:
        for slot in self.slots:
            if slot.run is None and self.clock() >= slot.not_before:
                run = self._next_run()
                if run is None:
                    return
                self._begin(slot, run)

    def _next_run(self) -> Trial | None:
        while True:
            on_devices = {s.run.number for s in self.slots if s.run}
            plan = self.planner.next_run(on_devices, self._late())
            if plan is None:
                return None
            if isinstance(plan, Trial):
                return self.recorder.begin(plan)
            if run := self.recorder.commit(plan, self.planner.next_number):
                return run

    def _begin(self, slot: Slot, run: Trial) -> None:
        source = self.recorder.source(run)
        slot.idle_s = self.clock() - slot.free_since
        job = self.planner.job(run, source, cold=not slot.used or slot.idle_s > COLD_AFTER_S)
        slot.run, slot.used = run, True
        self.view.started(slot.index, job)
        self._thread(self._train, slot, job)

    def _train(self, slot: Slot, job: Job) -> None:
        """In the slot's thread."""
        try:
            outcome = self.runner(job, slot.settings, lambda event: self.view.event(slot.index, event))
        except BaseException as e:
            self._events.put(Spoiled(slot, e))
        else:
            self._events.put(Ran(slot, outcome))

    # Turns.

    def _begin_turn(self) -> None:
        incumbent = self.night.incumbent()
        if self._turn or incumbent is None or not self.planner.wants_edits(self._late()):
            return
        agent = self.turn_order.pick(free_of_cost=self.planner.money_is_spent)
        free = any(s.run is None and self.clock() >= s.not_before for s in self.slots)
        if agent is None or not self.planner.has_room(agent.ahead, len(self.slots), free):
            return
        source, settings = self.repo.source(incumbent.commit), self.slots[0].settings
        brief = brief_writer(
            self.night, self.recorder.flight.runs, settings, self.options.budget, self.options.least_gain,
            len(self.slots), self.repo.source(self.night.rows()[0].commit), source, getattr(agent, "blind", False),
        )  # fmt: skip
        task = Task(
            # One more for each edit that was insisted on, so that whoever goes by it makes another one at last.
            self.planner.next_number + self.night.insisted, incumbent.commit, source, settings.preset.name,
            [Tried.told(r) for r in self.night.tried()], self.recorder.seen(), self.night.new_turn_folder(), brief,
            self.options.preflight,
        )  # fmt: skip
        self.view.turn(agent.name)
        self._turn = self._thread(self._take_turn, agent, task)

    def _take_turn(self, agent: Agent, task: Task) -> None:
        """In the turn's thread."""
        began = self.clock()
        try:
            made: Proposal | BaseException = take_turn(agent, self.repo, task)
        except BaseException as e:
            made = e
        self._events.put(TurnEnded(agent, task, made, self.clock() - began))

    # Events.

    def _take(self, event: Ran | Spoiled | TurnEnded) -> None:
        """A run that the machine spoiled is begun again, later; what the user must mend ends the night."""
        if not isinstance(event, Spoiled):
            self._unhandled.append(event)
            return
        slot = event.slot
        slot.not_before = self._wait_for(event.error, slot.trouble)
        slot.run, slot.free_since = None, self.clock()

    def _handle(self, event: Ran | TurnEnded) -> None:
        """May be done again, after a fault of the machine."""
        if isinstance(event, TurnEnded):
            self._turn_ended(event)
            return
        slot = event.slot
        self.recorder.outcome(event.outcome, slot.index, slot.idle_s)
        if slot.run is not None:
            slot.run, slot.free_since, slot.trouble = None, self.clock(), Trouble()
        self._decide()

    def _turn_ended(self, event: TurnEnded) -> None:
        agent, made = event.agent, event.made
        self._turn = None
        self.view.turn("")
        if isinstance(made, PASSING):
            made = AgentError(f"its worktree could not be made ready: {said(made)}")
        elif isinstance(made, BaseException) and not isinstance(made, AgentError | Refused):
            made = AgentError(f"its turn raised {type(made).__name__}: {made}")  # whatever it is, it is that agent's
        if isinstance(made, Proposal):
            self.recorder.proposed(made)
            self.turn_order.worked(agent)
        elif isinstance(made, Refused):
            syntax = syntax_hash(made.proposal.source) if made.proposal.source != event.task.source else ""
            p, status = made.proposal, Decision(made.status)
            self.recorder.turn(TurnResult.REFUSED, p.origin, str(made), p.description, status, syntax)
            self.turn_order.refused(agent)
            self.view.note(f"an edit of {agent.name} was refused ({made.status}): {made}")
        elif isinstance(made, AgentError):
            spent = Origin(agent.name, event.seconds, made.cost_usd, made.tokens)
            self.recorder.turn(TurnResult.FAILED, spent, str(made))
            wait = self.turn_order.failed(agent, made)
            later = "it is not asked again" if wait == float("inf") else f"it is asked again in {wait:.0f} s"
            self.view.note(f"{agent.name}: {made}; {later}")
            if agent.ahead and (words := [w for w in self.night.unheard() if w.startswith(f"the agent {agent.name} ")]):
                self.view.warn(words[0])

    def _decide(self) -> None:
        for run in self.recorder.to_decide():
            row = self.recorder.decide(run)
            self.turn_order.ran(row.run.origin.agent, row.decision)
            if row.decision == Decision.KEEP:
                self.turn_order.incumbent_changed()
            self.view.finished(row, self.night)
            self.recorder.reports()
            if row.kind == Kind.BASELINE and row.decision != Decision.KEEP:
                raise self._no_baseline(row)
            if row.decision == Decision.KEEP and row.number > 0:
                tag = self.night.folder.name
                self._tell("kept", f"{tag} #{row.number} {row.val_bpb:.6f}: {row.description}; {row.reason}")

    def _no_baseline(self, row: Row) -> HotloopError:
        return HotloopError(
            f"the baseline itself ended as {row.decision}: {row.reason}; see "
            f"{self.night.experiment_folder(row.number) / 'log.txt'}, mend train.py, commit, and give another --tag"
        )

    # Time, and telling.

    def _late(self) -> bool:
        return self.options.hours is not None and self.clock() - self._began >= self.options.hours * 3600

    def _until_next(self) -> float:
        """Seconds until a device or an agent may be asked again."""
        waits = [w for s in self.slots if (w := s.not_before - self.clock()) > 0]
        if (wait := self.turn_order.wait_s()) is not None:
            waits.append(wait)
        return max(0.01, min(waits, default=BEAT_S))

    def _wait_for(self, error: BaseException, trouble: Trouble) -> float:
        """When to try again. Raises the error where waiting does not help, or not any more."""
        now = self.clock()
        pause_s = trouble.pause_s(error, now, self.options.patience_s)
        words = said(error)
        self.view.note(f"{words}; trying again in {pause_s:.0f} s")
        if pause_s >= TROUBLE_S:
            self._tell("trouble", f"{self.night.folder.name}: {words}")
        return now + pause_s

    def _beat(self) -> None:
        """A sign of life for the watchdog, and for the user."""
        with contextlib.suppress(OSError):
            (self.night.folder / HEARTBEAT).touch()
        if self.reporter:
            self.reporter.look()
        self.notifier.look()
        idle = [(self.clock() - s.free_since) if s.run is None else 0.0 for s in self.slots]
        self.view.state(self.night, len(self.recorder.flight.proposals), idle)

    def _tell(self, event: str, text: str) -> None:
        self.notifier.tell(event, one_line(text))

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=f"hotloop-{target.__name__}", daemon=True)
        thread.start()
        return thread
