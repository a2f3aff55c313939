"""`hotloop bench`: the kernels and the step, proven, measured and compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hotloop.harness.command_line import exit_status
from hotloop.harness.errors import UsageError

__all__ = ["add_parsers", "main"]

TRIAL = "on a CPU, at a minute size: shows that all of it runs, and measures nothing"


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """The parts of `bench`, as subcommands of a parser; each sets `run`."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    run = parts.add_parser("run", help="time the kernels on this GPU against their references and peers")
    run.add_argument("--operator", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    run.add_argument(
        "--shape", action="append", default=[], metavar="CLASS", help="baseline, long, ...; may be repeated"
    )
    run.add_argument("--out", type=Path, default=Path("bench.json"), metavar="FILE")
    run.set_defaults(run=_run)

    check = parts.add_parser("check", help="everything that needs a GPU, part by part (make gpu-check)")
    check.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE")
    check.add_argument("--data", type=Path, metavar="DIR", help="rows of 2048 tokens; else of the built-in text")
    check.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results")
    check.add_argument("--part", action="append", metavar="NAME", help="only this; may be repeated")
    check.add_argument(
        "--minutes", type=float, default=1440.0, metavar="N", help="begin no part that may take longer than is left"
    )
    check.add_argument("--again", action="store_true", help="forget what was done here")
    check.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial of every part, which measures nothing"
    )
    check.set_defaults(run=_check)

    attention = parts.add_parser(
        "attention", help="every attention backend that is here; kernels/tuned keeps their order"
    )
    attention.add_argument("--shape", action="append", default=[], metavar="CLASS", help="only this; may be repeated")
    attention.add_argument("--out", type=Path, default=Path("attention.json"), metavar="FILE")
    attention.add_argument("--minutes", type=float, default=60.0, metavar="N", help="at most so long (default: 60)")
    attention.add_argument("--repeats", type=int, default=1000, metavar="N", help="compared to the bit (default: 1000)")
    attention.add_argument("--trial", action="store_true", help=TRIAL)
    attention.set_defaults(run=_attention)

    compare = parts.add_parser(
        "compare", help="fail when a kernel got worse; BASE `committed` is the newest result here"
    )
    compare.add_argument("base", metavar="BASE")
    compare.add_argument("new", type=Path, metavar="NEW")
    compare.set_defaults(run=_compare)

    plot = parts.add_parser("plot", help="time and share of the roofline over results, oldest first")
    plot.add_argument("files", type=Path, nargs="+", metavar="FILE")
    plot.add_argument("--out", type=Path, default=Path("bench.png"), metavar="PNG")
    plot.set_defaults(run=_plot)

    gate = parts.add_parser("gate", help="compile every shipped configuration without a GPU: spills, shared memory")
    gate.add_argument("--step", action="store_true", help="instead, train.py's whole step as torch compiles it")
    gate.add_argument("--all", action="store_true", help="for every architecture, not only those of CI")
    gate.add_argument("--write", action="store_true", help="write what was found to bench/results, and into the docs")
    gate.set_defaults(run=_gate)

    tune = parts.add_parser("tune", help="search launch configurations; writes kernels/tuned/<gpu>.json")
    tune.add_argument("--operator", action="append", default=[], metavar="KERNEL")
    _add_minutes(tune)
    tune.set_defaults(run=_tune)

    step = parts.add_parser("step", help="one training step of train.py by operator")
    step.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE")
    step.add_argument("--preset", choices=["h100", "laptop"], help="default: by device")
    step.add_argument("--page", type=Path, metavar="FILE", help="write the page there too")
    step.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a constant of train.py")
    step.add_argument("--fast-nondeterministic", action="store_true", help="do not ask for results that repeat")
    step.set_defaults(run=_step)

    switches = parts.add_parser(
        "switches", help="which kernels are worth having in a whole step, by greedy selection; 8 bits; CUDA graphs"
    )
    switches.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE")
    _add_minutes(switches)
    switches.set_defaults(run=_switches)

    repeats = parts.add_parser("determinism", help="what results that repeat to the bit cost a whole step")
    repeats.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE")
    repeats.add_argument("--preset", choices=["h100", "laptop"], help="default: by device")
    repeats.add_argument("--pairs", type=int, default=3, metavar="N")
    repeats.set_defaults(run=_determinism)

    side = parts.add_parser("baseline", help="train.py beside the same model in plain PyTorch: speed, memory, score")
    _add_comparison(side)
    side.add_argument("--pairs", type=int, default=1, metavar="N")
    side.add_argument("--free", action="store_true", help="plain PyTorch a second time, without repeatable results")
    side.set_defaults(run=_baseline)

    beside = parts.add_parser("overheads", help="an experiment's time beside its training, against what it should be")
    beside.add_argument("tags", nargs="*", metavar="TAG", help="nights under runs/; none for two short ones of its own")
    beside.add_argument("--night", action="append", choices=["plain", "ahead"], help="of its own; default: both")
    beside.add_argument("--experiments", type=int, default=2, metavar="N", help="of each, beside its baseline")
    beside.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE")
    beside.add_argument("--preset", default="auto", choices=["auto", "h100", "laptop"])
    beside.add_argument("--data", metavar="DIR")
    beside.add_argument("--page", type=Path, metavar="FILE", help="write the page there too")
    beside.set_defaults(run=_overheads)

    quality = parts.add_parser("quality", help="train.py against plain PyTorch under several seeds: equal quality?")
    _add_comparison(quality)
    quality.add_argument("--seeds", type=int, default=5, metavar="N")
    quality.add_argument("--tiny", action="store_true", help="a minute size, for kernels through the interpreter")
    quality.add_argument("--out", type=Path, metavar="DIR", help="for the JSON; default: bench/results, --tiny none")
    quality.set_defaults(run=_quality)

    walls = parts.add_parser("sandbox", help="training speed and start-up inside the sandbox against outside")
    walls.add_argument("--pairs", type=int, default=7, metavar="N")
    walls.add_argument("--steps", type=int, default=40, metavar="N", help="optimizer steps of each training")
    walls.add_argument("--preset", default="auto", choices=["auto", "h100", "laptop"])
    walls.add_argument("--data", metavar="DIR")
    walls.set_defaults(run=_sandbox)

    smoke = parts.add_parser("smoke", help="the rig itself on a CPU, at tiny shapes: no measurement")
    smoke.add_argument("--out", type=Path, default=Path("smoke.json"), metavar="FILE")
    smoke.set_defaults(run=_smoke)


