"""`ckptfix explain`."""

from __future__ import annotations

import io
import os
from typing import IO, TYPE_CHECKING, Any

import click

from ckptfix.cli import options, output, paths
from ckptfix.diagnose.explain import Explanation, explain
from ckptfix.findings import with_errors

if TYPE_CHECKING:
    from rich.console import Console

    from ckptfix.cli import answers

_EXCERPT = 200


@click.command("explain", cls=paths.Verb)
@click.argument("words", metavar="[FILE|-|TEXT]", nargs=-1)
@options.as_json
def command(words: tuple[str, ...]) -> int:
    r"""Say what an error means, and which command repairs it.

    FILE holds a traceback or a log; or give the text itself. Without one, or with -, it
    is read from standard input: paste it, and end with Ctrl-D. The file that the text names is
    filled into the command.

    \b
    Examples:
      python train.py 2>&1 | ckptfix explain
      ckptfix explain train.log
      ckptfix explain 'Missing key(s) in state_dict: "conv.weight"'
    """
    file = _opened(" ".join(words))
    if file.isatty():
        output.note("paste the error, then press Ctrl-D")
    found = explain(file.read())
    given = None if isinstance(file, io.StringIO) or words in ((), ("-",)) else " ".join(words)
    if given is not None:
        file.close()
    codes = with_errors()
    rows: list[answers.Explained] = [
        {
            "code": row.known.code,
            "severity": codes[row.known.code].severity.value,
            "excerpt": row.excerpt,
            "message": row.cause,
            "command": None if row.command is None else str(row.command),
            "advice": row.cure if isinstance(row.cure, str) else None,
        }
        for row in found
    ]
    fields: answers.Explain = {"found": rows}
    if not found:
        text = "no error that ckptfix knows; see the file itself: ckptfix inspect FILE"
        return output.answer(fields, text, input=given, exit_code=1)
    return output.answer(fields, lambda console: _draw(console, found), input=given)


def _opened(words: str) -> IO[Any]:
    """A file; or an error text as it is, which is words, or one that no file is called like."""
    is_word = words.isalpha() or " " in words
    if is_word and not os.path.exists(words):
        return io.StringIO(words)
    file: IO[Any] = click.File(errors="replace").convert(words or "-", _argument(), None)
    return file


def _argument() -> click.Parameter:
    """What errors call it."""
    return click.get_current_context().command.params[0]


def _draw(console: Console, found: list[Explanation]) -> None:
    from rich.text import Text

    for row in found:
        excerpt = output.printable(row.excerpt)
        excerpt = excerpt if len(excerpt) <= _EXCERPT else f"{excerpt[: _EXCERPT - 1]}…"
        console.print(Text.assemble((row.known.code, "bold red"), f": {excerpt}"))
        console.print(Text(output.printable(row.cause)))
        style = "cyan" if row.command is not None else ""
        console.print(Text(f"  {output.printable(row.cure)}", style), soft_wrap=True)
