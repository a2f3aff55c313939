"""What tests need beside Python's packages: the sandbox levels of this machine, and programs that may not be here.

A test that needs a program has its mark, and is skipped with the reason where it is not there; what was skipped
and why stands in one line each at the end of a run. `make test` installs these programs where it may.

    @pytest.mark.bubblewrap   sandbox level 3
    @pytest.mark.chromium     a browser
    @pytest.mark.clients      Claude Code and Codex
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hotloop.harness.errors import SandboxError
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox

CLIENTS = Path(__file__).parents[1] / ".clients" / "node_modules" / ".bin"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def at(level: int) -> object:
    """A sandbox level as a parameter of a test."""
    return pytest.param(level, marks=marks(level), id=f"L{level}")


def marks(level: int | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.bubblewrap] if level == 3 else []


def sandbox(level: int) -> Sandbox:
    """The sandbox of this level; the test is skipped, under CI=true failed at level 3, where this machine has none."""
    try:
        return best(level)
    except SandboxError as e:
        reason = str(e)
    if level == 3 and shutil.which("bwrap") is None:
        reason = "bubblewrap is not installed (apt-get install bubblewrap)"
    if level == 3 and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}. Under CI=true no attack on the best sandbox may be skipped", pytrace=False)
    pytest.skip(reason)


def browser() -> str:
    """The path of a browser, or the test is skipped."""
    found = next((p for name in BROWSERS if (p := shutil.which(name))), None)
    return found or pytest.skip("Chromium is not installed (apt-get install chromium)")


def clients() -> Path:
    """The folder of the coding agents' own programs, or the test is skipped."""
    folder = Path(os.environ.get("HOTLOOP_CLIENTS", CLIENTS))
    if shutil.which("node") is None or not all((folder / name).exists() for name in ("claude", "codex")):
        pytest.skip("Claude Code and Codex, or the Node.js that they need, are not installed (make clients)")
    return folder


NEEDS = {"bubblewrap": lambda: sandbox(3), "chromium": browser, "clients": clients}
