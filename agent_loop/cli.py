"""The command line: `hotloop COMMAND`.

Every error that a user can mend is one line on stderr and a non-zero exit status; a traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop.agent_loop.loop.watchdog import CRASHED, UNDER_WATCH, watch
from hotloop.harness.command_line import exit_status, say
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.paths import SAME_CODE, import_root

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
    if getattr(args, "newest_night", False):
        args.tag = args.tag or _newest_tag(Path("runs"))
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    from hotloop.bench.cli import add_parsers as add_bench_parsers
    from hotloop.harness.single import add_machine_arguments, add_run_arguments

    parser = argparse.ArgumentParser(
        prog="hotloop", description="Language-model pretraining experiments on one GPU, all night, with an AI agent as "
        "the researcher. `hotloop COMMAND --help` has each command's flags."
    )  # fmt: skip
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        command.set_defaults(run=run)
        return command

    def add_of_a_night(
        name: str, run: Callable[[argparse.Namespace], int], words: str, number: str = "", single: bool = False
    ) -> argparse.ArgumentParser:
        """A command on a recorded night; `number`: the help of its experiment, where it takes one."""
        command = add(name, run, words)
        if number:
            command.add_argument("experiment", type=int, nargs="?" if "default" in number else None, help=number)
        more = ", or `single` for experiments of `hotloop run`" if single else ""
        command.add_argument("--tag", help=f"the night's name{more} (default: the newest night)")
        command.set_defaults(newest_night=True)
        return command

    commands.add_parser("prepare", help="turn text into a tokenizer and packed rows of tokens, once")  # see _main

    run = add("run", _run, "train and score ./train.py once, and print its summary")
    run.add_argument("train", nargs="?", default="train.py", help="the file to run (default: train.py)")
    run.add_argument("--seed", type=int, default=1, help="random seed of the training (default: 1)")
    add_run_arguments(run)

    loop = add(
        "loop", _loop, "start or continue a night: agents edit train.py; each edit is trained, scored, and kept or "
        "discarded in git"
    )  # fmt: skip
    _add_loop_arguments(loop)
    add_run_arguments(loop)

    add_of_a_night("best", _show, "show the best experiment of a night, and the gains that led to it")
    add_of_a_night("show", _show, "show everything about one experiment", "its number")
    diff = add_of_a_night("diff", _show, "show what an experiment changed in train.py", "its number")
    diff.add_argument("other", type=int, nargs="?", help="compare with this one (default: what it was made from)")
    add_of_a_night(
        "checkout", _show, "make a git branch of your own at an experiment", "its number (default: the best one's)"
    )
    add_of_a_night("report", _report, "write report.html, results.tsv and progress.png of a night, and print its table")

    tune = add("tune", _tune, "prove and time the implementations on this machine, and choose what runs from then on")
    tune.add_argument("train", nargs="?", default="train.py", help="the file whose step decides (default: train.py)")
    tune.add_argument("--minutes", type=float, metavar="N", help="stop after N minutes (default: 15; with --quick 4)")
    tune.add_argument("--quick", action="store_true", help="time each one alone, then the winners together")
    add_machine_arguments(tune)

    noise = add("noise", _noise, "measure the noise floor: how much the score of one train.py varies with its seed")
    noise.add_argument("--tag", help="a night, whose noise floor gets more seeds (default: a new night)")
    noise.add_argument("--seeds", type=int, default=3, metavar="N", help="how many more seeds (default: 3)")
    noise.add_argument("--seed", type=int, default=1, help="the first seed (default: 1)")
    add_run_arguments(noise)

    add_run_arguments(
        add_of_a_night("ablate", _ablate, "measure what each kept edit is worth at the end: the best without that one")
    )
    replay = add_of_a_night(
        "replay", _replay, "retrain a recorded experiment, and compare the weights bit by bit", "its number", True
    )
    audit = add_of_a_night("audit", _audit, "score the stored weights of an experiment again", "its number", True)
    for command in (replay, audit):
        command.add_argument("--data", metavar="DIR", help="the prepared data (default: what the preset uses)")

    verify = add_of_a_night(
        "verify", _verify, "verify a night's records: hash chain, signatures, seals, commits, decisions, weights"
    )
    verify.add_argument(
        "--key", metavar="HEX", help="the public key that every record must be signed with (default: your own, if any)"
    )
    verify.add_argument(
        "--packages", action="store_true", help="compare the installed torch and other packages file by file, too"
    )

    add("keygen", _keygen, "make a signing key; records are signed from then on")
    add_bench_parsers(commands.add_parser("bench", help="compile, measure, compare and tune the kernels"))
    add("doctor", _doctor, "check this machine: what it has, and what is wrong with it")
    add("seal", _seal, "record the hashes of kernels/, harness/ and prepare.py, after a change of them that you want")

    extra = add("install", _install, "install a prebuilt FlashAttention 3, each file checked by its SHA-256")
    extra.add_argument("what", choices=["flash3"], help="the package")
    extra.add_argument(
        "--lock", type=Path, required=True, metavar="FILE", help="JSON: repository, revision, folder, SHA-256 of files"
    )
    extra.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="take the files from here instead of the network"
    )
    return parser


def _add_loop_arguments(loop: argparse.ArgumentParser) -> None:
    from hotloop.agent_loop.agents.registry import AGENTS

    loop.add_argument(
        "--tag", help="the night's name; one of that name is continued (default: a new one, named after the day)"
    )
    loop.add_argument(
        "--experiments", type=int, metavar="N", help="stop after N experiments; 0: after the baseline and its noise "
        "(default: never)"
    )  # fmt: skip
    loop.add_argument("--hours", type=float, metavar="H", help="start no experiment after H hours (default: no limit)")
    loop.add_argument("--seed", type=int, default=1, help="of the trainings and of the built-in agent (default: 1)")
    loop.add_argument(
        "--gpus", metavar="0,1", help="run experiments side by side on these GPUs, as nvidia-smi numbers them"
    )
    loop.add_argument(
        "--prewarm", choices=["auto", "on", "off"], default="auto", help="start the next trainer's process while one "
        "trains; on a CPU after that training, whose processor time counts (auto: on a GPU)"
    )  # fmt: skip
    loop.add_argument(
        "--no-tune", action="store_true", help="on a GPU without a profile, do not run `hotloop tune --quick` first"
    )
    loop.add_argument(
        "--compile-cache", action="store_true", help="give each trainer what the compilers of kept experiments made"
    )
    agents = loop.add_argument_group("agents")
    agents.add_argument(
        "--agent", default="builtin", metavar="NAMES", help=f"of {', '.join(AGENTS)}; of several, separated by commas, "
        "the first that is not paused after a failure is asked (default: builtin)"
    )  # fmt: skip
    agents.add_argument(
        "--no-fallback", action="store_true", help="do not let the built-in agent take over while all others are paused"
    )
    agents.add_argument(
        "--max-cost", type=float, metavar="USD", help="once the agents have cost this much, ask only free ones"
    )
    agents.add_argument("--agent-max-cost", type=float, metavar="USD", help="what one proposal may cost")
    agents.add_argument(
        "--agent-timeout", type=float, default=900.0, metavar="S", help="seconds one proposal may take (default: 900)"
    )
    agents.add_argument("--model", help="the model's name, for claude, codex and api")
    agents.add_argument("--api-url", metavar="URL", help="for api: its address, such as http://localhost:8000/v1")
    agents.add_argument(
        "--api-extra", metavar="JSON", help="for api: more fields for each request, such as '{\"temperature\": 0.7}'"
    )
    agents.add_argument("--command", metavar="STR", help="for command: the program that edits train.py")
    agents.add_argument("--agent-network", action="store_true", help="for command: let it use the network")
    agents.add_argument(
        "--agent-write",
        action="append",
        default=[],
        metavar="PATH",
        help="let sandboxed agents write to PATH, too",
    )
    decisions = loop.add_argument_group("decisions")
    decisions.add_argument(
        "--noise-seeds", type=int, metavar="N", help="measure the noise floor with N more seeds of the baseline"
    )
    decisions.add_argument(
        "--min-gain", type=float, metavar="BPB", help="use this noise floor instead of the measured one"
    )
    decisions.add_argument(
        "--no-second-seed", action="store_true", help="discard marginal gains at once, without a second seed"
    )
    decisions.add_argument("--race", action="store_true", help="stop runs early that cannot win any more")
    decisions.add_argument(
        "--preflight", choices=["auto", "always", "never"], default="auto",
        help="try each edit on the CPU before it gets GPU time (auto: where there is a GPU)",
    )  # fmt: skip
    trouble = loop.add_argument_group("trouble")
    trouble.add_argument(
        "--notify", metavar="CMD", help="run CMD with a message when something is kept, goes wrong, or ends"
    )
    trouble.add_argument(
        "--patience", type=float, default=3600.0, metavar="S",
        help="how many seconds to wait for a full disk, a locked git or a lost GPU (default: 3600)",
    )  # fmt: skip
    trouble.add_argument("--no-watchdog", action="store_true", help="do not restart the night's process when it dies")


def _run(args: argparse.Namespace) -> int:
    from hotloop.harness.single import run_command

    return run_command(args)


def _replay(args: argparse.Namespace) -> int:
    from hotloop.harness.single import replay_command

    return replay_command(args)


def _audit(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.verify import audit_command

    return audit_command(args)


def _verify(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.verify import verify_command

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
    print(f"installed {flash3.DISTRIBUTION} {version}: every file matches the lock; to try it: hotloop tune")
    return 0


def _seal(args: argparse.Namespace) -> int:
    from hotloop.harness.records.seal import write_seal

    print(f"sealed: {write_seal()}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.start import sandbox_check as agents
    from hotloop.bench.doctor import checks as kernels
    from hotloop.harness.doctor import main as doctor

    return doctor(args, more=itertools.chain(kernels(), agents()))


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

    night = night_named(args.tag)
    write_tsv(night)
    draw(str(night.folder), str(Path.cwd()))
    print_results(night, _console())
    return 0


def _show(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands import show

    run: Callable[[argparse.Namespace], int] = getattr(show, f"{args.verb}_command")
    return run(args)


def _ablate(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.ablate import ablate_command

    return ablate_command(args)


def _tune(args: argparse.Namespace) -> int:
    from hotloop.agent_loop.commands.tune import tune_command

    return tune_command(args)


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
    from hotloop.agent_loop.commands.start import night_command
    from hotloop.harness.gpu.between_runs import alone

    named = bool(args.tag)
    command = night_command(args)  # every wrong flag ends here
    resume = [*args.argv, *([] if named else ["--tag", command.tag])]
    # A terminal that is closed takes the view with it, not the night. A handler: what is ignored stays so in agents.
    signal.signal(signal.SIGHUP, lambda *_: None)
    if UNDER_WATCH in os.environ:
        return _drive(command, resume)
    for settings in command.slots:  # a driver that was started again waits for its GPU as for any fault
        if settings.device == "cuda":
            alone(settings.sandbox.gpu)
    command.try_sandboxes()
    if args.no_watchdog:
        return _drive(command, resume)
    code = SAME_CODE + "del sys.argv[1]; from hotloop.agent_loop.cli import main; sys.exit(main())"
    return watch([sys.executable, "-c", code, import_root(), *resume], command.folder)


def _drive(command: NightCommand, resume: list[str]) -> int:
    """The night, in the process that drives it; `resume`: the arguments that continue it."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command.drive(_console())
    except KeyboardInterrupt:
        say(f"stopped; to go on: {shlex.join(['hotloop', *resume])}")
        return 130
    except (HotloopError, OSError) as e:
        if isinstance(e, OSError) or "the same command" in str(e):
            say(f"the command that goes on with this night: {shlex.join(['hotloop', *resume])}")
        raise
    except Exception:
        if UNDER_WATCH not in os.environ:
            raise
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
        return CRASHED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
