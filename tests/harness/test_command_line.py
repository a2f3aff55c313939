"""How commands end."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotloop import prepare
from hotloop.agent_loop import cli
from hotloop.bench import cli as bench_cli
from hotloop.harness import single
from hotloop.harness.command_line import exit_status
from hotloop.harness.errors import DeviceError, HotloopError
from hotloop.harness.files import write_whole


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (HotloopError("no baseline"), 1, "hotloop: no baseline\n"),
        (DeviceError("a GPU called \x1b[31m"), DeviceError.exit_code, "hotloop: a GPU called \\x1b[31m\n"),
        (OSError(28, "No space left on device", "runs/t"), 1, "hotloop: runs/t: No space left on device; mend it"),
        (KeyboardInterrupt(), 130, "hotloop: stopped half-way\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert exit_status(command, "stopped half-way") == status
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == bool(words)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)


def test_every_command_line_ends_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full, wherever it is noticed."""

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(prepare, "prepare", full)
    monkeypatch.setattr(single, "run_command", full)
    monkeypatch.setattr(bench_cli, "_smoke", full)
    monkeypatch.chdir(tmp_path)
    ends = [
        cli.main(["run"]), cli.main(["prepare", "--preset", "laptop"]), prepare.main(["--preset", "laptop"]),
        single.main("train.py", []), bench_cli.main(["smoke"]), cli.main(["bench", "smoke"]),
    ]  # fmt: skip
    assert ends == [1] * 6
    assert capsys.readouterr().err == 6 * (
        "hotloop: somewhere: No space left on device; mend it and start the same command again\n"
    )


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "new" / "file", tmp_path / "other"
    write_whole(path, "first")
    other.write_text("of somebody else")
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, b"second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    path.unlink()
    path.symlink_to(other)
    write_whole(path, b"third")
    assert (path.read_text(), path.is_symlink(), other.read_text()) == ("third", False, "of somebody else")
