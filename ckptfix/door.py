"""Containers: which one a file is (told by its bytes), reading it, writing it."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckptfix.bytes import journal
from ckptfix.bytes.place import check_output as check_file
from ckptfix.bytes.place import replacing
from ckptfix.bytes.source import FileSource, Source
from ckptfix.errors import CkptfixError, DamagedError, VerifyError
from ckptfix.findings import Finding
from ckptfix.formats import torch_zip
from ckptfix.formats.containers import FOLDER, MAX_SHARD_SIZE, writable
from ckptfix.layouts import unpacked
from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from ckptfix.bytes.copy import Progress
    from ckptfix.tree.document import Document


def read(path: str | os.PathLike[str], limits: Limits = DEFAULT) -> Document:
    """Read what a file holds: its structure, not its weights. The extension plays no part.

    Where an edit in place of the file was interrupted, it is undone first, and `notes` say so.
    Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or unsupported.
    """
    if os.path.isdir(path):
        return _read_folder(os.fspath(path), limits)
    undone = journal.recover(path)
    try:
        document = _read_file(FileSource(path), limits)
    except DamagedError as error:
        if error.slug == DamagedError.code:
            saved = f"{os.path.splitext(path)[0]}.recovered.pt"
            save = shlex.join(["ckptfix", "recover", os.fspath(path), saved])
            error.hint = f"{error.hint}; or save what is whole: {save}"
        raise
    if undone is None:
        return document
    return replace(document, notes=(Finding("rolled-back", undone), *document.notes))


def _read_file(source: Source, limits: Limits, name: str | None = None) -> Document:
    if not _is_zip(source):
        from ckptfix.layouts import shards

        if shards.matches(source):
            return shards.read(source, _read_shard, limits, name)
    return read_source(source, limits)


def _read_shard(path: str, limits: Limits) -> Document:
    journal.recover(path)
    return read_source(FileSource(path), limits)


def _read_folder(path: str, limits: Limits) -> Document:
    from ckptfix.layouts import shards

    found = shards.locate(path)
    if found is not None:
        journal.recover(found)
        return _read_file(FileSource(found), limits, path)
    if unpacked.is_unpacked(path):
        return unpacked.read_folder(path, limits)
    raise shards.missing(path)


def read_source(source: Source, limits: Limits = DEFAULT) -> Document:
    """As `read`, from any source."""
    if _is_zip(source):
        return torch_zip.read(source, limits)
    from ckptfix.formats import sniffing

    return sniffing.read(source, limits, read_source)


def _is_zip(source: Source) -> bool:
    return torch_zip.matches(source.head(len(torch_zip.MAGIC)))


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError` and its kin."""
    if writable(path) is not FOLDER:
        check_file(path, force=force)
        return
    from ckptfix.layouts import shard_writer

    shard_writer.check_output(path, force=force)


def write(
    document: Document,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a document to a file, whole or not at all, and read it back before it gets its name.

    A folder is written in files of at most `max_shard_size` bytes of tensors each. Raises
    `WriteError` and its kin, `UnsupportedError` for what the container cannot hold.
    """
    container = writable(path)
    if container is FOLDER:
        from ckptfix.layouts import shard_writer

        write_shard = partial(write, force=True, progress=progress)
        shard_writer.write(
            document, path, _read_shard, write_shard, max_shard_size=max_shard_size, force=force
        )
        return

    def verify(written: str) -> None:
        try:
            found = read(written)
        except CkptfixError as error:
            raise VerifyError(f"{path}: does not read back: {error}") from error
        place = container.difference(document, found)
        if place is not None:
            raise VerifyError(f"{path}: reads back differently at {place}")

    if force:
        journal.recover(path)  # or a journal of the old file would be left beside the new one
    with replacing(path, force=force, progress=progress, verify=verify) as sink:
        container.write(document, sink)
