"""Bytes that lie in runs all over several files, such as the columns of a matrix in pieces.

What is read is a stretch of the whole. Of each box the runs that lie in it are, in the file, one
stretch as well: the system scatters that over the buffer (`preadv`), a thousand runs a call. Runs
of a few bytes are read together and dealt out, an element of all of them at a time.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from ckptfix.bytes.source import Source, too_short
from ckptfix.bytes.span import Span, cut
from ckptfix.errors import ReadError
from ckptfix.words import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ckptfix.pieces.boxes import Runs

_CALL = 1024
"""Buffers that one call may fill (IOV_MAX)."""

_SHORT = 256
"""Runs of fewer bytes are dealt out here, not by the system."""

_UNITS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}


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


def _fill(view: memoryview, begin: int, part: Part) -> None:
    """Put what a part holds of the bytes from `begin` on into a buffer."""
    runs, spans = part
    first = runs.first_from(begin - runs.length + 1)
    last = runs.first_from(begin + len(view))
    if first >= last:
        return
    if runs.length < _SHORT:
        _deal(view, begin, part, first, last)
        return
    places = [
        at - begin
        for _, start, count in runs.rows(first, last)
        for at in range(start, start + count * runs.steps[-1], runs.steps[-1])
    ]
    skip = max(-places[0], 0)  # only the first may begin before the buffer
    slices = [view[max(at, 0) : at + runs.length] for at in places]
    position = first * runs.length + skip
    for start in range(0, len(slices), _CALL):
        position += _scatter(spans, position, slices[start : start + _CALL])


def _scatter(spans: tuple[Span, ...], position: int, slices: list[memoryview]) -> int:
    """Read bytes of spans from `position` on into slices; how many they were."""
    wanted = sum(map(len, slices))
    plain = len(spans) == 1 and not spans[0].source.is_checked  # or it has to see the bytes
    descriptor = spans[0].source.fileno() if plain else None
    if descriptor is not None and hasattr(os, "preadv"):
        source, offset, _, _ = spans[0]
        try:
            if os.preadv(descriptor, slices, source.begin + offset + position) == wanted:
                return wanted
        except OSError as error:
            raise ReadError(f"cannot be read: {reason(error)}", where=source.name) from None
    data, done = memoryview(_read(spans, position, wanted)), 0
    for piece in slices:
        piece[:] = data[done : done + len(piece)]
        done += len(piece)
    return wanted


def _deal(view: memoryview, begin: int, part: Part, first: int, last: int) -> None:
    """As `_fill`, of short runs: those that lie evenly are copied an element of all at a time."""
    runs, spans = part
    length, step = runs.length, runs.steps[-1]
    data = memoryview(_read(spans, first * length, (last - first) * length))
    for index, start, count in runs.rows(first, last):
        at, source = start - begin, data[(index - first) * length :]
        if at < 0:  # the first run lies there in part
            stop = min(at + length, len(view))
            view[:stop] = source[-at : stop - at]
            at, source, count = at + step, source[length:], count - 1
        if count and at + (count - 1) * step + length > len(view):  # and so may the last
            count -= 1
            rest = view[at + count * step :]
            rest[:] = source[count * length : count * length + len(rest)]
        if count:
            _interleave(view[at : at + (count - 1) * step + length], source, count, length, step)


def _interleave(view: memoryview, source: memoryview, count: int, length: int, step: int) -> None:
    unit = next(unit for unit in _UNITS if not length % unit and not step % unit)
    into = view.cast(_UNITS[unit])
    data = source[: count * length].cast(_UNITS[unit])
    width = length // unit
    for column in range(width):
        into[column :: step // unit] = data[column::width]


def _read(spans: tuple[Span, ...], offset: int, length: int) -> bytes:
    found = cut(spans, offset, length)
    return found[0].read() if len(found) == 1 else b"".join(span.read() for span in found)
