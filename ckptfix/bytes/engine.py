"""The one loop over bytes: blocks of a few MiB in order, looked at by workers.

Whatever looks at bytes (a checksum, a search for NaN, a cast, a comparison) is a function of one
block. Blocks are read by `pread` into a buffer of the thread that looks at them, so memory is
bounded by the threads, however large a tensor is, and nothing touches a memory map: on network file
systems maps are slow, or end the process where a file is cut short.
"""

from __future__ import annotations

import os
from _thread import _local
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from isal import isal_zlib

from ckptfix.bytes.source import BLOCK
from ckptfix.bytes.sums import joined
from ckptfix.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor
    from typing import Protocol

    from ckptfix.bytes.span import Span

    Progress = Callable[[int], None]
    Label = str | Callable[[], str]

    class Later(Protocol):
        """A CRC that may not be known yet, such as a future."""

        def done(self) -> bool:
            """Whether it is known."""

        def result(self) -> int:
            """The CRC; waits for it."""

    class HasLength(Protocol):
        """A block, or two of them side by side."""

        @property
        def length(self) -> int:
            """Bytes of it, or of either."""


_Item = TypeVar("_Item", bound="HasLength")
_Result = TypeVar("_Result")

_SMALL = 1 << 16
"""Bytes up to which handing a block to a worker takes longer than looking at it here."""

_MOST = 16
"""Workers at most: more only wait for the memory, and each holds a few blocks."""

_PENDING = 4
"""Blocks for each worker that may wait for it; what was made of them is in memory."""


