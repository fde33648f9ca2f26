"""The records of a damaged zip: what its headers say, and what its directory says.

A record begins with a local header. Where that has no sizes (flag bit 3, as torch writes), the
record ends at the data descriptor that states its length: 4 bytes signature, 4 bytes CRC-32, then
the packed and the unpacked size in 4 or 8 bytes each. A record without one is cut off, perhaps in
its descriptor; a storage so cut goes to the end of the file, and the pickle says whether that is
all of it (`without_descriptor`). `scan` finds records so, without the directory.

`listed` goes by the directory, and finds records whose header is damaged: their data end where the
next record begins, less the descriptor.
"""

from __future__ import annotations

import mmap
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptfix.bytes.engine import check_crc
from ckptfix.bytes.span import Span
from ckptfix.errors import ReadError
from ckptfix.formats.several import Part, chosen, note_rest
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip.layout import (
    CENTRAL_MAGIC,
    DESCRIBED,
    DESCRIPTOR_MAGIC,
    END,
    END_MAGIC,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR,
    LOCATOR_MAGIC,
    MAX32,
)
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage


_DESCRIPTOR_SIZES = (16, 24)

HEADS = ("data.pkl", "model.json")
"""The names of records without which an archive names no tensors."""


def scan(source: Source) -> dict[str, Span]:
    """Every stored record that is all there, by name, with the CRC that is recorded for it.

    And without one, the storage that ends where the file does.
    """
    with _mapped(source) as data:
        rows = _records(data, source) if data else ()
        return {name: span for _, name, span in rows if span is not None}


@contextmanager
def _mapped(source: Source) -> Iterator[mmap.mmap | None]:
    """The file in which a source lies, up to where that ends; None where it lies in none."""
    descriptor = source.fileno()
    if not source.size or descriptor is None:
        yield None
        return
    with mmap.mmap(descriptor, source.begin + source.size, access=mmap.ACCESS_READ) as data:
        yield data


Row = tuple[int, str, Span | None]


def _records(data: mmap.mmap, source: Source) -> Iterator[Row]:
    """Where each record begins, its name, and its bytes as far as they are sure to be its own.

    What lies inside of a record that is whole is passed over, whatever it looks like. Positions
    count from the beginning of the source.
    """
    base = source.begin
    place = data.find(LOCAL_MAGIC, base)
    while base <= place <= len(data) - LOCAL.size:
        _, _, flags, method, _, _, crc, packed, _, named, extra = LOCAL.unpack_from(data, place)
        begin = place + LOCAL.size + named + extra
        name = data[place + LOCAL.size : place + LOCAL.size + named].decode("utf-8", "replace")
        end = begin + packed
        span = None
        if flags & DESCRIBED and not packed:
            crc, end = _described(data, begin)
            if end < 0 and method == 0 and "data/" in name:
                span = Span(source, begin - base, len(data) - begin)
        elif packed == MAX32:
            end = begin + _wide_size(data[begin - extra : begin])
        if method == 0 and begin <= end <= len(data):
            span = Span(source, begin - base, end - begin, crc)
        yield place - base, name, span
        whole = begin <= end <= len(data)
        place = data.find(LOCAL_MAGIC, max(end, place + 1) if whole else place + 1)


def _described(data: mmap.mmap, begin: int) -> tuple[int, int]:
    """CRC and end of a record, by the first descriptor that states the length it follows."""
    place = data.find(DESCRIPTOR_MAGIC, begin)
    while 0 <= place <= len(data) - 16:
        crc, narrow = struct.unpack_from("<2I", data, place + 4)
        wide = struct.unpack_from("<Q", data, place + 8)[0] if place <= len(data) - 24 else -1
        if place - begin in (narrow, wide):
            return crc, place
        place = data.find(DESCRIPTOR_MAGIC, place + 1)
    return 0, -1


def without_descriptor(span: Span, length: int) -> Span:
    """A span as `scan` gives it, less what is there of the descriptor after so many bytes."""
    surplus = span.length - length
    if span.crc is not None or not 0 < surplus < max(_DESCRIPTOR_SIZES):
        return span
    rest = span.slice(length, surplus).read()
    return span.slice(0, length) if rest[:4] == DESCRIPTOR_MAGIC[:surplus] else span


def _wide_size(extra: bytes) -> int:
    """The 64-bit size in the extra field of a local header."""
    kind, length = struct.unpack_from("<2H", extra.ljust(4, b"\0"))
    return struct.unpack_from("<Q", extra, 4)[0] if kind == 1 and length >= 8 <= len(extra) else -1


def listed(source: Source) -> dict[str, Span]:
    """Every stored record that the directory names, where its bytes are found; none without one."""
    try:
        directory, size, count, _ = zips.find_directory(source)
        entries = zips.read_directory(source.read(directory, size), count, source.name)
    except ReadError:
        return {}
    ends = [entry.header for entry in entries[1:]] + [directory]
    found = {}
    for entry, end in zip(entries, ends, strict=True):
        spans = [Span(source, at, entry.packed, entry.crc) for at in _begins(source, entry, end)]
        right = filter(is_right, spans) if entry.crc else _fitting(spans, end)
        span = next(iter(right), None)
        if entry.method == 0 and span is not None:
            found[entry.name] = span
    return found


