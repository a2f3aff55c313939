"""The command line: `hotloop prepare|run|loop|report|replay|bench|seal|doctor`.

Every error that a user can mend is one line on stderr and a non-zero exit status; a traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HotloopError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["prepare"]:  # prepare.py owns its flags
            import prepare

            return prepare.main(argv[1:])
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        return status
    except HotloopError as e:
        print(f"hotloop: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("hotloop: stopped; start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as e:  # the machine's fault: a full disk, a folder that may not be written
        where = f"{e.filename}: " if e.filename else ""
        print(f"hotloop: {where}{e.strerror or e}; mend it and start the same command again", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from bench.cli import add_parsers as add_bench_parsers
    from harness.single import add_run_arguments

    parser = argparse.ArgumentParser(prog="hotloop", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    commands.add_parser("prepare", help="text to tokenizer and packed rows, once")

    run = commands.add_parser("run", help="run one experiment of ./train.py and print its summary")
    run.add_argument("train", nargs="?", default="train.py", help="the file to run (default: train.py)")
    run.add_argument("--seed", type=int, default=1)
    add_run_arguments(run)
    run.set_defaults(run=_run)

    loop = commands.add_parser("loop", help="a night: experiments by an agent, kept or discarded in git")
    loop.add_argument("--tag", help="name of the night; an existing one goes on (default: today, such as nov23)")
    loop.add_argument("--experiments", type=int, metavar="N", help="stop after N experiments (default: never)")
    loop.add_argument("--hours", type=float, metavar="H", help="start no experiment after H hours")
    loop.add_argument("--agent", choices=["builtin", "command"], default="builtin")
    loop.add_argument("--command", metavar="STR", help="for --agent command: the program that edits train.py")
    loop.add_argument("--agent-timeout", type=float, default=900.0, metavar="S", help="seconds a proposal may take")
    loop.add_argument("--agent-network", action="store_true", help="the agent may use the network")
    loop.add_argument("--agent-write", action="append", default=[], metavar="PATH", help="it may change PATH as well")
    loop.add_argument("--seed", type=int, default=1, help="of the training and of the built-in agent")
    loop.add_argument("--min-gain", type=float, metavar="BPB", help="noise floor, instead of the measured one")
    loop.add_argument("--no-second-seed", action="store_true", help="discard marginal gains, instead of trying again")
    loop.add_argument("--noise-seeds", type=int, metavar="N", help="further seeds of the baseline that measure noise")
    add_run_arguments(loop)
    loop.set_defaults(run=_loop)

    report = commands.add_parser("report", help="results.tsv, progress.png and the table of a night")
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
    verify.add_argument("--key", metavar="HEX", help="the public key that all of it must be signed with")
    verify.add_argument("--packages", action="store_true", help="compare torch and the others file by file")
    verify.set_defaults(run=_verify)

    keygen = commands.add_parser("keygen", help="make a key: from then on records are signed")
    keygen.set_defaults(run=_keygen)

    add_bench_parsers(commands.add_parser("bench", help="the kernels: compile gate, timings, comparison, tuning"))

    seal = commands.add_parser("seal", help="seal kernels/, harness/ and prepare.py as they are now")
    seal.set_defaults(run=_seal)

    doctor = commands.add_parser("doctor", help="what this machine has, and what is wrong with it")
    doctor.set_defaults(run=_doctor)
    return parser


def _run(args: argparse.Namespace) -> int:
    from harness.single import run_command

    return run_command(args)


def _replay(args: argparse.Namespace) -> int:
    from harness.single import replay_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return replay_command(args)


def _audit(args: argparse.Namespace) -> int:
    from agent_loop.verify import audit_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return audit_command(args)


def _verify(args: argparse.Namespace) -> int:
    from agent_loop.verify import verify_command

    args.tag = args.tag or _newest_tag(Path("runs"))
    return verify_command(args)


def _keygen(args: argparse.Namespace) -> int:
    from harness.signing import key_path, make_key

    signer = make_key()
    print(f"key:     {key_path()}\npublic:  {signer.public}")
    print("Records are signed from now on. Keep the public half: hotloop verify --key", signer.public[:8] + "...")
    return 0


def _seal(args: argparse.Namespace) -> int:
    from harness.seal import write_seal

    print(f"sealed: {write_seal()}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from harness.doctor import main as doctor

    return doctor(args)


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
    from agent_loop.night import Night
    from agent_loop.report import print_results, write_progress, write_tsv

    tag = args.tag or _newest_tag(Path("runs"))
    folder = Path("runs") / tag
    if not (folder / "records.jsonl").exists():
        raise UsageError(f"there is no night called {tag} under {Path('runs').resolve()}")
    night = Night(folder)
    write_tsv(night)
    write_progress(night)
    print_results(night, _console())
    return 0


def _loop(args: argparse.Namespace) -> int:
    from git.exc import GitError

    from agent_loop.agents import Agent, CommandAgent
    from agent_loop.builtin import BuiltinAgent
    from agent_loop.cage import Cage
    from agent_loop.gitrepo import NightRepo, free_tag, open_repo
    from agent_loop.live import View
    from agent_loop.loop import Driver, Options
    from agent_loop.night import Night
    from agent_loop.report import print_results
    from harness.record import Lock
    from harness.signing import key_path
    from harness.single import budget_from, sandbox_warning, settings_of
    from prepare import default_data_dir

    for name in ("experiments", "hours", "noise_seeds", "min_gain"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative, not {value}")
    repo = open_repo(Path.cwd())
    settings = settings_of(args)
    if args.agent == "command" and not args.command:
        raise UsageError("--agent command needs --command 'PROGRAM ARGUMENTS'")
    if args.command and args.agent != "command":
        raise UsageError("--command goes with --agent command")
    command = args.agent == "command"
    runs = Path(repo.working_tree_dir or ".") / "runs"
    data = default_data_dir("x", 1, 1).parent
    hidden = (settings.dataset.path, data, runs, Path(repo.common_dir), key_path().parent)
    cage = Cage(
        settings.sandbox, tuple(dict.fromkeys(p.resolve() for p in hidden)), tuple(map(Path, args.agent_write)),
        args.agent_network,
    )  # fmt: skip
    agent: Agent = CommandAgent(args.command, args.agent_timeout, cage) if command else BuiltinAgent(args.seed)
    tag = args.tag or free_tag(repo, runs, datetime.date.today().strftime("%b%d").lower())
    if tag in ("single", ".", "..") or "/" in tag:
        raise UsageError(f"{tag!r} cannot be a run tag; use letters, digits, '.', '_' and '-'")
    preset = settings.preset
    options = Options(
        seed=args.seed,
        experiments=args.experiments,
        hours=args.hours,
        budget=budget_from(args),
        least_gain=args.min_gain,
        noise_seeds=preset.noise_seeds if args.noise_seeds is None else args.noise_seeds,
        second_seed=not args.no_second_seed,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    lock = Lock(runs / tag / "lock")
    console = _console()
    try:
        night = Night(runs / tag)
        rule = options.budget or preset.budget
        with View(console) as view:
            view.header(
                [
                    f"hotloop  night {tag}, branch autoresearch/{tag}, agent {agent.name}, seed {args.seed}",
                    f"         preset {preset.name} on {settings.device}, {settings.threads} threads, budget "
                    f"{rule.amount:g} {rule.kind}, data {settings.dataset.path}",
                    f"         sandbox {settings.sandbox}",
                ]
            )
            if warning := sandbox_warning(settings):
                view.note(f"WARNING: {warning}")
            try:
                Driver(night, NightRepo(repo, tag, runs / tag), agent, settings, options, view).run()
            except GitError as e:
                words = " ".join(str(getattr(e, "stderr", "") or e).split())[:300]
                raise HotloopError(f"git failed ({words}); mend it and start the same command again") from None
        print_results(night, console)
    finally:
        lock.release()
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
