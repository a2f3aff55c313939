"""What a record holds: one type for each kind of entry, and the parts that they are made of.

    NightBegun    the settings that all of a night's scores share
    AgentsAsked   the agents that are asked from here on
    Outcome       what the harness says of one experiment
    Decided       what became of it
    Turn          an agent's turn that gave nothing to run
    LeftOut       what a kept edit is worth at the end

One thing has one shape: `Decided` contains the `Trial`, which contains the `Origin` of its edit; `Outcome` contains the
same `Trial`. All is frozen but what the harness fills in while a training goes on: `Training` and `Ledger`.
"""

from __future__ import annotations

import importlib.metadata
from enum import StrEnum

import msgspec

from hotloop.harness.settings import BudgetKind, BudgetRule

__all__ = [
    "FAILURES",
    "KINDS",
    "OPEN_TEXT",
    "VERSION",
    "AgentsAsked",
    "Audit",
    "Body",
    "ClockMhz",
    "Compiled",
    "Conditions",
    "Corrected",
    "Curve",
    "DataFacts",
    "Decided",
    "Decision",
    "Environment",
    "EvaluatorTime",
    "FixedBudget",
    "GpuFacts",
    "Judgement",
    "Kind",
    "Ledger",
    "LeftOut",
    "NightBegun",
    "Origin",
    "Outcome",
    "PackFacts",
    "SandboxFacts",
    "Scores",
    "Seals",
    "ShapeCost",
    "Start",
    "Status",
    "Training",
    "Trial",
    "Turn",
    "TurnResult",
    "Worth",
    "hotloop_version",
]  # fmt: skip

VERSION = 2  # of the entries that are written; `harness.records.earlier` reads those of version 1
OPEN_TEXT = "not safe against cheating"  # how the warning begins that train.py could read what it is scored on

Curve = list[tuple[float, float]]  # (progress 0..1, loss in nats), as the trainer said


class Kind(StrEnum):
    """What a run is for."""

    BASELINE = "baseline"
    REPEAT = "repeat"  # another seed of a train.py that was run, for the noise floor
    EXPERIMENT = "experiment"
    CONFIRM = "confirm"  # a marginal gain under its second seed
    LEAVE_ONE_OUT = "leave-one-out"
    REPLAY = "replay"
    SINGLE = "single"  # of `hotloop run`


class Status(StrEnum):
    """How a run ended."""

    OK = "ok"
    CRASH = "crash"
    INVALID = "invalid"
    OVERTIME = "overtime"
    TIMEOUT = "timeout"
    OOM = "oom"
    NAN = "nan"
    RACED = "raced"


FAILURES: frozenset[str] = frozenset(Status) - {Status.OK}


class Decision(StrEnum):
    """What became of a run: of one that failed its status."""

    KEEP = "keep"
    DISCARD = "discard"
    MARGINAL = "marginal"  # a second seed will tell
    MEASURED = "measured"  # for the noise floor
    CRASH = "crash"
    INVALID = "invalid"
    OVERTIME = "overtime"
    TIMEOUT = "timeout"
    OOM = "oom"
    NAN = "nan"
    RACED = "raced"

    @property
    def failed(self) -> bool:
        return self.value in FAILURES


class TurnResult(StrEnum):
    """How a turn ended that gave nothing to run: no edit, or one that cannot be run."""

    FAILED = "failed"
    REFUSED = "refused"


