"""Where bytes come from: a file, memory, or a computation that makes them when asked for.

Writers hand a span's descriptor to the kernel, where it has one (`copy.Sink.copy`). Reading through
a source is for headers, pickles and computed tensors, and for whoever looks at bytes (`engine`).
"""

from __future__ import annotations

import io
import os
from _thread import allocate_lock
from abc import ABC, abstractmethod
from functools import cached_property
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from ckptfix.errors import ArgumentError, DamagedError, ReadError
from ckptfix.hints import Hint, shell
from ckptfix.words import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BLOCK = 4 << 20
"""Bytes that are looked at together: a thread holds one block or two of them."""

CHUNK = 1 << 20
"""Bytes that are gathered before they are written."""

HEAD = 1 << 12
"""The first bytes of a file, by which its format is recognised."""

_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not stop us


class Source(ABC):
    """Bytes that can be read by offset, from several threads. `name` is what messages call it.

    To read a stretch costs what the stretch has, not what the source has: one that computes its
    bytes computes those that are asked for.
    """

    name: str
    size: int
    _head: bytes | None = None

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `DamagedError` where the source is shorter."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`; raises as `read`."""
        buffer[:] = self.read(offset, len(buffer))

    def head(self, length: int = HEAD) -> bytes:
        """The first bytes, which tell what a file is: `HEAD` at most, read once."""
        if self._head is None:
            self._head = self.read(0, min(self.size, HEAD))
        return self._head[:length]

    def fileno(self) -> int | None:
        """A descriptor that the kernel can copy from, or None."""
        return None

    @property
    def begin(self) -> int:
        """Where in what `fileno` opens the bytes of this source begin."""
        return 0

    @property
    def below(self) -> Iterable[Source]:
        """The sources that this one takes its bytes from."""
        return ()

    @property
    def is_checked(self) -> bool:
        """Whether `check` holds every byte that was read against a checksum on record."""
        return False

    def check(self) -> None:  # noqa: B027
        """Raise where what was read so far cannot be what it should be: once it was copied.

        A file was changed meanwhile (`ReadError`), or bytes do not have the checksum on record
        (`DamagedError`).
        """


def everything(source: Source) -> Iterator[Source]:
    """A source and all that it takes its bytes from, each once."""
    seen: dict[int, Source] = {}  # which keeps them: another could get the identity of one
    pending = [source]
    while pending:
        one = pending.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            pending.extend(one.below)
            yield one


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
    """A regular file, looked at when this is made, opened at the first use, closed with the object.

    `undone` says that an interrupted edit of it was undone before, if one was (see `journal`).
    Raises `ReadError` where there is no such file; `begin` and `read` where it has changed since.
    """

    def __init__(self, path: str | os.PathLike[str], undone: str | None = None) -> None:
        self.name = os.fspath(path)
        self.undone = undone
        self._descriptor: int | None = None
        try:
            stat = os.stat(self.name)
        except OSError as error:
            raise ReadError(reason(error), where=self.name, hint=_hint(self.name)) from None
        if not S_ISREG(stat.st_mode):
            hint = "save it as a file first"
            raise ReadError("is not a regular file", where=self.name, hint=hint)
        self.size = stat.st_size
        self.identity = self.identify(stat)

    @staticmethod
    def identify(stat: os.stat_result) -> tuple[int, int, int, int]:
        """Changes where a file is replaced or written to."""
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    @property
    def names(self) -> int:
        """How many names (hard links) the file has."""
        return os.fstat(self.fileno()).st_nlink

    def has_changed(self, descriptor: int) -> bool:
        """Whether the file that is open there, or that has the name now, is another one.

        Raises OSError where there is none.
        """
        now = (os.fstat(descriptor), os.stat(self.name))
        return any(self.identity != self.identify(stat) for stat in now)

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel and for memory maps."""
        if self._descriptor is None:
            with _OPENING:  # or of two threads that open it at once one would leave its own open
                if self._descriptor is None:
                    self._descriptor = self._open()
        return self._descriptor

    def check(self) -> None:
        """Raise `ReadError` where the file was written to since it was looked at."""
        descriptor = self._descriptor
        if descriptor is not None and self.identify(os.fstat(descriptor)) != self.identity:
            raise ReadError("was changed while it was read", where=self.name, hint="try again")

    def _open(self) -> int:
        try:
            descriptor = os.open(self.name, os.O_RDONLY | _FLAGS)
        except OSError as error:
            raise ReadError(reason(error), where=self.name, hint=_hint(self.name)) from None
        if self.identify(os.fstat(descriptor))[:2] != self.identity[:2]:
            os.close(descriptor)
            raise ReadError("was replaced while it was read", where=self.name, hint="try again")
        return descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, without moving a shared file position."""
        if offset + length > self.size:  # before memory is taken for what is not there
            raise too_short(self.name, offset, length)
        return read_exactly(self.fileno(), offset, length, self.name)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        read_into(self.fileno(), offset, buffer, self.name)

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


