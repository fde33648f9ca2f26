"""The one door: from a path to a document, and from a document to a path.

A path is a file or a folder. A file is read by the format that recognises its bytes (`formats`);
what it holds may be a part of more, which a layout recognises by the document and its neighbours
(`layouts`). A folder is read by the first layout that finds a checkpoint in it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import IO, TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import Place, unused
from ckptfix.bytes.source import Source, of_object
from ckptfix.errors import ArgumentError, DamagedError, ReadError, UnsupportedError
from ckptfix.formats.reading import Reading, Salvage
from ckptfix.formats.table import (
    EXTENSIONS,
    SAFETENSORS,
    TORCH_ZIP,
    Writable,
    by_extension,
    read_place,
    split_extension,
    write_place,
)
from ckptfix.formats.table import read as read_source
from ckptfix.hints import Command, Hint, command
from ckptfix.layouts import in_pieces, split, table
from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.bytes.copy import Checked
    from ckptfix.bytes.place import Progress
    from ckptfix.tree.document import Document


# --- in


File = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""What a checkpoint is read from: a path, bytes that are one, or an open file."""


def read(given: File, limits: Limits = DEFAULT) -> Document:
    """Read what a file or a folder holds: its structure, not its weights.

    The extension plays no part. Where an edit in place was interrupted, it is undone first, and
    `notes` say so. Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or
    unsupported; `ArgumentError` for what is neither a path, nor bytes, nor an open file.
    """
    path = given if isinstance(given, (str, os.PathLike)) else of_object(given)
    if isinstance(path, Source):
        return _with(limits, read_source(path, Reading(limits)))
    if "\0" in os.fspath(path):
        raise ArgumentError("a path has a zero byte", hint="give the path of a checkpoint")
    place = Place(path)
    try:
        return _with(limits, _read(place, Reading(limits)))
    except ReadError as error:
        if not isinstance(error, UnsupportedError) and split.is_part(place):
            raise split.error(place) from error
        if isinstance(error, DamagedError) and error.code == DamagedError.code:
            error.suggest(_recovery(path, error.hint))
        raise


def _with(limits: Limits, document: Document) -> Document:
    return document if limits is DEFAULT else replace(document, limits=limits)


def _recovery(path: str | os.PathLike[str], hint: Hint | None) -> Hint:
    """The hint of an error, and that what is whole of a damaged file can be saved."""
    stem, _ = split_extension(os.fspath(path).rstrip("/"))
    saved = unused(f"{stem}.recovered", ".pt")
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
        whole = table.of_piece(place, reading)
        if whole is not None:
            return whole
        return table.of_file(read_place(place, reading), place, reading)
    document = table.of_folder(place, reading)
    if document is not None:
        return document
    from ckptfix.layouts import shards

    only = shards.only_file(place)
    if only is not None:
        return _read(only, reading)
    raise shards.missing(place, reading)


# --- out


class Around(NamedTuple):
    """What becomes of the files around a document that is written."""

    carried: list[Place]
    """Texts that go with it into a folder."""
    left_out: list[tuple[str, str]]
    """Name and kind of what stays where it is."""
    removed: list[str]
    """Files of the checkpoint that is replaced in a folder."""


