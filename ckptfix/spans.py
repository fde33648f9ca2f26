"""Where bytes lie: sources (a file, bytes in memory, bytes that are made when asked for) and spans.

Weights never pass through here on the usual way: writers hand a span's descriptor to the kernel
(`files.Sink.copy`). Reading through a span is for headers, pickles and computed tensors.
"""

from __future__ import annotations

import io
import os
import shlex
import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.errors import DamagedError, ReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

CHUNK = 1 << 20
"""Bytes that are held in memory at once where bytes have to pass through it."""

_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not stop us


class Source(ABC):
    """Bytes that can be read by offset. `name` is what messages call it."""

    name: str
    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `DamagedError` where the source is shorter."""

    def head(self, length: int = 4096) -> bytes:
        """The first bytes, which tell what a file is; fewer where the source is shorter."""
        return self.read(0, min(self.size, length))

    def fileno(self) -> int | None:
        """A descriptor that the kernel can copy from, or None."""
        return None


class Reader(io.RawIOBase):
    """A source as a file object, for libraries that read one."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, and return the new position."""
        base = (0, self._position, self._source.size)[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the source goes."""
        length = max(min(len(buffer), self._source.size - self._position), 0)
        buffer[:length] = self._source.read(self._position, length) if length else b""
        self._position += length
        return length


class FileSource(Source):
    """A regular file, opened at the first use and closed with the object."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            self._descriptor = os.open(self.name, os.O_RDONLY | _FLAGS)
        except OSError as error:
            raise ReadError(f"{self.name}: {_reason(error)}", hint=_hint(self.name)) from None
        stat = os.fstat(self._descriptor)
        if not S_ISREG(stat.st_mode):
            raise ReadError(f"{self.name}: is no regular file", hint="save it as a file first")
        self.size = stat.st_size
        self.identity = self.identify(stat)

    @staticmethod
    def identify(stat: os.stat_result) -> tuple[int, int, int, int]:
        """Changes where a file is replaced or written to."""
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel and for memory maps."""
        return self._descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, without moving a shared file position."""
        if offset + length > self.size:  # before memory is taken for what is not there
            raise _too_short(self.name, offset, length)
        return _read_exactly(self._descriptor, offset, length, self.name)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class BytesSource(Source):
    """Bytes in memory, such as a checkpoint that was pickled inside a checkpoint."""

    def __init__(self, data: bytes, name: str = "<bytes>") -> None:
        self._data = data
        self.name = name
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset + length > self.size:
            raise _too_short(self.name, offset, length)
        return self._data[offset : offset + length]


class ComputedSource(Source):
    """Bytes that are made when they are read and dropped at once: one cast or gathered tensor."""

    def __init__(self, size: int, compute: Callable[[], bytes], name: str) -> None:
        self._compute = compute
        self.name = name
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; the whole is computed at each call."""
        data = self._compute()
        if len(data) != self.size:
            raise DamagedError(f"{self.name}: {len(data)} bytes were made instead of {self.size}")
        return data if length == self.size else data[offset : offset + length]


class ReadAhead:
    """Small reads that mostly follow one another, served from pieces of `size` bytes."""

    def __init__(self, source: Source, size: int) -> None:
        self.source = source
        self._size = size
        self._start = 0
        self.piece = b""
        """The bytes read last."""

    def seek(self, offset: int, length: int) -> int:
        """Where in `piece` the bytes from `offset` begin, once `length` of them are there."""
        begin = offset - self._start
        if begin >= 0 and begin + length <= len(self.piece):
            return begin
        rest = self.source.size - offset
        self.piece = self.source.read(offset, max(min(self._size, rest), length))
        self._start = offset
        return 0

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `DamagedError` where the source is shorter."""
        begin = self.seek(offset, length)
        return self.piece[begin : begin + length]


class UnpackedSource(Source):
    """Bytes that have to be unpacked, into an unnamed file, at the first use."""

    def __init__(self, chunks: Callable[[], Iterator[bytes]], size: int, name: str) -> None:
        self._chunks = chunks
        self.name = name
        self.size = size

    @cached_property
    def _file(self) -> BinaryIO:
        import tempfile

        try:
            unpacked = tempfile.TemporaryFile(prefix="ckptfix-")  # noqa: SIM115
            try:
                for chunk in self._chunks():
                    unpacked.write(chunk)
                unpacked.flush()
            except BaseException:
                with suppress(OSError):
                    unpacked.close()
                raise
        except OSError as error:
            raise ReadError(
                f"{self.name}: cannot be unpacked into a temporary file: {_reason(error)}",
                hint='unpack it in this folder instead: export TMPDIR="$PWD"',
            ) from None
        return unpacked

    def fileno(self) -> int:
        """The descriptor of the unpacked bytes."""
        return self._file.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` of the unpacked bytes from `offset`."""
        if offset + length > self.size:
            raise _too_short(self.name, offset, length)
        return _read_exactly(self._file.fileno(), offset, length, self.name)

    def __del__(self) -> None:
        if "_file" in vars(self):
            self._file.close()


class InflatedSource(UnpackedSource):
    """A deflated stretch of another source.

    `size` is what the container promises; one byte more or fewer is refused, so a bomb costs no
    more than it declares.
    """

    def __init__(self, packed: Span, size: int) -> None:
        super().__init__(self._inflate, size, packed.source.name)
        self._packed = packed

    def _inflate(self) -> Iterator[bytes]:
        made = 0
        for chunk in inflate(self._packed, -15):
            made += len(chunk)
            if made > self.size:
                break
            yield chunk
        if made != self.size:
            raise DamagedError(f"{self.name}: deflated data does not unpack to {self.size} bytes")


def inflate(packed: Span, wbits: int) -> Iterator[bytes]:
    """What a span unpacks to, in pieces; `wbits` is zlib's: -15 for zip members, 31 for gzip."""
    engine, started = zlib.decompressobj(wbits), False
    for pending in packed.chunks():
        chunk = b""
        while pending or (len(chunk) == CHUNK and not engine.eof):  # zlib may hold some back
            if engine.eof:  # gzip files may be joined
                engine = zlib.decompressobj(wbits)
            started = True
            try:
                chunk = engine.decompress(pending, CHUNK)
            except zlib.error as error:
                name = packed.source.name
                raise DamagedError(f"{name}: compressed data is damaged ({error})") from None
            yield chunk
            pending = engine.unused_data if engine.eof else engine.unconsumed_tail
            if engine.eof and wbits < 0:
                return
    if started and not engine.eof:
        raise DamagedError(f"{packed.source.name}: compressed data is cut short")


def swap_bytes(data: bytearray, word: int) -> None:
    """Turn round the bytes of each number of `word` bytes, in place."""
    for byte in range(word // 2):
        other = word - 1 - byte
        data[byte::word], data[other::word] = data[other::word], data[byte::word]


class Span(NamedTuple):
    """`length` bytes of `source` from `offset`; `crc` is the CRC-32 on record, if any."""

    source: Source
    offset: int
    length: int
    crc: int | None = None

    def read(self) -> bytes:
        """All bytes of the span."""
        return self.source.read(self.offset, self.length)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The bytes of the span, `size` at a time; computed ones all at once."""
        if isinstance(self.source, ComputedSource):
            size = max(self.length, 1)
        for start in range(0, self.length, size):
            yield self.source.read(self.offset + start, min(size, self.length - start))

    def unchecked(self) -> Span:
        """The same bytes without a CRC, for containers that were saved without them."""
        return Span(self.source, self.offset, self.length)

    def slice(self, offset: int, length: int) -> Span:
        """A stretch of this span; the CRC is kept only for the whole."""
        if offset == 0 and length == self.length:
            return self
        return Span(self.source, self.offset + offset, length)


def cut(spans: Iterable[Span], offset: int, length: int) -> tuple[Span, ...]:
    """The spans of `length` bytes from `offset` on, as counted over all of `spans`."""
    found: list[Span] = []
    for span in spans:
        begin, end = max(offset, 0), min(offset + length, span.length)
        if begin < end:
            found.append(span.slice(begin, end - begin))
        offset -= span.length
    return tuple(found)


def _read_exactly(descriptor: int, offset: int, length: int, name: str) -> bytes:
    data = _pread(descriptor, length, offset, name)
    while len(data) < length:  # a signal, or Linux's cap of 2 GiB a call
        more = _pread(descriptor, length - len(data), offset + len(data), name)
        if not more:
            raise _too_short(name, offset, length)
        data += more
    return data


def _pread(descriptor: int, length: int, offset: int, name: str) -> bytes:
    try:
        if hasattr(os, "pread"):
            return os.pread(descriptor, length, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)
    except OSError as error:
        raise ReadError(f"{name}: cannot be read: {_reason(error)}") from None


def _too_short(name: str, offset: int, length: int) -> DamagedError:
    return DamagedError(
        f"{name}: ends before byte {offset + length} (wanted {length} bytes at {offset})",
        hint="the file is cut short: copy or download it again",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _hint(path: str) -> str | None:
    folder = os.path.dirname(path) or "."
    if not os.path.exists(path) and os.path.isdir(folder):
        return f"see what is there: ls {shlex.quote(folder)}"
    return None