def _add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        metavar="N",
        help="at most so long; then again to go on (default: 60)",
    )
    parser.add_argument("--notes", type=Path, metavar="FILE", help="what was found so far; default: in bench/results")
    parser.add_argument("--trial", action="store_true", help=TRIAL)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="auto", choices=["auto", "h100", "laptop"])
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--tokens", type=float, metavar="N", help="of each training")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="train.py with a constant changed, beside train.py as it is; may be repeated",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page there too")


def _run(args: argparse.Namespace) -> int:
    from hotloop.bench import results
    from hotloop.bench.check.processes import ALL_KERNELS, run_kernels
    from hotloop.harness.proof import device as dev
    from hotloop.harness.proof.operators import OPERATORS

    unknown = sorted(set(args.operator) - set(OPERATORS))
    if unknown:
        raise UsageError(f"no operator is called {unknown[0]}; the table has {', '.join(OPERATORS)}")
    dev.require_gpu()
    more = [f"--shape={s}" for s in args.shape]
    log = args.out.with_suffix(".log")
    code = run_kernels(args.out.resolve(), 3600, log, args.operator, more, ALL_KERNELS)
    if args.out.exists():
        print(results.markdown(results.read(args.out)))
    if code:
        print(f"hotloop: some failed and were not timed; see {log}", file=sys.stderr)
    return 1 if code else 0


def _attention(args: argparse.Namespace) -> int:
    from hotloop.bench.attention import main as attention

    _check_minutes(args)
    return attention(args.out, args.shape, args.minutes, args.repeats, args.trial)


def _check(args: argparse.Namespace) -> int:
    from hotloop.bench.check.command import main as check
    from hotloop.bench.check.parts import PARTS
    from hotloop.harness.proof import device as dev
    from hotloop.harness.single import read_train_source

    _check_minutes(args)
    if unknown := sorted(set(args.part or ()) - set(PARTS)):
        raise UsageError(f"no part is called {unknown[0]}; they are {', '.join(PARTS)}")
    data = args.data.resolve() if args.data else None
    if data and not data.exists():
        raise UsageError(f"there is no prepared data at {data}; leave it out, or run: hotloop prepare --out {data}")
    if args.device == "cuda":
        dev.require_gpu()
    read_train_source(args.train)
    return check(args.train.resolve(), data, args.out, args.part, args.minutes, args.again, args.device)


def _compare(args: argparse.Namespace) -> int:
    from hotloop.bench import results

    new = results.read(args.new)
    base = results.read(results.newest(new.device, but=args.new) if args.base == "committed" else Path(args.base))
    found = results.compare(base, new)
    print(results.comparison_table(base, new, found), end="")
    return 1 if any(c.fault for c in found) else 0


def _plot(args: argparse.Namespace) -> int:
    from hotloop.bench import results

    results.plot([results.read(p) for p in args.files], args.out)
    print(args.out)
    return 0


def _gate(args: argparse.Namespace) -> int:
    from hotloop.bench.gate import configurations as gate
    from hotloop.bench.gate import step as gate_step

    return gate_step.main(args.all, args.write) if args.step else gate.main(args.all, args.write)


