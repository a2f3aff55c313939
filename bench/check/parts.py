"""What `make gpu-check` is made of: each part measures one thing in processes of its own, and gives back a page.

On a CPU (`--device cpu`) each goes the same way at a minute size: a trial, which measures nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotloop.bench import overheads
from hotloop.bench.check.processes import ALL_KERNELS, GRACE_S, INTERPRETER, call, run_kernels
from hotloop.harness.files import write_whole
from hotloop.harness.machine import threads_default
from hotloop.harness.profile import read
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.records.chain import Chain
from hotloop.harness.records.model import Outcome
from hotloop.harness.sandbox.process import child_environment, tail
from hotloop.harness.tuning.notes import UNFINISHED

__all__ = ["PARTS", "Bench", "Part", "forget"]

PYTEST = [sys.executable, "-m", "pytest", "-c", "bench/pytest.ini"]
HOTLOOP = [sys.executable, "-c", "import sys; from hotloop.agent_loop.cli import main; sys.exit(main())"]
BENCH = [sys.executable, "-m", "hotloop.bench"]
TRIAL_TOKENS = 8192  # of a training on a CPU
SHORT_S = 10.0  # training seconds of the short run
GOES_ON_S = 120.0  # of a part's time that are left for what is being measured when its search has to stop


@dataclass
class Bench:
    """What the parts are given.

    Attributes:
        device: `cuda`, or `cpu` for a trial.
        train: the train.py.
        work: a folder of this GPU's own, which is there again the next time.
        data: prepared rows; None for the built-in text's.
        facts: what parts found that later ones need, as JSON. keep: saves them.
    """

    device: str
    train: Path
    work: Path
    data: Path | None
    say: Callable[[str], None]
    facts: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None

    @property
    def trial(self) -> bool:
        return self.device == "cpu"

    @property
    def preset(self) -> str:
        return "laptop" if self.trial else "h100"

    def log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def page(self, name: str, command: list[str], limit_s: float, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Run a command that writes a page; (exit status, the page or the log's end)."""
        written = self.work / f"{name}.md"
        written.unlink(missing_ok=True)
        code, _ = call([*command, "--page", str(written)], limit_s, self.log(name), env)
        return code, written.read_text() if written.exists() else fenced(tail(self.log(name)))

    def rows(self, limit_s: float) -> Path:
        """Those given, or the built-in text's, prepared once. Raises RuntimeError with its log's last words."""
        path = (self.data or self.work / "data").resolve()
        if not path.exists():
            command = [*HOTLOOP, "prepare", "--preset", self.preset, "--source", "packages", "--out", str(path)]
            if call(command, limit_s, self.log("prepare"))[0]:
                raise RuntimeError(" / ".join(tail(self.log("prepare"), 3)))
        return path


def fenced(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) + "\n"


def forget(bench: Bench, name: str) -> None:
    """What a part found before."""
    bench.facts.pop(name, None)
    (bench.work / f"{name}.json").unlink(missing_ok=True)


Result = tuple[int, str]


@dataclass(frozen=True)
class Part:
    """One thing that `make gpu-check` does.

    Attributes:
        limit_s: it is ended after so long.
        run: (bench, seconds) -> exit status, page. UNFINISHED: the same part goes on.
        words: what it tells.
        named: run only where it is named.
        goes_on: it can be given less time than its limit.
    """

    name: str
    limit_s: float
    run: Callable[[Bench, float], Result]
    words: str
    named: bool = False
    goes_on: bool = False


# ---- does it start ----------------------------------------------------------------------------------------------


def _doctor(bench: Bench, limit_s: float) -> Result:
    log = bench.log("doctor")
    code, _ = call([*HOTLOOP, "doctor"], limit_s, log)
    # What it finds bad is told; whether that stops anything, the other parts show.
    return 0 if code in (0, 1) else code, fenced(tail(log, 60))


def _sandbox(bench: Bench, limit_s: float) -> Result:
    log = bench.log("sandbox")
    code = f"import sys; from hotloop.bench.sandbox import levels; sys.exit(levels({bench.device!r}))"
    return call([sys.executable, "-c", code], limit_s, log)[0], fenced(tail(log, 30))


