"""One experiment, whole: seal -> train -> evaluate -> audit -> seal -> outcome.

outcome = run_experiment(job, settings)
record(chain, outcome)
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hotloop.harness.data.dataset import Dataset
from hotloop.harness.errors import DataError, DiskFullError, HotloopError, SealError, TrialError
from hotloop.harness.gpu.between_runs import fresh
from hotloop.harness.machine import check_device, environment, mfu_percent
from hotloop.harness.preflight.lint import problem
from hotloop.harness.profile import Profile
from hotloop.harness.records.record import OPEN_TEXT, Chain, Outcome, version
from hotloop.harness.records.seal import verify_seal
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.sandbox.process import tail
from hotloop.harness.sandbox.visible import exposed, exposed_text, readable_text
from hotloop.harness.scoring.bound import Cost
from hotloop.harness.scoring.evaluation import Evaluator, Scoring
from hotloop.harness.scoring.weights import check_weights
from hotloop.harness.settings import BudgetRule, Preset, Spec
from hotloop.harness.text import one_line, shorten
from hotloop.harness.training.budget import Budget
from hotloop.harness.training.compile_cache import PACK, Store
from hotloop.harness.training.conditions import Watch, is_machines_fault, warnings
from hotloop.harness.training.prewarm import Prewarmer
from hotloop.harness.training.session import Event, Session, SessionConfig, Trained
from hotloop.harness.training.trainer import Setup

__all__ = [
    "LOSSES",
    "Event",
    "Job",
    "Settings",
    "data_warnings",
    "forget_weights",
    "losses",
    "record",
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
        baseline_cost: what the evaluation of the baseline computed, which bounds this one; None for a first run.
        keep_below: the bpb above which it cannot be kept, so that less of it is audited; None to audit it fully.
        folder: receives train.py, log.txt, evaluate.txt (the end of each) and weights.safetensors.
    """

    source: bytes
    number: int
    tag: str
    kind: str
    commit: str
    parent: str
    description: str
    seed: int
    folder: Path
    incumbent_tokens: int | None = None
    baseline_cpu_s: float | None = None
    pace: float = 1.0
    late: float = 1.0
    cold: bool = True
    budget: BudgetRule | None = None
    replay: dict[str, Any] | None = None
    stop: Callable[[list[list[float]], int], str | None] | None = None
    reference: Path | None = None
    baseline_cost: Cost | None = None
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

    preset = settings.preset
    outcome = Outcome(
        **{k: getattr(job, k) for k in ("number", "tag", "kind", "commit", "parent", "description", "seed")},
        preset=preset.name,
        device=settings.device,
        source_sha256=hashlib.sha256(job.source).hexdigest(),
        environment=_environment(settings) | {"batch_divisor": preset.batch_divisor, "repeatable": settings.repeatable},
        data=settings.dataset.facts(),
        seals={"code": seal, "data": data},
        sandbox=settings.sandbox.as_dict(),
    )
    began = time.monotonic()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "evaluate.txt", "weights.safetensors", PACK, LOSSES):
            (job.folder / name).unlink(missing_ok=True)
        (job.folder / "train.py").write_bytes(job.source)
        if settings.profile:
            settings.profile.keep(job.folder)
        with Watch(settings.device, settings.sandbox.gpu, emit) as watch:
            try:
                _try_twice(job, settings, outcome, watch, clock)
            finally:
                outcome.conditions |= watch.facts()
    except TrialError as e:
        outcome.status, outcome.reason = e.status, one_line(e.reason)
        outcome.log_tail = tail(job.folder / "log.txt")  # never evaluate.txt: it can hold val text
    except OSError as e:
        if e.errno == 28:
            raise DiskFullError(f"the disk of {job.folder} is full; free some space and start again") from None
        raise HotloopError(f"{e.filename or job.folder}: {e.strerror or e}") from None
    if (_verify_code(settings), _verify_data(settings)) != (seal, data):
        raise SealError("the seal was rewritten while an experiment ran; its result is void, run it again")
    outcome.total_s = time.monotonic() - began
    shorten(job.folder / "log.txt", LOG_BYTES)
    told = [
        *data_warnings(settings, outcome.data.get("epochs", 0.0)),
        *warnings(outcome.conditions, outcome.training_s),
    ]
    if told:
        outcome.conditions["warnings"] = told
    emit(Event("done", 1.0, message=outcome.status))
    return outcome


