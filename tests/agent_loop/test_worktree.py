"""What an agent leaves in the worktree is looked at before anything reads it, and git has a limit of time."""

from __future__ import annotations

import os
from pathlib import Path

import git
import pytest

from hotloop.agent_loop import gitrepo
from hotloop.agent_loop.gitrepo import NightRepo, open_repo
from hotloop.agent_loop.source import ProposalError
from hotloop.harness.errors import UsageError
from hotloop.harness.single import read_train_source

SPARSE = 200 << 30
TRAIN = b"def build_model(spec): ...\ndef train(run): ...\n"


@pytest.fixture
def night(tmp_path: Path) -> NightRepo:
    with git.Repo.init(tmp_path / "repo") as repo:
        root = tmp_path / "repo"
        (root / "train.py").write_bytes(TRAIN)
        (root / "README.md").write_text("read me\n")
        repo.git.add("-A")
        repo.git(c=["user.name=a", "user.email=a@b"]).commit("-m", "start")
    made = NightRepo(open_repo(root), "t", tmp_path / "night")
    made.start()
    made.prepare(made.head())
    return made


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "sparse":
        with open(path, "wb") as f:
            f.write(TRAIN)
            f.truncate(SPARSE)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


KINDS = [("sparse", "bytes, and at most"), ("pipe", "a pipe"), ("link", "a link"), ("folder", "a folder")]


@pytest.mark.parametrize(("kind", "words"), KINDS)
def test_a_train_py_that_is_no_small_file_is_refused_before_git_reads_it(
    night: NightRepo, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    head = night.head()
    put(kind, night.worktree / "train.py")
    with monkeypatch.context() as m:
        m.setattr(NightRepo, "_git", lambda *args, **kwargs: pytest.fail("git was asked"))
        with pytest.raises(ProposalError, match=words) as e:
            night.proposed(head)
    assert e.value.status == "invalid"
    night.prepare(head)
    assert night.proposed(head) == TRAIN


def test_another_file_that_keeps_git_busy_ends_the_turn_and_not_the_night(
    night: NightRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = night.head()
    put("sparse", night.worktree / "README.md")
    with monkeypatch.context() as m:
        m.setattr(gitrepo, "GIT_S", 1.0)
        with pytest.raises(ProposalError, match="keeps git busy") as e:
            night.proposed(head)
    assert e.value.status == "invalid"
    night.prepare(head)
    assert night.proposed(head) == TRAIN


@pytest.mark.parametrize(("kind", "words"), KINDS)
def test_a_single_run_takes_no_such_file_either(tmp_path: Path, kind: str, words: str) -> None:
    put(kind, tmp_path / "train.py")
    with pytest.raises(UsageError, match=words):
        read_train_source(tmp_path / "train.py")


def test_a_device_is_no_train_py() -> None:
    with pytest.raises(UsageError, match="a device"):
        read_train_source(Path("/dev/zero"))


def test_what_cannot_be_parsed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(TRAIN + b"x = " + b"1 + " * 20_000 + b"1\n")
    with pytest.raises(UsageError, match="mend the file") as e:
        read_train_source(tmp_path / "train.py")
    assert len(str(e.value)) < 400