def _tests(bench: Bench, limit_s: float) -> Result:
    """Each file in a process of its own: one must find nobody on the GPU, and the other computes there itself."""
    deadline, worst, page = time.monotonic() + limit_s, 0, ""
    for path in ("tests/harness/test_gpu_memory.py", "tests/kernels/test_gpu.py"):
        log = bench.log(Path(path).stem)
        env = {} if bench.trial else ALL_KERNELS
        code, _ = call([*PYTEST, "-q", "-rs", path], max(1.0, deadline - time.monotonic()), log, env)
        worst, page = worst or code, page + fenced(tail(log, 15))
    return worst, page


# ---- what is fast -----------------------------------------------------------------------------------------------


def _kernels(bench: Bench, limit_s: float) -> Result:
    """One operator after another, those with a kernel of ours first; attention has a part of its own."""
    log, one, all_rows = bench.log("kernels"), bench.work / "kernel-rows.json", bench.work / "kernels.json"
    operators = [op.name for op in sorted(OPERATORS.values(), key=lambda op: not op.module) if op.name != "attention"]
    shapes = sorted({s for op in OPERATORS.values() for s in op.shapes if s.startswith("baseline")})
    env, more = ALL_KERNELS, [f"--shape={s}" for s in shapes]
    if bench.trial:
        operators, env, more = ["residual"], INTERPRETER, []
    done: dict[str, Any] = bench.facts.setdefault("kernels", {})
    deadline = time.monotonic() + limit_s
    for name in operators:
        if name in done:
            continue
        left_s = deadline - time.monotonic() - GRACE_S
        if left_s < GRACE_S:
            break
        code = run_kernels(one, left_s, log, [name], more, env)
        words = [line for line in tail(log, 400) if re.search(r"^(FAILED|SKIPPED|ERROR|E  )", line)]
        done[name] = {"code": code, "words": [line for line in words if "not asked for" not in line][-12:]}
        if one.exists():
            found = json.loads(one.read_text())
            before = json.loads(all_rows.read_text())["benchmarks"] if all_rows.exists() and len(done) > 1 else []
            write_whole(all_rows, json.dumps(found | {"benchmarks": before + found["benchmarks"]}, indent=1) + "\n")
        bench.keep()
    words = [line for name, x in done.items() for line in (f"{name}: exit status {x['code']}", *x["words"])]
    code = next((x["code"] for x in done.values() if x["code"]), 0)
    return code if len(done) == len(operators) else UNFINISHED, "What was not timed, and why:\n\n" + fenced(words)


def _tune(bench: Bench, limit_s: float) -> Result:
    """What the parts after it run with."""
    command = [*HOTLOOP, "tune", str(bench.train), "--preset", bench.preset, "--device", bench.device]
    command += ["--minutes", f"{max(limit_s / 2, limit_s - GOES_ON_S) / 60:.3f}", *(["--quick"] if bench.trial else [])]
    code, _ = call(command, limit_s, bench.log("tune"))
    said = tail(bench.log("tune"), 60)
    if said and (written := re.match(r"written: (.+) \(", said[-1])):
        body = read(Path(written[1])).body
        copy = bench.work / "profile" / Path(written[1]).name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(written[1], copy)
        bench.facts["tune"] = {"chosen": body["selection"], "whole": body["whole"]}
    return code, fenced(said)


def _step(bench: Bench, limit_s: float) -> Result:
    command = [*BENCH, "step", "--train", str(bench.train), "--preset", bench.preset]
    return bench.page("step", command, limit_s, child_environment(threads_default()))


# ---- whole experiments ------------------------------------------------------------------------------------------


def _experiment(bench: Bench, limit_s: float) -> Result:
    """A short run and its replay."""
    code, page = _run(bench, limit_s * 0.55, ["--budget-seconds", str(SHORT_S)])
    if code:
        return code, page
    code, replayed = _replay(bench, limit_s * 0.45)
    return code, page + replayed


