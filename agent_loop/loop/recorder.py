"""What a night writes: what is under way (`flight.json`), outcomes, decisions, turns, the branch, reports.

In that order: each is written whole and can be made up for from the ones before it, so the driver may be killed between
any two, and every method here may be called again after one that failed.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hotloop.agent_loop.decide import judge
from hotloop.agent_loop.folder import Flight, NightFolder, Proposal
from hotloop.agent_loop.gitrepo import Kept, NightRepo
from hotloop.agent_loop.loop.background import Reporter
from hotloop.agent_loop.loop.planner import Options
from hotloop.agent_loop.night import Row
from hotloop.agent_loop.report.files import write_tsv
from hotloop.agent_loop.source import ProposalError, check_source, syntax_hash
from hotloop.harness.errors import HotloopError
from hotloop.harness.experiment import Settings, forget_weights
from hotloop.harness.records.model import (
    Decided,
    Decision,
    Kind,
    NightBegun,
    Origin,
    Outcome,
    Trial,
    Turn,
    TurnResult,
)

__all__ = ["Recorder"]


class Recorder:
    """Writes what became of a run: its entry, its decision, the branch and the reports.

    Args:
        settings: of the first device.
        note: shows a line to the user.
    """

    def __init__(
        self, night: NightFolder, repo: NightRepo, settings: Settings, options: Options, note: Callable[[str], None],
        reporter: Reporter | None = None,
    ) -> None:  # fmt: skip
        self.night, self.repo, self.settings, self.options = night, repo, settings, options
        self.note, self.reporter = note, reporter
        self.flight = Flight()
        self._syntax: dict[int, str] = {}  # of the runs under way
        self._places: dict[int, tuple[int, float]] = {}  # number -> its device and that one's idle seconds before

    # The beginning.

    def open(self, agents: list[str]) -> None:
        """Begin the night, or hold it to the settings it was begun with. Raises UsageError."""
        settings = self.settings
        self.repo.check_name(new=self.night.settings is None)
        self.night.check_settings(NightBegun(
            preset=settings.preset.name,
            device=settings.device,
            threads=settings.threads,
            data=settings.dataset.digest,
            budget=self.options.budget or settings.preset.budget,
            seed=self.options.seed,
            sandbox=settings.sandbox.level,
            repeatable=settings.repeatable,
            profile=settings.profile.sha256 if settings.profile else "",
        ))  # fmt: skip
        self.night.set_agents(agents)

    def catch_up(self) -> None:
        """See what a killed driver left undone; its runs are in the flight again."""
        night = self.night
        if night.chain.cut_bytes:
            self.note(f"cut {night.chain.cut_bytes} bytes of a record that was being written when the driver died")
        decided = {r.number for r in night.rows()}
        self.flight = night.flight()
        self.flight.runs = [r for r in self.flight.runs if r.number not in decided]
        known = {r.number for r in self.flight.runs}
        for o in night.undecided():
            self.note(f"experiment {o.run.number} was run and not decided; deciding now")
            if o.run.number not in known:
                self.flight.runs.append(o.run)
        for run in [r for r in self.flight.runs if r.number not in night.outcomes]:
            try:
                self.repo.source(run.commit)
            except HotloopError as e:
                self.note(f"experiment {run.number} was begun and cannot be begun again: {e}")
                self.flight.runs.remove(run)

    # What is under way.

    def begin(self, run: Trial) -> Trial:
        if run not in self.flight.runs:
            self.flight.runs.append(run)
            self.night.set_flight(self.flight)
        return run

    def commit(self, edit: Proposal | Row, number: int) -> Trial | None:
        """The run of an edit, on top of the incumbent of now; None where it has become pointless."""
        p = edit if isinstance(edit, Proposal) else self._again(edit)
        incumbent = self.night.incumbent()
        assert incumbent is not None
        source, words = p.source, p.description
        rest = [waiting for waiting in self.flight.proposals if waiting is not p]
        try:
            if p.base != incumbent.commit:
                merged = self.repo.merged(p.base, incumbent.commit, source)
                if merged is None:
                    raise ProposalError("discard", f"it does not fit on top of experiment {incumbent.number}")
                source, words = merged, f"{words} (on top of {incumbent.number})"
            check_source(source)
            if (syntax := syntax_hash(source)) in self.seen():
                raise ProposalError("discard", f"not run, it was tried before: {words}")
        except ProposalError as e:
            self.turn(TurnResult.REFUSED, p.origin, str(e), p.description)
            self.flight.proposals = rest
            self.night.set_flight(self.flight)
            return None
        message = f"{words}\n\nExperiment {number} of {self.repo.tag}."
        commit = self.repo.commit(source, incumbent.commit, message, number)
        self.flight.proposals = rest
        self._syntax[number] = syntax
        if p.folder:
            self._move_turn(Path(p.folder), self.night.experiment_folder(number))
        run = Trial(number, Kind.EXPERIMENT, commit, incumbent.commit, words, self.options.seed, p.origin)
        return self.begin(run)

    def _again(self, row: Row) -> Proposal:
        words = row.description.removesuffix(f" (seed {row.run.seed})")
        origin = Origin(row.origin.agent, why=row.origin.why, again_of=row.number)
        return Proposal(row.run.parent, self.repo.source(row.commit), words, origin)

    @staticmethod
    def _move_turn(folder: Path, to: Path) -> None:
        """The turn goes with its run; it is there to be looked at, so that it is missing is no fault."""
        with contextlib.suppress(OSError):
            to.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(to / "turn", ignore_errors=True)
            folder.rename(to / "turn")

    def source(self, run: Trial) -> bytes:
        """The train.py of a run that begins."""
        source = self.repo.source(run.commit)
        self._syntax.setdefault(run.number, syntax_hash(source))
        return source

    def seen(self) -> frozenset[str]:
        """The syntax of all that was tried or is under way."""
        return frozenset(self.night.seen | set(self._syntax.values()))

    # Agents' turns.

    def proposed(self, proposal: Proposal) -> None:
        if proposal not in self.flight.proposals:
            self.flight.proposals.append(proposal)
        self.night.set_flight(self.flight)

    def turn(
        self, result: TurnResult, origin: Origin, reason: str, description: str = "", status: Decision | None = None,
        syntax: str = "",
    ) -> None:  # fmt: skip
        """One that gave nothing to run; `syntax`: of an edit that cannot run, whatever the incumbent is."""
        self.night.append(Turn(
            origin=origin, result=result, reason=reason, description=description, status=status, syntax=syntax
        ))  # fmt: skip

    # What has ended.

    def outcome(self, outcome: Outcome, device: int, idle_s: float) -> None:
        """Of a run on a device (0 is the first) that had waited so long before it."""
        number = outcome.run.number
        if number in self.night.outcomes:
            return
        self.night.append(outcome)
        self._places[number] = (device, idle_s)
        if outcome.compiled and outcome.compiled.note:
            self.note(f"experiment {number}: {outcome.compiled.note}")

    def to_decide(self) -> Iterator[Trial]:
        """Runs in the order of their numbers, up to the first that has no outcome yet."""
        for run in sorted(self.flight.runs, key=lambda r: r.number):
            if run.number not in self.night.outcomes:
                return
            yield run

    def decide(self, run: Trial) -> Row:
        """Record the decision where that was not done, then do what follows from it."""
        outcome = self.night.outcomes[run.number]
        if all(r.number != run.number for r in self.night.rows()[-len(self.flight.runs) :]):
            self._append_decision(run, outcome)
        row = self.night.row(run.number)
        assert row is not None
        folder = self.night.experiment_folder(row.number)
        if row.decision == Decision.KEEP:
            self.set_branch()
        elif row.kind == Kind.CONFIRM:  # with it goes what it was to confirm
            first = next(r.number for r in self.night.rows() if r.commit == row.commit)
            forget_weights(self.night.experiment_folder(first))
        if self.settings.store:
            left = outcome.compiled.left if outcome.compiled else None
            self.settings.store.settle(folder, left, kept=row.decision == Decision.KEEP)
        if row.decision not in (Decision.KEEP, Decision.MARGINAL) and row.kind != Kind.BASELINE:
            forget_weights(folder)
        self.flight.runs = [r for r in self.flight.runs if r.number != run.number]
        self.night.set_flight(self.flight)
        self._syntax.pop(run.number, None)
        return row

    def _append_decision(self, run: Trial, outcome: Outcome) -> None:
        night, second_seed = self.night, self.options.second_seed
        noise, incumbent, gain = night.noise(self.options.least_gain), night.incumbent(), None
        judgement = judge(night, outcome, incumbent, self.repo.source, noise, second_seed)
        if incumbent and outcome.val_bpb is not None:
            # A confirmation compares under its own seed; all others with the incumbent's score.
            best = night.score_of(incumbent.commit, run.seed if run.kind == Kind.CONFIRM else self.options.seed)
            gain = None if best is None else best - outcome.val_bpb
        slot, idle_s = self._places.get(run.number, (0, 0.0))
        night.append(Decided(
            run=run, judgement=judgement, gain=gain, noise_bpb=noise.floor_bpb,
            syntax=self._syntax.get(run.number) or self._syntax_of(run.commit), slot=slot, idle_s=idle_s,
        ))  # fmt: skip
        self._places.pop(run.number, None)

    def _syntax_of(self, commit: str) -> str:
        """Empty where git has the commit no more: what is recorded is decided all the same."""
        try:
            return syntax_hash(self.repo.source(commit))
        except HotloopError:
            return ""

    # What follows from the records.

    def set_branch(self) -> None:
        """Its commits are those of the kept rows, with their numbers."""
        rows = [r for r in self.night.rows() if r.decision == Decision.KEEP]
        kept = [
            Kept(row.commit, kept_message(self.repo.tag, row, before), row.ended)
            for before, row in itertools.pairwise(rows)
        ]
        self.repo.set_branch(self.night.rows()[0].commit, kept)

    def reports(self) -> None:
        """The records hold everything, so a report that cannot be written ends nothing."""
        try:
            write_tsv(self.night)
        except OSError as e:
            self.note(f"{e.filename or self.night.folder}: {e.strerror or e}; to try again: hotloop report")
        if self.reporter:
            self.reporter.want()


def kept_message(tag: str, row: Row, before: Row) -> str:
    """Of the branch's commit for a kept experiment: what, how much, why."""
    o, training = row.outcome, row.outcome.training
    gain = "" if row.gain is None else f" ({row.gain:+.6f} against the incumbent)"
    return (
        f"{row.description}\n\n"
        f"val_bpb {row.val_bpb:.6f}{gain}\n"
        f"{row.reason}\n"
        f"{training.tokens:,} tokens in {training.wall_s:.1f} s, {o.num_params / 1e6:.1f} M parameters, "
        f"{training.peak_mb:,.0f} MB\n\n"
        f"Experiment {row.number} of {tag}, after {before.number}"
        + (f", by {row.origin.agent}" if row.origin.agent else "")
        + f"; as it was run: {row.commit}\nRecord: {row.record}"
    )
