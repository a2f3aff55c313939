"""HTML and SVG whose text is escaped by construction, and the arithmetic of a chart.

`h("td", text)` escapes `text` whoever wrote it, an agent, a run or we; what is markup already says so by its type,
`Html`, and only `h` and `join` make that. So no caller can forget to escape.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["FONT", "Frame", "Html", "Label", "h", "join", "place", "svg", "text_width", "ticks"]

_Box = tuple[float, float, float, float]  # left, top, right, bottom

FONT = 11  # of every chart, in its own units; charts are drawn at about the width at which they are shown

_VOID = {"meta", "br", "hr"}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# Control characters, lone surrogates, and those that turn the direction of text, which can make code read as another.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", _ANSI.sub("", text.replace("\r\n", "\n")))


def h(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Children that are not Html are escaped; None is left out, as is an attribute that is None.

    `class_` is `class`, and `stroke_width` is `stroke-width`.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.6g}" if isinstance(value, float) else _clean(str(value))
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(shown)}"')
    start = " ".join(words)
    return Html(f"<{start}>" if name in _VOID else f"<{start}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts side by side; those that are not Html are escaped."""
    return Html("".join(p if isinstance(p, Html) else html.escape(_clean(str(p))) for p in parts if p is not None))


def svg(ident: str, width: float, height: float, title: str, desc: str, *children: object) -> Html:
    """A drawing that a screen reader can name; `ident` must be the only one of the page."""
    return h(
        "svg",
        h("title", title, id=f"{ident}-t"),
        h("desc", desc, id=f"{ident}-d"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}", role="img", aria_labelledby=f"{ident}-t {ident}-d",
    )  # fmt: skip


def ticks(low: float, high: float, count: int) -> list[float]:
    """Up to about `count` round numbers between two others."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decimals(marks: Sequence[float]) -> int:
    """How many decimals tell these apart."""
    gap = min((b - a for a, b in itertools.pairwise(marks)), default=1.0)
    return max(0, min(9, -math.floor(math.log10(gap) + 1e-9))) if gap > 0 else 0


@dataclass
class Frame:
    """A plot's area within its drawing and what its edges stand for: x0..x1 to the right, y0 (below)..y1 (above)."""

    width: float
    height: float
    x0: float
    x1: float
    y0: float
    y1: float
    left: float = 56
    right: float = 10
    top: float = 12
    bottom: float = 34

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / ((self.x1 - self.x0) or 1) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - self.y0) / ((self.y1 - self.y0) or 1) * span

    def path(self, points: Iterable[tuple[float, float]], step: bool = False) -> str:
        """A path through points given in the plot's values; `step` goes level first, then up or down."""
        words: list[str] = []
        for x, y in points:
            px, py = f"{self.x(x):.1f}", f"{self.y(y):.1f}"
            words.append(f"M{px} {py}" if not words else f"H{px}V{py}" if step else f"L{px} {py}")
        return "".join(words)

    def axes(self, x_name: str, y_name: str, x_marks: Sequence[tuple[float, str]] | None = None) -> Html:
        """Grid, figures and names of both axes."""
        parts: list[Html] = []
        y_marks = ticks(self.y0, self.y1, 7)
        places = decimals(y_marks)
        for mark in y_marks:
            y = self.y(mark)
            parts.append(h("path", d=f"M{self.left:g} {y:.1f}H{self.width - self.right:g}", class_="grid"))
            parts.append(h("text", f"{mark:.{places}f}", x=self.left - 6, y=round(y + 4, 1), class_="end"))
        if x_marks is None:
            values = ticks(self.x0, self.x1, max(2, int(self.width / 75)))
            x_marks = [(v, f"{v:g}") for v in values if v == int(v)]
        for value, name in x_marks:
            half = text_width(name) / 2
            x = min(max(self.x(value), half), self.width - half)
            parts.append(h("text", name, x=round(x, 1), y=self.height - 18, class_="mid"))
        base = self.height - self.bottom
        parts.append(h("path", d=f"M{self.left:g} {base:g}H{self.width - self.right:g}", class_="axis"))
        middle = (self.left + self.width - self.right) / 2
        parts.append(h("text", x_name, x=middle, y=self.height - 3, class_="mid name"))
        parts.append(h("text", y_name, x=self.left + 2, y=self.top - 2, class_="name"))
        return join(parts)


