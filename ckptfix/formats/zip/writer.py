"""Zip archives written so that their contents can be memory-mapped."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ckptfix.bytes.engine import crc32
from ckptfix.bytes.journal import Patch
from ckptfix.bytes.source import CHUNK
from ckptfix.bytes.span import Span
from ckptfix.formats.zip.layout import (
    CENTRAL_MAGIC,
    CRC_IN_LOCAL,
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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.bytes.copy import Sink
    from ckptfix.bytes.engine import Label, Sum


class Writer:
    """Writes records one after another; each one's data begins at a multiple of `ALIGNMENT`.

    The archive begins where the sink stands, and places in it are counted from there. CRC and sizes
    stand in the local header, so that no data descriptors are needed; where the CRC is not known
    before the data has passed, the header is corrected afterwards.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._begin = sink.position
        self._entries: dict[str, tuple[int, int, int]] = {}  # CRC, size, offset
        self._unsummed: dict[str, Sum] = {}

    def add(self, name: str, parts: Sequence[Span | bytes], label: Label | None = None) -> None:
        """Add a record made of `parts` in order; `label` is what messages call it."""
        sink, first = self._sink, parts[0] if len(parts) == 1 else None
        offset = sink.position - self._begin
        if type(first) is Span and first.crc is not None:
            _, _, size, crc = first
        else:
            size = sum(part.length if isinstance(part, Span) else len(part) for part in parts)
            crc = _cheap_crc(parts, size)
        sink.write(self._local_header(name, crc or 0, size, offset))
        label = label or repr(name)
        if crc is None:
            self._unsummed[name] = sink.copy_summed(parts, label)
        else:
            for part in parts:
                sink.copy(part, label)
        self._entries[name] = (crc or 0, size, offset)

    def crcs(self) -> list[int]:
        """The CRCs of all records so far; those that were not known are put into their headers."""
        for name, total in self._unsummed.items():
            _, size, offset = self._entries[name]
            self._entries[name] = (total.value(), size, offset)
            new = struct.pack("<I", total.value())
            self._sink.patch(Patch(self._begin + offset + CRC_IN_LOCAL, bytes(4), new))
        self._unsummed.clear()
        return [crc for crc, _, _ in self._entries.values()]

    def _local_header(self, name: str, crc: int, size: int, offset: int) -> bytes:
        label = name.encode()
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= MAX32 else b""
        start = offset + LOCAL.size + len(label) + len(wide) + 4
        extra = wide + _PADDINGS[-start % ALIGNMENT]
        before, narrow = (_WIDE_LOCAL, MAX32) if wide else (_NARROW_LOCAL, size)
        return before + _KNOWN.pack(crc, narrow, narrow, len(label), len(extra)) + label + extra

    def finish(self) -> None:
        """Write the directory and the end records."""
        self.crcs()
        start = self._sink.position - self._begin
        for name, entry in self._entries.items():
            self._sink.write(_central_header(name, *entry))
        place = self._sink.position - self._begin
        count, size = len(self._entries), place - start
        if count >= MAX16 or start >= MAX32 or size >= MAX32:
            self._sink.write(
                END64.pack(END64_MAGIC, END64.size - 12, 45, 45, 0, 0, count, count, size, start)
            )
            self._sink.write(LOCATOR.pack(LOCATOR_MAGIC, 0, place, 1))
        count, size, start = min(count, MAX16), min(size, MAX32), min(start, MAX32)
        self._sink.write(END.pack(END_MAGIC, 0, 0, count, count, size, start, 0))


def _cheap_crc(parts: Sequence[Span | bytes], size: int) -> int | None:
    """The CRC of a record before it is written, where computing it costs little."""
    computed = any(isinstance(part, Span) and part.source.fileno() is None for part in parts)
    return None if computed or size >= CHUNK else crc32(parts)


ALIGNMENT = 64
"""Bytes."""
_PADDINGS = [struct.pack("<2sH", b"FB", room) + b"Z" * room for room in range(ALIGNMENT)]
_DOS_EPOCH = 0x21  # 1 January 1980, the earliest date a zip can hold: equal inputs give equal files
_KNOWN, _LISTED = struct.Struct("<3I2H"), struct.Struct("<3I2H10xI")
"""What headers differ in: CRC, both sizes, the lengths of the name and of the extra field; in the
directory, after zeros for no comment and no attributes, the place of the record too."""
_NARROW_LOCAL, _WIDE_LOCAL = (
    struct.pack("<4s5H", LOCAL_MAGIC, version, UTF8, STORED, 0, _DOS_EPOCH) for version in (20, 45)
)
_NARROW_CENTRAL, _WIDE_CENTRAL = (
    struct.pack("<4s6H", CENTRAL_MAGIC, version, version, UTF8, STORED, 0, _DOS_EPOCH)
    for version in (20, 45)
)


def _central_header(name: str, crc: int, size: int, offset: int) -> bytes:
    label = name.encode()
    if size < MAX32 and offset < MAX32:
        return _NARROW_CENTRAL + _LISTED.pack(crc, size, size, len(label), 0, offset) + label
    values = ([size, size] if size >= MAX32 else []) + ([offset] if offset >= MAX32 else [])
    extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
    narrow, place = min(size, MAX32), min(offset, MAX32)
    known = _LISTED.pack(crc, narrow, narrow, len(label), len(extra), place)
    return _WIDE_CENTRAL + known + label + extra
