"""The one door: from a path to a document, and from a document to a path.

A path is a file or a folder. A file is read by the format that recognises its bytes (`formats`);
what it holds may be a part of more, which a layout recognises by the document and its neighbours
(`layouts`). A folder is read by the first layout that finds a checkpoint in it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.errors import DamagedError, UnsupportedError
from ckptfix.formats.reading import Reading, Salvage
from ckptfix.formats.table import (
    EXTENSIONS,
    SAFETENSORS,
    TORCH_ZIP,
    Writable,
    by_extension,
    read_place,
    write_place,
)
from ckptfix.hints import Hint, command
from ckptfix.layouts import table
from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from ckptfix.bytes.copy import Checked
    from ckptfix.bytes.place import Progress
    from ckptfix.tree.document import Document


# --- in


def read(path: str | os.PathLike[str], limits: Limits = DEFAULT) -> Document:
    """Read what a file or a folder holds: its structure, not its weights.

    The extension plays no part. Where an edit in place was interrupted, it is undone first, and
    `notes` say so. Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or
    unsupported.
    """
    try:
        return _read(Place(path), Reading(limits))
    except DamagedError as error:
        if error.code == DamagedError.code:
            error.suggest(_recovery(path, error.hint))
        raise


def _recovery(path: str | os.PathLike[str], hint: Hint | None) -> Hint:
    """The hint of an error, and that what is whole of a damaged file can be saved."""
    saved = f"{os.path.splitext(os.fspath(path).rstrip('/'))[0]}.recovered.pt"
    save = Hint("save what is whole", command("recover", os.fspath(path), saved))
    return save if hint is None else hint.otherwise_do(save)


def salvage(path: str | os.PathLike[str], archive: int | None = None) -> tuple[Document, Salvage]:
    """Read what is whole in a damaged file or folder, and what had to be done for it.

    Of several saves in one file, `archive` says which, counted from 1. Raises `ReadError` and its
    kin where not even the names of the tensors can be read, and where there are several.
    """
    found = Salvage(archive=archive)
    document = _read(Place(path), found)
    if archive is not None and not found.told_apart:
        what = f"is {document.container}, of which a file holds but one"
        raise UnsupportedError(what, where=path, hint="leave out --archive")
    return document, found


def _read(place: Place, reading: Reading) -> Document:
    if not place.is_folder:
        return table.of_file(read_place(place, reading), place, reading)
    document = table.of_folder(place, reading)
    if document is not None:
        return document
    from ckptfix.layouts import shards

    raise shards.missing(place, reading)


# --- out


class Output(NamedTuple):
    """Where a document is to be written, and in which container."""

    path: str
    container: Writable

    @property
    def is_folder(self) -> bool:
        """Whether it becomes a folder of shards."""
        return self.container is SHARDS

    def check(self, *, force: bool) -> None:
        """Refuse early what could not be written later. Raises `WriteError` and its kin."""
        if not self.is_folder:
            Place(self.path).check_free(force=force)
            return
        from ckptfix.layouts import shard_writer

        shard_writer.check_free(Place(self.path), force=force)

    def write(
        self,
        document: Document,
        *,
        force: bool = False,
        progress: Progress | None = None,
        max_shard_size: int | None = None,
        verify: bool = False,
    ) -> Checked:
        """Write a document, whole or not at all; its names are read back before it gets its own.

        A folder is written in files of at most `max_shard_size` bytes of tensors each (5 GB if that
        is not given). With `verify` every byte is read back. Returns what is known of the bytes.
        Raises `DamagedError` where the input is damaged, `WriteError` and its kin,
        `UnsupportedError` for what the container cannot hold.
        """
        place = Place(self.path)
        try:
            if not self.is_folder:
                return write_place(
                    document, place, self.container, force=force, progress=progress, verify=verify
                )
            from ckptfix.layouts import shard_writer

            size = max_shard_size or shard_writer.MAX_SHARD_SIZE
            return shard_writer.write(
                document,
                place,
                force=force,
                progress=progress,
                max_shard_size=size,
                verify=verify,
            )
        except DamagedError as error:
            raise error.suggest(_recovery(document.name, error.hint)) from None


def write(
    document: Document,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int | None = None,
    verify: bool = False,
) -> Checked:
    """As `Output.write`, in the container that the path asks for."""
    return resolve(path).write(
        document,
        force=force,
        progress=progress,
        max_shard_size=max_shard_size,
        verify=verify,
    )


SHARDS = SAFETENSORS._replace(name="safetensors folder", extensions=())
"""A folder of safetensors files: what stands here is for one of them."""

TO = {"torch": TORCH_ZIP, "safetensors": SAFETENSORS, "shards": SHARDS}
"""The containers that can be written, as `--to` calls them."""


def resolve(path: str | os.PathLike[str], to: str | None = None) -> Output:
    """What an output path means: the container by its extension, or by name in `to`.

    A folder that is there, and a name that ends in a slash, mean a folder of shards. `to` is one of
    `TO`. Raises `UnsupportedError` where no container has the extension, or that name.
    """
    name = os.fspath(path)
    if to is not None and to not in TO:
        what = f"{to!r} is not a container that is written"
        raise UnsupportedError(what, where=name, hint=f"take one of {', '.join(TO)}", code="to")
    if to is not None:
        return Output(name, TO[to])
    return Output(name, SHARDS if is_folder(name) else by_extension(name))


def is_folder(path: str) -> bool:
    """Whether an output path means a folder: one that is there, or a name that ends in a slash."""
    return path.endswith(("/", os.sep)) or Place(path).is_folder


def beside(document: Document, suffix: str) -> str:
    """A name for what is made of a document: beside it, and where it is sharded a folder."""
    from pathlib import PurePath  # which takes 3 ms, and most commands need no other name

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
