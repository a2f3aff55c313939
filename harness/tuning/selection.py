"""Which implementations are worth having together: greedy forward selection by the speed of the whole step.

Each candidate is first measured alone beside the start; then, from the one that gained most on, each is tried on top of
what was chosen, and enters only where it wins beyond the spread. Two sets are compared in turns, A B A B A: each turn
of the new set stands between two of the old one, so that a device that slows down, or speeds up, cancels.

How a set is run is the caller's: a process with train.py's step on a GPU, or a script in a test. A candidate that
faults, hangs, computes something else or gives other bits each time is out, with its reason. What was compared is
noted, so that a selection that is cut short goes on.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from hotloop.harness.errors import HotloopError
from hotloop.harness.tuning.notes import Notes

__all__ = ["Answer", "Comparison", "Member", "Runner", "Selection", "TimeIsUp", "Unfit", "fastest_quantile"]

TURNS = 7  # of the new set in a comparison
LEAST = 3  # of them, after which one that lost each is not timed further
MARGIN = 0.002  # of the speed: less is no gain, however steady
LOSS_TOLERANCE = 0.01  # relative: a guard against what is wrong, not the proof by fp64
HELD = 2  # losses that are held to it, before and after one update: what follows makes any rounding grow


class Member(NamedTuple):
    """An implementation for one part of the step; of those for one part only one can run."""

    part: str
    implementation: str

    def __str__(self) -> str:
        return f"{self.part}={self.implementation}"


Members = frozenset[Member]


class Unfit(Exception):
    """A set cannot be run: it faults, hangs, is wrong or varies. Its text is the reason, one line."""


class TimeIsUp(Exception):
    """No comparison is begun any more; what was compared is noted."""


@dataclass(frozen=True)
class Answer:
    """What some steps from one state gave.

    Attributes:
        losses: of each step.
        digest: of the weights after the last.
    """

    losses: tuple[float, ...]
    digest: str


class Runner(Protocol):
    """A set, ready to run. Each method raises Unfit for what ends it."""

    def answer(self) -> Answer:
        """The same steps from the same state, each time it is asked for."""

    def turn(self) -> float:
        """Tokens a second of some steps."""

    def close(self) -> None: ...


Start = Callable[[Members], Runner]  # raises Unfit


def fastest_quantile(ratios: Sequence[float], share: float = 0.2) -> float:
    """Below it lies `share` of the ratios; for the lowest of a few, one may be an accident of the machine."""
    return sorted(ratios)[int(share * len(ratios))]


@dataclass(frozen=True)
class Comparison:
    """A set beside another.

    Attributes:
        new, old: in words.
        ratios: of their speeds, a turn each.
        new_rate, old_rate: medians, tokens a second.
        reason: why the new one is out; empty where it was timed.
    """

    new: str
    old: str
    ratios: tuple[float, ...] = ()
    new_rate: float = 0.0
    old_rate: float = 0.0
    reason: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios) if self.ratios else 0.0

    @property
    def gains(self) -> bool:
        return len(self.ratios) == TURNS and fastest_quantile(self.ratios) > 1 + MARGIN

    @property
    def loses(self) -> bool:
        """Also alone beside the rest it need not be tried again."""
        return not self.ratios or max(self.ratios) < 1.0 or sorted(self.ratios)[-1 - len(self.ratios) // 5] < 1.0

    def __str__(self) -> str:
        if self.reason:
            return f"{self.new}: out: {self.reason}"
        low, high = min(self.ratios), max(self.ratios)
        verdict = "gains" if self.gains else "loses" if self.loses else "a tie"
        return f"{self.new}: {self.new_rate:,.0f} tokens/s, {self.ratio:.3f}x ({low:.3f} to {high:.3f}) {verdict}"


def words(members: Iterable[Member]) -> str:
    return " ".join(sorted(map(str, members))) or "plain"


def _key(new: Members, old: Members) -> str:
    return f"{words(new)} | {words(old)}"


class Selection:
    """Compares and selects; at most two sets are kept ready at a time, since each takes the device's memory.

    Args:
        start: runs a set.
        notes: comparisons that were made before count, and each new one is saved.
        over: asked before each comparison.
        plain: what answers are held against, and where nothing is chosen yet.
    """

    def __init__(
        self, start: Start, notes: Notes, say: Callable[[str], None], over: Callable[[], bool] = lambda: False,
        plain: Members = frozenset(),
    ) -> None:  # fmt: skip
        self._start, self._notes, self._say, self._over, self._plain = start, notes, say, over, plain
        self._ready: tuple[Members, Runner] | None = None  # the set that others are compared with

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.let_go()

    def with_member(self, members: Members, member: Member) -> Members:
        """`member` in the place of another implementation of its part."""
        return frozenset(m for m in members if m.part != member.part) | {member}

    def forward(self, candidates: Sequence[Member], chosen: Members) -> Members:
        """`chosen` and what is worth adding to it.

        Raises:
            TimeIsUp: see there.
            HotloopError: the set that others are compared with does not run itself.
        """
        alone = [(self.compare(self.with_member(chosen, c), chosen), c) for c in candidates]
        for _, member in sorted((x for x in alone if not x[0].loses), key=lambda x: -x[0].ratio):
            new = self.with_member(chosen, member)
            if self.compare(new, chosen).gains:  # the first was measured so already
                self._say(f"chosen: {words(new)}")
                chosen = new
        return chosen

    def compare(self, new: Members, old: Members) -> Comparison:
        """As `forward` raises."""
        if known := self.known(new, old):
            return known
        if self._over():
            raise TimeIsUp
        base = self.base(old)
        found = self._measure(new, old, base)
        self._notes.body.setdefault("comparisons", {})[_key(new, old)] = asdict(found)
        self._notes.save()
        self._say(str(found))
        return found

    def known(self, new: Members, old: Members) -> Comparison | None:
        """What was compared already."""
        noted: dict[str, Any] | None = self._notes.body.get("comparisons", {}).get(_key(new, old))
        return Comparison(**noted | {"ratios": tuple(noted["ratios"])}) if noted else None

    def rate_of(self, old: Members) -> float:
        """Tokens a second of a set that others were compared with, the median of all; 0 where none was."""
        noted = self._notes.body.get("comparisons", {}).values()
        rates = [c["old_rate"] for c in noted if c["old"] == words(old) and c["ratios"]]
        return statistics.median(rates) if rates else 0.0

    def best_known(self, sets: Iterable[Members], old: Members) -> Members:
        """Of the sets that were compared with `old`, the one that gained most on it; `old` where none did."""
        found = [(known.ratio, s) for s in sets if (known := self.known(s, old)) and known.gains]
        return max(found, key=lambda x: x[0], default=(1.0, old))[1]

    def _measure(self, new: Members, old: Members, base: Runner) -> Comparison:
        runner: Runner | None = None
        try:
            runner = self._start(new)
            self._prove(runner)
            olds, news = [self._turn_of_base(base)], list[float]()
            while len(news) < TURNS:
                news.append(runner.turn())
                olds.append(self._turn_of_base(base))
                if len(news) == LEAST and max(self._ratios(news, olds)) < 1.0:
                    break
        except Unfit as e:
            return Comparison(words(new), words(old), reason=str(e))
        finally:
            if runner is not None:
                runner.close()
        medians = statistics.median(news), statistics.median(olds)
        return Comparison(words(new), words(old), tuple(self._ratios(news, olds)), *medians)

    @staticmethod
    def _ratios(news: list[float], olds: list[float]) -> list[float]:
        return [2 * n / (olds[i] + olds[i + 1]) for i, n in enumerate(news)]

    def _prove(self, runner: Runner) -> None:
        """Raises Unfit for a set that varies, or whose losses are not plain's."""
        first, again = runner.answer(), runner.answer()
        if repr(first) != repr(again):  # by words, since NaN is not what it is
            raise Unfit("it varies: the same steps from the same state gave other bits")
        for step, (mine, true) in enumerate(zip(first.losses[:HELD], self._truth()[:HELD], strict=True)):
            if not math.isclose(mine, true, rel_tol=LOSS_TOLERANCE):
                raise Unfit(f"it is wrong: the loss of step {step} is {mine:.4f}, and plain's {true:.4f}")

    def _truth(self) -> list[float]:
        if "losses" not in self._notes.body:
            raise HotloopError("nothing was run yet that answers could be held against")
        losses: list[float] = self._notes.body["losses"]
        return losses

    def _turn_of_base(self, base: Runner) -> float:
        try:
            return base.turn()
        except Unfit as e:  # a fault of the device's ends all that is on it
            self.let_go()
            raise Unfit(f"what ran beside it ended: {e}") from None

    def base(self, members: Members) -> Runner:
        """A set that others are compared with, kept ready until it is another. Raises HotloopError as `forward`."""
        if "losses" not in self._notes.body and members != self._plain:
            self.base(self._plain)
        if self._ready is None or self._ready[0] != members:
            self.let_go()
            try:
                runner = self._start(members)
                self._ready = members, runner
                if "losses" not in self._notes.body:
                    self._notes.body["losses"] = list(runner.answer().losses)
                    self._notes.save()
                runner.turn()
            except Unfit as e:
                self.let_go()
                raise HotloopError(f"what others are compared with, {words(members)}, does not run: {e}") from None
        return self._ready[1]

    def let_go(self) -> None:
        """End the set that others are compared with; it is started again when it is needed."""
        if self._ready is not None:
            with contextlib.suppress(Unfit):
                self._ready[1].close()
            self._ready = None