def _try_twice(
    job: Job, settings: Settings, outcome: Outcome, emit: Callable[[Event], None], clock: Callable[[], float]
) -> None:
    """Run it; and once more where it ended as on broken hardware, and the device works again.

    Raises:
        TrialError: as `_try`.
        DeviceError: the GPU does not work, or somebody else is on it, so that the failure says nothing of train.py.
    """
    try:
        return _try(job, settings, outcome, emit, clock)
    except TrialError as e:
        if settings.device != "cuda" or e.status not in ("crash", "oom", "timeout"):
            raise
        fresh(settings.device, gpu=settings.sandbox.gpu)
        if e.status != "crash" or not is_machines_fault(e.reason):
            raise
        outcome.ledger, outcome.conditions = {}, {"tried_again": e.reason}
    _try(job, settings, outcome, emit, clock)


def _try(
    job: Job, settings: Settings, outcome: Outcome, emit: Callable[[Event], None], clock: Callable[[], float]
) -> None:
    preset, dataset = settings.preset, settings.dataset
    if reason := problem(job.source):
        raise TrialError("invalid", reason)
    rule = job.budget or preset.budget
    budget = Budget.replay(job.replay) if job.replay else Budget(rule, job.incumbent_tokens, job.pace, job.late)
    epoch_tokens, before = outcome.data["epoch_tokens"], ""

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
    outcome.compiled = {"given": given.as_dict() if given else None, "left": None, "note": note} if store else {}

    def session(budget: Budget) -> Session:
        config = SessionConfig(
            source=job.source,
            spec=_spec(settings, job.seed),
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
        job.source, job.seed, settings, job.folder, on_event=emit, reference=losses(job.reference),
        baseline=job.baseline_cost, keep_below=job.keep_below,
    )  # fmt: skip
    with Evaluator(scoring) as evaluator:  # its processes make their imports beside the trainer's
        run = session(budget)
        began = clock()
        try:
            if not _promise_kept(run, job):
                taken_s, promised_s = run.result.training_s, budget.expected_s
                budget = Budget(rule, sustained=budget.used / taken_s)
                run = session(budget)
                outcome.conditions["corrected"] = {"training_s": taken_s, "promised_s": promised_s}
                outcome.ledger["calibrate"] = clock() - began  # which is what the first try has become
                run.run()
        finally:
            trained = run.result
            _note_training(outcome, settings, budget, trained)
        outcome.weights_sha256 = hashlib.sha256(trained.weights).hexdigest()
        outcome.num_params = check_weights(trained.weights, preset.limits.spare_bytes)
        (job.folder / "weights.safetensors").write_bytes(trained.weights)
        if store and trained.compiled:
            left, too_large = store.leave(trained.compiled, setup, given, job.folder)
            outcome.compiled |= {"left": left.as_dict() if left else None, "note": note or too_large}
            trained.compiled = None
        found = evaluator.run(trained.weights, token_seconds(outcome))
    assert found.nll is not None
    np.save(job.folder / LOSSES, found.nll.astype(np.float16))
    outcome.ledger |= found.ledger
    outcome.val_bpb, outcome.holdout_bpb = found.val_bpb, found.holdout_bpb
    outcome.val_bpb_reference = found.val_bpb_reference
    outcome.audit = found.audit
    outcome.conditions |= found.cost
    outcome.status = "ok"


def _note_training(outcome: Outcome, settings: Settings, budget: Budget, trained: Trained) -> None:
    """Put into the record what a training came to, also one that failed."""
    outcome.budget = budget.as_dict()
    first_s = outcome.ledger.get("calibrate", 0.0)
    outcome.ledger |= trained.ledger
    if first_s:
        outcome.ledger["calibrate"] = first_s + trained.ledger.get("calibrate", 0.0)
    outcome.start = trained.start
    outcome.tokens, outcome.steps, outcome.training_s = trained.tokens, trained.steps, trained.training_s
    outcome.training_cpu_s = trained.training_cpu_s
    outcome.tokens_per_s = trained.tokens / trained.training_s if trained.training_s else 0.0
    outcome.peak_mb, outcome.depth, outcome.curve = trained.peak_mb, trained.depth, trained.curve
    outcome.conditions["feed_late_s"] = trained.feed_late_s
    outcome.data["epochs"] = trained.tokens / outcome.data["epoch_tokens"]
    if trained.device_s is not None:
        outcome.conditions |= {"device_s": trained.device_s, "device_wall_s": trained.device_wall_s}
    outcome.mfu_percent = mfu_percent(
        settings.device, trained.flops_per_token, outcome.tokens_per_s, settings.sandbox.gpu
    )
    outcome.environment["kernels"] = trained.implementations


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
        if session.result.training_s <= session.config.preset.limits.overtime * session.budget.expected_s:
            raise  # by its processor time
        return False
    if not first or job.kind != "baseline":
        return True
    return session.budget.expected_s / session.config.preset.limits.overtime <= session.result.training_s


