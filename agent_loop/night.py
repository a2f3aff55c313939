"""A night's state, as its records tell it. Nothing else is remembered, so a killed driver loses nothing.

runs/<tag>/
    records.jsonl    settings, agents, outcomes, decisions, agents' turns: a chain (hotloop.harness.records.record)
    flight.json      runs that were begun and are not decided; the proposal that waits for its turn
    experiments/     a folder for each run, with the agent's turn that it came from
    turns/           a folder for each agent's turn that came to nothing or is under way
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hotloop.agent_loop.agents.agent import Tried
from hotloop.harness.errors import UsageError
from hotloop.harness.files import write_whole
from hotloop.harness.records.record import Chain, Outcome
from hotloop.harness.scoring.score import Noise, Score
from hotloop.harness.text import one_line

__all__ = ["Flight", "Night", "Proposal", "Row", "Run"]


_BEFORE = {"repeatable": True, "profile": ""}  # settings of nights that were begun before these could be chosen
_EXTRA = ("agent", "agent_s", "cost_usd", "tokens", "why", "again", "again_of", "slot", "idle_s")


@dataclass(frozen=True)
class Proposal:
    """An edit that an agent made and that was not begun yet.

    Attributes:
        base: the commit that it edits.
        source: the edited train.py.
        agent, agent_s, cost_usd, tokens: who made it, and what that took.
        again_of: the number of the experiment whose edit it is, on top of another incumbent.
        folder: of the turn that made it; empty where there was none.
        why: the agent's hypothesis; empty where it said none.
    """

    base: str
    source: bytes
    description: str
    agent: str
    again_of: int | None = None
    agent_s: float = 0.0
    cost_usd: float = 0.0
    tokens: int = 0
    folder: str = ""
    why: str = ""


@dataclass(frozen=True)
class Run:
    """A run that was begun: what has to be known to begin it again.

    Attributes:
        kind: `baseline`, `repeat`, `experiment` or `confirm`.
        parent: the incumbent that it was made from; empty for a baseline.
        agent, agent_s, cost_usd, tokens, again_of, why: of the proposal.
    """

    number: int
    kind: str
    commit: str
    parent: str
    description: str
    seed: int
    agent: str = ""
    again_of: int | None = None
    agent_s: float = 0.0
    cost_usd: float = 0.0
    tokens: int = 0
    why: str = ""


@dataclass(frozen=True)
class Row:
    """One decided run. `outcome` is None for a proposal that was never run.

    Attributes:
        gain: over the incumbent it was compared with, in bits per byte.
        holdout_gain: the same on the holdout split; agents are never told.
        agent, agent_s, cost_usd, tokens: who proposed it, in how many seconds, for how much.
        why: its hypothesis, as the agent said it.
        again, again_of: whether its edit is to be tried again on top of what was kept meanwhile; of which one it is
            that other try.
        slot, idle_s: on which device (0 is the first), and for how long that one had waited before it.
        ended: when it was decided, UTC, ISO 8601.
        record: the hash of the decision's entry, and so of all that was written before.
    """

    number: int
    kind: str
    commit: str
    description: str
    decision: str
    reason: str
    outcome: Outcome | None
    gain: float | None
    holdout_gain: float | None = None
    agent: str = ""
    agent_s: float = 0.0
    cost_usd: float = 0.0
    tokens: int = 0
    why: str = ""
    again: bool = False
    again_of: int | None = None
    slot: int = 0
    idle_s: float = 0.0
    ended: str = ""
    record: str = ""

    @property
    def val_bpb(self) -> float | None:
        return self.outcome.val_bpb if self.outcome else None


def _told(row: Row) -> Tried:
    return Tried(row.number, row.decision, row.reason, row.description, row.val_bpb)


@dataclass
class Flight:
    """What is under way, on disk as one file: written whole or not at all."""

    runs: list[Run] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)

    def save(self, path: Path) -> None:
        proposals = [asdict(p) | {"source": base64.b85encode(p.source).decode()} for p in self.proposals]
        body = {"runs": [asdict(r) for r in self.runs], "proposals": proposals}
        write_whole(path, json.dumps(body).encode())

    @classmethod
    def load(cls, path: Path) -> Flight:
        """Of a file that is missing or not whole, nothing is under way: runs are begun anew from the records."""
        try:
            body = json.loads(path.read_bytes())
            proposals = [Proposal(**(p | {"source": base64.b85decode(p["source"])})) for p in body["proposals"]]
            return cls([Run(**r) for r in body["runs"]], proposals)
        except Exception:  # whatever reading it raises
            return cls()


class Night:
    """`runs/<tag>/` and what its chain of records says. What is read is kept, so each entry is looked at once."""

    def __init__(self, folder: Path, chain: Chain | None = None) -> None:
        self.folder = folder
        self.chain = chain or Chain.open(folder / "records.jsonl")
        self._read = 0
        self._settings: dict[str, Any] | None = None
        self._outcomes: dict[int, Outcome] = {}
        self._rows: list[Row] = []
        self._tried: list[Row] = []
        self._history: list[Tried] = []
        self._places: dict[str, list[int]] = {}  # commit -> where it stands among those
        self._experiments = 0
        self._run: set[tuple[str, int]] = set()
        self._by_commit: dict[str, Outcome] = {}
        self._scores: dict[str, dict[int, float]] = {}  # commit -> seed -> val_bpb
        self._holdouts: dict[str, dict[int, float]] = {}
        self._repeated: dict[str, None] = {}  # commits that were run for the noise floor, in order
        self._marginals: dict[int, Row] = {}
        self._again: dict[int, Row] = {}
        self._confirmed: dict[str, Row] = {}
        self._incumbent: Row | None = None
        self._seen: set[str] = set()
        self._turns: list[dict[str, Any]] = []
        self._asked: list[str] = []
        self._worked: set[str] = set()
        self._cost_usd, self._tokens = 0.0, 0
        self._refused: set[str] = set()  # syntax hashes
        self._insisted = 0
        self._last_turn = 0
        self._retried: set[int | None] = set()

    @classmethod
    def reading(cls, folder: Path) -> Night:
        """To look at only: nothing is touched."""
        return cls(folder, Chain.read(folder / "records.jsonl"))

    def _sync(self) -> None:
        """Take in what was appended since the last look."""
        entries = self.chain.entries
        while self._read < len(entries):
            entry = entries[self._read]
            self._read += 1
            body = entry["body"]
            if entry["kind"] == "night" and self._settings is None:
                self._settings = body
            elif entry["kind"] == "experiment":
                self._take_outcome(Outcome.from_dict(body))
            elif entry["kind"] == "decision":
                self._take_decision(body, entry["time"], entry["hash"])
            elif entry["kind"] == "turn":
                words = {key: one_line(str(body.get(key) or "")) for key in ("reason", "description")}
                self._turns.append(body | words | {"time": entry["time"]})
                self._retried.add(body.get("again_of"))
                if body.get("result") == "refused":  # an edit, if not one that could be run
                    self._worked.add(str(body.get("agent")))
                    if syntax := body.get("syntax"):
                        self._insisted += syntax in self._refused
                        self._refused.add(syntax)
                        self._seen.add(syntax)
                self._spent(body)
            elif entry["kind"] == "agents":
                self._asked = [str(name) for name in body["agents"]]

    def _spent(self, body: dict[str, Any]) -> None:
        self._cost_usd += float(body.get("cost_usd") or 0.0)
        self._tokens += int(body.get("tokens") or 0)

    def _take_outcome(self, outcome: Outcome) -> None:
        self._outcomes[outcome.number] = outcome
        self._run.add((outcome.commit, outcome.seed))
        if outcome.seed == (self._settings or {}).get("seed", 1):
            self._by_commit.setdefault(outcome.commit, outcome)
        for kept, score in ((self._scores, outcome.val_bpb), (self._holdouts, outcome.holdout_bpb)):
            if score is not None:
                kept.setdefault(outcome.commit, {}).setdefault(outcome.seed, score)

    def _take_decision(self, body: dict[str, Any], time: str, record: str) -> None:
        extra = {k: body[k] for k in _EXTRA if k in body}
        extra["why"] = one_line(extra.get("why", ""))
        outcome = self._outcomes.get(body["number"])
        holdout = None
        if outcome and self._incumbent and outcome.holdout_bpb is not None:
            best = self._holdouts.get(self._incumbent.commit, {}).get(outcome.seed)
            holdout = None if best is None else best - outcome.holdout_bpb
        row = Row(
            body["number"], body["kind"], body["commit"], one_line(body["description"]), body["decision"],
            one_line(body["reason"]), outcome, body["gain"], holdout, ended=time, record=record, **extra,
        )  # fmt: skip
        self._rows.append(row)
        self._spent(body)
        if row.agent:
            self._worked.add(row.agent)
        self._experiments += row.kind == "experiment"
        if body.get("syntax"):
            self._seen.add(body["syntax"])
        if row.again_of is not None:
            self._retried.add(row.again_of)
        if row.kind == "repeat" and row.val_bpb is not None:
            self._repeated[row.commit] = None
        if row.decision == "marginal":
            self._marginals[row.number] = row
        if row.again:
            self._again[row.number] = row
        if row.kind == "confirm":
            self._confirmed[row.commit] = row
        if row.decision == "keep":
            self._incumbent = row
        self._try(row)

    # What was written.

    @property
    def settings(self) -> dict[str, Any] | None:
        self._sync()
        return self._settings

    def outcomes(self) -> dict[int, Outcome]:
        self._sync()
        return self._outcomes

    def rows(self) -> list[Row]:
        """Every decided run, in order."""
        self._sync()
        return self._rows

    def turns(self) -> list[dict[str, Any]]:
        """Agents' turns that gave nothing to run, in order: agent, result (failed, or refused with its status), reason,
        description, seconds, cost_usd, tokens, time."""
        self._sync()
        return self._turns

    @property
    def seen(self) -> set[str]:
        """Syntax hashes of every train.py that was decided on, or refused because it cannot run."""
        self._sync()
        return self._seen

    @property
    def insisted(self) -> int:
        """How often an edit was made again that had been refused because it cannot run."""
        self._sync()
        return self._insisted

    def undecided(self) -> list[Outcome]:
        """Runs that were recorded before the driver died and that wait for their decision, in order."""
        decided = {r.number for r in self.rows()}
        return [o for n, o in sorted(self._outcomes.items()) if n not in decided]

    @property
    def next_number(self) -> int:
        return max((r.number for r in self.rows()[-1:]), default=-1) + 1

    def incumbent(self) -> Row | None:
        self._sync()
        return self._incumbent

    @property
    def seed(self) -> int:
        """That of all experiments but repeats and confirmations."""
        return int((self.settings or {}).get("seed", 1))

    def score_of(self, commit: str, seed: int) -> float | None:
        """The score of a commit under a seed, where it was run with one."""
        self._sync()
        return self._scores.get(commit, {}).get(seed)

    @property
    def cost_usd(self) -> float:
        """Of all turns that were recorded, whatever became of them."""
        self._sync()
        return self._cost_usd

    @property
    def tokens(self) -> int:
        """That models read and wrote, of the same."""
        self._sync()
        return self._tokens

    @property
    def asked(self) -> list[str]:
        """The agents that the night was last started with, in their order."""
        self._sync()
        return self._asked

    def set_agents(self, names: list[str]) -> None:
        """Record which agents are asked from now on, where that is news."""
        if names != self.asked:
            self.chain.append("agents", {"agents": names})

    def unheard(self) -> list[str]:
        """What to say of each agent that was asked for and has not made one edit, though it was its turn."""
        words = []
        for name in self.asked:
            failed = [t for t in self.turns() if t.get("agent") == name and t.get("result", "failed") == "failed"]
            if failed and name not in self._worked:
                last = failed[-1]["reason"]
                words.append(
                    f"the agent {name} was asked for and never made an edit; {len(failed)} turns failed, lastly: {last}"
                )
        return words

    def was_run(self, commit: str, seed: int) -> bool:
        self._sync()
        return (commit, seed) in self._run

    @property
    def experiments(self) -> int:
        """How many were decided."""
        self._sync()
        return self._experiments

    def outcome_of(self, commit: str) -> Outcome | None:
        """Of a commit under the night's seed."""
        self._sync()
        return self._by_commit.get(commit)

    def gains(self, outcome: Outcome, incumbent: str) -> list[float | None]:
        """Of a confirmation's commit over an incumbent: under the night's seed, and under its own."""
        pairs = [[self.score_of(c, s) for c in (incumbent, outcome.commit)] for s in (self.seed, outcome.seed)]
        return [None if old is None or new is None else old - new for old, new in pairs]

    def incumbent_score(self) -> Score | None:
        row = self.incumbent()
        bpb = self.score_of(row.commit, self.seed) if row else None
        return Score(bpb) if bpb is not None else None

    def noise(self, least: float | None = None) -> Noise:
        """The floor measured on the seeds of the baseline and of later incumbents, or `least` where that is given."""
        self._sync()
        measured = Noise.from_repeats(*(list(self._scores[c].values()) for c in self._repeated))
        return measured if least is None else Noise(least, measured.seeds)

    def waiting(self) -> list[Row]:
        """Marginal gains over the incumbent that wait for their second seed."""
        now = self.incumbent()
        return [r for r in self._marginal() if now and r.outcome and r.outcome.parent == now.commit]

    def to_try_again(self) -> list[Row]:
        """Edits that were better than what they were made from, which is the incumbent no more."""
        now = self.incumbent()
        late = [r for r in self._marginal() if now and r.outcome and r.outcome.parent != now.commit]
        return [r for r in (*self._again.values(), *late) if r.number not in self._retried]

    def _marginal(self) -> list[Row]:
        self._sync()
        return [r for r in self._marginals.values() if r.commit not in self._confirmed]

    def tried(self) -> list[Row]:
        """Baseline and experiments, each as it ended: a marginal gain with what its second seed decided."""
        self._sync()
        return self._tried

    def history(self) -> list[Tried]:
        """What agents are told: no repeats, no holdout."""
        self._sync()
        return list(self._history)

    def _try(self, row: Row) -> None:
        """Take a decided run in among those that were tried; a second seed's decision becomes that of its first."""
        if row.kind in ("repeat", "confirm"):
            for place in self._places.get(row.commit, []) if row.kind == "confirm" else []:
                if self._tried[place].decision == "marginal":
                    self._tried[place] = replace(self._tried[place], decision=row.decision, reason=row.reason)
                    self._history[place] = _told(self._tried[place])
            return
        if row.decision == "marginal" and (end := self._confirmed.get(row.commit)):
            row = replace(row, decision=end.decision, reason=end.reason)
        self._places.setdefault(row.commit, []).append(len(self._tried))
        self._tried.append(row)
        self._history.append(_told(row))

    def experiment_folder(self, number: int) -> Path:
        return self.folder / "experiments" / f"{number:04d}"

    def new_turn_folder(self, keep: int = 200) -> Path:
        """For the next turn; the oldest of those that came to nothing are removed, but for the last `keep`."""
        parent = self.folder / "turns"
        parent.mkdir(exist_ok=True)
        have = sorted(int(p.name) for p in parent.iterdir() if p.name.isdigit())
        for number in have[:-keep]:
            shutil.rmtree(parent / f"{number:06d}", ignore_errors=True)
        self._last_turn = max([self._last_turn, *have]) + 1
        return parent / f"{self._last_turn:06d}"

    # What is under way.

    def flight(self) -> Flight:
        return Flight.load(self.folder / "flight.json")

    def set_flight(self, flight: Flight) -> None:
        flight.save(self.folder / "flight.json")

    def check_settings(self, wanted: dict[str, Any]) -> None:
        """Write the night's settings, or hold a resumed night to them.

        Raises:
            UsageError: resumed with other settings; scores would not compare.
        """
        have = self.settings
        if have is None:
            self.chain.append("night", wanted)
            return
        for key, value in wanted.items():
            was = have.get(key, _BEFORE.get(key))
            if was != value:
                raise UsageError(
                    f"run tag {self.folder.name} was started with {key} = {was}, not {value}; scores would "
                    f"not compare. Give the same setting, or another --tag"
                )
