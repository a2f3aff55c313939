"""`hotloop show|diff|best|checkout`: a night's experiments, one at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

import git
import msgspec

from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import Repo, branch_of, said
from hotloop.agent_loop.loop.live import sparkline
from hotloop.agent_loop.night import Row
from hotloop.harness.errors import UsageError
from hotloop.harness.records.model import Compiled, Decision
from hotloop.harness.text import one_line, printable

__all__ = ["best_command", "checkout_command", "diff_command", "night_named", "show_command"]


def night_named(tag: str, runs: Path = Path("runs")) -> NightFolder:
    """Raises UsageError: no such night."""
    if not (runs / tag / "records.jsonl").exists():
        raise UsageError(f"there is no night called {tag} under {runs.resolve()}")
    return NightFolder.reading(runs / tag)


def _repo() -> git.Repo:
    try:
        return Repo(Path.cwd(), search_parent_directories=True)
    except git.InvalidGitRepositoryError:
        raise UsageError(f"{Path.cwd()} is not in the repository of that night") from None


def _row(night: NightFolder, number: int) -> Row:
    row, rows = night.row(number), night.rows()
    if row is None:
        known = f"it has {rows[0].number} to {rows[-1].number}" if rows else "it has none yet"
        raise UsageError(f"{night.folder.name} has no experiment {number}; {known}")
    return row


def _packs(compiled: Compiled | None) -> str:
    """The compile caches that a run was given and left."""
    words = []
    for what, pack in (("given", compiled.given), ("left", compiled.left)) if compiled else ():
        if pack:
            words.append(f"{what} {pack.files} files, {pack.bytes / 1e6:.1f} MB, link {pack.generation}")
    return "; ".join([*words, *([compiled.note] if compiled and compiled.note else [])]) or "no cache"


def show_command(args: argparse.Namespace) -> int:
    """All of one experiment: decision, numbers, where the time went, curve, log, files."""
    night = night_named(args.tag)
    row = _row(night, args.experiment)
    o, training, origin = row.outcome, row.outcome.training, row.origin
    gain = f" ({row.gain:+.6f} against the incumbent)" if row.gain is not None else ""
    reference = o.scores.val_bpb_reference if o.scores else None
    prepared = f", made ready in {training.start.prepared_s:.1f} s" if training.start.prepared_s is not None else ""
    because = f": {training.start.because}" if training.start.because else ""
    repeats = "" if o.environment.repeatable else "; --fast-nondeterministic: it need not repeat"
    curve = [loss for _, loss in training.curve]
    audit = msgspec.structs.asdict(o.audit) if o.audit else {}
    folder = night.experiment_folder(row.number)
    facts = [
        ("experiment", f"{row.number} of {args.tag} ({row.kind}){f', by {origin.agent}' if origin.agent else ''}"),
        ("what", row.description),
        ("decision", row.decision),
        ("why", row.reason),
        ("hypothesis", origin.why),
        ("turn", f"{origin.tokens:,} tokens of a model, ${origin.cost_usd:.2f}" if origin.tokens else ""),
        ("commit", row.commit),
        ("val_bpb", f"{row.val_bpb:.6f}{gain}" if row.val_bpb is not None else ""),
        ("", f"{reference:.6f} with the bytes that the reference counts" if reference is not None else ""),
        ("tokens", f"{training.tokens:,} in {training.steps} steps at {training.tokens_per_s:,.0f}/s"),
        ("model", f"{o.num_params / 1e6:.1f} M parameters, peak memory {training.peak_mb:,.0f} MB"),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in o.ledger.items() if v) + f"; all {o.total_s:.1f}"),
        ("start", f"{training.start.how}{prepared}{because}"),
        ("compiled", _packs(o.compiled)),
        ("fusions", o.fusions),
        ("sandbox", f"L{o.sandbox.level}, seed {row.run.seed}, {o.device}{repeats}"),
        ("loss", f"{sparkline(curve, 40)} {curve[0]:.3f} to {curve[-1]:.3f}" if curve else ""),
        *(("warning", words) for words in o.conditions.warnings),
        ("audit", ", ".join(f"{k} {v:.4g}" for k, v in audit.items() if v is not None)),
        ("files", f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}" if folder.exists() else ""),
    ]
    for name, text in facts:
        if text:
            print(f"{name + ':':<12}{one_line(text)}")
    for line in o.log_tail:
        print(f"  | {printable(line)}")
    return 0


def diff_command(args: argparse.Namespace) -> int:
    """What an experiment changed; with a second number, what is between the two."""
    night, repo = night_named(args.tag), _repo()
    new = _row(night, args.experiment)
    if args.other is not None:
        old = _row(night, args.other).commit
    elif new.run.parent:
        old = new.run.parent
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
    for row in (r for r in night.rows() if r.decision == Decision.KEEP):
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
