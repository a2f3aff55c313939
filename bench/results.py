"""What was measured, as tables and comparisons.

A result file is pytest-benchmark's JSON (so `pytest-benchmark compare` and `histogram` read it too) with one more
key, `hotloop`: what else was checked. Files lie in `bench/results/<gpu>/`, named by date and commit, each beside its
Markdown.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.harness.errors import UsageError
from hotloop.harness.paths import project_root
from hotloop.harness.profile import Profile

__all__ = [
    "RESULTS",
    "Comparison",
    "Result",
    "Row",
    "compare",
    "compare_profiles",
    "folder_of",
    "markdown",
    "newest",
    "read",
]

RESULTS = project_root() / "bench" / "results"
OURS = ("triton", "vendor")  # as names of implementations begin
WORSE = 0.03  # a ratio may worsen by so much beyond the spread of both measurements


@dataclass(frozen=True)
class Row:
    """One benchmark. `ratio` is the reference's time over this one's, 0 where the reference did not fit into memory;
    `spread` half of p20..p80 over the median.
    """

    operator: str
    shape: str
    way: str
    implementation: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float
    roofline: float
    right: bool
    tflops: float = 0.0
    runs: int = 0
    runs_with_other_bits: int = 0

    @property
    def key(self) -> str:
        return f"{self.operator} {self.shape} {self.way} {self.implementation}"

    @property
    def spread(self) -> float:
        return (self.p80_us - self.p20_us) / (2 * self.median_us)


@dataclass(frozen=True)
class Result:
    """A file of measurements, with the machine and the commit that it is of."""

    path: Path
    machine: dict[str, Any]
    commit: str
    time: str
    rows: list[Row]
    extra: dict[str, Any]

    @property
    def device(self) -> str:
        return str(self.machine["device"])


def commit() -> str:
    """The checkout's; empty where there is none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True)
    return done.stdout.strip()


def read(path: Path) -> Result:
    """Raises UsageError for a file that is missing or no result."""
    try:
        data = json.loads(path.read_text())
        infos = [b["extra_info"] for b in data["benchmarks"] if "operator" in b["extra_info"]]
        names = {"pass": "way"} | {k: k for k in Row.__dataclass_fields__}
        rows = [Row(**{names[k]: v for k, v in i.items() if k in names}) for i in infos]
        machine, commit = data["machine_info"], data["commit_info"]["id"][:9]
        result = Result(path, machine, commit, data["datetime"][:19], rows, data.get("hotloop", {}))
        _ = result.device
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; measure with: hotloop bench run, or make gpu-check") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} is no benchmark result ({type(e).__name__}: {e}); restore it, or measure") from None
    return result


def folder_of(device: str) -> Path:
    """Of a GPU's results, by its name."""
    from hotloop.kernels.tuning import file_name

    return RESULTS / file_name(device).removesuffix(".json")


def newest(device: str, but: Path | None = None) -> Path:
    """The last committed result of a GPU. Raises UsageError where there is none."""
    folder = folder_of(device)
    found = [p for p in sorted(folder.glob("*.json")) if but is None or p.resolve() != but.resolve()]
    if not found:
        raise UsageError(f"no result of {device} is in {folder}; measure one with make gpu-check and commit it")
    return found[-1]


@dataclass(frozen=True)
class Comparison:
    """One measurement against an earlier one."""

    key: str
    base: float  # ratio to the reference, then and now
    new: float
    allowed: float
    fault: str = ""

    @property
    def change(self) -> float:
        return self.new / self.base - 1 if self.base else 0.0


def compare(base: Result, new: Result) -> list[Comparison]:
    """Each of our kernels, then and now, worst first.

    Raises:
        UsageError: results of different devices; their ratios say nothing about each other.
    """
    if base.device != new.device:
        raise UsageError(
            f"{base.path} was measured on {base.device} and {new.path} on {new.device}; only results of one kind of "
            f"GPU compare"
        )
    now = {r.key: r for r in new.rows}
    found = []
    for was in base.rows:
        if not was.implementation.startswith(OURS):
            continue
        here = now.get(was.key)
        if here is None:
            found.append(Comparison(was.key, was.ratio, 0.0, 0.0, "is missing: wrong, failed, or not run"))
            continue
        allowed = WORSE + was.spread + here.spread
        fault = ""
        if not here.right:
            fault = "is wrong"
        elif here.runs_with_other_bits > was.runs_with_other_bits:
            fault = f"no longer repeats: {here.runs_with_other_bits} of {here.runs} runs gave other bits"
        elif was.ratio and here.ratio and was.ratio / here.ratio - 1 > allowed:
            fault = f"slower against its reference by {was.ratio / here.ratio - 1:.1%}; {allowed:.1%} is allowed"
        found.append(Comparison(was.key, was.ratio, here.ratio, allowed, fault))
    return sorted(found, key=lambda c: (not c.fault, c.change))