def text_width(text: str, size: float = FONT) -> float:
    """Not less than what a system font takes."""
    return sum(1.05 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in text) * size


@dataclass
class Label:
    """What a point may be called: the first of `texts`, longest first, that finds room. `place` fills in the rest."""

    x: float
    y: float
    texts: Sequence[str]
    text: str = ""
    anchor: str = "start"
    box: _Box = field(default=(0, 0, 0, 0))


def _boxes(label: Label, text: str, gap: float) -> Iterator[tuple[str, _Box]]:
    """Where a text may stand: above to the right, below to the left (where a falling line is not), then elsewhere."""
    wide, tall = text_width(text), FONT + 2.0
    x = {"start": label.x + 4, "middle": label.x - wide / 2, "end": label.x - 4 - wide}
    above, below = label.y - gap - tall, label.y + gap
    places = [("start", above), ("end", below), ("middle", above), ("middle", below), ("start", below), ("end", above)]
    for anchor, y in places:
        yield anchor, (x[anchor], y, x[anchor] + wide, y + tall)


def place(
    labels: Sequence[Label], area: _Box, others: Sequence[tuple[float, float]] = (), gap: float = 5
) -> list[Label]:
    """Labels that cover neither each other nor a labelled point nor leave the area; some may find no room.

    The shortest texts are placed first, if need be over `others`, which are points without a label; the longer ones
    where there is still room and nothing to cover. So no long text takes the place of a short one.
    """
    taken = _Boxes((p.x - 4, p.y - 4, p.x + 4, p.y + 4) for p in labels)
    dots = _Boxes((x - 3, y - 3, x + 3, y + 3) for x, y in others)
    placed: list[Label] = []

    def find(label: Label, texts: Sequence[str], over_dots: bool = False) -> bool:
        for text in texts:
            for anchor, box in _boxes(label, text, gap):
                if _inside(box, area) and taken.free(box, label) and (over_dots or dots.free(box)):
                    label.text, label.anchor, label.box = text, anchor, box
                    taken.add(box, label)
                    return True
        return False

    for label in labels:
        if find(label, label.texts[-1:]) or find(label, label.texts[-1:], over_dots=True):
            placed.append(label)
    for label in placed:
        find(label, label.texts[:-1])
    return placed


class _Boxes:
    """Boxes by the cells of a grid that they touch, so that a box is compared with its neighbours alone.

    A box is entered once for each place to the half pixel: thousands of points lie on the pixels of one line.
    """

    WIDE, TALL = 40.0, 20.0

    def __init__(self, boxes: Iterable[_Box] = ()) -> None:
        self._cells: dict[tuple[int, int], dict[_Box, object]] = {}
        for box in boxes:
            self.add((round(2 * box[0]) / 2, round(2 * box[1]) / 2, round(2 * box[2]) / 2, round(2 * box[3]) / 2))

    def add(self, box: _Box, owner: object = None) -> None:
        for cell in self._touched(box):
            self._cells.setdefault(cell, {})[box] = owner

    def free(self, box: _Box, owner: object = None) -> bool:
        """Whether it covers none, but for those of its owner: the one that it takes the place of."""
        for cell in self._touched(box):
            for other, whose in self._cells.get(cell, {}).items():
                if not _apart(box, other) and (owner is None or whose is not owner):
                    return False
        return True

    def _touched(self, box: _Box) -> Iterator[tuple[int, int]]:
        for i in range(int(box[0] // self.WIDE), int(box[2] // self.WIDE) + 1):
            for j in range(int(box[1] // self.TALL), int(box[3] // self.TALL) + 1):
                yield i, j


def _inside(box: _Box, area: _Box) -> bool:
    return box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]


def _apart(a: _Box, b: _Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
