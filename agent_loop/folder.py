"""A night's folder.

runs/<tag>/
    records.jsonl    settings, agents, outcomes, decisions, agents' turns: a chain (hotloop.harness.records.chain)
    flight.json      runs that were begun and are not decided; the proposal that waits for its turn
    experiments/     a folder for each run, with the agent's turn that it came from
    turns/           a folder for each agent's turn that came to nothing or is under way
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec

from hotloop.agent_loop.night import Night
from hotloop.harness.errors import UsageError
from hotloop.harness.files import write_whole
from hotloop.harness.records.chain import Chain, Entry, canonical
from hotloop.harness.records.model import AgentsAsked, Body, NightBegun, Origin, Trial

__all__ = ["Flight", "NightFolder", "Proposal"]


class Proposal(msgspec.Struct, frozen=True):
    """An edit that an agent made and that was not begun yet.

    Attributes:
        base: the commit that it edits.
        source: the edited train.py.
        folder: of the turn that made it; empty where there was none.
    """

    base: str
    source: bytes
    description: str
    origin: Origin
    folder: str = ""


class Flight(msgspec.Struct):
    """What is under way, on disk as one file: written whole or not at all."""

    runs: list[Trial] = []
    proposals: list[Proposal] = []

    def save(self, path: Path) -> None:
        write_whole(path, canonical(msgspec.to_builtins(self)))

    @classmethod
    def load(cls, path: Path) -> Flight:
        """Of a file that is missing or not whole, nothing is under way: runs are begun anew from the records."""
        try:
            return msgspec.convert(json.loads(path.read_bytes()), cls)
        except (OSError, ValueError, RecursionError):
            return cls()


class NightFolder(Night):
    """A night and the folder that it is recorded in. What is appended is taken in at once."""

    def __init__(self, folder: Path, chain: Chain | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.chain = chain or Chain.open(folder / "records.jsonl")
        self._last_turn = 0
        for entry in self.chain.entries:
            self.take(entry)

    @classmethod
    def reading(cls, folder: Path) -> NightFolder:
        """To look at only: nothing is touched."""
        return cls(folder, Chain.read(folder / "records.jsonl"))

    def append(self, body: Body) -> Entry:
        """Raises RecordError, DiskFullError: nothing was written."""
        entry = self.chain.append(body)
        self.take(entry)
        return entry

    def set_agents(self, names: list[str]) -> None:
        """Record which agents are asked from now on, where that is news."""
        if names != self.asked:
            self.append(AgentsAsked(names))

    def check_settings(self, wanted: NightBegun) -> None:
        """Write the night's settings, or hold a resumed night to them.

        Raises:
            UsageError: resumed with other settings, so that scores would not compare; or begun when records were of
                version 1.
        """
        if self.settings is None:
            self.append(wanted)
            return
        if self.chain.entries[0].version == 1:
            raise UsageError(
                f"run tag {self.folder.name} was begun by an earlier hotloop, whose records (version 1) this one shows "
                f"and verifies and does not go on with; give another --tag"
            )
        for key in wanted.__struct_fields__:
            was, now = getattr(self.settings, key), getattr(wanted, key)
            if was != now:
                raise UsageError(
                    f"run tag {self.folder.name} was started with {key} = {was}, not {now}; scores would not compare. "
                    f"Give the same setting, or another --tag"
                )

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
