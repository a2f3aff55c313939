"""Which implementations this machine runs: proven, tuned and chosen here, into a profile.

1. Each implementation of each operator that the step asks for: right by fp64, repeatable to the bit, timed beside the
   compiled reference (`proving`).
2. Launch configurations of our kernels that were proven, unless it has to be quick (`configurations`).
3. The choice, by the tokens a second of the whole step in interleaved pairs against plain torch.compile (`selection`):
   greedily, or, quickly, what won alone, confirmed once together.

Every finding is noted at once in a folder beside the profile, so that a tuning that is killed at any moment goes on.
The profile itself is written whole, at the end. When the time is over, what was found by then decides.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from hotloop.harness.machine import installed_hash
from hotloop.harness.profile import PACKAGES, Machine, Profile, own_path, write
from hotloop.harness.proof.floor import step_floor_s
from hotloop.harness.tuning.children import asked
from hotloop.harness.tuning.members import (
    ATTENTION,
    STEP,
    THREADS,
    candidates,
    selection_of,
    setting_of,
)
from hotloop.harness.tuning.notes import Notes
from hotloop.harness.tuning.runner import READY_S, StepRunner
from hotloop.harness.tuning.selection import Comparison, Member, Members, Selection, Start, TimeIsUp, words

__all__ = ["MINUTES", "QUICK_MINUTES", "Progress", "tune"]

MINUTES, QUICK_MINUTES = 15.0, 4.0
PROVE, PROVE_QUICKLY, CONFIGURE = 0.3, 0.7, 0.6  # of the time, after which the next stage begins
PATIENCE = {"cuda": 1, "cpu": 5}  # with what hangs; a CPU may be anybody's
PLAIN: Members = frozenset()


@dataclass
class Progress:
    """Told what is being done; a command shows it. `planned` may grow while it is done."""

    say: Callable[[str], None]
    show: Callable[[str, int, int], None] = lambda words, done, planned: None
    done: int = 0
    planned: int = 1

    def step(self, words: str) -> None:
        self.show(words, self.done, max(self.planned, self.done + 1))
        self.done += 1


@dataclass
class _Found:
    """What the stages hand on."""

    members: list[Member]
    alone: dict[Member, tuple[float, bool]] = field(default_factory=dict)  # ratio to the reference, whether it wins
    out: dict[Member, str] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    chosen: Members = PLAIN
    complete: bool = True


def tune(
    machine: Machine, source: bytes, progress: Progress, minutes: float = MINUTES, quick: bool = False,
    start: Start | None = None,
) -> Profile:  # fmt: skip
    """Prove, tune and choose for so many minutes at most, and write this machine's profile.

    Args:
        source: the train.py whose step decides.
        start: runs a set; None for processes with that step.

    Raises:
        HotloopError: the step does not run without any of what could be chosen.
    """
    began = time.time()
    deadline = began + minutes * 60
    stamp = machine.facts | {"train.py": hashlib.sha256(source).hexdigest()}
    notes = Notes(machine.work / "step.json", stamp)
    if notes.why:
        progress.say(f"begun anew: {notes.why}")
    found = _Found([])

    def starts(members: Members) -> Any:
        progress.step(words(members))
        if start:
            return start(members)
        setting = setting_of(members, {"configs": found.configs}, machine.threads)
        ready_s = READY_S * PATIENCE[machine.device]
        return StepRunner(setting, source, machine.preset, machine.device, machine.sandbox, ready_s, ready_s)

    with Selection(starts, notes, progress.say, lambda: time.time() > deadline) as selection:
        if "asked" not in notes.body:
            notes.body["asked"] = sorted(selection.base(PLAIN).asked)  # type: ignore[attr-defined]
            notes.save()
        found.members = candidates(notes.body["asked"], machine.device, machine.threads)
        progress.planned = progress.done + 2 * len(found.members) + 2
        if machine.device == "cuda":
            selection.let_go()  # the device's memory is wanted
            share = PROVE_QUICKLY if quick else PROVE
            _prove(machine, stamp, found, began + share * (deadline - began), progress)
            if not quick:
                _configure(machine, stamp, found, began + CONFIGURE * (deadline - began), progress)
        try:
            (_confirm if quick else _choose)(selection, found)
            if found.chosen != PLAIN:
                selection.compare(found.chosen, PLAIN)
            best = _attention_alone(found.chosen)
            if best not in (PLAIN, found.chosen):
                selection.compare(found.chosen, best)
        except TimeIsUp:
            found.complete = False
            if found.chosen == PLAIN:
                found.chosen = selection.best_known((selection.with_member(PLAIN, m) for m in found.members), PLAIN)
            progress.say("the time is over: what was found by now decides; run it again with more for the rest")
    profile = write(own_path(machine.facts), _body(machine, found, selection, time.time() - began))
    if found.complete:
        for path in machine.work.glob("*.json"):  # the next tuning measures anew
            path.unlink()
        machine.work.rmdir()
    return profile


def _prove(machine: Machine, stamp: dict[str, Any], found: _Found, deadline: float, progress: Progress) -> None:
    from hotloop.harness.tuning.proving import largest_first, prove, verdicts

    path = machine.work / "prove.json"
    operators = largest_first({m.part for m in found.members})
    prove(operators, path, stamp, machine.preset.batch_divisor, deadline, progress.say, progress.step)
    notes = Notes(path, stamp)
    for member in found.members:
        verdict = verdicts(notes, member.part).get(member.implementation)
        if verdict is None or verdict.reason:
            found.out[member] = verdict.reason if verdict else "it was not proven in time"
            found.complete = found.complete and verdict is not None
        else:
            found.alone[member] = verdict.ratio, verdict.wins
    found.members = [m for m in found.members if m not in found.out]


def _configure(machine: Machine, stamp: dict[str, Any], found: _Found, deadline: float, progress: Progress) -> None:
    from hotloop.harness.tuning import configurations

    if any(m.implementation.startswith("triton") for m in found.members):
        progress.step("launch configurations")
        path = machine.work / "configs.json"
        found.configs = configurations.main(list(configurations.KERNELS), path, stamp, deadline, progress.say)


def _confirm(selection: Selection, found: _Found) -> None:
    """The winners of each part alone, together against plain, else attention's; then what has no time of its own."""
    winners: dict[str, Member] = {}
    for member in sorted(found.alone, key=lambda m: found.alone[m][0]):
        if found.alone[member][1]:
            winners[member.part] = member
    together = frozenset(winners.values())
    for members in dict.fromkeys((together, _attention_alone(together))):
        if found.chosen == PLAIN != members and selection.compare(members, PLAIN).gains:
            found.chosen = members
    found.chosen = selection.forward([m for m in found.members if m not in found.alone], found.chosen)


