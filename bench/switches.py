"""Whole steps of train.py under one setting beside another: which kernels are worth having, and what settings cost.

hotloop bench switches         greedy forward selection among our kernels, with the fastest attention; then 8 bits and
                               CUDA graphs on top of what was chosen
hotloop bench determinism      results that repeat to the bit, as trainings are asked for, against those that need not
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hotloop.harness.errors import HotloopError
from hotloop.harness.files import write_whole
from hotloop.harness.proof import device as dev
from hotloop.harness.tuning.notes import UNFINISHED, Notes
from hotloop.harness.tuning.runner import Setting, StepRunner
from hotloop.harness.tuning.selection import Comparison, Member, Members, Selection, Start, TimeIsUp, Unfit, words
from hotloop.kernels import tuning
from hotloop.kernels.dispatch import OPERATORS as TABLE

__all__ = ["COST_ALLOWED", "UNFINISHED", "chosen_environment", "determinism", "members_of", "setting_of", "switches"]

COST_ALLOWED = 0.02  # of the speed, that repeatable results may cost before they are worth giving up
KERNEL, ATTENTION, CONSTANT = "ours", "attention", "train.py"
EXTRAS = ('FP8="mlp"', 'FP8="lm_head"', 'FP8="mlp lm_head e5m2"', "CUDA_GRAPHS=True")


def members_of(asked: Iterable[str], backends: Iterable[str] = ()) -> list[Member]:
    """What can be chosen: our kernels for the operators that a step asks for, and attention backends.

    Those that take what another leaves are one member, each operator a part of its own; ours for attention is one of
    its backends.
    """
    asked = frozenset(asked)
    alone = [
        n
        for n, op in TABLE.items()
        if n in asked and n != ATTENTION and "triton" in op.implementations and not op.together
    ]
    names = [
        *alone,
        *(
            [",".join(n for n, op in TABLE.items() if op.together)]
            if any(TABLE[n].together for n in asked if n in TABLE)
            else []
        ),
    ]
    found = [Member(name, KERNEL) for name in names]
    if ATTENTION in asked:
        found += [Member(ATTENTION, name) for name in dict.fromkeys((*backends, "triton"))]
    return found


def setting_of(members: Members) -> Setting:
    """How a set is run: without any, no kernel of ours, and the fastest attention of others."""
    kernels = sorted(m.part for m in members if m.implementation == KERNEL)
    attention = next((m.implementation for m in members if m.part == ATTENTION), "")
    if attention == "triton":
        kernels, attention = [*kernels, ATTENTION], ""
    environment = {"HOTLOOP_KERNELS": ",".join(kernels) or "reference", "HOTLOOP_ATTENTION": attention}
    constants = tuple(sorted(m.implementation for m in members if m.part == CONSTANT))
    return Setting(words(members), environment, constants)


def chosen_environment(notes: Path) -> dict[str, str]:
    """The variables of what was chosen, from the page's JSON; none where nothing was chosen yet."""
    try:
        found: dict[str, str] = json.loads(notes.read_text())["environment"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def table(found: Iterable[Comparison]) -> str:
    """Markdown."""
    lines = ["| set | against | tokens/s | x | from | to | |", "|---|---|---:|---:|---:|---:|---|"]
    for c in found:
        if c.reason:
            lines.append(f"| {c.new} | {c.old} | | | | | out: {c.reason.replace('|', ' ')} |")
            continue
        verdict = "gains" if c.gains else "loses" if c.loses else "a tie"
        low, high = min(c.ratios), max(c.ratios)
        lines.append(f"| {c.new} | {c.old} | {c.new_rate:,.0f} | {c.ratio:.3f} | {low:.3f} | {high:.3f} | {verdict} |")
    return "\n".join(lines) + "\n"


def switches(
    train: Path, preset: str, notes: Notes, out: Path, minutes: float = 60.0, extras: Iterable[str] = EXTRAS,
    start: Start | None = None, backends: Iterable[str] | None = None, say: Callable[[str], None] = print,
) -> int:  # fmt: skip
    """Choose, and write what was chosen: `out` (JSON) and the table beside it (Markdown). Where the time is over, the
    best of the sets that were compared by then.

    Args:
        notes: comparisons of before count.
        extras: constants of train.py that are measured on top of what was chosen, and not chosen.
        start: runs a set; None for processes with train.py's step.
        backends: of attention, to be tried in the step; None for those that run here, unless they were ranked.

    Returns:
        0, or UNFINISHED where the time was over before all was compared.

    Raises:
        HotloopError: the step does not run without any of our kernels.
    """
    deadline, done = time.monotonic() + minutes * 60, True
    if notes.why:
        say(f"begun anew: {notes.why}")
    start = start or (lambda members: StepRunner(setting_of(members), train, preset))
    plain: Members = frozenset()
    facts = notes.body.setdefault("facts", {})
    chosen = plain
    with Selection(start, notes, say, lambda: time.monotonic() > deadline) as selection:
        try:
            if "asked" not in facts:
                facts["asked"] = sorted(selection.base(plain).asked)  # type: ignore[attr-defined]
                notes.save()
            members = members_of(facts["asked"], _unranked() if backends is None else backends)
            attention = [m for m in members if m.part == ATTENTION]
            kernels = [m for m in members if m.part != ATTENTION]
            chosen = fastest = selection.forward(attention, plain)
            whole = frozenset(kernels) | fastest  # first, so that little time tells most
            sets = [whole, *(selection.with_member(fastest, m) for m in kernels)]
            try:
                selection.compare(whole, fastest)
                chosen = selection.forward(kernels, fastest)
                if whole == selection.best_known([whole, chosen], fastest) and selection.compare(whole, chosen).gains:
                    chosen = whole
            except TimeIsUp:
                chosen = selection.best_known(sets, fastest)
                raise
            if chosen != plain:
                say(str(selection.compare(chosen, plain)))
            for constant in extras:
                selection.compare(chosen | {Member(CONSTANT, constant)}, chosen)
        except TimeIsUp:
            done = False
    environment = setting_of(chosen).environment
    compared = [Comparison(**c | {"ratios": tuple(c["ratios"])}) for c in notes.body.get("comparisons", {}).values()]
    against_plain = next((c for c in compared if c.new == words(chosen) and c.old == words(plain)), None)
    body: dict[str, Any] = {"chosen": words(chosen), "environment": environment, "finished": done}
    if against_plain and against_plain.ratios:
        body |= {"tokens_per_s": against_plain.new_rate, "plain_tokens_per_s": against_plain.old_rate}
        body["ratio"] = against_plain.ratio
    shown = " ".join(f"{k}={v}" for k, v in environment.items() if v)
    told = f"Chosen{'' if done else ' so far'}: {words(chosen)}. To run it: {shown}\n\n"
    told += "" if torch.cuda.is_available() else "CPU figures: a trial of the way, they say nothing of a GPU.\n\n"
    write_whole(out, json.dumps(body, indent=1, sort_keys=True) + "\n")
    write_whole(out.with_suffix(".md"), told + table(compared))
    say(told.rstrip() if done else f"the time is over; run it again to go on. {told.rstrip()}")
    return 0 if done else UNFINISHED


def _unranked() -> list[str]:
    """Attention backends that are to be tried in the step: those that run here, where `hotloop bench attention` has
    not ranked them.
    """
    if not torch.cuda.is_available() or tuning.measured(ATTENTION):
        return []
    from hotloop.kernels.attend import backends
    from hotloop.kernels.attention_backends import BACKENDS

    return [name for name in backends("cuda")[0] if not BACKENDS[name].missing(banded=True)]


def stamp(train: Path, preset: str) -> dict[str, Any]:
    """What a comparison depends on."""
    import hashlib

    from hotloop.harness.paths import project_root
    from hotloop.harness.records.seal import current_manifest

    sealed = {k: v for k, v in current_manifest(project_root()).items() if k.startswith("kernels/")}
    return dev.identity() | {
        "preset": preset,
        "train.py": hashlib.sha256(train.read_bytes()).hexdigest(),
        "kernels": hashlib.sha256(json.dumps(sealed).encode()).hexdigest(),
    }


def determinism(
    train: Path, preset: str, pairs: int, say: Callable[[str], None] = print,
    start: Callable[[Setting], Any] | None = None,
) -> int:  # fmt: skip
    """Print tokens a second with and without repeatable results, in pairs of changing order, and what they cost.

    Returns:
        0 when all of them ran, whatever the cost.

    Raises:
        HotloopError: one of them does not run.
    """
    start = start or (lambda setting: StepRunner(setting, train, preset))
    kinds = [Setting("repeatable"), Setting("free", repeatable=False)]
    costs = []
    with contextlib.ExitStack() as stack:
        try:
            runners = {s.name: stack.enter_context(contextlib.closing(start(s))) for s in kinds}
            for pair in range(pairs):
                rates = {s.name: runners[s.name].turn() for s in (kinds if pair % 2 else kinds[::-1])}
                costs.append(1 - rates["repeatable"] / rates["free"])
                told = ", ".join(f"{s.name} {rates[s.name]:,.0f}" for s in kinds)
                say(f"pair {pair}: tokens/s {told}; repeatable costs {costs[-1]:+.2%}")
        except Unfit as e:
            raise HotloopError(f"the step cannot be timed: {e}") from None
    cost = statistics.median(costs)
    say(
        f"Repeatable results cost {cost:+.2%} of the speed (median of {pairs}, {min(costs):+.2%} to {max(costs):+.2%})."
    )
    if not torch.cuda.is_available():
        say("CPU figures: a trial of the way, they say nothing of a GPU.")
    elif cost > COST_ALLOWED:
        say(f"Above {COST_ALLOWED:.0%}: where speed matters more than proof, --fast-nondeterministic is worth it.")
    else:
        say(f"Within {COST_ALLOWED:.0%}: --fast-nondeterministic is not worth what it gives up.")
    return 0
