"""`ckptfix diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from ckptfix.cli import options, output, paths, reading, rows
from ckptfix.cli.usage import Misuse
from ckptfix.diffs.documents import diff
from ckptfix.edit import reduce
from ckptfix.report import Spec, shape
from ckptfix.tree.walk import nbytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from ckptfix.cli import answers
    from ckptfix.diffs.documents import Diff, StateDiff, ValueDifference
    from ckptfix.report import Difference

_SHOWN = 10
_KEY_WIDTH = 40


@click.command("diff", cls=paths.Verb)
@click.argument("a", metavar="A", type=paths.Read())
@click.argument("b", metavar="B", type=paths.Read())
@click.option(
    "--select",
    metavar="PATH",
    multiple=True,
    help="Compare only this state dict; given twice: that of A, then that of B.",
)
@click.option("--keys-only", is_flag=True, help="Keys, shapes and dtypes; no values.")
@click.option("--read-data", is_flag=True, help="Compare bytes where checksums could tell.")
@click.option("--all", "everything", is_flag=True, help="List every difference.")
@click.option(
    "--html",
    metavar="PAGE",
    type=paths.Written(),
    help="Draw it as a web page as well (-: print that instead).",
)
@click.option("--force", "-f", is_flag=True, help="Replace PAGE if it is there.")
@options.as_json
def command(
    a: str,
    b: str,
    select: tuple[str, ...],
    keys_only: bool,
    read_data: bool,
    everything: bool,
    html: str | None,
    force: bool,
) -> int:
    r"""Compare two checkpoints: keys, shapes, dtypes, values, and everything beside.

    State dicts are paired by their paths. Keys that a prefix sets apart are recognised, and so is a
    tensor that stands under another name. Equal checksums on record count as equal values, so that
    large files take no time; where they are lacking, bytes are compared. Of tensors that differ,
    the largest difference is told, absolute, and relative to the larger of the two values.

    \b
    Examples:
      ckptfix diff before.pt after.pt
      ckptfix diff --keys-only model.pt model.safetensors
      ckptfix diff --select state_dict --select state_dict_ema run.pt run.pt
    """
    selected = _selected(select)
    one, other = reading.read(a), reading.read(b)
    for side in (one, other):
        reduce.check_one(side)
    with output.progress("comparing", lambda: nbytes(one.root)) as advance:
        found = diff(
            one, other, select=selected, keys_only=keys_only, read_data=read_data, progress=advance
        )
    if html is not None:
        from ckptfix import page

        text = page.of_diff(found, one, other)
        if html == paths.STDOUT:
            output.page(text)
            return 0 if found.same else 1
        page.write(text, html, force=force)
    return output.answer(
        lambda: _data(found, b, keys_only=keys_only),
        lambda console: _draw(console, found, None if everything else _SHOWN),
        input=a,
        output=html,
        exit_code=0 if found.same else 1,
    )


def _selected(select: Sequence[str]) -> tuple[str, str] | None:
    if len(select) > 2:
        raise Misuse("--select: give it once for both sides, or twice: A's, then B's")
    return (select[0], select[-1]) if select else None


# --- as JSON


def _data(found: Diff, other: str, *, keys_only: bool) -> answers.Diff:
    return {
        "other": other,
        "same": found.same,
        "keys_only": keys_only,
        "state_dicts": [_state_data(state) for state in found.state_dicts],
        "others": [{"path": row.path, "input": row.a, "other": row.b} for row in found.others],
    }


def _state_data(state: StateDiff) -> answers.StatesDiffer:
    return {
        "input": state.a,
        "other": state.b,
        "equal": state.equal,
        "removed": _listed(state.removed),
        "added": _listed(state.added),
        "renamed": state.renamed,
        "shapes": [_pair(row) for row in state.shapes],
        "dtypes": [_pair(row) for row in state.dtypes],
        "values": [_value(row) for row in state.values],
    }


def _listed(specs: dict[str, Spec]) -> list[answers.Added]:
    return [{"key": key, **rows.spec(spec)} for key, spec in specs.items()]


def _pair(row: Difference) -> answers.Pair:
    return {"key": row.key, "input": rows.spec(row.found), "other": rows.spec(row.wanted)}


def _value(row: ValueDifference) -> answers.Values:
    """JSON has no infinity: a difference without bound is null, and so is one of no numbers."""
    differing, *sizes = row.distance
    absolute, relative = (None if s in (None, float("inf")) else s for s in sizes)
    return {
        "key": row.key,
        "other": row.other,
        "elements": row.numel,
        "differing": differing,
        "max_abs": absolute,
        "max_rel": relative,
    }


# --- for people


class _Section(NamedTuple):
    title: str
    sign: str
    rows: list[str]
    style: str


def _draw(console: Console, found: Diff, limit: int | None) -> None:
    from rich.text import Text

    for state in found.state_dicts:
        _draw_sections(console, list(_sections(state, limit)), limit)
    others = [f"{row.path}: {_change(row.a, row.b)}" for row in found.others]
    if others:
        _draw_sections(console, [_Section("other values", "~", others, "yellow")], limit)
    verdict, style = ("the same", "bold green") if found.same else ("different", "bold red")
    names = (output.printable(name) for name in (found.a, found.b))
    console.print(Text.assemble(" and ".join(names), ": ", (verdict, style)), soft_wrap=True)
    for line in found.summary:
        console.print(Text(output.printable(line)))


def _draw_sections(console: Console, sections: list[_Section], limit: int | None) -> None:
    from rich.text import Text

    for title, sign, lines, style in sections:
        console.print(Text(f"{title} ({len(lines):,})", "bold"))
        for line in lines[:limit]:
            console.print(Text(f"  {sign} {output.printable(line)}", style), soft_wrap=True)
        if limit is not None and len(lines) > limit:
            told = output.more(len(lines) - limit, "--all has them")
            console.print(Text(f"  {told}", "dim"))


def _sections(state: StateDiff, limit: int | None) -> Iterator[_Section]:
    where = "" if state.a == state.b == "/" else f" in {state.a}"
    if state.a != state.b:
        where = f" in {state.a} (A), {state.b} (B)"
    label = f": {state.label}" if state.label else ""
    renamed = [f"{_cut(old, limit)} -> {new}" for old, new in state.renamed.items()]
    shapes = [f"{_cut(r.key, limit)}  {shape(r.found)} -> {shape(r.wanted)}" for r in state.shapes]
    dtypes = [f"{_cut(r.key, limit)}  {r.found.dtype} -> {r.wanted.dtype}" for r in state.dtypes]
    sections = (
        _Section(f"only in A{where}", "-", _specs(state.removed, limit), "red"),
        _Section(f"only in B{where}", "+", _specs(state.added, limit), "green"),
        _Section(f"renamed{where}{label}", ">", renamed, ""),
        _Section(f"of another shape{where}", "!", shapes, "red"),
        _Section(f"of another dtype{where}", "~", dtypes, "yellow"),
        _Section(f"of other values{where}", "~", _value_rows(state, limit), "yellow"),
    )
    yield from (section for section in sections if section.rows)


def _specs(specs: dict[str, Spec], limit: int | None) -> list[str]:
    return [f"{_cut(key, limit)}  {spec.dtype or ''} {shape(spec)}" for key, spec in specs.items()]


def _value_rows(state: StateDiff, limit: int | None) -> list[str]:
    """The largest difference first, in columns as `git diff --stat` has them."""
    ordered = sorted(state.values, key=lambda row: -(row.distance.max_abs or 0))
    keys = [_cut(row.key, limit) for row in ordered]
    width = max(map(len, keys[:limit]), default=0)
    return [f"{key:{width}} | {_measured(row)}" for key, row in zip(keys, ordered, strict=True)]


def _measured(row: ValueDifference) -> str:
    differing, absolute, relative = row.distance
    if differing is None:
        return "other bytes"
    if row.distance.in_bits_only:
        return "equal, but not bit by bit (-0, NaN)"
    share = "all" if differing == row.numel else f"{differing:,} of"
    return f"{share} {row.numel:,}, abs {absolute:.1e}, rel {relative:.1e}"


def _cut(key: str, limit: int | None) -> str:
    """A key, its beginning left out where it is long: the end tells more."""
    return key if limit is None or len(key) <= _KEY_WIDTH else f"…{key[1 - _KEY_WIDTH :]}"


def _change(a: str | None, b: str | None) -> str:
    if a is None or b is None:
        return f"only in {'A' if b is None else 'B'} ({b if a is None else a})"
    return f"{a} -> {b}" if a != b else f"{a}, of another value"
