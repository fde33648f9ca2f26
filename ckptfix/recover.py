"""Save what can be saved from a checkpoint that is cut short or damaged.

Every storage whose bytes are whole is kept; where the container has checksums, whole means that the
checksum is right. A tensor that lies in a lost storage is taken out of its mapping, or leaves None
in a list, and is named. What is saved without checksums may be wrong, and is said to be unchecked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptfix.document import Document, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.errors import DamagedError, ReadError, UnsupportedError
from ckptfix.files import check_crc
from ckptfix.formats import safetensors, torch_legacy, torch_zip, zip_recovery, zips
from ckptfix.spans import FileSource
from ckptfix.trees import children, rebuild, storages, walk

if TYPE_CHECKING:
    from ckptfix.spans import Span


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was saved, and what was not."""

    document: Document
    lost: list[str]
    """Paths of the tensors whose bytes are not there or are wrong."""
    saved: int
    """How many tensors were saved."""
    unchecked: int
    """How many of them lie in storages without a checksum."""
    steps: list[str]
    """What had to be done to read the file, in order."""


def recover(path: str | os.PathLike[str]) -> Recovered:
    """Read what is whole in a damaged file.

    Raises `ReadError` where not even the names of the tensors can be read.
    """
    if os.path.isdir(path):
        raise UnsupportedError(
            f"{path}: is a folder, and only single files can be recovered",
            hint=f"recover its files one by one; see what is there: ls {path}",
        )
    source = FileSource(path)
    head = source.read(0, min(source.size, 4096))
    lost: list[Storage] = []
    steps: list[str] = []
    if torch_zip.matches(head):
        document = _read_zip(source, lost, steps)
    elif torch_legacy.matches(head):
        document = torch_legacy.read(source, lost=lost)
    elif safetensors.matches(head):
        document = safetensors.read(source, lost=lost)
    else:
        raise UnsupportedError(
            f"{path}: only torch's containers and safetensors can be recovered",
            hint=f"see what it is: ckptfix inspect {path}",
        )
    if lost:
        steps.append(f"found {len(lost)} storages cut off or absent")
    _check(document, lost, steps)
    return _without(document, lost, steps)


def _read_zip(source: FileSource, lost: list[Storage], steps: list[str]) -> Document:
    try:
        archive = zips.read(source)
        records = {name: archive.span(name) for name in archive.records}
    except ReadError as error:
        steps.append(f"the archive cannot be read as it is ({error.message})")
        records = zip_recovery.scan(source)
        steps.append(f"found {len(records)} whole records by their headers")
    if not any(name.rpartition("/")[2] == "data.pkl" for name in records):
        raise DamagedError(
            f"{source.name}: the record that names the tensors (data.pkl) is lost",
            hint="nothing can be recovered from it; look for another copy",
        )
    if not any(span.crc for span in records.values() if span.length):
        records = {name: span.unchecked() for name, span in records.items()}
    return torch_zip.from_records(records, source.name, source.size, lost=lost)


def _check(document: Document, lost: list[Storage], steps: list[str]) -> None:
    """Move storages to `lost` whose bytes do not have the checksum on record."""
    gone = {id(storage) for storage in lost}
    wrong = [
        storage
        for storage in storages(document.root)
        if id(storage) not in gone and not all(map(_is_right, storage.spans))
    ]
    lost += wrong
    if wrong:
        steps.append(f"found {len(wrong)} storages with wrong checksums")


def _is_right(span: Span) -> bool:
    try:
        check_crc(span, "")
    except ReadError:
        return False
    return True


def _without(document: Document, lost: list[Storage], steps: list[str]) -> Recovered:
    gone = {id(storage) for storage in lost}
    names, whole, unchecked = [], 0, 0
    for path, node in walk(document.root):
        if isinstance(node, Tensor):
            if id(node.storage) in gone:
                names.append("/".join(part for part in path if part != "<args>"))
            else:
                whole += 1
                unchecked += any(span.crc is None for span in node.storage.spans)
    if names and not whole:
        raise DamagedError(f"{document.name}: none of its {len(names)} tensors is whole")
    root = _pruned(document.root, gone)
    extras = {name: span for name, span in document.extras.items() if _is_right(span)}
    made = replace(document, root=root, extras=extras)
    return Recovered(made, names, whole, unchecked, steps)


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
