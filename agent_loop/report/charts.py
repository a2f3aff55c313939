"""The charts of a night's page, each drawn for the width at which it is shown, so that its text is legible.

Colours are classes that the page's style names for light and dark; what a colour says is also said by form.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

from hotloop.agent_loop.night import Row
from hotloop.agent_loop.report.markup import FONT, Frame, Html, Label, h, join, place, svg, text_width, ticks
from hotloop.agent_loop.report.tally import Point, Tally
from hotloop.harness.records.model import Kind
from hotloop.harness.text import one_line

__all__ = ["curves", "drift", "progress", "timeline"]

CURVE_POINTS = 120
SLOT_HEIGHT, BAR_HEIGHT = 38, 30


def progress(tally: Tally, width: int) -> Html | None:
    """Every score, the incumbent's line with the noise around it, the kept ones named. None without a score."""
    found = tally.progress
    if found is None:
        return None
    kept, others = found.kept, found.others
    frame = Frame(width, 340 if width > 600 else 300, -0.5, found.end, found.low, found.high)
    parts: list[object] = [frame.axes("experiment", "val_bpb, lower is better")]
    if found.line:
        parts.append(_band(frame, found.line, found.floor) if found.floor else None)
        parts.append(h("path", d=frame.path(found.line, step=True), class_="best"))
    # One path for all that were not kept: a line of no length with round ends is a dot.
    dots = "".join(f"M{frame.x(r.number):.1f} {frame.y(b):.1f}h0" for r, b in others)
    parts.append(h("path", d=dots, class_="dots") if dots else None)
    marks = "".join(f"M{frame.x(r.number) - 4:.1f} {frame.top + 7:g}l4 -7l4 7z" for r, _ in found.above)
    parts.append(h("path", d=marks, class_="above") if marks else None)
    parts.extend(
        h("circle", h("title", f"#{r.number} {b:.6f} {one_line(r.description, 120)}"), cx=round(frame.x(r.number), 1),
          cy=round(frame.y(b), 1), r=4, class_="kept")
        for r, b in kept
    )  # fmt: skip
    parts.append(_kept_labels(frame, kept, [*kept, *others]))
    count = len(kept) + len(others) + len(found.above)
    desc = f"{count} scores, {len(kept)} kept, from {kept[0][1]:.6f} to {kept[-1][1]:.6f}." if kept else ""
    return svg(f"progress{width}", width, frame.height, "Scores of the night, in order", desc, *parts)


def _band(frame: Frame, line: list[tuple[float, float]], floor: float) -> Html:
    """The step line, thick as the noise on both sides."""
    edge = frame.height - frame.bottom
    parts = []
    for (x, y), (end, _) in itertools.pairwise(line):
        top, bottom = max(frame.y(y + floor), frame.top), min(frame.y(y - floor), edge)
        wide = max(frame.x(end) - frame.x(x), 0.0)
        if bottom > top:
            parts.append(f"M{frame.x(x):.1f} {top:.1f}h{wide:.1f}V{bottom:.1f}h{-wide:.1f}z")
    return h("path", d="".join(parts), class_="band")


def _kept_labels(frame: Frame, kept: Sequence[Point], others: Sequence[Point]) -> Html:
    """Numbers of the kept ones, with their names where there is room on a wide chart."""
    labels = []
    for row, bpb in kept:
        named = frame.width > 600 and row.kind == Kind.EXPERIMENT
        name = [f"#{row.number} {one_line(row.description, 36)}"] if named else []
        labels.append(Label(frame.x(row.number), frame.y(bpb), [*name, f"#{row.number}"]))
    area = (frame.left, frame.top, frame.width - 2, frame.height - frame.bottom)
    # Nor over the line: points on it, closer to each other than a text is high.
    avoid = [(frame.x(r.number), frame.y(b)) for r, b in others]
    for (here, bpb), (then, after) in itertools.pairwise([(r.number, b) for r, b in kept]):
        (x, y), (x1, y1) = (frame.x(here), frame.y(bpb)), (frame.x(then), frame.y(after))
        avoid += [(x + i * 9, y) for i in range(int((x1 - x) / 9) + 1)]
        avoid += [(x1, min(y, y1) + i * 9) for i in range(int(abs(y1 - y) / 9) + 1)]
    placed = place(labels, area, avoid)
    return join(
        h("text", p.text, x=round({"start": p.box[0], "end": p.box[2]}.get(p.anchor, p.x), 1),
          y=round(p.box[3] - 3, 1), text_anchor=p.anchor, class_="label")
        for p in placed
    )  # fmt: skip


