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
from typing import TYPE_CHECKING

from ckptfix.bytes.engine import check_crc
from ckptfix.bytes.span import Span
from ckptfix.errors import ReadError
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip.layout import DESCRIBED, DESCRIPTOR_MAGIC, LOCAL, LOCAL_MAGIC, MAX32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage


_DESCRIPTOR_SIZES = (16, 24)


def scan(source: Source) -> dict[str, Span]:
    """Every stored record that is all there, by name, with the CRC that is recorded for it.

    And without one, the storage that ends where the file does.
    """
    descriptor = source.fileno()
    if not source.size or descriptor is None:
        return {}
    with mmap.mmap(descriptor, source.size, access=mmap.ACCESS_READ) as data:
        return dict(_records(data, source))


def _records(data: mmap.mmap, source: Source) -> Iterator[tuple[str, Span]]:
    place = data.find(LOCAL_MAGIC)
    while 0 <= place <= len(data) - LOCAL.size:
        _, _, flags, method, _, _, crc, packed, _, named, extra = LOCAL.unpack_from(data, place)
        begin = place + LOCAL.size + named + extra
        name = data[place + LOCAL.size : place + LOCAL.size + named].decode("utf-8", "replace")
        end = begin + packed
        if flags & DESCRIBED and not packed:
            crc, end = _described(data, begin)
            if end < 0 and method == 0 and "data/" in name:
                yield name, Span(source, begin, len(data) - begin)
        elif packed == MAX32:
            end = begin + _wide_size(data[begin - extra : begin])
        if method == 0 and begin <= end <= len(data):
            yield name, Span(source, begin, end - begin, crc)
        place = data.find(LOCAL_MAGIC, max(end, place + 1))


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


def records(source: Source, found: Salvage) -> dict[str, Span]:
    """The whole records of an archive, by name.

    An archive says where its records are, and what their checksums are, twice: in front of or
    behind each of them, and in its directory. The one that fits the bytes counts.
    """
    try:
        ours = zips.read(source).spans
    except ReadError as error:
        found.skip("the archive cannot be read as it is", error)
        ours = {}
    else:
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
