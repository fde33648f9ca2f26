"""Checkpoints that an object keeps as bytes: skorch pickles what torch would save of a model so.

They are values of the document like any other: no edit reaches into them. They can be taken out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.bytes.source import BytesSource
from ckptfix.errors import ReadError
from ckptfix.formats import torch_legacy, torch_zip
from ckptfix.tree.walk import packed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.tree.document import Document


def places(document: Document) -> Iterator[tuple[str, Document]]:
    """The checkpoints that a document keeps as bytes, each with its path."""
    for path, value in packed_bytes(document.root):
        found = _read(document, value)
        if found is not None:
            yield "/".join(path), found


def taken(document: Document, select: str | None) -> tuple[Document, str | None]:
    """The checkpoint in the bytes that `select` leads to, and what it selects there."""
    if select is not None:
        wanted = select.strip("/")
        for path, found in places(document):
            if wanted == path:
                return found, None
            if wanted.startswith(f"{path}/"):
                return found, wanted[len(path) + 1 :]
    return document, select


def _read(document: Document, value: bytes) -> Document | None:
    source = BytesSource(bytes(value), document.name)
    if torch_zip.recognises(source):
        read = torch_zip.read
    elif torch_legacy.recognises(source):
        read = torch_legacy.read
    else:
        return None
    try:
        return replace(read(source, document.limits), name=document.name)
    except ReadError:
        return None