def _choose(selection: Selection, found: _Found) -> None:
    """Greedily: attention first, then the rest on top of the fastest, all at once before each alone."""
    attention = [m for m in found.members if m.part == ATTENTION]
    fastest = found.chosen = selection.forward(attention, PLAIN)
    rest = [m for m in found.members if m.part != ATTENTION]
    whole = fastest | {m for m in {m.part: m for m in reversed(rest)}.values() if m.part not in (STEP, THREADS)}
    if whole != fastest:
        selection.compare(whole, fastest)
    try:
        found.chosen = selection.forward(rest, fastest)
    except TimeIsUp:
        found.chosen = selection.best_known([whole, *(selection.with_member(fastest, m) for m in rest)], fastest)
        raise
    won = whole != fastest and whole == selection.best_known([whole, found.chosen], fastest)
    if won and selection.compare(whole, found.chosen).gains:
        found.chosen = whole


def _attention_alone(members: Members) -> Members:
    return frozenset(m for m in members if m.part == ATTENTION)


# ---- what was found ---------------------------------------------------------------------------------------------


def _body(machine: Machine, found: _Found, selection: Selection, took_s: float) -> dict[str, Any]:
    chosen = found.chosen
    implementations = [m.implementation for m in chosen]
    packages = {p: digest for i in implementations for p in PACKAGES.get(i, ()) if (digest := installed_hash(p))}
    on_gpu = machine.device == "cuda"
    identity = asked("identity()", "hotloop.harness.proof.device") if on_gpu else {}
    gpu = {
        "gpu": identity["device"], "capability": identity["capability"], "multiprocessors": identity["multiprocessors"]
    } if on_gpu else {}  # fmt: skip
    return gpu | {
        "depends": machine.facts,
        "packages": packages,
        "selection": selection_of(chosen) | ({} if on_gpu else _cpu_defaults(chosen, machine.threads)),
        "configs": found.configs,
        "measured": _attention_order(machine, found),
        "table": _table(found, selection),
        "whole": _whole(machine, selection, chosen),
        "complete": found.complete,
        "minutes": round(took_s / 60, 1),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_defaults(chosen: Members, threads: int) -> dict[str, str]:
    """What runs where nothing else was chosen, said: results depend on it."""
    parts = {m.part for m in chosen}
    return {k: v for k, v in ((STEP, "eager"), (THREADS, str(threads))) if k not in parts}


def _attention_order(machine: Machine, found: _Found) -> dict[str, Any]:
    """The chosen backend first, then the proven ones from the fastest, for the calls that it does not serve; none where
    plain's was chosen.
    """
    chosen = [m.implementation for m in found.chosen if m.part == ATTENTION]
    if not chosen:
        return {}
    proven = sorted((m for m in found.alone if m.part == ATTENTION), key=lambda m: -found.alone[m][0])
    order = list(dict.fromkeys([*chosen, *(m.implementation for m in proven)]))
    from hotloop.harness.proof.operators import OPERATORS
    from hotloop.kernels.attend import ranking_key

    shapes = [s for name, s in OPERATORS[ATTENTION].shapes.items() if name.startswith("baseline")]
    return {ATTENTION: {ranking_key(s["K"], s["T"], s["W"]): order for s in shapes}}


def _table(found: _Found, selection: Selection) -> list[dict[str, Any]]:
    """A row for each member: part, implementation, ratio (to the reference alone, else of the whole step to plain)."""
    rows = []
    for member in [*found.members, *found.out]:
        row = {"part": member.part, "implementation": member.implementation, "chosen": member in found.chosen}
        step = selection.known(frozenset({member}), PLAIN)
        if member in found.out:
            row["reason"] = found.out[member]
        elif step and step.reason:
            row["reason"] = step.reason
        else:
            row |= {"alone": found.alone[member][0]} if member in found.alone else {}
            row |= {"step": step.ratio} if step else {}
        rows.append(row)
    return rows


def _whole(machine: Machine, selection: Selection, chosen: Members) -> dict[str, Any]:
    """The whole step with what was chosen: beside plain, and beside plain with the best attention."""
    against: dict[str, Comparison | None] = {"plain": selection.known(chosen, PLAIN)}
    best = _attention_alone(chosen)
    if best:
        against["plain with the best attention"] = selection.known(chosen, best)
    found: dict[str, Any] = {name: asdict(c) for name, c in against.items() if c and c.ratios}
    rate = next((c.new_rate for c in against.values() if c), 0.0)
    if chosen == PLAIN:
        rate = selection.rate_of(PLAIN)
    found["tokens_per_s"] = rate
    if machine.device == "cuda" and rate:
        floor_s = asked("ceilings()", "hotloop.harness.proof.device")
        found["share_of_floor"] = step_floor_s(*floor_s) * rate
    return found
