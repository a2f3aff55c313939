"""A night's state: what its entries come to. Nothing else is asked, so a killed driver loses nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

import msgspec

from hotloop.harness.errors import RecordError
from hotloop.harness.records.chain import Entry
from hotloop.harness.records.model import (
    AgentsAsked,
    Decided,
    Decision,
    Judgement,
    Kind,
    LeftOut,
    NightBegun,
    Origin,
    Outcome,
    Trial,
    Turn,
    TurnResult,
)
from hotloop.harness.scoring.score import Noise, Score
from hotloop.harness.text import one_line

__all__ = ["Night", "Pair", "Row"]


@dataclass(frozen=True)
class Row:
    """One decided run.

    Attributes:
        judgement: the last word on it: of a marginal gain that of its second seed, where `Night.tried` tells it.
        holdout_gain: as the decision's gain, on the holdout split; agents are never told.
        ended: when it was decided, UTC, ISO 8601.
        record: the hash of the decision's entry, and so of all that was written before.
    """

    decided: Decided
    outcome: Outcome
    judgement: Judgement
    holdout_gain: float | None
    ended: str
    record: str

    @property
    def run(self) -> Trial:
        return self.decided.run

    @property
    def origin(self) -> Origin:
        return self.decided.run.origin

    @property
    def number(self) -> int:
        return self.decided.run.number

    @property
    def kind(self) -> Kind:
        return self.decided.run.kind

    @property
    def commit(self) -> str:
        return self.decided.run.commit

    @property
    def description(self) -> str:
        return self.decided.run.description

    @property
    def decision(self) -> Decision:
        return self.judgement.decision

    @property
    def reason(self) -> str:
        return self.judgement.reason

    @property
    def gain(self) -> float | None:
        return self.decided.gain

    @property
    def val_bpb(self) -> float | None:
        return self.outcome.val_bpb


@dataclass(frozen=True, eq=False)
class Pair:
    """An experiment with a score, beside the incumbent that it was made from."""

    run: Outcome
    parent: Outcome
    gain: float  # bits per byte


@dataclass(eq=False)
class Night:
    """A fold: `Night.of(entries)`, or `take` one after the other. Each entry is looked at once.

    Attributes:
        settings: None before a night's first entry.
        asked: the agents that it was last started with, in their order.
        turns: those that gave nothing to run, in order.
        left_out: (when, UTC, ISO 8601; what) of each leave-one-out check.
        outcomes: by number.
        seen: syntax hashes of every train.py that was decided on, or refused because it cannot run.
        insisted: how often an edit was made again that had been refused because it cannot run.
        experiments: how many were decided.
        pairs: of those that ended with a score.
        cost_usd, tokens: of all turns, whatever became of them.
    """

    settings: NightBegun | None = None
    asked: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    left_out: list[tuple[str, LeftOut]] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    insisted: int = 0
    experiments: int = 0
    pairs: list[Pair] = field(default_factory=list)
    cost_usd: float = 0.0
    tokens: int = 0
    _rows: list[Row] = field(default_factory=list)
    _tried: list[Row] = field(default_factory=list)
    _places: dict[str, list[int]] = field(default_factory=dict)  # commit -> where it stands among those
    _run: set[tuple[str, int]] = field(default_factory=set)
    _by_commit: dict[str, Outcome] = field(default_factory=dict)
    _scores: dict[str, dict[int, float]] = field(default_factory=dict)  # commit -> seed -> val_bpb
    _holdouts: dict[str, dict[int, float]] = field(default_factory=dict)
    _repeated: dict[str, None] = field(default_factory=dict)  # commits that were run for the noise floor, in order
    _marginals: dict[int, Row] = field(default_factory=dict)
    _again: dict[int, Row] = field(default_factory=dict)
    _confirmed: dict[str, Row] = field(default_factory=dict)
    _incumbent: Row | None = None
    _worked: set[str] = field(default_factory=set)  # agents that made an edit
    _refused: set[str] = field(default_factory=set)  # syntax hashes
    _retried: set[int | None] = field(default_factory=set)

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        night = cls()
        for entry in entries:
            night.take(entry)
        return night

    def take(self, entry: Entry) -> None:
        """Raises RecordError: a decision on a run that is not on record."""
        match entry.body:
            case NightBegun() as settings:
                self.settings = self.settings or settings
            case AgentsAsked(agents):
                self.asked = agents
            case Outcome() as outcome:
                self._take_outcome(outcome)
            case Decided() as decided:
                self._take_decision(decided, entry)
            case Turn() as turn:
                self._take_turn(turn)
            case LeftOut() as left_out:
                self.left_out.append((entry.time, left_out))

    def _take_outcome(self, outcome: Outcome) -> None:
        run = outcome.run
        self.outcomes[run.number] = outcome
        self._run.add((run.commit, run.seed))
        if run.seed == self.seed:
            self._by_commit.setdefault(run.commit, outcome)
        for kept, score in ((self._scores, outcome.val_bpb), (self._holdouts, outcome.holdout_bpb)):
            if score is not None:
                kept.setdefault(run.commit, {}).setdefault(run.seed, score)

    def _take_turn(self, turn: Turn) -> None:
        self.turns.append(
            msgspec.structs.replace(turn, reason=one_line(turn.reason), description=one_line(turn.description))
        )
        self._retried.add(turn.origin.again_of)
        self._spent(turn.origin)
        if turn.result == TurnResult.REFUSED:  # an edit, if not one that could be run
            self._worked.add(turn.origin.agent)
            if turn.syntax:
                self.insisted += turn.syntax in self._refused
                self._refused.add(turn.syntax)
                self.seen.add(turn.syntax)

    def _spent(self, origin: Origin) -> None:
        self.cost_usd += origin.cost_usd
        self.tokens += origin.tokens

    def _take_decision(self, decided: Decided, entry: Entry) -> None:
        number = decided.run.number
        outcome = self.outcomes.get(number)
        if outcome is None:
            raise RecordError(f"the decision on experiment {number} has no experiment before it")
        row = _row(decided, outcome, self._holdout_gain(outcome), entry)
        self._rows.append(row)
        self._spent(row.origin)
        if row.origin.agent:
            self._worked.add(row.origin.agent)
        if row.kind == Kind.EXPERIMENT:
            self.experiments += 1
            parent = self._by_commit.get(row.run.parent)
            if parent and parent.training.tokens and parent.val_bpb is not None and row.val_bpb is not None:
                self.pairs.append(Pair(outcome, parent, parent.val_bpb - row.val_bpb))
        if decided.syntax:
            self.seen.add(decided.syntax)
        if row.origin.again_of is not None:
            self._retried.add(row.origin.again_of)
        if row.kind == Kind.REPEAT and row.val_bpb is not None:
            self._repeated[row.commit] = None
        if row.decision == Decision.MARGINAL:
            self._marginals[number] = row
        if row.judgement.again:
            self._again[number] = row
        if row.kind == Kind.CONFIRM:
            self._confirmed[row.commit] = row
        if row.decision == Decision.KEEP:
            self._incumbent = row
        self._try(row)

    def _holdout_gain(self, outcome: Outcome) -> float | None:
        if not self._incumbent or outcome.holdout_bpb is None:
            return None
        best = self._holdouts.get(self._incumbent.commit, {}).get(outcome.run.seed)
        return None if best is None else best - outcome.holdout_bpb

    def _try(self, row: Row) -> None:
        """Take a decided run in among those that were tried; a second seed's decision becomes that of its first."""
        if row.kind == Kind.CONFIRM:
            for place in self._places.get(row.commit, []):
                if self._tried[place].decision == Decision.MARGINAL:
                    self._tried[place] = replace(self._tried[place], judgement=row.judgement)
        elif row.kind != Kind.REPEAT:
            if row.decision == Decision.MARGINAL and (end := self._confirmed.get(row.commit)):
                row = replace(row, judgement=end.judgement)
            self._places.setdefault(row.commit, []).append(len(self._tried))
            self._tried.append(row)

    # What it came to.

    def rows(self) -> list[Row]:
        """Every decided run, in order."""
        return self._rows

    def tried(self) -> list[Row]:
        """Baseline and experiments, each as it ended: a marginal gain with what its second seed decided."""
        return self._tried

    def row(self, number: int) -> Row | None:
        """The decided run of a number; runs are decided in their order, so it is looked for from the end."""
        return next((r for r in reversed(self._rows) if r.number == number), None)

    def undecided(self) -> list[Outcome]:
        """Runs that were recorded before the driver died and that wait for their decision, in order."""
        decided = {r.number for r in self._rows}
        return [o for n, o in sorted(self.outcomes.items()) if n not in decided]

    @property
    def next_number(self) -> int:
        return self._rows[-1].number + 1 if self._rows else 0

    def incumbent(self) -> Row | None:
        return self._incumbent

    @property
    def seed(self) -> int:
        """That of all runs but repeats and confirmations."""
        return self.settings.seed if self.settings else 1

    def score_of(self, commit: str, seed: int) -> float | None:
        """The score of a commit under a seed, where it was run with one."""
        return self._scores.get(commit, {}).get(seed)

    def was_run(self, commit: str, seed: int) -> bool:
        return (commit, seed) in self._run

    def outcome_of(self, commit: str) -> Outcome | None:
        """Of a commit under the night's seed."""
        return self._by_commit.get(commit)

    def gains(self, outcome: Outcome, incumbent: str) -> list[float | None]:
        """Of a confirmation's commit over an incumbent: under the night's seed, and under its own."""
        run = outcome.run
        pairs = [[self.score_of(c, s) for c in (incumbent, run.commit)] for s in (self.seed, run.seed)]
        return [None if old is None or new is None else old - new for old, new in pairs]

    def incumbent_score(self) -> Score | None:
        bpb = self.score_of(self._incumbent.commit, self.seed) if self._incumbent else None
        return Score(bpb) if bpb is not None else None

    def noise(self, least: float | None = None) -> Noise:
        """The floor measured on the seeds of the baseline and of later incumbents, or `least` where that is given."""
        measured = Noise.from_repeats(*(list(self._scores[c].values()) for c in self._repeated))
        return measured if least is None else Noise(least, measured.seeds)

    def waiting(self) -> list[Row]:
        """Marginal gains over the incumbent that wait for their second seed."""
        now = self._incumbent
        return [r for r in self._marginal() if now and r.run.parent == now.commit]

    def to_try_again(self) -> list[Row]:
        """Edits that were better than what they were made from, which is the incumbent no more."""
        now = self._incumbent
        late = [r for r in self._marginal() if now and r.run.parent != now.commit]
        return [r for r in (*self._again.values(), *late) if r.number not in self._retried]

    def _marginal(self) -> list[Row]:
        return [r for r in self._marginals.values() if r.commit not in self._confirmed]

    def unheard(self) -> list[str]:
        """What to say of each agent that was asked for and has not made one edit, though it was its turn."""
        words = []
        for name in self.asked:
            failed = [t for t in self.turns if (t.origin.agent, t.result) == (name, TurnResult.FAILED)]
            if failed and name not in self._worked:
                words.append(
                    f"the agent {name} was asked for and never made an edit; {len(failed)} turns failed, lastly: "
                    f"{failed[-1].reason}"
                )
        return words


def _row(decided: Decided, outcome: Outcome, holdout_gain: float | None, entry: Entry) -> Row:
    """With all words in one line, whoever wrote them."""
    run, judgement = decided.run, decided.judgement
    origin = msgspec.structs.replace(run.origin, why=one_line(run.origin.why))
    run = msgspec.structs.replace(run, description=one_line(run.description), origin=origin)
    judgement = msgspec.structs.replace(judgement, reason=one_line(judgement.reason))
    decided = msgspec.structs.replace(decided, run=run, judgement=judgement)
    return Row(decided, outcome, judgement, holdout_gain, entry.time, entry.hash)
