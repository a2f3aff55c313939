"""Which attention backend is fastest on this GPU, per shape and window: measured in one run, kept as data.

    hotloop bench attention [--shape CLASS]

Times every backend that is here as `hotloop bench run` does (each against the reference in the same rounds, right by
fp64 or not timed, the baseline's backward repeated 1000 times to the bit), and writes the order into
`kernels/tuned/<gpu>.json`, by which `kernels.attention` chooses from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import check, results
from bench import device as dev
from bench.operators import OPERATORS
from bench.tune import tuned
from harness.errors import HotloopError, UsageError
from kernels.attend import ranking_key

__all__ = ["main", "ranking"]

REPEATS = 1000
LIMIT_S = 3600.0


def ranking(rows: list[results.Row]) -> dict[str, list[str]]:
    """Key of a shape -> backends from the fastest, by the forward and backward pass together as ratios to the reference
    of the same rounds. Those whose repeats gave other bits are left out: a training must repeat.
    """
    found: dict[str, list[results.Row]] = {}
    for row in rows:
        usable = row.right and not row.runs_with_other_bits and row.implementation != "eager"
        if row.operator == "attention" and row.way == "both" and usable:
            sizes = OPERATORS["attention"].shapes[row.shape]
            found.setdefault(ranking_key(sizes["K"], sizes["T"], sizes["W"]), []).append(row)
    return {
        key: [_backend(row) for row in sorted(timed, key=lambda row: -row.ratio or row.median_us)]
        for key, timed in found.items()
    }


def _backend(row: results.Row) -> str:
    return "triton" if row.implementation == "hotloop" else row.implementation


def main(out: Path, shapes: list[str], say: Callable[[str], None] = print) -> int:
    """Measure, print, and keep the order. 0 when ours was right; others that are wrong are named and not timed.

    Raises:
        DeviceError: no GPU.
        UsageError: a shape that the table does not have.
        HotloopError: nothing was timed; with the last lines of its log.
    """
    known = OPERATORS["attention"].shapes
    if unknown := sorted(set(shapes) - set(known)):
        raise UsageError(f"attention has no shape {unknown[0]!r}; the table has {', '.join(known)}")
    dev.require_gpu()
    more = [f"--repeats={REPEATS}", *(f"--shape={s}" for s in shapes)]
    log = out.with_suffix(".log")
    code = check.run_kernels(out.resolve(), LIMIT_S, log, ["attention"], more, check.ALL_KERNELS)
    if not out.exists():
        raise HotloopError(f"no backend was timed; see {log}")
    result = results.read(out)
    order = ranking(result.rows)
    say(results.markdown(result))
    for key, names in order.items():
        say(f"{key}: {', '.join(names)}")
    with tuned(dev.facts()) as (path, body):
        body.setdefault("measured", {}).setdefault("attention", {}).update(order)
    say(f"written: {path}, {out}; now: make seal, and commit them")
    return 1 if code else 0
