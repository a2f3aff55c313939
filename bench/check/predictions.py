"""What was predicted for an H100 before anything ran on one, to be held against the first measurements.

Predictions, not measurements: made by reading the kernels and their machine code. Milliseconds of a pass of 262,144
tokens (128 rows of 2048, depth 8, width 512). Assumed: 2.8 TB/s, cuBLAS 620 TFLOP/s, our Triton products 470 (K = 512)
and 560 (K = 2048), FA3 500 and 400 forward and backward, FA2 340 and 240, FlexAttention 400 and 290, ours 400 and 250.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from hotloop.bench.results import Result, Row

__all__ = ["PARTS", "STEPS", "page"]


class Part(NamedTuple):
    """A part of the pass.

    Attributes:
        plain, ours: ms, in words.
        expected: in words.
        rows: (operator, shape, pass) of the benchmarks that measure it.
        times: how often each is in the pass.
    """

    what: str
    plain: str
    ours: str
    expected: str
    rows: tuple[tuple[str, str, str], ...] = ()
    times: tuple[int, ...] = ()


PARTS = (
    Part("MLP first product + relu^2, forward", "1.66 x8", "1.17 x8", "win, 4 ms"),
    Part("MLP gradient of the pre-activation", "2.04 x8", "1.23 x8", "win, 6 ms"),
    Part("dx + norm + mix, both gradients", "3.0 x8", "1.9 x8", "win, 8 to 9 ms"),
    Part(
        "norm + QKV + rotary, forward", "1.8 x8", "0.9 x8", "win, 5 to 7 ms",
        (("qkv", "baseline", "forward"),), (8,),
    ),
    Part(
        "projection + residual, both", "1.9 x8", "1.4 x8", "win, 3 to 4 ms",
        (("residual", "baseline", "both"),), (8,),
    ),
    Part(
        "embedding backward, 5 tables", "about 7, far more if duplicates are walked", "about 2",
        "win; widest error", (("embedding", "baseline", "backward"),), (5,),
    ),
    Part(
        "loss in place", "16.8", "14.1", "win, 2.7 ms; `exp` perhaps 1 more",
        (("loss", "baseline", "both"),), (1,),
    ),
    Part("Muon", "1.5", "1.1", "small win"),
    Part("weight gradients", "", "", "512 x 512 may win; large ones tie or lose to split-K cuBLAS"),
    Part("residual norm alone, QKV pointwise alone", "", "", "tie: Inductor fuses the same"),
    Part("AdamW", "", "", "tie or loss until its loads are wide"),
    Part(
        "our Triton attention", "FA3 29.5, FA2 47.7", "about 45", "loses to FA3, ties FA2",
        (("attention", "baseline", "both"), ("attention", "baseline full", "both")), (6, 2),
    ),
)  # fmt: skip
# Of the whole step: what runs -> M tokens/s, over plain + FA3 (1.57 M), over plain + FlexAttention (1.48 M).
STEPS = (
    ("all + FA3, products at 420 / 500", 1.90, 1.21, 1.28),
    ("all + FA3, 470 / 560", 1.99, 1.27, 1.34),
    ("all + FA3, 550 / 600", 2.08, 1.32, 1.40),
    ("all + FA3, 620 / 640 (as quack's products)", 2.14, 1.36, 1.45),
    ("all + the FA2 in torch", 1.75, 1.11, 1.18),
)


def page(result: Result) -> str:
    """Markdown: each prediction beside what this result has of it."""
    cpu = bool(result.machine.get("cpu_figures"))
    lines = [
        "Predicted for an H100 SXM, before anything ran on one; measured: this result"
        + (", of a CPU, which says nothing of it." if cpu else f", on {result.device}."),
        "",
        "| part, ms | predicted plain | predicted ours | expected | measured plain | measured ours |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for part in PARTS:
        plain = _measured(part, result.rows, lambda r: r.median_us * r.ratio)
        ours = _measured(part, result.rows, lambda r: r.median_us)
        lines.append(f"| {part.what} | {part.plain} | {part.ours} | {part.expected} | {plain} | {ours} |")
    lines += ["", "| whole step | M tokens/s | over plain + FA3 | over plain + FlexAttention |", "|---|---:|---:|---:|"]
    lines += [f"| predicted: {what} | {rate:.2f} | {fa3:.2f} | {flex:.2f} |" for what, rate, fa3, flex in STEPS]
    tuned = result.extra.get("tuned", {})
    against = tuned.get("whole", {}).get("plain with the best attention")
    if against:
        names = " ".join(f"{k}={v}" for k, v in sorted(tuned["chosen"].items()))
        lines.append(
            f"| measured: {names}, over plain with the fastest attention ({against['old_rate'] / 1e6:.2f} M) "
            f"| {against['new_rate'] / 1e6:.2f} | {statistics.median(against['ratios']):.3f} | |"
        )
    else:
        lines.append("| measured: nothing was chosen yet | | | |")
    return "\n".join(lines) + "\n"


def _measured(part: Part, rows: list[Row], time_us: Callable[[Row], float]) -> str:
    """Of a pass; empty where one of its benchmarks is missing."""
    total = 0.0
    for (operator, shape, way), times in zip(part.rows, part.times, strict=True):
        row = next(
            (r for r in rows if (r.operator, r.shape, r.way, r.implementation) == (operator, shape, way, "triton")),
            None,
        )
        if row is None or not time_us(row):
            return ""
        total += times * time_us(row) / 1e3
    return f"{total:.2f}" if part.rows else ""
