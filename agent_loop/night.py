"""A night's state, as its records tell it. Nothing else is remembered, so a killed driver loses nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent_loop.agents import Tried
from harness.errors import UsageError
from harness.record import Chain, Outcome
from harness.score import Noise, Score

__all__ = ["InFlight", "Night", "Row"]


@dataclass(frozen=True)
class InFlight:
    """A proposal that is committed and not yet decided."""

    number: int
    commit: str
    description: str


@dataclass(frozen=True)
class Row:
    """One decided run. `outcome` is None for a proposal that was never run."""

    number: int
    kind: str
    commit: str
    description: str
    decision: str
    reason: str
    outcome: Outcome | None
    gain: float | None  # over the incumbent it was compared with

    @property
    def val_bpb(self) -> float | None:
        return self.outcome.val_bpb if self.outcome else None


class Night:
    """`runs/<tag>/` and what its chain of records says."""

    def __init__(self, folder: Path, chain: Chain | None = None) -> None:
        self.folder = folder
        self.chain = chain or Chain.open(folder / "records.jsonl")

    @classmethod
    def reading(cls, folder: Path) -> Night:
        """To look at only: nothing is touched."""
        return cls(folder, Chain.read(folder / "records.jsonl"))

    # What was written.

    @property
    def settings(self) -> dict[str, Any] | None:
        nights = self.chain.bodies("night")
        return nights[0] if nights else None

    def outcomes(self) -> dict[int, Outcome]:
        return {b["number"]: Outcome.from_dict(b) for b in self.chain.bodies("experiment")}

    def rows(self) -> list[Row]:
        """Every decided run, in order."""
        outcomes = self.outcomes()
        return [
            Row(
                d["number"],
                d["kind"],
                d["commit"],
                d["description"],
                d["decision"],
                d["reason"],
                outcomes.get(d["number"]),
                d["gain"],
            )
            for d in self.chain.bodies("decision")
        ]

    def undecided(self) -> Outcome | None:
        """A run that was recorded before the driver died and that waits for its decision."""
        decided = {d["number"] for d in self.chain.bodies("decision")}
        return next((o for n, o in sorted(self.outcomes().items()) if n not in decided), None)

    @property
    def next_number(self) -> int:
        return len(self.chain.bodies("decision"))

    def incumbent(self) -> Row | None:
        kept = [r for r in self.rows() if r.decision == "keep"]
        return kept[-1] if kept else None

    @property
    def seed(self) -> int:
        """That of all experiments but repeats and confirmations."""
        return int((self.settings or {}).get("seed", 1))

    def score_of(self, commit: str, seed: int) -> float | None:
        """The score of a commit under a seed, where it was run with one."""
        found = [o.val_bpb for o in self.outcomes().values() if (o.commit, o.seed) == (commit, seed)]
        return next((b for b in found if b is not None), None)

    def gains(self, outcome: Outcome) -> list[float | None]:
        """Of a confirmation's commit over its parent, the incumbent: under the night's seed, and under its own."""
        pairs = [[self.score_of(c, s) for c in (outcome.parent, outcome.commit)] for s in (self.seed, outcome.seed)]
        return [None if old is None or new is None else old - new for old, new in pairs]

    def incumbent_score(self) -> Score | None:
        row = self.incumbent()
        bpb = self.score_of(row.commit, self.seed) if row else None
        return Score(bpb) if bpb is not None else None

    def noise(self, least: float | None = None) -> Noise:
        """The floor measured on the seeds of the baseline and of later incumbents, or `least` where that is given."""
        rows = [r for r in self.rows() if r.val_bpb is not None]
        repeated = {r.commit for r in rows if r.kind == "repeat"}
        groups: dict[str, dict[int, float]] = {}
        for r in rows:
            if r.commit in repeated and r.outcome and r.val_bpb is not None:
                groups.setdefault(r.commit, {})[r.outcome.seed] = r.val_bpb
        measured = Noise.from_repeats(*(list(g.values()) for g in groups.values()))
        return measured if least is None else Noise(least, measured.seeds)

    def waiting(self) -> Row | None:
        """A marginal gain that waits for its second seed."""
        rows = self.rows()
        confirmed = {r.commit for r in rows if r.kind == "confirm"}
        return next((r for r in rows if r.decision == "marginal" and r.commit not in confirmed), None)

    def tried(self) -> list[Row]:
        """Baseline and experiments, each as it ended: a marginal gain with what its second seed decided."""
        rows = self.rows()
        confirmed = {r.commit: r for r in rows if r.kind == "confirm"}
        return [
            replace(r, decision=confirmed[r.commit].decision, reason=confirmed[r.commit].reason)
            if r.decision == "marginal" and r.commit in confirmed
            else r
            for r in rows
            if r.kind not in ("repeat", "confirm")
        ]

    def history(self) -> list[Tried]:
        """What agents are told: no repeats, no holdout."""
        return [Tried(r.number, r.decision, r.reason, r.description, r.val_bpb) for r in self.tried()]

    def experiment_folder(self, number: int) -> Path:
        return self.folder / "experiments" / f"{number:04d}"

    # The proposal in flight: written whole or not at all.

    @property
    def _current(self) -> Path:
        return self.folder / "current.json"

    def in_flight(self) -> InFlight | None:
        try:
            return InFlight(**json.loads(self._current.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def set_in_flight(self, proposal: InFlight | None) -> None:
        if proposal is None:
            self._current.unlink(missing_ok=True)
            return
        temporary = self._current.with_suffix(".tmp")
        temporary.write_text(json.dumps(proposal.__dict__))
        os.replace(temporary, self._current)

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
            if have.get(key) != value:
                raise UsageError(
                    f"run tag {self.folder.name} was started with {key} = {have.get(key)}, not {value}; scores would "
                    f"not compare. Give the same setting, or another --tag"
                )
