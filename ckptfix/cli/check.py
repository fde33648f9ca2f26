"""`ckptfix check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix import door, hints
from ckptfix.cli import findings, options, output, paths, reading
from ckptfix.contents.state_dicts import StateDict, choose
from ckptfix.diagnose import damage
from ckptfix.diagnose.document import diagnose
from ckptfix.door import beside
from ckptfix.errors import ChangedMeaningError, CkptfixError, DamagedError, SelectionError
from ckptfix.findings import Finding
from ckptfix.formats import embedded
from ckptfix.hints import Hint
from ckptfix.match import judge, transposes
from ckptfix.match.choose import look
from ckptfix.match.remedy import Remedy, remedy
from ckptfix.report import Difference, Report, counts, sections, without_strict
from ckptfix.tree.walk import nbytes
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from ckptfix.match.choose import Match
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document

_SHOWN = 12


@click.command("check", cls=paths.Verb)
@click.argument("file", metavar="FILE", type=paths.Read())
@options.target
@options.select
@options.average
@click.option("--read-data", is_flag=True, help="Read every byte: checksums, NaN and infinities.")
@options.as_json
def command(
    file: str,
    model: str | None,
    init: str | None,
    like: str | None,
    select: str | None,
    average: bool,
    read_data: bool,
) -> int:
    r"""Say whether a checkpoint is sound, and whether it fits a model.

    With a model or another checkpoint to compare with, keys, shapes and dtypes are held against
    it, as load_state_dict would. The model is built on the meta device and takes no memory; its
    code is run, the checkpoint's never is. With --read-data every byte is read: checksums where the
    container keeps them, and how many NaN and infinities each tensor holds.

    \b
    Examples:
      ckptfix check model.pt
      ckptfix check --read-data model.pt
      ckptfix check model.pt --model net.py:Net --init '{"layers": 3}'
      ckptfix check model.pt --like other.safetensors

    \b
    Exit codes:
      0  its structure is sound, and it fits
      1  it does not fit, or is damaged
      2  it is not a checkpoint, or the model cannot be built
    """
    wanted = options.wanted(model, init, like)
    asked = select
    answer: dict[str, Any] = {"command": "check", "input": file}
    try:
        document = reading.read(file)
    except DamagedError as error:
        return _say_damaged(answer, file, error)
    found = diagnose(document)
    document, select = embedded.taken(document, select)
    if average:
        document, select = options.averages(document, select)
    if read_data:
        with output.progress(f"reading {file}", lambda: nbytes(document.root)) as advance:
            data_read = damage.read_data(document, advance)
        answer["data"] = data_read.as_dict()
        found += damage.findings(data_read)
        if not data_read.is_sound:
            first = DamagedError(data_read.damaged[0], hint=_recover(document))
            return _say_damaged(answer, file, first, data_read.damaged[1:])
    answer |= {"sound": True, "container": document.container, "findings": findings.rows(found)}
    if wanted is None:
        if select is not None:
            choose(document, select)
        output.answer(answer, lambda console: _draw_sound(console, document, found))
        return 0
    meant, problem = look(document, wanted, select)
    if isinstance(problem, SelectionError):
        raise problem
    state = meant.state
    report = judge.as_it_stands(document, state, wanted)
    given: dict[str, str | bool | None] = {
        "select": asked,
        "average": average,
        "model": model,
        "init": init,
        "like": like,
    }
    cure = None if report.loads else _cure(document, wanted, meant, problem, given)
    found += _about_values(state, wanted, report)
    answer["findings"] = findings.rows(found)
    beside = [finding for finding in found if finding.code not in _ABOUT_NAMES]

    def draw(console: Console) -> None:
        _draw(console, document, state, wanted, report)
        _draw_cure(console, cure)
        findings.draw(console, document, beside)

    output.answer({**answer, **_data(state, wanted, report, cure)}, draw)
    return 0 if report.loads else 1


def _about_values(state: StateDict, wanted: Target, report: Report) -> Iterator[Finding]:
    """What loads, and may not be what it was."""
    square = transposes.unseen(report, wanted.specs)
    if square:
        what = f"they may be transposed, which square weights do not tell: {listed(square)}"
        yield Finding("unseen-transpose", what, state.path)
    if report.changes:
        what = f"torch changes values as it loads them: {listed(report.changes)}"
        yield Finding("values-change", what, state.path)


def _cure(
    document: Document,
    wanted: Target,
    meant: Match,
    problem: CkptfixError | None,
    given: dict[str, str | bool | None],
) -> Remedy:
    """What makes it load, or the sentence that says why nothing does."""
    if problem is not None:
        what, hint = problem.what.removeprefix(f"does not match {wanted.name}: "), problem.hint
        if isinstance(problem, ChangedMeaningError) and problem.options and hint is not None:
            options = {**given, **problem.options}
            fix = hints.command("fix", document.name, beside(document, "fixed"), **options)
            return Remedy(f"{what}\n{hint.text.partition(':')[0]}:", fix)
        return Remedy(what if hint is None else f"{what}\n{hint}", None)
    once = judge.written_once(document, meant.state)
    untie = any(key in once or key in meant.tied for key in wanted.specs) and _is_flat(document)
    fix = hints.command("fix", document.name, beside(document, "fixed"), untie=untie, **given)
    found = None if given["average"] else remedy(document, meant.state, wanted)
    return found or Remedy("This makes a file that loads:", fix)


def _is_flat(document: Document) -> bool:
    """Whether the hint to repair it names an output that holds a tied tensor once."""
    return door.resolve(beside(document, "fixed")).container.tensors_only


_ABOUT_NAMES = frozenset(
    {"prefix-wrapper", "partial-prefix", "key-collision", "wrapper-inside", "swa-layout"}
)
"""Findings about which a target knows better."""


def _recover(document: Document) -> Hint:
    out = beside(document, "recovered")
    return Hint("save what is whole", hints.command("recover", document.name, out))


def _say_damaged(
    answer: dict[str, Any], file: str, error: DamagedError, more: Sequence[str] = ()
) -> int:
    problem = {"code": error.code, "message": error.message, "hint": output.said(error.hint)}

    def draw(console: Console) -> None:
        for message in (error.what, *more[: _SHOWN - 1]):
            console.print(output.text(f"{file}: damaged: {message}"), soft_wrap=True)
        if len(more) >= _SHOWN:
            console.print(output.more(len(more) - _SHOWN + 1, "--json has all"))

    output.answer({**answer, "sound": False, "problem": problem}, draw)
    if error.hint is not None:
        output.hint(error.hint)
    return 1


def _draw_sound(console: Console, document: Document, found: list[Finding]) -> None:
    where = f"{document.container}, {output.size(document.nbytes)}"
    sound = ("structure is sound", "bold green")
    console.print(output.text(f"{document.name}: ", sound, f" ({where})"))
    findings.draw(console, document, found)


def _data(state: StateDict, wanted: Target, report: Report, cure: Remedy | None) -> dict[str, Any]:
    def rows(differences: list[Difference]) -> list[dict[str, Any]]:
        return [
            {"key": row.key, "found": row.found.as_dict(), "wanted": row.wanted.as_dict()}
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
        "forgiven": report.forgiven,
        "missing_buffers": report.buffers,
        "shape_mismatch": rows(report.shape_mismatch),
        "kind_mismatch": rows(report.kind_mismatch),
        "refusals": report.refusals,
        "dtype_difference": rows(report.dtype_difference),
        "elements_left_at_random": report.random_numel,
        "remedy": None if cure is None else _remedy_data(cure),
    }


def _draw(
    console: Console, document: Document, state: StateDict, wanted: Target, report: Report
) -> None:
    where = "" if state.path == "/" else f" ({state.path})"
    verdict = ("matches", "bold green") if report.loads else ("does not match", "bold red")
    console.print(output.text(f"{document.name}{where} ", verdict, f" {wanted.name}"))
    for line in counts(report):
        console.print(line)
    for title, sign, rows in sections(report):
        console.print()
        console.print(output.text((title, "bold")))
        for row in rows[:_SHOWN]:
            console.print(output.text(f"  {sign} {row}"), soft_wrap=True)
        if len(rows) > _SHOWN:
            told = output.more(len(rows) - _SHOWN, "--json has all")
            console.print(output.text((f"  {told}", "dim")))
    for line in without_strict(report):
        console.print(f"\n{line}", soft_wrap=True)


def _remedy_data(cure: Remedy) -> dict[str, str | None]:
    return {"message": cure.message, "command": output.said(cure.command)}


def _draw_cure(console: Console, cure: Remedy | None) -> None:
    if cure is None:
        return
    console.print()
    for line in cure.message.splitlines():
        console.print(output.text(line), soft_wrap=True)
    if cure.command is not None:
        console.print(output.text("  ", (str(cure.command), "cyan")), soft_wrap=True)
