"""`hotloop verify`: is a whole night what it says it is? And `hotloop audit`: does a stored model still score so?

chain       every line continues the one before; signatures, where there are any
end         nothing was cut off: the last line is that of which a file outside the folder tells
seals       sealed code and data were the same for all experiments, and are those of this checkout
commits     each candidate differs from its parent in train.py alone and holds the source that was run
branch      it has one commit for each kept experiment, with the tree that was run, and no other
numbers     refs, folders and the records that kept commits name are all on record
decisions   each is what its records give when it is made again
weights     the stored ones of kept experiments are those that were scored
packages    torch, triton and the others are those of the night (with --packages: file by file)
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import git
import msgspec
from gitdb.exc import ODBError

from hotloop.agent_loop.decide import judge
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import Repo
from hotloop.agent_loop.night import Row
from hotloop.agent_loop.report.files import tsv_text
from hotloop.harness.errors import DataError, HotloopError, UsageError
from hotloop.harness.experiment import LOSSES, losses, scoring_of, token_seconds
from hotloop.harness.machine import changed_files, environment
from hotloop.harness.records import heads
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Decision, Kind, Outcome
from hotloop.harness.records.seal import verify_seal
from hotloop.harness.records.signing import load_signer
from hotloop.harness.scoring.evaluation import Evaluator
from hotloop.harness.scoring.score import Noise
from hotloop.harness.single import settings_from
from hotloop.harness.text import one_line

__all__ = ["audit_command", "checks", "verify_command"]

Check = tuple[str, bool, str]
_RECORD = re.compile(r"^Record: ([0-9a-f]{64})$", re.MULTILINE)
_MISSING = (ValueError, KeyError, git.GitError, ODBError)  # a commit, a file of it, or a branch that is not there


def checks(folder: Path, repo: git.Repo | None, key: str | None, packages: bool = False) -> Iterator[Check]:
    """(what, whether it holds, what was found).

    Args:
        folder: the night's.
        repo: the repository with its commits; None where there is none (runs of `hotloop run`).
        key: the public key, in hexadecimal, that every entry must be signed with; None for any or none.
        packages: compare installed packages file by file.
    """
    try:
        chain = Chain.read(folder / "records.jsonl")
    except HotloopError as e:
        yield "chain", False, str(e)
        return
    yield (
        "chain",
        chain.cut_bytes == 0,
        f"{len(chain.entries)} entries, head {chain.head[:16]}"
        + (f"; {chain.cut_bytes} bytes of a torn line follow" if chain.cut_bytes else ""),
    )
    reason = chain.shortened()
    found = "is what was written last" if heads.remembered(chain.path) else "nothing outside its folder tells of it"
    yield "end", not reason, reason or found
    yield _signatures(chain, key)
    outcomes = chain.bodies(Outcome)
    yield from _seals(outcomes)
    night = NightFolder(folder, chain)
    if night.settings is not None:
        if repo is not None:
            yield from _commits(night, repo)
            yield _numbers(night, repo)
            yield _decisions(night, repo)
        path = folder / "results.tsv"
        same = path.is_file() and path.read_bytes() == tsv_text(night).encode()
        yield "results.tsv", same, "as the records say" if same else f"differs; make it again: hotloop report ({path})"
    yield from _weights(night, folder, outcomes)
    yield from _packages(outcomes, packages)


def _signatures(chain: Chain, key: str | None) -> Check:
    signers = {e.signer for e in chain.entries}
    if key is not None:
        good = signers == {key}
        return "signatures", good, f"all by {key[:16]}" if good else f"not all entries are signed by {key[:16]}"
    if signers <= {None}:
        return (
            "signatures",
            True,
            (
                "NONE: who can write the records can write all of them anew, so this proves that nothing was changed "
                "by accident and no more (hotloop keygen, before a night, makes a key)"
            ),
        )
    names = ", ".join(str(s)[:16] if s else "nobody" for s in signers)
    return "signatures", len(signers) == 1, f"by {names}"


def _numbers(night: NightFolder, repo: git.Repo) -> Check:
    """What else tells how far the night had come: its refs, its folders, the records that kept commits name."""
    tag = night.folder.name
    decided = {row.number for row in night.rows()} | {run.number for run in night.flight().runs}
    refs = repo.git.for_each_ref("--format=%(refname:lstrip=3)", f"refs/hotloop/{tag}/").splitlines()
    folders = [p.name for p in (night.folder / "experiments").glob("[0-9]*")]
    others = sorted({int(n) for n in refs + folders if n.isdigit()} - decided)
    if others:
        return "numbers", False, f"experiment {others[0]} has a commit or a folder and no record"
    have = {entry.hash for entry in night.chain.entries}
    try:
        messages = [str(c.message) for c in repo.iter_commits(f"autoresearch/{tag}")]
    except _MISSING:
        messages = []  # told above
    for message in messages:
        found = _RECORD.search(message)
        if found and f" of {tag}, after" in message and found[1] not in have:
            return "numbers", False, f"the branch names the record {found[1][:16]}, which is not there"
    return "numbers", True, "commits, folders and records tell of the same experiments"


def _seals(outcomes: list[Outcome]) -> Iterator[Check]:
    codes = {o.seals.code for o in outcomes}
    datas = {o.seals.data for o in outcomes}
    if not outcomes:
        yield "experiments", False, "there is none"
        return
    yield "one seal", len(codes) == 1 and len(datas) == 1, f"code {len(codes)}, data {len(datas)} kind(s)"
    try:
        now = verify_seal()
        yield "this code", codes == {now}, "is what ran" if codes == {now} else "is not what ran; check out its version"
    except HotloopError as e:
        yield "this code", False, str(e)
    kinds = {o.environment.repeatable for o in outcomes}
    if kinds != {True}:
        text = "some trainings repeat and others need not: scores do not compare" if len(kinds) > 1 else (
            "run with --fast-nondeterministic: weights need not repeat"
        )  # fmt: skip
        yield "repeatable", len(kinds) == 1, text
    profiles = sorted({o.profile for o in outcomes})
    text = "scores under several do not compare: " if len(profiles) > 1 else "all ran under "
    yield "profile", len(profiles) == 1, text + ", ".join(p[:12] or "none" for p in profiles)
    if open_text := [o for o in outcomes if o.open_text]:
        yield "text", False, f"{open_text[0].open_text} ({len(open_text)} of {len(outcomes)} runs)"
    levels = sorted({o.sandbox.level for o in outcomes})
    text = ", ".join(f"L{level}" for level in levels)
    yield (
        "sandbox",
        levels == [3],
        text if levels == [3] else f"{text}: see docs/integrity.md for what that leaves open",
    )


def _commits(night: NightFolder, repo: git.Repo) -> Iterator[Check]:
    wrong, seen = [], 0
    for row in night.rows():
        seen += 1
        try:
            commit = repo.commit(row.commit)
            source = (commit.tree / "train.py").data_stream.read()
            if hashlib.sha256(source).hexdigest() != row.outcome.source_sha256:
                wrong.append(f"{row.number}: its train.py is not what was run")
            if row.kind == Kind.EXPERIMENT and not _only_train(repo, row.run.parent, row.commit):
                wrong.append(f"{row.number}: it changes more than train.py")
        except _MISSING:
            wrong.append(f"{row.number}: commit {row.commit[:7]} is not there")
    yield "commits", not wrong, "; ".join(wrong[:3]) or f"{seen}, each of train.py alone"
    kept = [r for r in night.rows() if r.decision == Decision.KEEP]
    name = f"autoresearch/{night.folder.name}"
    if not kept:
        return
    try:
        head = repo.commit(name)
        line = list(repo.iter_commits(f"{kept[0].commit}..{head.hexsha}", reverse=True))
        trees = [c.tree.hexsha for c in line]
        good = trees == [repo.commit(r.commit).tree.hexsha for r in kept[1:]]
        yield "branch", good, f"{name}: {len(line)} kept commits" if good else f"{name} is not what was kept"
    except _MISSING:
        yield "branch", False, f"there is no branch {name}"


def _only_train(repo: git.Repo, old: str, new: str) -> bool:
    names = repo.git.diff("--no-ext-diff", "--no-renames", "--name-only", "-z", old, new).split("\0")
    return [n for n in names if n] == ["train.py"]


def _decisions(night: NightFolder, repo: git.Repo) -> Check:
    """Make each decision again, from what was known when it was made."""

    def source_of(commit: str) -> bytes:
        data: bytes = (repo.commit(commit).tree / "train.py").data_stream.read()
        return data

    incumbent: Row | None = None
    wrong = []
    marginal = {r.commit for r in night.rows() if r.decision == Decision.MARGINAL}
    for row in night.rows():
        if row.kind != Kind.REPEAT:
            noise = Noise(row.decided.noise_bpb, 0)
            try:
                for commit in (row.commit, incumbent.commit if incumbent else row.commit):
                    source_of(commit)
                again = judge(night, row.outcome, incumbent, source_of, noise, row.commit in marginal)
            except _MISSING:
                continue  # a missing commit is told above
            if again.decision != row.decision:
                wrong.append(str(row.number))
        if row.decision == Decision.KEEP:
            incumbent = row
    return "decisions", not wrong, f"experiments {', '.join(wrong)} would be decided otherwise" if wrong else (
        f"{len(night.rows())}, the same when made again"
    )  # fmt: skip


def _weights(night: NightFolder, folder: Path, outcomes: list[Outcome]) -> Iterator[Check]:
    wrong, seen = [], 0
    for outcome in outcomes:
        path = folder / "experiments" / f"{outcome.run.number:04d}" / "weights.safetensors"
        if outcome.run.kind == Kind.REPLAY or not path.exists():
            continue
        seen += 1
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != outcome.weights_sha256:
                wrong.append(str(outcome.run.number))
    yield "weights", not wrong, f"those of {', '.join(wrong)} are not what was scored" if wrong else f"{seen} stored"


def _packages(outcomes: list[Outcome], whole: bool) -> Iterator[Check]:
    if not outcomes:
        return
    then = [o.environment.packages for o in outcomes]
    now = environment("cpu", 1)["packages"]
    differing = sorted({k for p in then for k in p if now.get(k) != p[k]})
    yield "packages", not differing, f"{', '.join(differing)} changed since" if differing else "as in the night"
    if whole:
        wrong = [f for name in now for f in changed_files(name)]
        yield "files", not wrong, f"{len(wrong)} changed, {wrong[0]} first" if wrong else "all as they were installed"


def verify_command(args: argparse.Namespace) -> int:
    """Print every check; 0 when all hold, 1 otherwise."""
    folder = Path("runs") / args.tag
    if not (folder / "records.jsonl").exists():
        raise UsageError(f"there is no night called {args.tag} under {Path('runs').resolve()}")
    try:
        repo = None if args.tag == "single" else Repo(Path.cwd(), search_parent_directories=True)
    except git.GitError:
        raise UsageError(f"{Path.cwd()} is not in the repository of that night") from None
    signer = load_signer()
    key = args.key or (signer.public if signer else None)
    bad = 0
    for name, good, text in checks(folder, repo, key, args.packages):
        bad += not good
        print(f"{'ok ' if good else 'BAD'}  {name:<12} {one_line(text)}")
    print(f"night {args.tag}: " + ("verified" if not bad else f"{bad} of these checks failed"))
    return 1 if bad else 0


def audit_command(args: argparse.Namespace) -> int:
    """Score and audit stored weights again; 0 when the score is the recorded one to the last digit, 1 when not."""
    folder = Path("runs") / args.tag
    was = Chain.read(folder / "records.jsonl").outcome(args.experiment)
    number, threads = was.run.number, was.environment.threads
    here = folder / "experiments" / f"{number:04d}"
    settings = settings_from(
        preset=was.preset, device=was.device, data=args.data, threads=threads, recorded=(here, was.profile)
    )
    if settings.dataset.digest != was.seals.data:
        raise DataError(f"{settings.dataset.path} is not the data that experiment {number} was scored on")
    try:
        weights = bytearray((here / "weights.safetensors").read_bytes())
        source = (here / "train.py").read_bytes()
    except FileNotFoundError as e:
        raise UsageError(
            f"{e.filename} is not there: weights are kept for kept experiments; retrain with: hotloop replay "
            f"{number} --tag {args.tag}"
        ) from None
    for what, data, digest in (("weights", weights, was.weights_sha256), ("train.py", source, was.source_sha256)):
        if hashlib.sha256(data).hexdigest() != digest:
            raise HotloopError(f"the stored {what} of experiment {number} are not those that were scored")
    to = folder / "audits" / f"{number:04d}"
    to.mkdir(parents=True, exist_ok=True)
    kept = (r for r in NightFolder.reading(folder).rows() if r.decision == Decision.KEEP)
    of = next((r for r in kept if r.commit == was.run.parent), None)
    reference = losses(folder / "experiments" / f"{of.number:04d}" / LOSSES) if of else None
    with Evaluator(scoring_of(source, was.run.seed, settings, to, reference=reference)) as evaluator:
        found = evaluator.run(weights, token_seconds(was.training, was.device))
    for key, value in msgspec.structs.asdict(found.audit).items():
        if value is not None:
            print(f"{key + ':':<20}{value:.6g}" if isinstance(value, float) else f"{key + ':':<20}{value}")
    print(f"val_bpb:            {found.scores.val_bpb:.9f}\nrecorded:           {was.val_bpb:.9f}")
    same = found.scores.val_bpb == was.val_bpb
    print("identical" if same else "DIFFERENT: the machine, the versions or the thread count are not the same")
    return 0 if same else 1
