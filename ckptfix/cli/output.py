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

from ckptfix.errors import WriteError
from ckptfix.hints import Hint
from ckptfix.words import listed, plural, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console
    from rich.text import Text

    from ckptfix.hints import Command

SCHEMA = 1


class Form:
    """The form in which answers and errors are wanted; click's context holds it.

    The program makes it before click has read a word, so that it is there after click has failed.
    """

    def __init__(self) -> None:
        self.is_json = False


def _wants_json() -> bool:
    context = click.get_current_context(silent=True)
    form = None if context is None else context.find_object(Form)
    return form is not None and form.is_json


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
    data: dict[str, Any] | Callable[[], dict[str, Any]], text: str | Callable[[Console], None]
) -> None:
    """Print the answer: `data` under `--json`, otherwise text or what `text` draws.

    Data that takes long to gather is given as what gathers it.
    """
    if _wants_json():
        gathered = data() if callable(data) else data
        _write(_as_json(gathered))
    elif callable(text):
        _write(_drawn(text))
    else:
        _write(printable(text) + "\n")


def _as_json(data: dict[str, Any]) -> str:
    import json

    return json.dumps({"schema": SCHEMA, **data}, indent=2) + "\n"


def aside(draw: Callable[[Console], None]) -> None:
    """Draw what is told before the answer, for people only."""
    if not _wants_json():
        _write(_drawn(draw))


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
        raise WriteError(f"the answer cannot be written: {reason(error)}", hint=hint) from None


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


def said(part: Hint | Command | None) -> str | None:
    """A hint or a command as a line of shell; None where there is none."""
    return None if part is None else str(part)


def note(text: str) -> None:
    """Say something that is not the answer."""
    _say(f"note: {printable(text)}")


def note_names(what: str, names: Sequence[str], most: int = 10) -> None:
    """Say what happened to many things, and the names of the first few; JSON has all of them."""
    rest = " (--json has all)" if len(names) > most else ""
    note(f"{what}: {listed(names, most)}{rest}")


def more(hidden: int, where: str, noun: str = "") -> str:
    """The line below the first rows of many: `… and 3 more tensors (--all shows them)`."""
    counted = f"{hidden:,} more" if not noun else plural(hidden, f"more {noun}")
    return f"… and {counted} ({where})"


def error(
    form: Form,
    message: str,
    hint: Hint | None,
    code: str,
    *,
    details: Sequence[str] = (),
    exit_code: int = 2,
) -> int:
    """Say what went wrong and what to do about it; returns the exit code."""
    if form.is_json:
        told = {"code": code, "message": message, "hint": said(hint), "details": list(details)}
        with suppress(WriteError, click.exceptions.Exit):
            _write(_as_json({"error": told}))
    complain(message, hint, details)
    return exit_code


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
        hint(told)


def hint(told: Hint) -> None:
    """What may help, mostly a command."""
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


def page(text: str) -> None:
    """Print a web page."""
    _write(text)


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
