"""`hotloop bench`: the kernels and the step, measured and compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hotloop.harness.command_line import exit_status
from hotloop.harness.errors import UsageError

__all__ = ["add_parsers", "main"]


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """The parts of `bench`, as subcommands of a parser; each sets `run`."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    run = parts.add_parser("run", help="time the kernels on this GPU against plain PyTorch and other libraries")
    run.add_argument("--operator", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    run.add_argument(
        "--shape", action="append", default=[], metavar="CLASS", help="baseline, long, ...; may be repeated"
    )
    run.add_argument("--out", type=Path, default=Path("bench.json"), metavar="FILE")
    run.set_defaults(run=_run)

    check = parts.add_parser("check", help="check and measure everything that needs a GPU (make gpu-check)")
    _add_train(check)
    check.add_argument("--data", type=Path, metavar="DIR", help="rows of 2048 tokens (default: built-in text)")
    check.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: bench/results)")
    check.add_argument("--part", action="append", metavar="NAME", help="only this part; may be repeated")
    check.add_argument(
        "--minutes",
        type=float,
        default=1440.0,
        metavar="N",
        help="stop after N minutes (default: a day)",
    )
    check.add_argument("--again", action="store_true", help="begin anew: forget the parts that are done")
    check.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try it")
    check.set_defaults(run=_check)

    compare = parts.add_parser("compare", help="fail when a kernel got slower than in an earlier result")
    compare.add_argument("base", metavar="BASE", help="a result file; `committed`: the newest one in bench/results")
    compare.add_argument("new", type=Path, metavar="NEW", help="the result file to judge")
    compare.add_argument("--profile", action="store_true", help="both are profiles that `hotloop tune` wrote")
    compare.set_defaults(run=_compare)

    gate = parts.add_parser("gate", help="compile and check every shipped kernel, without a GPU")
    gate.add_argument("--step", action="store_true", help="compile train.py's whole training step instead")
    gate.add_argument("--all", action="store_true", help="for every supported GPU architecture, not only those of CI")
    gate.add_argument("--write", action="store_true", help="write the findings to bench/results and into docs/")
    gate.set_defaults(run=_gate)

    step = parts.add_parser("step", help="time one training step of train.py, by operator")
    _add_train(step)
    step.add_argument("--preset", choices=["h100", "laptop"], help="(default: h100 with a GPU, laptop without)")
    step.add_argument("--page", type=Path, metavar="FILE", help="also write the page that is shown to FILE")
    step.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a constant of train.py")
    step.add_argument("--fast-nondeterministic", action="store_true", help="let results not repeat to the bit")
    step.set_defaults(run=_step)

    repeats = parts.add_parser("determinism", help="measure what repeating to the bit costs a training step")
    _add_train(repeats)
    repeats.add_argument("--preset", choices=["h100", "laptop"], help="(default: h100 with a GPU, laptop without)")
    repeats.add_argument("--pairs", type=int, default=3, metavar="N", help="of measurements (default: 3)")
    repeats.set_defaults(run=_determinism)

    baseline = parts.add_parser("baseline", help="compare train.py with plain PyTorch: speed, memory, score")
    _add_comparison(baseline)
    baseline.add_argument("--pairs", type=int, default=1, metavar="N", help="of trainings (default: 1)")
    baseline.add_argument("--free", action="store_true", help="also plain PyTorch that need not repeat to the bit")
    baseline.set_defaults(run=_baseline)

    overheads = parts.add_parser("overheads", help="measure what an experiment takes beside its training")
    overheads.add_argument("tags", nargs="*", metavar="TAG", help="nights (default: two short ones of its own)")
    overheads.add_argument(
        "--night", action="append", choices=["plain", "ahead"], help="of its own nights (default: both)"
    )
    overheads.add_argument("--experiments", type=int, default=2, metavar="N", help="of its own nights (default: 2)")
    _add_train(overheads)
    _add_data(overheads)
    overheads.add_argument("--page", type=Path, metavar="FILE", help="also write the page that is shown to FILE")
    overheads.set_defaults(run=_overheads)

    quality = parts.add_parser("quality", help="compare train.py's scores with plain PyTorch's under several seeds")
    _add_comparison(quality)
    quality.add_argument("--seeds", type=int, default=5, metavar="N", help="(default: 5)")
    quality.add_argument("--tiny", action="store_true", help="at a tiny size, with the kernels in Triton's interpreter")
    quality.add_argument(
        "--out", type=Path, metavar="DIR", help="where the JSON goes (default: bench/results; with --tiny nowhere)"
    )
    quality.set_defaults(run=_quality)

    sandbox = parts.add_parser(
        "sandbox", help="measure what the sandbox costs: training speed and start-up inside and outside"
    )
    sandbox.add_argument("--pairs", type=int, default=7, metavar="N", help="trainings inside and outside (default: 7)")
    sandbox.add_argument(
        "--steps", type=int, default=40, metavar="N", help="optimizer steps of each training (default: 40)"
    )
    _add_data(sandbox)
    sandbox.set_defaults(run=_sandbox)

    smoke = parts.add_parser(
        "smoke", help="try the benchmark itself on a CPU at tiny shapes, without measuring anything"
    )
    smoke.add_argument("--out", type=Path, default=Path("smoke.json"), metavar="FILE")
    smoke.set_defaults(run=_smoke)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, default=Path("train.py"), metavar="FILE", help="(default: train.py)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", default="auto", choices=["auto", "h100", "laptop"], help="auto: h100 with a GPU, laptop without"
    )
    parser.add_argument("--data", metavar="DIR", help="a folder that `hotloop prepare` made (default: the preset's)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--tokens", type=float, metavar="N", help="of each training (default: the preset's budget)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="compare train.py with a constant changed and train.py as it is; may be repeated",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the page that is shown to FILE")


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
    from hotloop.harness import profile

    if args.profile:
        base, new = profile.read(Path(args.base)), profile.read(args.new)
        found = results.compare_profiles(base, new)
        verdict = found.fault or "fine"
        print(f"{found.key}: {found.base:.3f}x plain torch.compile before, {found.new:.3f}x now: {verdict}")
        return 1 if found.fault else 0
    result = results.read(args.new)
    was = results.read(results.newest(result.device, but=args.new) if args.base == "committed" else Path(args.base))
    compared = results.compare(was, result)
    print(results.comparison_table(was, result, compared), end="")
    return 1 if any(c.fault for c in compared) else 0


