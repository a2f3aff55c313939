"""For all tests: what is skipped says why in one line at the end, and nothing hangs on how fast a machine is.

Nothing is written to the user's home.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from hotloop.harness.sandbox import levels, process, residency
from tests import warm
from tests.needs import NEEDS

_STATE = tempfile.TemporaryDirectory(prefix="hotloop-state-")
os.environ["HOTLOOP_STATE"] = _STATE.name  # of this run of the tests, in the processes that they start too

# How long one example takes says how busy the machine is, and nothing of the code.
settings.register_profile("hotloop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hotloop")


@pytest.fixture(autouse=True)
def _pages_stay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What evaluators read is dropped from the machine's memory, and looked at one by one, for those tests alone that
    are about it: each test after it would read the packages from the disk again.
    """
    if request.path.name != "test_read_only_stores.py":
        monkeypatch.setattr(residency, "begin", lambda since: None)
        monkeypatch.setattr(residency, "settle_times", lambda: None)


@pytest.fixture(scope="module")
def warm_children() -> Iterator[None]:
    """For tests that are not of the sandbox: their children are forked by a process that has imported torch.

    The best level is then the best one without bubblewrap, which starts programs of its own; a test that asks for
    level 3 gets it, cold.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": warm.Popen}))
        found = levels._candidates
        patch.setattr(levels, "_candidates", lambda missing: sorted(found(missing), key=lambda c: c.level == 3))
        levels.best.cache_clear()
        yield
    levels.best.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=0.0, help="start no test after so many seconds (0: no limit)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    most = item.config.getoption("--seconds")
    if most and time.monotonic() - item.config.stash[BEGAN] > most:
        pytest.skip(f"the {most:g} seconds were over (make test runs them all)")
    for name, find in NEEDS.items():
        if item.get_closest_marker(name):
            find()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, one line a reason, whatever was asked for on the command line; in CI, what each part took."""
    took: Counter[str] = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
        took["/".join(report.nodeid.split("::")[0].split("/")[:2])] += report.duration
    if os.environ.get("CI"):
        terminalreporter.section("seconds of each part, its workers together")
        for part, seconds in took.most_common():
            terminalreporter.write_line(f"{seconds:8.0f}  {part}")
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not run")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number} skipped: {reason}")
