"""The edits of a night as unified diffs, from git; bounded, so that a page of them stays readable."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import git

from hotloop.agent_loop.gitrepo import Git
from hotloop.agent_loop.report.markup import Html, h, join
from hotloop.agent_loop.report.tally import Gain
from hotloop.harness.text import cut, one_line

__all__ = ["Change", "of_gains", "section"]

LINES, LINE_CHARACTERS, ALL_CHARACTERS = 300, 240, 1_500_000
_HASH = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Change:
    """What an edit did to train.py. `missing` says why there is no diff."""

    diff: str = ""
    added: int = 0
    removed: int = 0
    missing: str = ""

    @property
    def size(self) -> str:
        return "" if self.missing else f"+{self.added} \u2212{self.removed}"


def of_gains(repo: git.Repo | None, gains: Sequence[Gain]) -> dict[int, Change]:
    """Of each gain's number, its edit against what it was made from."""
    found = {}
    for row in (g.row for g in gains):
        parent = row.run.parent
        if repo is None:
            found[row.number] = Change(missing="not shown: the page was written without the repository")
        elif not (_HASH.fullmatch(row.commit) and _HASH.fullmatch(parent)):
            found[row.number] = Change(missing="the record names no parent commit")
        else:
            found[row.number] = _change(str(repo.common_dir), parent, row.commit)
    return found


@functools.lru_cache(maxsize=4096)
def _kept(folder: str, parent: str, commit: str) -> Change:
    """Commits do not change, so each diff is asked for once; an error is not kept."""
    text = Git(folder).execute(
        ["git", f"--git-dir={folder}", "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames",
         "--src-prefix=a/", "--dst-prefix=b/", "--text", "-U3", parent, commit, "--", "train.py"],
        stdout_as_string=False,
    )  # fmt: skip
    lines = bytes(text).decode("utf-8", "replace").split("\n")
    body = lines[next((i for i, line in enumerate(lines) if line.startswith("@@")), len(lines)) :]
    added = sum(line.startswith("+") for line in body)
    removed = sum(line.startswith("-") for line in body)
    shown = [cut(line, LINE_CHARACTERS) for line in body[:LINES]]
    if len(body) > LINES:
        shown.append(f"… {len(body) - LINES} more lines")
    return Change("\n".join(shown), added, removed)


def _change(folder: str, parent: str, commit: str) -> Change:
    try:
        return _kept(folder, parent, commit)
    except (git.GitError, OSError) as e:
        words = str(getattr(e, "stderr", "") or e)
        return Change(missing=f"git has no such diff: {one_line(words, 200)}")


def section(gains: Sequence[Gain], changes: dict[int, Change]) -> Html:
    """A fold for each edit, the latest first, up to a size for all of them together."""
    if not gains:
        return h("p", "Nothing was kept, so there is no edit to show.")
    folds, used, left = [], 0, 0
    for gain in reversed(gains):
        change = changes[gain.row.number]
        used += len(change.diff)
        if used > ALL_CHARACTERS:
            left += 1
            continue
        content = h("p", change.missing, class_="soft") if change.missing else _pre(change.diff)
        name = f"#{gain.row.number} {one_line(gain.row.description, 120)} "
        state = "" if gain.group == "confirmed" else f" {gain.group}"
        folds.append(h("details", h("summary", name, h("span", change.size, state, class_="meta")), content))
    more = h("p", f"{left} earlier ones were left out: hotloop diff N", class_="soft") if left else None
    return join([h("p", "Each edit against the train.py that it was made from; the latest first.", class_="soft"),
                 *folds, more])  # fmt: skip


def _pre(diff: str) -> Html:
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    return h("pre", *(h("span", line or " ", class_=kinds.get(line[:1])) for line in diff.rstrip("\n").split("\n")))
