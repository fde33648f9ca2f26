"""Sources whose bytes have to be unpacked before they can be read."""

from __future__ import annotations

import zlib
from _thread import allocate_lock
from contextlib import suppress
from typing import TYPE_CHECKING

from ckptfix.bytes.source import (
    CHUNK,
    LazySource,
    Reader,
    Source,
    read_exactly,
    read_into,
    too_short,
)
from ckptfix.errors import DamagedError, ReadError, UnsupportedError
from ckptfix.hints import Hint, shell
from ckptfix.words import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

    from ckptfix.bytes.span import Span


class UnpackedSource(Source):
    """Bytes that have to be unpacked, into an unnamed file, at the first use."""

    def __init__(
        self,
        chunks: Callable[[], Iterator[bytes]],
        size: int,
        name: str,
        below: Iterable[Source] = (),
    ) -> None:
        self._chunks = chunks
        self.name = name
        self.size = size
        self._below = below
        self._unpacked: BinaryIO | None = None
        self._lock = allocate_lock()

    @property
    def _file(self) -> BinaryIO:
        with self._lock:
            if self._unpacked is None:
                self._unpacked = self._unpack()
            return self._unpacked

    @property
    def below(self) -> Iterable[Source]:
        """What the packed bytes come from."""
        return self._below

    def _unpack(self) -> BinaryIO:
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
                f"cannot be unpacked into a temporary file: {reason(error)}",
                where=self.name,
                hint='unpack it in this folder instead: export TMPDIR="$PWD"',
            ) from None
        return unpacked

    def fileno(self) -> int:
        """The descriptor of the unpacked bytes."""
        return self._file.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` of the unpacked bytes from `offset`."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        return read_exactly(self._file.fileno(), offset, length, self.name)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the unpacked bytes from `offset`."""
        read_into(self._file.fileno(), offset, buffer, self.name)

    def __del__(self) -> None:
        if self._unpacked is not None:
            self._unpacked.close()


class InflatedSource(UnpackedSource):
    """A deflated stretch of another source.

    `size` is what the container promises; one byte more or fewer is refused, so a bomb costs no
    more than it declares.
    """

    def __init__(self, packed: Span, size: int) -> None:
        super().__init__(self._inflate, size, packed.source.name, (packed.source,))
        self._packed = packed

    def _inflate(self) -> Iterator[bytes]:
        made = 0
        for chunk in inflate(self._packed, -15):
            made += len(chunk)
            if made > self.size:
                break
            yield chunk
        if made != self.size:
            raise DamagedError(
                f"deflated data does not unpack to {self.size} bytes", where=self.name
            )


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
                raise DamagedError(f"compressed data is damaged ({error})", where=name) from None
            yield chunk
            pending = engine.unused_data if engine.eof else engine.unconsumed_tail
            if engine.eof and wbits < 0:
                return
    if started and not engine.eof:
        raise DamagedError("compressed data is cut short", where=packed.source.name)


def unzstd(packed: Span) -> Iterator[bytes]:
    """What a span of zstd unpacks to, in pieces. Raises `UnsupportedError` without `zstandard`."""
    try:
        import zstandard
    except ImportError:
        raise UnsupportedError(
            "its bytes are packed with zstd, which the package zstandard unpacks",
            hint=Hint("install it", shell("pip", "install", "zstandard")),
        ) from None
    source, offset, length, _ = packed
    part = Reader(LazySource(length, lambda: (source, offset), source.name))
    engine = zstandard.ZstdDecompressor().stream_reader(part, read_across_frames=True)
    try:
        while chunk := engine.read(CHUNK):
            yield chunk
    except zstandard.ZstdError as error:
        where = source.name
        raise DamagedError(f"compressed data is damaged ({error})", where=where) from None
