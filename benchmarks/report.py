"""What a run found: medians, medians of paired ratios, the bars, and the files that show them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from benchmarks import plot

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Record = dict[str, Any]

LOADERS = ("ckptfix.load_state_dict", "torch.load(mmap=True)")
BAR_SIZE = "2 GiB"
MIB = 1 << 20
STRIP, TO_CPU, CONVERT = "ckptfix strip-prefix", "ckptfix to-cpu", "ckptfix convert"
RECIPE, MMAP_SAVE = "pasted recipe", "torch.load(mmap) + torch.save"
SAVE_FILE, LOAD_FILE = "torch.load(mmap) + save_file", "load_file + torch.save"
IN_PLACE = tuple(f"ckptfix {verb} --in-place" for verb in ("strip-prefix", "to-cpu", "rename"))
DCP_TO_TORCH = "dcp_to_torch_save"
COLUMNS = ("wall", "CPU", "peak RssAnon", "written")


@dataclass(frozen=True, slots=True)
class Bar:
    """How ckptfix has to compare with a rival, at the size that bars are for.

    `limit` is the most that ckptfix's time divided by the rival's may be; `faster` says it the
    other way round, as the least that the rival's time divided by ckptfix's must be.
    """

    work: str
    ours: str
    rival: str
    limit: float
    faster: bool = False


BARS = (
    *(
        bar
        for ours in (STRIP, TO_CPU)
        for bar in (
            Bar("strip-prefix", ours, "cp", 1.15),
            Bar("strip-prefix", ours, "cp + fsync", 1.1),
            Bar("strip-prefix", ours, RECIPE, 6, faster=True),
            Bar("strip-prefix", ours, MMAP_SAVE, 2, faster=True),
        )
    ),
    Bar("to-safetensors", CONVERT, "cp", 1.4),
    Bar("to-safetensors", CONVERT, "cp + fsync", 1.4),
    Bar("to-safetensors", CONVERT, SAVE_FILE, 1.5, faster=True),
    Bar("from-safetensors", CONVERT, "cp", 1.4),
    Bar("from-safetensors", CONVERT, "cp + fsync", 1.4),
    Bar("from-safetensors", CONVERT, LOAD_FILE, 4, faster=True),
    Bar("cast", "ckptfix convert --dtype", "torch.load(mmap) + .to + save_file", 2, faster=True),
    Bar("read-data", "ckptfix check --read-data", "cmp", 1),
    Bar("many", STRIP, RECIPE, 4, faster=True),
    Bar("inspect", "ckptfix inspect", "import torch", 0.2),
    Bar("load", *LOADERS, 1.2),
    Bar("rows", CONVERT, "cp -r", 1.2),
    Bar("rows", CONVERT, DCP_TO_TORCH, 4, faster=True),
    Bar("columns", CONVERT, "cp -r", 2.5),
    Bar("columns", CONVERT, DCP_TO_TORCH, 4, faster=True),
    Bar("inspect-pieces", "ckptfix inspect", "ckptfix inspect, one file", 2),
)
"""The bars of time against a rival; `cp` syncs nothing, ckptfix does, so both cp are shown."""

ENOUGH = 5
"""So many rounds have a middle half worth showing."""
IN_PLACE_SECONDS = 0.3
IN_PLACE_WRITTEN = 4
MOST_MEMORY = 64 * MIB
BOUNDED = (
    "strip-prefix",
    "to-safetensors",
    "from-safetensors",
    "in-place",
    "rows",
    "columns",
    "to-dcp",
)
"""The works whose memory has a bar."""
SAME_MEMORY = 4 * MIB
"""What the peak may differ by between sizes and still be called the same: samples, and heaps."""


# --- numbers


def series(rows: Iterable[Record], key: str = "wall_s", **where: str) -> dict[int, float]:
    """One column of the rows that match, by round."""
    chosen = (row for row in rows if all(row[name] == value for name, value in where.items()))
    return {row["round"]: row[key] for row in chosen if row[key] is not None}


def middle(rows: Iterable[Record], key: str, **where: str) -> float | None:
    """The median of a column, or None where nothing was measured."""
    found = series(rows, key, **where)
    return median(found.values()) if found else None


def paired(rows: list[Record], work: str, size: str, ours: str, rival: str) -> list[float]:
    """One program's wall time divided by another's in the same round, for each round."""
    mine = series(rows, work=work, size=size, contender=ours)
    theirs = series(rows, work=work, size=size, contender=rival)
    return [mine[number] / theirs[number] for number in mine if number in theirs]


def sizes(rows: Iterable[Record], work: str) -> list[str]:
    """The sizes a work was measured at, the smallest first."""
    return list(dict.fromkeys(row["size"] for row in rows if row["work"] == work))


def bar_size(rows: list[Record], work: str) -> str | None:
    """The size at which a work is held against its bar: 2 GiB, or else the largest there is."""
    found = sizes(rows, work)
    return BAR_SIZE if BAR_SIZE in found else found[-1] if found else None


# --- bars


Verdict = tuple[str, str, str, bool]
"""Work, bar, measured, met."""


def verdicts(results: Record) -> list[Verdict]:
    """Every bar that can be judged by what was measured."""
    rows = results["measurements"]
    timed = [found for bar in BARS if (found := _timed(rows, bar)) is not None]
    in_place = [found for name in IN_PLACE for found in _in_place(results, name)]
    seen = dict.fromkeys((row["work"], row["contender"]) for row in rows if row["peak_rss_anon"])
    ours = [(work, name) for work, name in seen if work in BOUNDED and name.startswith("ckptfix")]
    return timed + in_place + [_memory(rows, work, name) for work, name in ours]


def _timed(rows: list[Record], bar: Bar) -> Verdict | None:
    size = bar_size(rows, bar.work)
    ratios = paired(rows, bar.work, size, bar.ours, bar.rival) if size else []
    if not ratios:
        return None
    where = f"{_name(bar.work, bar.ours)}, {size}"
    if bar.faster:
        ratios = [1 / ratio for ratio in ratios]
        wanted = f"≥ {bar.limit:g} x faster than {bar.rival}"
        return where, wanted, f"{_spread(ratios)} faster", median(ratios) >= bar.limit
    return where, f"≤ {bar.limit:g} x {bar.rival}", _spread(ratios), median(ratios) <= bar.limit


def _spread(ratios: list[float]) -> str:
    """The median of ratios, and between what the middle half of them lies."""
    if len(ratios) < ENOUGH:
        return f"{median(ratios):.2f} x"
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return f"{median(ratios):.2f} x ({low:.2f} to {high:.2f})"


def _name(work: str, contender: str) -> str:
    suffixes = {
        "to-safetensors": " .pt → .safetensors",
        "from-safetensors": " .safetensors → .pt",
        "rows": " rows of four ranks → .pt",
        "columns": " columns of four ranks → .pt",
        "inspect-pieces": " of a DCP folder",
    }
    return contender + suffixes.get(work, "")


def _in_place(results: Record, name: str) -> list[Verdict]:
    """The bars of an edit in place: time at every size, and bytes written."""
    rows, found = results["measurements"], []
    for size in sizes(rows, "in-place"):
        wall = middle(rows, "wall_s", work="in-place", size=size, contender=name)
        written = middle(rows, "bytes_written", work="in-place", size=size, contender=name)
        if wall is not None:
            fast = wall <= IN_PLACE_SECONDS
            found.append((f"{name}, {size}", f"≤ {IN_PLACE_SECONDS} s", f"{wall:.3f} s", fast))
        if written is not None:
            ratio = written / results["inputs"][f"pt {size}"]["pickle_and_directory"]
            wanted = f"writes ≤ {IN_PLACE_WRITTEN} x (pickle + directory)"
            said = f"{ratio:.2f} x ({bytes_text(int(written))})"
            found.append((f"{name}, {size}", wanted, said, ratio <= IN_PLACE_WRITTEN))
    return found


def _memory(rows: list[Record], work: str, name: str) -> Verdict:
    """The bar of memory: the medians at every size, and how far they lie apart."""
    found = sizes(rows, work)
    peaks = [middle(rows, "peak_rss_anon", work=work, size=s, contender=name) for s in found]
    known = [peak for peak in peaks if peak is not None]
    spread = max(known) - min(known)
    said = " · ".join(f"{peak / MIB:.1f}" for peak in known) + f" MiB at {' · '.join(found)}"
    met = max(known) <= MOST_MEMORY and spread <= SAME_MEMORY
    wanted = f"peak RssAnon ≤ {bytes_text(MOST_MEMORY)}, the same at every size"
    return _name(work, name), wanted, said, met


# --- text


def bytes_text(count: int) -> str:
    """A number of bytes for people: `2 GiB`, `40.5 MiB`, `812 B`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.1f}".removesuffix(".0") + f" {unit}"
        amount /= 1024
    return f"{amount:.1f}".removesuffix(".0") + " GiB"