def _begins(source: Source, entry: zips.Entry, end: int) -> Iterator[int]:
    """Where the data of a record may begin: by what follows it, and by its own header."""
    yield from (end - descriptor - entry.packed for descriptor in _DESCRIPTOR_SIZES)
    if entry.header + LOCAL.size <= source.size:
        *_, named, extra = LOCAL.unpack(source.read(entry.header, LOCAL.size))
        yield entry.header + LOCAL.size + named + extra


def _fitting(spans: list[Span], end: int) -> Iterator[Span]:
    """Places of a record without a checksum: before a descriptor, or else at a likely distance."""
    size = spans[0].source.size
    inside = [s for s in spans if s.offset >= 0 and s.offset + s.length <= min(end, size - 4)]
    for span in inside:
        if span.source.read(span.offset + span.length, 4) == DESCRIPTOR_MAGIC:
            yield span
    for span in reversed(inside):  # its own header counts for more
        if end - span.offset - span.length in (0, *_DESCRIPTOR_SIZES):
            yield span


def is_right(span: Span) -> bool:
    """Whether bytes are there, and have the checksum on record if there is one."""
    if not 0 <= span.offset <= span.offset + span.length <= span.source.size:
        return False
    try:
        check_crc(span, "")
    except ReadError:
        return False
    return True


# --- several archives in one file


def archives(source: Source) -> list[Part]:
    """The archives in a file, one after another, in the order in which they lie.

    One ends with its end record. Where that is lost, the next begins with the name that the one
    before began with, as saves into one file do.
    """
    with _mapped(source) as data:
        rows = list(_records(data, source)) if data else []
        starts: list[int] = []
        for index, (place, name, _) in enumerate(rows):
            again = bool(starts) and name == rows[starts[-1]][1]
            if not index or again or (data and _ends(data, source.begin, rows[index - 1], place)):
                starts.append(index)
    stops = [*starts[1:], len(rows)] if starts else []
    begins = [*(place for place, _, _ in rows), source.size]
    return [
        Part(begins[start], begins[stop], _told(rows[start:stop]))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _told(rows: Sequence[Row]) -> str:
    """What is said of an archive: the first part of its names, and how much of it is whole."""
    whole = sum(span is not None for *_, span in rows)
    lost = "" if any(name.rpartition("/")[2] in HEADS for _, name, _ in rows) else ", no data.pkl"
    return f"{rows[0][1].partition('/')[0]}/, {plural(whole, 'whole record')}{lost}"


def _ends(data: mmap.mmap, base: int, earlier: Row, end: int) -> bool:
    """Whether an archive ends between two records: with an end record behind its directory."""
    begin, _, span = earlier
    begin = begin if span is None else span.offset + span.length
    place = data.find(END_MAGIC, base + begin, base + end - END.size + 1)
    while place >= 0:
        _, disk, first, here, count, size, _, _ = END.unpack_from(data, place)
        sound = not disk and not first and here == count
        if sound and _begins_with(data, place - size, CENTRAL_MAGIC):
            return True
        if _begins_with(data, place - LOCATOR.size, LOCATOR_MAGIC):
            return True
        place = data.find(END_MAGIC, place + 1, base + end - END.size + 1)
    return False


def _begins_with(data: mmap.mmap, place: int, magic: bytes) -> bool:
    return place >= 0 and data[place : place + len(magic)] == magic


def _one_archive(source: Source, found: Salvage) -> Source:
    """The archive that is meant, where a file holds several. Raises `ReadError` as `chosen`."""
    try:
        sound = zips.read(source).end == source.size
    except ReadError:
        sound = False
    return chosen(source, [] if sound else archives(source), found)


def records(source: Source, found: Salvage) -> dict[str, Span]:
    """The whole records of an archive, by name.

    An archive says where its records are, and what their checksums are, twice: in front of or
    behind each of them, and in its directory. The one that fits the bytes counts.
    """
    source = _one_archive(source, found)
    try:
        archive = zips.read(source)
        ours = archive.spans
    except ReadError as error:
        found.skip("the archive cannot be read as it is", error)
        ours = {}
    else:
        if archive.end < source.size:
            note_rest(source, archive.end, found)
        if _has_sums(ours) and all(map(is_right, ours.values())):
            return ours
    known = [listed(source), scan(source), ours]
    whole = _longest([one if _has_sums(one) else _unchecked(one) for one in known])
    found.steps.append(f"found {len(whole)} whole records")
    return whole


def _has_sums(found: dict[str, Span]) -> bool:
    """Whether an archive has checksums; one that has none may look as if it had one by damage."""
    filled = [span.crc for span in found.values() if span.length]
    return sum(bool(crc) for crc in filled) * 2 > len(filled)


def _unchecked(found: dict[str, Span]) -> dict[str, Span]:
    return {name: span.unchecked() for name, span in found.items()}


def _longest(known: list[dict[str, Span]]) -> dict[str, Span]:
    """Of the readings of each record the first that is right; a length of 0 may be damage."""
    found: dict[str, Span] = {}
    for one in known:
        for name, span in one.items():
            earlier = found.get(name)
            better = earlier is None or not earlier.length
            if better and is_right(span):
                found[name] = span
    return found
