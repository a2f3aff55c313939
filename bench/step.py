"""One training step of train.py, by what it is made of, beside the floor: where the next nanosecond is.

    hotloop bench step [--train FILE] [--preset h100|laptop] [--set NAME=VALUE]

The step is the very function that train.py hands to `run.warmup`, with the trainer's own feed before it and its late
reading of the loss behind it, on synthetic tokens, under torch's profiler. Device kernels are put into groups by name;
`idle` tells when the device ran nothing, from the first kernel of the first step to the last of the last.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.bench import device as dev
from hotloop.bench.overrides import with_constants
from hotloop.harness.errors import DeviceError, UsageError
from hotloop.harness.machine import gpu_memory_gib, threads_default
from hotloop.harness.sandbox.process import SharedMemory, child_environment
from hotloop.harness.settings import PRESETS, Spec, batch_divisor
from hotloop.harness.single import read_train_source
from hotloop.harness.training.child import load_train_module, prepare_torch
from hotloop.harness.training.feed import SLOT_BYTES, SLOTS, Ring, synthetic_rows
from hotloop.harness.training.run import Batch, Run
from hotloop.kernels.dispatch import implementations

__all__ = [
    "FLOOR",
    "GAP_ALLOWED",
    "GROUPS",
    "Idle",
    "Step",
    "device_spans",
    "group_of",
    "idle_of",
    "main",
    "profile_step",
    "settle",
    "step_of",
    "time_step",
]

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


class _Mute:
    """A wire that nobody reads."""

    def send(self, kind: str, **fields: Any) -> None: ...


class _Run(Run):
    """The trainer's own `Run` without a parent: `warmup` takes train.py's step and ends train()."""

    def __init__(self, spec: Spec) -> None:
        self._memory = SharedMemory(SLOTS * SLOT_BYTES)
        super().__init__(spec, _Mute(), Ring(self._memory))  # type: ignore[arg-type]

    def warmup(self, step: Callable[[Batch], Any], *, rows: int, seq_len: int | None = None, restore: Any = ()) -> None:
        raise _Captured(step, rows, seq_len or self.spec.seq_len, restore)

    def restart(self) -> None:
        self._step = -1

    def whole(self, step: Callable[[Batch], Any], rows: int, seq_len: int) -> Callable[[], Any]:
        """What the trainer does from one batch to the next, but for the words with its parent; returns the loss."""
        for slot in range(SLOTS):
            self._ring.put(slot, synthetic_rows(rows, seq_len, self.spec.vocab_size, slot))

        def once() -> Any:
            self._step += 1
            message = {"slot": self._step % SLOTS, "progress": 0.25, "step": 10}
            loss = step(self._batch(message, rows, seq_len))
            if loss is not None:
                self.log(loss)
            return loss

        return once


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


def settle(repeatable: bool = True) -> None:
    """Set this process up as a trainer's, as far as that can be done after torch was imported."""
    threads = threads_default()
    os.environ.update(child_environment(threads, repeatable))
    prepare_torch({"seed": 1, "device": str(dev.device())}, threads, repeatable)


@dataclass(frozen=True)
class Step:
    """One step of a train.py on synthetic tokens.

    Attributes:
        once: makes one, and returns its loss where train.py's step does.
        tokens: of one.
        restore: the modules and optimizers that train.py names to `run.warmup`.
        restart: the tokens begin from the first again.
    """

    once: Callable[[], Any]
    tokens: int
    restore: tuple[Any, ...]
    restart: Callable[[], None]


def step_of(path: Path, preset: str, constants: Sequence[str] = ()) -> Step:
    """A step as the trainer makes it.

    Args:
        constants: `NAME=VALUE`, see `with_constants`.

    Raises:
        UsageError: a train.py that does not call run.warmup, or `with_constants` refuses.
    """
    on_gpu = torch.cuda.is_available()
    chosen = PRESETS[preset]
    divisor = batch_divisor(gpu_memory_gib() if on_gpu else None)
    spec = Spec(preset, "cuda" if on_gpu else "cpu", 1, chosen.vocab_size, chosen.seq_len, divisor)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    source = with_constants(read_train_source(path), constants, preset)
    implementations()  # packages are tried before anything is compiled
    with tempfile.TemporaryDirectory() as scratch:
        loaded = path
        if constants:
            loaded = Path(scratch) / "train.py"
            loaded.write_bytes(source)
        module, run = load_train_module(str(loaded)), _Run(spec)
    try:
        module.train(run)
    except _Captured as e:
        step, rows, seq_len, restore = e.args
    else:
        raise UsageError(f"{path}: train(run) ended without calling run.warmup, so there is no step to profile")
    return Step(run.whole(step, rows, seq_len), rows * seq_len, restore, run.restart)


def time_step(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of `steps` steps, after as many that are not counted."""
    for _ in range(steps):
        step()
    marks = [dev.now()]
    for _ in range(steps):
        step()
        marks.append(dev.now())
    return float(statistics.median(b - a for a, b in itertools.pairwise(marks)))


def profile_step(path: Path, preset: str, constants: Sequence[str] = ()) -> dict[str, Any]:
    """Profile some steps in a row.

    Returns:
        {"tokens", "step_s", "idle", "groups": {name: seconds}, "kernels": [[name, group, seconds, calls]]} of a step;
        `idle` is None on a CPU.

    Raises:
        UsageError: as `step_of`.
        DeviceError: the profiler saw nothing on the GPU.
    """
    on_gpu = torch.cuda.is_available()
    found = step_of(path, preset, constants)
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
    return (name if len(name) <= most else name[: most - 3] + "...").replace("|", " ")


def _floor_ns(name: str) -> float:
    megaflop, kilobytes = FLOOR[name]
    return max(megaflop * 1e6 / dev.matrix_rate(), kilobytes * 1e3 / dev.copy_bandwidth()) * 1e9


def main(train: Path, preset: str, constants: Sequence[str] = ()) -> tuple[bool, str]:
    """(whether the device is kept busy, or on a CPU True; the page)."""
    found = profile_step(train, preset, constants)
    return found["idle"] is None or found["idle"].share <= GAP_ALLOWED, page(found)
