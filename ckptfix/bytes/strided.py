"""The elements of a strided tensor in row-major order, gathered when they are read."""

from __future__ import annotations

import mmap
from _thread import allocate_lock
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.bytes.engine import blocks
from ckptfix.bytes.source import too_short
from ckptfix.bytes.span import MadeSource, Span, cut
from ckptfix.bytes.unpacked import UnpackedSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Elements = NDArray[Any]

HELD = 16 << 20
"""Bytes between the first and the last element up to which they are read at once, and held until
all were given. What is larger, and does not lie nearly together, is copied to an unnamed file and
gathered over a memory map of that: one of the input would end the process if it is cut short."""

_SPARSE, _NEAR = 4, 1 << 16
"""Elements lie nearly together if they are spread over so many times their bytes, or so many."""


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


class StridedSource(MadeSource):
    """Elements of `spans`, one after another. Imports numpy when it is read."""

    def __init__(self, spans: Sequence[Span], layout: Layout, name: str) -> None:
        self.name = name
        self.size = prod(layout.shape) * layout.itemsize
        self._spans = spans
        self._layout = layout
        self._array: Elements | None = None
        self._given = 0
        self._lock = allocate_lock()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; elements that this cuts are gathered whole."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        if not length:
            return b""
        size = self._layout.itemsize
        first, last = offset // size, -(-(offset + length) // size)
        data = b"".join(map(self._turned, self._parts(first, last)))
        start = offset - first * size
        return data[start : start + length]

    def _parts(self, first: int, last: int) -> Iterator[Elements]:
        """Elements `first` to `last`, which is not one of them, as arrays in row-major order."""
        shape, stride, offset, size, *_ = self._layout
        if not shape:
            yield _array(self._spans, self._layout)[first:last]
            return
        row = prod(shape[1:])
        top, end = first // row, -(-last // row)
        begin = offset + top * stride[0]
        layout = self._layout._replace(shape=(end - top, *shape[1:]), offset=begin)
        spread = _spread(layout) * size
        if spread <= max(_SPARSE * (last - first) * size, _NEAR):
            yield from _rows(_array(self._spans, layout), first - top * row, last - top * row)
            return
        with self._lock:
            if self._array is None:
                self._array = _array(self._spans, self._layout)
            array = self._array
            self._given += last - first
            if self._given >= prod(shape):
                self._array, self._given = None, 0
        yield from _rows(array, first, last)

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


def _spread(layout: Layout) -> int:
    """Elements from the first to the last."""
    return 1 + sum(
        (count - 1) * step for count, step in zip(layout.shape, layout.stride, strict=True)
    )


def _array(spans: Sequence[Span], layout: Layout) -> Elements:
    import numpy as np

    shape, stride, offset, size, *_ = layout
    held = _held(cut(spans, offset * size, _spread(layout) * size))
    strides = [step * size for step in stride]
    # copied as they are, so any type of that size will do
    kind = np.dtype(f"u{size}" if size <= 8 else f"c{size}")
    array: Elements = np.ndarray(shape, kind, held, 0, strides)
    return array.reshape(1) if not shape else array


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


def _held(spans: Sequence[Span]) -> Any:
    """The bytes of some spans in a row, as a buffer."""
    length = sum(span.length for span in spans)
    if length > HELD:
        together = _together(spans, length)  # which a map of it outlives
        return mmap.mmap(together.fileno(), length, access=mmap.ACCESS_READ)
    data, position = bytearray(length), 0
    for span in blocks(spans):
        part = memoryview(data)[position : position + span.length]
        span.source.readinto(span.offset, part)
        position += span.length
    return data


def _together(spans: Sequence[Span], length: int) -> UnpackedSource:
    """Spans in an unnamed file."""

    def pieces() -> Iterator[bytes]:
        for block in blocks(spans):
            yield block.read()

    return UnpackedSource(pieces, length, spans[0].source.name)
