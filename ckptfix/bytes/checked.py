"""Bytes of which parts are used, although only the whole has a checksum on record."""

from __future__ import annotations

from _thread import allocate_lock
from typing import TYPE_CHECKING

from isal import isal_zlib

from ckptfix.bytes.engine import crc32, wrong_sum
from ckptfix.bytes.source import Source
from ckptfix.bytes.span import Span
from ckptfix.bytes.sums import joined

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptfix.bytes.engine import Label


class CheckedSource(Source):
    """The source of a span: what is read of the span is summed as it passes.

    `check` reads what did not pass, and raises `DamagedError` where the whole does not have the
    checksum on record.
    """

    def __init__(self, span: Span, label: Label) -> None:
        self.name, self.size = span.source.name, span.source.size
        self._span, self._label = span, label
        self._passed: dict[int, tuple[int, int]] = {}  # length and CRC, by the place of the first
        self._lock = allocate_lock()

    def fileno(self) -> int | None:
        """The descriptor of the source."""
        return self._span.source.fileno()

    @property
    def begin(self) -> int:
        """Where the bytes of the source begin in what `fileno` opens."""
        return self._span.source.begin

    @property
    def below(self) -> Iterable[Source]:
        """The source itself."""
        return (self._span.source,)

    @property
    def is_checked(self) -> bool:
        """True where the span has a checksum on record."""
        return self._span.crc is not None

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the source from `offset`."""
        data = self._span.source.read(offset, length)
        self._keep(offset, data)
        return data

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        self._span.source.readinto(offset, buffer)
        self._keep(offset, buffer)

    def _keep(self, offset: int, data: bytes | memoryview) -> None:
        if self._span.crc is not None and len(data):
            crc = isal_zlib.crc32(data)
            with self._lock:
                self._passed[offset] = (len(data), crc)

    def check(self) -> None:
        """Raise `DamagedError` where the span does not have the CRC on record."""
        if self._span.crc is None:
            return
        crc = 0
        for piece, known in self._pieces():
            crc = joined(crc, crc32([piece]) if known is None else known, piece.length)
        if crc != self._span.crc:
            raise wrong_sum(self._span, self._label)

    def _pieces(self) -> Iterator[tuple[Span, int | None]]:
        """The whole span in order: what has passed, with its CRC, and what lies between."""
        source, position, length, _ = self._span
        end = position + length
        for start, (count, crc) in sorted(self._passed.items()):
            if start < position or start + count > end:
                continue
            if start > position:
                yield Span(source, position, start - position), None
            yield Span(source, start, count), crc
            position = start + count
        if position < end:
            yield Span(source, position, end - position), None
