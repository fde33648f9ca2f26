"""How things are said everywhere: lists that are cut, counted nouns, the reason of an OSError."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

FEW = 5
"""Names that a line of text lists, before it says how many more there are."""


def listed(names: Iterable[str], most: int = FEW) -> str:
    """The first few of many names, and how many more there are: `a, b and 3 more`."""
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def plural(count: int, noun: str) -> str:
    """`1 key`, `3 keys`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def reason(error: OSError) -> str:
    """What the system says, as the end of a message: `permission denied`."""
    return (error.strerror or str(error)).lower()
