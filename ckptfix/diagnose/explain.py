"""From an error text to what it means, and to the command that repairs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfix.bytes.place import unused
from ckptfix.formats.table import EXTENSIONS, split_extension
from ckptfix.known_errors import KNOWN, Known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.hints import Command

_PARAGRAPH_END = re.compile(r"(?<!:)(?<!: )\n\n")  # after a colon, torch goes on below
_WORD = re.compile(r"[\w./\\~+-]+")
_EXTENSION = re.compile(r"\.(?:pt|pth|bin|ckpt|safetensors|th|pkl|tar)\b")
_FROM_ERROR = re.compile(r"^\s*File \".*\", line \d+")


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an error text says, which known error it is, and the command with its file filled in."""

    known: Known
    excerpt: str
    command: Command


def explain(text: str) -> list[Explanation]:
    """The known errors that a text tells of, the last one told first.

    A traceback may hold several; the one that is raised last is the one that stopped the program.
    Of those found in one paragraph only the first in the table counts. Takes time in proportion to
    the text, whatever it repeats.
    """
    found: dict[int, Known] = {}
    excerpts: dict[int, str] = {}
    for known in KNOWN:
        for start, end in places(known, text):
            if end not in found:
                found[end], excerpts[end] = known, _line(text, start)
    last = {found[end].code: end for end in sorted(found)}
    words = _words(text) if found else {}
    rows = [(found[end], excerpts[end]) for end in last.values()]
    return [Explanation(k, excerpt, k.command.filled(words)) for k, excerpt in reversed(rows)]


def places(known: Known, text: str) -> Iterator[tuple[int, int]]:
    """Where an error begins in each paragraph that tells of it, and where the paragraph ends."""
    pattern, then = re.compile(known.pattern), re.compile(known.then or "")
    end = 0
    while match := pattern.search(text, end):
        after = _PARAGRAPH_END.search(text, match.end())
        end = after.start() if after else len(text)
        if then.search(text, match.end(), end):
            yield match.start(), end


def _line(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : end if end >= 0 else len(text)].strip()


def _words(text: str) -> dict[str, str]:
    """What FILE stands for in a command: the file that the text names; and OUT, named after it."""
    file = file_in(text)
    if file is None:
        return {}
    stem, extension = split_extension(file)
    if extension.lower() not in EXTENSIONS:  # which no command writes
        extension = ".pt"
    return {
        "FILE": file,
        "OUT": unused(f"{stem}.fixed", extension),
        "OUT.safetensors": unused(f"{stem}.fixed", ".safetensors"),
    }


def file_in(text: str) -> str | None:
    """The checkpoint that a text names, if it names one; source files of a traceback are none."""
    lines = (line for line in text.splitlines() if "." in line and not _FROM_ERROR.match(line))
    names = (_path_in(word) for line in lines for word in _WORD.findall(line))
    return next((name for name in names if name and not name.startswith("torch.")), None)


def _path_in(word: str) -> str | None:
    """A word as far as its last extension of a checkpoint, if it has one."""
    ends = [match.end() for match in _EXTENSION.finditer(word, 1)]
    return word[: ends[-1]] if ends else None


def as_markdown() -> str:
    """The table, as `docs/errors.md` has it."""
    rows = ["| the error says | it means | what repairs it |", "|---|---|---|"]
    for known in KNOWN:
        example = known.example.replace("|", "\\|")
        rows.append(f"| `` {example} `` | {known.cause} | `{known.command}` |")
    return "\n".join(rows)
