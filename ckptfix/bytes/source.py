"""Where bytes come from: a file, memory, or a computation that makes them when asked for.

Weights never pass through here on the usual way: writers hand a span's descriptor to the kernel
(`copy.Sink.copy`). Reading through a source is for headers, pickles and computed tensors.
"""

from __future__ import annotations

import io
import os
import shlex
from abc import ABC, abstractmethod
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from ckptfix.errors import DamagedError, ReadError

if TYPE_CHECKING:
    from collections.abc import Callable

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
            raise ReadError(f"{self.name}: {reason(error)}", hint=_hint(self.name)) from None
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
            raise too_short(self.name, offset, length)
        return read_exactly(self._descriptor, offset, length, self.name)

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
            raise too_short(self.name, offset, length)
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


def read_exactly(descriptor: int, offset: int, length: int, name: str) -> bytes:
    """Exactly `length` bytes of an open file from `offset`. Raises `ReadError` and its kin."""
    data = _pread(descriptor, length, offset, name)
    while len(data) < length:  # a signal, or Linux's cap of 2 GiB a call
        more = _pread(descriptor, length - len(data), offset + len(data), name)
        if not more:
            raise too_short(name, offset, length)
        data += more
    return data


def _pread(descriptor: int, length: int, offset: int, name: str) -> bytes:
    try:
        if hasattr(os, "pread"):
            return os.pread(descriptor, length, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)
    except OSError as error:
        raise ReadError(f"{name}: cannot be read: {reason(error)}") from None


def too_short(name: str, offset: int, length: int) -> DamagedError:
    """The error for a source that ends before the bytes that were asked for."""
    return DamagedError(
        f"{name}: ends before byte {offset + length} (wanted {length} bytes at {offset})",
        hint="the file is cut short: copy or download it again",
    )


def reason(error: OSError) -> str:
    """What the system says, as the end of a message."""
    return (error.strerror or str(error)).lower()


def _hint(path: str) -> str | None:
    folder = os.path.dirname(path) or "."
    if not os.path.exists(path) and os.path.isdir(folder):
        return f"see what is there: ls {shlex.quote(folder)}"
    return None
