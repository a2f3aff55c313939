"""Single experiments from the command line: `python train.py`, `hotloop run`, `hotloop replay`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hotloop.harness.command_line import exit_status
from hotloop.harness.data.dataset import default_data_dir, load_dataset
from hotloop.harness.errors import DataError, DeviceError, HotloopError, UsageError
from hotloop.harness.experiment import Job, Settings, data_warnings, replayed, run_experiment, summary
from hotloop.harness.files import kind_of, read_ordinary
from hotloop.harness.gpu.between_runs import touch
from hotloop.harness.gpu.devices import chosen, named
from hotloop.harness.gpu.neighbours import claim
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.gpu.toolchain import torch_build
from hotloop.harness.machine import check_device, gpu_memory_gib, threads_default
from hotloop.harness.preflight.lint import MAX_BYTES, unfit
from hotloop.harness.profile import Machine, enter, facts, find, kept
from hotloop.harness.records.chain import Chain, Lock
from hotloop.harness.records.model import Kind, Outcome, Status, Trial
from hotloop.harness.sandbox.levels import best
from hotloop.harness.sandbox.policy import Sandbox
from hotloop.harness.scoring.score import Noise
from hotloop.harness.settings import PRESETS, BudgetRule, Preset, auto_preset, batch_divisor, preset_named
from hotloop.harness.training.session import Event

__all__ = [
    "EXIT_BY_STATUS",
    "add_machine_arguments",
    "add_run_arguments",
    "budget_from",
    "machine_from",
    "main",
    "preset_here",
    "read_train_source",
    "repeatable_warning",
    "replay_command",
    "run_command",
    "sandbox_warning",
    "settings_from",
    "settings_of",
]

EXIT_BY_STATUS = {"ok": 0, "crash": 10, "invalid": 11, "overtime": 12, "timeout": 13, "oom": 14, "nan": 15}
SINGLES = Path("runs/single")
PATIENCE_S = 5.0
GIT_S = 60.0


def settings_from(
    *,
    preset: str = "auto",
    device: str = "auto",
    data: str | None = None,
    threads: int | None = None,
    sandbox: str = "auto",
    unsafe: bool = False,
    repeatable: bool = True,
    gpus: str | None = None,
    recorded: tuple[Path, str] | None = None,
) -> Settings:
    """Turn flags into settings; on a GPU that is then claimed for this process, and CUDA is awake. The environment of
    this process is that of the profile from now on.

    Args:
        recorded: for what goes on with a record: the experiment's folder, and the profile's hash or "".

    Raises:
        UsageError, DeviceError, DataError, LockedError, SandboxError: each with what to do.
    """
    wanted, device, mine = _device_of(preset, device, gpus)
    path = Path(data) if data else default_data_dir(wanted.source, wanted.seq_len, wanted.vocab_size)
    if not path.exists():
        raise DataError(f"there is no prepared data at {path}; run: hotloop prepare --preset {wanted.name}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    wanted, inside = _inside(wanted, device, mine, sandbox, unsafe)
    here, told = facts(wanted, device, mine[0]), ""
    if recorded:
        found = kept(*recorded, here)
    else:
        found, told = find(here)
    if len({gpu.name for gpu in filter(None, mine)}) > 1:
        found, told = None, "these GPUs are of different kinds, so no profile is used"
    if told:
        print(f"hotloop: WARNING: {told}", file=sys.stderr)
    enter(found)
    threads = threads or (found.threads if found else None) or threads_default()
    return Settings(wanted, device, load_dataset(path), threads, inside, repeatable=repeatable, profile=found)


def machine_from(*, preset: str = "auto", device: str = "auto", sandbox: str = "auto", unsafe: bool = False) -> Machine:
    """What `hotloop tune` needs of the settings: no data. Raises as `settings_from`."""
    wanted, device, mine = _device_of(preset, device, None)
    wanted, inside = _inside(wanted, device, mine, sandbox, unsafe)
    return Machine(wanted, device, inside, facts(wanted, device, mine[0]), threads_default())


def _device_of(preset: str, device: str, gpus: str | None) -> tuple[Preset, str, list[Gpu | None]]:
    if preset == "auto":
        here = named(gpus)[0] if gpus and device == "auto" else None
        preset = "laptop" if device == "cpu" else "h100" if device == "cuda" else preset_here(here)
    wanted = preset_named(preset)
    if device == "auto":
        device = wanted.device
        if device == "cuda" and chosen() is None:
            raise UsageError(f"the preset {preset} needs a GPU and nvidia-smi shows none; use --preset laptop")
    mine: list[Gpu | None] = [None]
    if device == "cuda":
        mine = [*named(gpus)] if gpus else [chosen()]
    for gpu in mine:
        check_device(device, gpu)
    return wanted, device, mine


def _inside(wanted: Preset, device: str, mine: list[Gpu | None], sandbox: str, unsafe: bool) -> tuple[Preset, Sandbox]:
    """The preset at the size of the GPU's memory, and the sandbox; the GPU is claimed, and CUDA awake."""
    level = None if sandbox == "auto" else int(sandbox.removeprefix("L"))
    if level == 0 and not unsafe:
        raise UsageError("--sandbox L0 protects nothing; where that is wanted, say --unsafe-no-sandbox")
    for gpu in filter(None, mine):
        claim(gpu)
    with _patience(device):
        for gpu in filter(None, mine):
            touch(gpu)
        inside = best(level, unsafe, device, mine[0])
    if device == "cuda":
        sizes = [size for gpu in mine if (size := gpu_memory_gib(gpu)) is not None]
        wanted = replace(wanted, batch_divisor=batch_divisor(min(sizes, default=None)))
    return wanted, inside


