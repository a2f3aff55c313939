"""The seal that is committed is the seal of the files that are committed; an edit is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hotloop.harness.errors import SealError
from hotloop.harness.paths import project_root
from hotloop.harness.records.seal import verify_seal, write_seal


def test_the_committed_seal_is_true() -> None:
    assert len(verify_seal()) == 64


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("harness", "kernels"):
        shutil.copytree(project_root() / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project_root() / "prepare.py", tmp_path)
    write_seal(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["kernels/reference.py", "harness/scoring/evaluation.py", "prepare.py"])
def test_an_edit_is_found_and_named(copy: Path, path: str) -> None:
    before = verify_seal(copy)
    text = (copy / path).read_text()
    (copy / path).write_text(text + "\n# faster\n")
    with pytest.raises(SealError, match=path.replace(".", r"\.")) as e:
        verify_seal(copy)
    assert "git checkout" in str(e.value)
    (copy / path).write_text(text)
    assert verify_seal(copy) == before


def test_an_added_and_a_removed_file_are_found(copy: Path) -> None:
    (copy / "kernels" / "extra.py").write_text("")
    with pytest.raises(SealError, match=r"kernels/extra\.py"):
        verify_seal(copy)
    (copy / "kernels" / "extra.py").unlink()
    (copy / "harness" / "settings.py").unlink()
    with pytest.raises(SealError, match=r"harness/settings\.py"):
        verify_seal(copy)


def test_a_missing_seal_is_an_error(copy: Path) -> None:
    (copy / "harness" / "seal.json").unlink()
    with pytest.raises(SealError, match="hotloop seal"):
        verify_seal(copy)