def seconds_text(value: float) -> str:
    """Seconds for people, with about three digits."""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def _cells(rows: list[Record], **where: str) -> list[str]:
    """The medians of one program, in the order of COLUMNS."""
    wall, cpu = (middle(rows, key, **where) for key in ("wall_s", "cpu_s"))
    memory, written = (middle(rows, key, **where) for key in ("peak_rss_anon", "bytes_written"))
    times = [seconds_text(value) if value is not None else "" for value in (wall, cpu)]
    return times + [
        bytes_text(int(value)) if value is not None else "" for value in (memory, written)
    ]


def _contenders(rows: Iterable[Record], work: str, size: str) -> list[str]:
    """The programs of one work at one size, in the order of the first round."""
    chosen = (row for row in rows if row["work"] == work and row["size"] == size)
    return list(dict.fromkeys(row["contender"] for row in chosen))


def _lines(rows: list[Record], work: str, size: str) -> list[list[str]]:
    """A line for each program: name, medians, the first program's time divided by its own."""
    names = _contenders(rows, work, size)
    lines = []
    for name in names:
        ratios = paired(rows, work, size, names[0], name)
        cells = _cells(rows, work=work, size=size, contender=name)
        lines.append([name, *cells, f"{median(ratios):.2f}" if ratios and lines else ""])
    return lines


