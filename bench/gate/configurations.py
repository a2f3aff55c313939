"""The compile gate: every shipped configuration of every kernel, compiled without a GPU.

    hotloop bench gate            compile, print, compare with bench/results/compile.json; exit 1 on a fault
    hotloop bench gate --all      for every architecture of kernels/architectures.py, not only those of CI
    hotloop bench gate --write    for every architecture, and write that file

A fault is: a spill (a stack frame or local memory), more shared memory than a block gets, a missing matrix instruction,
or a configuration that the committed file does not know. Register counts are shown and compared, and fail nothing.
Triton keeps its compilations by source hash, so a second run costs seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.paths import project_root
from hotloop.harness.text import one_line

__all__ = ["COMMITTED", "compile_all", "faults", "main"]

COMMITTED = project_root() / "bench" / "results" / "compile.json"
# Loads by pointers with the most and with the least shared memory, and by descriptors for an H100: what CI has
# time for. The committed table has all architectures.
IN_CI = (80, 90, 120)


def modules() -> list[str]:
    """The kernel files that ship Triton kernels: those that list them."""
    folder = project_root() / "kernels"
    files = (p.relative_to(folder) for p in folder.rglob("*.py") if "\ndef compile_cases(" in p.read_text())
    return sorted(".".join(("hotloop.kernels", *p.with_suffix("").parts)) for p in files)


def _cases(module: str) -> list[Any]:
    import importlib

    cases: list[Any] = importlib.import_module(module).compile_cases()
    return cases


def _enter() -> None:
    # Before Triton is imported: a torch without CUDA goes without it otherwise.
    os.environ["HOTLOOP_KERNELS"] = "triton"
    os.environ.pop("TRITON_INTERPRET", None)


def _list(module: str) -> list[tuple[str, int, int]]:
    return [(module, i, capability) for i, case in enumerate(_cases(module)) for capability in case.capabilities]


def _compile(job: tuple[str, int, int]) -> tuple[str, dict[str, Any]]:
    """Compile one configuration; (its name, its facts)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hotloop.kernels.architectures import ARCHITECTURES
    from hotloop.kernels.compiling import resources

    module, index, capability = job
    case = _cases(module)[index]
    name = f"{module.removeprefix('hotloop.kernels.')} {case.key} sm_{capability}"
    signature = case.signature | dict.fromkeys(case.constants, "constexpr")
    # As at the shapes that matter: addresses and sizes are multiples of 16, so loads are wide and can be pipelined.
    names = case.function.arg_names
    sixteens = [n for n, kind in case.signature.items() if kind.startswith(("*", "i"))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in sixteens}
    source = ASTSource(fn=case.function, signature=signature, constexprs=case.constants, attrs=attributes)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    except Exception as e:  # whatever the compiler raises is this configuration's fault, and is shown
        return name, {"error": f"{type(e).__name__}: {one_line(str(e), 300)}"}
    facts: dict[str, Any] = dict(resources(kernel.asm["cubin"]))
    facts["shared"] = kernel.metadata.shared
    facts["matrix_instructions"] = kernel.asm["ptx"].count(ARCHITECTURES[capability].matrix_instruction)
    if case.tensor_cores:
        facts["tensor_cores"] = True
    return name, facts


def compile_all(architectures: Collection[int], workers: int | None = None) -> dict[str, dict[str, Any]]:
    """Name -> facts of every shipped configuration for these, in processes of their own."""
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_enter) as pool:
        jobs = [job for found in pool.map(_list, modules()) for job in found if job[2] in architectures]
        return dict(sorted(pool.map(_compile, jobs)))


def capability_of(name: str) -> int:
    return int(name.rsplit("sm_", 1)[1])


def faults(found: dict[str, dict[str, Any]], committed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Name -> what is wrong with it."""
    from hotloop.kernels.architectures import ARCHITECTURES

    wrong = {}
    for name, facts in found.items():
        card = ARCHITECTURES[capability_of(name)]
        was = committed.get(name)
        if "error" in facts:
            wrong[name] = f"does not compile: {facts['error']}"
        elif facts["stack"]:
            wrong[name] = f"spills: {facts['stack']} bytes of stack" + (
                f" (committed: {was['stack']})" if was and "stack" in was else ""
            )
        elif facts["shared"] > card.shared:
            wrong[name] = f"{facts['shared']} bytes of shared memory; a block gets {card.shared}"
        elif facts.get("tensor_cores") and not facts["matrix_instructions"]:
            wrong[name] = f"no {card.matrix_instruction}"
        elif was is None:
            wrong[name] = "is not in the committed file; run: make gate-write"
    for name in committed.keys() - found.keys():
        wrong[name] = "is in the committed file and no longer ships; run: make gate-write"
    return wrong


def read_committed(path: Path = COMMITTED) -> dict[str, Any]:
    """Triton version -> name -> facts. Raises UsageError for a file that is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} cannot be read ({e}); restore it: git checkout {path}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is no table of compilations; restore it: git checkout {path}")
    return data


def main(every: bool = False, write: bool = False) -> int:
    """Compile, print, compare. 0 when all is well."""
    from hotloop.kernels.architectures import ARCHITECTURES

    try:
        import triton
    except ImportError:
        raise HotloopError("the compile gate needs Triton; run: make install") from None
    from rich.console import Console
    from rich.table import Table

    everything = read_committed()
    architectures = ARCHITECTURES if every or write else IN_CI
    committed = {
        name: facts
        for name, facts in everything.get(triton.__version__, {}).items()
        if capability_of(name) in architectures
    }
    found = compile_all(architectures)
    wrong = faults(found, found if write else committed)
    table = Table(title=f"Shipped configurations, Triton {triton.__version__}", title_justify="left")
    for head in ("configuration", "registers", "stack", "shared", "matrix", ""):
        table.add_column(head, justify="left" if head in ("configuration", "") else "right", overflow="fold")
    for name, facts in found.items():
        registers = str(facts.get("registers", "-"))
        was = committed.get(name, {}).get("registers")
        if was is not None and was != facts.get("registers"):
            registers = f"{was} -> {registers}"
        cells = [str(facts.get(k, "-")) for k in ("stack", "shared", "matrix_instructions")]
        table.add_row(name, registers, *cells, f"[red]{wrong[name]}[/]" if name in wrong else "[green]fine[/]")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for name in sorted(wrong):
        print(f"hotloop: {name}: {wrong[name]}", file=sys.stderr)
    if write and not wrong:
        everything[triton.__version__] = found
        COMMITTED.parent.mkdir(parents=True, exist_ok=True)
        COMMITTED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
        print(f"written: {COMMITTED}")
    print(f"{len(found)} configurations, {len(wrong)} faults")
    return 1 if wrong else 0
