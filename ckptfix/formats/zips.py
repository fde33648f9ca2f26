"""Zip archives, read strictly and written so that their contents can be memory-mapped.

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

import struct
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.files import crc32_of
from ckptfix.limits import DEFAULT, Limits
from ckptfix.spans import CHUNK, InflatedSource, ReadAhead, Source, Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptfix.files import Sink, Sum

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
_CENTRAL, _LOCAL = struct.Struct("<4s4x2H4x3I4H6xI"), struct.Struct("<4s2x2H4x3I2H")
"""The same, of which only what is looked at is unpacked."""
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")

_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64_MAGIC, _LOCATOR_MAGIC, _DESCRIPTOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIBED, _UTF8 = 0x0001, 0x0008, 0x0800
_NARROW, _WIDE = struct.Struct("<3I"), struct.Struct("<I2Q")
_DESCRIPTORS = {
    12: (b"", _NARROW), 16: (_DESCRIPTOR_MAGIC, _NARROW),
    20: (b"", _WIDE), 24: (_DESCRIPTOR_MAGIC, _WIDE),
}  # fmt: skip
"""By size: whether it begins with the magic, and how CRC and sizes are written."""
_STORED, _DEFLATED = 0, 8
_MAX_NAME = 4096
_HEADERS = 1 << 14  # bytes of local headers, and of small records between them, read at once
_RETRY = "the archive is cut short or damaged: copy or download it again"


@dataclass(slots=True)
class Record:
    """One record of an archive. Offsets and sizes are in bytes; `size` is what it unpacks to."""

    name: str
    label: bytes
    """Its name as it is written."""
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int
    """Where its local header begins."""
    entry: int
    """Where its entry begins, counted from the beginning of the central directory."""
    data: int = 0
    """Where its data begins; known once its local header is read."""
    owed: bool = False
    """Whether its header leaves CRC and sizes to a data descriptor."""


class Archive(NamedTuple):
    """The records of an archive in the order in which they lie, and where its parts end."""

    source: Source
    records: dict[str, Record]
    directory: int
    """Where the central directory begins."""
    end: int
    """Where the archive ends; the file may go on."""

    def spans(self) -> dict[str, Span]:
        """The bytes of each record, inflated where it is deflated."""
        return {
            name: Span(self.source, record.data, record.packed, record.crc)
            if record.method == _STORED
            else self.span(name)
            for name, record in self.records.items()
        }

    def span(self, name: str) -> Span:
        """The bytes of one record."""
        record = self.records[name]
        stored = Span(self.source, record.data, record.packed, record.crc)
        if record.method == _STORED:
            return stored
        return Span(InflatedSource(stored, record.size), 0, record.size, record.crc)


def read(source: Source, limits: Limits = DEFAULT) -> Archive:
    """Read the directory of an archive and hold it against the local headers.

    Raises `DamagedError` where it is cut short or its parts do not fit, `UnsafeError` where readers
    would disagree about it, `UnsupportedError` for encryption and for methods other than deflate.
    """
    directory, size, count, end = _find_directory(source)
    if count > limits.records or size > source.size:
        raise UnsafeError(f"{source.name}: the archive announces {count} records")
    records = _central_entries(source.read(directory, size), count, source.name)
    records.sort(key=attrgetter("header"))
    _check_records(records, directory, source)
    _check_names(records, source.name)
    kept = {record.name: record for record in records if not record.name.endswith("/")}
    return Archive(source, kept, directory, end)


def _find_directory(source: Source) -> tuple[int, int, int, int]:
    """Offset, size and count of the central directory, and where the archive ends."""
    window = min(source.size, END.size + _MAX16 + (1 << 12))
    tail = source.read(source.size - window, window)
    found = tail.rfind(_END_MAGIC)
    while found >= 0:
        place = source.size - window + found
        if place + END.size <= source.size:
            fields = END.unpack_from(tail, found)
            located = _locate(source, place, fields)
            if located is not None:
                return (*located, place + END.size + fields[7])
        found = tail.rfind(_END_MAGIC, 0, found)
    raise DamagedError(f"{source.name}: the zip archive has no end record", hint=_RETRY)


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
            (count, count64, _MAX16),
            (size, size64, _MAX32),
            (offset, offset64, _MAX32),
        ):
            if narrow not in (full, top):
                raise UnsafeError(f"{source.name}: the two end records of the archive disagree")
        here = count = count64
        size, offset = size64, offset64
    if disk or start_disk or here != count:
        raise UnsupportedError(f"{source.name}: the archive is one part of several")
    if offset + size > limit:
        raise DamagedError(f"{source.name}: the directory lies outside the archive", hint=_RETRY)
    if offset + size < limit:
        raise UnsafeError(
            f"{source.name}: {limit - offset - size} bytes lie before the archive or inside it",
            hint="unpack it and pack it again, or save the checkpoint anew",
        )
    return offset, size, count


def _end64(source: Source, place: int) -> tuple[int, tuple[int, int, int]] | None:
    """Place of the 64-bit end record, and the directory's count, size and offset in it."""
    if place < LOCATOR.size:
        return None
    magic, disk, offset, disks = LOCATOR.unpack(source.read(place - LOCATOR.size, LOCATOR.size))
    if magic != _LOCATOR_MAGIC:
        return None
    if disk or disks > 1:
        raise UnsupportedError(f"{source.name}: the archive is one part of several")
    if offset + END64.size > place:
        raise DamagedError(f"{source.name}: the archive's end record is damaged", hint=_RETRY)
    fields = END64.unpack(source.read(offset, END64.size))
    if fields[0] != _END64_MAGIC or offset + 12 + fields[1] + LOCATOR.size != place:
        raise DamagedError(f"{source.name}: the archive's end record is damaged", hint=_RETRY)
    return offset, (fields[7], fields[8], fields[9])


