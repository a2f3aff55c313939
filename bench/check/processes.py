"""Measurements in processes of their own, each within its time: what the commands of bench and gpu-check share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hotloop.bench import results
from hotloop.harness.errors import HotloopError
from hotloop.harness.paths import import_root, project_root
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.sandbox.process import tail

__all__ = ["ALL_KERNELS", "INTERPRETER", "OUT_OF_TIME", "call", "run_kernels", "smoke"]

# Every kernel, each on its own and so ours for attention too; cuBLAS as the trainer has it.
ALL_KERNELS = {"HOTLOOP_KERNELS": "triton", "HOTLOOP_ATTENTION": "triton", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
INTERPRETER = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
OUT_OF_TIME = 124  # exit status
GRACE_S = 40.0  # for the benchmark that runs when an operator's time is over


def call(
    command: list[str], limit_s: float, log: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> tuple[int, float]:
    """(exit status, OUT_OF_TIME where it was; seconds).

    Args:
        cwd: None for the project's folder; the code is the project's either way.
    """
    began = time.monotonic()
    # A pytest that runs this in one of its workers would tell ours that it is one too.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    outside |= {"PYTHONPATH": import_root()} | (env or {})
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd or project_root(), env=outside, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = OUT_OF_TIME
        finally:  # its compile workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.monotonic() - began


def run_kernels(
    out: Path,
    limit_s: float,
    log: Path,
    operators: list[str],
    more: list[str],
    env: dict[str, str] | None = None,
    apart: bool = True,
) -> int:
    """Run the kernel benchmarks of some operators (all for []) into `out`; 0 when every one passed.

    Each operator gets a process of its own (`apart`), since a kernel that faults takes the device's context with it.
    Those with a kernel of ours come first; what is not begun after `limit_s` is left out.
    """
    deadline = time.monotonic() + limit_s
    out.unlink(missing_ok=True)  # of another run
    wanted = [op.name for op in sorted(OPERATORS.values(), key=lambda op: not op.module)]
    wanted = [name for name in wanted if not operators or name in operators]
    body: dict[str, Any] = {}
    worst = 0
    with tempfile.TemporaryDirectory() as scratch, open(log, "wb") as whole:
        for names in [[name] for name in wanted] if apart else [wanted]:
            left = max(0.01, deadline - time.monotonic())
            part, text = Path(scratch) / f"{names[0]}.json", Path(scratch) / f"{names[0]}.log"
            command = [
                sys.executable, "-m", "pytest", "-c", "bench/pytest.ini", "-q", "-rsf", "bench/bench_kernels.py",
                "--benchmark-only", "-p", "no:cacheprovider", f"--benchmark-json={part}",
                *(f"--operator={name}" for name in names), f"--deadline={left}", *more,
            ]  # fmt: skip
            code, _ = call(command, left + GRACE_S, text, env)
            whole.write(text.read_bytes())
            worst = worst or code
            try:
                found = json.loads(part.read_text())
            except (OSError, ValueError):
                continue
            body = body or found | {"benchmarks": []}
            body["benchmarks"] += found["benchmarks"]
    if body:
        for b in body["benchmarks"]:  # the samples of each round: the statistics say enough
            b["stats"].pop("data", None)
        body["commit_info"]["id"] = body["commit_info"].get("id") or results.commit() or "unknown00"
        out.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return worst


def smoke(out: Path, say: Callable[[str], None] = print) -> int:
    """The whole path of `kernels` on a CPU, through the interpreter, at tiny shapes: tests the rig, measures nothing.

    Raises:
        HotloopError: it failed; with the last lines of its log.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log, raw = Path(scratch) / "log", Path(scratch) / "kernels.json"
        code = run_kernels(raw, 400, log, [], [], INTERPRETER, apart=False)
        if code or not raw.exists():
            raise HotloopError("the rig is broken: " + " / ".join(tail(log, 6)))
        out.write_bytes(raw.read_bytes())
    say(results.markdown(results.read(out)))
    return 0
