"""What a night leaves to look at: results.tsv, progress.png, and a table."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hotloop.agent_loop.gitrepo import branch_of
from hotloop.agent_loop.night import Night, Row
from hotloop.harness.files import write_whole
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
        memory = row.outcome.peak_mb / 1024 if row.outcome and row.val_bpb else 0.0
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


def write_tsv(night: Night) -> Path:
    path = night.folder / "results.tsv"
    write_whole(path, tsv_text(night).encode())
    return path


def write_progress(night: Night) -> Path | None:
    """progress.png: every score, the kept ones named, the best so far as a line. None without a score."""
    rows = night.tried()
    scored = [(i, r, r.val_bpb) for i, r in enumerate(rows) if r.val_bpb is not None]
    if not scored:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, night, rows, scored)
    path = night.folder / "progress.png"
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font has not is a box
        figure.savefig(drawn, dpi=120)
    write_whole(path, drawn.getvalue())
    return path


def _draw(figure: Figure, night: Night, rows: list[Row], scored: list[tuple[int, Row, float]]) -> None:
    axes = figure.subplots()
    kept = [(i, r, b) for i, r, b in scored if r.decision == "keep"]
    others = [(i, b) for i, r, b in scored if r.decision != "keep"]
    if others:
        axes.scatter([i for i, _ in others], [b for _, b in others], c="#bbbbbb", s=22, zorder=2, label="Discarded")
    if kept:
        x, best = [i for i, _, _ in kept], [b for _, _, b in kept]
        axes.step([*x, len(rows) - 1], [*best, best[-1]], where="post", color="#27ae60", lw=2, alpha=0.7, label="Best")
        axes.scatter(x, best, c="#2ecc71", s=60, edgecolors="black", linewidths=0.5, zorder=4, label="Kept")
        for i, r, b in kept:
            text = r.description if len(r.description) <= 44 else r.description[:41] + "..."
            axes.annotate(
                text, (i, b), textcoords="offset points", xytext=(7, 7), fontsize=9, color="#1a7a3a", rotation=18,
                parse_math=False,
            )  # fmt: skip
    floor = night.noise().floor_bpb
    if floor and kept:
        base = kept[0][2]
        label = f"Noise floor ({floor:.4f})"
        axes.axhspan(base - floor, base + floor, color="#3498db", alpha=0.10, zorder=0, label=label)
    low, high = min(b for _, _, b in scored), scored[0][2]
    margin = max((high - low) * 0.25, floor * 1.5, 1e-4)
    axes.set_ylim(low - margin, high + margin * 1.6)
    axes.set_xlim(-0.5, max(len(rows) - 0.2, 1.5))
    axes.locator_params(axis="x", integer=True)
    outcome = scored[0][1].outcome
    where = (
        "CPU" if outcome is None or outcome.device == "cpu" else (outcome.environment.get("gpu") or {}).get("name", "")
    )
    count = len(rows) - 1
    title = f"{night.folder.name}: {count} experiments, {max(len(kept) - 1, 0)} kept ({where} figures)"
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("Experiment")
    axes.set_ylabel("val_bpb (lower is better)")
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right", fontsize=9)


def draw(folder: str, repo: str) -> None:
    """All that is drawn, from records that may be written at the same time. Runs in a process of its own."""
    from git import Repo

    from hotloop.agent_loop.report.page import write_page

    night = Night.reading(Path(folder))
    write_progress(night)
    with Repo(repo) as opened:
        write_page(night, opened)


def print_results(night: Night, console: Console) -> None:
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
    for words in dict.fromkeys(r.outcome.open_text for r in night.rows() if r.outcome and r.outcome.open_text):
        console.print(f"WARNING: {words}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    kept = [r.val_bpb for r in night.tried() if r.decision == "keep" and r.val_bpb is not None]
    if len(kept) > 1:
        share = (kept[0] - kept[-1]) / kept[0]
        console.print(Text(f"val_bpb {kept[0]:.6f} -> {kept[-1]:.6f} ({share:.2%} better than the baseline)"))
    raced = [r for r in night.rows() if r.decision == "raced"]
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
