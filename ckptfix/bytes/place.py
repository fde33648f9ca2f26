"""Places: where a checkpoint lies or is to lie. Today all are paths of the local file system.

Above this room nobody asks the system whether a file is there, what a folder holds, or opens one: a
place says what is there and what is beside it, opens a source of bytes, and publishes an output.
Another kind of place, such as a URL, would answer the same questions.

A file is published whole or not at all: it is written beside its final place under a temporary
name, synced, read back by whoever wrote it, and then renamed over the old one; the folder is synced
last. Until the rename the old file is untouched, and whatever goes wrong, the temporary file is
removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from ckptfix.bytes import journal
from ckptfix.bytes.copy import Sink
from ckptfix.bytes.source import FileSource
from ckptfix.bytes.sync import try_to_sync_folder
from ckptfix.errors import CkptfixError, OutputExistsError, ReadError, WriteError
from ckptfix.hints import Command, Hint, shell
from ckptfix.words import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[int], None]


class Place:
    """A path: `name` is what the user called it, and what messages call it."""

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self.name = os.fspath(name)

    def __str__(self) -> str:
        return self.name

    # --- what is there

    @property
    def is_folder(self) -> bool:
        """Whether a folder is there; links are followed."""
        return os.path.isdir(self.name)

    @property
    def is_file(self) -> bool:
        """Whether a regular file is there; links are followed."""
        return os.path.isfile(self.name)

    @property
    def exists(self) -> bool:
        """Whether anything is there; links are followed."""
        return os.path.exists(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that is there. Raises `OSError` where there is none."""
        return os.path.getsize(self.name)

    @property
    def base(self) -> str:
        """The last component of its name."""
        return os.path.basename(self.name)

    @property
    def folder(self) -> Place:
        """The folder in which it stands; `.` for a bare name."""
        return Place(os.path.dirname(_without_slash(self.name)) or ".")

    @property
    def resolved(self) -> str:
        """Its name from the root of the file system, without links."""
        return os.path.realpath(self.name)

    def below(self, name: str) -> Place:
        """What has that name in this folder; names of folders in it may lead there."""
        return Place(os.path.join(self.name, name))

    def names(self) -> list[str]:
        """What this folder holds, sorted. Raises `ReadError`."""
        try:
            return sorted(os.listdir(self.name))
        except OSError as error:
            raise ReadError(reason(error), where=self.name) from None

    def files(self) -> Iterator[str]:
        """Every file in this folder and in those below it, by its path from here, with slashes."""
        for folder, below, names in os.walk(self.name):
            below.sort()
            within = os.path.relpath(folder, self.name)
            for name in sorted(names):
                yield (name if within == "." else os.path.join(within, name)).replace(os.sep, "/")

    def is_same(self, other: Place) -> bool:
        """Whether both are there, and are one file or one folder, whatever they are called."""
        try:
            return os.path.samefile(self.name, other.name)
        except OSError:
            return False

    @property
    def is_link(self) -> bool:
        """Whether this is a symbolic link."""
        return os.path.islink(_without_slash(self.name))

    @property
    def leads_elsewhere(self) -> bool:
        """Whether this is a symbolic link to a file in another folder, as in the Hub's cache."""
        if not self.is_link:
            return False
        return Place(self.resolved).folder.resolved != self.folder.resolved

    def is_below(self, folder: Place) -> bool:
        """Whether this lies in a folder, or in one below it, wherever links lead."""
        return self.resolved.startswith(os.path.join(folder.resolved, ""))

    def twins(self) -> list[str]:
        """The other names in its folder that this file has."""
        beside = (self.folder.below(name) for name in self.folder.names() if name != self.base)
        return [other.base for other in beside if other.is_same(self) and not other.is_link]

    def open(self) -> FileSource:
        """The bytes of this file. Where an edit of it was interrupted, that is undone before.

        Raises `ReadError` where it is not there or is not a regular file.
        """
        undone = journal.recover(self.name)
        return FileSource(self.name, undone)

    # --- what may be put there

    def check_free(self, *, force: bool) -> None:
        """Refuse early what could not be published later. Raises `WriteError`."""
        final = Place(os.path.realpath(self.name))
        if self.leads_elsewhere:
            raise WriteError(
                f"is a link to {final}, which others may use under its own name",
                where=self.name,
                hint=Hint("give another name for OUT, or remove the link", _removal(self.name)),
                code="link",
            )
        if final.is_folder or self.name.endswith(("/", os.sep)):
            hint = f"give the name of a file: {unused(os.path.join(self.name, 'out'), '.pt')}"
            raise WriteError("is a folder", where=self.name, hint=hint)
        self.check_folder(final.folder)
        if final.exists and not final.is_file:
            raise WriteError("is not a regular file", where=self.name)
        if final.exists and not force:
            raise OutputExistsError(where=self.name)

    def check_folder(self, folder: Place | None = None) -> None:
        """Refuse a place whose folder is not there. Raises `WriteError`."""
        folder = folder or self.folder
        if not folder.is_folder:
            raise WriteError(
                f"the folder {folder} does not exist",
                where=self.name,
                hint=Hint("make it first", shell("mkdir", "-p", files=[folder.name])),
            )

    @contextlib.contextmanager
    def publish(
        self,
        *,
        force: bool = False,
        progress: Progress | None = None,
        check: Callable[[Place], None] | None = None,
        verify: bool = False,
    ) -> Iterator[Sink]:
        """A sink whose contents become this file, whole or not at all.

        `check` is called with the place of the temporary file once it is on the disk, and stops
        everything by raising; with `verify` all its bytes are read back before. A symbolic link is
        followed. An existing file keeps its mode; without `force` it is an error
        (`OutputExistsError`), also where it appears in the meantime. Raises `WriteError`.
        """
        final = os.path.realpath(self.name)
        self.check_free(force=force)
        if force:
            journal.recover(self.name)  # or a journal of the old file would lie beside the new one
        descriptor, temporary = self._create_beside(final)
        try:
            try:
                sink = Sink(descriptor, self.name, progress, verify=verify)
                with contextlib.closing(sink):
                    yield sink
                    sink.sync()
                    sink.verify()
                _copy_mode(final, descriptor)
            finally:
                os.close(descriptor)
            if check is not None:
                check(Place(temporary))
            self._give_name(temporary, final, force)
        except OSError as error:
            raise self.error(error) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        try_to_sync_folder(os.path.dirname(final))

    def _create_beside(self, final: str) -> tuple[int, str]:
        folder, name = os.path.split(final)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        for _ in range(100):
            temporary = os.path.join(folder, f".{name[:40]}.{os.urandom(4).hex()}.tmp")
            try:
                return os.open(temporary, flags, 0o666), temporary
            except FileExistsError:
                continue
            except OSError as error:
                raise self.error(error) from None
        raise WriteError("no name is free for a temporary file beside it", where=self.name)

    def _give_name(self, temporary: str, final: str, force: bool) -> None:
        """Give the finished file its name: in place of an old one only where that was asked for."""
        if not force:
            try:
                os.link(temporary, final)
            except FileExistsError:
                raise OutputExistsError(where=self.name) from None
            except OSError:  # a file system without hard links
                self.check_free(force=False)
            else:
                return
        os.replace(temporary, final)

    def make_folder(self) -> bool:
        """Make this folder where it is not there; whether it was made. Raises `WriteError`."""
        if self.is_folder:
            return False
        try:
            os.mkdir(self.name)
        except FileExistsError:  # another process was faster
            return False
        except OSError as error:
            raise self.error(error) from None
        self.folder.sync()
        return True

    def remove(self) -> None:
        """Remove this file. Raises `WriteError`."""
        try:
            os.unlink(self.name)
        except OSError as error:
            raise self.error(error) from None

    def remove_folder(self) -> None:
        """Remove this folder, which is empty. Raises `WriteError`."""
        try:
            os.rmdir(self.name)
        except OSError as error:
            raise self.error(error) from None

    def sync(self) -> None:
        """Make what was done to the names in this folder last, where the system can."""
        try_to_sync_folder(self.name)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """No other process that asks for it writes into this folder meanwhile.

        Raises `BusyError` at once where another one does.
        """
        return journal.alone_in(self.name)

    def error(self, error: OSError) -> CkptfixError:
        """What the system says of this place, which cannot be written."""
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shell("df", "-h", files=[self.folder.name])
            hint = Hint("nothing was written; see what is free", free)
        if error.errno in (errno.EACCES, errno.EPERM):
            allow = shell("chmod", "u+w", files=[self.folder.name])
            hint = Hint("its folder has to be writable, or give OUT in another", allow)
        if error.errno == errno.EROFS:
            hint = Hint("give OUT in another place: this file system cannot be written to")
        return WriteError(f"cannot be written: {reason(error)}", where=self.name, hint=hint)


def unused(stem: str, extension: str) -> str:
    """A name for an output that a hint tells: the stem, or `stem-2`, …, where nothing is yet.

    In the current folder, where that of the stem cannot be written to.
    """
    folder, base = os.path.split(stem)
    if os.path.isdir(folder) and not os.access(folder, os.W_OK):
        stem = base
    number, name = 1, stem + extension
    while os.path.lexists(_without_slash(name)):
        number += 1
        name = f"{stem}-{number}{extension}"
    return name


def _removal(path: str) -> Command:
    return shell("rm", files=[path])


def _without_slash(path: str) -> str:
    """A path of which the system says what is there, be it a folder or not."""
    return path.rstrip("/" + os.sep) or "/"


def _copy_mode(final: str, descriptor: int) -> None:
    if os.path.exists(final) and hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(os.stat(final).st_mode))
