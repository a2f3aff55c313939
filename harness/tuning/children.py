"""Work on the device in a process of its own, which what is tried there may end: a fault takes the device's context.

The child notes what it tries before it tries it (`trying`, in `Notes`). When it dies or hangs over that, what was tried
is out with its reason, and another child goes on with the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox.process import tail
from hotloop.harness.text import one_line
from hotloop.harness.tuning.notes import UNFINISHED, Notes
from hotloop.harness.tuning.search import blame
from hotloop.harness.tuning.selection import Unfit

__all__ = ["asked", "die_with_parent", "faults_are_reasons", "in_children"]

LOOK_S = 2.0


def in_children(
    function: str, arguments: Sequence[str], notes: Path, deadline: float, hang_s: float, say: Callable[[str], None],
    env: Mapping[str, str],
) -> int:  # fmt: skip
    """Run `module:function` with these arguments (its sys.argv[1:]), in one process after another while what they try
    ends them.

    Args:
        notes: the file in which it notes what it tries.
        deadline: by time.time(); it gets a minute more for what it is at.
        hang_s: after which what is being tried counts as hanging.

    Returns:
        its exit status; UNFINISHED at the deadline; 1 where it ended while nothing was tried.
    """
    module, _, name = function.partition(":")
    command = [sys.executable, "-c", f"from {module} import {name}; {name}()", *arguments]
    while True:
        with tempfile.NamedTemporaryFile(suffix=".log") as log:
            process = subprocess.Popen(
                command, env=os.environ | dict(env), cwd=project_root(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
            late = hung = False
            try:
                while (code := _waited(process, min(LOOK_S, hang_s / 4))) is None and not (late or hung):
                    hung = _trying_for(notes) > hang_s
                    late = time.time() > deadline + min(60.0, hang_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.wait()
            said = tail(Path(log.name), 200)
        if code == 0:
            for line in said:
                say(line)
        if late and not hung:
            return UNFINISHED
        if code in (0, UNFINISHED) and not hung:
            return int(code)
        reason = "it hangs" if hung else f"it ended the process ({(said or ['no words'])[-1][:160]})"
        if not (out := blame(_noted(notes), reason)):
            say((said or ["no words"])[-1])
            return 1
        say(f"{out}: {reason}")


def asked(expression: str, module: str) -> Any:
    """`expression`, JSON, of a module's names, by a process of its own: one that has used the GPU stays there.

    Raises:
        HotloopError: it fails; with its last words.
    """
    code = f"import json; from {module} import *; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no words"])[-1][:200]
        raise HotloopError(f"the device does not work ({words}); see: hotloop doctor")
    return json.loads(done.stdout.splitlines()[-1])


def die_with_parent() -> None:
    """Whatever ends the parent, nothing of ours stays on the device."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def faults_are_reasons() -> Iterator[None]:
    """What is raised is a reason against what is being tried; what ends the device's context ends this process."""
    import torch

    try:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Unfit:
        raise
    except Exception as e:
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception:  # nothing can be launched any more; the one that was tried is noted
                print(f"hotloop: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
                os._exit(1)
        raise Unfit(f"{type(e).__name__}: {one_line(str(e), 200)}") from None


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _noted(path: Path) -> Notes:
    """As the child left it, under whatever stamp."""
    try:
        stamp = json.loads(path.read_text())["stamp"]
    except (OSError, ValueError, KeyError):
        stamp = {}
    return Notes(path, stamp)


def _trying_for(path: Path) -> float:
    """For how many seconds something is being tried; 0 for nothing."""
    try:
        trying = "trying" in json.loads(path.read_text())["body"]
        return time.time() - path.stat().st_mtime if trying else 0.0
    except (OSError, ValueError, KeyError):
        return 0.0
