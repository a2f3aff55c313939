"""train.py beside the same model in plain PyTorch (bench/baseline.py): same tokens, same seeds, same harness.

    hotloop bench baseline [--pairs N] [--free]    speed, memory, score, where the time went, as ratios
    hotloop bench baseline --set NAME=VALUE        the same of train.py with a constant changed, beside it as it is

Both are trained in the sandbox and scored and audited as experiments are, in changing order. Nothing is recorded.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hotloop.bench.overrides import with_constants
from hotloop.harness.errors import HotloopError, TrialError, UsageError
from hotloop.harness.experiment import Settings
from hotloop.harness.machine import gpus, mfu_percent
from hotloop.harness.paths import project_root
from hotloop.harness.records.model import Curve
from hotloop.harness.scoring.evaluation import Evaluator, Scoring
from hotloop.harness.scoring.weights import check_weights
from hotloop.harness.settings import BudgetRule, Spec
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.session import Session, SessionConfig

__all__ = ["OURS", "PLAIN", "TOKENS", "Side", "main", "page", "pair_of", "source_of", "train_once"]

OURS, PLAIN, FREE = "train.py", "plain PyTorch", "plain, not repeatable"
TOKENS = {"laptop": 204_800, "h100": 40 * 2**19}  # of each training, where nothing else is asked for
PHASES = ("start", "import", "compile", "calibrate", "train", "submit", "evaluate", "audit")


@dataclass(frozen=True)
class Side:
    """One training and its score.

    Attributes:
        step_s: the median steady step of the calibration, seconds.
        cpu_s: processor seconds of the training.
        ledger: seconds by phase.
    """

    name: str
    seed: int
    device: str
    tokens: int
    steps: int
    step_s: float
    training_s: float
    cpu_s: float
    peak_mb: float
    mfu_percent: float | None
    val_bpb: float
    ledger: dict[str, float]
    curve: Curve
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def step_tokens_per_s(self) -> float:
        return self.tokens / self.steps / self.step_s

    @property
    def tokens_per_s(self) -> float:
        """Of the whole training, to the last byte of the weights."""
        return self.tokens / self.training_s


def source_of(name: str) -> bytes:
    """The file that OURS, PLAIN or FREE stands for."""
    if name == OURS:
        return (project_root() / "train.py").read_bytes()
    source = Path(__file__).with_name("baseline.py").read_bytes()
    return source.replace(b"\nREPEATABLE = True\n", b"\nREPEATABLE = False\n") if name == FREE else source


def pair_of(changes: Sequence[str], preset: str) -> dict[str, bytes]:
    """What is compared, then what with: train.py and plain PyTorch, or train.py with `changes` and train.py as it is.

    Args:
        changes: `NAME=VALUE` each, a constant at the top of train.py and a literal of Python.

    Raises:
        UsageError: a change that is none of this preset's constants, or no literal.
    """
    source = source_of(OURS)
    if not changes:
        return {OURS: source, PLAIN: source_of(PLAIN)}
    changed = with_constants(source, changes, preset)
    if changed == source:
        raise UsageError("--set changes nothing")
    return {f"{OURS} with {', '.join(changes)}": changed, OURS: source}


def train_once(name: str, source: bytes, settings: Settings, seed: int, tokens: float) -> Side:
    """Train and score one file.

    Raises:
        HotloopError: it ended without a score; with its status and reason.
    """
    # What is measured here is not judged by the time it takes.
    preset = settings.preset.with_limits(overtime=10.0, overtime_cpu=10.0)
    dataset, width = settings.dataset, preset.seq_len + 1
    spec = Spec(preset.name, settings.device, seed, dataset.vocab_size, preset.seq_len, preset.batch_divisor)
    rows, val, holdout = (dataset.rows(split)[:, :width] for split in ("train", "val", "holdout"))
    budget = Budget(BudgetRule("tokens", tokens))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        session = Session(SessionConfig(
            source=source, spec=spec, preset=preset, rows=rows, budget=budget, folder=folder,
            threads=settings.threads, sandbox=settings.sandbox,
        ))  # fmt: skip
        scoring = Scoring(
            source=source, spec=spec, preset=preset, val=val[: preset.eval_rows], train=rows, folder=folder,
            holdout=holdout[: preset.holdout_rows], token_bytes=dataset.token_bytes, threads=settings.threads,
            sandbox=settings.sandbox,
        )  # fmt: skip
        try:
            session.run()
            check_weights(session.weights, preset.limits.spare_bytes)
            with Evaluator(scoring) as evaluator:
                scored = evaluator.run(session.weights)
        except TrialError as e:
            raise HotloopError(f"{name}, seed {seed}, ended as {e.status}: {e.reason}") from None
    trained = session.training
    return Side(
        name, seed, settings.device, trained.tokens, trained.steps, next(iter(budget.step_s.values())),
        trained.wall_s, trained.cpu_s, trained.peak_mb,
        mfu_percent(settings.device, trained.flops_per_token, trained.tokens_per_s), scored.scores.val_bpb,
        dict((session.ledger + scored.ledger).items()), trained.curve, trained.implementations,
    )  # fmt: skip


def main(
    settings: Settings, tokens: float | None = None, pairs: int = 1, free: bool = False,
    say: Callable[[str], None] = print, changes: Sequence[str] = (),
) -> str:  # fmt: skip
    """Train both `pairs` times, in changing order, and return the page.

    Raises:
        UsageError: see `pair_of`.
        HotloopError: one of them ended without a score.
    """
    wanted = tokens or TOKENS[settings.preset.name]
    sources = pair_of(changes, settings.preset.name)
    base = list(sources)[1]
    if free:
        sources[FREE] = source_of(FREE)
    names = list(sources)
    found: dict[str, list[Side]] = {name: [] for name in names}
    for pair in range(pairs):
        for name in names if pair % 2 else names[::-1]:
            side = train_once(name, sources[name], settings, 1, wanted)
            found[name].append(side)
            say(f"{name:<22} {side.step_tokens_per_s:>12,.0f} tokens/s  val_bpb {side.val_bpb:.6f}")
    return page(found, base)


def page(found: Mapping[str, Sequence[Side]], base: str = PLAIN) -> str:
    """Markdown: one column a file, and its ratio to `base`; medians over pairs.

    Args:
        found: name -> its trainings; those of one place make a pair.
    """
    first = found[base][0]
    on_gpu = first.device == "cuda"
    what = gpus()[0].name if on_gpu and gpus() else "CPU figures: they prove the way, and say nothing of a GPU"
    count = len(found[base])
    ours = found[OURS][0].kernels
    fast = sorted(k for k, v in ours.items() if not v.startswith("reference"))
    head = " | ".join(found)
    lines = [
        f"{first.tokens:,} tokens each in {first.steps} steps, {count} {'pair' if count == 1 else 'pairs'} ({what}).",
        f"Kernels in {OURS}: {', '.join(fast) or 'none, all are references'}.",
        "",
        f"| | {head} | {' | '.join(f'{name} / {base.split()[0]}' for name in found if name != base)} |",
        "|---|" + "---:|" * (2 * len(found) - 1),
    ]

    def row(what: str, of: Callable[[Side], float | None], form: str, ratio: str = ".3f") -> None:
        values = {name: [of(side) for side in sides] for name, sides in found.items()}
        if any(v is None for vs in values.values() for v in vs):
            return
        cells = [format(statistics.median(vs), form) for vs in values.values()]  # type: ignore[type-var]
        for name, vs in values.items():
            if name != base:
                each = [a / b for a, b in zip(vs, values[base], strict=True) if b] if ratio else []  # type: ignore[operator]
                cells.append(format(statistics.median(each), ratio) if each else "")
        lines.append(f"| {what} | {' | '.join(cells)} |")

    row("tokens/s, median step", lambda s: s.step_tokens_per_s, ",.0f")
    row("tokens/s, whole training", lambda s: s.tokens_per_s, ",.0f")
    if not on_gpu:
        row("processor seconds of the training", lambda s: s.cpu_s, ".1f")
    row("MFU of the training, %", lambda s: s.mfu_percent, ".2f")
    row("peak memory, MB", lambda s: s.peak_mb, ",.0f")
    row("val_bpb at equal tokens", lambda s: s.val_bpb, ".6f", ".6f")
    for phase in PHASES:
        row(f"{phase}, s", lambda s: s.ledger[phase], ".2f", "")  # noqa: B023 - called at once
    return "\n".join(lines) + "\n"


def small(settings: Settings) -> tuple[Settings, Callable[[bytes], bytes]]:
    """A size at which kernels train through Triton's interpreter in minutes: (settings, what makes a source small).

    Rows of 32 tokens, two blocks of width 32, 256 tokens a step; the texts of the laptop preset's data.
    """
    preset = dataclasses.replace(settings.preset, seq_len=32, eval_rows=48, holdout_rows=16, eval_batch_rows=16)
    table = (
        b"LAPTOP = dict(\n    DEPTH=2, ASPECT_RATIO=16, HEAD_DIM=16, WINDOW_PATTERN='SL', TOTAL_BATCH_SIZE=256, "
        b"DEVICE_BATCH_SIZE=8,\n    MUON_RAMP=10,\n)\n"
    )

    def shrink(source: bytes) -> bytes:
        start = source.index(b"LAPTOP = dict(")
        end = source.index(b"\n)\n", start) + 3
        return source[:start] + table + source[end:]

    return dataclasses.replace(settings, preset=preset), shrink
