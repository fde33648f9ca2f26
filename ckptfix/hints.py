"""Commands that can be run as they stand."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING

from ckptfix.formats.containers import EXTENSIONS

if TYPE_CHECKING:
    from ckptfix.tree.document import Document


def command(verb: str, document: Document, suffix: str, *options: str) -> str:
    """A command that can be run as it stands: `ckptfix VERB IN OUT`, OUT named after IN."""
    source = PurePath(document.name)
    target = argument(_beside(document, suffix)) + ("/" if is_sharded(document) else "")
    return shlex.join(["ckptfix", verb, *options, argument(source), target])


def _beside(document: Document, suffix: str) -> PurePath:
    """A path for what is made of a document: beside it, and where it is sharded a folder."""
    source = PurePath(document.name)
    if is_sharded(document):
        folder = source.parent if source.name.endswith(".index.json") else source
        plain = folder.name.strip(".") != ""
        return folder.with_name(f"{folder.name}.{suffix}") if plain else folder / ".." / suffix
    extension = source.suffix if source.suffix.lower() in EXTENSIONS else ".pt"
    if document.container == "safetensors":
        extension = ".safetensors"
    name = f"{source.stem}.{suffix}{extension}"
    return source.with_name(name) if source.name else PurePath("..", f"{suffix}{extension}")


def is_sharded(document: Document) -> bool:
    """Whether a document was read from a folder of shards."""
    return document.container.startswith("sharded")


def argument(path: PurePath) -> str:
    """A path as an argument: one that begins with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
