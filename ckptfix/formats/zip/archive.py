"""Zip archives, read strictly.

A zip is a row of records (a local header of 30 bytes, the name, an extra field, the data and,
where flag bit 3 is set, a data descriptor of 12 to 24 bytes with CRC and sizes), then the central
directory that repeats name, CRC, sizes and place of each record, then an end record that says
where the directory is. Sizes and places past 32 bits stand in extra fields and a second, 64-bit
end record.

Readers that trust different copies of the same facts can be made to read different files, so an
archive is refused where the copies disagree, where names repeat, where records overlap or leave
room for something between them, and where the archive does not begin at byte 0. Bytes after the
end are reported and accepted. Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from ckptfix.bytes.place import unused
from ckptfix.bytes.source import ReadAhead, Source
from ckptfix.bytes.span import Span
from ckptfix.bytes.unpacked import InflatedSource
from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.formats.zip.layout import (
    CENTRAL,
    CENTRAL_MAGIC,
    DEFLATED,
    DESCRIBED,
    DESCRIPTOR_MAGIC,
    ENCRYPTED,
    END,
    END64,
    END64_MAGIC,
    END_MAGIC,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR,
    LOCATOR_MAGIC,
    MAX16,
    MAX32,
    STORED,
    UTF8,
)
from ckptfix.hints import Hint, command
from ckptfix.limits import DEFAULT, Limits

_CENTRAL, _LOCAL = struct.Struct("<4s4x2H4x3I4H6xI"), struct.Struct("<4s2x2H4x3I2H")
"""The same as without the underscore, but only what is looked at is unpacked."""
_NARROW, _WIDE = struct.Struct("<3I"), struct.Struct("<I2Q")
_DESCRIPTORS = {
    12: (b"", _NARROW), 16: (DESCRIPTOR_MAGIC, _NARROW),
    20: (b"", _WIDE), 24: (DESCRIPTOR_MAGIC, _WIDE),
}  # fmt: skip
"""By size: whether it begins with the magic, and how CRC and sizes are written."""
_MAX_NAME = 4096
_NEAR, _PIECE = 1 << 12, 1 << 14
"""Records so small are read whole, as many at a time as so many bytes hold."""
_RETRY = "the archive is cut short or damaged: copy or download it again"


class Entry(NamedTuple):
    """What the directory says of a record. `packed` and `size` (unpacked) are in bytes."""

    header: int
    """Where its local header begins."""
    name: str
    label: bytes
    """Its name as it is written."""
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    place: int
    """Where the entry itself begins, counted from the beginning of the directory."""


class Archive(NamedTuple):
    """The records of an archive in the order in which they lie, and where its parts end."""

    spans: dict[str, Span]
    """The bytes of each record but folders, inflated where it is deflated."""
    entries: list[Entry]
    """What the directory says of all records, folders too."""
    directory: int
    """Where the central directory begins."""
    end: int
    """Where the archive ends; the file may go on."""


def read(source: Source, limits: Limits = DEFAULT) -> Archive:
    """Read the directory of an archive and hold it against the local headers.

    Raises `DamagedError` where it is cut short or its parts do not fit, `UnsafeError` where readers
    would disagree about it, `UnsupportedError` for encryption and for methods other than deflate.
    """
    place, size, count, end = find_directory(source)
    if count > limits.records or size > source.size:
        raise UnsafeError(f"the archive announces {count} records", where=source.name)
    entries = read_directory(source.read(place, size), count, source.name)
    spans = _spans(entries, place, source)
    _check_names([entry.name for entry in entries], source.name)
    return Archive(spans, entries, place, end)


def find_directory(source: Source) -> tuple[int, int, int, int]:
    """Offset, size and count of the central directory, and where the archive ends.

    Raises as `read` does.
    """
    window = min(source.size, END.size + MAX16 + (1 << 12))
    tail = source.read(source.size - window, window)
    found = tail.rfind(END_MAGIC)
    while found >= 0:
        place = source.size - window + found
        if place + END.size <= source.size:
            fields = END.unpack_from(tail, found)
            located = _locate(source, place, fields)
            if located is not None:
                return (*located, place + END.size + fields[7])
        found = tail.rfind(END_MAGIC, 0, found)
    raise DamagedError("the zip archive has no end record", where=source.name, hint=_RETRY)


def _locate(source: Source, place: int, fields: tuple[int, ...]) -> tuple[int, int, int] | None:
    """What the end record at `place` says of the directory; None where it is no end record."""
    _, disk, start_disk, here, count, size, offset, comment = fields
    if place + END.size + comment > source.size:
        return None
    limit = place
    wide = _end64(source, place)
    if wide is not None:
        limit, (count64, size64, offset64) = wide
        for narrow, full, top in (
            (count, count64, MAX16),
            (size, size64, MAX32),
            (offset, offset64, MAX32),
        ):
            if narrow not in (full, top):
                raise UnsafeError("the two end records of the archive disagree", where=source.name)
        here = count = count64
        size, offset = size64, offset64
    if disk or start_disk or here != count:
        raise UnsupportedError("the archive is one part of several", where=source.name)
    if offset + size > limit:
        raise DamagedError("the directory lies outside the archive", where=source.name, hint=_RETRY)
    if offset + size < limit:
        raise UnsafeError(
            f"{limit - offset - size} bytes lie before the archive or inside it",
            where=source.name,
            hint=_whole_of(source),
        )
    return offset, size, count


def _whole_of(source: Source) -> Hint:
    """What may help where an archive does not fill its file: several may lie in it."""
    stem, _ = os.path.splitext(source.name.removesuffix(".tar"))  # `.pth.tar` is one extension
    saved = unused(f"{stem}.recovered", ".pt")
    return Hint("list what lies in it, or save that", command("recover", source.name, saved))


def _end64(source: Source, place: int) -> tuple[int, tuple[int, int, int]] | None:
    """Place of the 64-bit end record, and the directory's count, size and offset in it."""
    if place < LOCATOR.size:
        return None
    magic, disk, offset, disks = LOCATOR.unpack(source.read(place - LOCATOR.size, LOCATOR.size))
    if magic != LOCATOR_MAGIC:
        return None
    if disk or disks > 1:
        raise UnsupportedError("the archive is one part of several", where=source.name)
    if offset + END64.size > place:
        raise DamagedError("the archive's end record is damaged", where=source.name, hint=_RETRY)
    fields = END64.unpack(source.read(offset, END64.size))
    if fields[0] != END64_MAGIC or offset + 12 + fields[1] + LOCATOR.size != place:
        raise DamagedError("the archive's end record is damaged", where=source.name, hint=_RETRY)
    return offset, (fields[7], fields[8], fields[9])


