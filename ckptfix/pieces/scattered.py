"""Bytes that lie in runs all over several files, such as the columns of a matrix in pieces.

What is read is a stretch of the whole. Of each box the runs that lie in it are, in the file, one
stretch as well: that is read a little at a time, and dealt out by numpy, many runs at once and
beside other threads. Long runs are read to where they belong.
"""

from __future__ import annotations

from _thread import _local
from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.source import Source, too_short
from ckptfix.bytes.span import Span, cut
from ckptfix.pieces.boxes import Runs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.pieces.boxes import Box

_HELD = 1 << 18
"""Bytes that are read before they are dealt out: they stay near the core."""

_LONG = 1 << 15
"""Runs of so many bytes are read to where they belong."""

_SHORT = 4
"""Runs of so few numbers are dealt out a number of all of them at a time."""


class Part(NamedTuple):
    """The bytes of one box, row-major."""

    box: Box
    spans: tuple[Span, ...]


class ScatteredSource(Source):
    """The row-major bytes of a tensor of that shape, which the boxes of `parts` tile.

    Where their runs lie is found at the first read, and forgotten after the last byte was read, so
    that what is not being read takes little memory.
    """

    def __init__(self, shape: tuple[int, ...], itemsize: int, parts: list[Part], name: str) -> None:
        self._shape, self._itemsize, self._parts = shape, itemsize, parts
        self._index: _Index | None = None
        self.name = name
        self.size = prod(shape) * itemsize

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        made = bytearray(length)
        self.readinto(offset, memoryview(made))
        return bytes(made)

    @property
    def below(self) -> Iterable[Source]:
        """The sources of all boxes."""
        return [span.source for part in self._parts for span in part.spans]

    @property
    def is_checked(self) -> bool:
        """Whether those of all boxes are."""
        return all(source.is_checked for source in self.below)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        index = self._index or _Index(self._shape, self._itemsize, self._parts)
        end = offset + len(buffer)
        for runs, spans in index.between(offset, end):
            _fill(buffer, offset, runs, spans)
        self._index = index if end < self.size else None


class _Index:
    """The runs of boxes, by where they begin: those between two places are found quickly."""

    def __init__(self, shape: tuple[int, ...], itemsize: int, parts: list[Part]) -> None:
        found = [(Runs(shape, box, itemsize), spans) for box, spans in parts]
        self._found = sorted(found, key=lambda pair: pair[0].begin)
        self._begins = [runs.begin for runs, _ in self._found]
        self._ends = list(accumulate((runs.end for runs, _ in self._found), max))

    def between(self, begin: int, end: int) -> list[tuple[Runs, tuple[Span, ...]]]:
        """Those that may have a run between two places; none that has one is left out."""
        return self._found[bisect_right(self._ends, begin) : bisect_left(self._begins, end)]


_own = _local()


def _fill(view: memoryview, begin: int, runs: Runs, spans: tuple[Span, ...]) -> None:
    """Put what a box holds of the bytes from `begin` on into a buffer."""
    length, end = runs.length, begin + len(view)
    touched = runs.first_from(begin - length + 1), runs.first_from(end)
    first, last = runs.first_from(begin), runs.first_from(end - length + 1)  # those that lie in it
    for run in {touched[0], touched[1] - 1}:  # it may cut one at either end
        if touched[0] <= run < touched[1] and not first <= run < last:
            at = runs.place(run) - begin
            start, stop = max(at, 0), min(at + length, len(view))
            _read(spans, run * length + start - at, view[start:stop])
    if length >= _LONG:
        for run in range(first, last):
            at = runs.place(run) - begin
            _read(spans, run * length, view[at : at + length])
        return
    buffer = _own.__dict__.pop("buffer", None) or bytearray(_HELD)  # not one that is in use above
    number = _HELD // length
    for start in range(first, last, number):
        stop = min(start + number, last)
        held = memoryview(buffer)[: (stop - start) * length]
        _read(spans, start * length, held)
        _deal(held, view, begin, runs, start, stop)
    _own.buffer = buffer


def _deal(
    held: memoryview, view: memoryview, begin: int, runs: Runs, first: int, last: int
) -> None:
    """Put the runs from `first` on before `last`, one after another, to where they belong."""
    import numpy as np

    length = runs.length
    unit = next(unit for unit in (8, 4, 2, 1) if not any(n % unit for n in (length, *runs.steps)))
    width, done = length // unit, 0
    for place, counts, steps in runs.grids(first, last):
        shape = (*counts, width)
        source = np.ndarray(shape, f"u{unit}", held, done)
        into = np.ndarray(shape, f"u{unit}", view, place - begin, (*steps, unit))
        if width <= _SHORT:
            for number in range(width):
                into[..., number] = source[..., number]
        else:
            into[...] = source
        done += prod(counts) * length


def _read(spans: tuple[Span, ...], position: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of spans from `position` on."""
    done = 0
    for source, offset, length, _ in cut(spans, position, len(buffer)):
        source.readinto(offset, buffer[done : done + length])
        done += length
