"""The compile gate of the whole step: train.py for a card that is not there, with our kernels off and on.

    hotloop bench gate --step            for an H100, as CI does (make gate-step: --all, for every architecture)
    hotloop bench gate --step --write    and write bench/results/step.json and its tables in docs/performance.md

Dynamo, AOTAutograd and Inductor run on fake tensors (`bench.gate.offline`), and every Triton kernel of the step goes to
a cubin. A fault is: a graph break, a spill that bench/results/spills.json does not name with its reason, more shared
memory than a block gets, gradients that are added into one place from many (`index_put_` with accumulate, atomics), a
decision by timing that changes bits, or other launches or bytes than the committed ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.paths import import_root, project_root

__all__ = ["KERNELS", "compile_step", "faults", "main", "page", "summary"]

ROOT = project_root()
COMMITTED = ROOT / "bench" / "results" / "step.json"
SPILLS = ROOT / "bench" / "results" / "spills.json"
DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- made by: hotloop bench gate --step --all --write -->", "<!-- end of what is made -->"
KERNELS = {"reference": "without kernels of ours", "triton": "with all of them"}
STEP = ("forward", "backward", "adamw", "muon")  # the stages of a step; the evaluation is beside it
MOST = 12  # kernels in the table of those that move the most


def compile_step(capability: int, kernels: str, train: Path) -> dict[str, Any]:
    """What `whole_step.facts_of` finds, in a process of its own.

    Raises:
        HotloopError: it could not be compiled at all.
    """
    from hotloop.bench.gate import offline

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "facts.json"
        command = [
            sys.executable,
            "-m",
            "hotloop.bench.gate.whole_step",
            str(capability),
            str(train.resolve()),
            str(out),
        ]
        env = offline.environment(kernels, Path(scratch)) | {"PYTHONPATH": import_root()}
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-30:])
            raise HotloopError(f"the step could not be compiled for sm_{capability}, kernels {kernels}:\n{tail}")
        facts: dict[str, Any] = json.loads(out.read_text())
    return facts


def faults(facts: dict[str, Any], shared_limit: int, reasons: dict[str, str]) -> list[str]:
    """What is wrong with a step, each in a line.

    Args:
        reasons: kernels that may spill on this card -> why.
    """
    wrong = [f"a graph break: {why}" for why in facts["breaks"]]
    for name, configurations in facts["kernels"].items():
        stack = max(f["stack"] for f in configurations)
        shared = max(f["shared"] for f in configurations)
        if stack and not reasons.get(name):
            wrong.append(f"{name} spills: {stack} bytes of stack; {SPILLS.name} has no reason for it")
        if shared > shared_limit:
            wrong.append(f"{name}: {shared} bytes of shared memory; a block gets {shared_limit}")
    wrong += [f"adds into one place from many, {what}" for what in facts["accumulated"]]
    wrong += [f"would be decided by timing: {what}" for what in facts["timed"]]
    return wrong


# ---- what is committed and shown ----------------------------------------------------------------------------------


def group_of(stage: str, name: str, vocab: str = "8192") -> str:
    """As `bench.step` groups a step's time; the products with the vocabulary are the loss's."""
    if stage in ("adamw", "muon"):
        return "optimizer"
    if name.startswith("triton_"):
        return "loss" if re.search(r"log_softmax|nll_loss|logsumexp", name) else "fused elementwise"
    operation, _, shapes = name.partition(" ")
    if re.search(r"embedding|index_put|sort", operation):
        return "embedding"
    if re.search(r"attention", operation):
        return "attention"
    if re.search(
        r"::(mm|bmm|addmm|baddbmm|loss.*)$|mlp|linear|qkv$|residual|weight_gradient|stream_gradient", operation
    ):
        return "loss" if "::loss" in operation or vocab in re.split("[x ]", shapes) else "matrix products"
    return "fused elementwise" if operation.startswith("hotloop::") else "other"


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """What is committed of a step: by group and by stage [launches, bytes], and the kernels that move the most.

    A launch is one of a kernel; what an operator of ours launches counts, and its bytes are the operator's.
    """
    groups: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    moved: dict[str, Counter[str]] = {"groups": Counter(), "stages": Counter()}
    rows = []
    for stage, name, inside, size, times in facts["launches"]:
        is_operator = name.startswith("hotloop::")
        stages[stage] += 0 if is_operator else times
        moved["stages"][stage] += size * times
        if stage not in STEP:
            continue
        group = group_of(stage, inside or name)
        groups[group] += 0 if is_operator else times
        moved["groups"][group] += size * times
        if size:
            rows.append([stage, name, times, size])
    rows.sort(key=lambda row: (-row[2] * row[3], row[1]))
    every = [f for configurations in facts["kernels"].values() for f in configurations]
    largest = {k: max((f[k] for f in every), default=0) for k in ("registers", "shared")}
    return {
        "groups": {g: [groups[g], moved["groups"][g]] for g in sorted(groups)},
        "stages": {s: [stages[s], moved["stages"][s]] for s in sorted(stages)},
        "most": [[*row, _registers(facts["kernels"].get(row[1], []))] for row in rows[:MOST]],
        "kernels": len(facts["kernels"]),
        **largest,
        "spills": sorted(n for n, fs in facts["kernels"].items() if any(f["stack"] for f in fs)),
        "tokens": facts["tokens"],
    }


def _registers(configurations: Iterable[dict[str, int]]) -> str:
    return " / ".join(str(f["registers"]) for f in configurations)


def _ideal() -> dict[str, float]:
    """Bytes of a step by group, everything fused that can be: `bench.step`'s floor, and the optimizer's operators."""
    from hotloop.harness.proof.floor import FLOOR
    from hotloop.harness.proof.operators import OPERATORS

    adamw, muon = OPERATORS["adamw_"], OPERATORS["muon_"]
    banks = ((32, 512, 512), (8, 512, 2048), (8, 2048, 512))  # the blocks' matrices
    optimizer = adamw.bytes["forward"](adamw.shapes["baseline"])
    optimizer += sum(muon.bytes["forward"](dict(zip("LRC", bank, strict=True))) for bank in banks)
    return {group: kilobytes * 1e3 for group, (_, kilobytes) in FLOOR.items()} | {"optimizer": optimizer}


def page(committed: dict[str, dict[str, Any]], versions: str) -> str:
    """The tables of docs/performance.md, from what was committed for one torch and Triton."""
    found = committed[versions]
    off, on = found["sm_90 reference"], found["sm_90 triton"]
    tokens, ideal = off["tokens"], _ideal()
    lines = [
        f"A step of {tokens:,} tokens for sm_90 ({versions}, compiled on a CPU, never launched):",
        "",
        "| | ideal | compiled, no kernel of ours | compiled, all of them |",
        "|---|---:|---:|---:|",
    ]
    total = [0.0, 0, 0, 0, 0]
    for group in (*ideal, "other"):
        want = ideal.get(group, 0.0) * (1 if group == "optimizer" else tokens)
        cells = [f"{want / 1e9:.1f} GB" if want else ""]
        total[0] += want
        for i, side in enumerate((off, on)):
            launches, moved = side["groups"].get(group, (0, 0))
            cells.append(f"{moved / 1e9:.1f} GB, {launches} launches" if launches else "")
            total[1 + 2 * i] += moved
            total[2 + 2 * i] += launches
        lines.append(f"| {group} | {' | '.join(cells)} |")
    lines += [
        f"| **all** | {total[0] / 1e9:.1f} GB | {total[1] / 1e9:.1f} GB, {total[2]:.0f} launches "
        f"| {total[3] / 1e9:.1f} GB, {total[4]:.0f} launches |",
    ]
    for side, words in ((off, KERNELS["reference"]), (on, KERNELS["triton"])):
        lines += [
            "",
            f"What moves the most, {words}:",
            "",
            "| | | times | GB each | registers |",
            "|---|---|---:|---:|---:|",
        ]
        for stage, name, times, size, registers in side["most"]:
            lines.append(f"| `{_short(name)}` | {stage} | {times} | {size / 1e9:.2f} | {registers} |")
    lines += [
        "", "By architecture (a step, and the evaluation's forward pass):", "",
        "| | Triton kernels | most registers | most shared memory | spills | GB a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, side in found.items():
        moved = _step_of(side)[1]
        capability, kernels = name.split()
        lines.append(
            f"| {capability}, {KERNELS[kernels]} | {side['kernels']} | {side['registers']} | {side['shared']:,} B "
            f"| {len(side['spills'])} | {moved / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _short(name: str, width: int = 76) -> str:
    return name if len(name) <= width else f"{name[: width // 2]}...{name[-width // 2 + 3 :]}"


def in_docs(text: str, made: str) -> str:
    """docs/performance.md with its made part replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{DOCS} has no {BEGIN} ... {END} to write between")
    return f"{before}{BEGIN}\n{made}{END}{after}"


