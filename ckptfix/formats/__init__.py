"""Containers: which one a file is (told by its bytes), reading it, writing it."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import journal
from ckptfix.errors import CkptfixError, DamagedError, UnsupportedError, VerifyError
from ckptfix.files import check_output as check_file
from ckptfix.files import replacing
from ckptfix.findings import Finding
from ckptfix.formats import (
    not_checkpoints,
    packed,
    plain_pickle,
    safetensors,
    sharded,
    sharding,
    torch_legacy,
    torch_tar,
    torch_zip,
)
from ckptfix.limits import DEFAULT, Limits
from ckptfix.spans import FileSource, Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfix.document import Document
    from ckptfix.files import Progress, Sink

_HEAD = 4096


class Writable(NamedTuple):
    """A container that ckptfix writes."""

    name: str
    extensions: tuple[str, ...]
    tensors_only: bool
    """Whether it holds one state dict of dense tensors and nothing else."""
    write: Callable[[Document, Sink], None]
    difference: Callable[[Document, Document], str | None]


WRITABLE = (
    Writable(torch_zip.NAME, torch_zip.EXTENSIONS, False, torch_zip.write, torch_zip.difference),
    Writable(
        safetensors.NAME, safetensors.EXTENSIONS, True, safetensors.write, safetensors.difference
    ),
)
FOLDER = Writable(sharding.NAME, (), True, safetensors.write, safetensors.difference)
"""A folder of safetensors files: what stands here is for one of them."""


def read(path: str | os.PathLike[str], limits: Limits = DEFAULT) -> Document:
    """Read what a file holds: its structure, not its weights. The extension plays no part.

    Where an edit in place of the file was interrupted, it is undone first, and `notes` say so.
    Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or unsupported.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path), limits)
    undone = journal.recover(path)
    try:
        document = _read_file(FileSource(path), limits)
    except DamagedError as error:
        if error.slug == DamagedError.code:
            saved = Path(path).with_name(f"{Path(path).stem}.recovered.pt")
            save = shlex.join(["ckptfix", "recover", str(path), str(saved)])
            error.hint = f"{error.hint}; or save what is whole: {save}"
        raise
    if undone is None:
        return document
    return replace(document, notes=(Finding("rolled-back", undone), *document.notes))


def _read_file(source: Source, limits: Limits, name: str | None = None) -> Document:
    if sharded.matches(source):
        return sharded.read(source, _read_shard, limits, name)
    return read_source(source, limits)


def _read_shard(path: str, limits: Limits) -> Document:
    journal.recover(path)
    return read_source(FileSource(path), limits)


def _read_folder(path: Path, limits: Limits) -> Document:
    found = sharded.locate(path)
    if found is not None:
        journal.recover(found)
        return _read_file(FileSource(found), limits, str(path))
    if torch_zip.is_unpacked(path):
        return torch_zip.read_folder(path, limits)
    raise sharded.missing(path)


def read_source(source: Source, limits: Limits = DEFAULT) -> Document:
    """As `read`, from any source."""
    head = source.read(0, min(source.size, _HEAD))
    if head.startswith(packed.GZIP):
        return read_source(packed.unzipped(source), packed.capped(limits, source))
    if torch_tar.matches(head):
        return _read_tar(source, limits)
    readers = [read for matches, read in _READERS if matches(head)]
    if readers:
        return readers[0](source, limits)
    if not plain_pickle.matches(source, head):
        raise not_checkpoints.explain(source, head)
    try:
        return plain_pickle.read(source, limits)
    except DamagedError:
        if head[:1] == b"\x80":
            raise
        raise not_checkpoints.explain(source, head) from None


_READERS = (
    (torch_zip.matches, torch_zip.read),
    (torch_legacy.matches, torch_legacy.read),
    (safetensors.matches, safetensors.read),
)


def is_checkpoint(head: bytes) -> bool:
    """Whether a file begins as one of torch's containers or safetensors does."""
    return torch_tar.matches(head) or any(matches(head) for matches, _ in _READERS)


def _read_tar(source: Source, limits: Limits) -> Document:
    if torch_tar.is_checkpoint(torch_tar.members(source)):
        return torch_tar.read(source, limits)
    member = packed.only_member(source, is_checkpoint)
    if torch_tar.matches(member.read(0, min(member.size, _HEAD))):
        return torch_tar.read(member, limits)  # and no other: archives could nest without end
    return read_source(member, limits)


def writable(path: str | os.PathLike[str]) -> Writable:
    """The container that an output path asks for: by its extension, or as a folder."""
    if sharding.is_folder(path):
        return FOLDER
    extension = Path(path).suffix.lower()
    for container in WRITABLE:
        if extension in container.extensions:
            return container
    known = ", ".join(extension for container in WRITABLE for extension in container.extensions)
    raise UnsupportedError(
        f"{path}: no container has the extension {extension!r}",
        hint=f"end the name with one of {known}, or with / for a folder of shards",
        code="extension",
    )


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError` and its kin."""
    check = sharding.check_output if writable(path) is FOLDER else check_file
    check(path, force=force)


def write(
    document: Document,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = sharding.MAX_SHARD_SIZE,
) -> None:
    """Write a document to a file, whole or not at all, and read it back before it gets its name.

    A folder is written in files of at most `max_shard_size` bytes of tensors each. Raises
    `WriteError` and its kin, `UnsupportedError` for what the container cannot hold.
    """
    container = writable(path)
    if container is FOLDER:
        write_shard = partial(write, force=True, progress=progress)
        sharding.write(
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
