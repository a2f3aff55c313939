"""Git as memory: a branch and a worktree of the night's own. The user's checkout is never touched.

A candidate is a commit made from the incumbent's tree with train.py's blob replaced, so that its diff cannot touch
anything else; it is kept under `refs/hotloop/<tag>/<number>` whatever is decided. The branch `autoresearch/<tag>` has
one commit for each kept experiment, with its numbers in the message. It is a function of the records, its hashes
included, so it can be made again at any time. No hook runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import git
from gitdb.base import IStream
from gitdb.exc import ODBError

from hotloop.agent_loop.source import MAX_BYTES, ProposalError, merge
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.files import kind_of, read_ordinary
from hotloop.harness.single import read_train_source
from hotloop.harness.text import one_line

__all__ = ["Git", "Kept", "NightRepo", "Repo", "branch_of", "free_tag", "open_repo", "said"]

# No hook runs; and somebody else's git (a gc, a fetch) is waited for.
_SAFE = [
    "core.hooksPath=/dev/null", "core.filesRefLockTimeout=10000", "core.packedRefsTimeout=10000",
    "i18n.commitEncoding=UTF-8",
]  # fmt: skip
# In the night's worktree, which holds the bytes that were committed.
_BYTES = ["core.fsmonitor=false", "core.bare=false", "core.autocrlf=false", "core.eol=lf", "core.safecrlf=false"]
GIT_S = 60.0
_AUTHOR = {
    "GIT_AUTHOR_NAME": "hotloop", "GIT_AUTHOR_EMAIL": "hotloop@localhost",
    "GIT_COMMITTER_NAME": "hotloop", "GIT_COMMITTER_EMAIL": "hotloop@localhost",
}  # fmt: skip


class Git(git.Git):
    """Git's commands, none of which may take longer than GIT_S: an agent's worktree can hold what takes it an hour."""

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute(*args, **({"kill_after_timeout": GIT_S} | kwargs))


class Repo(git.Repo):
    """A repository whose commands have a limit of time."""

    GitCommandWrapperType = Git


def open_repo(folder: Path) -> git.Repo:
    """The repository that holds `folder`, fit for a night.

    Raises:
        UsageError: no repository, one that git refuses or that cannot be read, no commit, changed tracked files, or no
            train.py that can run.
    """
    try:
        repo = Repo(folder, search_parent_directories=True)
        root = Path(repo.working_tree_dir or "")
    except (git.InvalidGitRepositoryError, git.NoSuchPathError):
        raise UsageError(
            f"{folder} is not in a git repository; start in a clone of hotloop, or run: git init && git add -A && "
            f"git commit -m start"
        ) from None
    repo.git.set_persistent_git_options(c=_SAFE)
    try:
        if (names := repo.git.rev_parse("--show-object-format")) != "sha1":
            raise UsageError(
                f"{root} names its objects by {names}, which is not supported; make a copy by SHA-1: git init --object-"
                f"format=sha1 in a new folder, and copy the files"
            )
        repo.git.rev_parse("--verify", "--quiet", "HEAD^{commit}")
    except git.GitCommandError as e:
        if words := said(e):  # another user's repository, for one
            raise UsageError(f"git refuses {root}: {words}") from None
        raise UsageError(f"{root} has no commit yet; run: git add -A && git commit -m start") from None
    read_train_source(root / "train.py")
    changed = repo.git.status("--porcelain", "--untracked-files=no").splitlines()
    if changed:
        names = ", ".join(one_line(line[3:], 80) for line in changed[:3]) + (" ..." if len(changed) > 3 else "")
        raise UsageError(f"the checkout has uncommitted changes ({names}); commit them, or put them away: git stash")
    if "train.py" not in {entry.path for entry in repo.head.commit.tree}:
        raise UsageError(f"train.py is not committed; run: git add {root / 'train.py'} && git commit")
    return repo


def said(error: BaseException) -> str:
    """What git, or whoever raised it, said: one line; empty for nothing."""
    words = getattr(error, "stderr", None)
    if words is None:
        return one_line(str(error), 300)
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)
    return one_line(text.strip().removeprefix("stderr:").strip().strip("'"), 300)


@dataclass(frozen=True)
class Kept:
    """One commit of the branch: the tree of `commit`, with a message and a time of its own."""

    commit: str
    message: str
    when: str


def branch_of(tag: str) -> str:
    return f"autoresearch/{tag}"


def free_tag(repo: git.Repo, runs: Path, wish: str) -> str:
    """`wish`, or `wish-2`, `wish-3`, ... where that is taken."""
    taken = {head.name for head in repo.heads}
    tag, count = wish, 1
    while branch_of(tag) in taken or (runs / tag).exists():
        count += 1
        tag = f"{wish}-{count}"
    return tag


class NightRepo:
    """The repository as one night uses it.

    An agent works in the worktree and may leave anything there: a deleted `.git`, commits, another branch. So nothing
    here asks the worktree what it is. Git's folders are named outright, the incumbent is a commit that the records
    name, and a worktree that is not ours any more is made anew: without its `.git`, git would take the user's own
    checkout for it.
    """

    def __init__(self, repo: git.Repo, tag: str, folder: Path) -> None:
        self.repo, self.tag = repo, tag
        self.branch = branch_of(tag)
        self.ref = f"refs/heads/{self.branch}"  # in full: a tag may have the branch's name
        self.worktree = folder.resolve() / "worktree"
        self._common = Path(repo.common_dir).resolve()
        self._line: list[tuple[Kept, str]] = []  # the branch, as far as this process made it

    def start(self) -> str:
        """Make the branch at HEAD if it is new; returns its commit. The worktree is made by `prepare`."""
        self.check_name()
        for lock in self._own_locks():  # of a git that was killed; ours is the only driver
            lock.unlink(missing_ok=True)
        if not self.exists():
            self.repo.git.update_ref(self.ref, self.repo.git.rev_parse("--verify", "HEAD^{commit}"))
        return self.head()

    def exists(self) -> bool:
        return self.branch in {h.name for h in self.repo.heads}

    def check_name(self, new: bool = False) -> None:
        """Raises UsageError for a tag that git takes for no branch, or whose branch is not ours to make or to move.

        Args:
            new: the night has no records, so that a branch of its name is somebody else's.
        """
        try:
            self.repo.git.check_ref_format("--branch", self.branch)
        except git.GitCommandError:
            raise UsageError(f"{self.tag!r} cannot be a run tag; use letters, digits, '.', '_' and '-'") from None
        names = {h.name for h in self.repo.heads}
        above = self.branch.rpartition("/")[0]
        for other in sorted(n for n in names if n == above or n.startswith(f"{self.branch}/")):
            raise UsageError(
                f"the branch {other!r} is in the way of {self.branch!r}, for git cannot have both; rename it: "
                f"git branch -m {other} my-{other.replace('/', '-')}"
            )
        if new and self.branch in names:
            raise UsageError(
                f"there is a branch {self.branch} and no night {self.tag}; a night would move it. Give another --tag, "
                f"or rename it: git branch -m {self.branch} my-{self.tag}"
            )
        if not self.repo.head.is_detached and self.repo.head.reference.path == self.ref:
            raise UsageError(
                f"the checkout is on {self.branch}, which the night moves; run: git switch -c my-{self.tag}"
            )

    def _own_locks(self) -> Iterator[Path]:
        yield self._common / "refs" / "heads" / f"{self.branch}.lock"
        yield from (self._common / "refs" / "hotloop" / self.tag).glob("*.lock")
        private = self._private()
        if private:
            yield from private.glob("*.lock")

    def head(self) -> str:
        return str(self._commit(self.ref).hexsha)

    def source(self, commit: str) -> bytes:
        """train.py as of a commit. Raises HotloopError where git has it no more."""
        try:
            data: bytes = (self._commit(commit).tree / "train.py").data_stream.read()
        except KeyError:
            raise HotloopError(f"commit {commit[:12]} has no train.py") from None
        return data

    def _commit(self, name: str) -> git.Commit:
        """In the driver's thread alone: the library asks one git, by a pipe that turns would mix up."""
        try:
            return self.repo.commit(name)
        except (ValueError, ODBError):  # what gitdb has for it
            raise HotloopError(
                f"git has no commit {name[:40]} any more, which the night's records name; fetch it from a copy of the "
                f"repository, or give another --tag"
            ) from None

    def set_branch(self, base: str, kept: list[Kept]) -> str:
        """Make the branch what was kept, on top of the baseline's commit; returns its head."""
        if kept:
            head = self._commit(self.ref)
            if head.message == kept[-1].message + "\n" and head.tree == self._commit(kept[-1].commit).tree:
                return str(head.hexsha)
        for i, one in enumerate(kept):
            known = self._line[i] if i < len(self._line) else None
            if known is None or known[0] != one:
                parent = self._line[i - 1][1] if i else base
                sha = self._commit_tree(f"{one.commit}^{{tree}}", parent, one.message, one.when)
                self._line[i:] = [(one, sha)]
        new = self._line[len(kept) - 1][1] if kept else base
        self.repo.git.update_ref(self.ref, new)
        return new

    def prepare(self, commit: str) -> None:
        """Put the worktree to a commit, whatever an agent left there. No branch moves."""
        private = self._private()
        if private is None:
            private = self._make_worktree()
        for name in ("index.lock", "HEAD.lock", "index"):  # the index is the worktree's own word of what it holds
            (private / name).unlink(missing_ok=True)
        self._git(private, "symbolic-ref", "HEAD", self.ref)
        self._git(private, "read-tree", "--reset", "-u", commit)
        self._git(private, "clean", "-q", "-ffdx")

    def merged(self, base: str, ours: str, theirs: bytes) -> bytes | None:
        """train.py with both what `ours` and what `theirs` changed since `base`; None where they change the same."""
        old, new = self.source(base), self.source(ours)
        try:
            return merge(old, new, theirs)
        except (RecursionError, MemoryError, ValueError):
            return None

    def proposed(self, commit: str) -> bytes:
        """The train.py that an agent left in the worktree, which had `commit` checked out.

        Raises:
            ProposalError: something else was changed too, or train.py is no ordinary file.
        """
        with contextlib.suppress(FileNotFoundError):
            if what := kind_of(self.worktree / "train.py", MAX_BYTES):  # before git reads it
                raise ProposalError("invalid", f"train.py is {what}")
        if self._private() is None:
            raise ProposalError("invalid", "the worktree's .git was removed or replaced; only train.py may change")
        # An index of our own: the agent's could say that nothing changed.
        with tempfile.TemporaryDirectory() as folder:
            env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self._git(self._common, "read-tree", commit, env=env)
            try:
                changed = self._git(self._common, "diff", "--no-ext-diff", "--no-renames", "--name-only", "-z", env=env)
                new = self._git(self._common, "ls-files", "--others", "--exclude-standard", "-z", env=env)
            except git.GitCommandError as e:
                if "Timeout" not in str(e.stderr):
                    raise
                raise ProposalError(
                    "invalid",
                    f"the worktree keeps git busy for more than {GIT_S:g} s; only train.py may change",
                ) from None
        others = sorted({name for name in (changed + new).split("\0") if name} - {"train.py"})
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ProposalError(
                "invalid", f"only train.py may change; also changed: {one_line(', '.join(others[:3]), 200)}{more}"
            )
        source = read_ordinary(self.worktree / "train.py", MAX_BYTES + 1)
        if source is None:
            raise ProposalError("invalid", "train.py is gone, or is not an ordinary file")
        return source

    def commit(self, source: bytes, parent: str, message: str, number: int) -> str:
        """Commit `source` as train.py on top of `parent`, under the number's own ref; no branch moves."""
        blob = self.repo.odb.store(IStream("blob", len(source), io.BytesIO(source))).hexsha.decode()
        with tempfile.TemporaryDirectory() as folder:
            env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.repo.git.read_tree(parent, env=env)
            self.repo.git.update_index("--cacheinfo", f"100644,{blob},train.py", env=env)
            tree = self.repo.git.write_tree(env=env)
        sha = self._commit_tree(tree, parent, message)
        self.repo.git.update_ref(f"refs/hotloop/{self.tag}/{number:04d}", sha)
        return sha

    def _commit_tree(self, tree: str, parent: str, message: str, when: str | None = None) -> str:
        dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when} if when else {}
        made = self.repo.git.commit_tree(tree, "-p", parent, "-m", message, env=_AUTHOR | dates)
        return str(made)

    # The worktree.

    def _private(self) -> Path | None:
        """Git's own folder of our worktree; None where the worktree is missing or is not that one any more."""
        link = read_ordinary(self.worktree / ".git", 8192)
        if link is None or not link.startswith(b"gitdir: "):
            return None
        private = (self.worktree / os.fsdecode(link[len(b"gitdir: ") :]).strip()).resolve()
        try:
            back = (private / os.fsdecode((private / "gitdir").read_bytes()).strip()).resolve()
        except (OSError, ValueError):
            return None
        ours = private.parent == self._common / "worktrees" and back == self.worktree / ".git"
        return private if ours else None

    def _make_worktree(self) -> Path:
        if self.worktree.is_symlink() or self.worktree.is_file():
            self.worktree.unlink()
        elif self.worktree.exists():
            shutil.rmtree(self.worktree)
        self.repo.git.worktree("prune")
        try:
            self.repo.git.worktree("add", "--force", "--detach", "--no-checkout", str(self.worktree), self.ref)
        except git.GitCommandError as e:
            raise UsageError(f"the worktree {self.worktree} cannot be made: {said(e)}") from None
        private = self._private()
        assert private is not None
        return private

    def _git(self, git_dir: Path, *args: str, env: dict[str, str] | None = None) -> str:
        where = [f"--git-dir={git_dir}", f"--work-tree={self.worktree}"]
        safe = [word for setting in (*_SAFE, *_BYTES) for word in ("-c", setting)]
        return str(Git(self.worktree).execute(["git", *where, *safe, *args], env=env))
