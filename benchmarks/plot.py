"""The plot: wall time and peak memory against the size of the checkpoint, as SVG by hand.

Two panels side by side, both axes logarithmic, a legend below.
"""

from __future__ import annotations

import math
from html import escape
from statistics import median
from typing import Any, NamedTuple

Record = dict[str, Any]
Points = list[tuple[float, float]]

WIDTH, HEIGHT = 860, 440
PANEL = (330, 280)
TOP = 56
LEFTS = (70, 500)
MIB = 1 << 20

LINES = (
    ("strip-prefix", "ckptfix strip-prefix", "#0b6e4f", ""),
    ("in-place", "ckptfix strip-prefix --in-place", "#38b48b", ""),
    ("strip-prefix", "cp", "#444444", "4 3"),
    ("strip-prefix", "torch.load(mmap) + torch.save", "#d98e04", ""),
    ("strip-prefix", "pasted recipe", "#c0392b", ""),
)
"""Work, program, colour, dashes."""


def memory(value: float) -> str:
    """Bytes for people: `64 MiB`, `2 GiB`."""
    return f"{value / (1024 * MIB):g} GiB" if value >= 1024 * MIB else f"{value / MIB:g} MiB"


def seconds(value: float) -> str:
    """Seconds for people: `0.3 s`."""
    return f"{value:g} s"


TIMES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
MEMORIES = tuple(4**power * MIB for power in range(8))
PANELS = (
    ("wall_s", "Wall time", TIMES, seconds),
    ("peak_rss_anon", "Peak memory (RssAnon)", MEMORIES, memory),
)
STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#333}"
    ".title{font-size:15px;font-weight:600}.grid{stroke:#e4e4e4}"
    "polyline{fill:none;stroke-width:2.5;stroke-linejoin:round}"
)


class Axis(NamedTuple):
    """A logarithmic axis: values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)


def svg(rows: list[Record]) -> str:
    """The plot of what was measured; a panel with nothing to show says so."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        "<title>Wall time and peak memory against the size of the checkpoint</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
    ]
    for left, (key, title, marks, label) in zip(LEFTS, PANELS, strict=True):
        found = [(points(rows, work, name, key), *style) for work, name, *style in LINES]
        named = [(value, label(value)) for value in marks]
        parts += panel(left, title, [line for line in found if line[0]], named)
    return "\n".join([*parts, *legend(rows), "</svg>"]) + "\n"


def points(rows: list[Record], work: str, name: str, key: str) -> Points:
    """The medians of one program by bytes of the checkpoint; zeros have no place on the axis."""
    mine = [row for row in rows if (row["work"], row["contender"]) == (work, name) and row[key]]
    amounts = sorted({row["amount"] for row in mine})
    return [(at, median(row[key] for row in mine if row["amount"] == at)) for at in amounts]


def panel(left: int, title: str, lines: list[Any], marks: list[tuple[float, str]]) -> list[str]:
    """One panel: title, grid, axes, a line for each program."""
    parts = [text(left, TOP - 20, title, "start", "title")]
    if not lines:
        return [*parts, text(left, TOP + 20, "nothing measured", "start")]
    across, up = axes(left, [point for shown, *_ in lines for point in shown])
    for value in sorted({point[0] for shown, *_ in lines for point in shown}):
        parts += tick(across.at(value), TOP, across.at(value), up.start)
        parts.append(text(across.at(value), up.start + 20, memory(value), "middle"))
    for value, name in marks:
        if up.low <= value <= up.high:
            parts += tick(across.start, up.at(value), across.end, up.at(value))
            parts.append(text(left - 8, up.at(value) + 4, name, "end"))
    for shown, colour, dashes in lines:
        parts += drawn([(across.at(x), up.at(y)) for x, y in shown], colour, dashes)
    return parts


def axes(left: int, shown: Points) -> tuple[Axis, Axis]:
    """Axes that hold all points, with a little room at the sides."""
    width, height = PANEL
    sizes, values = [x for x, _ in shown], [y for _, y in shown]
    across = Axis(min(sizes) / 1.3, max(sizes) * 1.3, left, left + width)
    return across, Axis(min(values) / 1.5, max(values) * 1.5, TOP + height, TOP)


def drawn(pixels: Points, colour: str, dashes: str) -> list[str]:
    """A line with a dot at each size."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in pixels]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return [f'<polyline points="{joined}" stroke="{colour}"{dashed}/>', *dots]


def legend(rows: list[Record]) -> list[str]:
    """The programs that were measured and their colours, three to a row."""
    names = {(row["work"], row["contender"]) for row in rows}
    shown = [line for line in LINES if line[:2] in names]
    parts = []
    for number, (_, name, colour, dashes) in enumerate(shown):
        x, y = LEFTS[0] + number % 3 * 265, TOP + PANEL[1] + 52 + number // 3 * 26
        parts += drawn([(x, y), (x + 28, y)], colour, dashes)
        parts.append(text(x + 38, y + 4, name, "start"))
    return parts


def tick(x1: float, y1: float, x2: float, y2: float) -> list[str]:
    """A line of the grid."""
    return [f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="grid"/>']


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """A piece of text."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'
