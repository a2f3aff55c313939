"""The words and tables of a night's page: headline, gains, seconds, failures, every run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean

from hotloop.agent_loop.night import Row
from hotloop.agent_loop.report.diffs import Change
from hotloop.agent_loop.report.markup import Html, h, join
from hotloop.agent_loop.report.tally import GROUPS, Gain, Tally
from hotloop.harness.records.model import Decision, Turn, Worth
from hotloop.harness.text import cut, one_line

__all__ = ["drift_sentence", "every_run", "failures", "gains", "headline", "ledger"]

DESCRIPTION, REASON = 200, 300  # characters
LAST_OTHERS = 300  # runs that were not kept
OPEN_ROWS = 80
REASONS, LOGS, LOG_LINES, LOG_CHARACTERS = 5, 3, 40, 300
SIGNS = {"keep": "✓", "discard": "·", "marginal": "?", "measured": "≈"}  # a decision is a sign, a word and a colour


def signed(value: float | None, places: int = 6) -> str:
    """With a true minus, which is as wide as a plus."""
    return "" if value is None else f"{value:+.{places}f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# The headline.


def headline(tally: Tally) -> Html:
    baseline, best = tally.baseline, tally.best
    first = baseline.val_bpb if baseline else None
    last = best.val_bpb if best else None
    if first is None or last is None:
        score = h("p", "No score yet", class_="score")
    else:
        gain = first - last
        share = signed(100 * -gain / first, 2) + " %" if first else ""
        change = f"{signed(-gain)} ({share})" if best is not baseline else "the baseline alone"
        score = h(
            "p",
            h("span", f"{first:.6f} → {last:.6f}" if best is not baseline else f"{first:.6f}"),
            h("span", change, class_="gain" if gain > 0 else "loss" if gain < 0 else "unit"),
            h("span", "val_bpb, lower is better", class_="unit"),
            class_="score",
        )
    facts = [h("div", h("dt", name), h("dd", value)) for name, value in _facts(tally) if value]
    title = h("h1", f"hotloop night {tally.night.folder.name}")
    return join([title, score, *(h("p", words) for words in _remarks(tally)), h("dl", *facts, class_="facts")])


def _remarks(tally: Tally) -> list[str]:
    """What a reader has to know before any figure."""
    words = []
    baseline = tally.baseline
    if tally.last_outcome and tally.last_outcome.open_text:
        words.append(f"Warning: {tally.last_outcome.open_text}.")
    if baseline and baseline.val_bpb is None:
        words.append(f"The baseline ended as {baseline.decision}: {one_line(baseline.reason, REASON)}")
    if not tally.rows:
        words.append("Nothing was decided yet.")
    words += [f"WARNING: {one_line(w, REASON)}" for w in tally.night.unheard()]
    decided = {r.number for r in tally.rows}
    under_way = [r.number for r in tally.night.flight().runs if r.number not in decided]
    numbers = sorted({*under_way, *(o.run.number for o in tally.night.undecided())})
    if numbers:
        words.append(f"Begun and not decided: {', '.join(f'#{n}' for n in numbers)}.")
    return words


def _facts(tally: Tally) -> list[tuple[str, str]]:
    ran = len(tally.experiments)
    device_h = tally.device_s / 3600
    several = f" on {tally.slots} devices" if tally.slots > 1 else ""
    floor, outcome = tally.floor, tally.last_outcome
    cpu = " (CPU figures)" if any(w.startswith("CPU") for w in tally.where) else ""
    settings = tally.night.settings
    best = tally.best.outcome if tally.best else None
    first = tally.baseline.outcome if tally.baseline else None
    holdout = ""
    if best and first and best.holdout_bpb is not None and first.holdout_bpb is not None:
        holdout = f"{first.holdout_bpb:.6f} → {best.holdout_bpb:.6f}"
    mfu = f", MFU {best.mfu_percent:.1f} %" if best and best.mfu_percent is not None else ""
    return [
        ("Experiments", f"{len(tally.experiments)}, {len(tally.kept)} kept"),
        ("Time", f"{duration(tally.span_s)}{several}" if tally.bars else ""),
        ("Per device-hour", f"{ran / device_h:.1f} experiments" if device_h and ran else ""),
        ("Device idle", f"{tally.idle_s / tally.device_s:.1%}".replace("%", " %") if tally.device_s else ""),
        ("Cost", f"${tally.night.cost_usd:,.2f}" if tally.night.cost_usd else "not told by the agents"),
        ("Noise floor", f"{floor:.6f} ({tally.night.noise().seeds} seeds)" if floor else "not measured"),
        ("Holdout", holdout),
        ("Where", ", ".join(tally.where) + cpu),
        ("Sandbox", f"L{outcome.sandbox.level} ({outcome.sandbox.how})" if outcome else ""),
        ("Preset and budget", f"{settings.preset} {settings.budget}" if settings else ""),
        ("Repeatable", "no: --fast-nondeterministic" if settings and not settings.repeatable else ""),
        ("Incumbent", f"{best.training.tokens_per_s:,.0f} tokens/s, {best.training.peak_mb / 1024:.2f} GiB{mfu}"
            if best else ""),
        ("Agent", _agents(tally)),
        ("Model tokens", f"{tally.night.tokens:,}" if tally.night.tokens else ""),
    ]  # fmt: skip


def _agents(tally: Tally) -> str:
    """Who made how many of the experiments, and who else was asked for."""
    made = Counter(r.origin.agent for r in tally.experiments if r.origin.agent)
    named = [f"{name} ({count})" for name, count in made.most_common()]
    return ", ".join([*named, *(f"{name} (0)" for name in tally.night.asked if name not in made)])


# Gains, and what they are worth.


_MEANINGS = {
    Worth.CONFIRMED: "above the noise floor by itself, under a second seed, or when left out at the end",
    Worth.MARGINAL: "within the noise floor: kept as equal and simpler, kept before noise was known, or still waiting",
    Worth.RETRACTED: "a second seed or leaving it out at the end took it back",
}


def gains(tally: Tally, changes: dict[int, Change]) -> Html:
    """Three tables: what is known, what may be, what was not."""
    if not tally.gains:
        return h("p", "No experiment was kept.")
    parts: list[Html] = []
    for group in GROUPS:
        mine = [g for g in tally.gains if g.group == group]
        if mine:
            parts.append(h("h3", f"{group.capitalize()} ({len(mine)})"))
            parts.append(h("p", f"{_MEANINGS[group].capitalize()}.", class_="meta"))
            parts.append(_scroll(_gain_table(mine, changes, group), f"{group} gains", "gains"))
    return join(parts)


def _gain_table(mine: Sequence[Gain], changes: dict[int, Change], group: Worth) -> Html:
    worth = any(g.worth is not None for g in mine)
    names = ["val", "holdout", *(["worth at the end"] if worth else [])]
    head = h("tr", h("th", "#", class_="n"), h("th", "what"), *(h("th", n, class_="n") for n in names))
    rows = []
    for gain in mine:
        row = gain.row
        facts = [row.origin.agent, changes[row.number].size and f"{changes[row.number].size} lines", row.commit[:7]]
        what = [
            h("div", one_line(row.description, DESCRIPTION)),
            h("div", " · ".join(f for f in facts if f), class_="meta"),
            h("div", one_line(gain.why, REASON), class_="meta"),
        ]
        figures = [signed(row.gain), signed(row.holdout_gain), *([signed(gain.worth)] if worth else [])]
        cells = [
            h("td", value or "-", class_="n" if value else "n none", data_name=n)
            for n, value in zip(names, figures, strict=True)
        ]
        rows.append(h("tr", h("td", row.number, class_="n"), h("td", *what), *cells))
    foot = None
    if len(mine) > 1 and group == Worth.CONFIRMED:
        sums = [_sum(g.row.gain for g in mine), _sum(g.row.holdout_gain for g in mine)]
        sums += [_sum(g.worth for g in mine) if all(g.worth is not None for g in mine) else None] if worth else []
        cells = [
            h("td", signed(s) or "-", class_="n" if s is not None else "n none", data_name=n)
            for n, s in zip(names, sums, strict=True)
        ]
        foot = h("tfoot", h("tr", h("td", ""), h("td", "together"), *cells))
    return h("table", h("thead", head), h("tbody", *rows), foot)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def drift_sentence(tally: Tally) -> str:
    """Whether the gains on val, which decided, are there on holdout, which nobody was told."""
    rows = tally.paired
    if not rows:
        return "No kept experiment has scores on both splits, so nothing can be said of overfitting to val."
    val = sum(r.gain or 0.0 for r in rows)
    holdout = sum(r.holdout_gain or 0.0 for r in rows)
    figures = f"The {len(rows)} kept experiments gained {signed(val)} on val and {signed(holdout)} on holdout"
    if val <= 0:
        return f"{figures}: there is no gain on val to compare."
    share = f"{figures} ({holdout / val:.0%} of it)".replace("%", " %")
    if abs(val - holdout) <= tally.floor:
        return f"{share}; the two differ by no more than the noise floor: no sign of overfitting to val."
    if holdout < 0.5 * val:
        return f"{share}: much less. The night overfits to val; believe the holdout figure."
    if holdout < 0.8 * val:
        return f"{share}: less. A part of the gain on val is selection; believe the holdout figure."
    return f"{share}: they go together, no sign of overfitting to val."


# Seconds.


def ledger(tally: Tally) -> Html | None:
    """Device seconds by phase, and the agents' own."""
    if not tally.bars:
        return None
    rows = []
    for phase, seconds in tally.ledger.items():
        share = seconds / tally.device_s if tally.device_s else 0.0
        kind = {"train": None, "idle": "waits"}.get(phase, "device")
        bar = h("svg", h("rect", width=round(max(120 * share, 0.5 if seconds else 0), 1), height=10, class_=kind),
                viewBox="0 0 120 10", aria_hidden="true")  # fmt: skip
        cells = [duration(seconds), f"{share:.1%}".replace("%", " %"), duration(seconds / len(tally.bars))]
        rows.append(h("tr", h("td", phase), *(h("td", c, class_="n") for c in cells), h("td", bar, class_="share")))
    whole = [duration(tally.device_s), "100 %", duration(tally.device_s / len(tally.bars)), ""]
    foot = h("tr", h("td", "all"), *(h("td", w, class_="n") for w in whole))
    names = [("phase", None), ("device time", "n"), ("share", "n"), ("mean run", "n"), ("", None)]
    head = h("tr", *(h("th", n, class_=c) for n, c in names))
    words = (
        f"Agents worked for {duration(tally.agent_s)}; devices waited for them for {duration(tally.waited_s)} at most."
    )
    lost = tally.span_s * tally.slots - tally.device_s
    if lost > max(60.0, 0.01 * tally.device_s):
        words += f" {duration(lost)} of the span are in no run and no wait: the driver was not running."
    if warm := tally.starts("warm"):
        words += f" {len(warm)} trainers were ready when they were due: {mean(warm):.1f} s until train.py was imported"
        words += f", against {mean(cold):.1f} s of the {len(cold)} others." if (cold := tally.starts("cold")) else "."
    table = h("table", h("thead", head), h("tbody", *rows), h("tfoot", foot))
    scroll = _scroll(table, "device time by phase", "ledger")
    return join([h("h3", "Where the device time went"), scroll, h("p", words)])


