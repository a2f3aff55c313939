"""`make gpu-check`: everything that only a GPU can tell, in one command, in twenty minutes; ten without the last part.

    tests        tests/kernels/test_gpu.py
    kernels      bench/bench_kernels.py: correct, how fast, repeatable
    step         one training step of train.py by operator
    experiment   a short run of train.py under the harness, and its replay: tokens/s, MFU, identical weights, ledger
                 against its targets
    baseline     train.py beside plain PyTorch: tokens/s, MFU, memory, score at equal tokens, ledger
    overheads    only where it is asked for: two short nights, with and without what is made ahead, against the targets

Each part runs in a process of its own within its own time; one that fails does not stop the others. All of it goes
into one JSON and one Markdown page in bench/results/<gpu>/.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import overheads, results
from bench.operators import OPERATORS
from harness.errors import HotloopError
from harness.process import tail
from harness.walls import project_root

__all__ = ["MORE_PARTS", "PARTS", "main", "run_kernels"]

# Seconds each part may take; together under ten minutes, and the last as many again: two compilations, one of them
# max-autotune, are most of it.
PARTS = {"tests": 70.0, "kernels": 200.0, "step": 60.0, "sandbox": 100.0, "experiment": 150.0, "baseline": 540.0}
MORE_PARTS = {"overheads": 1200.0}
# Every kernel, also those that are no defaults; cuBLAS as the trainer has it.
ALL_KERNELS = {"HOTLOOP_KERNELS": "triton", "HOTLOOP_ATTENTION": "", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PYTEST = [sys.executable, "-m", "pytest", "-c", "bench/pytest.ini"]
HOTLOOP = [sys.executable, "-c", "import sys; from agent_loop.cli import main; sys.exit(main())"]
GRACE_S = 40.0  # for the benchmark that runs when an operator's time is over
EXPERIMENT_S = 10.0  # training seconds of the short run


def call(command: list[str], limit_s: float, log: Path, env: dict[str, str] | None = None) -> tuple[int, float]:
    """(exit status, 124 for out of time; seconds)."""
    began = time.monotonic()
    # A pytest that runs this in one of its workers would tell ours that it is one too.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, cwd=project_root(), env=outside | (env or {}), stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
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
        body["commit_info"]["id"] = body["commit_info"].get("id") or _commit()
        out.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return worst


def _sandbox(limit_s: float, log: Path) -> tuple[int, str]:
    """Each sandbox level of this machine, whether CUDA works in it, and what clearing the GPU's memory takes."""
    code = (
        "import sys, time\n"
        "from harness import gpu\n"
        "from harness.errors import HotloopError\n"
        "from harness.probe_cuda import probe_cuda\n"
        "from harness.sandbox import best\n"
        "works = 0\n"
        "for level in (3, 2, 1):\n"
        "    try:\n"
        "        sandbox = best(level)\n"
        "        print(sandbox, f'{probe_cuda(sandbox):.2f} s to a first product', flush=True)\n"
        "        works += 1\n"
        "    except HotloopError as e: print(f'L{level}: {e}', flush=True)\n"
        "print('not ours on the GPU:', gpu.others())\n"
        "began = time.monotonic()\n"
        "print(gpu.clear(), 'MiB cleared in', round(time.monotonic() - began, 2), 's')\n"
        "sys.exit(not works)\n"
    )
    status, _ = call([sys.executable, "-c", code], limit_s, log)
    return status, _fenced(tail(log, 20))


def _prepared(folder: Path, data: Path | None, limit_s: float) -> tuple[int, Path]:
    """(exit status, rows of the GPU preset): those given, or the built-in text's."""
    path = data or folder / "data"
    if path.exists():
        return 0, path
    command = [*HOTLOOP, "prepare", "--preset", "h100", "--source", "packages", "--out", str(path)]
    return call(command, limit_s, folder / "prepare.log")[0], path


def _on_rows(part: str, folder: Path, data: Path | None, limit_s: float, log: Path) -> tuple[int, str]:
    """`hotloop bench PART` at the GPU preset, as the page that it writes."""
    deadline = time.monotonic() + limit_s
    code, data = _prepared(folder, data, limit_s)
    if code:
        return code, _fenced(tail(folder / "prepare.log"))
    written = folder / f"{part}.md"
    command = [sys.executable, "-m", "bench", part, "--preset", "h100", "--data", str(data)]
    code, _ = call([*command, "--page", str(written)], deadline - time.monotonic(), log)
    return code, written.read_text() if written.exists() else _fenced(tail(log))