def _central_entries(directory: bytes, count: int, name: str) -> list[Record]:
    entries, position = [], 0
    unpack = _CENTRAL.unpack_from
    try:
        for _ in range(count):
            magic, flags, method, crc, packed, size, named, extra, comment, disk, offset = unpack(
                directory, position
            )
            if magic != _CENTRAL_MAGIC:
                raise DamagedError(f"{name}: the archive's directory is damaged", hint=_RETRY)
            start = position + CENTRAL.size
            label = directory[start : start + named]
            decoded = label.decode("ascii") if label.isascii() else _decode(label, flags)
            entry = Record(decoded, label, flags, method, crc, packed, size, offset, position)
            entries.append(entry)
            position = start + named + extra + comment
            if size == _MAX32 or packed == _MAX32 or offset == _MAX32:
                _widen(entry, directory[start + named : start + named + extra])
            if method or flags & _ENCRYPTED or disk or entry.packed != entry.size:
                _check_method(entry, disk, name)
            if named > _MAX_NAME or b"\0" in label:  # readers end a name at a zero byte, or do not
                raise UnsafeError(f"{name}: a record's name is too long, or holds a zero byte")
    except struct.error:
        raise DamagedError(f"{name}: the archive's directory is cut short", hint=_RETRY) from None
    if position > len(directory):
        raise DamagedError(f"{name}: the archive's directory is cut short", hint=_RETRY)
    if position < len(directory):
        raise UnsafeError(f"{name}: the archive's directory holds more than its {count} records")
    return entries


def _widen(entry: Record, extra: bytes) -> None:
    """Take what does not fit into 32 bits from the extra field."""
    wide = _zip64_values(extra)
    entry.size = wide.pop(0) if entry.size == _MAX32 and wide else entry.size
    entry.packed = wide.pop(0) if entry.packed == _MAX32 and wide else entry.packed
    entry.header = wide.pop(0) if entry.header == _MAX32 and wide else entry.header


def _check_method(entry: Record, disk: int, name: str) -> None:
    if entry.flags & _ENCRYPTED:
        raise UnsupportedError(f"{name}: {entry.name!r} is encrypted")
    if disk and disk != _MAX16:
        raise UnsupportedError(f"{name}: {entry.name!r} lies in another part of a divided archive")
    if entry.method not in (_STORED, _DEFLATED):
        raise UnsupportedError(f"{name}: {entry.name!r} is packed with method {entry.method}")
    if entry.method == _STORED and entry.packed != entry.size:
        raise UnsafeError(
            f"{name}: {entry.name!r} is stored, and has two sizes: {entry.packed} and {entry.size}"
        )


def _decode(label: bytes, flags: int) -> str:
    return label.decode("utf-8" if flags & _UTF8 else "cp437", "backslashreplace")


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