class Worth(StrEnum):
    """What a kept gain is worth when its edit is left out at the end; see `agent_loop.commands.ablate`."""

    CONFIRMED = "confirmed"
    MARGINAL = "marginal"
    RETRACTED = "retracted"
    ENTANGLED = "entangled"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of an entry, as it is written."""


class Origin(Record, frozen=True):
    """Where an edit comes from, and what that took.

    Attributes:
        agent: its name; empty for a run that no agent proposed.
        seconds, cost_usd, tokens: of the turn that made it; 0 where another run has them on its account.
        why: the agent's hypothesis.
        again_of: the number of the experiment whose edit it is, on top of another incumbent.
    """

    agent: str = ""
    seconds: float = 0.0
    cost_usd: float = 0.0
    tokens: int = 0
    why: str = ""
    again_of: int | None = None


class Trial(Record, frozen=True):
    """A run of a train.py: all that has to be known to begin it. (`Run` is what train.py is given.)

    Attributes:
        commit: whose train.py is run.
        parent: the incumbent that it was made from; empty for a baseline.
    """

    number: int
    kind: Kind
    commit: str
    parent: str
    description: str
    seed: int
    origin: Origin = Origin()


class Judgement(Record, frozen=True):
    """A decision and its reason in one sentence.

    `again`: the edit was better than what it was made from, and something else was kept while it ran: it is tried once
    more on top of that.
    """

    decision: Decision
    reason: str
    again: bool = False


class Ledger(msgspec.Struct, forbid_unknown_fields=True):
    """The parent's seconds of each phase of a run, in the order of time; 0 for one that it did not reach."""

    start: float = 0.0
    import_: float = msgspec.field(default=0.0, name="import")
    compile: float = 0.0
    calibrate: float = 0.0
    train: float = 0.0
    submit: float = 0.0
    evaluate: float = 0.0
    audit: float = 0.0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*(mine + its for mine, its in zip(self.seconds(), other.seconds(), strict=True)))

    def seconds(self) -> tuple[float, ...]:
        return msgspec.structs.astuple(self)

    def items(self) -> list[tuple[str, float]]:
        """(phase, seconds), of all phases."""
        return list(zip(self.__struct_encode_fields__, self.seconds(), strict=True))


class Start(Record, frozen=True):
    """How a trainer was started: `cold`, or `warm`, made ready ahead of time.

    Attributes:
        because: why not warm, where that was wanted.
        prepared_s: seconds that a warm one took meanwhile.
    """

    how: str = "cold"
    because: str = ""
    prepared_s: float | None = None


class ShapeCost(Record, frozen=True):
    """What one step of a batch shape is charged, and what its calibration measured."""

    rows: int
    seq_len: int
    charge: float  # tokens
    step_s: float = 0.0
    flops: int = 0


class FixedBudget(Record, frozen=True):
    """A run's budget as it was fixed; see `harness.training.budget`. 0 tokens: it was not."""

    kind: BudgetKind = "tokens"
    amount: float = 0.0
    tokens: int = 0
    snapped: bool = False
    timed_steps: list[int] | None = None  # of each warm-up, in their order
    pace: float = 1.0
    late: float = 1.0
    shapes: list[ShapeCost] = []


class Training(msgspec.Struct, forbid_unknown_fields=True):
    """What the parent measured of a training, and what the trainer said. Filled in as it goes on.

    Attributes:
        wall_s, cpu_s: by the parent's clock, and of its processors.
        feed_late_s: that the trainer waited for rows, at most.
        device_s, device_wall_s: from the first batch to the last step by the trainer's device, and by the parent.
        implementations: which of each operator ran.
    """

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    feed_late_s: float = 0.0
    device_s: float | None = None
    device_wall_s: float = 0.0
    peak_mb: float = 0.0
    depth: int | None = None
    flops_per_token: float | None = None
    start: Start = Start()
    implementations: dict[str, str] = {}
    curve: Curve = []

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s if self.wall_s else 0.0


class PackFacts(Record, frozen=True):
    """A pack of what compilers made; `generation`: how many runs it was handed on through."""

    key: str
    generation: int
    files: int
    bytes: int
    sha256: str


class Compiled(Record, frozen=True):
    """Which compile cache a run was given, and which it left; `note`: what was refused."""

    given: PackFacts | None = None
    left: PackFacts | None = None
    note: str = ""


class Scores(Record, frozen=True):
    """Bits per byte. `val_bpb_reference` counts bytes as karpathy/autoresearch does; no agent is told `holdout_bpb`."""

    val_bpb: float
    holdout_bpb: float | None = None
    val_bpb_reference: float | None = None


