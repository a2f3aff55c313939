"""One training step of train.py, by what it is made of, beside the floor: where the next nanosecond is.

    hotloop bench step [--train FILE] [--preset h100|laptop] [--set NAME=VALUE]

The step is the very function that train.py hands to `run.warmup`, with the trainer's own feed before it and its late
reading of the loss behind it, on synthetic tokens, under torch's profiler. Device kernels are put into groups by name;
`idle` tells when the device ran nothing, from the first kernel of the first step to the last of the last.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.bench.overrides import with_constants
from hotloop.harness.errors import DeviceError
from hotloop.harness.machine import gpu_memory_gib
from hotloop.harness.proof import device as dev
from hotloop.harness.proof.floor import FLOOR, floor_s
from hotloop.harness.settings import batch_divisor
from hotloop.harness.single import read_train_source
from hotloop.harness.text import one_line
from hotloop.harness.tuning.step import step_of, time_step

__all__ = [
    "GAP_ALLOWED",
    "GROUPS",
    "Idle",
    "device_spans",
    "group_of",
    "idle_of",
    "main",
    "profile_step",
]

# Device kernels (or CPU operators) by name; the first pattern that matches.
GROUPS = (
    ("attention", r"flash|fmha|attention|sdpa|flex|softmax"),
    ("loss", r"softcap|cross_entropy|exp_product|_finish_kernel|nll_loss|log_softmax|logsumexp"),
    ("optimizer", r"multi_tensor|foreach|lerp|adamw|muon"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|cublas|matmul|aten::(mm|bmm|addmm|linear)|_mm_|splitK|_product_kernel|_qkv_kernel|_mlp_|_residual_"
        r"|weight_gradient|sum_parts|stream_gradient",
    ),
    ("embedding", r"embedding|index_put|indexing_backward|radix|aten::index"),
    ("copies", r"memcpy|memset|copy_|aten::(stack|cat)|CatArray"),
    ("fused elementwise", r"triton_|_qkv_backward_kernel"),
)
GAP_ALLOWED = 0.01  # of a step, in which the device runs nothing


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


@dataclass(frozen=True)
class Idle:
    """When the device ran nothing.

    Attributes:
        share: of the time from the first start to the last end.
        busy_s: in which something ran.
        longest: the longest pauses: seconds, what ran before, what after.
    """

    share: float
    busy_s: float
    longest: list[tuple[float, str, str]]


def profile_step(path: Path, preset: str, constants: Sequence[str] = ()) -> dict[str, Any]:
    """Profile some steps in a row.

    Returns:
        {"tokens", "step_s", "idle", "groups": {name: seconds}, "kernels": [[name, group, seconds, calls]]} of a step;
        `idle` is None on a CPU.

    Raises:
        UsageError: as `step_of` and `with_constants`.
        DeviceError: the profiler saw nothing on the GPU.
    """
    on_gpu = torch.cuda.is_available()
    divisor = batch_divisor(gpu_memory_gib() if on_gpu else None)
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch) / "train.py"
        changed.write_bytes(with_constants(read_train_source(path), constants, preset))
        found = step_of(changed, preset, divisor)
    step, tokens = found.once, found.tokens
    steps = 5 if on_gpu else 1  # of n steps in a row n - 1 of the pauses between two are seen
    step_s = time_step(step, steps)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities={activity.CPU} | ({activity.CUDA} if on_gpu else set())) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    events = list(profiler.events() or ())
    spans = device_spans(events)
    if on_gpu and not spans:
        raise DeviceError("the profiler saw nothing on the GPU; it may need the driver's leave to read its counters")
    on_host = [(e.name, e.self_cpu_time_total / 1e6) for e in events if str(e.device_type).endswith("CPU")]
    for name, seconds in [(name, end - start) for start, end, name in spans] if on_gpu else on_host:
        entry = kernels.setdefault(name, [0.0, 0])
        entry[0] += seconds / steps
        entry[1] += 1 / steps
    groups: dict[str, float] = {}
    for name, (seconds, _) in kernels.items():
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + seconds
    return {
        "tokens": tokens,
        "step_s": step_s,
        "idle": idle_of(spans, steps) if on_gpu else None,
        "groups": dict(sorted(groups.items(), key=lambda g: -g[1])),
        "kernels": [[n, group_of(n), s, c] for n, (s, c) in sorted(kernels.items(), key=lambda k: -k[1][0])[:40]],
        "cpu_figures": not on_gpu,
    }


def device_spans(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """(start, end, name) in seconds of what ran on the GPU: kernels, copies and fills.

    Annotations stand on its timeline too, of compiled regions and of the optimizer's step, over all that is inside
    them, pauses included: with them no step would ever have a gap.
    """
    return [
        (e.time_range.start / 1e6, e.time_range.end / 1e6, e.name)
        for e in events
        if str(e.device_type).endswith("CUDA") and not getattr(e, "is_user_annotation", False)
    ]


def idle_of(spans: Iterable[tuple[float, float, str]], steps: int) -> Idle:
    """What lies between the spans, of any number of streams; `busy_s` is of one of `steps` steps.

    Raises:
        ValueError: no spans.
    """
    ordered = sorted(spans)
    if not ordered:
        raise ValueError("no spans, so nothing to tell idle from busy")
    first, until, last = ordered[0][0], ordered[0][0], ordered[0][2]
    pauses = []
    for start, end, name in ordered:
        if start > until:
            pauses.append((start - until, last, name))
        if end > until:
            until, last = end, name
    window, idle = until - first, sum(p[0] for p in pauses)
    longest = sorted(pauses, key=lambda p: -p[0])[:5]
    return Idle(idle / window if window else 0.0, (window - idle) / steps, longest)


def page(found: dict[str, Any]) -> str:
    """Markdown of a profile."""
    tokens = found["tokens"]
    idle: Idle | None = found["idle"]
    label = " (CPU figures)" if found["cpu_figures"] else ""
    lines = [
        f"A step of {tokens:,} tokens takes {found['step_s'] * 1e3:.1f} ms: "
        f"{tokens / found['step_s']:,.0f} tokens/s{label}.",
        "",
        "| group | ms | ns a token | floor, ns a token |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in found["groups"].items():
        floor = "" if found["cpu_figures"] or name not in FLOOR else f"{_floor_ns(name):.0f}"
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {seconds / tokens * 1e9:.1f} | {floor} |")
    if idle is not None:
        verdict = "within" if idle.share <= GAP_ALLOWED else "ABOVE"
        without = max(0.0, 1 - idle.busy_s / found["step_s"])
        lines += [
            "",
            f"Idle: {idle.share:.2%} of the time under the profiler, {verdict} the {GAP_ALLOWED:.0%} allowed. Busy "
            f"for {idle.busy_s * 1e3:.1f} ms a step, so it is idle for {without:.2%} of one without the profiler.",
            *(f"- {s * 1e3:.3f} ms between `{_short(a, 50)}` and `{_short(b, 50)}`" for s, a, b in idle.longest),
        ]
    lines += ["", "| kernel | group | ms | calls |", "|---|---|---:|---:|"]
    for name, group, seconds, calls in found["kernels"][:20]:
        lines.append(f"| `{_short(name, 90)}` | {group} | {seconds * 1e3:.2f} | {calls:.0f} |")
    return "\n".join(lines) + "\n"


def _short(name: str, most: int) -> str:
    return one_line(name, most).replace("|", " ")


def _floor_ns(name: str) -> float:
    return floor_s(name, dev.matrix_rate(), dev.copy_bandwidth()) * 1e9


def main(train: Path, preset: str, constants: Sequence[str] = ()) -> tuple[bool, str]:
    """(whether the device is kept busy, or on a CPU True; the page)."""
    found = profile_step(train, preset, constants)
    return found["idle"] is None or found["idle"].share <= GAP_ALLOWED, page(found)
