"""Paths on the command line: which are read, and which are written.

No command may write over what it reads, by whatever name. So each argument says what it is for, and
one guard holds the paths of a command against each other before anything is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix.bytes.place import Place
from ckptfix.cli import output
from ckptfix.cli.exit_codes import EXIT_CODES
from ckptfix.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STDOUT = "-"
"""What stands for the standard output where a page is written."""


class Read(click.Path):
    """The path of something that is read: a file, or a folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; `-` is none, since a checkpoint is not read from front to back."""
        if value == STDOUT and not Place(value).exists:
            self.fail(
                "a checkpoint cannot be read from a pipe: save it to a file first", param, ctx
            )
        return super().convert(value, param, ctx)


class Code(click.ParamType[str]):
    """`FILE.py:NAME`, `package.module:NAME` or `hf:FOLDER`: what is read, perhaps."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it is."""
        return str(value)


class Written(click.Path):
    """The path of something that is written."""


class Out(Written):
    """The path of a checkpoint that is written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; `-` is none, since the beginning of a file is written last."""
        if value == STDOUT:
            self.fail("a checkpoint cannot be written to a pipe: give a file", param, ctx)
        return super().convert(value, param, ctx)


class Verb(click.Command):
    """A command that is not begun where it would write over what it reads.

    Its help ends in its exit codes.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; where they are wrong, that is answered in JSON if JSON is among them.

        Once they are read it is certain whether it is: it may be the value of another option.
        """
        options = args[: args.index("--")] if "--" in args else args
        ctx.find_root().ensure_object(output.Form).is_json = "--json" in options
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in self._codes.items()])

    @property
    def _codes(self) -> Mapping[int, str]:
        return EXIT_CODES[self.name or ""]

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command, once that is sure."""
        ctx.find_root().ensure_object(output.Form).note_given(ctx)
        check_apart(ctx)
        return super().invoke(ctx)


def check_apart(context: click.Context) -> None:
    """Refuse to write over what is read. Raises `WriteError`."""
    read = [Place(path) for path in _given(context, (Read, Code))]
    for path in _given(context, (Written,)):
        written = Place(path)
        if path != STDOUT and any(_is_in(written, place) for place in read):
            raise WriteError(
                "is the input itself, or a part of it",
                where=path,
                hint="give another name for the output",
                code="same-file",
            )


def _given(context: click.Context, kinds: tuple[type, ...]) -> Iterator[str]:
    for param in context.command.params:
        if isinstance(param.type, kinds):
            value = context.params.get(param.name or "")
            for path in value if isinstance(value, tuple) else (value,):
                if path is not None:
                    yield _file_of(path) if isinstance(param.type, Code) else path


def _file_of(reference: str) -> str:
    """The file, or the folder, of which a model is built."""
    where, _, name = reference.rpartition(":")
    return name if where == "hf" else where


def _is_in(written: Place, read: Place) -> bool:
    """Whether a place is another, or a file of the folder that the other is, or is the index of."""
    if written.is_same(read):
        return True
    folder = read.folder if read.name.endswith(".index.json") else read
    return written.is_file and folder.is_folder and written.is_below(folder)
