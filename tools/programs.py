"""Install the programs that some tests need: `python tools/programs.py [bubblewrap] [chromium] [clients]`.

bubblewrap and Chromium come by apt-get where this is root (never by sudo), the coding agents by npm into .clients. What
is installed is said first; what could not be is said last, and its tests are skipped with the reason. INSTALL=0
installs nothing. Nothing waits for ever: without a network it ends within minutes. Under CI=true a missing bubblewrap
is an error, since without it every attack on the best sandbox would be skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ("@anthropic-ai/claude-code@2.1.330", "@openai/codex@0.169.0")
APT = [
    "apt-get",
    "-qq",
    "-o",
    "Acquire::Retries=1",
    "-o",
    "Acquire::http::Timeout=15",
    "-o",
    "Acquire::https::Timeout=15",
]
NPM = ["npm", "install", "--no-fund", "--no-audit", "--no-save", "--fetch-retries=1", "--fetch-timeout=30000"]
LIST_S, FETCH_S = 120.0, 900.0


def there(name: str) -> bool:
    if name == "bubblewrap":
        return shutil.which("bwrap") is not None
    if name == "chromium":
        return any(shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))
    folder = ROOT / ".clients" / "node_modules"
    return all((folder / package.rpartition("@")[0]).is_dir() for package in CLIENTS)


def cure(name: str) -> str:
    """How this machine may bring it; empty where this user may do it now."""
    if name == "clients":
        return "" if shutil.which("npm") else "npm is not installed; apt-get install npm, then: make clients"
    if shutil.which("apt-get") is None:
        return f"there is no apt-get here; install {name} by this system's own means"
    return "" if os.geteuid() == 0 else f"root can: apt-get install {name}"


def run(command: list[str], seconds: float | None) -> bool:
    """Whether it ended well, in time; it and all that it started is killed otherwise."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL) as child:
        try:
            return child.wait(seconds) == 0
        except BaseException as e:
            os.killpg(child.pid, 9)
            if isinstance(e, subprocess.TimeoutExpired):
                return False
            raise


def install(names: list[str]) -> None:
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
    packages = [n for n in names if n != "clients"]
    if packages:
        run([*APT, "update"], LIST_S)
    for name in packages:
        wanted = ["install", "-y", "--no-install-recommends", name]
        # Only fetching is bounded in time: dpkg that is killed leaves a machine in need of repair.
        if run([*APT, *wanted, "--download-only"], FETCH_S):
            run([*APT, *wanted, "--no-download"], None)
    if "clients" in names:
        run([*NPM, "--prefix", ".clients", *CLIENTS], FETCH_S)


def main() -> int:
    asked = sys.argv[1:] or ["bubblewrap", "chromium", "clients"]
    missing = [name for name in asked if not there(name)]
    possible = [] if os.environ.get("INSTALL") == "0" else [name for name in missing if not cure(name)]
    if possible:
        print(f"hotloop: installing what some tests need: {', '.join(possible)} (INSTALL=0: without)", flush=True)
        install(possible)
    left = [name for name in missing if not there(name)]
    for name in left:
        why = cure(name) or ("INSTALL=0" if name not in possible else "it could not be fetched; see above")
        print(f"hotloop: {name} is not installed ({why}); tests that need it are skipped", flush=True)
    if "bubblewrap" in left and os.environ.get("CI") == "true":
        print(
            "hotloop: under CI=true bubblewrap must be there, or no attack on the best sandbox is tried",
            file=sys.stderr,
        )
        return 1
    return 1 if sys.argv[1:] and left else 0


if __name__ == "__main__":
    sys.exit(main())
