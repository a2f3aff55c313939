"""report.html: the night on one page, to be read in the morning on a phone or a desk.

One file that asks for nothing: no script, no font, no image, no address. Its policy forbids all of them, and the style
sheet is named by its hash. What agents and runs wrote is escaped by construction (`agent_loop.report.markup`), in
diffs and logs as everywhere. The page is made from the records alone and says nothing of when it was made, so the same
records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path

import git

from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.night import Row
from hotloop.agent_loop.report import charts, diffs, tables
from hotloop.agent_loop.report.markup import Html, h, join
from hotloop.agent_loop.report.style import STYLE
from hotloop.agent_loop.report.tally import Tally
from hotloop.harness.files import write_whole
from hotloop.harness.text import cut

__all__ = ["page", "write_page"]

WIDE, NARROW = 1000, 358  # pixels that a chart has on a desk and on a phone
LAST_CURVES = 4


def write_page(night: NightFolder, repo: git.Repo | None) -> Path:
    """Write `runs/<tag>/report.html`, whole or not at all. Without a repository there are no diffs."""
    path = night.folder / "report.html"
    write_whole(path, page(night, repo).encode())
    return path


def page(night: NightFolder, repo: git.Repo | None) -> str:
    """The page's text."""
    tally = Tally(night)
    changes = diffs.of_gains(repo, tally.gains)
    sections = [
        ("Progress", _progress(tally)),
        ("Gains", tables.gains(tally, changes)),
        ("Val and holdout", _drift(tally)),
        ("Time", _time(tally)),
        ("Training", _curves(tally)),
        ("What failed", tables.failures(tally)),
        ("Every run", tables.every_run(tally)),
        ("Diffs", diffs.section(tally.gains, changes)),
        ("How to go on", _commands(night)),
    ]
    anchors = [name.lower().replace(" ", "-") for name, _ in sections]
    links = [h("a", name, href=f"#{anchor}") for (name, _), anchor in zip(sections, anchors, strict=True)]
    body = [
        h("header", tables.headline(tally), h("nav", *links, aria_label="Parts of this page")),
        *(
            h("section", h("h2", name, id=anchor), content)
            for (name, content), anchor in zip(sections, anchors, strict=True)
        ),
    ]
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name_="color-scheme", content="light dark"),
        h("meta", name_="referrer", content="no-referrer"),
        h("title", f"{night.folder.name}: hotloop"),
        h("style", Html(STYLE)),
    )
    return f"<!doctype html>\n{h('html', head, h('body', *body), lang='en')}\n"


def _both(draw: Callable[[int], Html | None], *below: object) -> Html | None:
    """A chart for a desk and one for a phone, of which the style shows one."""
    wide, narrow = draw(WIDE), draw(NARROW)
    if wide is None or narrow is None:
        return None
    return h("figure", h("div", wide, class_="wide"), h("div", narrow, class_="narrow"), *below)


def _progress(tally: Tally) -> Html:
    caption = [
        "Points with a number were kept; the tables below say what each was. The line is the incumbent's score. ",
        f"The band is the noise floor, {tally.floor:.6f}, on both sides of it. " if tally.floor else
        "There is no noise band: the noise was not measured. ",
        "Grey points were not kept; a triangle stands for a score above the chart.",
    ]  # fmt: skip
    return _both(lambda width: charts.progress(tally, width), h("figcaption", *caption)) or h("p", "No score yet.")


def _drift(tally: Tally) -> Html:
    words = h("p", tables.drift_sentence(tally))
    chart = _both(lambda width: charts.drift(tally, width), _legend([("val", "val"), ("holdout", "holdout")]))
    return join([words, chart])


def _time(tally: Tally) -> Html:
    key = [
        ("run keep", "kept (full height)", 12), ("run marginal", "marginal", 10), ("run discard", "not kept", 7),
        ("run measured", "for the noise floor", 7), ("run failed", "failed (framed)", 5), ("idle", "idle", 12),
    ]  # fmt: skip
    swatches = [
        h("li", _swatch(h("rect", x=3, y=12 - tall, width=20, height=tall, class_=kind)), name)
        for kind, name, tall in key
    ]
    legend = h("ul", *swatches, class_="legend")
    chart = _both(lambda width: charts.timeline(tally, width), legend)
    return join([chart or h("p", "No run has ended yet."), tables.ledger(tally)])


def _curves(tally: Tally) -> Html:
    chosen: list[tuple[str, str, Row]] = []
    best, baseline = tally.best, tally.baseline
    if best and best is not baseline:
        chosen.append(("incumbent", f"#{best.number} incumbent: {best.description}", best))
    if baseline:
        chosen.append(("baseline", f"#{baseline.number} baseline", baseline))
    drawn = {row.number for _, _, row in chosen}
    others = [r for r in tally.tried if r.number not in drawn and len(r.outcome.training.curve) > 1]
    for i, row in enumerate(reversed(others[-LAST_CURVES:])):
        chosen.append((f"c{i}", f"#{row.number} {row.decision}: {row.description}", row))
    legend = _legend([(kind, name) for kind, name, row in chosen if len(row.outcome.training.curve) > 1])
    note = "Loss as train.py said it, at equal tokens: the incumbent, the baseline and the last runs with a curve."
    chart = _both(lambda width: charts.curves(chosen, width), legend, h("figcaption", note))
    return chart or h("p", "No run has left a training curve yet.")


def _legend(lines: list[tuple[str, str]]) -> Html:
    items = [h("li", _swatch(h("path", d="M0 6H26", class_=f"line {kind}")), cut(name, 90)) for kind, name in lines]
    return h("ul", *items, class_="legend")


def _swatch(form: Html) -> Html:
    return h("svg", form, viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")


def _commands(night: NightFolder) -> Html:
    tag = shlex.quote(night.folder.name)
    commands = [
        (f"hotloop show N --tag {tag}", "all that is known of an experiment"),
        (f"hotloop diff N --tag {tag}", "its edit"),
        (f"hotloop best --tag {tag}", "the incumbent's train.py and its score"),
        (f"hotloop checkout N --tag {tag}", "its train.py into your checkout"),
        (f"hotloop verify --tag {tag}", "whether the night is what it says: chain, seals, commits, weights"),
        (f"hotloop loop --tag {tag}", "to go on with this night"),
    ]
    rows = [h("tr", h("td", h("code", command)), h("td", words)) for command, words in commands]
    return h("div", h("table", h("tbody", *rows)), class_="commands")