def read_directory(directory: bytes, count: int, name: str) -> list[Entry]:
    """The entries of a directory, by where their records lie; those are not looked at here."""
    entries, place = [], 0
    unpack = _CENTRAL.unpack_from
    try:
        for _ in range(count):
            magic, flags, method, crc, packed, size, named, extra, comment, disk, header = unpack(
                directory, place
            )
            if magic != CENTRAL_MAGIC:
                raise DamagedError("the archive's directory is damaged", where=name, hint=_RETRY)
            start = place + CENTRAL.size
            end = start + named
            label = directory[start:end]
            text = label.decode("ascii") if label.isascii() else _decode(label, flags)
            if size == MAX32 or packed == MAX32 or header == MAX32:
                wide = _zip64_values(directory[end : end + extra])
                size, packed, header = _widened(wide, size, packed, header)
            entry = Entry(header, text, label, flags, method, crc, packed, size, place)
            if method or disk or packed != size or flags & ENCRYPTED:
                _check_method(entry, disk, name)
            if named > _MAX_NAME or "\0" in text:  # readers end a name at a zero byte, or do not
                raise UnsafeError("a record's name is too long, or holds a zero byte", where=name)
            entries.append(entry)
            place = end + extra + comment
    except struct.error:
        raise DamagedError(
            "the archive's directory is cut short", where=name, hint=_RETRY
        ) from None
    if place > len(directory):
        raise DamagedError("the archive's directory is cut short", where=name, hint=_RETRY)
    if place < len(directory):
        raise UnsafeError(
            f"the archive's directory holds more than its {count} records", where=name
        )
    entries.sort()
    return entries


