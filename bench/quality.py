"""Does train.py learn as much from a token as plain PyTorch? Both under several seeds, at equal tokens.

    hotloop bench quality --seeds 5 [--preset laptop] [--tokens N] [--out FOLDER]
    hotloop bench quality --seeds 5 --set NAME=VALUE    train.py with a constant changed, against train.py as it is

Writes a JSON to bench/results/<device>/quality/: the runs, what they say, and on what.

With one seed both start from the same weights and see the same rows, so a pair differs by rounding alone; another seed
is another start and another order. The difference of the two files is set against the spread over seeds: it is within
the noise when the mean difference is no larger than two standard deviations of a difference of two means of as many
runs that differ by their seed alone, and no single pair differs by more than two standard deviations of such a pair.
The training losses are set beside each other in the same way, at each point of the curve.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.bench import results
from hotloop.bench.versus_plain import TOKENS, Side, pair_of, small, train_once
from hotloop.harness.errors import UsageError
from hotloop.harness.experiment import Settings
from hotloop.harness.machine import cpu_name, environment, gpus

__all__ = ["Verdict", "main", "page", "verdict", "write"]

SMALL_TOKENS = 40 * 256


@dataclass(frozen=True)
class Verdict:
    """What the pairs say; a positive difference is a loss of quality in what is judged: train.py against plain PyTorch,
    or a changed train.py against train.py. Bits per byte, but for the curve's.

    Attributes:
        differences: what is judged minus what it is judged by, a pair each.
        error: standard error of their mean.
        seed_sd: standard deviation over seeds of what it is judged by; its own would excuse what is erratic.
        allowed_mean / allowed_pair: two standard deviations of what seeds alone would do to the mean and to one pair.
        curve_share: share of the curve's points at which the mean difference of the losses is above what seeds explain.
        curve_largest_nats: the largest mean difference at any point.
    """

    differences: tuple[float, ...]
    mean: float
    error: float
    seed_sd: float
    allowed_mean: float
    allowed_pair: float
    curve_share: float
    curve_largest_nats: float

    @property
    def within_noise(self) -> bool:
        largest = max(abs(d) for d in self.differences)
        # Of a curve's points one in twenty lies outside of two standard deviations by chance.
        return abs(self.mean) <= self.allowed_mean and largest <= self.allowed_pair and self.curve_share <= 0.05


def verdict(ours: Sequence[Side], plain: Sequence[Side]) -> Verdict:
    """Compare runs of the same seeds, in the same order.

    Raises:
        UsageError: fewer than two seeds, or runs that do not pair.
    """
    if len(ours) < 2:
        raise UsageError("the spread over seeds needs two of them at least; say --seeds 5")
    keys = [[(s.seed, s.tokens, [p for p, _ in s.curve]) for s in sides] for sides in (ours, plain)]
    if keys[0] != keys[1]:
        raise UsageError("the runs do not pair: their seeds, tokens or steps differ")
    n = len(ours)
    scores = [[s.val_bpb for s in sides] for sides in (ours, plain)]
    differences = [a - b for a, b in zip(*scores, strict=True)]
    seed_sd = statistics.stdev(scores[1])
    means, outside = [], 0
    for at in range(len(ours[0].curve)):
        here = [[s.curve[at][1] for s in sides] for sides in (ours, plain)]
        means.append(abs(statistics.fmean(here[0]) - statistics.fmean(here[1])))
        outside += means[-1] > 2 * statistics.stdev(here[1]) * math.sqrt(2 / n)
    return Verdict(
        tuple(differences),
        statistics.fmean(differences),
        statistics.stdev(differences) / math.sqrt(n),
        seed_sd,
        2 * seed_sd * math.sqrt(2 / n),
        2 * seed_sd * math.sqrt(2),
        outside / len(means),
        max(means),
    )


def page(ours: Sequence[Side], plain: Sequence[Side]) -> str:
    """Markdown of the pairs and what they say."""
    v = verdict(ours, plain)
    on_gpu = ours[0].device == "cuda"
    where = gpus()[0].name if on_gpu and gpus() else "CPU figures"
    fast = sorted(k for k, way in ours[0].kernels.items() if not way.startswith("reference"))
    told = (
        "cannot be told from zero" if abs(v.mean) <= 2 * v.error else "is there: more than two of its standard errors"
    )
    judged, by = ours[0].name, plain[0].name
    lines = [
        f"{judged} against {by}, {len(ours)} seeds, {ours[0].tokens:,} tokens each in {ours[0].steps} steps ({where}).",
        f"Kernels in {judged}: {', '.join(fast) or 'none, all are references'}.",
        "",
        f"| seed | {judged} val_bpb | {by} val_bpb | difference |",
        "|---|---:|---:|---:|",
        *(
            f"| {a.seed} | {a.val_bpb:.6f} | {b.val_bpb:.6f} | {a.val_bpb - b.val_bpb:+.6f} |"
            for a, b in zip(ours, plain, strict=True)
        ),
        "",
        f"Mean difference {v.mean:+.6f} with a standard error of {v.error:.6f} over pairs: it {told}.",
        f"Standard deviation of {by} over seeds {v.seed_sd:.6f}; seeds alone would move such a mean by up to "
        f"{v.allowed_mean:.6f} and one pair by up to {v.allowed_pair:.6f}.",
        f"Training losses: mean difference at most {v.curve_largest_nats:.6f} nats at any of {len(ours[0].curve)} "
        f"points; {v.curve_share:.0%} of them above what seeds explain.",
        f"**{'Within' if v.within_noise else 'NOT within'} the noise of seeds.**",
    ]
    return "\n".join(lines) + "\n"


def write(ours: Sequence[Side], plain: Sequence[Side], environment: dict[str, Any], folder: Path) -> Path:
    """The runs, without their curves, and what they say, as a JSON in `folder`/<device>/quality; returns its path."""
    from hotloop.kernels.tuning import file_name

    on_gpu = ours[0].device == "cuda"
    device = environment["gpu"]["name"] if on_gpu else f"cpu {cpu_name()}"
    commit, now = results.commit() or "unknown", datetime.datetime.now(datetime.UTC)
    v = verdict(ours, plain)
    body = {
        "time": now.isoformat(timespec="seconds"),
        "commit": commit,
        "device": device,
        "cpu_figures": not on_gpu,
        "environment": {k: environment[k] for k in ("versions", "python", "threads")},
        "tokens": ours[0].tokens,
        "steps": ours[0].steps,
        "runs": [
            {"file": s.name, "seed": s.seed, "val_bpb": s.val_bpb, "last_loss_nats": s.curve[-1][1]}
            | {"training_s": round(s.training_s, 2), "kernels": s.kernels}
            for pair in zip(ours, plain, strict=True)
            for s in pair
        ],
        "verdict": dataclasses.asdict(v) | {"within_noise": v.within_noise},
    }
    path = folder / file_name(device).removesuffix(".json") / "quality" / f"{now:%Y%m%d-%H%M}-{commit[:9]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return path


def main(
    settings: Settings,
    seeds: int,
    tokens: float | None = None,
    tiny: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = print,
    changes: Sequence[str] = (),
) -> tuple[Verdict, str]:
    """Train both under the seeds 1 to `seeds`; (what they say, its page).

    Args:
        out: takes the JSON; None for none.

    Raises:
        UsageError: too few seeds, `tiny` with another preset than the laptop's, or see `pair_of`.
        HotloopError: a training ended without a score.
    """
    if seeds < 2:
        raise UsageError(f"--seeds must be at least 2, not {seeds}: the spread over seeds is the measure")
    sources = pair_of(changes, settings.preset.name)
    judged, by = sources
    wanted = tokens or (SMALL_TOKENS if tiny else TOKENS[settings.preset.name])
    if tiny:
        if settings.preset.name != "laptop":
            raise UsageError("--tiny is a size of the laptop preset; say --preset laptop")
        settings, shrink = small(settings)
        sources = {name: shrink(source) for name, source in sources.items()}
    found: dict[str, list[Side]] = {judged: [], by: []}
    for seed in range(1, seeds + 1):
        for name in (judged, by) if seed % 2 else (by, judged):
            found[name].append(train_once(name, sources[name], settings, seed, wanted))
        a, b = (found[name][-1].val_bpb for name in (judged, by))
        say(f"seed {seed}: {judged} {a:.6f}, {by} {b:.6f}, difference {a - b:+.6f}")
    if out:
        facts = environment(settings.device, settings.threads)
        say(f"written: {write(found[judged], found[by], facts, out)}")
    return verdict(found[judged], found[by]), page(found[judged], found[by])