def _gate(args: argparse.Namespace) -> int:
    from hotloop.bench.gate import configurations as gate
    from hotloop.bench.gate import step as gate_step

    return gate_step.main(args.all, args.write) if args.step else gate.main(args.all, args.write)


def _step(args: argparse.Namespace) -> int:
    from hotloop.harness.profile import enter, find
    from hotloop.harness.single import machine_from, read_train_source

    read_train_source(args.train)
    machine = machine_from(preset=args.preset or "auto")
    enter(find(machine.facts)[0])  # before the kernels are imported
    from hotloop.bench.step import main as step
    from hotloop.harness.tuning.step import settle

    settle(not args.fast_nondeterministic)
    busy, page = step(args.train, machine.preset.name, args.set)
    _shown(page, args)
    return 0 if busy else 1


def _determinism(args: argparse.Namespace) -> int:
    from hotloop.bench.determinism import determinism
    from hotloop.harness.single import machine_from, read_train_source

    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    source = read_train_source(args.train)
    return determinism(source, machine_from(preset=args.preset or "auto"), args.pairs)


def _check_minutes(args: argparse.Namespace) -> None:
    if not 0 < args.minutes < float("inf"):
        raise UsageError(f"--minutes must be a positive number, not {args.minutes}")


def _baseline(args: argparse.Namespace) -> int:
    from hotloop.bench.versus_plain import main as compare_models
    from hotloop.harness.single import settings_from

    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    if args.free and args.changes:
        raise UsageError("--free is of plain PyTorch, and --set compares train.py with itself")
    settings = settings_from(preset=args.preset, data=args.data)
    return _shown(compare_models(settings, _tokens(args), args.pairs, args.free, changes=args.changes), args)


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
