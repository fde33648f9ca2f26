"""Patterns of whole keys, as a shell has them for files: `*` is any text, dots too."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from ckptfix.errors import SelectionError
from ckptfix.hints import Hint, command
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def dropped(keys: Iterable[str], globs: Sequence[str], where: str) -> set[str]:
    """The keys that a pattern matches, some being left.

    Raises `SelectionError` for a pattern that matches none, and where nothing would be left.
    """
    keys = list(keys)
    found = matching(keys, globs, where)
    if globs and found.issuperset(keys):
        raise SelectionError(
            f"every key matches {listed(map(repr, globs))}: nothing would be left",
            where=where,
            hint=Hint("see its keys", command("inspect", where, all=True)),
            code="no-such-key",
        )
    return found


def matching(keys: Iterable[str], globs: Sequence[str], where: str) -> set[str]:
    """The keys that a pattern matches. Raises `SelectionError` for one that matches none."""
    found: set[str] = set()
    keys = list(keys)
    for glob in globs:
        expression = re.compile(fnmatch.translate(glob))
        of_glob = {key for key in keys if expression.match(key)}
        if not of_glob:
            raise SelectionError(
                f"no key matches {glob!r}",
                where=where,
                hint=Hint("see its keys", command("inspect", where, all=True)),
                code="no-such-key",
            )
        found |= of_glob
    return found


def escaped(key: str) -> str:
    """The pattern that matches a text and no other."""
    return re.sub(r"([*?[])", r"[\1]", key)