@contextlib.contextmanager
def _patience(device: str) -> Iterator[None]:
    """Say what is waited for where a GPU's first start takes its time."""
    words = "hotloop: CUDA is tried in the sandbox; from a cold disk its libraries may take minutes"
    timer = threading.Timer(PATIENCE_S, lambda: print(words, file=sys.stderr, flush=True))
    if device == "cuda":
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def preset_here(gpu: Gpu | None = None) -> str:
    """The preset that `auto` takes on a GPU (by default the chosen one); the CPU's only on a machine without.

    Raises:
        DeviceError: there is a GPU and it cannot be used, or is too small; one line with the cure.
    """
    gpu = gpu or chosen()
    if gpu is None:
        if (build := torch_build()) and build.hip:  # which would call an AMD GPU "cuda"
            check_device("cuda")
        return "laptop"
    memory_gib = gpu_memory_gib(gpu)
    if memory_gib is None:
        raise DeviceError(f"{gpu} does not tell its memory; say --preset h100, or for the CPU --device cpu")
    if auto_preset(memory_gib) == "laptop":
        raise DeviceError(
            f"{gpu} has {memory_gib:.0f} GiB, too little for the preset h100; choose another GPU with "
            f"CUDA_VISIBLE_DEVICES, try it with --preset h100, or ask for the CPU: --device cpu"
        )
    return auto_preset(memory_gib)


def budget_from(args: argparse.Namespace) -> BudgetRule | None:
    """The budget that --budget-seconds, --budget-flops or --budget-tokens asks for; None for the preset's."""
    for kind in ("seconds", "flops", "tokens"):
        amount = getattr(args, f"budget_{kind}", None)
        if amount is not None:
            if not 0 < amount < float("inf"):
                raise UsageError(f"--budget-{kind} must be a positive number, not {amount}")
            return BudgetRule(kind, float(amount))  # type: ignore[arg-type]
    return None


