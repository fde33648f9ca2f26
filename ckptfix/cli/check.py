"""`ckptfix check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from ckptfix import door, hints
from ckptfix.cli import findings, options, output, paths, reading, rows
from ckptfix.contents.state_dicts import StateDict, choose
from ckptfix.diagnose import damage
from ckptfix.diagnose.document import diagnose
from ckptfix.door import beside
from ckptfix.edit import reduce
from ckptfix.errors import ChangedMeaningError, CkptfixError, DamagedError
from ckptfix.findings import Finding
from ckptfix.formats import embedded
from ckptfix.hints import Hint
from ckptfix.match import judge, transposes
from ckptfix.match.choose import as_it_stands
from ckptfix.report import Difference, Report, counts, sections, without_strict
from ckptfix.tree.walk import nbytes
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from ckptfix.cli import answers
    from ckptfix.hints import Command
    from ckptfix.match.choose import Match
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document

_SHOWN, _SCREEN, _AROUND = 12, 24, 3
"""Keys of one kind that are shown, lines of all kinds, and those around the keys of a kind."""


class Remedy(NamedTuple):
    """What makes a file load into a target: in words, and as a command where there is one."""

    message: str
    command: Command | None


@click.command("check", cls=paths.Verb)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=paths.Read())
@options.target
@options.select
@options.average
@click.option("--read-data", is_flag=True, help="Read every byte: checksums, NaN and infinities.")
@options.as_json
def command(
    files: tuple[str, ...],
    model: str | None,
    init: str | None,
    like: str | None,
    select: str | None,
    average: bool,
    read_data: bool,
) -> int:
    r"""Say whether a checkpoint is sound, and whether it fits a model.

    Sound is a file that torch.load takes, that nothing in it keeps from loading rightly, and that
    calls nothing dangerous. With a model or another checkpoint to compare with, keys, shapes and
    dtypes are held against it, as load_state_dict would. The model is built on the meta device and
    takes no memory; its code is run, the checkpoint's never is. With --read-data every byte is
    read: checksums where the container keeps them, and how many NaN and infinities each tensor
    holds.

    \b
    Examples:
      ckptfix check model.pt
      ckptfix check --read-data model.pt
      ckptfix check model.pt --model net.py:Net --init '{"layers": 3}'
      ckptfix check model.pt --like other.safetensors
    """
    given = _Given(model, init, like, select, average)
    wanted = options.wanted(model, init, like)
    return output.each(files, lambda file: _check(file, wanted, given, read_data=read_data))


class _Given(NamedTuple):
    """Options that `fix` has as well."""

    model: str | None
    init: str | None
    like: str | None
    select: str | None
    average: bool


def _check(file: str, wanted: Target | None, given: _Given, *, read_data: bool) -> int:
    """Check one file."""
    try:
        document = reading.read(file)
    except DamagedError as error:
        return _say_damaged(file, _fields(), error)
    found = diagnose(document)
    document, select = embedded.taken(document, given.select)
    if given.average:
        document, select = options.averages(document, select)
    data: answers.Data | None = None
    if read_data:
        reduce.check_one(document)
        with output.progress(f"reading {file}", lambda: nbytes(document.root)) as advance:
            data_read = damage.read_data(document, advance)
        found += damage.findings(data_read)
        data = {
            "verified": data_read.verified,
            "unverified": data_read.unverified,
            "damaged": data_read.damaged,
            "nan": data_read.nan,
            "inf": data_read.inf,
        }
        if not data_read.is_sound:
            first = DamagedError(data_read.damaged[0], hint=_recover(document))
            fields = _fields(document, found, data)
            return _say_damaged(file, fields, first, data_read.damaged[1:])
    if wanted is None:
        if select is not None:
            choose(document, select)
        return output.answer(
            lambda: _fields(document, found, data),
            lambda console: _draw_sound(console, document, found),
            input=file,
            exit_code=1 if findings.errors(found) else 0,
        )
    compared = _compared(document, wanted, select, given)
    found += _about_values(compared.state, wanted, compared.report)
    beside = [finding for finding in found if finding.code not in _ABOUT_NAMES]
    loads, errors = compared.report.loads, findings.errors(beside)

    def draw(console: Console) -> None:
        _draw(console, document, compared, errors)
        findings.draw(console, document, beside, commands=loads)
        _draw_cure(console, compared.cure)

    return output.answer(
        lambda: _fields(document, beside, data, compared),
        draw,
        input=file,
        exit_code=0 if loads and not errors else 1,
    )


class _Compared(NamedTuple):
    """A state dict, what it was held against, and what came of that."""

    state: StateDict
    wanted: Target
    report: Report
    cure: Remedy | None


def _compared(document: Document, wanted: Target, select: str | None, given: _Given) -> _Compared:
    meant, report, problem = as_it_stands(document, wanted, select)
    cure = None if report.loads else _cure(document, wanted, meant, problem, given._asdict())
    return _Compared(meant.state, wanted, report, cure)


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
        if hint is not None and hint == Hint(hint.text, hint.command):  # and nothing else
            return Remedy(f"{what}\n{hint.text}{':' if hint.command else ''}", hint.command)
        return Remedy(what if hint is None else f"{what}\n{hint}", None)
    once = judge.written_once(document, meant.state)
    untie = any(key in once or key in meant.tied for key in wanted.specs) and _is_flat(document)
    fix = hints.command("fix", document.name, beside(document, "fixed"), untie=untie, **given)
    if judge.as_it_stands(document, meant.state, wanted, meant.renaming).loads:
        return Remedy(f"They match once renamed ({meant.renaming.label}):", fix)
    return Remedy("This makes a file that loads:", fix)


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
    file: str, fields: answers.Check, error: DamagedError, more: Sequence[str] = ()
) -> int:
    def draw(console: Console) -> None:
        for message in (error.what, *more[: _SHOWN - 1]):
            console.print(output.text(f"{file}: damaged: {message}"), soft_wrap=True)
        if len(more) >= _SHOWN:
            console.print(output.more(len(more) - _SHOWN + 1, "--json has all"))

    problem = output.as_error(error.what, error.hint, error.code, error.where or file)
    told: answers.Check = {**fields, "sound": False}
    output.answer(told, draw, input=file, exit_code=1, error=problem)
    if error.hint is not None:
        output.hint(error.hint)
    return 1


def _draw_sound(console: Console, document: Document, found: list[Finding]) -> None:
    where = f"{document.container}, {output.size(document.nbytes)}"
    sound = ("structure is sound", "bold green")
    but = _but(findings.errors(found))
    told = output.text(f"{document.name}: ", sound, *but, f" ({where})")
    console.print(told, soft_wrap=True)
    findings.draw(console, document, found)


def _but(errors: int) -> list[tuple[str, str]]:
    return [(f", but it has {plural(errors, 'error')}", "bold red")] if errors else []


def _fields(
    document: Document | None = None,
    found: Sequence[Finding] = (),
    data: answers.Data | None = None,
    compared: _Compared | None = None,
) -> answers.Check:
    report = None if compared is None else compared.report
    return {
        "container": None if document is None else document.container,
        "sound": True,
        "findings": findings.rows(found),
        "data": data,
        "target": None if compared is None else compared.wanted.name,
        "state_dict": None if compared is None else compared.state.path,
        "loads": None if report is None else report.loads,
        "share": None if report is None else report.share,
        "matched": [] if report is None else report.matched,
        "missing": [] if report is None else report.missing,
        "missing_buffers": [] if report is None else report.buffers,
        "forgiven": [] if report is None else report.forgiven,
        "unexpected": [] if report is None else report.unexpected,
        "shape_mismatch": [] if report is None else _rows(report.shape_mismatch),
        "kind_mismatch": [] if report is None else _rows(report.kind_mismatch),
        "dtype_difference": [] if report is None else _rows(report.dtype_difference),
        "refusals": [] if report is None else report.refusals,
        "elements_left_at_random": None if report is None else report.random_numel,
        "remedy": None if compared is None else _remedy(compared.cure),
    }


def _rows(differences: list[Difference]) -> list[answers.Difference]:
    return [
        {"key": row.key, "found": rows.spec(row.found), "wanted": rows.spec(row.wanted)}
        for row in differences
    ]


def _remedy(cure: Remedy | None) -> answers.Remedy | None:
    if cure is None:
        return None
    command = None if cure.command is None else str(cure.command)
    return {"message": cure.message, "command": command}


def _draw(console: Console, document: Document, compared: _Compared, errors: int) -> None:
    state, wanted, report, _ = compared
    where = "" if state.path == "/" else f" ({state.path})"
    verdict = ("matches", "bold green") if report.loads else ("does not match", "bold red")
    but = _but(errors) if report.loads else []
    whole = output.text(f"{document.name}{where} ", verdict, f" {wanted.name}", *but)
    console.print(whole, soft_wrap=True)
    for line in counts(report):
        console.print(line)
    kinds = sections(report)
    shown = max(min(_SHOWN, _SCREEN // max(len(kinds), 1) - _AROUND), 1)
    for title, sign, lines in kinds:
        console.print()
        console.print(output.text((title, "bold")))
        for line in lines[:shown]:
            console.print(output.text(f"  {sign} {line}"), soft_wrap=True)
        if len(lines) > shown:
            told = output.more(len(lines) - shown, "--json has all")
            console.print(output.text((f"  {told}", "dim")))
    for line in without_strict(report):
        console.print(f"\n{line}", soft_wrap=True)


def _draw_cure(console: Console, cure: Remedy | None) -> None:
    if cure is None:
        return
    console.print()
    for line in cure.message.splitlines():
        console.print(output.text(line), soft_wrap=True)
    if cure.command is not None:
        console.print(output.text("  ", (str(cure.command), "cyan")), soft_wrap=True)