_OPENING = allocate_lock()


class BytesSource(Source):
    """Bytes in memory, such as a checkpoint that was pickled inside a checkpoint."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<bytes>") -> None:
        self._data = memoryview(data)
        self.name = name
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        return bytes(self._data[offset : offset + length])


def of_object(given: Any) -> Source | str:
    """What a program holds: bytes, or an open file from where it stands on.

    A file of the system at its beginning is told by its path, so that nothing is read now. Raises
    `ArgumentError` for what is neither.
    """
    if isinstance(given, (bytes, bytearray, memoryview)):
        return BytesSource(memoryview(given).cast("B"))
    if not hasattr(given, "read"):
        raise ArgumentError(
            f"a path, bytes or an open file is wanted, not a {type(given).__name__}",
            hint="give the path of a checkpoint",
        )
    path = _path_of(given)
    if path is not None:
        return path
    try:
        data = b"" if isinstance(given, io.TextIOBase) else given.read()
    except (OSError, ValueError) as error:  # one that is closed, or not for reading
        raise ReadError(f"cannot be read: {error}", where=_name_of(given)) from None
    if isinstance(given, io.TextIOBase) or not isinstance(data, (bytes, bytearray)):
        raise ArgumentError("is open as text", where=_name_of(given), hint="open it with mode 'rb'")
    return BytesSource(data, _name_of(given))


def _name_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else f"<{type(file).__name__}>"


def _path_of(file: Any) -> str | None:
    """The path of a file that is open in binary and at its beginning, if it still has that name."""
    try:
        opened, name = os.fstat(file.fileno()), os.path.abspath(file.name)
        here = file.tell() == 0 and "b" in file.mode and S_ISREG(opened.st_mode)
        return file.name if here and os.path.samestat(opened, os.stat(name)) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


class LazySource(Source):
    """Bytes of another source, whose place in it is looked up when they are wanted.

    So a record of an archive can be described without opening the archive. `locate` returns the
    source and the offset of the first byte; it is called once, and may raise `ReadError`.
    """

    def __init__(self, size: int, locate: Callable[[], tuple[Source, int]], name: str) -> None:
        self._locate = locate
        self.name = name
        self.size = size

    @cached_property
    def _place(self) -> tuple[Source, int]:
        return self._locate()

    def fileno(self) -> int | None:
        """The descriptor of the other source."""
        return self._place[0].fileno()

    @property
    def begin(self) -> int:
        """Where in it these bytes begin."""
        source, offset = self._place
        return source.begin + offset

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        source, begin = self._place
        return source.read(begin + offset, length)

    @property
    def below(self) -> Iterable[Source]:
        """The other source."""
        return (self._place[0],)


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


def read_into(descriptor: int, offset: int, buffer: memoryview, name: str) -> None:
    """Fill a buffer from an open file, from `offset` on. Raises `ReadError` and its kin."""
    done = 0
    while done < len(buffer):
        rest = buffer[done:]
        try:
            count = _preadinto(descriptor, rest, offset + done)
        except OSError as error:
            raise ReadError(f"cannot be read: {reason(error)}", where=name) from None
        if not count:
            raise too_short(name, offset, len(buffer))
        done += count


def _preadinto(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = read_some(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def _pread(descriptor: int, length: int, offset: int, name: str) -> bytes:
    try:
        return read_some(descriptor, length, offset)
    except OSError as error:
        raise ReadError(f"cannot be read: {reason(error)}", where=name) from None


def read_some(descriptor: int, length: int, offset: int) -> bytes:
    """At most `length` bytes of an open file from `offset`, and none at its end. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _OPENING:  # one position for all threads
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def too_short(name: str, offset: int, length: int) -> DamagedError:
    """The error for a source that ends before the bytes that were asked for."""
    return DamagedError(
        f"ends before byte {offset + length} (wanted {length} bytes at {offset})",
        where=name,
        hint="the file is cut short: copy or download it again",
    )


def _hint(path: str) -> Hint | None:
    folder, name = os.path.split(path)
    if os.path.exists(path) or not os.path.isdir(folder or "."):
        return None
    import difflib

    near = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    if near:
        return Hint(f"did you mean {os.path.join(folder, near[0])}?")
    return Hint("see what is there", shell("ls", files=[folder or "."]))
