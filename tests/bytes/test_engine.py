"""Blocks seen to by workers: in order, in bounded memory, and errors come out."""

from __future__ import annotations

import threading
import zlib
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes import engine
from ckptfix.bytes.engine import Sum, Workers, are_equal, blocks, crc32, in_order, look, pairs
from ckptfix.bytes.source import BLOCK, BytesSource
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError
from tests.helpers import Computed

DATA = bytes(range(251)) * 20_000


class Item(NamedTuple):
    """A block as far as the order is concerned."""

    number: int
    length: int = BLOCK


def whole(data: bytes) -> Span:
    return Span(BytesSource(data), 0, len(data))


def spans(data: bytes, cuts: list[int]) -> list[Span]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    source = BytesSource(data)
    return [Span(source, a, b - a) for a, b in pairwise(edges)]


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blocks_are_the_span_in_pieces_of_bounded_size(size: int) -> None:
    found = list(blocks([Span(Computed(b"", size), 7, size)]))
    assert [block.offset for block in found[1:]] == [
        block.offset + block.length for block in found[:-1]
    ]
    assert sum(block.length for block in found) == size
    assert max(block.length for block in found) <= BLOCK


def test_results_come_in_order_whichever_is_ready_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "workers", lambda: 2)
    second = threading.Event()

    def work(item: Item) -> int:
        if item.number == 0:
            assert second.wait(60)  # so there are two threads, and the second block is first
        if item.number == 1:
            second.set()
        return item.number

    items = [Item(number, BLOCK if number % 3 < 2 else 1) for number in range(40)]
    told: list[int] = []
    assert list(in_order(work, items, told.append)) == list(range(40))
    assert sum(told) == sum(item.length for item in items)


def test_no_more_blocks_are_begun_than_a_few_for_each_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "workers", lambda: 3)
    asked = 0

    def items() -> object:
        nonlocal asked
        for number in range(1000):
            asked += 1
            yield Item(number)

    results = in_order(lambda item: item.number, items())  # type: ignore[arg-type]
    assert next(results) == 0
    assert asked < 40
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckptfix")]


@pytest.mark.parametrize("length", [1, BLOCK])
@pytest.mark.parametrize("wrong", [0, 5, 29])
def test_an_error_of_a_worker_is_raised_and_nothing_goes_on(length: int, wrong: int) -> None:
    def work(item: Item) -> int:
        if item.number == wrong:
            raise DamagedError("here")
        return item.number

    seen: list[int] = []
    with pytest.raises(DamagedError, match="here"):
        seen.extend(in_order(work, [Item(number, length) for number in range(30)]))
    assert seen == list(range(len(seen)))
    assert len(seen) <= wrong


def test_two_blocks_can_be_looked_at_together() -> None:
    first, second = DATA[:100_000], DATA[7:100_007]
    one, other = look(whole(first)), look(whole(second), 1)
    assert (bytes(one), bytes(other)) == (first, second)


@given(st.lists(st.integers(0, 1 << 40), max_size=5), st.lists(st.integers(0, 1 << 40), max_size=5))
def test_rows_of_spans_are_laid_side_by_side(ours: list[int], theirs: list[int]) -> None:
    one, other = spans(DATA, ours), spans(DATA, theirs)
    side = list(pairs(one, other))
    assert all(a.offset == b.offset and a.length == b.length <= BLOCK for a, b in side)
    assert sum(pair.length for pair in side) == len(DATA)
    assert are_equal(one, other)
    assert crc32(one) == zlib.crc32(DATA)


@given(st.integers(0, len(DATA) - 1))
def test_one_other_byte_anywhere_is_seen(place: int) -> None:
    changed = bytearray(DATA)
    changed[place] ^= 1
    assert not are_equal([whole(DATA)], [whole(bytes(changed))])
    assert crc32([whole(bytes(changed))]) != zlib.crc32(DATA)


def test_a_difference_in_the_first_block_spares_most_of_the_rest() -> None:
    one = Computed(bytes(40 * BLOCK))
    other = Computed(b"x" + bytes(40 * BLOCK - 1))
    assert not are_equal([Span(one, 0, one.size)], [Span(other, 0, other.size)])
    assert len(one.made) < 40
    assert not are_equal([Span(one, 0, 1)], [Span(one, 0, 2)])


def test_a_sum_takes_bytes_spans_and_other_sums_in_order() -> None:
    workers = Workers()
    total, other = Sum(workers), Sum(workers)
    other.add(Span(BytesSource(DATA), 5, 3_000_000))
    total.add_data(b"head")
    total.add(whole(DATA))
    total.add_data(b"between")
    total.add_later(other, 3_000_000)
    total.add_summed(zlib.crc32(b"tail"), 4)
    meant = b"head" + DATA + b"between" + DATA[5:3_000_005] + b"tail"
    assert total.value() == zlib.crc32(meant)
    workers.close()


def test_what_a_worker_raises_is_raised_by_drain() -> None:
    workers = Workers()
    short = Computed(b"short", BLOCK)
    workers.submit(look, Span(short, 0, BLOCK))
    with pytest.raises(DamagedError, match="ends before"):
        workers.drain()
    workers.close()


def test_where_no_thread_can_be_started_this_one_does_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(in_order(lambda item: item.number, map(Item, range(20)))) == list(range(20))
    assert crc32([whole(DATA), whole(DATA)]) == zlib.crc32(DATA + DATA)
    short = Computed(b"short", BLOCK)
    with pytest.raises(DamagedError, match="ends before"):
        list(in_order(look, [Span(short, 0, BLOCK)] * 2))
