"""A torch zip that someone unpacked into a folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckptfix.bytes.source import FileSource
from ckptfix.bytes.span import Span
from ckptfix.formats.torch_zip import from_records
from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from ckptfix.tree.document import Document


def read_folder(folder: str, limits: Limits = DEFAULT) -> Document:
    """The document in a torch zip that someone unpacked into a folder."""
    from pathlib import Path

    path = Path(folder)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sources = {file.relative_to(path).as_posix(): FileSource(file) for file in files}
    records = {name: Span(source, 0, source.size) for name, source in sources.items()}
    size = sum(span.length for span in records.values())
    return from_records(records, folder, size, (), limits)


def is_unpacked(folder: str) -> bool:
    """Whether a folder is a torch zip that someone unpacked."""
    inside = [os.path.join(folder, name, "data.pkl") for name in os.listdir(folder)]
    return os.path.isfile(os.path.join(folder, "data.pkl")) or sum(map(os.path.isfile, inside)) == 1
