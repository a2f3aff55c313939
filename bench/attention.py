"""Which attention backend is fastest on this GPU, per shape and window: measured in one run, kept as data.

    hotloop bench attention [--shape CLASS]

Times every backend that is here as `hotloop bench run` does (each against the reference in the same rounds, right by
fp64 or not timed, the baseline's backward repeated 1000 times to the bit), and writes the order into
`kernels/tuned/<gpu>.json`, by which `kernels.attention` chooses from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hotloop.bench import results
from hotloop.bench.check.processes import ALL_KERNELS, INTERPRETER, run_kernels
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.proof import device as dev
from hotloop.harness.proof.operators import OPERATORS
from hotloop.harness.tuning.configurations import tuned
from hotloop.kernels.attend import ranking_key

__all__ = ["main", "ranking"]

REPEATS = 1000


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


def main(
    out: Path, shapes: list[str], minutes: float = 60.0, repeats: int = REPEATS, trial: bool = False,
    say: Callable[[str], None] = print,
) -> int:  # fmt: skip
    """Measure, print, and keep the order. 0 when ours was right; others that are wrong are named and not timed.

    Args:
        minutes: after which no more is timed.
        repeats: of the baseline's shapes, compared to the bit.
        trial: on a CPU, ours alone through the interpreter, at the tiny shape; nothing is kept.

    Raises:
        DeviceError: no GPU.
        UsageError: a shape that the table does not have.
        HotloopError: nothing was timed; with the last lines of its log.
    """
    known = OPERATORS["attention"].shapes
    if unknown := sorted(set(shapes) - set(known)):
        raise UsageError(f"attention has no shape {unknown[0]!r}; the table has {', '.join(known)}")
    if not trial:
        dev.require_gpu()
    more = [f"--repeats={repeats}", *(f"--shape={s}" for s in shapes)]
    log = out.with_suffix(".log")
    env = INTERPRETER if trial else ALL_KERNELS
    code = run_kernels(out.resolve(), minutes * 60, log, ["attention"], more, env)
    if not out.exists():
        raise HotloopError(f"no backend was timed; see {log}")
    result = results.read(out)
    order = ranking(result.rows)
    say(results.markdown(result))
    for key, names in order.items():
        say(f"{key}: {', '.join(names)}")
    if trial:
        return 1 if code else 0
    with tuned(dev.identity()) as (path, body):
        body.setdefault("measured", {}).setdefault("attention", {}).update(order)
    say(f"written: {path}, {out}; now: make seal, and commit them")
    return 1 if code else 0