class Audit(Record, frozen=True):
    """What evaluator B said of A's numbers, in nats; see `harness.scoring.audit`.

    `reference`: it looked where the incumbent was beaten; `full`: not the smaller one of a run that cannot be kept;
    `odd_bpb`: what was scored first, where B did not repeat that as one process does another; then both were run again.
    """

    cuts: int
    tolerance_nats: float
    mismatches: int
    mismatches_allowed: int
    largest_nats: float
    mean_nats: float
    mean_allowed_nats: float
    detectable_share: float
    reference: bool = False
    full: bool = True
    odd_bpb: float | None = None


class ClockMhz(Record, frozen=True):
    """The GPU's clock: medians in the calibration, the training and its last looks, and the training's least."""

    calibrate: float
    train: float
    last: float
    least: float


class EvaluatorTime(Record, frozen=True):
    """Seconds of an evaluator up to its first batch and after it: of the processor on a CPU."""

    first_s: float
    rest_s: float


class Corrected(Record, frozen=True):
    """A first try whose calibration promised other seconds of training than it took."""

    training_s: float
    promised_s: float


class Conditions(Record, frozen=True):
    """Under which a run took place; see `harness.training.conditions`.

    Attributes:
        looks, sm_mhz, reasons, temperature_c, others: what was seen of the GPU, why its clocks were not higher, and who
            else computed on it.
        tried_again: why a first try ended, where there were two.
        warnings: what to tell the user, one line each.
    """

    looks: int = 0
    sm_mhz: ClockMhz | None = None
    reasons: list[str] = []
    temperature_c: float | None = None
    others: list[str] = []
    evaluate: EvaluatorTime | None = None
    audit: EvaluatorTime | None = None
    corrected: Corrected | None = None
    tried_again: str = ""
    warnings: list[str] = []


class GpuFacts(Record, frozen=True):
    """A GPU as nvidia-smi writes it."""

    name: str = ""
    memory: str = ""
    driver: str = ""
    uuid: str = ""


class ProfileFacts(Record, frozen=True):
    """The machine's choice of implementations that was run (`harness.profile`), and the hash of each package in it."""

    sha256: str
    selection: dict[str, str] = {}
    packages: dict[str, str] = {}


class Environment(Record, frozen=True):
    """The machine and the versions. `packages`: of each, the hash of pip's list of its files."""

    python: str = ""
    os: str = ""
    cpu: str = ""
    gpu: GpuFacts | None = None
    threads: int = 1
    versions: dict[str, str] = {}
    packages: dict[str, str] = {}
    batch_divisor: int = 1
    repeatable: bool = True  # whether trainings were asked for results that repeat to the bit
    profile: ProfileFacts | None = None


class DataFacts(Record, frozen=True):
    """The prepared folder: its text, tokens of one pass over its rows, and the share of the train split in them."""

    source: str = ""
    packing: str = ""
    share_in_rows: float = 1.0
    epoch_tokens: int = 0


class Seals(Record, frozen=True):
    """SHA-256 of the sealed code and of the data."""

    code: str = ""
    data: str = ""


class SandboxFacts(Record, frozen=True):
    """The sandbox of train.py; `probes`: what was tried from within, and whether it was stopped."""

    level: int = 0
    how: str = ""
    landlock_abi: int = 0
    probes: dict[str, bool] = {}


