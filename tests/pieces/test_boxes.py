"""The proof that boxes tile a shape, held against a count of every element."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptfix.errors import CkptfixError, DamagedError, UnsafeError, UnsupportedError
from ckptfix.pieces.boxes import Box, Runs, check

if TYPE_CHECKING:
    from collections.abc import Iterator


def split(draw: Any, shape: tuple[int, ...], cuts: int) -> list[Box]:
    """Boxes that tile a shape: cut in two again and again, anywhere; empty ones occur."""
    found = [Box((0,) * len(shape), shape)]
    for _ in range(cuts if shape else 0):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.size[d]))
        first, second = list(box.size), list(box.size)
        first[d], second[d] = at, box.size[d] - at
        offset = list(box.offset)
        offset[d] += at
        found += [Box(box.offset, tuple(first)), Box(tuple(offset), tuple(second))]
    return found


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tilings(draw: Any) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    return shape, draw(st.permutations(split(draw, shape, draw(st.integers(0, 6)))))


@st.composite
def any_boxes(draw: Any) -> tuple[tuple[int, ...], list[Box]]:
    """A tiling of which boxes are moved, doubled, left out or made larger."""
    shape, boxes = draw(tilings())
    for _ in range(draw(st.integers(0, 2))):
        if not boxes:
            break
        number = draw(st.integers(0, len(boxes) - 1))
        box = boxes.pop(number)
        moves = st.lists(st.integers(-1, 1), min_size=len(shape), max_size=len(shape))
        offset = tuple(map(sum, zip(box.offset, draw(moves), strict=True)))
        size = tuple(map(sum, zip(box.size, draw(moves), strict=True)))
        boxes += draw(
            st.sampled_from(([], [box, box], [Box(offset, box.size)], [Box(box[0], size)]))
        )
    return shape, boxes


def verdict(shape: tuple[int, ...], boxes: list[Box]) -> str:
    """What counting says: every element of every box, one by one."""
    count = dict.fromkeys(product(*map(range, shape)), 0)
    for box in boxes:
        inside = all(
            begin >= 0 and size >= 0 and begin + size <= whole
            for begin, size, whole in zip(*box, shape, strict=True)
        )
        if not inside:
            return "piece-outside"
    for box in boxes:
        spans = (range(o, o + s) for o, s in zip(*box, strict=True))
        for element in product(*spans):
            count[element] += 1
    found = {min(max(number, 0), 2) for number in count.values()}
    return "wrong" if found - {1} else "tiled"


@given(tilings())
def test_what_is_cut_anywhere_is_a_tiling(drawn: tuple[tuple[int, ...], list[Box]]) -> None:
    check(*drawn)


@given(any_boxes())
@example(((2, 2), [Box((0, 0), (1, 2)), Box((0, 0), (1, 2))]))
@settings(max_examples=500)
def test_every_list_of_boxes_is_judged_as_by_counting(
    drawn: tuple[tuple[int, ...], list[Box]],
) -> None:
    shape, boxes = drawn
    assert judged(shape, boxes) == verdict(shape, boxes)


def judged(shape: tuple[int, ...], boxes: list[Box]) -> str:
    try:
        check(shape, boxes)
    except CkptfixError as error:
        return "piece-outside" if error.code == "piece-outside" else "wrong"
    return "tiled"


def test_the_error_names_what_is_missing_and_what_overlaps() -> None:
    rows = [Box((at, 0), (2, 3)) for at in (0, 2, 4)]
    with pytest.raises(DamagedError, match=r"begins at \[2, 0\] of \[6, 3\] is missing"):
        check((6, 3), [rows[0], rows[2]])
    with pytest.raises(UnsafeError, match=r"\[2, 3\] at \[2, 0\] and \[1, 1\] at \[3, 2\] overlap"):
        check((6, 3), [*rows, Box((3, 2), (1, 1))])
    with pytest.raises(UnsafeError, match=r"\[2, 4\] at \[0, 0\] is not inside"):
        check((6, 3), [Box((0, 0), (2, 4))])


def test_boxes_of_which_as_many_overlap_as_are_missing_are_refused() -> None:
    with pytest.raises(UnsafeError, match="overlap"):
        check((4,), [Box((0,), (2,)), Box((1,), (2,))])


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((4,), Box((0, 0), (4, 1))),
        ((4,), Box((-1,), (5,))),
        ((4,), Box((5,), (-1,))),
        ((1 << 62, 4), Box((0, 0), (1 << 62, 4))),
        ((-1,), Box((0,), (0,))),
        ((1 << 63, 0), Box((0, 0), (0, 0))),
    ],
)
def test_what_no_tensor_can_have_is_refused(shape: tuple[int, ...], box: Box) -> None:
    with pytest.raises(UnsafeError):
        check(shape, [box])


@pytest.mark.parametrize("dimensions", [20, 62])
def test_many_dimensions_are_refused_before_their_corners_are_counted(dimensions: int) -> None:
    with pytest.raises(UnsupportedError, match=f"split in {dimensions} dimensions"):
        check((2,) * dimensions, [Box((0,) * dimensions, (1,) * dimensions)])
    check((1,) * dimensions, [Box((0,) * dimensions, (1,) * dimensions)])


def test_a_hundred_thousand_boxes_in_a_grid_are_proved() -> None:
    side = 320  # each with each would be 10**10
    grid = [Box((i, j), (1, 1)) for i in range(side) for j in range(side)]
    check((side, side), grid)
    with pytest.raises(DamagedError, match=r"begins at \[319, 319\]"):
        check((side, side), grid[:-1])


def places_of(runs: Runs, first: int, last: int) -> Iterator[int]:
    for begin, counts, steps in runs.grids(first, last):
        for index in product(*map(range, counts)):
            yield begin + sum(at * step for at, step in zip(index, steps, strict=True))


@given(tilings(), st.data())
def test_runs_lie_where_their_elements_do(
    drawn: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = drawn
    boxes = [box for box in boxes if box.numel]
    if not boxes:
        return
    box, itemsize = data.draw(st.sampled_from(boxes)), 4
    strides = [itemsize * prod(shape[d + 1 :]) for d in range(len(shape))]
    elements = [
        sum(at * step for at, step in zip(element, strides, strict=True))
        for element in product(*(range(o, o + s) for o, s in zip(*box, strict=True)))
    ]
    runs = Runs(shape, box, itemsize)
    places = list(places_of(runs, 0, runs.number))
    assert len(places) == runs.number
    assert [p + b for p in places for b in range(0, runs.length, itemsize)] == elements
    assert (runs.begin, runs.end) == (elements[0], elements[-1] + itemsize)
    assert all(a + runs.length < b for a, b in pairwise(places))
    place = data.draw(st.integers(-itemsize, prod(shape) * itemsize + itemsize))
    assert runs.first_from(place) == sum(start < place for start in places)
    first = data.draw(st.integers(0, runs.number))
    last = data.draw(st.integers(first, runs.number))
    assert list(places_of(runs, first, last)) == places[first:last]
    assert all(runs.place(run) == place for run, place in enumerate(places))
