"""What an experiment is run with: spec, preset, budget and limits, as plain values.

Nothing here needs torch, so the command line starts fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hotloop.harness.errors import UsageError

__all__ = [
    "PRESETS",
    "BudgetKind",
    "BudgetRule",
    "Limits",
    "Preset",
    "Spec",
    "auto_preset",
    "batch_divisor",
    "preset_named",
]

BudgetKind = Literal["seconds", "flops", "tokens"]


@dataclass(frozen=True)
class Spec:
    """What train.py is told; the only argument of `build_model`.

    Attributes:
        preset: `h100` or `laptop`: which values of its hyperparameters train.py uses.
        device: `cuda` or `cpu`.
        seed: seeds torch, numpy and random before `train` is called.
        vocab_size: tokens in the vocabulary, V.
        seq_len: tokens a row, T (a row of data holds T + 1).
        batch_divisor: 1; 2, 4 or 8 on a GPU with less memory than the preset was made for. train.py takes that many
            times fewer rows a pass, and as many tokens a step, so that it stays the same experiment.
    """

    preset: str
    device: str
    seed: int
    vocab_size: int
    seq_len: int
    batch_divisor: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BudgetRule:
    """How long an experiment may train.

    `seconds`: that much training at the throughput measured in the calibration.
    `flops`: that many operations, counted in one step; the same on any machine.
    `tokens`: exactly that many (a replay, or a fixed comparison).
    """

    kind: BudgetKind
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind}"


@dataclass(frozen=True)
class Limits:
    """Seconds and ratios after which an experiment is stopped. All times are the parent's.

    Attributes:
        load_s: from process start until torch and CUDA are ready: trusted code, gigabytes from a cold disk perhaps.
        start_s: for the import of train.py.
        warmup_s: for all warm-up and calibration, compilation included.
        stall_s: without a sign of life while training.
        send_s: that a message to a child may wait for it to read.
        submit_s: from the last batch to the last byte of the weights.
        evaluate_s: for each of the two evaluators.
        evaluate_first_s: for the import of train.py, its model and its first batch in an evaluator; processor seconds
            on a CPU, where nothing is compiled there.
        evaluate_step: what scoring a token may cost after that, over what training on one cost; likewise.
        evaluate_baseline: what either may cost over what it cost the night's baseline; likewise.
        spare_bytes: of submitted weights that are no parameters of the model, or whole numbers.
        overtime: training time over budgeted time above which a run is `overtime`.
        overtime_cpu: the same for processor time on a CPU, where wall time depends on who else is there.
        baseline_cpu: processor time of the training over the baseline's, above which a run with a budget in
            operations is `overtime`: the operations are the trainer's word, this bounds what a lie can win.
        submission_bytes: the largest submission that is read.
        compiled_bytes: the largest compile cache that is passed on.
        file_bytes: the largest file that a child may write, its log included.
        scratch_bytes: all that a child may write to its private folders.
        processes: that a child may have, threads included.
        memory_bytes: what all processes of a child may hold, and one may allocate on a CPU; None for most of the
            machine's.
    """

    load_s: float = 900.0
    start_s: float = 120.0
    warmup_s: float = 600.0
    stall_s: float = 120.0
    send_s: float = 30.0
    submit_s: float = 120.0
    evaluate_s: float = 600.0
    evaluate_first_s: float = 120.0
    evaluate_step: float = 3.0
    evaluate_baseline: float = 5.0
    spare_bytes: int = 16 << 20
    overtime: float = 1.03
    overtime_cpu: float = 1.5
    baseline_cpu: float = 3.0
    submission_bytes: int = 8 << 30
    compiled_bytes: int = 256 << 20
    file_bytes: int = 256 << 20
    scratch_bytes: int = 4 << 30
    processes: int = 4096
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Preset:
    """One size of the whole experiment: data, lengths, budget.

    Attributes:
        source: the default source of `prepare.py`.
        eval_rows / holdout_rows: rows that are scored (all of them when fewer exist).
        audit_cuts: of a run that may be kept; None for as many as val has rows.
        eval_batch_rows: rows a batch in the evaluators, fixed here so that no train.py can choose.
        calibrate_s / calibrate_steps: least duration and least number of steps of the calibration.
        warm_s: of training on made-up rows before the calibration of a device that stood idle: a cold card is faster.
        noise_seeds: further seeds of the baseline that measure the noise floor.
        batch_divisor: see Spec; set from the device's memory, not by the table.
    """

    name: str
    device: str
    source: str
    seq_len: int
    vocab_size: int
    eval_rows: int
    holdout_rows: int
    eval_batch_rows: int
    budget: BudgetRule
    calibrate_s: float
    calibrate_steps: int
    noise_seeds: int
    limits: Limits = field(default_factory=Limits)
    audit_cuts: int | None = None
    batch_divisor: int = 1
    warm_s: float = 0.0

    def with_limits(self, **changes: Any) -> Preset:
        return replace(self, limits=replace(self.limits, **changes))


PRESETS = {
    # The data, lengths and five minutes of karpathy/autoresearch: 40 * 524,288 val tokens.
    "h100": Preset(
        name="h100",
        device="cuda",
        source="climbmix",
        seq_len=2048,
        vocab_size=8192,
        eval_rows=10240,
        holdout_rows=2560,
        eval_batch_rows=32,
        budget=BudgetRule("seconds", 300.0),
        calibrate_s=5.0,
        calibrate_steps=10,
        noise_seeds=2,  # ten minutes of a night, without which luck is kept as a gain
        warm_s=30.0,
    ),
    # The same model at a size that two CPU cores train in about 20 s. Its clock is noise (a shared
    # machine), so the budget is counted in operations and overtime is a generous multiple.
    "laptop": Preset(
        name="laptop",
        device="cpu",
        source="packages",
        seq_len=256,
        vocab_size=2048,
        eval_rows=200,
        holdout_rows=96,
        eval_batch_rows=32,
        budget=BudgetRule("flops", 1.8e12),
        calibrate_s=0.5,
        calibrate_steps=2,
        noise_seeds=2,
        audit_cuts=320,
        limits=Limits(
            overtime=10.0, submission_bytes=2 << 30, evaluate_first_s=2.5, evaluate_step=0.5, spare_bytes=512 << 10
        ),
    ),
}


# The h100 preset on GPUs of 80, 40 or 48, 24 and 16 GB: least GiB that the driver shows, and what the rows of a pass
# are divided by. Estimates, from the 45 GB that the reference takes with 128 rows a pass.
BATCH_DIVISORS = ((70.0, 1), (35.0, 2), (20.0, 4), (14.0, 8))


def batch_divisor(memory_gib: float | None) -> int:
    """By how much the rows of a pass are divided on a GPU with this memory; 1 for a CPU (None)."""
    if memory_gib is None:
        return 1
    return next((divisor for least, divisor in BATCH_DIVISORS if memory_gib >= least), BATCH_DIVISORS[-1][1])


def auto_preset(memory_gib: float | None) -> str:
    """The name of the preset for a GPU with this memory; `laptop` without one (None) and for one that is too small."""
    return "h100" if memory_gib is not None and memory_gib >= BATCH_DIVISORS[-1][0] else "laptop"


def preset_named(name: str) -> Preset:
    """Raises UsageError with the names that exist."""
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(f"no preset is named {name!r}; the presets are {', '.join(sorted(PRESETS))}") from None