# What failed.


def failures(tally: Tally) -> Html:
    parts: list[Html] = []
    for status, rows in tally.failed.items():
        parts.append(h("h3", f"{status}: {len(rows)}"))
        latest = rows[::-1][:REASONS]
        items = []
        for i, row in enumerate(latest):
            log = row.outcome.log_tail if i < LOGS else []
            fold = h("details", h("summary", "the end of its log"), _log(log)) if log else None
            name = h("div", f"#{row.number} {one_line(row.description, 120)}")
            items.append(h("li", name, h("div", one_line(row.reason, REASON), class_="meta"), fold))
        parts.append(h("ul", *items, class_="plain"))
        if len(rows) > len(latest):
            parts.append(h("p", f"and {len(rows) - len(latest)} earlier ones", class_="meta"))
    if not parts:
        parts.append(h("p", "No run failed."))
    if tally.turns:
        parts.append(_turns(tally))
    return join(parts)


def _log(lines: Sequence[str]) -> Html:
    tail = [cut(line, LOG_CHARACTERS) for line in lines[-LOG_LINES:]]
    return h("pre", "\n".join(tail))


def _turns(tally: Tally) -> Html:
    """Agents' turns that gave no edit, by who and why."""
    groups: defaultdict[tuple[str, str], list[Turn]] = defaultdict(list)
    for turn in tally.turns:
        groups[turn.origin.agent, one_line(turn.reason, REASON)].append(turn)
    ordered = sorted(groups.items(), key=lambda g: -len(g[1]))
    rows = []
    for (agent, reason), turns in ordered[:20]:
        seconds, cost_usd = (sum(t.origin.seconds for t in turns), sum(t.origin.cost_usd for t in turns))
        cells = [str(len(turns)), duration(seconds), f"${cost_usd:.2f}" if cost_usd else "-"]
        rows.append(h("tr", h("td", agent), h("td", reason), *(h("td", c, class_="n") for c in cells)))
    names = [("agent", None), ("why", None), ("turns", "n"), ("time", "n"), ("cost", "n")]
    table = h("table", h("thead", h("tr", *(h("th", n, class_=c) for n, c in names))), h("tbody", *rows))
    more = h("p", f"and {len(groups) - 20} other reasons", class_="meta") if len(groups) > 20 else None
    title = h("h3", f"Agents' turns that gave no experiment: {len(tally.turns)}")
    return join([title, _scroll(table, "turns that gave nothing", "turns"), more])


