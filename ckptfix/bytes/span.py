"""Spans: stretches of a source, and stretches of several in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.source import CHUNK, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Span(NamedTuple):
    """`length` bytes of `source` from `offset`; `crc` is the CRC-32 on record, if any."""

    source: Source
    offset: int
    length: int
    crc: int | None = None

    def read(self) -> bytes:
        """All bytes of the span."""
        return self.source.read(self.offset, self.length)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The bytes of the span, `size` at a time: for what has to be read from front to back."""
        for start in range(0, self.length, size):
            yield self.source.read(self.offset + start, min(size, self.length - start))

    def unchecked(self) -> Span:
        """The same bytes without a CRC, for containers that were saved without them."""
        return Span(self.source, self.offset, self.length)

    def slice(self, offset: int, length: int) -> Span:
        """A stretch of this span; the CRC is kept only for the whole."""
        if offset == 0 and length == self.length:
            return self
        return Span(self.source, self.offset + offset, length)


class MadeSource(Source):
    """Bytes that are made of those of some spans."""

    _spans: Sequence[Span]

    @property
    def below(self) -> Iterable[Source]:
        """The sources of the spans."""
        return [span.source for span in self._spans]

    @property
    def is_checked(self) -> bool:
        """Whether all of them are."""
        return all(span.source.is_checked for span in self._spans)


def cut(spans: Iterable[Span], offset: int, length: int) -> tuple[Span, ...]:
    """The spans of `length` bytes from `offset` on, as counted over all of `spans`."""
    found: list[Span] = []
    for span in spans:
        begin, end = max(offset, 0), min(offset + length, span.length)
        if begin < end:
            found.append(span.slice(begin, end - begin))
        offset -= span.length
    return tuple(found)