def _experiment(folder: Path, data: Path | None, limit_s: float, say: Callable[[str], None]) -> tuple[int, str]:
    """A short run of the GPU preset and its replay, as a page."""
    deadline = time.monotonic() + limit_s
    code, data = _prepared(folder, data, limit_s)
    if code:
        return code, _fenced(tail(folder / "prepare.log"))
    work = project_root()
    flags = ["--data", str(data), "--budget-seconds", str(EXPERIMENT_S)]
    code, seconds = call([*HOTLOOP, "run", *flags], deadline - time.monotonic(), folder / "run.log")
    page = f"`hotloop run --budget-seconds {EXPERIMENT_S:.0f}` on the built-in text, {seconds:.0f} s in all:\n\n"
    page += _fenced(tail(folder / "run.log", 40))
    if code:
        return code, page
    last = json.loads((work / "runs/single/records.jsonl").read_text().splitlines()[-1])["body"]
    audit, ledger = last["audit"], {k: round(v, 2) for k, v in last["ledger"].items()}
    page += "\n" + overheads.page(overheads.figures([last], {}), last["device"] == "cuda")
    page += f"\nLedger, s: {ledger}. Tokens/s {last['tokens_per_s']:,.0f}. "
    page += f"Audit: {audit['cuts']} cuts, largest {audit['largest_nats']:.2e} nats, mean {audit['mean_nats']:.2e}.\n"
    say(f"    {last['tokens_per_s']:,.0f} tokens/s, val_bpb {last['val_bpb']:.4f}")
    command = [*HOTLOOP, "replay", str(last["number"]), "--tag", "single", "--data", str(data)]
    code, _ = call(command, max(1.0, deadline - time.monotonic()), folder / "replay.log")
    return code, page + "\n`hotloop replay`:\n\n" + _fenced(tail(folder / "replay.log", 8))


def _fenced(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) + "\n"


def main(
    data: Path | None = None,
    out: Path | None = None,
    parts: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run every part of PARTS, or those named, also of MORE_PARTS; 0 when all passed.

    Raises:
        DeviceError: no GPU.
    """
    from bench import device as dev
    from kernels.tuning import file_name

    dev.require_gpu()
    import torch

    name = torch.cuda.get_device_properties().name
    folder = (out or results.RESULTS) / file_name(name).removesuffix(".json")
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, int] = {}
    pages: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch)
        raw = logs / "kernels.json"
        for part, limit_s in (PARTS | MORE_PARTS).items():
            if part not in (parts or PARTS):
                continue
            say(f"{part} (at most {limit_s:.0f} s)")
            log = logs / f"{part}.log"
            began = time.monotonic()
            if part == "tests":
                command = [*PYTEST, "-q", "-rs", "tests/kernels/test_gpu.py", "tests/harness/test_gpu_memory.py"]
                code, _ = call(command, limit_s, log, ALL_KERNELS)
                pages[part] = _fenced(tail(log, 15))
            elif part == "kernels":
                code = run_kernels(raw, limit_s, log, [], [], ALL_KERNELS)
                lines = [
                    line for line in tail(log, 400) if re.search(r"^(FAILED|SKIPPED|ERROR|E  )|passed|failed", line)
                ]
                pages["kernels that were not timed"] = _fenced(lines[-40:])
            elif part == "step":
                written = logs / "step.md"
                code, _ = call([sys.executable, "-m", "bench", "step", "--page", str(written)], limit_s, log)
                pages[part] = written.read_text() if written.exists() else _fenced(tail(log))
            elif part == "sandbox":
                code, pages[part] = _sandbox(limit_s, log)
            elif part in ("baseline", "overheads"):
                code, pages[part] = _on_rows(part, logs, data, limit_s, log)
            else:
                code, pages[part] = _experiment(logs, data, limit_s, say)
            say(f"    {'passed' if code == 0 else f'FAILED, exit status {code}'} in {time.monotonic() - began:.0f} s")
            if code:
                failed[part] = code
                for line in tail(log, 12):
                    say(f"    | {line}")
        body = _body(raw)
    body["hotloop"] = {"failed": failed, "pages": pages}
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M")
    path = folder / f"{stamp}-{body['commit_info']['id'][:9]}.json"
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    page = results.markdown(results.read(path))
    path.with_suffix(".md").write_text(page)
    say(page)
    say(f"written: {path} and {path.with_suffix('.md').name}")
    say("all parts passed" if not failed else f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _body(raw: Path) -> dict[str, Any]:
    """pytest-benchmark's JSON, or an empty one where it got none written."""
    try:
        body: dict[str, Any] = json.loads(raw.read_text())
    except (OSError, ValueError):
        from bench import device as dev

        now = datetime.datetime.now(datetime.UTC).isoformat()
        body = {"benchmarks": [], "machine_info": dev.facts(), "commit_info": {"id": _commit()}, "datetime": now}
    return body


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True)
    return done.stdout.strip() or "unknown00"


def smoke(out: Path, say: Callable[[str], None] = print) -> int:
    """The whole path of `kernels` on a CPU, through the interpreter, at tiny shapes: tests the rig, measures nothing.

    Raises:
        HotloopError: it failed; with the last lines of its log.
    """
    env = {"HOTLOOP_KERNELS": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as scratch:
        log, raw = Path(scratch) / "log", Path(scratch) / "kernels.json"
        code = run_kernels(raw, 400, log, [], [], env, apart=False)
        if code or not raw.exists():
            raise HotloopError("the rig is broken: " + " / ".join(tail(log, 6)))
        out.write_bytes(raw.read_bytes())
    say(results.markdown(results.read(out)))
    return 0
