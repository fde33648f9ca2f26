"""Containers: which one a file is (told by its bytes), reading it, writing it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import CkptfixError, ReadError, UnsupportedError, VerifyError
from ckptfix.files import replacing
from ckptfix.formats import not_checkpoints, safetensors, torch_legacy, torch_zip
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
        raise ReadError(f"{path}: is a folder", hint="give one of the files in it")
    return read_source(FileSource(path), limits)


def read_source(source: Source, limits: Limits = DEFAULT) -> Document:
    """As `read`, from any source."""
    head = source.read(0, min(source.size, _HEAD))
    if head.startswith(torch_zip.MAGIC):
        return torch_zip.read(source, limits)
    if torch_legacy.matches(head):
        return torch_legacy.read(source, limits)
    if safetensors.matches(head):
        return safetensors.read(source, limits)
    raise not_checkpoints.explain(source, head)


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
