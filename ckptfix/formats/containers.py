"""The containers that ckptfix writes, and which of them an output path asks for.

The modules that write them stand here by name, and are imported when one of them writes.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

    from ckptfix.bytes.copy import Sink
    from ckptfix.tree.document import Document


class Writable(NamedTuple):
    """A container that ckptfix writes."""

    name: str
    extensions: tuple[str, ...]
    tensors_only: bool
    """Whether it holds one state dict of dense tensors and nothing else."""
    module: str

    def write(self, document: Document, sink: Sink) -> None:
        """Write a document to a file of its own."""
        self._module().write(document, sink)

    def difference(self, document: Document, found: Document) -> str | None:
        """Where what was read back differs from what was written, or None."""
        place: str | None = self._module().difference(document, found)
        return place

    def _module(self) -> ModuleType:
        return importlib.import_module(f"ckptfix.formats.{self.module}")


TORCH_ZIP = Writable("torch zip", (".pt", ".pth", ".bin", ".ckpt"), False, "torch_zip")
SAFETENSORS = Writable("safetensors", (".safetensors",), True, "safetensors")
WRITABLE = (TORCH_ZIP, SAFETENSORS)
FOLDER = Writable("safetensors folder", (), True, "safetensors")
"""A folder of safetensors files: what stands here is for one of them."""
EXTENSIONS = tuple(extension for container in WRITABLE for extension in container.extensions)

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one shard of a folder, as huggingface_hub has it."""


def writable(path: str | os.PathLike[str]) -> Writable:
    """The container that an output path asks for: by its extension, or as a folder."""
    if is_folder(path):
        return FOLDER
    extension = os.path.splitext(path)[1].lower()
    for container in WRITABLE:
        if extension in container.extensions:
            return container
    raise UnsupportedError(
        f"{path}: no container has the extension {extension!r}",
        hint=f"end the name with one of {', '.join(EXTENSIONS)}, or with / for a folder of shards",
        code="extension",
    )


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an output path means a folder: one that is there, or a name that ends in a slash."""
    return os.path.isdir(path) or os.fspath(path).endswith(("/", os.sep))