def comparison_table(base: Result, new: Result, found: list[Comparison]) -> str:
    """Markdown, faults first."""
    faults = sum(bool(c.fault) for c in found)
    lines = [
        f"**{faults} of {len(found)} kernels worse** on {new.device}: {base.commit} -> {new.commit}"
        if faults
        else f"**No kernel is worse** ({len(found)} compared) on {new.device}: {base.commit} -> {new.commit}",
        "",
        "| kernel | ratio to its reference | now | change | allowed | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for c in found:
        lines.append(
            f"| {c.key} | {c.base:.2f}x | {c.new:.2f}x | {c.change:+.1%} | -{c.allowed:.1%} | {c.fault or 'fine'} |"
        )
    return "\n".join(lines) + "\n"


def markdown(result: Result) -> str:
    """One result as a page."""
    m = result.machine
    label = "CPU figures: a test of the rig, no measurement" if m.get("cpu_figures") else m["device"]
    versions = ", ".join(f"{k} {m[k]}" for k in ("torch", "triton", "cuda", "driver") if k in m)
    lines = [
        f"# {label}",
        "",
        f"Commit {result.commit}, {result.time} UTC, {versions}. Ceilings measured in this run: copy "
        f"{m['copy_bytes_per_s'] / 1e12:.2f} TB/s, products {m['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
        "Times are device times, medians of interleaved rounds; `x` is the compiled reference's time over this one's "
        "in the same rounds; `roofline` is the time of the bytes and operations at those ceilings over this one's; "
        "TFLOP/s count the operations of matrix products that are not masked.",
        "",
        "| operator | shape | pass | implementation | median us (p20-p80) | x | roofline | TFLOP/s | other bits |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in result.rows:
        ratio = f"{r.ratio:.2f}" if r.ratio else "reference does not fit"
        bits = f"{r.runs_with_other_bits} of {r.runs}" if r.runs else ""
        lines.append(
            f"| {r.operator} | {r.shape} | {r.way} | {r.implementation} "
            f"| {r.median_us:.1f} ({r.p20_us:.1f}-{r.p80_us:.1f}) | {ratio} | {r.roofline:.0%} "
            f"| {f'{r.tflops:.0f}' if r.tflops else ''} | {bits} |"
        )
    for name, text in result.extra.get("pages", {}).items():
        lines += ["", f"## {name}", "", text.rstrip()]
    return "\n".join(lines) + "\n"


def compare_profiles(base: Profile, new: Profile) -> Comparison:
    """The step of two profiles of one kind of GPU: what each set that was chosen gained on plain torch.compile.

    Raises:
        UsageError: of different GPUs or presets, or a profile that has no such comparison.
    """
    for name in ("gpu", "preset"):
        if base.body["depends"].get(name) != new.body["depends"].get(name):
            raise UsageError(f"{base.path} and {new.path} are of another {name}, so they do not compare")
    ratios = []
    for profile in (base, new):
        found = profile.body.get("whole", {}).get("plain", {}).get("ratios", [])
        if not found and profile.selection:
            raise UsageError(f"{profile.path} says nothing of the whole step; make it anew with: hotloop tune")
        ratios.append(sorted(found) or [1.0])  # nothing was chosen: plain itself
    was, now = (statistics.median(r) for r in ratios)
    spread = sum((r[int(0.8 * (len(r) - 1))] - r[int(0.2 * (len(r) - 1))]) / (2 * r[len(r) // 2]) for r in ratios)
    allowed = WORSE + spread
    slower = was / now - 1
    fault = f"slower against plain torch.compile by {slower:.1%}; {allowed:.1%} is allowed" if slower > allowed else ""
    chosen = " ".join(f"{part}={name}" for part, name in sorted(new.selection.items())) or "plain"
    return Comparison(f"the whole step with {chosen}", was, now, allowed, fault)