def _tune(args: argparse.Namespace) -> int:
    from hotloop.harness.proof import device as dev
    from hotloop.harness.tuning.configurations import KERNELS
    from hotloop.harness.tuning.configurations import main as tune

    _check_minutes(args)
    if unknown := sorted(set(args.operator) - set(KERNELS)):
        raise UsageError(f"no kernel is called {unknown[0]}; those that can be tuned: {', '.join(KERNELS)}")
    if args.trial:
        notes = (args.notes or Path("trial.json")).resolve()
        return tune(args.operator, notes, args.minutes, table="hotloop.bench.check.trial:KERNELS")
    dev.require_gpu()
    return tune(args.operator, (args.notes or _notes("tune")).resolve(), args.minutes)


def _step(args: argparse.Namespace) -> int:
    import torch

    from hotloop.bench.step import main as step
    from hotloop.harness.single import read_train_source
    from hotloop.harness.tuning.step import settle

    preset = args.preset or ("h100" if torch.cuda.is_available() else "laptop")
    read_train_source(args.train)
    settle(not args.fast_nondeterministic)
    busy, page = step(args.train, preset, args.set)
    _shown(page, args)
    return 0 if busy else 1


def _determinism(args: argparse.Namespace) -> int:
    import torch

    from hotloop.bench.switches import determinism
    from hotloop.harness.single import read_train_source

    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    read_train_source(args.train)
    preset = args.preset or ("h100" if torch.cuda.is_available() else "laptop")
    return determinism(args.train.resolve(), preset, args.pairs)


def _switches(args: argparse.Namespace) -> int:
    from hotloop.bench.switches import EXTRAS, stamp, switches
    from hotloop.harness.proof import device as dev
    from hotloop.harness.single import read_train_source
    from hotloop.harness.tuning.notes import Notes

    _check_minutes(args)
    read_train_source(args.train)
    preset, extras, train = "laptop" if args.trial else "h100", () if args.trial else EXTRAS, args.train.resolve()
    if not args.trial:
        dev.require_gpu()
    path = args.notes or (Path("trial.json") if args.trial else _notes("switches"))
    notes = Notes(path, stamp(train, preset))
    return switches(train, preset, notes, path.with_name("chosen.json"), args.minutes, extras)


def _notes(name: str) -> Path:
    """Where a long measurement on this GPU keeps what it found."""
    from hotloop.bench import results
    from hotloop.harness.proof import device as dev

    return results.folder_of(dev.identity()["device"]) / "work" / f"{name}.json"


def _check_minutes(args: argparse.Namespace) -> None:
    if not 0 < args.minutes < float("inf"):
        raise UsageError(f"--minutes must be a positive number, not {args.minutes}")


def _baseline(args: argparse.Namespace) -> int:
    from hotloop.bench.versus_plain import main as beside
    from hotloop.harness.single import settings_from

    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    if args.free and args.changes:
        raise UsageError("--free is of plain PyTorch, and --set compares train.py with itself")
    settings = settings_from(preset=args.preset, data=args.data)
    return _shown(beside(settings, _tokens(args), args.pairs, args.free, changes=args.changes), args)


def _overheads(args: argparse.Namespace) -> int:
    from hotloop.bench.overheads import main as overheads
    from hotloop.harness.single import read_train_source, settings_from

    settings = None if args.tags else settings_from(preset=args.preset, data=args.data)
    if not args.tags:
        read_train_source(args.train)
    if args.experiments < 1:
        raise UsageError(f"--experiments must be at least 1, not {args.experiments}")
    nights = args.night or ["plain", "ahead"]
    good, page = overheads(args.tags, settings, args.train, nights=nights, experiments=args.experiments)
    _shown(page, args)
    return 0 if good else 1


def _quality(args: argparse.Namespace) -> int:
    from hotloop.bench.quality import main as quality
    from hotloop.bench.results import RESULTS
    from hotloop.harness.single import settings_from

    out = args.out or (None if args.tiny else RESULTS)
    settings = settings_from(preset=args.preset, data=args.data)
    found, page = quality(settings, args.seeds, _tokens(args), args.tiny, out, changes=args.changes)
    _shown(page, args)
    return 0 if found.within_noise else 1


def _tokens(args: argparse.Namespace) -> float | None:
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        raise UsageError(f"--tokens must be a positive number, not {args.tokens}")
    tokens: float | None = args.tokens
    return tokens


def _shown(page: str, args: argparse.Namespace) -> int:
    if args.page:
        args.page.write_text(page)
    print(page)
    return 0


def _sandbox(args: argparse.Namespace) -> int:
    from hotloop.bench.sandbox import main as sandbox

    if args.pairs < 1 or args.steps < 1:
        raise UsageError("--pairs and --steps must be at least 1")
    return sandbox(args.pairs, args.steps, args.preset, args.data)


def _smoke(args: argparse.Namespace) -> int:
    from hotloop.bench.check.processes import smoke

    return smoke(args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m bench PART`."""
    parser = argparse.ArgumentParser(prog="hotloop bench", description=__doc__)
    add_parsers(parser)
    args = parser.parse_args(argv)
    return exit_status(lambda: args.run(args))