def _run(bench: Bench, limit_s: float, budget: list[str] | None = None) -> Result:
    data, log = bench.rows(limit_s), bench.log("run")
    flags = ["--preset", bench.preset, "--data", str(data)]
    flags += ["--budget-tokens", str(TRIAL_TOKENS)] if bench.trial else budget or []
    code, seconds = call([*HOTLOOP, "run", str(bench.train), *flags], limit_s, log, cwd=bench.work)
    page = f"`hotloop run {' '.join(flags)}`, {seconds:.0f} s in all.\n\n" + fenced(tail(log, 40))
    if code:
        return code, page
    last = Chain.read(bench.work / "runs/single/records.jsonl").bodies(Outcome)[-1]
    training, audit = last.training, last.audit
    assert audit is not None
    bench.facts["run"] = {"number": last.run.number, "data": str(data)}
    page += "\n" + overheads.page(overheads.figures([overheads.Ran(last)]), last.device == "cuda")
    ledger = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in last.ledger.items())
    page += f"\nLedger, s: {ledger}. Tokens/s {training.tokens_per_s:,.0f}; {training.tokens:,} tokens. "
    page += f"Audit: {audit.cuts} cuts, largest {audit.largest_nats:.2e} nats, mean {audit.mean_nats:.2e}.\n"
    bench.say(f"    {training.tokens_per_s:,.0f} tokens/s, val_bpb {last.val_bpb:.4f}")
    return 0, page


def _replay(bench: Bench, limit_s: float) -> Result:
    """Of the last run, with the kernels that it had."""
    was, log = bench.facts.get("run"), bench.log("replay")
    if was is None:
        return 1, "There is no run to replay: run the parts experiment or run first.\n"
    command = [*HOTLOOP, "replay", str(was["number"]), "--tag", "single", "--data", was["data"]]
    code, seconds = call(command, limit_s, log, cwd=bench.work)
    return code, f"\n`hotloop replay`, {seconds:.0f} s in all:\n\n" + fenced(tail(log, 8))


def _baseline(bench: Bench, limit_s: float) -> Result:
    data = bench.rows(limit_s)
    command = [*BENCH, "baseline", "--preset", bench.preset, "--data", str(data)]
    command += ["--tokens", str(TRIAL_TOKENS)] if bench.trial else []
    return bench.page("baseline", command, limit_s)


def _night(bench: Bench, limit_s: float) -> Result:
    return _overheads(bench, limit_s, ["--night", "ahead", "--experiments", "2" if bench.trial else "6"])


def _overheads(bench: Bench, limit_s: float, more: list[str] | None = None) -> Result:
    data = bench.rows(limit_s)
    command = [*BENCH, "overheads", "--train", str(bench.train), "--preset", bench.preset, "--data", str(data)]
    return bench.page("overheads", [*command, *(more or [])], limit_s)


# In this order: what stops all the rest comes first. None is longer than a command of ten minutes, but for the last.
PARTS = {
    part.name: part
    for part in (
        Part("doctor", 200.0, _doctor, "what this machine has, and what is wrong with it"),
        Part("sandbox", 300.0, _sandbox, "which sandbox levels CUDA works in; clearing of the GPU's memory"),
        Part("tests", 500.0, _tests, "tests/kernels/test_gpu.py: right, repeatable, compiled whole"),
        Part("kernels", 540.0, _kernels, "each kernel: right by fp64, how fast, repeatable", goes_on=True),
        Part("tune", 590.0, _tune, "what is right, repeats and wins; the parts after it run it", goes_on=True),
        Part("step", 180.0, _step, "one step by operator, beside the floor"),
        Part("experiment", 480.0, _experiment, "a short run, and its replay: identical weights, ledger"),
        Part("run", 560.0, _run, "the whole run of 300 seconds"),
        Part("replay", 560.0, _replay, "its replay"),
        Part("baseline", 560.0, _baseline, "train.py beside plain PyTorch, at equal tokens"),
        Part("night", 560.0, _night, "a night of six short trainings against the targets of a night"),
        Part("overheads", 1200.0, _overheads, "two short nights, with and without what is made ahead", named=True),
    )
}
