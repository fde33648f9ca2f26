"""The only module that prints. The answer goes to stdout, everything else to stderr.

Names in a checkpoint are a stranger's text: what a terminal could take for a command is escaped.
"""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from ckptfix.cli.usage import Misuse, see_help
from ckptfix.errors import CkptfixError, WriteError
from ckptfix.hints import Hint
from ckptfix.words import listed, plural, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.text import Text

    from ckptfix.cli import answers


class Form:
    """The form in which answers and errors are wanted, and what an answer is to tell.

    Click's context holds it. The program makes it before click has read a word, so that it is there
    after click has failed.
    """

    def __init__(self) -> None:
        self.is_json = False
        self.verb: str | None = None
        self.given: Mapping[str, Any] = {}
        """The arguments and options of the verb."""
        self.notes: list[str] = []
        """What is to be told in the next answer in JSON."""
        self.before: str | None = None
        """What was answered for the file before, as text."""

    def note_given(self, context: click.Context | None) -> None:
        """Note which verb was called, and with what, as far as that is known."""
        if context is not None and context.parent is not None:
            self.verb, self.given = context.info_name, context.params


class NoAnswerError(WriteError):
    """The answer cannot be written, nor any other."""


def _form() -> Form:
    context = click.get_current_context(silent=True)
    return Form() if context is None else context.find_root().ensure_object(Form)


def is_json() -> bool:
    """Whether answers are in JSON, which has fields for what notes tell people."""
    return _form().is_json


def start() -> None:
    """Survive terminals without Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it may be closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def printable(text: object) -> str:
    """Text on one line without control characters: those stand as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )


def text(*parts: str | tuple[str, str]) -> Text:
    """Text for a console, made of texts and of pairs of a text and its style, all printable."""
    from rich.text import Text

    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(part), style) for part, style in pairs))


def answer(
    fields: Mapping[str, object] | Callable[[], Mapping[str, object]],
    text: str | Callable[[Console], None],
    *,
    input: str | None,  # noqa: A002 - the name of the field
    output: str | None = None,
    exit_code: int = 0,
    error: answers.Error | None = None,
) -> int:
    """Print the answer, and return the exit code.

    Under `--json` that is an object with the `fields` of the verb; otherwise text, or what `text`
    draws. Fields that take long to gather are given as what gathers them.
    """
    form = _form()
    if form.is_json:
        common = {"input": input, "output": output, "exit_code": exit_code, "error": error}
        _print_json(form, {**common, **(fields() if callable(fields) else fields)})
    else:
        _answer(form, _drawn(text) if callable(text) else f"{printable(text)}\n")
    return exit_code


def _answer(form: Form, told: str) -> None:
    """Print an answer; an empty line sets it apart from the one before, where one is long."""
    if form.before is not None and max(told.count("\n"), form.before.count("\n")) > 1:
        told = f"\n{told}"
    form.before = told
    _write(told)


def _print_json(form: Form, told: Mapping[str, object]) -> None:
    """Print an answer on a line of its own, with what was noted since the one before."""
    import json

    from ckptfix.cli import answers

    common = {"schema": answers.SCHEMA, "command": form.verb}
    blank = answers.blank(form.verb, form.given)
    answer = {**blank, **common, "notes": form.notes, **told}
    form.notes = []
    _write(json.dumps(answer) + "\n")


def each(files: Iterable[str], one: Callable[[str], int]) -> int:
    """Answer for each of several files; returns the worst exit code.

    A file that cannot be read is told, and stops nothing else.
    """
    worst = 0
    for file in files:
        try:
            code = one(file)
        except NoAnswerError:
            raise
        except CkptfixError as error:
            code = refuse(_form(), error, input=file)
        worst = max(worst, code)
    return worst


def aside(draw: Callable[[Console], None]) -> None:
    """Draw what is told before the answer, for people only."""
    if not is_json():
        _write(_drawn(draw))


def changes(rows: Sequence[str], noun: str, where: str = "", most: int = 20) -> None:
    """List for people what a dry run would change; JSON has all of it."""
    if is_json() or not rows:
        return
    lines = [f"  {printable(row)}" for row in rows[:most]]
    if len(rows) > most:
        lines.append(f"  {more(len(rows) - most, '--json has all', noun)}")
    _write("".join(f"{line}\n" for line in ([printable(where)] if where else []) + lines))


def _drawn(draw: Callable[[Console], None]) -> str:
    drawn = io.StringIO()
    draw(_console(drawn))
    return "".join(f"{line.rstrip()}\n" for line in drawn.getvalue().split("\n")[:-1])


def _write(answer: str) -> None:
    """Write to stdout, all of it now: what goes wrong there is told like any other error."""
    if sys.stdout is None:
        return
    try:
        for start in range(0, len(answer), _PIECE):  # unbuffered (-u), a cut write is not noticed
            sys.stdout.write(answer[start : start + _PIECE])
        sys.stdout.flush()
    except OSError as error:
        # or Python would try again when it exits, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(_NO_READER) from None
        hint = "make room, or send the answer elsewhere"
        raise NoAnswerError(f"the answer cannot be written: {reason(error)}", hint=hint) from None


