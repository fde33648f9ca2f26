"""Containers: which one a file is (told by its bytes), reading it, writing it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes import journal
from ckptfix.bytes.place import check_output as check_file
from ckptfix.bytes.place import replacing
from ckptfix.bytes.source import FileSource, Source
from ckptfix.errors import CkptfixError, DamagedError, VerifyError
from ckptfix.findings import Finding
from ckptfix.formats import torch_zip
from ckptfix.formats.containers import (
    EXTENSIONS,
    FOLDER,
    MAX_SHARD_SIZE,
    SAFETENSORS,
    TORCH_ZIP,
    Writable,
    writable,
)
from ckptfix.hints import Hint, command
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
        if error.code == DamagedError.code:
            saved = f"{os.path.splitext(path)[0]}.recovered.pt"
            save = Hint("save what is whole", command("recover", os.fspath(path), saved))
            error.suggest(save if error.hint is None else error.hint.otherwise_do(save))
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


class Output(NamedTuple):
    """Where a document is to be written, and in which container."""

    path: str
    container: Writable

    @property
    def is_folder(self) -> bool:
        """Whether it becomes a folder of shards."""
        return self.container is FOLDER

    def check(self, *, force: bool) -> None:
        """Refuse early what could not be written later. Raises `WriteError` and its kin."""
        if not self.is_folder:
            check_file(self.path, force=force)
            return
        from ckptfix.layouts import shard_writer

        shard_writer.check_output(self.path, force=force)

    def write(
        self,
        document: Document,
        *,
        force: bool = False,
        progress: Progress | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> None:
        """Write a document, whole or not at all, and read it back before it gets its name.

        A folder is written in files of at most `max_shard_size` bytes of tensors each. Raises
        `WriteError` and its kin, `UnsupportedError` for what the container cannot hold.
        """
        if self.is_folder:
            from ckptfix.layouts import shard_writer

            write_shard = partial(write, force=True, progress=progress)
            shard_writer.write(
                document,
                self.path,
                _read_shard,
                write_shard,
                max_shard_size=max_shard_size,
                force=force,
            )
            return
        path, container = self.path, self.container

        def verify(written: str) -> None:
            try:
                found = read(written)
            except CkptfixError as error:
                raise VerifyError(f"does not read back: {error}", where=path) from error
            place = container.difference(document, found)
            if place is not None:
                raise VerifyError(f"reads back differently at {place}", where=path)

        if force:
            journal.recover(path)  # or a journal of the old file would be left beside the new one
        with replacing(path, force=force, progress=progress, verify=verify) as sink:
            container.write(document, sink)


def resolve(path: str | os.PathLike[str], to: str | None = None) -> Output:
    """What an output path means: the container by its extension, or by name in `to`.

    A folder that is there, and a name that ends in a slash, mean a folder of shards. `to` is one of
    `TO`. Raises `UnsupportedError` where no container has the extension.
    """
    return Output(os.fspath(path), writable(path) if to is None else TO[to])


TO = {"torch": TORCH_ZIP, "safetensors": SAFETENSORS, "shards": FOLDER}
"""The containers that can be written, as `--to` calls them."""


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """As `Output.check`, for the container that the path asks for."""
    resolve(path).check(force=force)


def write(
    document: Document,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """As `Output.write`, in the container that the path asks for."""
    output = resolve(path)
    output.write(document, force=force, progress=progress, max_shard_size=max_shard_size)


def beside(document: Document, suffix: str) -> str:
    """A name for what is made of a document: beside it, and where it is sharded a folder."""
    source = PurePath(document.name)
    if is_sharded(document):
        folder = source.parent if source.name.endswith(".index.json") else source
        plain = folder.name.strip(".") != ""
        named = folder.with_name(f"{folder.name}.{suffix}") if plain else folder / ".." / suffix
        return f"{named}/"
    extension = source.suffix if source.suffix.lower() in EXTENSIONS else ".pt"
    if document.container == SAFETENSORS.name:
        extension = SAFETENSORS.extensions[0]
    if not source.name:
        return str(PurePath("..", f"{suffix}{extension}"))
    return str(source.with_name(f"{source.stem}.{suffix}{extension}"))


def is_sharded(document: Document) -> bool:
    """Whether a document was read from a folder of shards."""
    return document.container.startswith("sharded")
