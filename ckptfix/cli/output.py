"""The only module that prints. The answer goes to stdout, everything else to stderr.

Names in a checkpoint are a stranger's text: what a terminal could take for a command is escaped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

SCHEMA = 1
_wants_json = False


def start(arguments: Sequence[str]) -> None:
    """Learn early whether errors are wanted as JSON, and survive terminals without Unicode."""
    global _wants_json
    _wants_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def printable(text: object) -> str:
    """Text without control characters: those stand as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode()
        for c in text
    )


def answer(data: dict[str, Any], text: str | Callable[[Console], None]) -> None:
    """Print the answer: `data` under `--json`, otherwise text or what `text` draws."""
    if _wants_json:
        click.echo(json.dumps({"schema": SCHEMA, **data}, indent=2))
    elif callable(text):
        text(console())
    else:
        click.echo(printable(text))


def console() -> Console:
    """A rich console on stdout; text is printed as it is, without markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(shutil.get_terminal_size().columns, 80)
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def note(text: str) -> None:
    """Say something that is not the answer."""
    click.echo(f"note: {printable(text)}", err=True)


def error(message: str, hint: str | None, code: str, *, exit_code: int = 2) -> int:
    """Say what went wrong and what to do about it; returns the exit code."""
    if _wants_json:
        described = {"code": code, "message": message, "hint": hint}
        click.echo(json.dumps({"schema": SCHEMA, "error": described}, indent=2))
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {printable(message)}", err=True)
    if hint is not None:
        click.echo(f"{click.style('hint:', fg='cyan', bold=True)} {printable(hint)}", err=True)
    return exit_code


def bug(problem: Exception) -> int:
    """Report what should not have happened; the traceback is for whoever asks for it."""
    if os.environ.get("CKPTFIX_TRACEBACK"):
        raise problem
    kind = type(problem).__name__
    return error(
        f"internal error: {kind}: {problem}",
        "this is a bug in ckptfix: report it with the output of CKPTFIX_TRACEBACK=1 ckptfix …",
        "internal",
    )


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
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
    task = bar.add_task(printable(label), total=total)
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


def plural(count: int, noun: str) -> str:
    """`1 key`, `3 keys`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
