"""Installing a prebuilt FlashAttention 3 by its lock, from a stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hotloop.agent_loop.cli import main
from hotloop.agent_loop.commands import install_flash3 as flash3
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.machine import ATTENTION_PACKAGES

FILES = {
    "__init__.py": "",
    "_ops.py": "WHO = 'the stand-in'\n",
    "flash_attn_interface.py": (
        "from ._ops import WHO\ndef _flash_attn_forward():\n    return WHO\ndef _flash_attn_backward():\n    pass\n"
    ),
}
BODY = {"repository": "somebody/flash-attn3", "revision": "0123456789" * 4, "folder": "build/torch213/flash_attn3"}


def lock_of(path: Path, **changes: Any) -> Path:
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    path.write_text(json.dumps(BODY | {"files": files} | changes))
    return path


def lay_out(folder: Path) -> Path:
    for name, text in FILES.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_the_lock_names_is_installed_and_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = flash3.read_lock(lock_of(tmp_path / "lock.json"))
    asked = []

    def hub(url: str, timeout: float) -> Any:
        asked.append(url)
        return open(lay_out(tmp_path / "hub") / url.rsplit("/", 1)[1], "rb")

    monkeypatch.setattr(urllib.request, "urlopen", hub)
    target = tmp_path / "site"
    version = flash3.install(lock, pip=("--target", str(target)))
    at = "https://huggingface.co/somebody/flash-attn3/resolve/" + BODY["revision"] + "/build/torch213/flash_attn3/"
    assert asked == [at + name for name in sorted(FILES)]  # of the pinned revision alone
    script = (
        f"import sys, importlib.metadata; sys.path.insert(0, {str(target)!r})\n"
        "import flash_attn_interface as f\n"
        "print(f._flash_attn_forward(), importlib.metadata.version('hotloop-flash3'))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"the stand-in {version}\n", done.stderr
    # What a record carries: the version, which has the revision in it, and pip's list of hashes.
    assert flash3.DISTRIBUTION in ATTENTION_PACKAGES
    assert version.startswith("3+012345678901.")
    (listed,) = target.glob("*.dist-info/RECORD")
    assert "hotloop_flash3/_ops.py,sha256=" in listed.read_text()


def test_other_files_are_another_version(tmp_path: Path) -> None:
    one = flash3.read_lock(lock_of(tmp_path / "lock.json"))
    other = flash3.read_lock(lock_of(tmp_path / "lock.json", files=one.files | {"_ops.py": "0" * 64}))
    assert one.version != other.version


@pytest.mark.parametrize("fault", ["another", "missing"])
def test_a_file_that_is_not_the_locks_installs_nothing(tmp_path: Path, fault: str) -> None:
    source = lay_out(tmp_path / "files")
    if fault == "missing":
        (source / "_ops.py").unlink()
    else:
        (source / "_ops.py").write_text("WHO = 'somebody else'\n")
    lock = flash3.read_lock(lock_of(tmp_path / "lock.json"))
    words = "cannot be had" if fault == "missing" else "not the lock's .*; nothing was installed"
    with pytest.raises(HotloopError, match=words):
        flash3.install(lock, source, pip=("--target", str(tmp_path / "site")))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "main"}, "'main' is no revision; the lock names a commit"),
        ({"files": {"../../x.py": "0" * 64}}, "is no name"),
        ({"files": {"x.py": ""}}, "'' is no SHA-256 of x.py"),
        ({"files": {"x.py": "0" * 64}}, "lacks flash_attn_interface.py"),
        ({"folder": "/etc"}, "'/etc' is no folder"),
        ({"files": 3}, "is no lock"),
    ],
)
def test_a_lock_that_pins_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        flash3.read_lock(lock_of(tmp_path / "lock.json", **changes))


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install", "flash3", "--lock", str(tmp_path / "none.json")]) == 2
    error = capsys.readouterr().err
    assert "none.json cannot be read: No such file" in error and error.count("\n") == 1
