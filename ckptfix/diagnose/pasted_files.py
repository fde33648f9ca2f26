"""The files that an error text names: which of them is the checkpoint that was opened."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

_EXTENSIONS = (
    r"\.(?:(?:safetensors|bin)\.index\.json|pth?2?|bin|ckpt|safetensors|th|pkl|pickle|tar|distcp|"
    r"npz|npy|gguf|onnx|h5|hdf5|pdparams|nemo|mar|t7|pte|joblib|msgpack)\b"
)
_EXTENSION = re.compile(_EXTENSIONS)
_NAMED = re.compile(
    r"(?<!\w)(?:\"([^\"'\n{}]{1,300})\"|'([^\"'\n{}]{1,300})')|([{}%]?)([\w./\\~+:=-]+)({?)"
)
_CODE = re.compile(r"\s*File \"|File \S+:\d+|\s*-+> *\d+ |\s+\d+ ")
_SAVED = re.compile(r"(?i)\b(?:sav(?:e|ed|es|ing)|writ(?:e|es|ing|ten)|wrote|dump\w*)\b")
_OPENED = re.compile(r"(?i)load|open|read|restor|resum|deserializ|unpickl|fetch|import|from")
_ATTRIBUTE = re.compile(
    r"(?:self|cls|args?|cfg|conf|config|opts?|FLAGS|flags|hparams|ctx|os|np|torch|parser|settings)"
    r"(?:\.\w+)+"
)


class Files(NamedTuple):
    """The files in a text by their lines."""

    lines: list[int]
    names: list[str]

    def opened_by(self, line: int) -> str | None:
        """The last file that was opened up to a line; the first after it, where none was."""
        if not self.names:
            return None
        return self.names[max(bisect_right(self.lines, line) - 1, 0)]


def files_in(lines: list[str], code: set[int]) -> Files:
    """The files that lines name; those in `code` are of a program, where only texts are names.

    What a line says was saved is not what was opened, and a name with braces in it is a pattern.
    """
    found = Files([], [])
    for number, line in enumerate(lines):
        if "." not in line or not _EXTENSION.search(line):
            continue
        if _SAVED.search(line) and not _OPENED.search(line):
            continue
        names = [name for name in _names(line, quoted=number in code) if name]
        if names:
            found.lines.append(number)
            found.names.append(names[-1])
    return found


def _names(line: str, *, quoted: bool) -> list[str | None]:
    if _CODE.match(line) and line.lstrip().startswith("File "):
        return []
    return [_name(match, quoted=quoted) for match in _NAMED.finditer(line)]


def _name(match: re.Match[str], *, quoted: bool) -> str | None:
    text = match[1] or match[2]
    if text is not None:
        text = text.strip()
        if _PLACE.search(text):
            return None
        if _path_in(text) == text and ", " not in text:
            return text
        return None if quoted else next(filter(None, map(_word, text.split()[::-1])), None)
    return None if quoted or match[3] or match[5] else _word(match[4].rpartition("=")[2])


_PLACE = re.compile(r"%(?:\(\w+\))?[\d.-]*[a-z]")
"""Where a pattern of `%` has a value."""


def _word(word: str) -> str | None:
    """The file in a word that is not in quotes; an attribute of a program is none."""
    path = _path_in(word)
    return None if path is None or _ATTRIBUTE.fullmatch(path) else path


def _path_in(word: str) -> str | None:
    """A word as far as its last extension of a checkpoint, if it has one."""
    ends = [match.end() for match in _EXTENSION.finditer(word, 1)]
    return word[: ends[-1]] if ends else None
