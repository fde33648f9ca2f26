"""Boxes in a shape: whether they tile it, and where each of them lies in row-major order.

The proof takes time in proportion to the number of boxes. Each box is described by its corners,
those with an even number of upper coordinates counting +1, the others -1. A sum of boxes is the
whole exactly where the sum of their corners is that of the whole; and where it is not, the first
corner that differs begins what is covered twice, or not at all.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_SPLIT = 8
"""Dimensions in which one tensor may be split; a box has a corner for each subset of them."""

_INT64 = 1 << 63


class Box(NamedTuple):
    """A part of a shape: where it begins and how large it is, in elements of each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.size)

    def holds(self, element: tuple[int, ...]) -> bool:
        """Whether an element of the whole lies in it."""
        every = zip(element, self.offset, self.size, strict=True)
        return all(begin <= at < begin + size for at, begin, size in every)

    def __str__(self) -> str:
        return f"{list(self.size)} at {list(self.offset)}"


def check(shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise where boxes do not tile a shape; empty ones may lie anywhere in it.

    `DamagedError` where an element is in no box, `UnsafeError` where one is in two or where a box
    is not inside, `UnsupportedError` where they are split in too many dimensions.
    """
    if any(not 0 <= size < _INT64 for size in shape) or prod(filter(None, shape)) >= _INT64:
        raise UnsafeError(f"has the shape {list(shape)}, which no tensor can have")
    for box in boxes:
        _check_inside(shape, box)
    filled = [box for box in boxes if box.numel]
    differs = _first_difference(shape, filled)
    if differs is None:
        return
    element, count = differs
    if count < 0:
        raise DamagedError(
            f"the piece that begins at {list(element)} of {list(shape)} is missing",
            hint="copy or download what is missing, too",
            code="piece-missing",
        )
    one, other = [box for box in filled if box.holds(element)][:2]
    raise UnsafeError(f"the pieces {one} and {other} overlap", code="pieces-overlap")


def _check_inside(shape: tuple[int, ...], box: Box) -> None:
    fits = len(shape) == len(box.offset) == len(box.size)
    if not fits or any(
        begin < 0 or size < 0 or begin + size > whole
        for begin, size, whole in zip(box.offset, box.size, shape, strict=True)
    ):
        raise UnsafeError(f"the piece {box} is not inside {list(shape)}", code="piece-outside")


def _first_difference(
    shape: tuple[int, ...], filled: Sequence[Box]
) -> tuple[tuple[int, ...], int] | None:
    """The first element that is not in exactly one box, and how many too many it is in."""
    if not prod(shape):
        return None
    split = [d for d, whole in enumerate(shape) if any(box.size[d] != whole for box in filled)]
    if len(split) > MAX_SPLIT:
        raise UnsupportedError(f"is split in {len(split)} dimensions; {MAX_SPLIT} are read")
    total = dict(_corners(Box((0,) * len(shape), shape), split, -1))
    for box in filled:
        for corner, sign in _corners(box, split, 1):
            total[corner] = total.get(corner, 0) + sign
    wrong = min((corner for corner, count in total.items() if count), default=None)
    if wrong is None:
        return None
    element = [0] * len(shape)
    for dimension, begin in zip(split, wrong, strict=True):
        element[dimension] = begin
    return tuple(element), total[wrong]


def _corners(box: Box, split: Sequence[int], sign: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """The corners of a box in the dimensions that are split, each with its sign."""
    if len(split) == 1:  # as nearly all are
        (d,) = split
        yield (box.offset[d],), sign
        yield (box.offset[d] + box.size[d],), -sign
        return
    sides = [((box.offset[d], 1), (box.offset[d] + box.size[d], -1)) for d in split]
    for corner in product(*sides):
        yield tuple(place for place, _ in corner), sign * prod(one for _, one in corner)


class Runs:
    """Where the bytes of a box lie in the whole, row-major: runs of `length` bytes, in order.

    Their beginnings are those of a box of runs: `counts` and `steps` (in bytes), the outermost
    dimension first, and the last one counting the runs that lie evenly.
    """

    __slots__ = ("begin", "counts", "end", "length", "number", "steps")

    def __init__(self, shape: tuple[int, ...], box: Box, itemsize: int) -> None:
        strides = [itemsize]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        strides = strides[::-1][: len(shape)]
        self.begin = sum(map(int.__mul__, box.offset, strides))
        self.length, outer = itemsize, len(shape)
        while outer:
            outer -= 1
            self.length *= box.size[outer]
            if box.size[outer] != shape[outer]:
                break
        self.counts, self.steps = [1], [self.length]
        for size, step in zip(box.size[:outer], strides[:outer], strict=True):
            if size == 1:
                continue
            if self.steps[-1] == size * step:  # what follows fills it
                self.counts[-1] *= size
                self.steps[-1] = step
            else:
                self.counts.append(size)
                self.steps.append(step)
        if len(self.counts) > 1 and self.counts[0] == 1:
            del self.counts[0], self.steps[0]
        self.number = prod(self.counts)
        reach = sum((count - 1) * step for count, step in zip(self.counts, self.steps, strict=True))
        self.end = self.begin + reach + self.length

    def first_from(self, place: int) -> int:
        """The first run that begins at byte `place` of the whole or later; `number` if none."""
        rest, found = max(place - self.begin, 0), 0
        for position, (count, step) in enumerate(zip(self.counts, self.steps, strict=True)):
            digit, rest = divmod(rest, step)
            found = found * count + min(digit, count)
            if digit >= count:
                return found * prod(self.counts[position + 1 :])
        return found + (rest > 0)

    def place(self, run: int) -> int:
        """Where a run begins in the whole."""
        place = self.begin
        for count, step in zip(self.counts[:0:-1], self.steps[:0:-1], strict=True):
            run, digit = divmod(run, count)
            place += digit * step
        return place + run * self.steps[0]

    def grids(self, first: int, last: int) -> Iterator[Grid]:
        """The runs from `first` on before `last`, in order, in grids of those that lie evenly."""
        return _grids(self.begin, self.counts, self.steps, first, last)


class Grid(NamedTuple):
    """Runs that lie evenly: where the first begins in the whole, how many, and how far apart."""

    begin: int
    counts: list[int]
    steps: list[int]


def _grids(
    begin: int, counts: list[int], steps: list[int], first: int, last: int
) -> Iterator[Grid]:
    row = prod(counts[1:])
    head, tail = -(-first // row), last // row
    if head > tail:  # all in one row
        row *= tail
        yield from _grids(begin + tail * steps[0], counts[1:], steps[1:], first - row, last - row)
        return
    if first < head * row:
        above = begin + (head - 1) * steps[0]
        yield from _grids(above, counts[1:], steps[1:], first - (head - 1) * row, row)
    if head < tail:
        yield Grid(begin + head * steps[0], [tail - head, *counts[1:]], steps)
    if last > tail * row:
        below = begin + tail * steps[0]
        yield from _grids(below, counts[1:], steps[1:], 0, last - tail * row)
