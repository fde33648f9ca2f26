"""A file that is there whole or not at all.

A new file is written beside its final place under a temporary name, synced, read back by whoever
wrote it, and then renamed over the old one; the folder is synced last. Until the rename the old
file is untouched, and whatever goes wrong, the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
from typing import TYPE_CHECKING

from ckptfix.bytes.copy import Sink
from ckptfix.errors import CkptfixError, OutputExistsError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[int], None]
    Sum = Callable[[], int]


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    verify: Callable[[str], None] | None = None,
) -> Iterator[Sink]:
    """A sink whose contents become `path`, whole or not at all.

    `verify` is called with the temporary file's path once it is on the disk, and stops everything
    by raising. A symbolic link is followed. An existing file keeps its mode; without `force` it
    is an error (`OutputExistsError`), also where it appears in the meantime. Raises `WriteError`.
    """
    target = os.path.realpath(path)
    check_output(path, force=force)
    descriptor, temporary = _create_beside(target, path)
    try:
        try:
            sink = Sink(descriptor, os.fspath(path), progress)
            yield sink
            sink.sync()
            _copy_mode(target, descriptor)
        finally:
            os.close(descriptor)
        if verify is not None:
            verify(temporary)
        _publish(temporary, target, path, force)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync_folder(os.path.dirname(target))


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError`."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        inside = os.path.join(path, "out.pt")
        raise WriteError(f"{path}: is a folder", hint=f"give a file name: {inside}")
    check_folder(path, folder)
    if os.path.exists(target) and not os.path.isfile(target):
        raise WriteError(f"{path}: is no regular file")
    if os.path.exists(target) and not force:
        raise OutputExistsError(where=path)


def check_folder(path: str | os.PathLike[str], folder: str) -> None:
    """Refuse a path whose folder is not there. Raises `WriteError`."""
    if not os.path.isdir(folder):
        raise WriteError(
            f"{path}: the folder {folder} does not exist",
            hint=f"make it first: mkdir -p {shlex.quote(folder)}",
        )


def _create_beside(target: str, path: str | os.PathLike[str]) -> tuple[int, str]:
    folder, name = os.path.split(target)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for _ in range(100):
        temporary = os.path.join(folder, f".{name[:40]}.{os.urandom(4).hex()}.tmp")
        try:
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(path, error) from None
    raise WriteError(f"{path}: no name is free for a temporary file beside it")


def _copy_mode(target: str, descriptor: int) -> None:
    if os.path.exists(target) and hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))


def _publish(temporary: str, target: str, path: str | os.PathLike[str], force: bool) -> None:
    """Give the finished file its name: in place of an old one only where that was asked for."""
    if not force:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise OutputExistsError(where=path) from None
        except OSError:  # a file system without hard links
            check_output(path, force=False)
        else:
            return
    os.replace(temporary, target)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename last; systems that cannot sync a folder do without."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def folder_of(path: str | os.PathLike[str]) -> str:
    """The folder in which a path stands; `.` for a bare name."""
    return os.path.dirname(without_slash(path)) or "."


def without_slash(path: str | os.PathLike[str]) -> str:
    """A path of which the system says what is there, be it a folder or not."""
    return os.fspath(path).rstrip("/" + os.sep) or "/"


def write_error(path: str | os.PathLike[str], error: OSError) -> CkptfixError:
    """What the system says of a path that cannot be written."""
    reason = (error.strerror or str(error)).lower()
    hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = f"nothing was written; see what is free: df -h {shlex.quote(folder_of(path))}"
    return WriteError(f"{path}: cannot be written: {reason}", hint=hint)
