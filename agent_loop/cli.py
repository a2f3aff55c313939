"""The command line: `hotloop prepare|run|loop|report|show|diff|best|...`; `hotloop --help` has them all.

Every error that a user can mend is one line on stderr and a non-zero exit status; a traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop.agent_loop.loop.watchdog import CRASHED, UNDER_WATCH, watch
from hotloop.harness.command_line import exit_status, say
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.paths import SAME_CODE, import_root
from hotloop.harness.text import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from hotloop.agent_loop.commands.start import NightCommand

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    if argv[:1] == ["prepare"]:  # prepare.py owns its flags
        from hotloop import prepare

        return prepare.main(argv[1:])
    args = _parser().parse_args(argv)
    args.argv = argv
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    from hotloop.bench.cli import add_parsers as add_bench_parsers
    from hotloop.harness.single import add_run_arguments

    parser = argparse.ArgumentParser(prog="hotloop", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    commands.add_parser("prepare", help="text to tokenizer and packed rows, once")

    run = commands.add_parser("run", help="run one experiment of ./train.py and print its summary")
    run.add_argument("train", nargs="?", default="train.py", help="the file to run (default: train.py)")
    run.add_argument("--seed", type=int, default=1)
    add_run_arguments(run)
    run.set_defaults(run=_run)

    loop = commands.add_parser("loop", help="a night: experiments by agents, kept or discarded in git")
    _add_loop_arguments(loop)
    add_run_arguments(loop)
    loop.set_defaults(run=_loop)

    noise = commands.add_parser("noise", help="measure the noise floor: train.py under several seeds")
    noise.add_argument("--tag", help="a night, whose floor gets more seeds (default: a new one)")
    noise.add_argument("--seeds", type=int, default=3, metavar="N", help="further seeds (default: 3)")
    noise.add_argument("--seed", type=int, default=1)
    add_run_arguments(noise)
    noise.set_defaults(run=_noise)

    ablate = commands.add_parser("ablate", help="leave one out: what is each kept gain worth at the end?")
    ablate.add_argument("--tag", help="default: the newest night")
    add_run_arguments(ablate)
    ablate.set_defaults(run=_ablate)

    for name, words, number in (
        ("show", "all of one experiment", "its number"),
        ("diff", "what an experiment changed", "its number"),
        ("best", "the best so far, and how it got there", ""),
        ("checkout", "a branch of your own at an experiment", "its number (default: the best)"),
    ):
        look = commands.add_parser(name, help=words)
        if number:
            look.add_argument("experiment", type=int, help=number, nargs="?" if name == "checkout" else None)
        if name == "diff":
            look.add_argument(
                "other", type=int, nargs="?", help="compare with this one instead of what it was made from"
            )
        look.add_argument("--tag", help="default: the newest night")
        look.set_defaults(run=_look, name=name)

    report = commands.add_parser("report", help="report.html, results.tsv, progress.png and the table of a night")
    report.add_argument("--tag", help="default: the newest night")
    report.set_defaults(run=_report)

    replay = commands.add_parser("replay", help="retrain a recorded experiment; are the weights identical?")
    replay.add_argument("experiment", type=int, help="its number")
    replay.add_argument("--tag", help="default: the newest night; `single` for those of hotloop run")
    replay.add_argument("--data", metavar="DIR")
    replay.set_defaults(run=_replay)

    audit = commands.add_parser("audit", help="score and audit stored weights again")
    audit.add_argument("experiment", type=int, help="its number")
    audit.add_argument("--tag", help="default: the newest night; `single` for those of hotloop run")
    audit.add_argument("--data", metavar="DIR")
    audit.set_defaults(run=_audit)

    verify = commands.add_parser("verify", help="is a night what it says: chain, signatures, seals, commits, weights")
    verify.add_argument("--tag", help="default: the newest night")
    verify.add_argument(
        "--key",
        metavar="HEX",
        help="the public key that all of it must be signed with (default: your own, where you have one)",
    )
    verify.add_argument("--packages", action="store_true", help="compare torch and the others file by file")
    verify.set_defaults(run=_verify)

    keygen = commands.add_parser("keygen", help="make a key: from then on records are signed")
    keygen.set_defaults(run=_keygen)

    add_bench_parsers(commands.add_parser("bench", help="the kernels: compile gate, timings, comparison, tuning"))

    seal = commands.add_parser("seal", help="seal kernels/, harness/ and prepare.py as they are now")
    seal.set_defaults(run=_seal)

    extra = commands.add_parser("install", help="FlashAttention 3, prebuilt, by a lock of hashes")
    extra.add_argument("what", choices=["flash3"])
    extra.add_argument("--lock", type=Path, required=True, help="JSON: repository, revision, folder, SHA-256 of files")
    extra.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="take the files from here")
    extra.set_defaults(run=_install)

    doctor = commands.add_parser("doctor", help="what this machine has, and what is wrong with it")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_loop_arguments(loop: argparse.ArgumentParser) -> None:
    from hotloop.agent_loop.agents.registry import AGENTS

    loop.add_argument(
        "--tag",
        help="name of the night: one that exists goes on (default: a new one, called after the day, such as nov23)",
    )
    loop.add_argument("--experiments", type=int, metavar="N", help="stop after N experiments, 0: after the "
        "baseline and its noise (default: never)")  # fmt: skip
    loop.add_argument("--hours", type=float, metavar="H", help="start no experiment after H hours")
    loop.add_argument("--max-cost", type=float, metavar="USD", help="ask no paid agent once they have cost this much")
    loop.add_argument("--seed", type=int, default=1, help="of the training and of the built-in agent")
    loop.add_argument("--gpus", metavar="0,1", help="run side by side on these GPUs, as nvidia-smi numbers them")
    loop.add_argument(
        "--prewarm", choices=["auto", "on", "off"], default="auto", help="make the next trainer ready while one "
        "trains (auto: on a GPU; on a CPU only after the training, whose processor time counts)"
    )  # fmt: skip
    loop.add_argument(
        "--compile-cache", action="store_true", help="give a trainer what the compilers of kept experiments made"
    )
    agents = loop.add_argument_group("agents")
    agents.add_argument(
        "--agent", default="builtin", metavar="NAMES", help=f"of {', '.join(AGENTS)}; several, separated by commas, "
        "are asked in that order while those before are left alone after a failure"
    )  # fmt: skip
    agents.add_argument("--no-fallback", action="store_true", help="let the built-in agent not take over at last")
    agents.add_argument("--command", metavar="STR", help="for command: the program that edits train.py")
    agents.add_argument("--model", help="for claude, codex and api: the model's name")
    agents.add_argument("--api-url", metavar="URL", help="for api: such as http://localhost:8000/v1")
    agents.add_argument("--api-extra", metavar="JSON", help="for api: goes into each request: '{\"temperature\": 0.7}'")
    agents.add_argument("--agent-timeout", type=float, default=900.0, metavar="S", help="seconds a proposal may take")
    agents.add_argument("--agent-max-cost", type=float, metavar="USD", help="that one proposal may cost")
    agents.add_argument("--agent-network", action="store_true", help="for command: it may use the network")
    agents.add_argument("--agent-write", action="append", default=[], metavar="PATH", help="it may change PATH as well")
    decisions = loop.add_argument_group("decisions")
    decisions.add_argument("--min-gain", type=float, metavar="BPB", help="noise floor, instead of the measured one")
    decisions.add_argument(
        "--no-second-seed", action="store_true", help="discard marginal gains, instead of trying again"
    )
    decisions.add_argument(
        "--noise-seeds", type=int, metavar="N", help="further seeds of the baseline that measure noise"
    )
    decisions.add_argument("--race", action="store_true", help="stop runs early that cannot win any more")
    decisions.add_argument(
        "--preflight", choices=["auto", "always", "never"], default="auto",
        help="check an edit on the CPU before it gets GPU time (auto: where there is a GPU)",
    )  # fmt: skip
    keeping = loop.add_argument_group("keeping on")
    keeping.add_argument("--notify", metavar="CMD", help="run CMD with a message: something kept, trouble, the end")
    keeping.add_argument(
        "--patience", type=float, default=3600.0, metavar="S", help="seconds to wait out a full disk etc."
    )
    keeping.add_argument("--no-watchdog", action="store_true", help="do not start the driver again when it dies")


def _run(args: argparse.Namespace) -> int:
    from hotloop.harness.single import run_command

    return run_command(args)


def _replay(args: argparse.Namespace) -> int:
    from hotloop.harness.single import replay_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return replay_command(args)


def _audit(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.verify import audit_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return audit_command(args)


def _verify(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.verify import verify_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return verify_command(args)


def _keygen(args: argparse.Namespace) -> int:
    from hotloop.harness.records.signing import key_path, make_key

    signer = make_key()
    print(f"key:     {key_path()}\npublic:  {signer.public}")
    print("Records are signed from now on. Keep the public half: hotloop verify --key", signer.public[:8] + "...")
    return 0


def _install(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands import install_flash3 as flash3

    version = flash3.install(flash3.read_lock(args.lock), args.source)
    print(f"installed: {flash3.DISTRIBUTION} {version}, each file as the lock has it; hotloop bench attention tries it")
    return 0


def _seal(args: argparse.Namespace) -> int:
    from hotloop.harness.records.seal import write_seal

    print(f"sealed: {write_seal()}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.start import cage_check
    from hotloop.harness.doctor import main as doctor

    return doctor(args, more=[cage_check])


def _console() -> Console:
    """A terminal as it is; a file or a pipe, which has no width, as 120 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def _newest_tag(runs: Path) -> str:
    nights = sorted(runs.glob("*/records.jsonl"), key=lambda p: p.stat().st_mtime)
    if not nights:
        raise UsageError(f"there is no night under {runs.resolve()}; start one with: hotloop loop")
    return nights[-1].parent.name