def _check_records(records: Sequence[Record], directory: int, source: Source) -> None:
    """Find where the data of each record begins, once all that is around it agrees with its entry.

    Records lie one after another from byte 0, with room for nothing but data descriptors. What lies
    close together is read together; the data of large records is not read.
    """
    ahead = ReadAhead(source, _HEADERS)
    following = [*(record.header for record in records), directory]
    _check_gap(following[0], "the beginning", source)
    for record, next_header in zip(records, following[1:], strict=True):
        start, room = record.header, directory - record.header
        if room < LOCAL.size:
            raise _outside(record, source)
        length = LOCAL.size + 256 if room >= LOCAL.size + 256 else room
        if next_header - start < _HEADERS // 4:
            at = ahead.seek(start, length)
            _read_header(record, ahead.piece, at, source)
        else:
            _read_header(record, source.read(start, length), 0, source)
        end = record.data + record.packed
        if end > directory:
            raise _outside(record, source)
        if end != next_header or record.owed:
            _check_descriptor(record, end, next_header - end, ahead)


def _outside(record: Record, source: Source) -> DamagedError:
    return DamagedError(f"{source.name}: {record.name!r} lies outside the archive", hint=_RETRY)


def _read_header(record: Record, piece: bytes, at: int, source: Source) -> None:
    """Complete one record, whose local header lies in a piece of the file."""
    magic, flags, method, crc, packed, size, named, extra = _LOCAL.unpack_from(piece, at)
    if magic != _LOCAL_MAGIC:
        raise DamagedError(f"{source.name}: {record.name!r} has no header", hint=_RETRY)
    length = LOCAL.size + named + extra
    if at + length > len(piece):
        piece, at = source.read(record.header, length), 0
    label = piece[at + LOCAL.size : at + LOCAL.size + named]
    if packed == _MAX32 or size == _MAX32:
        wide = _zip64_values(piece[at + LOCAL.size + named : at + length])
        size = wide.pop(0) if size == _MAX32 and wide else size
        packed = wide.pop(0) if packed == _MAX32 and wide else packed
    described = flags & _DESCRIBED and crc == packed == size == 0
    same = described or (crc == record.crc and packed == record.packed and size == record.size)
    if label != record.label or (flags ^ record.flags) & _UTF8:  # two ways to write one name?
        same = same and _decode(label, flags) == record.name
    if not same or method != record.method or flags & _ENCRYPTED:
        raise UnsafeError(
            f"{source.name}: header and directory of the archive disagree about {record.name!r}"
        )
    record.data, record.flags = record.header + length, flags
    record.owed = bool(described and record.packed)


def _check_descriptor(record: Record, end: int, gap: int, ahead: ReadAhead) -> None:
    """What follows the data repeats the CRC and both sizes; or a header led to the wrong place."""
    name = ahead.source.name
    if gap not in _DESCRIPTORS or not record.flags & _DESCRIBED:
        _check_gap(gap, repr(record.name), ahead.source)
        raise UnsafeError(f"{name}: {record.name!r} lacks the descriptor it announces")
    magic, layout = _DESCRIPTORS[gap]
    if ahead.read(end, gap) != magic + layout.pack(record.crc, record.packed, record.size):
        raise UnsafeError(
            f"{name}: descriptor and directory of the archive disagree about {record.name!r}"
        )


def _check_gap(gap: int, earlier: str, source: Source) -> None:
    if gap < 0:
        raise UnsafeError(f"{source.name}: a record of the archive overlaps {earlier}")
    if gap:
        raise UnsafeError(f"{source.name}: {gap} bytes after {earlier} belong to no record")


def _check_names(records: Iterable[Record], name: str) -> None:
    names = [record.name for record in records]
    if len(set(map(str.casefold, names))) == len(names):
        return
    seen: dict[str, str] = {}
    for label in names:
        first = seen.setdefault(label.casefold(), label)
        if first is not label:
            how = "twice" if first == label else f"beside {first!r}"
            raise UnsafeError(f"{name}: the archive holds {label!r} {how}")


