"""What a night's records add up to: gains by how well they are known, device seconds by phase, hours, cost.

Figures only; `agent_loop.report.page` writes them down.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cached_property

from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.night import Row
from hotloop.harness.records.model import Decision, Kind, Ledger, LeftOut, Outcome, Worth

__all__ = ["GROUPS", "Bar", "Gain", "Point", "Progress", "Tally"]

GROUPS = (Worth.CONFIRMED, Worth.MARGINAL, Worth.RETRACTED)


@dataclass(frozen=True)
class Gain:
    """A kept or marginal experiment and how well its gain is known.

    Attributes:
        group: one of GROUPS.
        why: the last word on it.
        worth: bits per byte that the edit is worth at the end, by the leave-one-out check; None without one.
    """

    row: Row
    group: Worth
    why: str
    worth: float | None = None


@dataclass(frozen=True)
class Bar:
    """A run on a device, until `ended`, UTC."""

    slot: int
    ended: datetime.datetime
    decision: Decision
    name: str
    outcome: Outcome

    @property
    def began(self) -> datetime.datetime:
        return self.ended - datetime.timedelta(seconds=self.outcome.total_s)


Point = tuple[Row, float]  # a run and its val_bpb


@dataclass(frozen=True)
class Progress:
    """What each picture of a night's scores shows.

    Attributes:
        kept, others: in the order of their numbers; of the others, those that are on the chart, and those `above` it.
        line: (number, val_bpb) of the incumbents, to the end of the chart.
        floor: the noise floor, on both sides of the line; 0 where it was not measured.
        low, high: what the axis shows: all that was kept; a run that went wrong must not flatten the rest.
    """

    kept: list[Point]
    others: list[Point]
    above: list[Point]
    line: list[tuple[float, float]]
    floor: float
    low: float
    high: float
    end: float


class Tally:
    """A night, read once."""

    def __init__(self, night: NightFolder) -> None:
        self.night = night
        self.rows, self.tried, self.turns = night.rows(), night.tried(), night.turns

    # Scores.

    @property
    def baseline(self) -> Row | None:
        """The first with a score; without one, the first that was tried."""
        baselines = [r for r in self.tried if r.kind == Kind.BASELINE]
        return next((r for r in baselines if r.val_bpb is not None), baselines[0] if baselines else None)

    @cached_property
    def best(self) -> Row | None:
        """The incumbent, as it was tried first (not under its second seed)."""
        last = self.night.incumbent()
        return next((r for r in self.tried if last and r.commit == last.commit and r.decision == Decision.KEEP), last)

    @property
    def experiments(self) -> list[Row]:
        return [r for r in self.tried if r.kind == Kind.EXPERIMENT]

    @property
    def kept(self) -> list[Row]:
        """Experiments whose edit the branch took."""
        return [r for r in self.experiments if r.decision == Decision.KEEP]

    @property
    def floor(self) -> float:
        """The noise floor that the last decision was made with."""
        return self.rows[-1].decided.noise_bpb if self.rows else 0.0

    @cached_property
    def progress(self) -> Progress | None:
        """None without a score."""
        scored = [(r, r.val_bpb) for r in self.tried if r.val_bpb is not None]
        if not scored:
            return None
        kept = sorted((p for p in scored if p[0].decision == Decision.KEEP), key=lambda p: p[0].number)
        scores, floor = sorted(bpb for _, bpb in scored), self.floor
        most = max((bpb for _, bpb in kept), default=scores[len(scores) // 2])
        span = max(most - scores[0], 2 * floor, 1e-4)
        top = max(bpb for bpb in scores if bpb <= most + 0.4 * span)
        margin = max(0.1 * span, 1.2 * floor)
        others = [p for p in scored if p[0].decision != Decision.KEEP]
        end = max(r.number for r in self.rows) + 0.5
        line = [(float(r.number), bpb) for r, bpb in kept]
        return Progress(
            kept, [p for p in others if p[1] <= top], [p for p in others if p[1] > top],
            [*line, (end, line[-1][1])] if line else [], floor, scores[0] - margin, top + margin, end,
        )  # fmt: skip

    # Gains.

    @cached_property
    def gains(self) -> list[Gain]:
        retried = {r.origin.again_of for r in self.rows}
        confirms = {r.commit: r for r in self.rows if r.kind == Kind.CONFIRM}
        checks = {left_out.number: left_out for _, left_out in self.night.left_out}
        found = []
        for row in self.experiments:
            was_marginal = row.decided.judgement.decision == Decision.MARGINAL
            confirm = confirms.get(row.commit) if was_marginal else None
            check = checks.get(row.number) or (checks.get(confirm.number) if confirm else None)
            if row.decision == Decision.KEEP:
                gain = self._kept(row, confirm)
            elif was_marginal and confirm:
                gain = Gain(row, Worth.RETRACTED, confirm.reason)
            elif row.decision == Decision.MARGINAL and row.number not in retried:
                gain = Gain(row, Worth.MARGINAL, row.reason)
            else:
                continue
            found.append(_checked(gain, check) if check else gain)
        return found

    def _kept(self, row: Row, confirm: Row | None) -> Gain:
        if confirm:
            return Gain(row, Worth.CONFIRMED, f"#{confirm.number}: {confirm.reason}")
        floor = row.decided.noise_bpb
        if not floor:
            return Gain(row, Worth.MARGINAL, f"{row.reason}; nothing tells it from luck")
        above = row.gain is not None and row.gain > floor
        return Gain(row, Worth.CONFIRMED if above else Worth.MARGINAL, row.reason)

    @property
    def paired(self) -> list[Row]:
        """Kept experiments whose gain is known on both splits."""
        return [r for r in self.kept if r.gain is not None and r.holdout_gain is not None]

    # Devices and seconds.

    @cached_property
    def bars(self) -> list[Bar]:
        """Every run that was on a device."""
        bars = [
            Bar(r.decided.slot, _time(r.ended), r.decision, f"#{r.number} {r.description}", r.outcome)
            for r in self.rows
        ]
        for ended, left_out in self.night.left_out:
            if left_out.outcome:
                name = f"without #{left_out.number}"
                bars.append(Bar(0, _time(ended), Decision.MEASURED, name, left_out.outcome))
        return bars

    @property
    def began(self) -> datetime.datetime | None:
        """When the first run began, UTC."""
        return min((bar.began for bar in self.bars), default=None)

    @property
    def slots(self) -> int:
        return 1 + max((bar.slot for bar in self.bars), default=0)

    @property
    def span_s(self) -> float:
        """From the first run's begin to the last one's end."""
        return (max(bar.ended for bar in self.bars) - self.began).total_seconds() if self.began else 0.0

    @property
    def busy_s(self) -> float:
        return sum((bar.outcome.total_s for bar in self.bars), 0.0)

    @property
    def idle_s(self) -> float:
        """That devices waited for something to run, as the driver counted it: not while it was stopped."""
        return sum(r.decided.idle_s for r in self.rows)

    @property
    def waited_s(self) -> float:
        """At most this much of the idle time went into waiting for an agent."""
        return sum(min(r.decided.idle_s, r.origin.seconds) for r in self.rows)

    @property
    def device_s(self) -> float:
        return self.busy_s + self.idle_s

    @property
    def agent_s(self) -> float:
        return sum(r.origin.seconds for r in self.rows) + sum(t.origin.seconds for t in self.turns)

    @property
    def ledger(self) -> dict[str, float]:
        """Device seconds by phase; they add up to `device_s`."""
        total = dict(sum((bar.outcome.ledger for bar in self.bars), Ledger()).items())
        return total | {"other": max(0.0, self.busy_s - sum(total.values())), "idle": self.idle_s}

    def starts(self, how: str) -> list[float]:
        """Seconds until train.py ran, of runs whose trainer was started `warm` or `cold`."""
        ledgers = [r.outcome.ledger for r in self.rows if r.outcome.training.start.how == how]
        return [ledger.start + ledger.import_ for ledger in ledgers if ledger.import_]

    # What failed, where it ran.

    @property
    def failed(self) -> dict[str, list[Row]]:
        """Rows by how they failed, the most frequent first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.decision.failed:
                groups.setdefault(row.decision, []).append(row)
        return dict(sorted(groups.items(), key=lambda g: -len(g[1])))

    @property
    def last_outcome(self) -> Outcome | None:
        return self.rows[-1].outcome if self.rows else None

    @property
    def where(self) -> list[str]:
        """The devices, each once; a CPU is called one."""
        return list(dict.fromkeys(row.outcome.where for row in self.rows))


def _checked(gain: Gain, check: LeftOut) -> Gain:
    # One run that still points the same way takes back nothing that two seeds have confirmed.
    told = check.verdict in GROUPS and (check.verdict, gain.group) != (Worth.MARGINAL, Worth.CONFIRMED)
    group = check.verdict if told else gain.group
    return Gain(gain.row, group, f"left out at the end: {check.reason}", check.worth)


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
