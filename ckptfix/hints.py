"""What may help, as data: words, a command, an option; and how both are said.

A hint is said in two tongues. The command line says it for the shell, where each argument is quoted
(`ckptfix inspect 'my file.pt'`, `add --force`); a program is told the same in Python
(`ckptfix.open('my file.pt').findings`, `pass force=True`). Nobody else puts a command into words.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Option = str | tuple[str, ...] | bool | None
"""The value of an option: text, several texts, or True for a flag; None and False leave it out."""


class Command(NamedTuple):
    """A command that can be run as it stands.

    `options` are pairs of a name without dashes and its values; a flag has none.
    """

    program: str
    arguments: tuple[str, ...]
    verb: str | None = None
    """The verb of ckptfix; None: the program is another one."""
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    streams: tuple[str, str] | None = None
    """The file that another program reads, and the one that it writes."""

    def __str__(self) -> str:
        """The command as a line of shell, quoted."""
        if self.verb is None:
            line = shlex.join([self.program, *self.arguments])
            if self.streams is None:
                return line
            return "{} < {} > {}".format(line, *map(shlex.quote, self.streams))
        words = [self.program, self.verb, *map(_as_argument, self.arguments)]
        for name, values in self.options:
            words += _as_option(name, values)
        return shlex.join(words)

    def in_python(self) -> str:
        """What a program does to the same end; the line of shell where there is no such thing."""
        call = _CALLS.get(self.verb or "")
        if call is None or not self.arguments:
            return str(self)
        source, *others = map(repr, self.arguments)
        rows = sorted(self.options, key=lambda row: row[0] != "sub")
        keywords = ", ".join(_keyword(*row) for row in rows)
        return call.format(source=source, out=others[0] if others else "", keywords=keywords)

    def filled(self, words: Mapping[str, str]) -> Command:
        """The same with words in the place of others, such as a path for FILE."""
        return self._replace(
            arguments=tuple(words.get(each, each) for each in self.arguments),
            options=tuple(
                (name, tuple(words.get(each, each) for each in values))
                for name, values in self.options
            ),
        )


_CALLS = {
    "inspect": "ckptfix.open({source}).findings",
    "strip-prefix": "ckptfix.open({source}).strip_prefix({keywords}).save({out})",
    "add-prefix": "ckptfix.open({source}).add_prefix({keywords}).save({out})",
    "rename": "ckptfix.open({source}).rename({keywords}).save({out})",
    "to-cpu": "ckptfix.open({source}).to_cpu().save({out})",
}
"""The verbs whose work a line of Python does as well."""


def _as_argument(text: str) -> str:
    """A path as an argument: one that begins with a dash would be taken for an option."""
    return f"./{text}" if text.startswith("-") and text != "-" else text


def _as_option(name: str, values: tuple[str, ...]) -> list[str]:
    """An option with its values; one that takes a single value is given once for each."""
    if name in _REPEATED:
        return [word for value in values for word in (f"--{name}", value)]
    return [f"--{name}", *values]


_REPEATED = frozenset({"drop"})


def _keyword(name: str, values: tuple[str, ...]) -> str:
    if name == "sub":  # pattern and replacement stand for themselves
        return ", ".join(map(repr, values))
    value: object = True if not values else values[0] if len(values) == 1 else values
    return f"{name.replace('-', '_')}={value!r}"


def command(verb: str, *arguments: str, **options: Option) -> Command:
    """A command of ckptfix; underscores in the names of options stand for dashes.

    Example:
        >>> str(command("strip-prefix", "my file.pt", "out.pt", select="model", partial=True))
        "ckptfix strip-prefix 'my file.pt' out.pt --select model --partial"
    """
    return Command("ckptfix", arguments, verb, _given(options))


def shell(program: str, *words: str, files: Sequence[str] = ()) -> Command:
    """A command of another program, such as `ls` of a folder."""
    return Command(program, (*words, *map(_as_argument, files)))


def filtering(program: str, *words: str, reads: str, writes: str) -> Command:
    """A command of another program that reads one file and writes another, whatever their names."""
    return Command(program, words, streams=(reads, writes))


def _given(options: dict[str, Option]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    rows = ((name.replace("_", "-"), value) for name, value in options.items())
    return tuple((name, _values(value)) for name, value in rows if value not in (None, False))


def _values(value: Option) -> tuple[str, ...]:
    if isinstance(value, tuple):
        return value
    return () if value is True else (str(value),)


class Hint(NamedTuple):
    """What may help: words, and the command or the option that they speak of."""

    text: str
    command: Command | None = None
    option: tuple[str, tuple[str, ...]] | None = None
    """Name and values of an option, which follows the words; see `adding` and `naming`."""
    python: str | None = None
    """The words for a program, where they are others."""
    otherwise: Hint | None = None
    """What may be done instead."""

    def __str__(self) -> str:
        """The hint for the shell: `replace it: add --force`."""
        said = self.text
        if self.command is not None:
            said = f"{said}: {self.command}"
        if self.option is not None:
            name, values = self.option
            said = f"{said} {shlex.join(_as_option(name, values))}"
        return said if self.otherwise is None else f"{said}; or {self.otherwise}"

    def in_python(self) -> str:
        """The hint for a program: `replace it: pass force=True`."""
        said = self.python or self.text
        if self.command is not None:
            said = f"{said}: {self.command.in_python()}"
        if self.option is not None:
            said = f"{said} {_keyword(*self.option)}"
        return said if self.otherwise is None else f"{said}; or {self.otherwise.in_python()}"

    def otherwise_do(self, other: Hint) -> Hint:
        """This hint, and another thing that may be done instead."""
        return self._replace(otherwise=other)


def adding(text: str, name: str, *values: str) -> Hint:
    """The hint that an option would help: `adding("replace it", "force")`."""
    return Hint(f"{text}: add", option=(name, values), python=f"{text}: pass")


def naming(text: str, name: str, *values: str) -> Hint:
    """The hint that an option should have had another value."""
    return Hint(f"{text}:", option=(name, values))