def add_machine_arguments(parser: argparse._ActionsContainer) -> None:
    """The flags that say on what something runs, and in which sandbox."""
    parser.add_argument(
        "--preset", default="auto", choices=["auto", *sorted(PRESETS)],
        help="sizes of model, text and budget (auto: h100 with a GPU, laptop without)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the preset's")
    parser.add_argument(
        "--sandbox", default="auto", choices=["auto", "L3", "L2", "L1", "L0"],
        help="its level (auto: the best that works here; see hotloop doctor)",
    )  # fmt: skip
    parser.add_argument(
        "--unsafe-no-sandbox", action="store_true", help="run train.py without protection where no sandbox works"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command which trains has."""
    training = parser.add_argument_group("training")
    add_machine_arguments(training)
    training.add_argument("--data", metavar="DIR", help="a folder that `hotloop prepare` made (default: the preset's)")
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads, on which scores depend (default: 2)")
    training.add_argument(
        "--fast-nondeterministic", action="store_true", help="let trainings be faster and not repeat bit by bit; their "
        "scores do not compare with those of other nights (hotloop bench determinism measures the gain)"
    )  # fmt: skip
    budget = training.add_mutually_exclusive_group()
    budget.add_argument("--budget-seconds", type=float, metavar="S", help="train for S seconds, as calibrated")
    budget.add_argument("--budget-flops", type=float, metavar="F", help="train for F counted operations")
    budget.add_argument("--budget-tokens", type=float, metavar="N", help="train on N tokens (default: the preset's)")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags of `add_run_arguments` ask for."""
    rule = budget_from(args)
    settings = settings_from(
        preset=args.preset, device=args.device, data=args.data, threads=args.threads, sandbox=args.sandbox,
        unsafe=args.unsafe_no_sandbox, repeatable=not args.fast_nondeterministic, gpus=getattr(args, "gpus", None),
        recorded=getattr(args, "recorded", None),
    )  # fmt: skip
    row = settings.preset.seq_len
    if rule and rule.kind == "tokens" and rule.amount < row:
        raise UsageError(f"--budget-tokens {rule.amount:g} is less than a row of {row} tokens, the least step")
    return settings


def sandbox_warning(settings: Settings) -> str:
    """One sentence for the user of a sandbox that is not the best; empty for L3. `hotloop doctor` has the reasons."""
    sandbox = settings.sandbox
    if sandbox.level == 3:
        return ""
    if sandbox.level == 0:
        return "train.py runs without a sandbox: it may read, write and send whatever you may"
    if shutil.which("bwrap") is None:
        better = f"for the best one {'' if os.geteuid() == 0 else 'let root '}run: apt-get install bubblewrap"
    else:
        better = "bubblewrap does not work here"
    return f"the sandbox is {sandbox}; {better} (hotloop doctor: what each level stops)"


def repeatable_warning(settings: Settings) -> str:
    """What to tell the user of trainings that need not repeat; empty where they do."""
    if settings.repeatable:
        return ""
    return "--fast-nondeterministic: the same train.py may give other weights and another score each time"


def _warn(settings: Settings) -> None:
    for warning in (sandbox_warning(settings), repeatable_warning(settings), *data_warnings(settings)):
        if warning:
            print(f"hotloop: WARNING: {warning}", file=sys.stderr)


def read_train_source(path: Path) -> bytes:
    """The bytes of a train.py that can be run.

    Raises:
        UsageError: missing, no ordinary file, too large, no text, no Python, or without its functions.
    """
    try:
        if what := kind_of(path, MAX_BYTES):
            raise UsageError(f"{path} is {what}; name a file of Python code")
        source = read_ordinary(path, MAX_BYTES)
        if source is None:
            raise UsageError(f"{path} cannot be read; start in the folder of train.py")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}; start in the folder of train.py") from None
    reason, line = unfit(source)
    if reason:
        raise UsageError(f"{path}{f':{line}' * bool(line)} cannot be run: {reason}; mend the file and run again")
    return source


def run_command(args: argparse.Namespace) -> int:
    """`hotloop run`: one experiment of a train.py, recorded under runs/single; prints the summary block."""
    source = read_train_source(Path(args.train))
    settings = settings_of(args)
    _warn(settings)
    lock = Lock(SINGLES / "lock")  # two at once would write one record
    chain = Chain.open(SINGLES / "records.jsonl")
    number = len(chain.bodies(Outcome))
    commit = _git_commit(Path(args.train).resolve())
    run = Trial(number, Kind.SINGLE, commit, "", f"{args.train}", args.seed)
    job = Job(run, source, "single", SINGLES / "experiments" / f"{number:04d}", budget=budget_from(args))
    outcome = run_experiment(job, settings, _printer())
    chain.append(outcome)
    lock.release()
    print(summary(outcome))
    if outcome.status != Status.OK:
        print(*outcome.log_tail, sep="\n", file=sys.stderr)
    return EXIT_BY_STATUS[outcome.status]


