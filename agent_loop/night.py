"""A night's state, as its records tell it. Nothing else is remembered, so a killed driver loses nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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

    def incumbent_score(self) -> Score | None:
        row = self.incumbent()
        return Score(row.val_bpb) if row and row.val_bpb is not None else None

    def noise(self, least: float | None = None) -> Noise:
        """The floor measured on the baseline's seeds, or `least` where that is given."""
        bpbs = [r.val_bpb for r in self.rows() if r.kind in ("baseline", "repeat") and r.val_bpb is not None]
        measured = Noise.from_repeats(bpbs)
        return measured if least is None else Noise(least, measured.seeds)

    def history(self) -> list[Tried]:
        """What agents are told: no repeats of the baseline, no holdout."""
        return [
            Tried(r.number, r.decision, r.reason, r.description, r.val_bpb) for r in self.rows() if r.kind != "repeat"
        ]

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
