"""pytest-benchmark's hooks: device facts and the commit go into every result file; rates are shown at the end."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotloop")
    group.addoption("--operator", action="append", default=[], help="only this operator; may be given again")
    group.addoption("--shape", action="append", default=[], help="only this shape class; may be given again")
    group.addoption("--rounds", type=int, default=0, help="timed rounds (default: 30 on a GPU, 3 on a CPU)")
    group.addoption("--deadline", type=float, default=0.0, help="start no benchmark after so many seconds")
    group.addoption(
        "--repeats",
        type=int,
        default=0,
        help="runs at the baseline that are compared to the bit (default: 100; 3 on a CPU)",
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from hotloop.harness.proof.device import facts

    machine_info.clear()  # host names and the like are nobody's business
    machine_info.update(facts())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [(b.name, b.extra_info) for b in getattr(session, "benchmarks", []) if b.extra_info]
    if not rows:
        return
    terminalreporter.section("rates")
    for name, info in rows:
        shown = ", ".join(f"{k} {v}" for k, v in info.items() if isinstance(v, (int, float, str)))
        terminalreporter.line(f"{name:<60} {shown}")
