"""What a night's records add up to: gains by how well they are known, device seconds by phase, hours, cost.

Figures only; `agent_loop.report.page` writes them down.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hotloop.agent_loop.night import Night, Row
from hotloop.harness.records.record import FAILURES, Outcome

__all__ = ["GROUPS", "PHASES", "Bar", "Gain", "Tally"]

PHASES = ("start", "import", "compile", "calibrate", "train", "submit", "evaluate", "audit")
GROUPS = ("confirmed", "marginal", "retracted")


@dataclass(frozen=True)
class Gain:
    """A kept or marginal experiment and how well its gain is known.

    Attributes:
        group: one of GROUPS.
        why: the last word on it.
        worth: bits per byte that the edit is worth at the end, by the leave-one-out check; None without one.
    """

    row: Row
    group: str
    why: str
    worth: float | None = None


@dataclass(frozen=True)
class Bar:
    """A run on a device, in seconds since the night's first run began."""

    slot: int
    begin_s: float
    end_s: float
    decision: str
    name: str


class Tally:
    """A night, read once."""

    def __init__(self, night: Night) -> None:
        self.night = night
        self.rows = list(night.rows())
        self.tried = night.tried()
        self.decisions: dict[int, dict[str, Any]] = {b["number"]: b for b in night.chain.bodies("decision")}
        self.left_out = [e for e in night.chain.entries if e["kind"] == "leave-one-out"]
        self.turns = night.turns()

    # Scores.

    @property
    def baseline(self) -> Row | None:
        """The first with a score; without one, the first that was tried."""
        baselines = [r for r in self.tried if r.kind == "baseline"]
        return next((r for r in baselines if r.val_bpb is not None), baselines[0] if baselines else None)

    @cached_property
    def best(self) -> Row | None:
        """The incumbent, as it was tried first (not under its second seed)."""
        last = self.night.incumbent()
        return next((r for r in self.tried if last and r.commit == last.commit and r.decision == "keep"), last)

    @property
    def experiments(self) -> list[Row]:
        return [r for r in self.tried if r.kind == "experiment"]

    @property
    def kept(self) -> list[Row]:
        """Experiments whose edit the branch took."""
        return [r for r in self.experiments if r.decision == "keep"]

    @property
    def floor(self) -> float:
        """The noise floor that the last decision was made with."""
        for row in reversed(self.rows):
            if row.number in self.decisions:
                return float(self.decisions[row.number].get("noise_bpb") or 0.0)
        return self.night.noise().floor_bpb

    # Gains.

    @cached_property
    def gains(self) -> list[Gain]:
        retried = {b.get("again_of") for b in self.decisions.values()}
        confirms = {r.commit: r for r in self.rows if r.kind == "confirm"}
        checks: dict[object, dict[str, Any]] = {}
        for entry in self.left_out:
            checks[entry["body"].get("number")] = entry["body"]
        first = {r.number: r for r in self.rows}
        found = []
        for row in self.experiments:
            was_marginal = first[row.number].decision == "marginal"
            confirm = confirms.get(row.commit) if was_marginal else None
            check = checks.get(row.number) or (checks.get(confirm.number) if confirm else None)
            if row.decision == "keep":
                gain = self._kept(row, confirm)
            elif was_marginal and confirm:
                gain = Gain(row, "retracted", confirm.reason)
            elif row.decision == "marginal" and row.number not in retried:
                gain = Gain(row, "marginal", row.reason)
            else:
                continue
            found.append(_checked(gain, check) if check else gain)
        return found

    def _kept(self, row: Row, confirm: Row | None) -> Gain:
        if confirm:
            return Gain(row, "confirmed", f"#{confirm.number}: {confirm.reason}")
        floor = float(self.decisions.get(row.number, {}).get("noise_bpb") or 0.0)
        if not floor:
            return Gain(row, "marginal", f"{row.reason}; nothing tells it from luck")
        return Gain(row, "confirmed" if row.gain is not None and row.gain > floor else "marginal", row.reason)

    @property
    def paired(self) -> list[Row]:
        """Kept experiments whose gain is known on both splits."""
        return [r for r in self.kept if r.gain is not None and r.holdout_gain is not None]

    # Devices and seconds.

    @cached_property
    def _runs(self) -> list[tuple[int, datetime.datetime | None, str, str, Mapping[str, Any]]]:
        """Every run that was on a device: slot, end, decision, name, and total_s and ledger."""
        runs: list[tuple[int, datetime.datetime | None, str, str, Mapping[str, Any]]] = []
        for row in self.rows:
            if row.outcome:
                took = {"total_s": row.outcome.total_s, "ledger": row.outcome.ledger}
                runs.append((row.slot, _time(row.ended), row.decision, f"#{row.number} {row.description}", took))
        for entry in self.left_out:
            run = entry["body"].get("run")
            if isinstance(run, dict) and run.get("total_s"):
                name = f"without #{entry['body'].get('number')}"
                runs.append((int(run.get("slot") or 0), _time(entry["time"]), "measured", name, run))
        return runs

    @cached_property
    def began(self) -> datetime.datetime | None:
        """When the first run began, UTC."""
        return min(
            (end - datetime.timedelta(seconds=t["total_s"]) for _, end, _, _, t in self._runs if end), default=None
        )

    @cached_property
    def bars(self) -> list[Bar]:
        bars = []
        for slot, end, decision, name, took in self._runs:
            if end and self.began:
                end_s = (end - self.began).total_seconds()
                bars.append(Bar(slot, max(0.0, end_s - took["total_s"]), end_s, decision, name))
        return bars

    @property
    def slots(self) -> int:
        return 1 + max((r[0] for r in self._runs), default=0)

    @property
    def span_s(self) -> float:
        """From the first run's begin to the last one's end."""
        return max((b.end_s for b in self.bars), default=0.0)

    @property
    def busy_s(self) -> float:
        return float(sum(r[4]["total_s"] for r in self._runs))

    @property
    def idle_s(self) -> float:
        """That devices waited for something to run, as the driver counted it: not while it was stopped."""
        return sum(r.idle_s for r in self.rows)

    @property
    def waited_s(self) -> float:
        """At most this much of the idle time went into waiting for an agent."""
        return sum(min(r.idle_s, r.agent_s) for r in self.rows)

    @property
    def device_s(self) -> float:
        return self.busy_s + self.idle_s

    @property
    def agent_s(self) -> float:
        return sum(r.agent_s for r in self.rows) + sum(float(t.get("seconds") or 0.0) for t in self.turns)

    @property
    def cost_usd(self) -> float:
        return self.night.cost_usd

    @property
    def ledger(self) -> dict[str, float]:
        """Device seconds by phase; they add up to `device_s`."""
        total = dict.fromkeys(PHASES, 0.0)
        for *_, took in self._runs:
            for phase in PHASES:
                total[phase] += float((took.get("ledger") or {}).get(phase, 0.0))
        total["other"] = max(0.0, self.busy_s - sum(total.values()))
        total["idle"] = self.idle_s
        return total

    @property
    def starts(self) -> dict[str, list[float]]:
        """Seconds until train.py ran, of runs whose trainer was started `warm` and `cold`."""
        found: dict[str, list[float]] = {"warm": [], "cold": []}
        for row in self.rows:
            if row.outcome and row.outcome.start.get("how") in found and "import" in row.outcome.ledger:
                found[row.outcome.start["how"]].append(row.outcome.ledger["start"] + row.outcome.ledger["import"])
        return found

    @property
    def runs(self) -> int:
        return len(self._runs)

    # What failed, where it ran.

    @property
    def failed(self) -> dict[str, list[Row]]:
        """Rows by how they failed, the most frequent first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.decision in FAILURES or (row.outcome and row.outcome.status != "ok"):
                groups.setdefault(row.decision, []).append(row)
        return dict(sorted(groups.items(), key=lambda g: -len(g[1])))

    @property
    def last_outcome(self) -> Outcome | None:
        return next((r.outcome for r in reversed(self.rows) if r.outcome), None)

    @property
    def where(self) -> list[str]:
        """The devices, each once; a CPU is called one."""
        names: dict[str, None] = {}
        for row in self.rows:
            if row.outcome:
                environment = row.outcome.environment
                gpu = (environment.get("gpu") or {}).get("name", "GPU")
                cpu = f"CPU {environment.get('cpu', '')}".strip()
                names[cpu if row.outcome.device == "cpu" else str(gpu)] = None
        return list(names)


def _checked(gain: Gain, check: dict[str, Any]) -> Gain:
    verdict, worth = check.get("verdict"), check.get("worth")
    # One run that still points the same way takes back nothing that two seeds have confirmed.
    told = verdict in GROUPS and not (verdict == "marginal" and gain.group == "confirmed")
    return Gain(
        gain.row,
        str(verdict) if told else gain.group,
        f"left out at the end: {check.get('reason', '')}",
        float(worth) if isinstance(worth, int | float) else None,
    )


def _time(text: str) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
