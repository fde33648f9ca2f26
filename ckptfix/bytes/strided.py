"""The elements of a strided tensor in row-major order, gathered when they are read."""

from __future__ import annotations

import mmap
import os
from _thread import allocate_lock
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.bytes.engine import blocks
from ckptfix.bytes.source import Source, too_short
from ckptfix.bytes.span import Span, cut
from ckptfix.bytes.unpacked import UnpackedSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    Elements = NDArray[Any]

HELD = 64 << 20
"""Bytes between the first and the last element up to which they are read at once, and held until
the last one was given. What is larger is gathered over a memory map."""


class Layout(NamedTuple):
    """How elements lie in bytes; `shape`, `stride` and `offset` count elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    itemsize: int
    word: int
    """Bytes of the numbers that an element is made of: a complex one is two."""
    swap: bool = False
    """Whether the bytes of each number have to be turned round."""
    conj: bool = False
    """Whether the imaginary part of each element has to be negated."""
    neg: bool = False
    """Whether each number has to be negated."""


class StridedSource(Source):
    """Elements of `spans`, one after another. Imports numpy when it is read."""

    def __init__(self, spans: Sequence[Span], layout: Layout, name: str) -> None:
        self.name = name
        self.size = prod(layout.shape) * layout.itemsize
        self._spans = spans
        self._layout = layout
        self._array: Elements | None = None
        self._lock = allocate_lock()

    @property
    def below(self) -> Iterable[Source]:
        """The sources of its spans."""
        return [span.source for span in self._spans]

    @property
    def is_checked(self) -> bool:
        """Whether all of its spans are."""
        return all(span.source.is_checked for span in self._spans)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; elements that this cuts are gathered whole."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        if not length:
            return b""
        size = self._layout.itemsize
        first, last = offset // size, -(-(offset + length) // size)
        data = b"".join(map(self._turned, _rows(self._elements(), first, last)))
        if offset + length == self.size:
            self._array = None
        start = offset - first * size
        return data[start : start + length]

    def _elements(self) -> Elements:
        with self._lock:
            if self._array is None:
                self._array = self._loaded()
            return self._array

    def _loaded(self) -> Elements:
        import numpy as np

        shape, stride, offset, size, *_ = self._layout
        reach = sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
        held = _held(cut(self._spans, offset * size, (reach + 1) * size))
        strides = [step * size for step in stride]
        # copied as they are, so any type of that size will do
        kind = np.dtype(f"u{size}" if size <= 8 else f"c{size}")
        array: Elements = np.ndarray(shape, kind, *held, strides)
        return array.reshape(1) if not shape else array

    def _turned(self, part: Elements) -> bytes:
        """Elements in row-major order, negated and turned round as the layout wants it."""
        import numpy as np

        _, _, _, _, word, swap, conj, neg = self._layout
        if not (swap or conj or neg):
            return part.tobytes()
        numbers = np.frombuffer(bytearray(part.tobytes()), f"u{word}")
        if swap:
            numbers.byteswap(inplace=True)
        sign = numbers.dtype.type(1 << (8 * word - 1))
        if conj:
            numbers[1::2] ^= sign
        if neg:
            numbers ^= sign
        return numbers.tobytes()


def _rows(array: Elements, first: int, last: int) -> Iterator[Elements]:
    """Elements `first` to `last`, which is not one of them, counted in row-major order."""
    if array.ndim == 1:
        yield array[first:last]
        return
    row = prod(array.shape[1:])
    head, tail = -(-first // row), last // row
    if head > tail:  # all in one row
        yield from _rows(array[tail], first - tail * row, last - tail * row)
        return
    if first < head * row:
        yield from _rows(array[head - 1], first - (head - 1) * row, row)
    if head < tail:
        yield array[head:tail]
    if last > tail * row:
        yield from _rows(array[tail], 0, last - tail * row)


def _held(spans: Sequence[Span]) -> tuple[Any, int]:
    """The bytes of some spans in a row as a buffer, and where they begin in it."""
    length = sum(span.length for span in spans)
    if length <= HELD:
        data, position = bytearray(length), 0
        for span in blocks(spans):
            part = memoryview(data)[position : position + span.length]
            span.source.readinto(span.offset, part)
            position += span.length
        return data, 0
    whole = spans[0] if len(spans) == 1 else _together(spans, length)
    descriptor = whole.source.fileno()
    if descriptor is None:
        whole = _together(spans, length)
        descriptor = whole.source.fileno()
        assert descriptor is not None
    begin = whole.source.begin + whole.offset
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    if begin + length > os.fstat(descriptor).st_size:
        raise too_short(whole.source.name, whole.offset, length)
    size = begin + length - start
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, offset=start), begin - start


def _together(spans: Sequence[Span], length: int) -> Span:
    """Spans that lie apart, or in no file, in an unnamed file."""

    def pieces() -> Iterator[bytes]:
        for block in blocks(spans):
            yield block.read()

    return Span(UnpackedSource(pieces, length, spans[0].source.name), 0, length)
