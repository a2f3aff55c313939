"""What a night leaves to look at: results.tsv, progress.png, and a table."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import branch_of
from hotloop.agent_loop.night import Night
from hotloop.agent_loop.report.tally import Progress, Tally
from hotloop.harness.files import write_whole
from hotloop.harness.records.model import Decision
from hotloop.harness.text import forgiving, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "draw", "print_results", "tsv_text", "write_progress", "write_tsv"]

COLOURS = {"keep": "green", "discard": "bright_black", "measured": "cyan", "marginal": "yellow"}


def tsv_text(night: Night) -> str:
    """results.tsv in karpathy/autoresearch's five columns; failed runs have 0.000000 and 0.0, as there.

    Commit and status are hotloop's own words; a description is anybody's.
    """
    lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
    for row in night.tried():
        bpb = row.val_bpb or 0.0
        memory = row.outcome.training.peak_mb / 1024 if row.val_bpb else 0.0
        lines.append(f"{row.commit[:7]}\t{bpb:.6f}\t{memory:.1f}\t{row.decision}\t{_cell(row.description)}")
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    """Words as pandas.read_csv and a spreadsheet read them back whole.

    A quote at the beginning would swallow what follows, a word for "not available" would become nothing, and what
    begins like a formula would be one; an apostrophe before them says that they are text.
    """
    line = one_line(words) or "(no description)"
    begins = line[0] in '"=+-@' or line.strip().lower() in _NOTHING
    return f"'{line}" if begins else line


# What pandas takes for no value, in lower case.
_NOTHING = {
    "#n/a", "#n/a n/a", "#na", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan", "none", "null",
}  # fmt: skip


def write_tsv(night: NightFolder) -> Path:
    path = night.folder / "results.tsv"
    write_whole(path, tsv_text(night).encode())
    return path


def write_progress(night: NightFolder) -> Path | None:
    """progress.png: every score, the kept ones named, the best so far as a line. None without a score."""
    tally = Tally(night)
    found = tally.progress
    if found is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, tally, found)
    path = night.folder / "progress.png"
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font has not is a box
        figure.savefig(drawn, dpi=120)
    write_whole(path, drawn.getvalue())
    return path


def _draw(figure: Figure, tally: Tally, found: Progress) -> None:
    axes = figure.subplots()
    kept, others = found.kept, found.others
    if others:
        axes.scatter([r.number for r, _ in others], [b for _, b in others], c="#bbbbbb", s=22, label="Discarded")
    if kept:
        x, best = [x for x, _ in found.line], [b for _, b in found.line]
        axes.step(x, best, where="post", color="#27ae60", lw=2, alpha=0.7, label="Best")
        axes.scatter(x[:-1], best[:-1], c="#2ecc71", s=60, edgecolors="black", linewidths=0.5, zorder=4, label="Kept")
        for row, bpb in kept:
            axes.annotate(
                one_line(row.description, 44), (row.number, bpb), textcoords="offset points", xytext=(7, 7), fontsize=9,
                color="#1a7a3a", rotation=18, parse_math=False,
            )  # fmt: skip
        if floor := found.floor:
            low, high = [b - floor for b in best], [b + floor for b in best]
            label = f"Noise floor ({floor:.4f})"
            axes.fill_between(x, low, high, step="post", color="#3498db", alpha=0.10, zorder=0, label=label)
    axes.set_ylim(found.low, found.high)
    axes.set_xlim(-0.5, found.end)
    axes.locator_params(axis="x", integer=True)
    where = ", ".join("CPU" if name.startswith("CPU") else name for name in tally.where)
    count = f"{len(tally.experiments)} experiments, {len(tally.kept)} kept"
    axes.set_title(f"{tally.night.folder.name}: {count} ({where} figures)", parse_math=False)
    axes.set_xlabel("Experiment")
    axes.set_ylabel("val_bpb (lower is better)")
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right", fontsize=9)


def draw(folder: str, repo: str) -> None:
    """All that is drawn, from records that may be written at the same time. Runs in a process of its own."""
    from git import Repo

    from hotloop.agent_loop.report.page import write_page

    night = NightFolder.reading(Path(folder))
    write_progress(night)
    with Repo(repo) as opened:
        write_page(night, opened)


def print_results(night: NightFolder, console: Console) -> None:
    """The results table, and where everything is."""
    forgiving(console.file)
    table = Table(title=Text(f"Night {night.folder.name}"), title_justify="left", pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("decision")
    table.add_column("val_bpb", justify="right")
    table.add_column("gain", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    for row in night.rows():
        colour = COLOURS.get(row.decision, "red")
        bpb = f"{row.val_bpb:.6f}" if row.val_bpb is not None else "-"
        gain = f"{row.gain:+.6f}" if row.gain is not None else ""
        texts = (str(row.number), row.decision, bpb, gain, row.description, row.reason)
        table.add_row(*(Text(t, style=colour if i == 1 else "") for i, t in enumerate(texts)))
    console.print(table)
    for words in dict.fromkeys(r.outcome.open_text for r in night.rows() if r.outcome.open_text):
        console.print(f"WARNING: {words}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    kept = [r.val_bpb for r in night.tried() if r.decision == Decision.KEEP and r.val_bpb is not None]
    if len(kept) > 1:
        share = (kept[0] - kept[-1]) / kept[0]
        console.print(Text(f"val_bpb {kept[0]:.6f} -> {kept[-1]:.6f} ({share:.2%} better than the baseline)"))
    raced = [r for r in night.rows() if r.decision == Decision.RACED]
    if raced:
        from hotloop.agent_loop.race import false_stops, lessons

        rate = false_stops(lessons(night, night.noise().floor_bpb))
        console.print(Text(f"racing: stopped {len(raced)}; {rate}"), soft_wrap=True)
    for words in night.unheard():
        console.print(Text(f"WARNING: {words}", style="bold red"), soft_wrap=True)
    console.print(Text(f"branch  {branch_of(night.folder.name)}"))
    for name in ("results.tsv", "progress.png", "report.html", "records.jsonl"):
        if (night.folder / name).exists():
            console.print(Text(f"        {night.folder / name}"), soft_wrap=True)