def workers() -> int:
    """How many threads look at blocks: one for each core that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    return min(cores, _MOST)


# --- one block


def blocks(spans: Iterable[Span]) -> Iterator[Span]:
    """The spans in pieces of at most `BLOCK` bytes, in order."""
    for span in spans:
        if span.length <= BLOCK:
            yield span
            continue
        for start in range(0, span.length, BLOCK):
            yield span.slice(start, min(BLOCK, span.length - start))


_own = _local()


def look(block: Span, number: int = 0) -> memoryview:
    """The bytes of a block, in a buffer of this thread: they are there until it looks again.

    Whoever looks at two blocks at once looks at the other one with the `number` 1.
    """
    source, offset, length, _ = block
    if length <= _SMALL:
        return memoryview(bytearray(source.read(offset, length)))
    name = f"buffer{number}"
    buffer: bytearray | None = getattr(_own, name, None)
    if buffer is None:
        buffer = bytearray(BLOCK)
        setattr(_own, name, buffer)
    view = memoryview(buffer)[:length]
    source.readinto(offset, view)
    return view


# --- many


class Workers:
    """Threads that look at blocks, or copy them. None is started before it is needed. Close them.

    What a worker raises is raised by the next call, or by `drain`.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[int, Progress | None, Future[Any]]] = deque()

    def submit(
        self,
        work: Callable[[_Item], _Result],
        item: _Item,
        progress: Progress | None = None,
    ) -> Future[_Result]:
        """Have a worker see to a block; waits while too many blocks are waiting.

        `progress` is told the bytes of the block once that is done, by this thread.
        """
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(workers(), "ckptfix")
        most = _PENDING * workers()
        while self._pending and (len(self._pending) >= most or self._pending[0][2].done()):
            self._finish_one()
        try:
            made = self._pool.submit(work, item)
        except RuntimeError:  # no thread can be started: then there is this one
            made = _done(work, item)
        self._pending.append((item.length, progress, made))
        return made

    def drain(self) -> None:
        """Return once all is done."""
        while self._pending:
            self._finish_one()

    def _finish_one(self) -> None:
        length, progress, made = self._pending.popleft()
        made.result()
        if progress is not None:
            progress(length)

    def close(self) -> None:
        """Return once no worker does anything; what was not begun is left."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _done(work: Callable[[_Item], _Result], item: _Item) -> Future[_Result]:
    """What a worker would have made."""
    from concurrent.futures import Future

    made: Future[_Result] = Future()
    try:
        made.set_result(work(item))
    except Exception as error:  # noqa: BLE001 - raised where it is asked for, as a worker's is
        made.set_exception(error)
    return made


class _Known(Generic[_Result]):
    """A result that is there already, where a future could be."""

    def __init__(self, result: _Result) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> _Result:
        return self._result


def in_order(
    work: Callable[[_Item], _Result], among: Iterable[_Item], progress: Progress | None = None
) -> Iterator[_Result]:
    """What `work` makes of each block, in the order of the blocks. What it raises is raised here.

    `progress` is told the bytes of each block before its result is given out.
    """
    threads = Workers()
    pending: deque[tuple[int, Future[_Result] | _Known[_Result]]] = deque()
    try:
        for block in among:
            small = block.length <= _SMALL
            made = _Known(work(block)) if small else threads.submit(work, block)
            pending.append((block.length, made))
            while pending and (pending[0][1].done() or len(pending) >= _PENDING * workers()):
                yield _first(pending, progress)
        while pending:
            yield _first(pending, progress)
    finally:
        threads.close()


def _first(
    pending: deque[tuple[int, Future[_Result] | _Known[_Result]]], progress: Progress | None
) -> _Result:
    length, made = pending.popleft()
    result = made.result()
    if progress is not None:
        progress(length)
    return result


def fill(buffer: memoryview, spans: Iterable[Span]) -> None:
    """Fill a buffer with the bytes of spans in a row; several workers read what is large.

    Raises `ReadError` and its kin.
    """
    parts, begin = [], 0
    for block in blocks(spans):
        parts.append(_Part(block, buffer[begin : begin + block.length]))
        begin += block.length
    if begin <= _INLINE:
        for part in parts:
            part.read()
    else:
        for _ in in_order(_Part.read, parts):
            pass


_INLINE = 4 * BLOCK
"""Bytes up to which threads take longer to start than they save."""


class _Part(NamedTuple):
    """A block, and where it goes."""

    block: Span
    buffer: memoryview

    @property
    def length(self) -> int:
        """Bytes of it."""
        return self.block.length

    def read(self) -> None:
        """Read it to where it goes."""
        self.block.source.readinto(self.block.offset, self.buffer)


# --- checksums


class Sum:
    """The CRC-32 of bytes that pass in order; `value` waits for the workers that sum them."""

    def __init__(self, threads: Workers) -> None:
        self._threads = threads
        self._value = 0
        self._pending: deque[tuple[int, Later | Sum]] = deque()

    def add(self, span: Span) -> None:
        """Bytes of a source: read again from the system's cache, beside whatever copies them."""
        for block in blocks((span,)):
            if block.length <= _SMALL:
                self.add_data(look(block))
            else:
                self._pending.append((block.length, self._threads.submit(_crc, block)))
        while self._pending and self._pending[0][1].done():
            self._take()

    def add_data(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes in memory."""
        while self._pending:
            self._take()
        self._value = isal_zlib.crc32(data, self._value)

    def add_summed(self, crc: int, length: int) -> None:
        """Bytes whose CRC is known."""
        while self._pending:
            self._take()
        self._value = joined(self._value, crc, length)

    def add_later(self, made: Later | Sum, length: int) -> None:
        """Bytes whose CRC is not known yet."""
        self._pending.append((length, made))

    def _take(self) -> None:
        length, made = self._pending.popleft()
        crc = made.value() if isinstance(made, Sum) else made.result()
        self._value = joined(self._value, crc, length)

    def done(self) -> bool:
        """Whether `value` has nothing to wait for."""
        return all(made.done() for _, made in self._pending)

    def value(self) -> int:
        """The CRC-32 of all bytes so far. Raises `ReadError` and its kin of those not readable."""
        while self._pending:
            self._take()
        return self._value


def _crc(block: Span) -> int:
    return isal_zlib.crc32(look(block))


def crc32(parts: Sequence[Span | bytes]) -> int:
    """The CRC-32 of several stretches in a row, summed by several workers."""
    total = 0
    spans: list[Span] = []
    for part in parts:
        if isinstance(part, bytes):
            total = isal_zlib.crc32(part, _continued(total, spans))
            spans = []
        else:
            spans.append(part)
    return _continued(total, spans)


def _continued(total: int, spans: Sequence[Span]) -> int:
    if not spans:
        return total
    if sum(span.length for span in spans) <= BLOCK:
        for span in spans:
            total = isal_zlib.crc32(look(span), total)
        return total
    lengths = (block.length for block in blocks(spans))
    for length, crc in zip(lengths, in_order(_crc, blocks(spans)), strict=True):
        total = joined(total, crc, length)
    return total


def check_crc(span: Span, label: Label) -> None:
    """Raise `DamagedError` where the bytes of a span do not have the CRC on record."""
    if span.crc is not None and crc32([span]) != span.crc:
        raise wrong_sum(span, label)


def said(label: Label) -> str:
    """What messages call some bytes. To find their name may take a while, so it is done then."""
    return label if isinstance(label, str) else label()


def wrong_sum(span: Span, label: Label) -> DamagedError:
    """The error for a span whose bytes do not have the CRC on record; `label` is what it is."""
    return DamagedError(
        f"the bytes of {said(label)} do not have the checksum on record",
        where=span.source.name,
        hint="the file is damaged: copy or download it again",
        code="crc-mismatch",
    )


# --- comparisons


class Pair(NamedTuple):
    """Two stretches of one length, at most a block."""

    one: Span
    other: Span

    @property
    def length(self) -> int:
        """Bytes of either."""
        return self.one.length


def pairs(ours: Iterable[Span], theirs: Iterable[Span]) -> Iterator[Pair]:
    """Two rows of spans side by side, as far as the shorter one goes."""
    first, second = blocks(ours), blocks(theirs)
    one, other = next(first, None), next(second, None)
    while one is not None and other is not None:
        length = min(one.length, other.length)
        if length:
            yield Pair(one.slice(0, length), other.slice(0, length))
        left, right = one.length - length, other.length - length
        one = one.slice(length, left) if left else next(first, None)
        other = other.slice(length, right) if right else next(second, None)


def are_equal(ours: Sequence[Span], theirs: Sequence[Span]) -> bool:
    """Whether two rows of spans hold the same bytes; reads no further than it has to."""
    if sum(span.length for span in ours) != sum(span.length for span in theirs):
        return False
    return all(in_order(_is_equal, pairs(ours, theirs)))


def _is_equal(pair: Pair) -> bool:
    one, other = look(pair.one).obj, look(pair.other, 1)
    assert isinstance(one, bytearray)
    return one.startswith(other)  # by memcmp; views are compared byte by byte
