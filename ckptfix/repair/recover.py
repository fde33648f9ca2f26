"""Save what can be saved from a checkpoint that is cut short or damaged.

Every storage whose bytes are whole is kept; where the container has checksums, whole means that the
checksum is right. A tensor that lies in a lost storage is taken out of its mapping, or leaves None
in a list, and is named. What is saved without checksums may be wrong, and is said to be unchecked.

A zip says where its records are, and what their checksums are, twice: in front of or behind each
of them, and in its directory. The one that fits the bytes counts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptfix.bytes.source import FileSource
from ckptfix.bytes.unpacked import UnpackedSource
from ckptfix.errors import DamagedError, ReadError, UnsupportedError
from ckptfix.formats import (
    packed,
    plain_pickle,
    safetensors,
    sniffing,
    torch_legacy,
    torch_tar,
    torch_zip,
)
from ckptfix.formats.containers import EXTENSIONS
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip import recovery as zip_recovery
from ckptfix.layouts import shards
from ckptfix.limits import DEFAULT
from ckptfix.tree.document import Document, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import children, walk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.bytes.span import Span

_Source = FileSource | UnpackedSource


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
    """Read what is whole in a damaged file, or in the files of a folder of shards.

    Raises `ReadError` where not even the names of the tensors can be read.
    """
    lost: list[Storage] = []
    steps: list[str] = []
    if os.path.isdir(path):
        document, absent = _read_folder(Path(path), lost, steps)
    else:
        document, absent = _read_file(path, lost, steps), []
    if lost:
        what = "1 storage" if len(lost) == 1 else f"{len(lost)} storages"
        steps.append(f"found {what} cut off, absent or with a wrong checksum")
    return _without(document, lost, absent, steps)


def _read_file(path: str | os.PathLike[str], lost: list[Storage], steps: list[str]) -> Document:
    return _read(_unpacked(FileSource(path), steps), lost, steps)


def _unpacked(source: _Source, steps: list[str]) -> _Source:
    """What a file holds: itself, or what is packed in gzip or tar as far as that is whole."""
    head = source.head()
    if head.startswith(packed.GZIP):
        try:
            found = packed.unzipped(source)
            steps.append(f"unpacked {found.size} bytes of gzip")
        except DamagedError as error:
            found = packed.salvaged(source)
            steps.append(f"unpacked {found.size} bytes of gzip, and {error.message}")
        source, head = found, found.head()
    if not torch_tar.matches(head):
        return source
    members = torch_tar.members_there(source)
    inside = packed.first_member(members, sniffing.is_checkpoint)
    return source if torch_tar.is_checkpoint(members) or inside is None else inside


def _read(source: _Source, lost: list[Storage], steps: list[str]) -> Document:
    head = source.head()
    if torch_legacy.matches(head):
        return torch_legacy.read(source, lost=lost)
    if safetensors.matches(head):
        return safetensors.read(source, lost=lost)
    if torch_tar.matches(head):
        return torch_tar.read(source, lost=lost)
    if torch_zip.matches(head) or zip_recovery.listed(source):
        return _read_zip(source, lost, steps)
    if plain_pickle.matches(source, head):
        return plain_pickle.read(source)
    raise UnsupportedError(
        f"{source.name}: is no checkpoint, or its beginning is lost",
        hint=f"see what it is: ckptfix inspect {source.name}",
    )


# --- folders


def _read_folder(folder: Path, lost: list[Storage], steps: list[str]) -> tuple[Document, list[str]]:
    """What the shards in a folder hold, and the keys that the index puts elsewhere."""
    weight_map = _weight_map(folder, steps)
    files = dict.fromkeys(weight_map.values()) or shards.names_in(folder)
    found: dict[str, Document] = {}
    for name in files:
        if not weight_map and not name.endswith(EXTENSIONS):
            continue
        try:
            document = _read_file(folder / name, lost, steps)
        except ReadError as error:
            steps.append(f"a shard is lost ({error.message})")
            continue
        if isinstance(document.root, dict):
            found[name] = document
    if not found:
        raise UnsupportedError(
            f"{folder}: is a folder in which no shard can be read",
            hint=f"recover its files one by one; see what is there: ls {folder}",
        )
    every = {key: node for document in found.values() for key, node in document.root.items()}
    order = [key for key in weight_map if key in every]
    root = OrderedMap({**{key: every[key] for key in order}, **every})
    document = replace(next(iter(found.values())), root=root, name=str(folder))
    return document, [key for key in weight_map if key not in every]


def _weight_map(folder: Path, steps: list[str]) -> Mapping[str, str]:
    """Key to shard as the index has it; empty where that cannot be read."""
    try:
        path = shards.locate(folder)
        if path is None or os.path.basename(path) == shards.WHOLE:
            return {}
        return shards.parse(FileSource(path), DEFAULT).weight_map
    except ReadError as error:
        steps.append(f"the index cannot be read ({error.message})")
        return {}


# --- zips


def _read_zip(source: _Source, lost: list[Storage], steps: list[str]) -> Document:
    records = _records(source, steps)
    if not any(name.rpartition("/")[2] == "data.pkl" for name in records):
        raise DamagedError(
            f"{source.name}: the record that names the tensors (data.pkl) is lost",
            hint="nothing can be recovered from it; look for another copy",
        )
    return torch_zip.from_records(records, source.name, source.size, lost=lost)


def _records(source: _Source, steps: list[str]) -> dict[str, Span]:
    """The whole records of an archive, by name."""
    try:
        ours = zips.read(source).spans
    except ReadError as error:
        steps.append(f"the archive cannot be read as it is ({error.message})")
        ours = {}
    else:
        if _has_sums(ours) and all(map(zip_recovery.is_right, ours.values())):
            return ours
    known = [zip_recovery.listed(source), zip_recovery.scan(source), ours]
    every = [one if _has_sums(one) else _unchecked(one) for one in known]
    records = _longest(every)
    steps.append(f"found {len(records)} whole records")
    return records


def _has_sums(records: dict[str, Span]) -> bool:
    """Whether an archive has checksums; one that has none may look as if it had one by damage."""
    filled = [span.crc for span in records.values() if span.length]
    return sum(bool(crc) for crc in filled) * 2 > len(filled)


def _unchecked(records: dict[str, Span]) -> dict[str, Span]:
    return {name: span.unchecked() for name, span in records.items()}


def _longest(known: list[dict[str, Span]]) -> dict[str, Span]:
    """Of the readings of each record the first that is right; a length of 0 may be damage."""
    found: dict[str, Span] = {}
    for records in known:
        for name, span in records.items():
            earlier = found.get(name)
            better = earlier is None or not earlier.length
            if better and zip_recovery.is_right(span):
                found[name] = span
    return found


# --- what is left


def _without(
    document: Document, lost: list[Storage], absent: list[str], steps: list[str]
) -> Recovered:
    gone = {id(storage) for storage in lost}
    names, whole, unchecked = list(absent), 0, 0
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
    extras = {name: span for name, span in document.extras.items() if zip_recovery.is_right(span)}
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
