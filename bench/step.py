"""One training step of train.py, by what it is made of, beside the floor: where the next nanosecond is.

    hotloop bench step [--train FILE] [--preset h100|laptop]

The step is the very function that train.py hands to `run.warmup`, on synthetic tokens, under torch's profiler. Device
kernels are put into groups by name; `gap` is the share of the step in which the device ran nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import device as dev
from harness.client import Batch
from harness.errors import UsageError
from harness.feed import synthetic_rows
from harness.machine import gpu_memory_gib
from harness.single import read_train_source
from harness.spec import PRESETS, Spec, batch_divisor
from harness.trainer import load_train_module
from harness.walls import project_root
from kernels import attend
from kernels.dispatch import TOGETHER, TRITON_OPERATORS, implementations

__all__ = ["FLOOR", "GROUPS", "group_of", "main", "profile_step", "step_of", "switches", "time_step"]

# Device kernels (or CPU operators) by name; the first pattern that matches.
GROUPS = (
    ("attention", r"flash|fmha|attention|sdpa|flex|softmax"),
    ("loss", r"softcap|cross_entropy|exp_product|_finish_kernel|nll_loss|log_softmax|logsumexp"),
    ("optimizer", r"multi_tensor|foreach|lerp|adamw|muon"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|cublas|matmul|aten::(mm|bmm|addmm|linear)|_mm_|splitK|_product_kernel|linear_qkv"
        r"|weight_gradient|sum_parts|linear_residual|stream_gradient",
    ),
    ("embedding", r"embedding|index_put|indexing_backward|radix|aten::index"),
    ("copies", r"memcpy|memset|copy_|aten::(stack|cat)|CatArray"),
    ("fused elementwise", r"triton_|_residual_norm_|_qkv_(forward|backward)_kernel"),
)
# Of the baseline architecture: MFLOP and KB of ideal traffic a token, all layers, forward and backward, everything
# fused that can be. Estimates from counting bytes and operations; times come from this machine's own ceilings.
FLOOR = {
    "matrix products": (37.7 + 12.6 + 100.7, 135 + 57 + 311),
    "attention": (13.6 + 34.1, 33 + 107),
    "loss": (25.2, 52 + 2),
    "embedding": (0.0, 10),
    "fused elementwise": (0.0, 82),
}


GAP_ALLOWED = 0.01  # of a step, in which the device runs nothing


class _Captured(Exception):
    """Carries the step out of train()."""


class _Run:
    """What train.py sees instead of a harness: `warmup` takes its step and ends train()."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def warmup(self, step: Callable[[Batch], Any], *, rows: int, seq_len: int | None = None, restore: Any = ()) -> None:
        raise _Captured(step, rows, seq_len or self.spec.seq_len)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def step_of(path: Path, preset: str) -> tuple[Callable[[], Any], int]:
    """(one step of a train.py on synthetic tokens, its tokens).

    Raises:
        UsageError: a train.py that does not call run.warmup.
    """
    on_gpu = torch.cuda.is_available()
    chosen = PRESETS[preset]
    divisor = batch_divisor(gpu_memory_gib() if on_gpu else None)
    spec = Spec(preset, "cuda" if on_gpu else "cpu", 1, chosen.vocab_size, chosen.seq_len, divisor)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    read_train_source(path)
    implementations()  # packages are tried before anything is compiled
    try:
        load_train_module(str(path)).train(_Run(spec))
    except _Captured as e:
        step, rows, seq_len = e.args
    else:
        raise UsageError(f"{path}: train(run) ended without calling run.warmup, so there is no step to profile")
    data = torch.from_numpy(synthetic_rows(rows, seq_len, spec.vocab_size, 0).astype("int64")).to(spec.device)
    batch = Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), 0.25, 10)
    return lambda: step(batch), rows * seq_len


