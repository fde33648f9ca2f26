"""From an error text to what it means, and to what repairs it.

A text is cut into messages: an error with the lines that belong to it, a line of a log. The code
in a traceback says nothing about what happened, and is left out. Each message is put on one line,
since terminals and web pages break lines anywhere, and the first row of the table that fits it
explains it. All of that takes time in proportion to the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import unused
from ckptfix.diagnose import pasted_keys
from ckptfix.diagnose.pasted_files import files_in
from ckptfix.formats.table import EXTENSIONS, split_extension
from ckptfix.hints import Command
from ckptfix.known_errors import KNOWN, Known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.diagnose.pasted_files import Files

_ANSI = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_OF_PROCESS = re.compile(r"(?:\[rank\d+\]: ?|\(\w+ pid=\d+[^)\n]{0,40}\) ?|\[\d+\]: |E +(?=\w))")
_FRAME = re.compile(
    r"\s*File \"|File \S+:\d+, in|\s*-+> *\d+ |<ipython-input|\S{1,300}\.pyc? in [\w<]"
)
_BEGINS = re.compile(
    r"(?:[A-Za-z_][\w.]{0,200}(?:Error|Exception|Warning|Interrupt|BadZipFile|Exit)\b|"
    r"Traceback \(most|\W?\d\d\d\d-|\W?\d\d[:/]\d\d|(?:WARNING|ERROR|INFO|DEBUG|CRITICAL)\b|"
    r"\S{1,300}:\d+: |"
    r"During handling|The above exception)"
)
_GOES_ON = re.compile(r"(?:unexpected key|missing keys|size mismatch|  \S|\t)")


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an error text says, which known error it is, and its cure with the file filled in."""

    known: Known
    excerpt: str
    cause: str
    cure: Command | str

    @property
    def command(self) -> Command | None:
        """The command that repairs it; None where the cure is a sentence."""
        return self.cure if isinstance(self.cure, Command) else None


class Message(NamedTuple):
    """One message of a text: its first line and its last, and its words."""

    line: int
    last: int
    text: str


def explain(text: str) -> list[Explanation]:
    """The known errors that a text tells of, the last one told first.

    A traceback may hold several; the one that is raised last is the one that stopped the program.
    Of those found in one message only the first in the table counts.
    """
    lines, code = _lines(text)
    messages = list(_messages(lines, code))
    found: dict[int, int] = {}
    for row, number in _told(messages):
        found[number] = min(row, found.get(number, row))
    last = {KNOWN[row].code: number for number, row in sorted(found.items())}
    files = files_in(lines, code) if last else None
    return [
        _explained(KNOWN[found[number]], messages[number], lines, files)
        for number in sorted(last.values(), reverse=True)
    ]


def _lines(text: str) -> tuple[list[str], set[int]]:
    """The lines of a text without colours and names of processes, and which of them are code."""
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    lines = [_bare(line) for line in text.splitlines()]
    code: set[int] = set()
    inside = False
    for number, line in enumerate(lines):
        if not line:
            continue
        inside = bool(_FRAME.match(line)) or (inside and line[0] in " -")
        if inside:
            code.add(number)
    return lines, code


def _bare(line: str) -> str:
    match = _OF_PROCESS.match(line) if line[:1] in ("[", "(", "E") else None
    return line[match.end() :] if match else line


def _messages(lines: list[str], code: set[int]) -> Iterator[Message]:
    """The messages of a text: each begins with the name of an error, or after an empty line."""
    begin, last, words = 0, 0, list[str]()
    empty = False
    for number, line in enumerate(lines):
        if not line or number in code:
            empty = empty or not line
            continue
        ends = empty and not (words and (words[-1].endswith(":") or _GOES_ON.match(line)))
        if words and (ends or _BEGINS.match(line)):
            yield Message(begin, last, " ".join(words))
            words = []
        if not words:
            begin = number
        words += line.split()
        last, empty = number, False
    if words:
        yield Message(begin, last, " ".join(words))


def _told(messages: list[Message]) -> Iterator[tuple[int, int]]:
    """Rows of the table, and the messages that they fit."""
    whole = "\n".join(message.text for message in messages)
    starts = [0, *accumulate(len(message.text) + 1 for message in messages)]
    for row, known in enumerate(KNOWN):
        for says in known.says:
            for position in places(says, whole):
                yield row, bisect_right(starts, position) - 1
    for number, message in enumerate(messages):
        keys = pasted_keys.keys_in(message.text) if _may_list(message.text) else None
        fit = None if keys is None else pasted_keys.fit(keys)
        if fit is not None:
            yield _ROWS[fit.code], number


_ROWS = {known.code: row for row, known in enumerate(KNOWN)}


def _may_list(text: str) -> bool:
    return any(word in text for word in _LISTS)


_LISTS = (" key", "_keys=", "initializ", "not found in the", "LOAD REPORT")


def places(says: str, text: str) -> Iterator[int]:
    """Where a text of the table stands, at most once in each line; `…` in it is anything."""
    first, *others = says.split("…")
    end = 0
    while (start := text.find(first, end)) >= 0:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        position = start + len(first)
        for other in others:
            at = text.find(other, position, end)
            position = at + len(other) if at >= 0 else end + 1
        if position <= end:
            yield start


def _explained(
    known: Known, message: Message, lines: list[str], files: Files | None
) -> Explanation:
    """What a row of the table says of a message, with its file and its keys."""
    file = None if files is None else files.opened_by(message.last)
    words, cause = {} if file is None else _words(file), known.cause
    keys = pasted_keys.keys_in(message.text) if not known.says else None
    fit = None if keys is None else pasted_keys.fit(keys)
    if fit is not None:
        words |= fit.words
        cause = f"{cause} {fit.seen}"
    cure = known.cure.filled(words) if isinstance(known.cure, Command) else known.cure
    return Explanation(known, _excerpt(known, message), cause, cure)


def _excerpt(known: Known, message: Message) -> str:
    """The message from its beginning, or from shortly before what was known in it."""
    heads = (says.partition("…")[0] for says in known.says)
    at = min((at for head in heads if (at := message.text.find(head)) >= 0), default=0)
    begin = 0 if at < _BEFORE else message.text.rfind(" ", 0, at - _BEFORE // 2) + 1
    return message.text[begin : begin + _LONGEST]


_BEFORE, _LONGEST = 120, 1000


def _words(file: str) -> dict[str, str]:
    """What FILE stands for in a command; and OUT, named after it."""
    stem, extension = split_extension(file)
    if extension.lower() not in EXTENSIONS:  # which no command writes
        extension = ".pt"
    return {
        "FILE": file,
        "OUT": unused(f"{stem}.fixed", extension),
        "OUT.safetensors": unused(f"{stem}.fixed", ".safetensors"),
    }


def as_markdown() -> str:
    """The table, as `docs/errors.md` has it."""
    rows = ["| the error says | it means | what repairs it |", "|---|---|---|"]
    for known in KNOWN:
        example = known.example.replace("|", "\\|")
        rows.append(f"| `` {example} `` | {known.cause} | {known.said} |")
    return "\n".join(rows)
