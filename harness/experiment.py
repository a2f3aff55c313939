"""One experiment, whole: seal -> train -> evaluate -> audit -> seal -> outcome.

outcome = run_experiment(job, settings)
chain.append(outcome)
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hotloop.harness.data.dataset import Dataset
from hotloop.harness.errors import DataError, DiskFullError, HotloopError, SealError, TrialError
from hotloop.harness.gpu.between_runs import fresh
from hotloop.harness.machine import check_device, environment, mfu_percent
from hotloop.harness.preflight.lint import problem
from hotloop.harness.profile import Profile
from hotloop.harness.records.model import (
    OPEN_TEXT,
    Audit,
    Compiled,
    Corrected,
    Curve,
    Environment,
    EvaluatorTime,
    FixedBudget,
    Kind,
    Ledger,
    Outcome,
    SandboxFacts,
    Scores,
    Seals,
    Status,
    Training,
    Trial,
    hotloop_version,
)
from hotloop.harness.records.seal import verify_seal
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.process import tail
from hotloop.harness.sandbox.visible import exposed, exposed_text, readable_text
from hotloop.harness.scoring.evaluation import Evaluator, Scoring
from hotloop.harness.scoring.weights import check_weights
from hotloop.harness.settings import BudgetRule, Preset, Spec
from hotloop.harness.text import one_line, shorten
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.compile_cache import PACK, Store
from hotloop.harness.training.conditions import Watch, is_machines_fault, warnings
from hotloop.harness.training.prewarm import Prewarmer
from hotloop.harness.training.session import Event, Session, SessionConfig
from hotloop.harness.training.trainer import Setup

__all__ = [
    "LOSSES",
    "Event",
    "Job",
    "Settings",
    "data_warnings",
    "forget_weights",
    "losses",
    "replayed",
    "run_experiment",
    "scoring_of",
    "summary",
    "token_seconds",
]

LOG_BYTES = 1 << 20  # of a run's log, kept once it has ended
LOSSES = "losses.npy"  # what a kept train.py lost on each token of val and holdout, float16 [N, T], nats


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        run: what it is, for the record.
        source: the bytes of train.py, read once.
        incumbent_tokens: the incumbent's budget, which a budget in seconds snaps to; None for a first run.
        baseline_cpu_s: processor seconds of the baseline, which bound a budget in operations; None for a first run.
        pace, late: what the baseline showed of this device's calibrations; see `budget.held_against`.
        cold: the device stood idle before it.
        budget: None for the preset's rule.
        replay: the `budget` of a record, to be used as it stands; None otherwise.
        stop: told the curve so far ([progress, loss] pairs) and the budget's tokens after each logged loss; the reason
            to stop the run as `raced`, or None.
        reference: file of what the incumbent lost on each token, which the audit looks by; None for none.
        baseline_time: what the evaluation of the baseline computed, which bounds this one; None for a first run.
        keep_below: the bpb above which it cannot be kept, so that less of it is audited; None to audit it fully.
        folder: receives train.py, log.txt, evaluate.txt (the end of each) and weights.safetensors.
    """

    run: Trial
    source: bytes
    tag: str
    folder: Path
    incumbent_tokens: int | None = None
    baseline_cpu_s: float | None = None
    pace: float = 1.0
    late: float = 1.0
    cold: bool = True
    budget: BudgetRule | None = None
    replay: FixedBudget | None = None
    stop: Callable[[Curve, int], str | None] | None = None
    reference: Path | None = None
    baseline_time: EvaluatorTime | None = None
    keep_below: float | None = None


@dataclass(frozen=True)
class Settings:
    """What is the same for every experiment of a night.

    Attributes:
        prewarmer: makes the next trainer ready meanwhile; None for cold starts.
        store: of what compilers made; None to compile all of it each time.
        repeatable: whether a training must repeat to the bit; evaluators do in any case.
        profile: what this machine chose to run, which is in the environment; None for references.
    """

    preset: Preset
    device: str
    dataset: Dataset
    threads: int
    sandbox: Sandbox = field(default_factory=best)
    prewarmer: Prewarmer | None = field(default=None, compare=False)
    store: Store | None = None
    repeatable: bool = True
    profile: Profile | None = None

    @property
    def setup(self) -> Setup:
        return Setup(self.sandbox, self.device, self.preset.limits, self.threads, self.repeatable)