class Outcome(Record, frozen=True, kw_only=True):
    """What the harness says of one experiment. There are scores only where it ended as `ok`."""

    run: Trial
    tag: str
    preset: str
    device: str
    source_sha256: str
    status: Status
    reason: str = ""
    log_tail: list[str] = []
    scores: Scores | None = None
    audit: Audit | None = None
    budget: FixedBudget = FixedBudget()
    training: Training = msgspec.field(default_factory=Training)
    ledger: Ledger = msgspec.field(default_factory=Ledger)
    total_s: float = 0.0
    mfu_percent: float | None = None
    num_params: int = 0
    weights_sha256: str = ""
    compiled: Compiled | None = None
    conditions: Conditions = Conditions()
    environment: Environment = Environment()
    data: DataFacts = DataFacts()
    seals: Seals = Seals()
    sandbox: SandboxFacts = SandboxFacts()

    @property
    def val_bpb(self) -> float | None:
        return self.scores.val_bpb if self.scores else None

    @property
    def holdout_bpb(self) -> float | None:
        return self.scores.holdout_bpb if self.scores else None

    @property
    def where(self) -> str:
        """The device's name; a CPU is called one."""
        gpu = self.environment.gpu
        return f"CPU {self.environment.cpu}".strip() if self.device == "cpu" else gpu.name if gpu else "GPU"

    @property
    def fusions(self) -> str:
        """What the kernels' compiler pass found, as the trainer said: "mlp 8 of 8, ..."; empty where nothing was."""
        return self.training.implementations.get("fusions", "")

    @property
    def profile(self) -> str:
        """The hash of the profile that it ran under; empty for none."""
        return self.environment.profile.sha256 if self.environment.profile else ""

    @property
    def open_text(self) -> str:
        """The warning that train.py could read the text that it was scored on; empty where it could not."""
        return next((w for w in self.conditions.warnings if w.startswith(OPEN_TEXT)), "")


class NightBegun(Record, frozen=True, kw_only=True):
    """The settings of a night, without which no two of its scores compare.

    Attributes:
        data: the digest of the prepared folder.
        seed: of all runs but repeats and confirmations.
        sandbox: its level.
        profile: the hash of the machine's, under which all of it runs; empty for none.
    """

    preset: str
    device: str
    threads: int
    data: str
    budget: BudgetRule
    seed: int
    sandbox: int
    repeatable: bool = True
    profile: str = ""


class AgentsAsked(Record, frozen=True):
    """The agents that are asked from here on, in their order."""

    agents: list[str]


class Decided(Record, frozen=True, kw_only=True):
    """What became of a run.

    Attributes:
        gain: over the incumbent that it was compared with, in bits per byte.
        noise_bpb: the noise floor of the decision.
        syntax: the hash of its train.py's syntax; empty where git has the commit no more.
        slot, idle_s: on which device (0 is the first), and for how long that one had waited before it.
    """

    run: Trial
    judgement: Judgement
    gain: float | None = None
    noise_bpb: float = 0.0
    syntax: str = ""
    slot: int = 0
    idle_s: float = 0.0


class Turn(Record, frozen=True, kw_only=True):
    """An agent's turn that gave nothing to run.

    Attributes:
        status: why an edit was refused.
        syntax: the hash of an edit that cannot be run whatever the incumbent is; else empty.
    """

    origin: Origin
    result: TurnResult
    reason: str
    description: str = ""
    status: Decision | None = None
    syntax: str = ""


class LeftOut(Record, frozen=True, kw_only=True):
    """A kept experiment's edit, taken out of the incumbent.

    Attributes:
        number, commit: of the experiment.
        incumbent: the commit that it was taken out of.
        outcome: of the run without it; None where its score was known, or nothing could be run.
        val_bpb: the score without it; worth: what that is more than the incumbent's, in bits per byte.
    """

    number: int
    commit: str
    incumbent: str
    verdict: Worth
    reason: str
    noise_bpb: float
    val_bpb: float | None = None
    worth: float | None = None
    outcome: Outcome | None = None


Body = NightBegun | AgentsAsked | Outcome | Decided | Turn | LeftOut
KINDS: dict[str, type[Body]] = {
    "night": NightBegun, "agents": AgentsAsked, "experiment": Outcome, "decision": Decided, "turn": Turn,
    "leave-one-out": LeftOut,
}  # fmt: skip


def hotloop_version() -> str:
    """Of hotloop, as it is installed; empty where it is not."""
    try:
        return importlib.metadata.version("hotloop")
    except importlib.metadata.PackageNotFoundError:
        return ""
