"""The search of launch configurations, with processes and times that are given: faults, hangs, kills, its end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotloop.harness.tuning import configurations

ROOT = Path(__file__).resolve().parents[2]
TABLE = "tests.harness.scripted_kernels:KERNELS"


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trace"
    monkeypatch.setenv("TRACE", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


def best_of(notes: Path) -> dict[str, str | None]:
    body = json.loads(notes.read_text())["body"]
    return {key: here["best"] for key, here in body.items() if isinstance(here, dict) and "best" in here}


def test_what_faults_hangs_or_is_wrong_is_out_and_the_rest_is_searched(tmp_path: Path, trace: Path) -> None:
    notes, said = tmp_path / "notes.json", list[str]()
    found = configurations.main(["fatal"], notes, {}, time.time() + 600, said.append, TABLE, hang_s=3.0)
    assert found == {"fatal": {"all": {"SIZE": 2}}}
    assert best_of(notes) == {"fatal all": "SIZE=2"}
    assert json.loads(notes.read_text())["body"]["fatal all"]["out"] == {
        "SIZE=4": "it ended the process (CUDA error: an illegal memory access was encountered)",
        "SIZE=5": "it hangs", "SIZE=6": "another answer than the default's",
    }  # fmt: skip
    assert trace.read_text().count("fatal all 4") == trace.read_text().count("fatal all 5") == 1
    assert "fatal all: SIZE=2 (4 timed, 3 were none)" in said


def test_a_tuning_that_is_out_of_time_or_killed_goes_on(tmp_path: Path, trace: Path) -> None:
    """What was in flight when it was killed is no candidate's fault."""
    notes, chance = tmp_path / "notes.json", random.Random(1)
    code = "from pathlib import Path; from hotloop.harness.tuning.configurations import *; "
    code += f"main(['tame'], Path({str(notes)!r}), {{}}, 1e12, print, table={TABLE!r})"
    assert configurations.main(["tame"], notes, {}, 0.0, print, TABLE) == {}
    for _ in range(2):
        env = os.environ | {"ROUND_S": "0.05"}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        before = trace.read_text() if trace.exists() else ""
        while time.monotonic() < deadline and (not trace.exists() or trace.read_text() == before):
            time.sleep(0.05)
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        if notes.exists():
            json.loads(notes.read_text())  # whole at any moment
    found = configurations.main(["tame"], notes, {}, time.time() + 600, print, TABLE)
    assert found == {"tame": {"small": {"SIZE": 2}, "large": {"SIZE": 2}}}
    assert best_of(notes) == {"tame small": "SIZE=2", "tame large": "SIZE=2"}
    assert list(json.loads(notes.read_text())["body"]["tame small"]["out"]) == ["SIZE=6"]
