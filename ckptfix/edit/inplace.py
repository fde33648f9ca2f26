"""Editing a checkpoint in place: its pickle or header is rewritten inside the file.

The weights are not touched, so a large file takes as long as a small one. The file is changed under
a rollback journal (see `journal`): killed at any moment or out of disk, it is the old file or the
edited one, if need be after the next command that opens it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfix.bytes import journal
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource
from ckptfix.errors import CkptfixError, InPlaceError, VerifyError, WriteError
from ckptfix.formats import patches
from ckptfix.formats.reading import Reading
from ckptfix.formats.table import file_of, read
from ckptfix.hints import Hint, command, shell
from ckptfix.tree import compare, walk
from ckptfix.words import listed, reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.bytes.journal import Patch
    from ckptfix.tree.document import Document, Storage


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit of a file that can be made in place, and is not made yet."""

    document: Document
    source: FileSource
    patches: list[Patch]
    storages: list[Storage]
    """Those of the document, in the order of the tree."""

    @property
    def nbytes(self) -> int:
        """Bytes of the file that would be overwritten."""
        return sum(len(patch.new) for patch in self.patches)


def prepare(document: Document) -> Edit:
    """How the file that a document was read from becomes that document; nothing is written.

    Raises:
        InPlaceError: a copy has to be written instead; the message says why.
    """
    storages = list(walk.storages(document.root))
    source = file_of(document, storages)
    if source.names > 1:
        others = Place(source.name).twins()
        names = listed(others) or "hard links in other folders"
        why = "it has several names (hard links: cp -l, or timm's last and best), and all of them"
        raise InPlaceError(document.name, f"{why} would change: {names} too")
    if Place(source.name).leads_elsewhere:
        why = f"it is a link to {Place(source.name).resolved}, which others may use under its name"
        raise InPlaceError(document.name, why)
    return Edit(document, source, patches.make(document, source, storages), storages)


def apply(edit: Edit) -> None:
    """Make an edit, read the file back, and undo the edit where it is not what was meant.

    Raises:
        BusyError: another process is changing the file.
        WriteError: the file cannot be changed, or was changed since it was read; it is as it was.
        VerifyError: the file did not read back as it should; it was put back as it was.
    """
    path = edit.source.name
    try:
        with journal.locked(path) as descriptor:
            _check_unchanged(edit, descriptor)
            if edit.patches:
                journal.apply(descriptor, path, edit.patches, lambda: _verify(edit))
    except OSError as error:
        raise _error(edit, error) from None


def _check_unchanged(edit: Edit, descriptor: int) -> None:
    """The file is the one that was read, and nobody has changed it before it was locked."""
    if edit.source.has_changed(descriptor):
        raise WriteError(
            "was changed after it was read",
            where=edit.source.name,
            hint="try again",
            code="changed",
        )


def _verify(edit: Edit) -> None:
    path, document = edit.source.name, edit.document
    try:
        found = read(FileSource(path), Reading(document.limits))
    except CkptfixError as error:
        raise VerifyError(f"does not read back: {error}; it was put back", where=path) from error
    place = compare.difference(document.root, found.root)
    if place is not None or list(document.extras) != list(found.extras):
        place = place or "its further records"
    elif _places(edit.storages) != _places(walk.storages(found.root)):
        place = "the places of its tensors"
    if place is not None:
        raise VerifyError(f"reads back differently at {place}; it was put back", where=path)


def _places(storages: Iterable[Storage]) -> list[tuple[int, int]]:
    return [(span.offset, span.length) for storage in storages for span in storage.spans]


def _error(edit: Edit, error: OSError) -> WriteError:
    path = edit.source.name
    return WriteError(
        f"cannot be changed in place: {reason(error)}", where=path, hint=_hint(path, error)
    )


def _hint(path: str, error: OSError) -> Hint | None:
    """What helps; first of all that the journal puts back what was half done."""
    folder = Place(Place(path).resolved).folder.name
    if journal.is_pending(path):
        return Hint("it is put back by the next command that opens it", command("inspect", path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Hint("see what is free", shell("df", "-h", files=[folder]))
    if error.errno in (errno.EACCES, errno.EPERM):
        text = "the file and its folder have to be writable"
        return Hint(text, shell("chmod", "u+w", files=[path, folder]))
    return None
