"""Several saves in one file, one after another: told apart by where they begin, never mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.source import LazySource
from ckptfix.errors import ReadError
from ckptfix.findings import Finding
from ckptfix.formats.zip.layout import LOCAL_MAGIC
from ckptfix.hints import Hint, adding, shell
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage
    from ckptfix.tree.document import Document

_SHOWN = 20


class Part(NamedTuple):
    """One save: where it begins and ends in the file, and what messages say of it."""

    begin: int
    end: int
    what: str


def part_of(source: Source, begin: int, end: int) -> Source:
    """A stretch of a source, as a source of its own."""
    return LazySource(end - begin, lambda: (source, begin), source.name)


def chosen(source: Source, parts: Sequence[Part], found: Salvage) -> Source:
    """The save that `found.archive` asks for, counted from 1; the only one, where none is asked.

    Raises `ReadError` where there are several, with a list of them, or where there are not so many.
    """
    found.told_apart = True
    number = found.archive
    if number is None and len(parts) > 1:
        raise ReadError(
            f"holds {len(parts)} archives, one after another",
            where=source.name,
            hint=adding("save one of them", "archive", "1"),
            code="several-archives",
            details=_listed(parts),
        )
    if number is not None and number > max(len(parts), 1):
        raise ReadError(
            f"holds {plural(max(len(parts), 1), 'archive')}: there is no number {number}",
            where=source.name,
            hint=adding("save one that is there", "archive", "1"),
            code="no-such-archive",
            details=_listed(parts),
        )
    if not parts:
        return source
    part = parts[(number or 1) - 1]
    if (part.begin, part.end) == (0, source.size):
        return source
    if number is None:
        _refuse(after(source, part.end, "the archive"), source.name)
    told = "" if number is None else f"archive {number}, "
    found.steps.append(f"took {told}bytes {part.begin:,} to {part.end:,} of {source.size:,}")
    return part_of(source, part.begin, part.end)


def after(source: Source, end: int, what: str) -> Finding:
    """The note on bytes behind the end of a checkpoint: another save, or something unknown."""
    rest = part_of(source, end, source.size)
    if not _is_a_save(rest.head(64)):
        return Finding("trailing-bytes", f"{rest.size} bytes follow the end of {what}")
    message = f"another save follows the end of {what}, at byte {end:,}: it is not read"
    words = (f"if={source.name}", f"of={source.name}.rest", "iflag=skip_bytes", f"skip={end}")
    return Finding("several-saves", message, command=shell("dd", "bs=1M", *words))


def _is_a_save(head: bytes) -> bool:
    """Whether bytes begin as torch's zip, torch's older files or safetensors do."""
    if head.startswith(LOCAL_MAGIC) or _LEGACY in head[:20]:
        return True
    return head[8:9] == b"{" and head[7:8] == b"\0"


_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")
"""The magic number of torch's older files, as a pickle spells it."""


def note_rest(source: Source, end: int, found: Salvage) -> None:
    """Note what follows the archive that is read. Raises `ReadError` where it is another save."""
    note = after(source, end, "the archive")
    if found.archive is None:
        _refuse(note, source.name)
    found.steps.append(note.message)


def refuse(document: Document) -> None:
    """Refuse what is followed by a save of another kind. Raises `ReadError`."""
    for note in document.notes:
        _refuse(note, document.name)


def _refuse(note: Finding, where: str) -> None:
    if note.code == "several-saves":
        raise ReadError(
            note.message,
            where=where,
            hint=Hint("take the rest into a file of its own", note.command),
            code="several-archives",
        )


def _listed(parts: Sequence[Part]) -> list[str]:
    rows = [
        f"  {number}  at byte {part.begin:,}: {part.what}" for number, part in enumerate(parts, 1)
    ]
    more = [f"  and {len(rows) - _SHOWN:,} more"] if len(rows) > _SHOWN else []
    return [*rows[:_SHOWN], *more]