def _report(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.show import night_named
    from hotloop.agent_loop.report.files import draw, print_results, write_tsv

    night = night_named(args.tag or _newest_tag(Path("runs")))
    write_tsv(night)
    draw(str(night.folder), str(Path.cwd()))
    print_results(night, _console())
    return 0


def _look(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands import show as looking

    args.tag = args.tag or _newest_tag(Path("runs"))
    commands = {
        "show": looking.show_command,
        "diff": looking.diff_command,
        "best": looking.best_command,
        "checkout": looking.checkout_command,
    }
    return commands[args.name](args)


def _ablate(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.ablate import ablate
    from hotloop.agent_loop.commands.show import night_named
    from hotloop.agent_loop.gitrepo import NightRepo, open_repo
    from hotloop.agent_loop.night import Night
    from hotloop.agent_loop.report.files import draw
    from hotloop.harness.records.record import Lock
    from hotloop.harness.single import budget_from, settings_of

    folder = night_named(args.tag or _newest_tag(Path("runs"))).folder
    settings = settings_of(args)
    repo = open_repo(Path.cwd())
    with Lock(folder / "lock"):
        night = Night(folder)
        for body in ablate(night, NightRepo(repo, folder.name, folder), settings, budget_from(args)):
            print(f"#{body['number']:<4} {body['verdict']:<10} {one_line(body['reason'])}", flush=True)
    draw(str(folder), str(Path.cwd()))
    print(f"all: {folder / 'report.html'}")
    return 0


def _noise(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.show import night_named

    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, not {args.seeds}")
    given = _parser().parse_args(["loop"])
    for name, value in vars(args).items():
        setattr(given, name, value)
    given.experiments, given.noise_seeds, given.no_watchdog = 0, args.seeds, True
    if args.tag and (Path("runs") / args.tag / "records.jsonl").exists():
        night = night_named(args.tag)
        baseline = night.rows()[0].commit if night.rows() else ""
        given.noise_seeds += sum(r.kind == "repeat" and r.commit == baseline for r in night.rows())
        given.seed = night.seed
    status = _loop(given)
    noise = night_named(given.tag).noise()
    print(f"noise floor: {noise.floor_bpb:.6f} bits per byte, from {noise.seeds} runs (2 sqrt(2) standard deviations)")
    return status


def _loop(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.start import start
    from hotloop.harness.gpu.between_runs import alone

    named = bool(args.tag)
    command = start(args)  # every wrong flag ends here
    again = [*args.argv, *([] if named else ["--tag", command.tag])]
    # A terminal that is closed takes the view with it, not the night. A handler: what is ignored stays so in agents.
    signal.signal(signal.SIGHUP, lambda *_: None)
    if UNDER_WATCH in os.environ:
        return _drive(command, again)
    for settings in command.slots:  # a driver that was started again waits for its GPU as for any fault
        if settings.device == "cuda":
            alone(settings.sandbox.gpu)
    command.try_cages()
    if args.no_watchdog:
        return _drive(command, again)
    code = SAME_CODE + "del sys.argv[1]; from hotloop.agent_loop.cli import main; sys.exit(main())"
    return watch([sys.executable, "-c", code, import_root(), *again], command.folder)


def _drive(command: NightCommand, again: list[str]) -> int:
    """The night, in the process that drives it; `again` are the arguments that go on with it."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command.drive(_console())
    except KeyboardInterrupt:
        say(f"stopped; to go on: {shlex.join(['hotloop', *again])}")
        return 130
    except (HotloopError, OSError) as e:
        if isinstance(e, OSError) or "the same command" in str(e):
            say(f"the command that goes on with this night: {shlex.join(['hotloop', *again])}")
        raise
    except Exception:
        if UNDER_WATCH not in os.environ:
            raise
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
        return CRASHED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