# Every run.


def every_run(tally: Tally) -> Html:
    if not tally.rows:
        return h("p", "None yet.")
    others = [r.number for r in tally.rows if r.decision != Decision.KEEP]
    shown = set(others[-LAST_OTHERS:]) | {r.number for r in tally.rows if r.decision == Decision.KEEP}
    rows = [_run_row(r) for r in tally.rows if r.number in shown]
    names = [("#", "n"), ("decision", None), ("val_bpb", "n"), ("gain", "n"), ("what", None), ("why", None)]
    table = h("table", h("thead", h("tr", *(h("th", n, class_=c) for n, c in names))), h("tbody", *rows))
    left = len(tally.rows) - len(rows)
    note = f"All kept ones and the last {LAST_OTHERS} others; {left} earlier ones are left out: hotloop show N."
    summary = h("summary", f"{len(rows)} of {len(tally.rows)} runs, in the order in which they were decided")
    fold = h("details", summary, _scroll(table, "every run", "all"), **({"open": ""} if len(rows) <= OPEN_ROWS else {}))
    return join([h("p", note, class_="soft") if left else None, fold])


def _run_row(row: Row) -> Html:
    kind = "failed" if row.decision.failed else str(row.decision)
    sign = SIGNS.get(kind, "×")
    warnings = [h("div", f"warning: {w}", class_="meta") for w in row.outcome.conditions.warnings]
    known = kind if kind in SIGNS or kind == "failed" else None
    return h(
        "tr",
        h("td", row.number, class_="n"),
        h("td", h("span", f"{sign} {row.decision}", class_=f"tag {known}" if known else "tag")),
        h("td", f"{row.val_bpb:.6f}" if row.val_bpb is not None else "-", class_="n"),
        h("td", signed(row.gain), class_="n"),
        h("td", one_line(row.description, DESCRIPTION)),
        h("td", one_line(row.reason, REASON), *warnings),
    )


def _scroll(table: Html, name: str, kind: str = "") -> Html:
    """A table that scrolls by itself where it is too wide, and never the page."""
    return h("div", table, class_=f"scroll {kind}".strip(), tabindex=0, role="region", aria_label=name)