def drift(tally: Tally, width: int) -> Html | None:
    """The gains of the kept ones added up, on val and on holdout. None without two splits."""
    rows = tally.paired
    if not rows:
        return None
    val, holdout = [0.0], [0.0]
    for row in rows:
        val.append(val[-1] + (row.gain or 0.0))
        holdout.append(holdout[-1] + (row.holdout_gain or 0.0))
    low, high = min(*val, *holdout), max(*val, *holdout)
    room = (high - low) * 0.08 or 1e-4
    frame = Frame(width, 240, 0, len(rows), min(low, 0.0) - room, high + room, right=66)
    every = -(-len(rows) // max(2, int((width - 120) / 44)))
    marks = [(i + 1.0, f"#{r.number}") for i, r in enumerate(rows) if i % every == 0]
    parts = [frame.axes("kept experiments", "bits per byte gained in all", marks)]
    ends = {}
    for name, sums in (("val", val), ("holdout", holdout)):
        points = [(float(i), s) for i, s in enumerate(sums)]
        parts.append(h("path", d=frame.path(points), class_=f"line {name}"))
        form = "circle" if name == "val" else "rect"
        for x, y in points[1:] if len(points) <= 60 else points[-1:]:
            px, py = round(frame.x(x), 1), round(frame.y(y), 1)
            where = (
                {"cx": px, "cy": py, "r": 3}
                if form == "circle"
                else {"x": px - 3, "y": py - 3, "width": 6, "height": 6}
            )
            parts.append(h(form, class_=f"mark {name}", **where))
        ends[name] = frame.y(sums[-1])
    upper, lower = sorted(ends, key=lambda n: ends[n])
    apart = max(0.0, FONT + 2 - (ends[lower] - ends[upper])) / 2
    for name, y in ((upper, ends[upper] - apart), (lower, ends[lower] + apart)):
        parts.append(h("text", name, x=width - 58, y=round(y + 4, 1), class_="label"))
    desc = f"Val {val[-1]:+.6f}, holdout {holdout[-1]:+.6f} over {len(rows)} kept experiments."
    return svg(f"drift{width}", width, frame.height, "Gains on val and on holdout, added up", desc, *parts)


def timeline(tally: Tally, width: int) -> Html | None:
    """A line for each device, a bar for each run: high for kept, low for the rest, framed for failed. None without."""
    bars, began = tally.bars, tally.began
    if began is None:
        return None
    span = tally.span_s or 1.0
    frame = Frame(width, 20 + SLOT_HEIGHT * tally.slots + 34, 0, span, 0, 1, left=24 if tally.slots > 1 else 6, right=6)
    parts: list[object] = []
    for value, name in _clock(began, span, max(2, int(width / 60))):
        x = frame.x(value)
        half = text_width(name) / 2
        parts.append(h("path", d=f"M{x:.1f} 14V{frame.height - 30:g}", class_="grid"))
        parts.append(h("text", name, x=round(min(max(x, half), width - half), 1), y=frame.height - 18, class_="mid"))
    parts.append(h("text", "UTC", x=width / 2, y=frame.height - 3, class_="mid name"))
    for slot in range(tally.slots):
        # Each with its begin and end on the chart.
        mine = [
            (bar, frame.x(max(0.0, (bar.began - began).total_seconds())), frame.x((bar.ended - began).total_seconds()))
            for bar in bars if bar.slot == slot
        ]  # fmt: skip
        top = 16 + slot * SLOT_HEIGHT
        if tally.slots > 1:
            parts.append(h("text", str(slot), x=4, y=top + 19, class_="name"))
        if not mine:
            continue
        left, right = min(x for _, x, _ in mine), max(end for *_, end in mine)
        parts.append(h("rect", x=round(left, 1), y=top, width=round(right - left, 1), height=BAR_HEIGHT, class_="idle"))
        for bar, x, end in mine:
            kind = "failed" if bar.decision.failed else bar.decision
            tall = {"keep": BAR_HEIGHT, "marginal": 22, "failed": 10}.get(kind, 16)
            took = bar.outcome.total_s
            wide = end - x - (0.6 if took / span > 0.005 else 0)
            parts.append(
                h("rect", h("title", f"{one_line(bar.name, 60)}: {bar.decision}, {took:.0f} s"), x=round(x, 1),
                  y=top + BAR_HEIGHT - tall, height=tall, width=round(max(0.8, wide), 1), class_=f"run {kind}")
            )  # fmt: skip
    desc = f"{len(bars)} runs on {tally.slots} device(s), {tally.idle_s:.0f} seconds idle."
    return svg(f"timeline{width}", width, frame.height, "Runs of each device over time", desc, *parts)


def _clock(began: datetime.datetime, span_s: float, count: int) -> list[tuple[float, str]]:
    """Round times within the span: seconds since it began, and what a clock says."""
    raw = span_s / count / 60
    step = (
        next((m for m in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720) if m >= raw), 1440 * -(-int(raw) // 1440)) * 60
    )
    midnight = began.replace(hour=0, minute=0, second=0, microsecond=0)
    offset = (began - midnight).total_seconds()
    marks = []
    at = -(-offset // step) * step
    while at <= offset + span_s:
        when = midnight + datetime.timedelta(seconds=at)
        marks.append((at - offset, when.strftime("%d %b" if step >= 86400 else "%H:%M")))
        at += step
    return marks or [(0.0, began.strftime("%H:%M:%S"))]


def curves(rows: Sequence[tuple[str, str, Row]], width: int) -> Html | None:
    """Training losses over tokens: rows of class, name and run. None where none has a curve."""
    lines = []
    for kind, name, row in rows:
        curve, tokens = row.outcome.training.curve, row.outcome.training.tokens
        if len(curve) > 1 and tokens:
            every = -(-len(curve) // CURVE_POINTS)
            thin = [*curve[::every], *([curve[-1]] if (len(curve) - 1) % every else [])]
            lines.append((kind, name, [(progress * tokens / 1e6, loss) for progress, loss in thin]))
    if not lines:
        return None
    end = max(x for _, _, points in lines for x, _ in points)
    # The first falls of the loss are high and all alike: the axis begins where the runs begin to differ.
    start = [next((y for x, y in points if x >= 0.2 * end), points[-1][1]) for _, _, points in lines]
    low = min(y for _, _, points in lines for _, y in points)
    high = max(low + 1e-6, min(max(start), low + 3 * (sorted(start)[len(start) // 2] - low or 1.0)))
    room = (high - low) * 0.06
    frame = Frame(width, 320 if width > 600 else 280, 0, end, low - room, high + room, left=44)
    clip_id = f"area{width}"
    area = h("rect", x=frame.left, y=frame.top, width=width - frame.left - frame.right,
             height=frame.height - frame.top - frame.bottom)  # fmt: skip
    places = ticks(0, end, max(4, width // 110))
    parts: list[object] = [
        h("clipPath", area, id=clip_id),
        frame.axes("million tokens", "training loss", [(v, f"{v:g}") for v in places]),
    ]
    drawn = [h("path", d=frame.path(points), class_=f"line {kind}") for kind, _, points in reversed(lines)]
    parts.append(h("g", *drawn, clip_path=f"url(#{clip_id})"))
    desc = ", ".join(f"{name} ends at {points[-1][1]:.4f}" for _, name, points in lines)
    return svg(f"curves{width}", width, frame.height, "Training loss over tokens", desc, *parts)