def run_experiment(
    job: Job,
    settings: Settings,
    on_event: Callable[[Event], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run one experiment. Whatever train.py does becomes the outcome's status.

    Raises:
        HotloopError: the machine's or the user's fault: no device, no data, a broken seal, a full disk.
    """
    check_device(settings.device, settings.sandbox.gpu)
    seal, data = _verify_code(settings), _verify_data(settings)

    def emit(event: Event) -> None:
        if settings.prewarmer:
            settings.prewarmer.saw(event.phase)
        if on_event:
            on_event(event)

    began = time.monotonic()
    found = _Found()
    status, reason, log_tail = Status.OK, "", list[str]()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "evaluate.txt", "weights.safetensors", PACK, LOSSES):
            (job.folder / name).unlink(missing_ok=True)
        (job.folder / "train.py").write_bytes(job.source)
        if settings.profile:
            settings.profile.keep(job.folder)
        with Watch(settings.device, settings.sandbox.gpu, emit) as watch:
            try:
                _try_twice(job, settings, found, watch, clock)
            finally:
                seen = watch.facts()
    except TrialError as e:
        status, reason = Status(e.status), one_line(e.reason)
        log_tail = tail(job.folder / "log.txt")  # never evaluate.txt: it can hold val text
    except OSError as e:
        if e.errno == 28:
            raise DiskFullError(f"the disk of {job.folder} is full; free some space and start again") from None
        raise HotloopError(f"{e.filename or job.folder}: {e.strerror or e}") from None
    if (_verify_code(settings), _verify_data(settings)) != (seal, data):
        raise SealError("the seal was rewritten while an experiment ran; its result is void, run it again")
    total_s = time.monotonic() - began
    shorten(job.folder / "log.txt", LOG_BYTES)
    training, facts = found.training, settings.dataset.facts()
    conditions = msgspec.structs.replace(
        seen, corrected=found.corrected, tried_again=found.tried_again, evaluate=found.evaluate_time,
        audit=found.audit_time,
    )  # fmt: skip
    told = [*data_warnings(settings, training.tokens / facts.epoch_tokens), *warnings(conditions, training)]
    outcome = Outcome(
        run=job.run,
        tag=job.tag,
        preset=settings.preset.name,
        device=settings.device,
        source_sha256=hashlib.sha256(job.source).hexdigest(),
        status=status,
        reason=reason,
        log_tail=log_tail,
        scores=found.scores,
        audit=found.audit,
        budget=found.budget,
        training=training,
        ledger=found.ledger,
        total_s=total_s,
        mfu_percent=mfu_percent(settings.device, training.flops_per_token, training.tokens_per_s, settings.sandbox.gpu),
        num_params=found.num_params,
        weights_sha256=found.weights_sha256,
        compiled=found.compiled,
        conditions=msgspec.structs.replace(conditions, warnings=told),
        environment=_environment(settings),
        data=facts,
        seals=Seals(seal, data),
        sandbox=msgspec.convert(settings.sandbox.as_dict(), SandboxFacts),
    )
    emit(Event("done", 1.0, message=outcome.status))
    return outcome


@dataclass
class _Found:
    """What is known of an experiment so far: also where it fails, that is recorded."""

    budget: FixedBudget = field(default_factory=FixedBudget)
    training: Training = field(default_factory=Training)
    ledger: Ledger = field(default_factory=Ledger)
    compiled: Compiled | None = None
    corrected: Corrected | None = None
    tried_again: str = ""
    num_params: int = 0
    weights_sha256: str = ""
    scores: Scores | None = None
    audit: Audit | None = None
    evaluate_time: EvaluatorTime | None = None
    audit_time: EvaluatorTime | None = None


def _try_twice(
    job: Job, settings: Settings, found: _Found, emit: Callable[[Event], None], clock: Callable[[], float]
) -> None:
    """Run it; and once more where it ended as on broken hardware, and the device works again.

    Raises:
        TrialError: as `_try`.
        DeviceError: the GPU does not work, or somebody else is on it, so that the failure says nothing of train.py.
    """
    try:
        return _try(job, settings, found, emit, clock)
    except TrialError as e:
        if settings.device != "cuda" or e.status not in ("crash", "oom", "timeout"):
            raise
        fresh(settings.device, gpu=settings.sandbox.gpu)
        if e.status != "crash" or not is_machines_fault(e.reason):
            raise
        found.ledger, found.tried_again = Ledger(), e.reason
    _try(job, settings, found, emit, clock)


def _try(
    job: Job, settings: Settings, found: _Found, emit: Callable[[Event], None], clock: Callable[[], float]
) -> None:
    preset, dataset = settings.preset, settings.dataset
    if reason := problem(job.source):
        raise TrialError("invalid", reason)
    rule = job.budget or preset.budget
    budget = Budget.replay(job.replay) if job.replay else Budget(rule, job.incumbent_tokens, job.pace, job.late)
    epoch_tokens, before = dataset.facts().epoch_tokens, ""

    def shown(event: Event) -> None:
        """Says before anything is trained, when the budget is known, that it is more than the rows."""
        nonlocal before
        if event.phase == "train" != before and budget.tokens > epoch_tokens:
            emit(Event("train", message=_repeated("will go", budget.tokens / epoch_tokens, epoch_tokens)))
        before = event.phase
        emit(event)
        if event.phase == "calibrate":
            evaluator.wait()  # from here on time counts, and nothing works beside it

    train = dataset.rows("train")
    store, setup = settings.store, settings.setup
    given, note = store.load(setup) if store else (None, "")
    found.compiled = Compiled(given.recorded() if given else None, note=note) if store else None

    def session(budget: Budget) -> Session:
        config = SessionConfig(
            source=job.source,
            spec=_spec(settings, job.run.seed),
            preset=preset,
            rows=train,
            budget=budget,
            folder=job.folder,
            threads=settings.threads,
            sandbox=settings.sandbox,
            repeatable=settings.repeatable,
            on_event=shown,
            clock=clock,
            stop=job.stop,
            baseline_cpu_s=job.baseline_cpu_s,
            prewarmer=settings.prewarmer,
            compiled=given,
            ask_compiled=store is not None,
            warm_s=preset.warm_s if job.cold and settings.device == "cuda" else 0.0,
        )
        return Session(config)

    scoring = scoring_of(
        job.source, job.run.seed, settings, job.folder, on_event=emit, reference=losses(job.reference),
        baseline=job.baseline_time, keep_below=job.keep_below,
    )  # fmt: skip
    with Evaluator(scoring) as evaluator:  # its processes make their imports beside the trainer's
        run = session(budget)
        began = clock()
        try:
            if not _promise_kept(run, job):
                found.corrected = Corrected(run.training.wall_s, budget.expected_s)
                budget = Budget(rule, sustained=budget.used / run.training.wall_s)
                run = session(budget)
                found.ledger.calibrate = clock() - began  # which is what the first try has become
                run.run()
        finally:
            found.budget, found.training = budget.recorded(), run.training
            found.ledger += run.ledger
        found.weights_sha256 = hashlib.sha256(run.weights).hexdigest()
        found.num_params = check_weights(run.weights, preset.limits.spare_bytes)
        (job.folder / "weights.safetensors").write_bytes(run.weights)
        if store and run.compiled:
            left, too_large = store.leave(run.compiled, setup, given, job.folder)
            found.compiled = Compiled(
                given.recorded() if given else None, left.recorded() if left else None, note or too_large
            )
            run.compiled = None
        evaluation = evaluator.run(run.weights, token_seconds(run.training, settings.device))
    np.save(job.folder / LOSSES, evaluation.nll.astype(np.float16))
    found.ledger += evaluation.ledger
    found.scores, found.audit = evaluation.scores, evaluation.audit
    found.evaluate_time, found.audit_time = evaluation.evaluate_time, evaluation.audit_time


def _promise_kept(session: Session, job: Job) -> bool:
    """Train; False where a run that is held against no other took longer than its calibration promised.

    That is the card's doing, not train.py's: it was cold, or its clock fell. A night's baseline, against which all the
    rest is held, may not be shorter either. Raises TrialError, as `Session.run`.
    """
    first = job.incumbent_tokens is None and job.replay is None and session.budget.rule.kind == "seconds"
    try:
        session.run()
    except TrialError as e:
        if not (first and e.status == "overtime" and session.budget.used):
            raise
        if session.training.wall_s <= session.config.preset.limits.overtime * session.budget.expected_s:
            raise  # by its processor time
        return False
    if not first or job.run.kind != Kind.BASELINE:
        return True
    return session.budget.expected_s / session.config.preset.limits.overtime <= session.training.wall_s


def scoring_of(
    source: bytes,
    seed: int,
    settings: Settings,
    folder: Path,
    on_event: Callable[[Event], None] = lambda _: None,
    reference: npt.NDArray[np.floating] | None = None,
    baseline: EvaluatorTime | None = None,
    keep_below: float | None = None,
) -> Scoring:
    """How a train.py is scored, on a folder that is there."""
    preset, dataset = settings.preset, settings.dataset
    return Scoring(
        source=source,
        spec=_spec(settings, seed),
        preset=preset,
        val=dataset.rows("val")[: preset.eval_rows],
        holdout=dataset.rows("holdout")[: preset.holdout_rows],
        train=dataset.rows("train"),
        token_bytes=dataset.token_bytes,
        reference_bytes=dataset.reference_bytes,
        folder=folder,
        threads=settings.threads,
        sandbox=settings.sandbox,
        on_event=on_event,
        reference=reference,
        baseline=baseline,
        keep_below=keep_below,
    )


def losses(path: Path | None) -> npt.NDArray[np.floating] | None:
    """The LOSSES of a train.py; None where there are none."""
    return np.load(path, allow_pickle=False) if path is not None and path.exists() else None


def token_seconds(training: Training, device: str) -> float | None:
    """What training on a token cost, of the processor on a CPU; None for one that has no token."""
    used_s = training.cpu_s if device == "cpu" else training.wall_s
    return used_s / training.tokens if training.tokens else None


def _spec(settings: Settings, seed: int) -> Spec:
    preset, dataset = settings.preset, settings.dataset
    return Spec(preset.name, settings.device, seed, dataset.vocab_size, dataset.seq_len, preset.batch_divisor)


def _environment(settings: Settings) -> Environment:
    facts = environment(settings.device, settings.threads, settings.sandbox.gpu)
    facts["versions"] = facts["versions"] | {"hotloop": hotloop_version()}  # whose record it is
    profile = settings.profile.as_record() if settings.profile else None
    more = {
        "batch_divisor": settings.preset.batch_divisor, "repeatable": settings.repeatable, "profile": profile
    }  # fmt: skip
    return msgspec.convert(facts | more, Environment)


def _verify_code(settings: Settings) -> str:
    """Of the project, and of packages that the profile has run. Raises SealError."""
    if settings.profile:
        settings.profile.verify()
    return verify_seal()


def _verify_data(settings: Settings) -> str:
    dataset, preset = settings.dataset, settings.preset
    if dataset.seq_len != preset.seq_len:
        raise DataError(
            f"{dataset.path} has rows of {dataset.seq_len} tokens and the preset {preset.name} needs {preset.seq_len}; "
            f"run: hotloop prepare --preset {preset.name}"
        )
    if settings.sandbox.level > 0 and exposed(dataset.path):
        raise DataError(
            f"{dataset.path} lies in a folder that train.py must be able to read (the system's or Python's); move it "
            f"elsewhere and say --data"
        )
    if settings.sandbox.level > 0 and (file := exposed_text(dataset)):
        raise DataError(
            f"{file}, a part of the text, lies in a folder that train.py must be able to read ; move the text "
            f"elsewhere and prepare it there"
        )
    dataset.verify()
    return dataset.digest


def data_warnings(settings: Settings, epochs: float = 0.0) -> list[str]:
    """What has to be known of the data before any score is believed, one line each.

    Args:
        epochs: how often a training went through its rows; 0 before one did.
    """
    facts, told = settings.dataset.facts(), []
    if why := readable_text(settings.dataset.source, settings.sandbox):
        told.append(f"{OPEN_TEXT}: {why}")
    if facts.share_in_rows < 0.5:
        told.append(f"only {100 * facts.share_in_rows:.1f} % of the text is in rows ({facts.packing} packing)")
    if epochs > 1:
        told.append(_repeated("went", epochs, facts.epoch_tokens))
    return told


def _repeated(verb: str, epochs: float, epoch_tokens: int) -> str:
    return f"the training {verb} {epochs:.2f} times through the {epoch_tokens:,} tokens of its rows"


def replayed(outcome: Outcome, job: Job) -> Job:
    """The job that repeats a recorded experiment with its own budget and seed."""
    run = msgspec.structs.replace(job.run, kind=Kind.REPLAY, seed=outcome.run.seed)
    return dataclasses.replace(job, run=run, replay=outcome.budget)


def summary(outcome: Outcome) -> str:
    """The block that karpathy/autoresearch prints, in its order; its tools read it unchanged."""
    rows: list[tuple[str, str]] = []
    if outcome.status == Status.OK:
        rows.append(("val_bpb", f"{outcome.val_bpb:.6f}"))
    else:
        rows += [("status", outcome.status), ("reason", outcome.reason)]
    training = outcome.training
    rows += [
        ("training_seconds", f"{training.wall_s:.1f}"),
        ("total_seconds", f"{outcome.total_s:.1f}"),
        ("peak_vram_mb", f"{training.peak_mb:.1f}"),
        ("mfu_percent", "n/a" if outcome.mfu_percent is None else f"{outcome.mfu_percent:.2f}"),
        ("total_tokens_M", f"{training.tokens / 1e6:.1f}"),
        ("num_steps", str(training.steps)),
        ("num_params_M", f"{outcome.num_params / 1e6:.1f}"),
        ("depth", "n/a" if training.depth is None else str(training.depth)),
    ]
    rows += [("fusions", one_line(outcome.fusions))] if outcome.fusions else []
    rows += [("warning", words) for words in outcome.conditions.warnings]
    return "\n".join(["---", *(f"{k + ':':<18}{v}" for k, v in rows)])


def forget_weights(folder: Path) -> None:
    """Remove the weights and losses of a discarded experiment; its record and log stay."""
    for name in ("weights.safetensors", LOSSES):
        (folder / name).unlink(missing_ok=True)
