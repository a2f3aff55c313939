"""A test whose program is not there is skipped with the reason; under CI no attack is skipped in silence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bare(folder: Path, *args: str, ci: str = "") -> subprocess.CompletedProcess[str]:
    """pytest in an environment that has git, which it imports, env, which a sandbox starts with, and nothing else."""
    (folder / "bin").mkdir()
    for name in ("git", "env"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    env = os.environ | {"PATH": str(folder / "bin"), "HOTLOOP_CLIENTS": str(folder), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def test_without_its_program_each_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = bare(
        tmp_path, "-m", "bubblewrap or chromium or clients", "tests/agent_loop", "tests/harness", "tests/exploits"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    *_, counts = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ skipped, \d+ deselected in .*", counts), done.stdout[-3000:]
    reasons = re.findall(r"^(\d+) skipped: (.+)$", done.stdout, re.MULTILINE)
    assert {why.split(" ")[0] for _, why in reasons} == {"bubblewrap", "Claude", "Chromium"}
    assert sum(int(number) for number, _ in reasons) == int(counts.split(" ")[0])


def test_under_ci_the_best_sandbox_may_not_be_missing(tmp_path: Path) -> None:
    done = bare(tmp_path, "-m", "bubblewrap", "tests/harness/test_prewarm.py", ci="true")
    assert done.returncode == 1
    assert "bubblewrap is not installed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
