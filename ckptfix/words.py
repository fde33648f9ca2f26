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


def size(nbytes: int) -> str:
    """Bytes for people: `512 bytes`, `44.7 MiB`."""
    power = min(max((nbytes.bit_length() - 1) // 10, 0), len(_UNITS))
    return f"{nbytes / 1024**power:.1f} {_UNITS[power - 1]}" if power else plural(nbytes, "byte")


_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def nearest(word: str, among: Iterable[str]) -> str | None:
    """What is spelled much like a word, if anything is."""
    import difflib

    return next(iter(difflib.get_close_matches(word, among, 1)), None)


def reason(error: OSError) -> str:
    """What the system says, as the end of a message: `permission denied`."""
    return (error.strerror or str(error)).lower()