def read(path: Path) -> dict[str, Any]:
    """A committed table. Raises UsageError for a file that is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read ({e}); restore it: git checkout {path}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no table; restore it: git checkout {path}")
    return data


def _step_of(side: dict[str, Any]) -> tuple[int, int]:
    """(launches, bytes) of a step."""
    groups = side["groups"].values()
    return sum(launches for launches, _ in groups), sum(size for _, size in groups)


def _line(side: dict[str, Any]) -> str:
    launches, size = _step_of(side)
    return (
        f"{side['kernels']} Triton kernels, at most {side['registers']} registers and {side['shared']:,} B shared, "
        f"{len(side['spills'])} spill; a step is {launches} launches and {size / 1e9:.1f} GB"
    )


def _change(was: dict[str, Any], now: dict[str, Any]) -> str:
    """In which way two steps differ; empty where they do not."""
    same = all(was.get(key) == now[key] for key in ("groups", "stages", "kernels", "spills"))
    return "" if same else f"{_line(was)}; now {_line(now)}"


def main(every: bool = False, write: bool = False, train: Path = ROOT / "train.py") -> int:
    """Compile, print, compare. 0 when all is well."""
    from hotloop.kernels.architectures import ARCHITECTURES

    committed, reasons = read(COMMITTED), read(SPILLS)
    jobs = [(c, k) for c in (ARCHITECTURES if every else (90,)) for k in KERNELS]
    bad, found, versions = 0, {}, ""

    def one(job: tuple[int, str]) -> tuple[dict[str, Any], float]:
        start = time.monotonic()
        return compile_step(*job, train), time.monotonic() - start

    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:  # a compiler takes 2 GB and a core
        for (capability, kernels), (facts, seconds) in zip(jobs, pool.map(one, jobs), strict=True):
            name, versions = f"sm_{capability} {kernels}", facts["versions"]
            wrong = faults(facts, ARCHITECTURES[capability].shared, reasons.get(f"sm_{capability}", {}))
            found[name] = summary(facts)
            known = committed.get(versions, {}).get(name)
            if not write and known and (change := _change(known, found[name])):
                wrong.append(f"is not the committed step: {change}; run: make gate-step-write")
            bad += len(wrong)
            print(f"{name}: {_line(found[name])}, {seconds:.0f} s", flush=True)
            for why in wrong:
                print(f"hotloop: {name}: {why}", file=sys.stderr, flush=True)
    if write:
        committed[versions] = {**committed.get(versions, {}), **found}
        COMMITTED.write_text(json.dumps(committed, indent=1) + "\n")
        DOCS.write_text(in_docs(DOCS.read_text(), page(committed, versions)))
        print(f"written: {COMMITTED}, {DOCS}")
    print(f"{len(jobs)} steps, {bad} faults")
    return 1 if bad else 0
