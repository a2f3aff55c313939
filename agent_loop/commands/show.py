"""`hotloop show|diff|best|checkout`: a night's experiments, one at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import git

from hotloop.agent_loop.gitrepo import Repo, branch_of, said
from hotloop.agent_loop.loop.live import sparkline
from hotloop.agent_loop.night import Night, Row
from hotloop.harness.errors import UsageError
from hotloop.harness.text import one_line, printable

__all__ = ["best_command", "checkout_command", "diff_command", "night_named", "show_command"]


def night_named(tag: str, runs: Path = Path("runs")) -> Night:
    """Raises UsageError: no such night."""
    if not (runs / tag / "records.jsonl").exists():
        raise UsageError(f"there is no night called {tag} under {runs.resolve()}")
    return Night.reading(runs / tag)


def _repo() -> git.Repo:
    try:
        return Repo(Path.cwd(), search_parent_directories=True)
    except git.InvalidGitRepositoryError:
        raise UsageError(f"{Path.cwd()} is not in the repository of that night") from None


def _row(night: Night, number: int) -> Row:
    rows = night.rows()
    for row in rows:
        if row.number == number:
            return row
    known = f"it has {rows[0].number} to {rows[-1].number}" if rows else "it has none yet"
    raise UsageError(f"{night.folder.name} has no experiment {number}; {known}")


def _packs(compiled: dict[str, Any]) -> str:
    """The compile caches that a run was given and left."""
    words = []
    for what in ("given", "left"):
        if pack := compiled.get(what):
            words.append(f"{what} {pack['files']} files, {pack['bytes'] / 1e6:.1f} MB, link {pack['generation']}")
    return "; ".join([*words, *filter(None, [compiled.get("note")])]) or "no cache"


def show_command(args: argparse.Namespace) -> int:
    """All of one experiment: decision, numbers, where the time went, curve, log, files."""
    night = night_named(args.tag)
    row = _row(night, args.experiment)
    facts = [
        ("experiment", f"{row.number} of {args.tag} ({row.kind}){f', by {row.agent}' if row.agent else ''}"),
        ("what", row.description),
        ("decision", row.decision),
        ("why", row.reason),
        *([("hypothesis", row.why)] if row.why else []),
        *([("turn", f"{row.tokens:,} tokens of a model, ${row.cost_usd:.2f}")] if row.tokens else []),
        ("commit", row.commit),
    ]
    if row.val_bpb is not None:
        gain = f" ({row.gain:+.6f} against the incumbent)" if row.gain is not None else ""
        facts.append(("val_bpb", f"{row.val_bpb:.6f}{gain}"))
        if row.outcome and row.outcome.val_bpb_reference is not None:
            facts.append(("", f"{row.outcome.val_bpb_reference:.6f} with the bytes that the reference counts"))
    o = row.outcome
    if o:
        facts += [
            ("tokens", f"{o.tokens:,} in {o.steps} steps at {o.tokens_per_s:,.0f}/s"),
            ("model", f"{o.num_params / 1e6:.1f} M parameters, peak memory {o.peak_mb:,.0f} MB"),
            ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in o.ledger.items()) + f"; all {o.total_s:.1f}"),
            ("start", ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in o.start.items())),
            ("compiled", _packs(o.compiled)),
            *([("fusions", o.fusions)] if o.fusions else []),
            (
                "sandbox",
                f"L{o.sandbox.get('level', 0)}, seed {o.seed}, {o.device}"
                + ("" if o.repeatable else "; --fast-nondeterministic: it need not repeat"),
            ),
        ]
        if o.curve:
            facts.append(
                ("loss", f"{sparkline([p[1] for p in o.curve], 40)} {o.curve[0][1]:.3f} to {o.curve[-1][1]:.3f}")
            )
        facts += [("warning", words) for words in o.conditions.get("warnings", [])]
        if o.audit:
            facts.append(
                ("audit", ", ".join(f"{k} {v:.4g}" for k, v in o.audit.items() if isinstance(v, (int, float))))
            )
    folder = night.experiment_folder(row.number)
    if folder.exists():
        facts.append(("files", f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}"))
    for name, text in facts:
        print(f"{name + ':':<12}{one_line(text)}")
    for line in o.log_tail if o else []:
        print(f"  | {printable(line)}")
    return 0


def diff_command(args: argparse.Namespace) -> int:
    """What an experiment changed; with a second number, what is between the two."""
    night, repo = night_named(args.tag), _repo()
    new = _row(night, args.experiment)
    if args.other is not None:
        old = _row(night, args.other).commit
    elif new.outcome and new.outcome.parent:
        old = new.outcome.parent
    else:
        raise UsageError(f"experiment {new.number} is the baseline's train.py and changes nothing; give two numbers")
    try:
        flags = ("--no-ext-diff", "--no-textconv", "--no-color", "--text")
        text = repo.git.diff(*flags, old, new.commit, "--", "train.py", stdout_as_string=False)
    except git.GitCommandError as e:
        raise UsageError(f"git has no commit of that experiment any more ({said(e)})") from None
    print(printable(bytes(text).decode("utf-8", "backslashreplace")))
    return 0


def best_command(args: argparse.Namespace) -> int:
    """The incumbent, and how it got there."""
    night = night_named(args.tag)
    best = night.incumbent()
    if best is None:
        raise UsageError(f"{args.tag} has kept nothing yet")
    before: float | None = None
    for row in (r for r in night.rows() if r.decision == "keep"):
        bpb = night.score_of(row.commit, night.seed)
        gain = f"{before - bpb:+.6f}" if before is not None and bpb is not None else ""
        score = "-" if bpb is None else f"{bpb:.6f}"
        print(f"{row.number:>5}  {score}  {gain:>9}  {row.commit[:7]}  {row.description}")
        before = bpb
    print(
        f"best: experiment {best.number}, branch {branch_of(args.tag)}; "
        f"its train.py: git show {best.commit[:7]}:train.py"
    )
    return 0


def checkout_command(args: argparse.Namespace) -> int:
    """A branch of the user's own at an experiment, checked out. Refused where something would be lost."""
    night, repo = night_named(args.tag), _repo()
    number = args.experiment
    if number is None:
        best = night.incumbent()
        if best is None:
            raise UsageError(f"{args.tag} has kept nothing yet")
        number = best.number
    row = _row(night, number)
    changed = repo.git.status("--porcelain", "--untracked-files=no").splitlines()
    if changed:
        raise UsageError(f"the checkout has uncommitted changes ({changed[0][3:]}); commit them, or: git stash")
    name = f"hotloop/{args.tag}-{number:04d}"
    try:
        if name in {h.name for h in repo.heads}:
            repo.git.switch(name)
        else:
            repo.git.switch("-c", name, row.commit)
    except git.GitCommandError as e:
        raise UsageError(f"git refuses ({said(e)})") from None
    print(f"on branch {name}: experiment {number}, {row.description}")
    return 0
