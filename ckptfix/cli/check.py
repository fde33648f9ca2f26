"""`ckptfix check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix import formats
from ckptfix import target as targets
from ckptfix.cli import options, output
from ckptfix.compare import Difference, Report, shape
from ckptfix.diagnose import Remedy, remedy
from ckptfix.state_dicts import StateDict, choose

if TYPE_CHECKING:
    from rich.console import Console

    from ckptfix.document import Document
    from ckptfix.target import Target

_SHOWN = 12


@click.command("check")
@click.argument("file", metavar="FILE", type=click.Path())
@options.target
@options.select
@options.as_json
def command(
    file: str, model: str | None, init: str | None, like: str | None, select: str | None
) -> int:
    r"""Say whether a checkpoint is sound, and whether it fits a model.

    With a model or another checkpoint to compare with, keys, shapes and dtypes are held against
    it, as load_state_dict would. The model is built on the meta device and takes no memory; its
    code is run, the checkpoint's never is.

    \b
    Examples:
      ckptfix check model.pt
      ckptfix check model.pt --model net.py:Net --init '{"layers": 3}'
      ckptfix check model.pt --like other.safetensors

    \b
    Exit codes:
      0  it is sound, and fits
      1  it does not fit, or is damaged
      2  it cannot be read, or there is nothing to compare with
    """
    wanted = options.wanted(model, init, like)
    document = formats.read(file)
    if wanted is None:
        output.answer(
            {"command": "check", "input": file, "sound": True, "container": document.container},
            f"{file}: sound ({document.container}, {output.size(document.nbytes)})",
        )
        return 0
    state = choose(document, select)
    report = targets.report(state, wanted)
    cure = None if report.loads else remedy(document, state, wanted)
    output.answer(
        {"command": "check", "input": file, "sound": True, **_data(state, wanted, report, cure)},
        lambda console: _draw(console, document, state, wanted, report, cure),
    )
    return 0 if report.loads else 1


def _data(state: StateDict, wanted: Target, report: Report, cure: Remedy | None) -> dict[str, Any]:
    def rows(differences: list[Difference]) -> list[dict[str, Any]]:
        return [
            {"key": row.key, "found": row.found._asdict(), "wanted": row.wanted._asdict()}
            for row in differences
        ]

    return {
        "state_dict": state.path,
        "target": wanted.name,
        "loads": report.loads,
        "share": report.share,
        "matched": report.matched,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "shape_mismatch": rows(report.shape_mismatch),
        "dtype_difference": rows(report.dtype_difference),
        "elements_left_at_random": report.random_numel,
        "remedy": None if cure is None else cure._asdict(),
    }


def _draw(
    console: Console,
    document: Document,
    state: StateDict,
    wanted: Target,
    report: Report,
    cure: Remedy | None,
) -> None:
    from rich.text import Text

    where = "" if state.path == "/" else f" ({state.path})"
    verdict = "matches" if report.loads else "does not match"
    style = "bold green" if report.loads else "bold red"
    name = output.printable(document.name)
    console.print(Text.assemble(f"{name}{where} ", (verdict, style), f" {wanted.name}"))
    console.print(_counts(report))
    for title, sign, rows in _sections(report):
        console.print(Text(f"\n{title}", "bold"))
        for row in rows[:_SHOWN]:
            console.print(Text(f"  {sign} {output.printable(row)}"), overflow="fold")
        if len(rows) > _SHOWN:
            console.print(Text(f"  … and {len(rows) - _SHOWN:,} more (--json has all)", "dim"))
    if report.random_numel:
        console.print(
            f"\nWith strict=False, {report.random_numel:,} of {report.target_numel:,} elements "
            f"would silently stay at random."
        )
    if cure is not None:
        console.print(Text(f"\n{cure.message}"))
        if cure.command is not None:
            console.print(Text(f"  {output.printable(cure.command)}", "cyan"), soft_wrap=True)


def _counts(report: Report) -> str:
    total = len(report.matched) + len(report.missing) + len(report.shape_mismatch)
    counts = (
        f"{len(report.matched):,} of {total:,} keys matched ({report.share:.1%} of the elements)",
        f"{len(report.missing):,} missing",
        f"{len(report.unexpected):,} unexpected",
        f"{len(report.shape_mismatch):,} of another shape",
        f"{len(report.dtype_difference):,} of another dtype",
    )
    return ", ".join(counts)


def _sections(report: Report) -> list[tuple[str, str, list[str]]]:
    shapes = [
        f"{row.key}: {shape(row.found)}, the model has {shape(row.wanted)}"
        for row in report.shape_mismatch
    ]
    dtypes = [
        f"{row.key}: {row.found.dtype}, the model has {row.wanted.dtype}"
        for row in report.dtype_difference
    ]
    sections = [
        ("missing: the model has them, the file does not", "-", report.missing),
        ("unexpected: the file has them, the model does not", "+", report.unexpected),
        ("of another shape", "!", shapes),
        ("of another dtype (torch casts them when it loads)", "~", dtypes),
    ]
    return [section for section in sections if section[2]]