def medians(rows: list[Record], work: str, size: str) -> list[str]:
    """The same for a terminal."""
    return [
        f"{name:<42}" + "".join(f"{cell:>12}" for cell in cells)
        for name, *cells in _lines(rows, work, size)
    ]


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def markdown(results: Record) -> str:
    """The whole report."""
    rows, machine = results["measurements"], results["machine"]
    judged = verdicts(results)
    count = "1 run" if results["runs"] == 1 else f"{results['runs']} runs"
    text = [
        "# Results",
        "",
        f"`{results['command']}`; {count} of each program, medians; every input in",
        "the page cache. What is measured, and how: [README](../README.md).",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, "
        f"{bytes_text(machine['memory_bytes'])} of memory, {machine['file_system']}, "
        f"{machine['kernel']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        "",
        *(f"Skipped: {what}: {why}." for what, why in results["skipped"].items()),
        "",
        "![Time and memory against size](results.svg)",
        "",
        f"## Bars ({sum(met for *_, met in judged)} of {len(judged)} met)",
        "",
        f"They are for {BAR_SIZE}; where that was not measured, the largest size stands here.",
        "A smaller file shows how long Python takes to start. In brackets: between what the middle",
        "half of the rounds lies.",
        "",
        *_table(
            ("work", "bar", "measured", "met"),
            ((work, bar, said, "yes" if met else "**no**") for work, bar, said, met in judged),
        ),
    ]
    for work in dict.fromkeys(row["work"] for row in rows):
        for size in sizes(rows, work):
            lines = _lines(rows, work, size)
            head = ("", *COLUMNS, f"{lines[0][0]} ÷ this")
            text += ["", f"## {work}, {size}", "", *_table(head, lines)]
    return "\n".join(text) + "\n"


def write(results: Record, folder: Path) -> str:
    """Write results.json, results.md and results.svg; says how many bars were met."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(_json(results), "utf-8")
    (folder / "results.md").write_text(markdown(results), "utf-8")
    (folder / "results.svg").write_text(plot.svg(results["measurements"]), "utf-8")
    judged = verdicts(results)
    missed = [f"missed: {work}: {bar}: {said}" for work, bar, said, met in judged if not met]
    met = f"{len(judged) - len(missed)} of {len(judged)} bars met; {folder / 'results.md'}"
    return "\n".join([*missed, met])


def _json(results: Record) -> str:
    """Readable JSON, with one measurement to a line."""
    rest = {name: value for name, value in results.items() if name != "measurements"}
    rows = ",\n    ".join(json.dumps(row) for row in results["measurements"])
    return json.dumps(rest, indent=2)[:-2] + f',\n  "measurements": [\n    {rows}\n  ]\n}}\n'
