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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ckptfix.pieces.boxes import Runs

_HELD = 1 << 18
"""Bytes that are read before they are dealt out: they stay near the core."""

_LONG = 1 << 15
"""Runs of so many bytes are read to where they belong."""

_SHORT = 4
"""Runs of so few numbers are dealt out a number of all of them at a time."""


class Part(NamedTuple):
    """The bytes of one box, row-major, and where its runs lie in the whole."""

    runs: Runs
    spans: tuple[Span, ...]


class ScatteredSource(Source):
    """The row-major bytes of a tensor, of which every run lies in the file of some box.

    `parts` makes what each box holds; it is called at the first read and once more after the last
    byte was read, so that what is not being read takes no memory. The boxes tile the tensor.
    """

    def __init__(self, size: int, parts: Callable[[], list[Part]], name: str) -> None:
        self._make = parts
        self._index: _Index | None = None
        self.name = name
        self.size = size

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
        return [span.source for part in self._make() for span in part.spans]

    @property
    def is_checked(self) -> bool:
        """Whether those of all boxes are."""
        return all(source.is_checked for source in self.below)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        index = self._index or _Index(self._make())
        end = offset + len(buffer)
        for part in index.between(offset, end):
            _fill(buffer, offset, part)
        self._index = index if end < self.size else None


class _Index:
    """Parts by where they begin, of which those between two places are found quickly."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = sorted(parts, key=lambda part: part.runs.begin)
        self._begins = [part.runs.begin for part in self._parts]
        self._ends = list(accumulate((part.runs.end for part in self._parts), max))

    def between(self, begin: int, end: int) -> list[Part]:
        """Those that may have a run between two places; none that has one is left out."""
        return self._parts[bisect_right(self._ends, begin) : bisect_left(self._begins, end)]


_own = _local()


def _fill(view: memoryview, begin: int, part: Part) -> None:
    """Put what a part holds of the bytes from `begin` on into a buffer."""
    runs, spans = part
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