_PIECE = 16_384
_NO_READER = 141
"""As a shell reports a program that SIGPIPE ended."""


def _console(drawn: io.StringIO) -> Console:
    """A console that draws for stdout; text stays as it is, without markup.

    It is as wide as the terminal, or COLUMNS where that is set; in a pipe no line is broken.
    """
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(
        file=drawn,
        force_terminal=terminal or None,
        highlight=False,
        markup=False,
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # None: nor bold
        width=None if terminal or os.environ.get("COLUMNS", "").isdigit() else _UNBROKEN,
    )


_UNBROKEN = 1_000_000
"""Columns of a pipe."""


def note(text: str) -> None:
    """Say something that is not the answer; JSON has it among its notes."""
    form = _form()
    if form.is_json:
        form.notes.append(text)
    else:
        _say(f"note: {printable(text)}")


def note_names(what: str, names: Sequence[str], most: int = 10) -> None:
    """Say what happened to many things, and the names of the first few.

    JSON has all of them in a field of their own.
    """
    if not is_json():
        rest = " (--json has all)" if len(names) > most else ""
        note(f"{what}: {listed(names, most)}{rest}")


def more(hidden: int, where: str, noun: str = "") -> str:
    """The line below the first rows of many: `… and 3 more tensors (--all shows them)`."""
    counted = f"{hidden:,} more" if not noun else plural(hidden, f"more {noun}")
    return f"… and {counted} ({where})"


def refuse(form: Form, problem: CkptfixError, **given: str) -> int:
    """Say why a file, or all of it, could not be done; returns the exit code."""
    told = problem.hint or see_help(form.verb)
    where, details = problem.where, problem.details
    return error(form, problem.what, told, problem.code, where=where, details=details, given=given)


def error(
    form: Form,
    message: str,
    hint: Hint | None,
    code: str,
    *,
    where: str | None = None,
    details: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
    exit_code: int = 2,
) -> int:
    """Say what went wrong and what to do about it; returns the exit code.

    `given` has fields of the answer, such as the file that it is about.
    """
    if form.is_json:
        told = as_error(message, hint, code, where, details)
        with suppress(WriteError, click.exceptions.Exit):
            _print_json(form, {**(given or {}), "exit_code": exit_code, "error": told})
    complain(message if where is None else f"{where}: {message}", hint, details)
    return exit_code


def as_error(
    message: str,
    hint: Hint | None,
    code: str,
    where: str | None = None,
    details: Sequence[str] = (),
) -> answers.Error:
    """An error as JSON has it."""
    command = None if hint is None or hint.command is None else str(hint.command)
    return {
        "code": code,
        "message": message,
        "where": where,
        "details": list(details),
        "hint": None if hint is None else str(hint),
        "command": command,
    }


def usage(text: str) -> int:
    """Show how something is used; returns the exit code."""
    _say(text)
    return 2


def complain(message: str, told: Hint | None = None, details: Sequence[str] = ()) -> None:
    """An error, its details and its hint, for people."""
    _say(f"{click.style('error:', fg='red', bold=True)} {printable(message)}")
    for line in details:
        _say(f"  {printable(line)}")
    if told is not None:
        _say_hint(told)


def hint(told: Hint) -> None:
    """What may help, mostly a command; JSON has it with its error."""
    if not is_json():
        _say_hint(told)


def _say_hint(told: Hint) -> None:
    _say(f"{click.style('hint:', fg='cyan', bold=True)} {printable(told)}")


def _say(line: str) -> None:
    with suppress(OSError):  # nowhere is left to complain
        click.echo(line, err=True, color=False if os.environ.get("NO_COLOR") else None)


def bug(form: Form, problem: Exception) -> int:
    """Report what should not have happened; the traceback is for whoever asks for it."""
    if os.environ.get("CKPTFIX_TRACEBACK"):
        raise problem
    kind = type(problem).__name__
    hint = Hint(
        "this is a bug in ckptfix: report it with the output of CKPTFIX_TRACEBACK=1 ckptfix …"
    )
    return error(form, f"internal error: {kind}: {problem}", hint, "internal")


def page(text: str) -> int:
    """Print a web page instead of an answer; returns the exit code."""
    if is_json():
        raise Misuse("--json and --html -: one of them goes to standard output")
    _write(text)
    return 0


@contextmanager
def progress(label: str, total: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr, for work on a terminal that takes more than half a second."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress("{task.description}", *columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(printable(label), total=total())
    begun, shown = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > 0.5:
            bar.start()
            shown = True
        bar.advance(task, count)

    try:
        yield advance
    finally:
        bar.stop()


def size(count: int) -> str:
    """Bytes for people: `192 B`, `4.2 kB`, `1.3 GB`."""
    if count < 1000:
        return f"{count} B"
    power = min((len(str(count)) - 1) // 3, 5)
    return f"{count / 1000**power:.1f} {'kMGTP'[power - 1]}B"