def _check_method(entry: Entry, disk: int, name: str) -> None:
    if entry.flags & ENCRYPTED:
        raise UnsupportedError(f"{entry.name!r} is encrypted", where=name)
    if disk and disk != MAX16:
        raise UnsupportedError(
            f"{entry.name!r} lies in another part of a divided archive", where=name
        )
    if entry.method not in (STORED, DEFLATED):
        raise UnsupportedError(f"{entry.name!r} is packed with method {entry.method}", where=name)
    if entry.method == STORED and entry.packed != entry.size:
        raise UnsafeError(
            f"{entry.name!r} is stored, and has two sizes: {entry.packed} and {entry.size}",
            where=name,
        )


def _decode(label: bytes, flags: int) -> str:
    return label.decode("utf-8" if flags & UTF8 else "cp437", "backslashreplace")


def _widened(wide: list[int], *values: int) -> list[int]:
    """Numbers, those that do not fit into 32 bits taken from the extra field."""
    return [wide.pop(0) if value == MAX32 and wide else value for value in values]


def _zip64_values(extra: bytes) -> list[int]:
    """The 64-bit numbers of the zip64 extra field, in the order in which it keeps them."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + size]
            return [value for (value,) in struct.iter_unpack("<Q", field[: size - size % 8])]
        position += 4 + size
    return []


def _spans(entries: list[Entry], directory: int, source: Source) -> dict[str, Span]:
    """The bytes of each record, once all that lies around them agrees with its entry.

    Records lie one after another from byte 0, with room for nothing but data descriptors. What lies
    close together is read together; the data of large records is not read.
    """
    ends = [*(entry.header for entry in entries), directory]
    _check_gap(ends.pop(0), "the beginning", source)
    spans: dict[str, Span] = {}
    ahead = ReadAhead(source, _PIECE)
    for entry, end in zip(entries, ends, strict=True):
        header, name, _, _, method, crc, packed, size, _ = entry
        room, length = end - header, 0
        if LOCAL.size <= room < _NEAR:
            at = ahead.seek(header, room)
            length = _usual_header(entry, ahead.piece, at, at + room)
        data = header + length if length else _data(entry, end, directory, source)
        span = Span(source, data, packed, crc)
        if method != STORED:
            span = Span(InflatedSource(span, size), 0, size, crc)
        if name[-1:] != "/":
            spans[name] = span
    return spans


def _usual_header(entry: Entry, piece: bytes, at: int, end: int) -> int:
    """The length of the header of a record that lies in a piece of the file; 0: it is unusual.

    Usual are a header like its entry, and one without CRC and sizes before a short descriptor.
    """
    _, _, label, flags, method, crc, packed, size, _ = entry
    magic, lflags, lmethod, lcrc, lpacked, lsize, named, extra = _LOCAL.unpack_from(piece, at)
    length: int = LOCAL.size + named + extra
    if (
        magic != LOCAL_MAGIC
        or lflags != flags
        or lmethod != method
        or piece[at + LOCAL.size : at + LOCAL.size + named] != label
    ):
        return 0
    stop = at + length + packed
    if lcrc == crc and lpacked == packed and lsize == size and stop == end:
        return length
    owed = _is_owed(entry, flags, lcrc, lpacked, lsize)
    if owed and piece[stop:end] == DESCRIPTOR_MAGIC + _NARROW.pack(crc, packed, size):
        return length
    return 0


def _is_owed(entry: Entry, flags: int, *stated: int) -> bool:
    """Whether a header leaves some of CRC, packed size and size to the descriptor.

    Each of the three is right or 0: macOS states the size alone, others none.
    """
    meant = (entry.crc, entry.packed, entry.size)
    fits = all(number in (0, right) for number, right in zip(stated, meant, strict=True))
    return bool(flags & DESCRIBED) and fits and stated != meant


def _data(entry: Entry, following: int, directory: int, source: Source) -> int:
    """Where the data of a record begins, the next of which follows at `following`."""
    if directory - entry.header < LOCAL.size:
        raise _outside(entry, source)
    begin, flags, owed = _read_header(entry, directory, source)
    end = begin + entry.packed
    if end > directory:
        raise _outside(entry, source)
    if end != following or owed:
        _check_descriptor(entry, flags, end, following - end, source)
    return begin


def _outside(entry: Entry, source: Source) -> DamagedError:
    return DamagedError(f"{entry.name!r} lies outside the archive", where=source.name, hint=_RETRY)


def _read_header(entry: Entry, directory: int, source: Source) -> tuple[int, int, bool]:
    """Where a local header ends, its flags, and whether it leaves CRC and sizes to a descriptor."""
    piece = source.read(entry.header, min(LOCAL.size + 256, directory - entry.header))
    magic, flags, method, crc, packed, size, named, extra = _LOCAL.unpack_from(piece)
    if magic != LOCAL_MAGIC:
        raise DamagedError(f"{entry.name!r} has no header", where=source.name, hint=_RETRY)
    length = LOCAL.size + named + extra
    if length > len(piece):
        piece = source.read(entry.header, length)
    label = piece[LOCAL.size : LOCAL.size + named]
    if packed == MAX32 or size == MAX32:
        size, packed = _widened(_zip64_values(piece[LOCAL.size + named : length]), size, packed)
    owed = _is_owed(entry, flags, crc, packed, size)
    same = owed or (crc == entry.crc and packed == entry.packed and size == entry.size)
    if label != entry.label or (flags ^ entry.flags) & UTF8:  # two ways to write one name?
        same = same and _decode(label, flags) == entry.name
    if not same or method != entry.method or flags & ENCRYPTED:
        raise UnsafeError(
            f"header and directory of the archive disagree about {entry.name!r}", where=source.name
        )
    return entry.header + length, flags, owed


def _check_descriptor(entry: Entry, flags: int, end: int, gap: int, source: Source) -> None:
    """What follows the data repeats the CRC and both sizes; or a header led to the wrong place."""
    if gap not in _DESCRIPTORS or not flags & DESCRIBED:
        _check_gap(gap, repr(entry.name), source)
        raise UnsafeError(f"{entry.name!r} lacks the descriptor it announces", where=source.name)
    magic, layout = _DESCRIPTORS[gap]
    if source.read(end, gap) != magic + layout.pack(entry.crc, entry.packed, entry.size):
        raise UnsafeError(
            f"descriptor and directory of the archive disagree about {entry.name!r}",
            where=source.name,
        )


def _check_gap(gap: int, earlier: str, source: Source) -> None:
    if gap < 0:
        raise UnsafeError(f"a record of the archive overlaps {earlier}", where=source.name)
    if gap:
        raise UnsafeError(f"{gap} bytes after {earlier} belong to no record", where=source.name)


def _check_names(names: list[str], name: str) -> None:
    if len(set(map(str.casefold, names))) == len(names):
        return
    seen: dict[str, str] = {}
    for label in names:
        first = seen.setdefault(label.casefold(), label)
        if first is not label:
            how = "twice" if first == label else f"beside {first!r}"
            raise UnsafeError(f"the archive holds {label!r} {how}", where=name)
