"""The table of layouts: which of them are asked about a folder, and which about a document.

Bytes do not tell a layout, so a document is asked: what it was read from says which layouts it may
be a part of, and those look at its neighbours. Only files that are no document by themselves are
told by their names. A module is imported when it is asked.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing import Protocol

    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Document

    class Layout(Protocol):
        """What a module of a layout offers."""

        def of_folder(self, folder: Place, reading: Reading) -> Document | None:
            """The document in a folder; None where it is not of this layout."""

        def of_file(self, document: Document, place: Place, reading: Reading) -> Document | None:
            """The document of which the one at `place` is a part; None where it is of none."""

        def of_piece(self, place: Place, reading: Reading) -> Document | None:
            """The document of which a file holds pieces that cannot be read by themselves."""


FOLDERS = (
    "dcp",
    "dcp_safetensors",
    "shards",
    "unpacked",
    "rank_files",
    "tensor_parallel",
    "one_below",
)
"""The modules that read folders, in the order in which they are asked."""

FILES = {
    "shard index": ("shards",),
    "plain pickle": ("dcp",),
    "safetensors": ("dcp_safetensors",),
    "torch zip": ("rank_files", "tensor_parallel"),
    "torch legacy": ("tensor_parallel",),
}
"""By the container of a document: the modules of which it may be a part."""


PIECES = {".distcp": "dcp"}
"""By the extension of a file that cannot be read by itself: the module that knows what it is of."""


def _module(name: str) -> Layout:
    return cast("Layout", import_module(f"ckptfix.layouts.{name}"))


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder, by the first layout that finds one; None where none does."""
    found = (_module(name).of_folder(folder, reading) for name in FOLDERS)
    return next((document for document in found if document is not None), None)


def of_piece(place: Place, reading: Reading) -> Document | None:
    """The document of which a file holds pieces; None for a file that can be read by itself."""
    name = PIECES.get(os.path.splitext(place.base)[1])
    return None if name is None else _module(name).of_piece(place, reading)


def of_file(document: Document, place: Place, reading: Reading) -> Document:
    """The document of which the one at `place` is a part or an index; itself where it is neither.

    Raises `ReadError` and its kin where what belongs to it is not there, or does not fit.
    """
    layouts = FILES.get(document.container, ())
    found = (_module(name).of_file(document, place, reading) for name in layouts)
    return next((whole for whole in found if whole is not None), document)
