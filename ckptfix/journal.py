r"""Overwriting parts of a file so that it is never left half changed: a rollback journal.

Before a file is changed, the bytes that will be lost are written to FILE.ckptfix-journal beside
it, and both the journal and the folder are synced. Then the file is changed, synced and read back,
and the journal is removed. A journal that is found later belongs to an edit that was interrupted:
the old bytes are put back. A journal that is cut short was interrupted itself, so the file was not
yet touched. The journal:

    16 bytes   "ckptfix journal\n"
    8 bytes    size of the file, unsigned and little-endian as all numbers here
    8 bytes    number of patches
    each       8 bytes offset, 8 bytes length, the old bytes, the new bytes
    16 bytes   BLAKE2b of all before

A file belongs to a journal if it has that size and each byte in question is the old or the new
one. That holds for a copy too, and not for another file that has taken the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import ReadError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SUFFIX = ".ckptfix-journal"

listeners: list[Callable[[str], None]] = []
"""Called with a message after each rollback; the command line prints it."""

_MAGIC = b"ckptfix journal\n"
_HEAD, _PATCH = struct.Struct("<16s2Q"), struct.Struct("<2Q")
_SUM = 16
_LARGEST = 9 << 30
"""Bytes of a journal at most: two pickles as large as `limits` admits, and a little."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EACCES, errno.EBADF, errno.EOPNOTSUPP}


class Patch(NamedTuple):
    """Bytes to be written over others of the same number."""

    offset: int
    old: bytes
    new: bytes


class BusyError(WriteError):
    """Another process is changing the file."""

    code = "busy"


def beside(path: str | os.PathLike[str]) -> str:
    """Where the journal of a file lies; symbolic links are followed."""
    return os.path.realpath(path) + SUFFIX


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor to change a file through, while no other process does; OSError as `open`.

    Raises `BusyError` at once where another one does. Systems and file systems without advisory
    locks do without.
    """
    descriptor = os.open(os.path.realpath(path), os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        _lock(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """No other process that asks for it writes into a folder meanwhile; raises as `locked`.

    Systems that open no folders do without.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str | os.PathLike[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{path}: is being changed by another process", hint="try again when it is done"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


# --- changing a file


def apply(
    descriptor: int,
    path: str | os.PathLike[str],
    patches: Sequence[Patch],
    verify: Callable[[], None],
) -> None:
    """Write patches into a locked file; `verify` is called before they last, and may raise.

    Whatever goes wrong, the old bytes are put back and the error is raised. Where even that fails,
    the journal stays, and the next `recover` does it.
    """
    journal = beside(path)
    _create(journal, _encode(os.fstat(descriptor), patches), os.fstat(descriptor).st_mode)
    try:
        for patch in patches:
            _write(descriptor, patch.offset, patch.new)
        os.fsync(descriptor)
        verify()
        os.unlink(journal)  # from here on the new bytes hold
    except BaseException:
        _restore(descriptor, patches, journal)
        raise
    with contextlib.suppress(OSError):
        _sync_folder(journal)


def _encode(stat: os.stat_result, patches: Sequence[Patch]) -> bytes:
    parts = [_HEAD.pack(_MAGIC, stat.st_size, len(patches))]
    for offset, old, new in patches:
        parts += [_PATCH.pack(offset, len(old)), old, new]
    data = b"".join(parts)
    return data + _sum(data)


def _sum(data: bytes | memoryview) -> bytes:
    import hashlib

    return hashlib.blake2b(data, digest_size=_SUM).digest()


def _create(journal: str, data: bytes, mode: int) -> None:
    """Write a journal that is on the disk when this returns; or none."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(journal, flags, mode & 0o666)
    try:
        try:
            _write(descriptor, 0, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(journal)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(journal)
        raise


def _write(descriptor: int, offset: int, data: bytes) -> None:
    os.lseek(descriptor, offset, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(journal: str) -> None:
    """Make what was done to the names in its folder last, where the system can."""
    try:
        descriptor = os.open(os.path.dirname(journal), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _restore(descriptor: int, patches: Sequence[Patch], journal: str) -> None:
    for patch in patches:
        _write(descriptor, patch.offset, patch.old)
    os.fsync(descriptor)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal)
    with contextlib.suppress(OSError):
        _sync_folder(journal)


# --- putting a file back


def recover(path: str | os.PathLike[str]) -> str | None:
    """Put a file back as it was, if an edit of it was interrupted; returns what was done, or None.

    Raises `ReadError` where it cannot be put back, or is being edited at this moment.
    """
    journal = beside(path)
    if not os.path.lexists(journal) or not os.path.isfile(path):
        return None
    try:
        with locked(path) as descriptor:
            message = _roll_back(descriptor, path, journal)
    except BusyError as error:
        raise ReadError(error.message, hint=error.hint, code=error.code) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ReadError(
            f"{path}: an interrupted edit of it cannot be undone: {reason}",
            hint=f"the old bytes are safe in {journal}: make both writable, and try again",
            code="rollback",
        ) from None
    if message is not None:
        for listener in listeners:
            listener(message)
    return message


def _roll_back(descriptor: int, path: str | os.PathLike[str], journal: str) -> str | None:
    try:
        data = _read(journal)
    except FileNotFoundError:  # another process was faster
        return None
    found = _decode(data)
    if found is None:
        os.unlink(journal)
        return f"{path}: an edit was interrupted before it changed anything"
    size, patches = found
    if size != os.fstat(descriptor).st_size or not all(_fits(descriptor, p) for p in patches):
        raise ReadError(
            f"{path}: an edit was interrupted, and something else has changed the file since",
            hint=f"if the file was replaced, remove what is left of the edit: rm {journal}",
            code="rollback",
        )
    _restore(descriptor, patches, journal)
    return f"{path}: an edit was interrupted; the file was put back as it was"


def _read(journal: str) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(journal, flags), "rb") as file:
        return file.read(_LARGEST)


def _decode(data: bytes) -> tuple[int, list[Patch]] | None:
    """The size of the file and the patches; None for a journal that is not whole."""
    view = memoryview(data)
    if len(data) < _HEAD.size + _SUM or _sum(view[:-_SUM]) != data[-_SUM:]:
        return None
    _, size, count = _HEAD.unpack_from(data)
    patches, position = [], _HEAD.size
    for _ in range(count):
        offset, length = _PATCH.unpack_from(data, position)
        middle = position + _PATCH.size + length
        position = middle + length
        patches.append(Patch(offset, data[middle - length : middle], data[middle:position]))
    return size, patches


def _fits(descriptor: int, patch: Patch) -> bool:
    """Whether each byte that a patch is about is the old or the new one."""
    os.lseek(descriptor, patch.offset, os.SEEK_SET)
    found = b""
    while len(found) < len(patch.old):
        more = os.read(descriptor, len(patch.old) - len(found))
        if not more:
            return False
        found += more
    if found in (patch.old, patch.new):
        return True
    return all(byte in pair for byte, *pair in zip(found, patch.old, patch.new, strict=True))
