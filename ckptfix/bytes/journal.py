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
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.sync import sync_folder, try_to_sync_folder
from ckptfix.errors import BusyError, ReadError
from ckptfix.hints import Hint, shell
from ckptfix.words import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import BinaryIO

SUFFIX = ".ckptfix-journal"

_MAGIC = b"ckptfix journal\n"
_HEAD, _PATCH = struct.Struct("<16s2Q"), struct.Struct("<2Q")
_SUM = 16
_MOST = 64
"""Patches of a journal at most; an edit makes a handful."""
_PIECE = 1 << 20
"""Bytes of a journal that are held in memory at once."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Patch(NamedTuple):
    """Bytes to be written over others of the same number."""

    offset: int
    old: bytes
    new: bytes


class _Place(NamedTuple):
    """Where bytes of a file go, and where in its journal the old ones stand, before the new."""

    offset: int
    length: int
    at: int


def beside(path: str | os.PathLike[str]) -> str:
    """Where the journal of a file lies; symbolic links are followed."""
    return os.path.realpath(path) + SUFFIX


def is_pending(path: str | os.PathLike[str]) -> bool:
    """Whether a journal lies beside a file: an edit of it is under way, or was interrupted."""
    return os.path.lexists(beside(path))


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
        raise BusyError(path) from None
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
    try_to_sync_folder(os.path.dirname(journal))


def _encode(before: os.stat_result, patches: Sequence[Patch]) -> bytes:
    import hashlib

    parts = [_HEAD.pack(_MAGIC, before.st_size, len(patches))]
    for offset, old, new in patches:
        parts += [_PATCH.pack(offset, len(old)), old, new]
    data = b"".join(parts)
    return data + hashlib.blake2b(data, digest_size=_SUM).digest()


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
        sync_folder(os.path.dirname(journal))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(journal)
        raise


def _write(descriptor: int, offset: int, data: bytes) -> None:
    os.lseek(descriptor, offset, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _restore(descriptor: int, patches: Iterable[Patch], journal: str) -> None:
    _put_back(descriptor, patches)
    _remove(journal)


def _put_back(descriptor: int, patches: Iterable[Patch]) -> None:
    for patch in patches:
        _write(descriptor, patch.offset, patch.old)
    os.fsync(descriptor)


def _remove(journal: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal)
    try_to_sync_folder(os.path.dirname(journal))


# --- putting a file back


def recover(path: str | os.PathLike[str]) -> str | None:
    """Put a file back as it was, if an edit of it was interrupted; returns what was done, or None.

    Raises `ReadError` where it cannot be put back, or is being edited at this moment.
    """
    journal = beside(path)
    if not is_pending(path) or not os.path.isfile(path):
        return None
    try:
        with locked(path) as descriptor:
            return _roll_back(descriptor, path, journal)
    except BusyError as error:
        raise ReadError(error.what, where=error.where, hint=error.hint, code=error.code) from None
    except OSError as error:
        raise ReadError(
            f"an interrupted edit of it cannot be undone: {reason(error)}",
            where=path,
            hint=f"the old bytes are safe in {journal}: make both writable, and try again",
            code="rollback",
        ) from None


def _roll_back(descriptor: int, path: str | os.PathLike[str], journal: str) -> str | None:
    try:
        with _open(journal) as file:
            whole = _is_whole(file)
            if whole:
                _put_back(descriptor, _checked(descriptor, path, file))
    except FileNotFoundError:  # another process was faster
        return None
    _remove(journal)
    if whole:
        return f"{path}: an edit was interrupted; the file was put back as it was"
    return f"{path}: an edit was interrupted before it changed anything"


def _open(journal: str) -> BinaryIO:
    """Open a journal. It may be a stranger's: links are not followed, and pipes do not stop us."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    file = open(os.open(journal, flags), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ReadError(
            "is not a regular file, and not a journal",
            where=journal,
            hint=Hint("if you know what it is, move or remove it", shell("rm", files=[journal])),
            code="rollback",
        )
    return file


def _is_whole(file: BinaryIO) -> bool:
    """Whether a journal has a head, and ends in the checksum of what is before."""
    import hashlib

    rest = os.fstat(file.fileno()).st_size - _SUM
    if rest < _HEAD.size or _at(file, 0, len(_MAGIC)) != _MAGIC:
        return False
    file.seek(0)
    total = hashlib.blake2b(digest_size=_SUM)
    while rest and (chunk := file.read(min(rest, _PIECE))):
        total.update(chunk)
        rest -= len(chunk)
    return file.read(_SUM) == total.digest()


def _checked(descriptor: int, path: str | os.PathLike[str], file: BinaryIO) -> Iterator[Patch]:
    """The patches of a journal in pieces, once it is sure that they belong to this file."""
    places = _places(file, os.fstat(descriptor).st_size)
    if not places or not all(_fits(descriptor, piece) for piece in _pieces(file, places)):
        raise ReadError(
            "an edit was interrupted, and something else has changed the file since",
            where=path,
            hint=Hint(
                "if the file was replaced, remove what is left of the edit",
                shell("rm", files=[beside(path)]),
            ),
            code="rollback",
        )
    return _pieces(file, places)


def _places(file: BinaryIO, size: int) -> list[_Place]:
    """What a journal says of a file of that size; nothing where no edit can have left it."""
    end = os.fstat(file.fileno()).st_size - _SUM
    _, announced, count = _HEAD.unpack(_at(file, 0, _HEAD.size))
    places: list[_Place] = []
    position = _HEAD.size
    while len(places) < min(count, _MOST) and position + _PATCH.size <= end:
        offset, length = _PATCH.unpack(_at(file, position, _PATCH.size))
        position += _PATCH.size
        places.append(_Place(offset, length, position))
        position += 2 * length
    ends = [0, *(place.offset + place.length for place in sorted(places))]
    begins = [*sorted(place.offset for place in places), size]
    apart = all(end <= begin for end, begin in zip(ends, begins, strict=True))
    fits = (announced, count, end) == (size, len(places), position)
    return places if fits and apart else []


def _pieces(file: BinaryIO, places: Iterable[_Place]) -> Iterator[Patch]:
    for offset, length, at in places:
        for begin in range(0, length, _PIECE):
            old, new = (
                _at(file, start + begin, min(length - begin, _PIECE)) for start in (at, at + length)
            )
            yield Patch(offset + begin, old, new)


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


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
