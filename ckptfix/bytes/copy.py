"""A file being written: bytes copied inside the kernel, and checksums computed beside that."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from isal import isal_zlib

from ckptfix.bytes.source import CHUNK, ReadAhead
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import ThreadPoolExecutor

    Progress = Callable[[int], None]
    Sum = Callable[[], int]

_COPY = 64 << 20
"""Bytes that the kernel is asked to copy at once: small enough for progress to be seen."""

_SMALL, _AHEAD = 1 << 12, 1 << 14
"""Spans so small are copied faster here than by the kernel, and read so many bytes at a time."""

_NO_KERNEL_COPY = {
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
}


class Sink:
    """A file being written in order. Everything that writers need, and nothing that reads."""

    def __init__(self, descriptor: int, name: str, progress: Progress | None = None) -> None:
        self._descriptor = descriptor
        self._name = name
        self._progress = progress
        self._buffer = bytearray()
        self._flushed = 0
        self._kernel_copy = hasattr(os, "copy_file_range")
        self._sums = _Sums()
        self._ahead: ReadAhead | None = None
        self._checks: list[tuple[str, Span, Sum]] = []

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._flushed + len(self._buffer)

    def write(self, data: bytes) -> None:
        """Write bytes at the end."""
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            self.flush()

    def patch(self, offset: int, data: bytes) -> None:
        """Write bytes over earlier ones."""
        self.flush()
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        _write_all(self._descriptor, data)
        os.lseek(self._descriptor, self._flushed, os.SEEK_SET)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._buffer:
            _write_all(self._descriptor, self._buffer)
            self._flushed += len(self._buffer)
            self._buffer = bytearray()

    def copy(self, part: Span | bytes) -> None:
        """Copy a span to the end; inside the kernel where it lies in a file."""
        if isinstance(part, bytes):
            self.write(part)
            return
        source, offset, length, _ = part
        descriptor = source.fileno()
        if length <= _SMALL and descriptor is not None:
            if self._ahead is None or self._ahead.source is not source:
                self._ahead = ReadAhead(source, _AHEAD)
            self.write(self._ahead.read(offset, length))
            self._advance(length)
            return
        done = self._copy_in_kernel(descriptor, part) if descriptor is not None else 0
        if done < part.length:
            for chunk in part.slice(done, part.length - done).chunks():
                self.write(chunk)
                self._advance(len(chunk))

    def copy_summed(self, parts: Sequence[Span | bytes]) -> Sum:
        """Copy spans to the end; the CRC-32 of all their bytes is computed beside that."""
        spans = [part for part in parts if isinstance(part, Span)]
        if all(span.source.fileno() is not None for span in spans) and len(spans) == len(parts):
            total = self._sums.of(spans)
            for span in spans:
                self.copy(span)
            return total
        crc = 0
        for part in parts:
            for chunk in (part,) if isinstance(part, bytes) else part.chunks():
                self.write(chunk)
                crc = isal_zlib.crc32(chunk, crc)
                self._advance(len(chunk))
        return lambda: crc

    def check(self, span: Span, label: str) -> None:
        """Hold a span against the CRC on record, beside the copying; `sync` tells, by raising."""
        if span.crc is not None:
            self._checks.append((label, span, self._sums.of([span])))

    def _copy_in_kernel(self, descriptor: int, span: Span) -> int:
        """Bytes copied before the end of the span, or before the system said it cannot."""
        self.flush()
        start, done = span.source.begin + span.offset, 0
        while self._kernel_copy and done < span.length:
            wanted = min(_COPY, span.length - done)
            try:
                copied = os.copy_file_range(descriptor, self._descriptor, wanted, start + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
                break
            if not copied:
                raise DamagedError("became shorter while it was read", where=span.source.name)
            done += copied
            self._flushed += copied
            self._advance(copied)
        return done

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count)

    def sync(self) -> None:
        """Return once everything written is on the disk and everything checked is right."""
        for label, span, total in self._checks:
            if total() != span.crc:
                raise _wrong_sum(label, span)
        self.flush()
        os.fsync(self._descriptor)


class _Sums:
    """CRCs of spans: short ones at once, long ones on a thread beside the copying."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def of(self, spans: Sequence[Span]) -> Sum:
        if sum(span.length for span in spans) < CHUNK:
            total = crc32_of(spans)
            return lambda: total
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(1)
        return self._pool.submit(crc32_of, spans).result


def crc32_of(parts: Sequence[Span | bytes]) -> int:
    """The CRC-32 of several stretches in a row."""
    total = 0
    for part in parts:
        total = isal_zlib.crc32(part, total) if isinstance(part, bytes) else crc32(part, total)
    return total


def check_crc(span: Span, label: str) -> None:
    """Raise `DamagedError` where the bytes of a span do not have the CRC on record."""
    if span.crc is not None and crc32(span) != span.crc:
        raise _wrong_sum(label, span)


def _wrong_sum(label: str, span: Span) -> DamagedError:
    return DamagedError(
        f"the bytes of {label} do not have the checksum on record",
        where=span.source.name,
        hint="the file is damaged: copy or download it again",
        code="crc-mismatch",
    )


def crc32(span: Span, value: int = 0) -> int:
    """The CRC-32 of a span, continuing `value`; a file is mapped rather than read into memory."""
    descriptor = span.source.fileno()
    if descriptor is None or span.length < CHUNK:
        for chunk in span.chunks():
            value = isal_zlib.crc32(chunk, value)
        return value
    begin = span.source.begin + span.offset
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    if begin + span.length > os.fstat(descriptor).st_size:
        raise DamagedError(f"ends before byte {span.offset + span.length}", where=span.source.name)
    with (
        mmap.mmap(
            descriptor, begin + span.length - start, access=mmap.ACCESS_READ, offset=start
        ) as mapped,
        memoryview(mapped) as view,
        view[begin - start :] as data,
    ):
        return isal_zlib.crc32(data, value)


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
