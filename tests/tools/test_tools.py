"""What make runs before there is an environment, and what it installs for the tests; apt-get and npm are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from hotloop.harness.paths import project_root

TOOLS = project_root() / "tools"


def tool(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = str(TOOLS / f"{name}.py")
    exec(compile((TOOLS / f"{name}.py").read_text(), module.__file__, "exec"), module.__dict__)
    return module


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def said(module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(sys, "argv", ["environment.py", str(folder / "venv")])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not (folder / "venv").exists()
    return str(ended.value)


def test_an_old_python_takes_a_newer_one_or_says_how_to_bring_it(
    bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tool("environment")
    program(bin, "git", "")
    assert environment.interpreter("v") == sys.executable
    monkeypatch.setattr(environment, "new_enough", lambda python: python != sys.executable)
    words = said(environment, monkeypatch, tmp_path)
    assert words.count("\n") == 0 and "3.11 or newer is needed" in words and "uv venv --seed --python 3.12" in words
    program(bin, "python3.12", "")
    assert environment.interpreter("v") == str(bin / "python3.12")


def test_what_cannot_work_is_said_before_anything_is_made(
    bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tool("environment")
    assert "apt-get install git" in said(environment, monkeypatch, tmp_path)
    program(bin, "git", "")
    monkeypatch.setattr(environment, "answers", lambda python, code: "ensurepip" not in code and "pip" not in code)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install python{version}-venv" in said(environment, monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "need Linux" in said(environment, monkeypatch, tmp_path)


def test_an_environment_without_pip_is_made_again(tmp_path: Path) -> None:
    """As an interruption leaves it; in a path with a space."""
    folder = tmp_path / "a b" / "venv"
    make = [sys.executable, str(TOOLS / "environment.py"), str(folder)]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "old").touch()
    subprocess.run(make, check=True)
    assert not (folder / "old").exists()
    (folder / "new").touch()
    subprocess.run(make, check=True)  # now it is whole: nothing is done
    assert (folder / "new").exists()


def install(bin: Path, folder: Path, *names: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """programs.py in a folder of its own, with `bin` as PATH."""
    (folder / "tools").mkdir(exist_ok=True)
    (folder / "tools" / "programs.py").write_text((TOOLS / "programs.py").read_text())
    env = {"PATH": str(bin), **settings}
    command = [sys.executable, str(folder / "tools" / "programs.py"), *names]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="apt-get is for root alone")


@ROOT_ONLY
def test_what_is_installed_is_said_first_and_what_could_not_be_last(bin: Path, tmp_path: Path) -> None:
    program(bin, "apt-get", f'echo "apt-get $*"\ncase "$*" in *"bubblewrap --no-download"*) : > {bin}/bwrap;; esac\n'
            f'[ -e {bin}/bwrap ] && /bin/chmod 755 {bin}/bwrap; case "$*" in *chromium*) exit 100;; esac')  # fmt: skip
    program(bin, "npm", 'echo "npm $*"; exit 1')
    done = install(bin, tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == ("hotloop: installing what some tests need: bubblewrap, chromium, clients (INSTALL=0: without)")
    assert lines[-2:] == [
        f"hotloop: {name} is not installed (it could not be fetched; see above); tests that need it are skipped"
        for name in ("chromium", "clients")
    ]
    assert not any("chromium --no-download" in line for line in lines)  # nothing is unpacked that was not fetched
    assert done.returncode == 0
    again = install(bin, tmp_path, "bubblewrap")
    assert (again.returncode, again.stdout) == (0, "")


def test_nothing_is_installed_where_it_may_not_be(bin: Path, tmp_path: Path) -> None:
    for name in ("apt-get", "npm", "sudo"):
        program(bin, name, f": > {tmp_path}/ran")
    done = install(bin, tmp_path, INSTALL="0")
    assert done.returncode == 0
    assert done.stdout.count("(INSTALL=0)" if os.geteuid() == 0 else "is not installed (") >= 1
    assert not (tmp_path / "ran").exists()
    under_ci = install(bin, tmp_path, INSTALL="0", CI="true")
    assert (under_ci.returncode, "bubblewrap must be there" in under_ci.stderr) == (1, True)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    programs = tool("programs")
    script = f"sleep 1000 & echo $! > {tmp_path}/pid; wait"
    assert programs.run(["sh", "-c", script], 1.0) is False
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    while alive(state):  # it is killed, and may not be gone yet
        time.sleep(0.01)


def test_the_tests_that_a_change_touches() -> None:
    tests = {
        Path("tests/a/test_x.py"): "from hotloop.harness.sandbox.wire import Wire\n",
        Path("tests/a/test_y.py"): "from hotloop.harness.sandbox import wire\n",
        Path("tests/a/test_z.py"): "import harness.wires\n",
        Path("tests/b/test_t.py"): "import train\n",
    }
    touched = tool("touched").touched
    assert [p.name for p in touched([Path("harness/sandbox/wire.py")], tests)] == ["test_x.py", "test_y.py"]
    assert [p.name for p in touched([Path("train.py"), Path("README.md")], tests)] == ["test_t.py"]
    assert [p.name for p in touched([Path("tests/a/helper.py")], tests)] == ["test_x.py", "test_y.py", "test_z.py"]
    assert [p.name for p in touched([Path("tests/b/test_t.py")], tests)] == ["test_t.py"]
