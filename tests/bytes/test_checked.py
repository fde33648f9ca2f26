"""Parts of a span that has one checksum: what passes is summed, what does not is read."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes.checked import CheckedSource
from ckptfix.bytes.place import Place
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError
from tests.helpers import Computed

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(200)) * 3
PARTS = st.lists(st.tuples(st.integers(0, 599), st.integers(0, 300)), max_size=8)


def checked(crc: int | None) -> tuple[CheckedSource, Computed]:
    below = Computed(DATA, name="in.pt")
    return CheckedSource(Span(below, 100, 400, crc), lambda: "'w'"), below


@given(PARTS, st.randoms())
def test_whatever_was_read_the_whole_is_checked_and_no_more_is_read(
    parts: list[tuple[int, int]], random: object
) -> None:
    right, below = checked(zlib.crc32(DATA[100:500]))
    for offset, length in parts:
        right.read(offset, min(length, 600 - offset))
    below.made.clear()
    right.check()
    inside = [(o, o + n) for o, n in parts if o >= 100 and o + min(n, 600 - o) <= 500]
    if not inside:
        assert sum(length for _, length in below.made) == 400
    wrong, _ = checked(zlib.crc32(DATA[100:500]) ^ 1)
    for offset, length in parts:
        wrong.read(offset, min(length, 600 - offset))
    with pytest.raises(DamagedError, match="the bytes of 'w' do not have the checksum on record"):
        wrong.check()


def test_what_passed_in_pieces_is_not_read_again() -> None:
    right, below = checked(zlib.crc32(DATA[100:500]))
    for offset in (400, 100, 200, 300):
        buffer = bytearray(100)
        right.readinto(offset, memoryview(buffer))
        assert buffer == DATA[offset : offset + 100]
    below.made.clear()
    right.check()
    assert below.made == []


def test_without_a_checksum_nothing_is_checked() -> None:
    free, below = checked(None)
    free.read(100, 50)
    free.check()
    assert below.made == [(100, 50)]
    assert not free.is_checked


def test_an_output_made_of_a_part_is_refused_where_the_rest_is_damaged(tmp_path: Path) -> None:
    for crc, result in ((zlib.crc32(DATA[100:500]), "checked"), (7, None)):
        source, _ = checked(crc)
        if result is None:
            with pytest.raises(DamagedError), Place(tmp_path / "out").publish(force=True) as sink:
                sink.copy(Span(source, 100, 50))
        else:
            with Place(tmp_path / "out").publish() as sink:
                sink.copy(Span(source, 100, 50))
            assert sink.result == result
    assert (tmp_path / "out").read_bytes() == DATA[100:150]
