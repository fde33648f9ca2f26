"""Where bytes lie: sources (a file, bytes in memory, bytes that are made when asked for) and spans.

Weights never pass through here on the usual way: writers hand a span's descriptor to the kernel
(`files.Sink.copy`). Reading through a span is for headers, pickles and computed tensors.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import DamagedError, ReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

CHUNK = 1 << 20
"""Bytes that are held in memory at once where bytes have to pass through it."""


class Source(ABC):
    """Bytes that can be read by offset. `name` is what messages call it."""

    name: str
    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `DamagedError` where the source is shorter."""

    def fileno(self) -> int | None:
        """A descriptor that the kernel can copy from, or None."""
        return None


class FileSource(Source):
    """A regular file, opened at the first use and closed with the object."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = os.fspath(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ReadError(f"{self.name}: {_reason(error)}", hint=_hint(self.path)) from None
        stat = os.fstat(self._descriptor)
        self.size = stat.st_size
        self.identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel and for memory maps."""
        return self._descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, without moving a shared file position."""
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


class InflatedSource(Source):
    """A deflated stretch of another source, unpacked into an unnamed file at the first use.

    `size` is what the container promises; one byte more or fewer is refused, so a bomb costs no
    more than it declares. `wbits` is zlib's: -15 for a zip member, 31 for a gzip file.
    """

    def __init__(self, packed: Span, size: int, wbits: int = -15) -> None:
        self._packed = packed
        self._wbits = wbits
        self.name = packed.source.name
        self.size = size

    @cached_property
    def _file(self) -> BinaryIO:
        unpacked = tempfile.TemporaryFile(prefix="ckptfix-", buffering=0)  # noqa: SIM115
        for chunk in self._inflate():
            unpacked.write(chunk)
        return unpacked

    def _inflate(self) -> Iterator[bytes]:
        engine, made = zlib.decompressobj(self._wbits), 0
        for packed in self._packed.chunks():
            pending = packed
            while pending and not engine.eof:
                try:
                    chunk = engine.decompress(pending, CHUNK)
                except zlib.error as error:
                    raise DamagedError(f"{self.name}: deflated data is damaged ({error})") from None
                made += len(chunk)
                if made > self.size:
                    break
                pending = engine.unconsumed_tail
                yield chunk
        if made != self.size:
            raise DamagedError(f"{self.name}: deflated data does not unpack to {self.size} bytes")

    def fileno(self) -> int:
        """The descriptor of the unpacked bytes."""
        return self._file.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` of the unpacked bytes from `offset`."""
        return _read_exactly(self._file.fileno(), offset, length, self.name)

    def __del__(self) -> None:
        if "_file" in vars(self):
            self._file.close()


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
        """The bytes of the span, `size` at a time; a source without a file gives them at once."""
        if self.source.fileno() is None:
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


def _read_exactly(descriptor: int, offset: int, length: int, name: str) -> bytes:
    data = _pread(descriptor, length, offset)
    while len(data) < length:  # a signal, or Linux's cap of 2 GiB a call
        more = _pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise _too_short(name, offset, length)
        data += more
    return data


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    try:
        if hasattr(os, "pread"):
            return os.pread(descriptor, length, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)
    except OSError as error:
        raise ReadError(f"cannot read: {_reason(error)}") from None


def _too_short(name: str, offset: int, length: int) -> DamagedError:
    return DamagedError(
        f"{name}: ends before byte {offset + length} (wanted {length} bytes at {offset})",
        hint="the file is cut short: copy or download it again",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _hint(path: Path) -> str | None:
    if path.is_dir():
        return None
    parent = path.parent
    if not path.exists() and parent.is_dir():
        return f"see what is there: ls {parent}"
    return None