class Writer:
    """Writes records one after another; each one's data begins at a multiple of `alignment`.

    CRC and sizes stand in the local header, so that no data descriptors are needed; where the CRC
    is not known before the data has passed, the header is corrected afterwards.
    """

    def __init__(self, sink: Sink, alignment: int = 64) -> None:
        self._sink = sink
        self._alignment = alignment
        self._entries: dict[str, tuple[int, int, int]] = {}  # CRC, size, offset
        self._unsummed: dict[str, Sum] = {}

    def add(self, name: str, parts: Sequence[Span | bytes]) -> None:
        """Add a record made of `parts` in order."""
        sink = self._sink
        offset = sink.position
        size = sum([part.length if type(part) is Span else len(part) for part in parts])
        crc = self._known_crc(parts, size)
        sink.write(self._local_header(name, crc or 0, size, offset))
        if crc is None:
            self._unsummed[name] = sink.copy_summed(parts)
        else:
            for part in parts:
                sink.copy(part)
        self._entries[name] = (crc or 0, size, offset)

    def _known_crc(self, parts: Sequence[Span | bytes], size: int) -> int | None:
        """The CRC of a record before it is written: on record already, or cheap to compute."""
        if len(parts) == 1 and type(parts[0]) is Span and parts[0].crc is not None:
            return parts[0].crc
        computed = any(isinstance(part, Span) and part.source.fileno() is None for part in parts)
        return None if computed or size >= CHUNK else crc32_of(parts)

    def crcs(self) -> list[int]:
        """The CRCs of all records so far; those that were not known are put into their headers."""
        for name, total in self._unsummed.items():
            _, size, offset = self._entries[name]
            self._entries[name] = (total(), size, offset)
            self._sink.patch(offset + _CRC_OFFSET, struct.pack("<I", total()))
        self._unsummed.clear()
        return [crc for crc, _, _ in self._entries.values()]

    def _local_header(self, name: str, crc: int, size: int, offset: int) -> bytes:
        label = name.encode()
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _MAX32 else b""
        start = offset + LOCAL.size + len(label) + len(wide) + 4
        padding = -start % self._alignment
        extra = wide + _PADDING.pack(b"FB", padding) + b"Z" * padding
        before, narrow = (_WIDE_LOCAL, _MAX32) if wide else (_NARROW_LOCAL, size)
        return before + _KNOWN.pack(crc, narrow, narrow, len(label), len(extra)) + label + extra

    def finish(self) -> None:
        """Write the directory and the end records."""
        self.crcs()
        start = self._sink.position
        for name, entry in self._entries.items():
            self._sink.write(_central_header(name, *entry))
        count, size = len(self._entries), self._sink.position - start
        if count >= _MAX16 or start >= _MAX32 or size >= _MAX32:
            place = self._sink.position
            self._sink.write(
                END64.pack(_END64_MAGIC, END64.size - 12, 45, 45, 0, 0, count, count, size, start)
            )
            self._sink.write(LOCATOR.pack(_LOCATOR_MAGIC, 0, place, 1))
        count, size, start = min(count, _MAX16), min(size, _MAX32), min(start, _MAX32)
        self._sink.write(END.pack(_END_MAGIC, 0, 0, count, count, size, start, 0))


_PADDING = struct.Struct("<2sH")
_CRC_OFFSET = 14  # in a local header
_DOS_EPOCH = 0x21  # 1 January 1980, the earliest date a zip can hold: equal inputs give equal files
_KNOWN = struct.Struct("<3I2H")
"""What headers differ in: CRC, both sizes, the lengths of the name and of the extra field."""
_NARROW_LOCAL, _WIDE_LOCAL = (
    struct.pack("<4s5H", _LOCAL_MAGIC, version, _UTF8, _STORED, 0, _DOS_EPOCH)
    for version in (20, 45)
)
_NARROW_CENTRAL, _WIDE_CENTRAL = (
    struct.pack("<4s6H", _CENTRAL_MAGIC, version, version, _UTF8, _STORED, 0, _DOS_EPOCH)
    for version in (20, 45)
)


def _central_header(name: str, crc: int, size: int, offset: int) -> bytes:
    label = name.encode()
    if size < _MAX32 and offset < _MAX32:
        return (
            _NARROW_CENTRAL + _KNOWN.pack(crc, size, size, len(label), 0) + _place(offset) + label
        )
    values = ([size, size] if size >= _MAX32 else []) + ([offset] if offset >= _MAX32 else [])
    extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
    narrow, place = min(size, _MAX32), min(offset, _MAX32)
    known = _KNOWN.pack(crc, narrow, narrow, len(label), len(extra))
    return _WIDE_CENTRAL + known + _place(place) + label + extra


def _place(offset: int) -> bytes:
    """What a central header holds between the lengths and the name: no comment, and the place."""
    return bytes(10) + offset.to_bytes(4, "little")
