"""Processor time is counted whoever waits for a process. Work is in processor seconds, so load does not matter."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hotloop.harness.sandbox.cputime import CpuTime

WORK = """
import os, signal, sys, time
sys.stdin.readline()
def burn(s):
    end = time.process_time() + s
    while time.process_time() < end: pass
def child(s, wait):
    pid = os.fork()
    if pid == 0:
        burn(s)
        os._exit(0)
    if wait: os.waitpid(pid, 0)
    else:
        while os.path.exists(f'/proc/{pid}'): time.sleep(0.005)
"""
CASES = {
    "itself": ("burn(1.0)", 1.0),
    "a child that is waited for": ("child(1.0, True)", 1.0),
    "many short ones": ("for _ in range(50): child(0.02, True)", 1.0),
    "a child that nobody waits for": ("signal.signal(signal.SIGCHLD, signal.SIG_IGN); child(1.0, False)", 1.0),
    "a grandchild": (
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nif os.fork() == 0:\n    child(1.0, False)\n    os._exit(0)\n"
        "time.sleep(0.5); child(1.0, False)", 2.0),
    "many short ones that nobody waits for": (
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(50): child(0.03, False)", 1.5),
}  # fmt: skip


@pytest.mark.parametrize("cgroup", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_it_is_counted(name: str, cgroup: bool) -> None:
    code, used = CASES[name]
    code = WORK + code + "\nprint('done', flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        clock = CpuTime(process.pid, cgroup)
        if cgroup and clock._group is None:
            process.kill()
            clock.close()
            pytest.skip("no cgroup of version 2 can be made here")
        before = clock.seconds()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        after = clock.seconds()
        assert clock.seconds() >= after
        hidden = clock.hidden_s
        process.stdin.write("end\n")
        process.stdin.flush()
        process.wait()
        clock.close()
    exact = cgroup or ("nobody" not in name and "grand" not in name)
    assert after - before > (0.9 if exact else 0.35) * used
    assert (hidden > 0.1) == (not exact)
    if exact:
        assert after - before < 1.5 * used + 0.5