class Output(NamedTuple):
    """Where a document is to be written, and in which container."""

    path: str
    container: Writable

    @property
    def is_folder(self) -> bool:
        """Whether it becomes a folder."""
        return self.container in (SHARDS, DCP)

    def check(self, *, force: bool) -> None:
        """Refuse early what could not be written later. Raises `WriteError` and its kin."""
        if not self.is_folder:
            Place(self.path).check_free(force=force)
            return
        from ckptfix.layouts import shard_writer

        shard_writer.check_free(Place(self.path), force=force)

    def around(self, document: Document, source: str) -> Around:
        """What becomes of the files around a document, read from `source`, that is written here.

        Raises `WriteError` where it is not to be written there.
        """
        if not (self.is_folder or source.endswith(".index.json") or Place(source).is_folder):
            return Around([], [], [])
        from ckptfix.layouts import companions

        found = companions.of(document, Place(source))
        left_out = [(one.base, "folder" if one.is_folder else "file") for one in found.others]
        if not self.is_folder:
            left_out += [(one.base, "file") for one in found.texts]
            return Around([], sorted(left_out), [])
        from ckptfix.layouts import shard_writer

        place = Place(self.path)
        other = [one for one in found.texts if companions.is_there(one, place)]
        left_out += [(one.base, "file: OUT has another one") for one in other]
        texts = [one for one in found.texts if not place.below(one.base).exists]
        return Around(texts, sorted(left_out), shard_writer.removed(document, place))

    def write(
        self,
        document: Document,
        *,
        force: bool = False,
        progress: Progress | None = None,
        max_shard_size: int | None = None,
        verify: bool = False,
        share: bool = True,
        texts: Iterable[Place] = (),
    ) -> Checked:
        """Write a document, whole or not at all; its names are read back before it gets its own.

        A folder is written in files of at most `max_shard_size` bytes of tensors each (5 GB if that
        is not given). With `verify` every byte is read back; without `share` the input's blocks are
        never shared. `texts` go into a folder too. Returns what is known of the bytes.
        Raises `DamagedError` where the input is damaged, `WriteError` and its kin,
        `UnsupportedError` for what the container cannot hold.
        """
        place = Place(self.path)
        try:
            if not self.is_folder:
                return write_place(
                    document,
                    place,
                    self.container,
                    force=force,
                    progress=progress,
                    verify=verify,
                    share=share,
                )
            if self.container is DCP:
                from ckptfix.layouts import dcp_writer

                return dcp_writer.write(
                    document, place, force=force, progress=progress, verify=verify, texts=texts
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
                texts=texts,
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

DCP = TORCH_ZIP._replace(name=in_pieces.DCP, extensions=())
"""A folder as torch.distributed.checkpoint writes it: what stands here is for one item."""

TO = {"torch": TORCH_ZIP, "safetensors": SAFETENSORS, "shards": SHARDS, "dcp": DCP}
"""The containers that can be written, as `--to` calls them."""


def resolve(
    path: str | os.PathLike[str], to: str | None = None, source: str | os.PathLike[str] = ""
) -> Output:
    """What an output path means: the container by its extension, or by name in `to`.

    A name that ends in a slash means a folder of shards. Into a folder that is there goes a file
    under the name of the `source`, as `cp` does it. A source that is a folder becomes a folder
    where the name has no extension, or is there. `to` is one of `TO`. Raises `UnsupportedError`
    where no container has the extension, or that name.
    """
    name, source = os.fspath(path), os.fspath(source)
    if to is not None and to not in TO:
        what = f"{to!r} is not a container that is written"
        raise UnsupportedError(what, where=name, hint=f"take one of {', '.join(TO)}", code="to")
    if to in ("shards", "dcp"):
        return Output(name, TO[to])
    if to is None and _means_shards(name, source):
        return Output(name, SHARDS)
    container = None if to is None else TO[to]
    if source and not name.endswith(_SLASHES) and Place(name).is_folder:
        name = Place(name).below(_named(Place(source), container)).name
    return Output(name, container or by_extension(name))


_SLASHES = ("/", os.sep)


def _means_shards(path: str, source: str) -> bool:
    if path.endswith(_SLASHES):
        return True
    if not source or Place(source).is_folder or source.endswith(".index.json"):
        return Place(path).is_folder or (bool(source) and not split_extension(path)[1])
    return False


def _named(source: Place, container: Writable | None) -> str:
    """The name of a source, with an extension of the container if that is known."""
    stem, extension = split_extension(source.base)
    if container is None or extension.lower() in container.extensions:
        return source.base
    return stem + container.extensions[0]


def taking(document: Document, path: str) -> Command:
    """The command that takes a checkpoint out of the bytes in which a document keeps it."""
    return command("convert", document.name, beside(document, "inner"), select=path)


def fixing_for_a_model(document: Document, select: str | None = None) -> Command:
    """The command that repairs a document for a model, which whoever runs it has to name."""
    out = beside(document, "fixed")
    return command("fix", document.name, out, model="FILE.py:NAME", select=select)


def beside(document: Document, suffix: str) -> str:
    """A free name for what is made of a document: beside it, and where it is sharded a folder."""
    from pathlib import PurePath  # which takes 3 ms, and most commands need no other name

    source = PurePath(document.name)
    stem, extension = split_extension(source.name)
    if is_sharded(document):
        folder = source.parent if source.name.endswith(".index.json") else source
        plain = folder.name.strip(".") != ""
        named = folder.with_name(f"{folder.name}.{suffix}") if plain else folder / ".." / suffix
        return unused(str(named), "/")
    if extension.lower() not in EXTENSIONS:
        extension = ".pt"
    if document.container == SAFETENSORS.name:
        extension = SAFETENSORS.extensions[0]
    if not source.name.strip("."):  # `.` has no name, `..` none that another could begin with
        return unused(str(source / ".." / suffix), extension)
    if Place(document.name).is_folder:
        stem = source.name
    return unused(str(source.with_name(f"{stem}.{suffix}")), extension)


def is_sharded(document: Document) -> bool:
    """Whether a document was read from a folder of shards."""
    return document.container.startswith("sharded")
