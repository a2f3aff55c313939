"""The night's page: figures are those of the records, hostile text stays text, and it fits a phone."""

from __future__ import annotations

import argparse
import html.parser
import http.server
import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from nights import Synthetic, loss_curve, realistic, repository

from hotloop.agent_loop.commands.show import show_command
from hotloop.agent_loop.folder import Flight
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.report import diffs
from hotloop.agent_loop.report.markup import Label, h, place
from hotloop.agent_loop.report.page import write_page
from hotloop.agent_loop.report.tables import drift_sentence
from hotloop.agent_loop.report.tally import Tally
from hotloop.harness.records.model import Ledger, LeftOut, Worth
from tests.builders import make_run
from tests.needs import browser

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)></style>&lt;\"'\x1b[31m\u202e\ud800 x"
VOID = {"meta", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page strictly: what is opened is closed, in order; each id is the only one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of {tag} twice"
        if ident := found.get("id"):
            assert ident not in self.ids
            self.ids.add(ident)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def count(self, name: str, kind: str = "") -> int:
        return sum(t == name and kind in (a.get("class") or "") for t, a in self.tags)


def test_a_warning_of_the_conditions_is_in_every_view(
    night: Synthetic, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "other processes computed on the GPU: 42 <miner>"
    night.settings()
    night.run("baseline", "keep", 1.0)
    night.run("experiment", "discard", 1.1, warnings=[words])
    page = page_of(night)
    assert page.text.count(f"warning: {words}") == 1
    monkeypatch.chdir(night.chain.path.parents[2])
    for number, shown in ((1, True), (0, False)):
        show_command(argparse.Namespace(tag="nov23", experiment=number))
        assert (f"warning:    {words}" in capsys.readouterr().out) is shown
    state = night.state
    out = io.StringIO()
    with View(Console(file=out, width=200)) as view:
        for row in state.rows():
            view.finished(row, state)
    assert out.getvalue().count(f"warning: {words}") == 1


def left_out(number: int, verdict: Worth, reason: str, worth: float) -> LeftOut:
    return LeftOut(
        number=number, commit="c", incumbent="i", verdict=verdict, reason=reason, noise_bpb=0.01, val_bpb=0.9,
        worth=worth,
    )  # fmt: skip


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Synthetic:
    folder = tmp_path / "runs" / "nov23"
    folder.mkdir(parents=True)
    return Synthetic(folder, monkeypatch)


def page_of(night: Synthetic) -> Page:
    path = write_page(night.state, night.repo)
    assert path == night.chain.path.parent / "report.html"
    assert [p.name for p in path.parent.glob("report.html*")] == ["report.html"]
    text = path.read_text()
    page = Page(text)
    assert not {t for t, _ in page.tags} & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src"), (tag, name)
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#") and (value or "")[1:] in page.ids
            if name in ("aria-labelledby",):
                assert set((value or "").split()) <= page.ids
    assert "://" not in text and "url(" not in text.replace("url(#", "")
    return page


# Nights of all sorts.


def test_nothing_at_all_and_only_settings(night: Synthetic) -> None:
    assert "Nothing was decided yet" in page_of(night).text
    night.settings()
    page = page_of(night)
    assert "No score yet" in page.text and "h100 300 seconds" in page.text


def test_only_a_baseline(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "keep", 0.9979, "baseline", floor=0.0, curve=loss_curve(3.0))
    page = page_of(night)
    assert "0.997900" in page.text and "the baseline alone" in page.text
    assert "Experiments 0, 0 kept" in page.text and "No experiment was kept" in page.text
    assert "Noise floor not measured" in page.text


def test_a_baseline_that_crashed(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "crash", None, "baseline", "it fell over", log_tail=["one", "two"])
    page = page_of(night)
    assert "The baseline ended as crash: it fell over" in page.text
    assert "crash: 1" in page.text and "one two" in page.text


def test_many_failures_of_a_kind_are_told_by_the_last(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "keep", 1.0)
    for i in range(7):
        night.run("experiment", "invalid", None, f"edit {i}", "only train.py may change")
    page = page_of(night)
    assert "Experiments 7, 0 kept" in page.text and "invalid: 7" in page.text and "and 2 earlier ones" in page.text


def test_a_night_torn_while_it_runs(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "keep", 1.0)
    with open(night.chain.path, "ab") as f:
        f.write(b'{"seq": 4, "bo')
    folder = night.chain.path.parent
    Flight([make_run(1)]).save(folder / "flight.json")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "Begun and not decided: #1." in page_of(night).text
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.html"} == before


def test_the_same_records_give_the_same_bytes(night: Synthetic) -> None:
    realistic(night, 12)
    first = write_page(night.state, None).read_bytes()
    assert write_page(night.state, None).read_bytes() == first


# Figures.


def test_the_headline_says_what_the_records_say(night: Synthetic) -> None:
    night.settings()
    night.seconds = 355.0
    night.run("baseline", "keep", 1.0, "baseline", holdout=1.1, floor=0.0)
    night.seconds = 800.0
    night.run("experiment", "keep", 0.95, gain=0.05, holdout=1.07, idle_s=90.0, seconds=120.0, cost_usd=0.25)
    night.turn("codex", "nothing", seconds=60.0, cost_usd=0.5, tokens=1)
    page = page_of(night)
    for words in (
        "1.000000 → 0.950000", "−0.050000 (−5.00 %)", "Experiments 1, 1 kept", "Cost $0.75", "L3 (bubblewrap, own uid)",
        "0.010000", "NVIDIA H100 80GB HBM3", "Holdout 1.100000 → 1.070000", "Time 13.3 min", "MFU 39.8 %",
        f"Device idle {90 / 800:.1%}".replace("%", " %"), f"Per device-hour {3600 / 800:.1f} experiments",
        "Agents worked for 3.0 min; devices waited for them for 90.0 s at most",
    ):  # fmt: skip
        assert words in page.text, words
    assert "(CPU figures)" not in page.text


def test_cpu_figures_are_called_that(night: Synthetic) -> None:
    night.device = "cpu"
    night.settings()
    night.run("baseline", "keep", 1.9)
    text = page_of(night).text
    assert "CPU AMD EPYC (CPU figures)" in text and "MFU" not in text


def test_device_seconds_add_up(night: Synthetic) -> None:
    realistic(night, 20, slots=2)
    tally = Tally(night.state)
    assert sum(tally.ledger.values()) == pytest.approx(tally.device_s)
    assert tally.slots == 2 and {b.slot for b in tally.bars} == {0, 1}
    assert page_of(night).count("rect", "idle") == 2 * 2 + 1  # two charts of two devices, and the legend


def test_warm_starts_are_told_beside_cold_ones(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "keep", 1.0)
    assert "ready when they were due" not in page_of(night).text
    night.run("experiment", "discard", 1.1, ledger=Ledger(4.0, 2.0))
    for seconds in (0.5, 0.7):
        night.run("experiment", "discard", 1.1, how="warm", ledger=Ledger(seconds, 0.4))
    words = "2 trainers were ready when they were due: 1.0 s until train.py was imported, against 4.5 s of the 2 others"
    assert words in page_of(night).text


def test_gains_are_told_apart(night: Synthetic) -> None:
    night.settings()
    night.run("baseline", "keep", 1.0)
    clear = night.run("experiment", "keep", 0.95, "clear", gain=0.05)
    simpler = night.run("experiment", "keep", 0.951, "simpler", "equal and simpler", gain=-0.001)
    good = night.run("experiment", "marginal", 0.944, "good", gain=0.007, commit="c" * 40)
    night.run("confirm", "keep", 0.945, "good (seed 2)", "better on average", gain=0.008, seed=2, commit="c" * 40)
    bad = night.run("experiment", "marginal", 0.938, "bad", gain=0.006, commit="d" * 40)
    night.run("confirm", "discard", 0.95, "bad (seed 2)", "within the noise", gain=-0.002, seed=2, commit="d" * 40)
    late = night.run("experiment", "marginal", 0.938, "late", gain=0.006)
    night.run("experiment", "discard", 0.95, "late again", again_of=late)
    lucky = night.run("experiment", "keep", 0.92, "lucky", gain=0.024)
    unknown = night.run("experiment", "keep", 0.91, "before noise", gain=0.01, floor=0.0)
    waits = night.run("experiment", "marginal", 0.905, "waits", gain=0.005)
    for number, verdict, worth in (
        (lucky, Worth.RETRACTED, -0.001),
        (clear, Worth.CONFIRMED, 0.044),
        (good, Worth.MARGINAL, 0.006),
    ):
        night.append(left_out(number, verdict, "it was left out", worth))
    found = {g.row.number: (g.group, g.worth) for g in Tally(night.state).gains}
    assert found == {
        clear: ("confirmed", 0.044), simpler: ("marginal", None), good: ("confirmed", 0.006), bad: ("retracted", None),
        lucky: ("retracted", -0.001), unknown: ("marginal", None), waits: ("marginal", None),
    }  # fmt: skip
    text = page_of(night).text
    assert "Confirmed (2)" in text and "Marginal (3)" in text and "Retracted (2)" in text
    assert "+0.044000" in text and "left out at the end: it was left out" in text


@pytest.mark.parametrize(
    ("holdout", "words"),
    [(0.1, "overfits to val"), (0.7, "selection"), (0.9, "go together"), (1.0, "no more than the noise floor")],
)
def test_drift_is_said_in_a_sentence(night: Synthetic, holdout: float, words: str) -> None:
    night.run("baseline", "keep", 2.0, holdout=2.0)
    for i in (1, 2):
        night.run("experiment", "keep", 2.0 - 0.2 * i, gain=0.2, holdout=2.0 - 0.2 * i * holdout)
    sentence = drift_sentence(Tally(night.state))
    assert words in sentence and "+0.400000 on val" in sentence and f"+{0.4 * holdout:.6f} on holdout" in sentence


def test_a_run_that_went_wrong_does_not_flatten_the_chart(night: Synthetic) -> None:
    realistic(night, 30)
    night.run("experiment", "discard", 400.0, gain=-399.0)
    page = page_of(night)
    marks = [a["d"] for t, a in page.tags if t == "path" and a.get("class") == "above"]
    assert marks and all("M" in (d or "") for d in marks)
    heights = {float(str(a["cy"])) for t, a in page.tags if t == "circle" and a.get("class") == "kept"}
    assert max(heights) - min(heights) > 100


# What others wrote.


def test_hostile_words_stay_words(tmp_path: Path, night: Synthetic) -> None:
    night.repo = repository(tmp_path / "repo", "A = 1\n")
    night.incumbent = str(night.repo.head.commit.hexsha)
    night.settings(preset=HOSTILE)
    words = HOSTILE.replace("\ud800", "")
    night.run("baseline", "keep", 1.0, HOSTILE, HOSTILE, curve=loss_curve(3.0))
    commit = night.commit(f"A = 2  # {words}\n</pre>{words}\n")
    night.run("experiment", "keep", 0.9, HOSTILE, HOSTILE, gain=0.1, commit=commit, agent=HOSTILE, holdout=1.0)
    night.run("experiment", "crash", None, HOSTILE, HOSTILE, log_tail=[HOSTILE, "</pre></details>" + HOSTILE])
    night.run("experiment", "discard", 0.95, HOSTILE, HOSTILE, gain=-0.05, warnings=[HOSTILE], why=HOSTILE)
    night.turn(HOSTILE, HOSTILE, seconds=1.0)
    night.append(left_out(1, Worth.RETRACTED, HOSTILE, 0.1))
    page = page_of(night)  # no script, no handler, well formed
    text = (night.chain.path.parent / "report.html").read_text()
    assert "<script" not in text.lower() and "<img" not in text and text.count("</style>") == 1
    assert page.text.count("<script>alert('x')</script>") > 10, "it is shown, as text"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)


def test_what_is_not_markup_is_escaped() -> None:
    assert (
        h("p", "<b>", h("i", "&"), None, title='"<', data_x=None) == '<p title="&quot;&lt;">&lt;b&gt;<i>&amp;</i></p>'
    )


# Diffs.


def test_diffs_are_those_of_git(tmp_path: Path, night: Synthetic) -> None:
    night.repo = repository(tmp_path / "repo", "A = 1\nB = 2\n")
    with night.repo.config_writer() as config:
        config.set_value("color", "ui", "always").set_value("diff", "external", "false")
    night.incumbent = str(night.repo.head.commit.hexsha)
    night.run("baseline", "keep", 1.0)
    night.run("experiment", "keep", 0.9, "A up", gain=0.1, commit=night.commit("A = 3\nB = 2\nC = 4\n"))
    night.run("experiment", "keep", 0.8, "long", gain=0.1, commit=night.commit("x = 1\n" * 5000 + "y" * 5000))
    night.run("experiment", "keep", 0.7, "gone", gain=0.1, commit="e" * 40)
    night.run("experiment", "keep", 0.6, "odd", gain=0.1, commit="--output=made")
    page = page_of(night)
    assert "+2 −1" in page.text and "-A = 1" in page.text and "+A = 3" in page.text and "+C = 4" in page.text
    assert re.search(r"… 4\d\d\d more lines", page.text)
    assert "y" * (diffs.LINE_CHARACTERS + 1) not in page.text
    assert "git has no such diff" in page.text and "the record names no parent commit" in page.text
    assert page.count("span", "add") > 2 and page.count("span", "del") > 1


def test_without_a_repository_it_says_so(night: Synthetic) -> None:
    night.run("baseline", "keep", 1.0)
    night.run("experiment", "keep", 0.9, gain=0.1)
    assert "written without the repository" in page_of(night).text


# Sizes.


def test_a_thousand_experiments(tmp_path: Path, night: Synthetic) -> None:
    night.repo = repository(tmp_path / "repo", "A = 1\n")
    night.incumbent = str(night.repo.head.commit.hexsha)
    night.settings()
    night.run("baseline", "keep", 3.0, "baseline", floor=0.001, curve=loss_curve(3.0))
    for i in range(1, 1000):
        night.seconds = i * 360.0
        if i % 20 == 0:
            commit = night.commit("".join(f"A{j} = {i * j}\n" for j in range(400)))
            night.run("experiment", "keep", 3.0 - i / 1000, "d" * 150, "r" * 250, gain=0.02, holdout=3.0 - i / 1100,
                      commit=commit, curve=loss_curve(3.0))  # fmt: skip
        elif i % 7 == 0:
            night.run("experiment", "crash", None, "d" * 150, "r" * 250, log_tail=["x" * 1000] * 100)
        else:
            night.run("experiment", "discard", 3.1, "d" * 150, "r" * 250, gain=-0.1, curve=loss_curve(3.0))
    state = night.state
    began = time.process_time()
    path = write_page(state, night.repo)
    assert time.process_time() - began < 2.0
    assert path.stat().st_size < 5_000_000
    page = page_of(night)
    assert "350 of 1000 runs" in page.text and "650 earlier ones are left out" in page.text


def test_labels_cover_nothing() -> None:
    labels = [Label(20.0 + 6 * i, 20.0 + (i * 37) % 60, ["a name that is long", f"#{i}"]) for i in range(30)]
    area = (0.0, 0.0, 220.0, 110.0)
    placed = place(labels, area, [(x, 60.0) for x in range(0, 220, 12)])
    assert len(placed) >= 5
    boxes = [p.box for p in placed] + [(p.x - 4, p.y - 4, p.x + 4, p.y + 4) for p in labels]
    for i, a in enumerate(boxes[: len(placed)]):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 220 and a[3] <= 110
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# In a browser.

MEASURE = """<!doctype html><iframe id=f style="border:0;width:{width}px;height:900px" src="report.html"></iframe>
<script>onload = () => {{
  const d = document.getElementById("f").contentDocument, wide = document.getElementById("f").clientWidth
  d.querySelectorAll("details").forEach(e => e.open = true)
  const scrolls = e => e && (e.matches(".scroll, pre") || scrolls(e.parentElement))
  const out = [...d.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e))
  const color = d.defaultView.getComputedStyle(d.body).backgroundColor
  document.title = `measured ${{d.documentElement.scrollWidth}} of ${{wide}}, ${{out.length}} out, body ${{color}}`
}}</script>"""


@pytest.mark.chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_screen_and_the_browser_has_no_complaint(tmp_path: Path, night: Synthetic, width: int) -> None:
    night.repo = repository(tmp_path / "repo", "A = 1\n")
    night.incumbent = str(night.repo.head.commit.hexsha)
    realistic(night, 40, slots=2)
    night.run("experiment", "keep", 0.9, "w" * 400, "z" * 900, gain=0.1, commit=night.commit("v" * 3000))
    night.run("experiment", "crash", None, "w" * 400, "z" * 900, log_tail=["u" * 2000])
    folder = write_page(night.state, night.repo).parent
    (folder / "frame.html").write_text(MEASURE.format(width=width))
    with served(folder) as address:
        dom, said = browse(tmp_path, f"{address}/frame.html")
    measured = re.search(r"<title>measured (\d+) of (\d+), (\d+) out, body (rgb\([^)]*\))", dom)
    assert measured, dom[:2000] + said[-2000:]
    assert measured.groups() == (str(width), str(width), "0", "rgb(252, 252, 250)")  # the policy lets the style through
    console = [line for line in said.splitlines() if "CONSOLE" in line and "favicon" not in line]
    assert not console


def browse(folder: Path, address: str) -> tuple[str, str]:
    """What a page has become in a browser, and what the browser said."""
    done = subprocess.run(
        [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000",
         "--enable-logging=stderr", "--virtual-time-budget=5000",
         "--blink-settings=preferredColorScheme=1", "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


class served:
    """A folder on a port of this machine."""

    def __init__(self, folder: Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
