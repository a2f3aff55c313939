"""What a child does first, before any code of an agent: give up what it does not need, for ever.

    python -I -B -u -c "...; from hotloop.harness.sandbox.entry import main; main()" ROOT CONFIG

Order: a supervisor outside of all that follows (where no pid namespace does its work), resource limits, another uid, no
capabilities, Landlock, seccomp; then the job's module is imported and its `child_main(wire, descriptors)` runs, or a
program is executed. `harness.sandbox.policy` writes CONFIG.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from hotloop.harness.paths import SAME_CODE
from hotloop.harness.processes import descendants
from hotloop.harness.sandbox import landlock, seccomp
from hotloop.harness.sandbox.bounds import FIRST

__all__ = ["BOOT", "SURVIVORS", "main"]

BOOT = SAME_CODE + "from hotloop.harness.sandbox.entry import main; main()"
LAST_CHANCE_S = 10.0  # how long a supervisor goes on killing what does not end
MOST_FILES = 1 << 16  # open at a time in one process: the parent looks at each
SURVIVORS = 99  # a supervisor's exit status when something did not end

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_CAPBSET_DROP = 1, 4, 36, 24
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH = 8, 47, 2, 2
_CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    config: dict[str, Any] = json.loads(sys.argv[2])
    if config["supervise"]:
        _supervise(config["parent"], config["uid"], config["score"])
    _limit(config)
    if config["uid"] is not None:
        _become(config["uid"], config["reads_all"])
    elif os.geteuid() == 0 and config["supervise"] and config["landlock"]:
        _set_capabilities(0)
    if config["landlock"]:
        # One's own folder in /proc is a link there, which Landlock would not follow for those that look later.
        settings = [p.replace("/proc/self", f"/proc/{os.getpid()}", 1) for p in config["settings"]]
        landlock.restrict(
            config["read"],
            config["write"],
            listed=config.get("listed", ()),
            settings=settings,
            network=config["network"],
        )
    if config["seccomp"]:
        seccomp.restrict(**{name: config[name] for name in ("network", "metadata", "cuda", "model")})
    if config["exec"]:
        os.execvp(config["exec"][0], config["exec"])
    sys.argv = ["train.py"]
    from hotloop.harness.sandbox.wire import Wire

    sock, *memories = config["fds"]
    importlib.import_module(config["module"]).child_main(Wire(socket.socket(fileno=sock)), memories)


def _limit(config: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN if not config["exec"] else signal.SIG_DFL)  # Ctrl-C is the parent's
    for which, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, config["file_bytes"]),
        (resource.RLIMIT_DATA, config["memory_bytes"]),
        (resource.RLIMIT_NPROC, config["processes"]),
    ):
        if value is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
    soft, hard = (min(n, MOST_FILES) if n != resource.RLIM_INFINITY else MOST_FILES
                  for n in resource.getrlimit(resource.RLIMIT_NOFILE))  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _become(uid: int, reads_all: bool) -> None:
    """Another uid, with no capability; or with one, so that it can enter folders that are closed to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    if reads_all:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresuid(uid, uid, uid)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else its own files in /proc are root's
    if reads_all:
        _set_capabilities(1 << _CAP_DAC_READ_SEARCH)
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)  # for compilers it starts


def _set_capabilities(mask: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        if not mask >> capability & 1:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities cannot be dropped")


# The supervisor: what bubblewrap's pid namespace does where there is one.


def _supervise(parent: int, uid: int | None, score: int | None) -> None:
    """Fork; returns in the child. The other half waits for it and then ends everything that it started."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to us
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    stop = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop | {signal.SIGINT})
    supervisor, child = os.getpid(), os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop | {signal.SIGINT})
        return
    os.closerange(3, 1 << 16)  # the wire must close when the child's end does
    _write_score(score)  # what it is there to end goes first; see launch.first_to_go
    status = 128 + signal.SIGTERM
    while True:
        ended = dict(_reap())
        if child in ended:
            status = ended[child]
            break
        if signal.sigwait(stop) == signal.SIGTERM:
            break
    os._exit(status if _end_all(uid) else SURVIVORS)


def _write_score(score: int | None) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write(str(score))


def _reap() -> list[tuple[int, int]]:
    """(pid, exit status; 128 + n for signal n) of every child that has ended."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, raw = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(raw)
            ended.append((pid, code if code >= 0 else 128 - code))
    return ended


def _end_all(uid: int | None) -> bool:
    """Kill every descendant until none is left; False when that fails."""
    _write_score(FIRST)  # what it starts now is no process that spares itself
    deadline = time.monotonic() + LAST_CHANCE_S
    while time.monotonic() < deadline:
        if uid is not None:
            _kill_uid(uid)
        stopped: set[int] = set()
        while new := descendants(os.getpid()) - stopped:  # what is stopped cannot fork
            for pid in new:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= new
            if time.monotonic() > deadline:
                return False
        for pid in stopped:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        if not stopped:
            return True
        time.sleep(0.002)
    return False


def _kill_uid(uid: int) -> None:
    """All processes of a uid at once: the kernel lets none of them fork in between."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