def time_step(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of `steps` steps, after as many that are not counted."""
    for _ in range(steps):
        step()
    marks = [dev.now()]
    for _ in range(steps):
        step()
        marks.append(dev.now())
    return float(statistics.median(b - a for a, b in itertools.pairwise(marks)))


def profile_step(path: Path, preset: str) -> dict[str, Any]:
    """Profile; returns {"tokens", "step_s", "gap", "groups": {name: seconds}, "kernels": [[name, group, seconds,
    calls]]}. Raises UsageError as `step_of`.
    """
    on_gpu = torch.cuda.is_available()
    step, tokens = step_of(path, preset)
    steps = 3 if on_gpu else 1
    step_s = time_step(step, steps)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities={activity.CPU} | ({activity.CUDA} if on_gpu else set())) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    spans: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        if on_gpu != str(event.device_type).endswith("CUDA"):
            continue
        us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        entry = kernels.setdefault(event.name, [0.0, 0])
        entry[0] += us / 1e6 / steps
        entry[1] += 1 / steps
        if on_gpu:
            spans.append((event.time_range.start, event.time_range.end))
    groups: dict[str, float] = {}
    for name, (seconds, _) in kernels.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + seconds
    return {
        "tokens": tokens,
        "step_s": step_s,
        "gap": _gap(spans) if on_gpu else None,
        "groups": dict(sorted(groups.items(), key=lambda g: -g[1])),
        "kernels": [[n, group_of(n), s, c] for n, (s, c) in sorted(kernels.items(), key=lambda k: -k[1][0])[:40]],
        "cpu_figures": not on_gpu,
    }


def _gap(spans: list[tuple[float, float]]) -> float:
    """Share of first start to last end in which nothing ran."""
    spans = sorted(spans)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1.0 - busy / (until - spans[0][0])


def page(found: dict[str, Any]) -> str:
    """Markdown of a profile."""
    tokens = found["tokens"]
    gap = "" if found["gap"] is None else f", {found['gap']:.1%} of it idle"
    label = " (CPU figures)" if found["cpu_figures"] else ""
    lines = [
        f"A step of {tokens:,} tokens takes {found['step_s'] * 1e3:.1f} ms{gap}: "
        f"{tokens / found['step_s']:,.0f} tokens/s{label}.",
        "",
        "| group | ms | ns a token | floor, ns a token |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in found["groups"].items():
        floor = "" if found["cpu_figures"] or name not in FLOOR else f"{_floor_ns(name):.0f}"
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {seconds / tokens * 1e9:.1f} | {floor} |")
    if found["gap"] is not None:
        verdict = "within" if found["gap"] <= GAP_ALLOWED else "ABOVE"
        lines += [
            "",
            f"Idle: {found['gap']:.2%} of the step under the profiler, {verdict} the {GAP_ALLOWED:.0%} allowed.",
        ]
    lines += ["", "| kernel | group | ms | calls |", "|---|---|---:|---:|"]
    for name, group, seconds, calls in found["kernels"][:20]:
        short = name if len(name) <= 90 else name[:87] + "..."
        lines.append(f"| `{short.replace('|', ' ')}` | {group} | {seconds * 1e3:.2f} | {calls:.0f} |")
    return "\n".join(lines) + "\n"


def _floor_ns(name: str) -> float:
    megaflop, kilobytes = FLOOR[name]
    return max(megaflop * 1e6 / dev.matrix_rate(), kilobytes * 1e3 / dev.copy_bandwidth()) * 1e9


def switches(train: Path, preset: str, say: Callable[[str], None] = print) -> int:
    """Tokens a second of a whole step with no kernel of ours, with each alone, with all, and with each attention
    backend: which deserve to be defaults.

    Each setting runs in a process of its own, the setting without kernels first and last, so that drift shows.
    """
    rates: list[float] = []
    code = "import sys; from bench.cli import main; sys.exit(main())"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = [name for name in TRITON_OPERATORS if name not in TOGETHER]
    names = ("reference", *alone, ",".join(sorted(TOGETHER)), "triton")
    settings = [{"HOTLOOP_KERNELS": name} for name in names]
    settings += [{"HOTLOOP_KERNELS": "reference", "HOTLOOP_ATTENTION": name} for name in attend.backends(device)[0]]
    settings.append(settings[0])
    for setting in settings:
        name = " ".join(setting.values())
        command = [sys.executable, "-c", code, "step", "--time", "--train", str(train), "--preset", preset]
        done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, cwd=project_root())
        if done.returncode:
            say(f"{name}: failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        rates.append(found["tokens"] / found["step_s"])
        say(f"{name:<32} {rates[-1]:>14,.0f} tokens/s  {rates[-1] / rates[0]:.3f}x")
    return 0 if len(rates) == len(settings) else 1


def main(train: Path, preset: str) -> tuple[dict[str, Any], str]:
    """(the profile, its page)."""
    found = profile_step(train, preset)
    return found, page(found)
