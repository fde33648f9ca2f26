"""Containers: which one a file is (told by its bytes), reading it, writing it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import CkptfixError, DamagedError, ReadError, UnsupportedError, VerifyError
from ckptfix.files import replacing
from ckptfix.formats import (
    not_checkpoints,
    packed,
    plain_pickle,
    safetensors,
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
    write: Callable[[Document, Sink], None]
    difference: Callable[[Document, Document], str | None]


WRITABLE = (
    Writable(torch_zip.NAME, torch_zip.EXTENSIONS, torch_zip.write, torch_zip.difference),
    Writable(safetensors.NAME, safetensors.EXTENSIONS, safetensors.write, safetensors.difference),
)


def read(path: str | os.PathLike[str], limits: Limits = DEFAULT) -> Document:
    """Read what a file holds: its structure, not its weights. The extension plays no part.

    Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or unsupported.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path), limits)
    return read_source(FileSource(path), limits)


def _read_folder(path: Path, limits: Limits) -> Document:
    if torch_zip.is_unpacked(path):
        return torch_zip.read_folder(path, limits)
    raise ReadError(f"{path}: is a folder without a checkpoint", hint="give a file in it")


def read_source(source: Source, limits: Limits = DEFAULT) -> Document:
    """As `read`, from any source."""
    head = source.read(0, min(source.size, _HEAD))
    if head.startswith(packed.GZIP):
        return read_source(packed.unzipped(source), limits)
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


def _is_checkpoint(head: bytes) -> bool:
    return torch_tar.matches(head) or any(matches(head) for matches, _ in _READERS)


def _read_tar(source: Source, limits: Limits) -> Document:
    if torch_tar.is_checkpoint(torch_tar.members(source)):
        return torch_tar.read(source, limits)
    return read_source(packed.only_member(source, _is_checkpoint), limits)


def writable(path: str | os.PathLike[str]) -> Writable:
    """The container that the extension of an output path asks for."""
    extension = Path(path).suffix.lower()
    for container in WRITABLE:
        if extension in container.extensions:
            return container
    known = ", ".join(extension for container in WRITABLE for extension in container.extensions)
    raise UnsupportedError(
        f"{path}: no container has the extension {extension!r}",
        hint=f"end the name with one of {known}",
        code="extension",
    )


def write(
    document: Document,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a document to a file, whole or not at all, and read it back before it gets its name.

    Raises `WriteError` and its kin, `UnsupportedError` for what the container cannot hold.
    """
    container = writable(path)

    def verify(written: str) -> None:
        try:
            found = read(written)
        except CkptfixError as error:
            raise VerifyError(f"{path}: does not read back: {error}") from error
        place = container.difference(document, found)
        if place is not None:
            raise VerifyError(f"{path}: reads back differently at {place}")

    with replacing(path, force=force, progress=progress, verify=verify) as sink:
        container.write(document, sink)