def scoring_of(source: bytes, seed: int, settings: Settings, folder: Path, **more: Any) -> Scoring:
    """How a train.py is scored, on a folder that is there; `more` are further fields of `Scoring`."""
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
        **more,
    )


def losses(path: Path | None) -> npt.NDArray[np.floating] | None:
    """The LOSSES of a train.py; None where there are none."""
    return np.load(path, allow_pickle=False) if path is not None and path.exists() else None


def token_seconds(outcome: Outcome) -> float | None:
    """What training on a token cost, of the processor on a CPU; None for one that has no token."""
    used_s = outcome.training_cpu_s if outcome.device == "cpu" else outcome.training_s
    return used_s / outcome.tokens if outcome.tokens else None


def _spec(settings: Settings, seed: int) -> Spec:
    preset, dataset = settings.preset, settings.dataset
    return Spec(preset.name, settings.device, seed, dataset.vocab_size, dataset.seq_len, preset.batch_divisor)


def _environment(settings: Settings) -> dict[str, Any]:
    facts = environment(settings.device, settings.threads, settings.sandbox.gpu)
    facts["versions"] = facts["versions"] | {"hotloop": version()}  # whose record it is
    return facts | ({"profile": settings.profile.as_record()} if settings.profile else {})


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
    if facts["share_in_rows"] < 0.5:
        told.append(f"only {100 * facts['share_in_rows']:.1f} % of the text is in rows ({facts['packing']} packing)")
    if epochs > 1:
        told.append(_repeated("went", epochs, facts["epoch_tokens"]))
    return told


def _repeated(verb: str, epochs: float, epoch_tokens: int) -> str:
    return f"the training {verb} {epochs:.2f} times through the {epoch_tokens:,} tokens of its rows"


def record(chain: Chain, outcome: Outcome) -> dict[str, Any]:
    """Append the outcome to a chain of records; returns the entry."""
    return chain.append("experiment", outcome.as_dict())


def replayed(outcome: Outcome, job: Job) -> Job:
    """The job that repeats a recorded experiment with its own budget and seed."""
    return dataclasses.replace(job, kind="replay", seed=outcome.seed, replay=outcome.budget)


def summary(outcome: Outcome) -> str:
    """The block that karpathy/autoresearch prints, in its order; its tools read it unchanged."""
    rows: list[tuple[str, str]] = []
    if outcome.status == "ok":
        rows.append(("val_bpb", f"{outcome.val_bpb:.6f}"))
    else:
        rows += [("status", outcome.status), ("reason", outcome.reason)]
    mfu = "n/a" if outcome.mfu_percent is None else f"{outcome.mfu_percent:.2f}"
    rows += [
        ("training_seconds", f"{outcome.training_s:.1f}"),
        ("total_seconds", f"{outcome.total_s:.1f}"),
        ("peak_vram_mb", f"{outcome.peak_mb:.1f}"),
        ("mfu_percent", mfu),
        ("total_tokens_M", f"{outcome.tokens / 1e6:.1f}"),
        ("num_steps", str(outcome.steps)),
        ("num_params_M", f"{outcome.num_params / 1e6:.1f}"),
        ("depth", "n/a" if outcome.depth is None else str(outcome.depth)),
    ]
    rows += [("fusions", one_line(outcome.fusions))] if outcome.fusions else []
    rows += [("warning", words) for words in outcome.conditions.get("warnings", [])]
    return "\n".join(["---", *(f"{k + ':':<18}{v}" for k, v in rows)])


def forget_weights(folder: Path) -> None:
    """Remove the weights and losses of a discarded experiment; its record and log stay."""
    for name in ("weights.safetensors", LOSSES):
        (folder / name).unlink(missing_ok=True)