def replay_command(args: argparse.Namespace) -> int:
    """`hotloop replay N`: retrain a recorded experiment; exit 0 when the weights are identical, 1 when not.

    One of --fast-nondeterministic is retrained in the same way, and its score compared instead.
    """
    night = Path("runs") / args.tag
    chain = Chain.read(night / "records.jsonl")
    was = chain.outcome(args.experiment)
    number = was.run.number
    if not was.weights_sha256:
        raise UsageError(
            f"experiment {number} left no weights ({was.status}: {was.reason}); there is nothing to replay"
        )
    path = night / "experiments" / f"{number:04d}" / "train.py"
    source = read_train_source(path)
    if hashlib.sha256(source).hexdigest() != was.source_sha256:
        raise UsageError(f"{path} is not what was run; restore it: git show {was.run.commit[:12]}:train.py > {path}")
    settings = settings_from(
        preset=was.preset, device=was.device, data=args.data, threads=was.environment.threads,
        repeatable=was.environment.repeatable, recorded=(path.parent, was.profile),
    )  # fmt: skip
    if settings.dataset.digest != was.seals.data:
        raise DataError(f"{settings.dataset.path} is not the data that experiment {number} was trained on")
    job = Job(was.run, source, was.tag, night / "replays" / f"{number:04d}")
    now = run_experiment(replayed(was, job), settings, _printer())
    if now.status != Status.OK:
        raise HotloopError(f"the replay of experiment {number} ended as {now.status}: {now.reason}")
    then, here = was.sandbox.level, now.sandbox.level
    if then != here:
        print(f"note: it ran at sandbox level L{then}, and now at L{here}", file=sys.stderr)
    print(f"experiment {number} ({was.run.commit[:7]}), seed {was.run.seed}, {was.training.tokens:,} tokens")
    print(f"weights   {was.weights_sha256}\nreplayed  {now.weights_sha256}")
    print(f"val_bpb   {was.val_bpb:.9f}\nreplayed  {now.val_bpb:.9f}")
    if now.weights_sha256 == was.weights_sha256:
        print("identical")
        return 0
    if was.environment.repeatable:
        print("DIFFERENT: the machine, the versions or the thread count are not the same")
        return 1
    return _about_the_same(was, now, chain)


def _about_the_same(was: Outcome, now: Outcome, chain: Chain) -> int:
    """Compare the scores of a training that need not repeat: 1 where they differ by more than other seeds would."""
    assert was.val_bpb is not None
    assert now.val_bpb is not None
    difference = now.val_bpb - was.val_bpb
    groups: dict[tuple[str, int], dict[int, float]] = {}
    for other in chain.bodies(Outcome):
        if other.val_bpb is not None and not other.environment.repeatable:
            scores = groups.setdefault((other.source_sha256, other.training.tokens), {})
            scores.setdefault(other.run.seed, other.val_bpb)
    floor = Noise.from_repeats(*(list(g.values()) for g in groups.values())).floor_bpb
    print("the weights differ, as those of --fast-nondeterministic may")
    if not floor:
        print(f"val_bpb differs by {difference:+.6f}; no train.py was run here under two seeds, so nothing judges that")
        return 0
    good = abs(difference) <= floor
    words = "within" if good else "DIFFERENT: above"
    print(f"val_bpb differs by {difference:+.6f}, {words} the noise floor of seeds, {floor:.6f}")
    return 0 if good else 1


def main(path: str, argv: list[str] | None = None) -> int:
    """What `python train.py` does: one experiment of that very file. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="train.py", description="Run this file as one experiment.")
    add_run_arguments(parser)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.train = path
    return exit_status(lambda: run_command(args), "stopped; nothing was recorded")


def _printer() -> Callable[[Event], None]:
    """Shows a run: one line rewritten on a terminal, one line a phase elsewhere."""
    live, last, began = sys.stderr.isatty(), "", time.monotonic()

    def show(event: Event) -> None:
        nonlocal last
        if event.message and event.phase != "done":
            print("\r\x1b[K" * live + f"hotloop: {event.message}", file=sys.stderr, flush=True)
            return
        if event.phase == last and not live:
            return
        text = f"{time.monotonic() - began:6.1f} s  {event.phase}"
        if live:
            text += f" {100 * event.progress:5.1f} %" if event.progress else ""
            text += f"  {event.loaded_mb:,.0f} MB loaded" if event.loaded_mb else ""
            text += f"  loss {event.loss:.4f}" if event.loss is not None else ""
            text += f"  {event.tokens_per_s:,.0f} tokens/s" if event.tokens_per_s else ""
            end = "\n" if event.phase == "done" else ""
            print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        last = event.phase

    return show


def _git_commit(path: Path) -> str:
    """The commit of the checkout that holds `path`, with `-dirty` where the file differs; empty outside git."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=path.parent, capture_output=True, text=True, timeout=GIT_S)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return head + "-dirty" if head and git("status", "--porcelain", "--", path.name) else head
