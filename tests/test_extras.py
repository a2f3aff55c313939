"""Every extra of the package can be installed: resolved by metadata alone, a few megabytes and no wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `explicit`, as pip: a pre-release is taken only where a requirement names one.
RESOLVE = ("-m", "uv", "pip", "compile", "--quiet", "--prerelease", "explicit", "--python-platform")
PLATFORM = "x86_64-manylinux_2_28"


def resolved(requirements: Path, *args: str) -> tuple[str, str]:
    """(what would be installed, why nothing can be)."""
    command = [sys.executable, *RESOLVE, PLATFORM, str(requirements), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout, done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def _index(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("uv")
    alone = tmp_path_factory.mktemp("index") / "requirements.in"
    alone.write_text("typing-extensions\n")
    if why := resolved(alone)[1]:
        pytest.skip(f"no package index can be asked: {why.strip().splitlines()[-1].strip()}")


@pytest.mark.usefixtures("_index")
@pytest.mark.parametrize(("python", "torch", "triton"), [("3.12", "2.11.0", "3.6.0"), ("3.11", "2.13.0", "3.7.1")])
def test_every_extra_resolves_for_the_pairs_that_are_supported(
    python: str, torch: str, triton: str, tmp_path: Path
) -> None:
    pinned = tmp_path / "constraints.txt"
    pinned.write_text(f"torch=={torch}\n")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [a for name in extras for a in ("--extra", name)]
    found, why = resolved(ROOT / "pyproject.toml", *asked, "--python-version", python, "--constraint", str(pinned))
    assert not why, why
    lines = {line.split()[0] for line in found.splitlines() if line and not line.startswith((" ", "#"))}
    assert {f"torch=={torch}", f"triton=={triton}"} <= lines
    assert any(line.startswith("flash-attn-4==4") for line in lines)


@pytest.mark.usefixtures("_index")
def test_what_only_has_pre_releases_and_names_none_is_seen(tmp_path: Path) -> None:
    bare = tmp_path / "requirements.in"
    bare.write_text("flash-attn-4[cu13]\n")
    assert "flash-attn-4" in resolved(bare, "--python-version", "3.12")[1]
