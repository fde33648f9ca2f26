"""From an error text to what it means, and to the command that repairs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from ckptfix.known_errors import KNOWN, Known

if TYPE_CHECKING:
    from ckptfix.hints import Command

_FILE = re.compile(r"""[\w./\\~+-]+\.(?:pt|pth|bin|ckpt|safetensors|th|pkl|tar)\b""")
_FROM_ERROR = re.compile(r"^\s*File \".*\", line \d+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an error text says, which known error it is, and the command with its file filled in."""

    known: Known
    excerpt: str
    command: Command


def explain(text: str) -> list[Explanation]:
    """The known errors that a text tells of, the last one told first.

    A traceback may hold several; the one that is raised last is the one that stopped the program.
    Of those found at one place only the first in the table counts.
    """
    found: dict[int, Explanation] = {}
    for known in KNOWN:
        for match in re.finditer(known.pattern, text):
            place = text.count("\n\n", 0, match.start())
            explanation = Explanation(known, _line(text, match.start()), _filled(known, text))
            found.setdefault(place, explanation)
    unique = {found[place].known.code: found[place] for place in sorted(found)}
    return list(reversed(unique.values()))


def _line(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : end if end >= 0 else len(text)].strip()


def _filled(known: Known, text: str) -> Command:
    """The command with the file that the text names, and an output named after it."""
    file = file_in(text)
    if file is None:
        return known.command
    path = PurePath(file)
    words = {
        "FILE": file,
        "OUT": str(path.with_name(f"{path.stem}.fixed{path.suffix}")),
        "OUT.safetensors": str(path.with_name(f"{path.stem}.fixed.safetensors")),
    }
    return known.command.filled(words)


def file_in(text: str) -> str | None:
    """The checkpoint that a text names, if it names one; source files of a traceback are none."""
    lines = (line for line in text.splitlines() if not _FROM_ERROR.match(line))
    names = (match[0] for line in lines for match in _FILE.finditer(line))
    return next((name for name in names if not name.startswith("torch.")), None)


def as_markdown() -> str:
    """The table, as `docs/errors.md` has it."""
    rows = ["| the error says | it means | what repairs it |", "|---|---|---|"]
    for known in KNOWN:
        example = known.example.replace("|", "\\|")
        rows.append(f"| `` {example} `` | {known.cause} | `{known.command}` |")
    return "\n".join(rows)
