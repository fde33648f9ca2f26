"""Save what can be saved from a checkpoint that is cut short or damaged.

Every storage whose bytes are whole is kept; where the container has checksums, whole means that the
checksum is right. A tensor that lies in a lost storage is taken out of its mapping, or leaves None
in a list, and is named. What is saved without checksums may be wrong, and is said to be unchecked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptfix import door
from ckptfix.edit.counting import distinct, held
from ckptfix.errors import DamagedError
from ckptfix.formats import several
from ckptfix.formats.zip.recovery import is_right
from ckptfix.tree.document import Document, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import children, walk
from ckptfix.words import plural

if TYPE_CHECKING:
    import os

    from ckptfix.formats.reading import Salvage


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was saved, and what was not."""

    document: Document
    lost: list[str]
    """Paths of the tensors whose bytes are not there or are wrong."""
    steps: list[str]
    """What had to be done to read the file, in order."""

    @property
    def saved(self) -> int:
        """How many tensors were saved."""
        return held(self.document).tensors

    @property
    def unchecked(self) -> int:
        """How many of them lie in storages without a checksum."""
        spans = (tensor.storage.spans for tensor in distinct(self.document.root))
        return sum(any(span.crc is None for span in each) for each in spans)


def recover(path: str | os.PathLike[str], archive: int | None = None) -> Recovered:
    """Read what is whole in a damaged file, or in the files of a folder of shards.

    Of several saves in one file, `archive` says which, counted from 1: they are never mixed. Raises
    `ReadError` where not even the names of the tensors can be read, and where there are several.
    """
    document, found = door.salvage(path, archive)
    if archive is None:
        several.refuse(document)
    found.steps += [note.message for note in document.notes if note.code == "trailing-bytes"]
    if found.lost:
        what = plural(len(found.lost), "storage")
        found.steps.append(f"found {what} cut off, absent or with a wrong checksum")
    return _without(document, found)


# --- what is left


def _without(document: Document, found: Salvage) -> Recovered:
    gone = {id(storage) for storage in found.lost}
    names, whole = list(found.absent), False
    for path, node in walk(document.root):
        if isinstance(node, Tensor):
            if id(node.storage) in gone:
                names.append("/".join(part for part in path if part != "<args>"))
            else:
                whole = True
    if names and not whole:
        raise DamagedError(f"none of its {len(names)} tensors is whole", where=document.name)
    root = _pruned(document.root, gone)
    extras = {name: span for name, span in document.extras.items() if is_right(span)}
    made = replace(document, root=root, extras=extras)
    return Recovered(made, names, found.steps)


def _pruned(root: Node, gone: set[int]) -> Node:
    """A tree without the tensors of lost storages: mappings lose their keys, rows keep a None."""

    def change(node: Node) -> Node:
        if isinstance(node, dict):
            kept = {key: value for key, value in node.items() if not _is_lost(value, gone)}
            if len(kept) < len(node):
                attributes = node.attributes if isinstance(node, OrderedMap) else None
                return OrderedMap(kept, attributes) if isinstance(node, OrderedMap) else kept
        return None if _is_lost(node, gone) else node

    return rebuild(root, change)


def _is_lost(node: Node, gone: set[int]) -> bool:
    """Whether a node is a tensor of a lost storage, or cannot be built without one."""
    if isinstance(node, Tensor):
        return id(node.storage) in gone
    if isinstance(node, Storage):
        return id(node) in gone
    if isinstance(node, Inert) and isinstance(node.args, tuple):
        return any(_is_lost(child, gone) for _, child in children(node.args))
    return False
