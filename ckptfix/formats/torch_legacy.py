"""torch's container before 1.6: pickles one after another, then the bytes of the storages.

    pickle     magic number 0x1950A86A20F9469CFC6C
    pickle     protocol version 1001
    pickle     {"protocol_version": 1001, "little_endian": …, "type_sizes": …}
    pickle     the tree; storages are persistent ids
               ("storage", class, key, location, numel, view), where view is None or
               (key of the view, offset, numel): a stretch of the storage, in elements
    pickle     list of the storages' keys, in the order in which their bytes follow
    for each   8 bytes: number of elements, signed, in the byte order of the file; then the elements

Some files have another persistent id, ("module", class, source file, source text): a class of the
model, with its source. Source: `torch.serialization._legacy_save` and `_legacy_load`.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Literal

from ckptfix import pickles
from ckptfix.bytes.span import Span
from ckptfix.errors import CkptfixError, DamagedError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats.reading import Reading
from ckptfix.formats.torch_zip import parse_persistent_id
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles.torch_objects import StorageView
from ckptfix.tree.document import Document, Global, Node, Storage
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage
    from ckptfix.pickles.machine import Data, Persistent

NAME = "torch legacy"
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001

_COUNT = 8


def recognises(source: Source) -> bool:
    """Whether a file is one of these: its first pickle is the number."""
    try:
        first, _ = pickles.read(source.head(64), _refuse, name="")
    except CkptfixError:
        return False
    return type(first) is int and first == MAGIC_NUMBER


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """The document in a legacy file. Reads the pickles and the length of each storage."""
    return _read(source, Reading(limits))


def salvage(source: Source, found: Salvage) -> Document:
    """The same, of a file that may be cut short behind its pickles."""
    return _read(source, found)


def _read(source: Source, reading: Reading) -> Document:
    data, limits = mapped(source), reading.limits
    storages: dict[str, Storage] = {}
    label, position = source.name, 0
    headers = []
    notes: list[Finding] = []
    for _ in range(3):
        header, position = pickles.read(
            data, _refuse, name=label, start=position, limits=limits, notes=notes
        )
        headers.append(header)
    byteorder = _check_headers(headers, label)
    root, position = pickles.read(
        data, _loader(storages), name=label, start=position, limits=limits, notes=notes
    )
    keys, position = pickles.read(
        data, _refuse, name=label, start=position, limits=limits, notes=notes
    )
    end = _place(storages, keys, source, position, byteorder, reading)
    root = without_views(root)
    surplus = max(source.size - end, 0)
    if surplus:
        notes.append(Finding("trailing-bytes", f"{surplus} bytes follow the last storage"))
    return Document(root, NAME, label, source.size, byteorder, notes=tuple(notes))


def mapped(source: Source) -> Data:
    """The file as memory that the system fills as it is read; weights are never touched."""
    descriptor = source.fileno()
    if descriptor is None:
        return source.read(0, source.size)
    return mmap.mmap(descriptor, source.size, access=mmap.ACCESS_READ)


def _refuse(_: Node) -> Node:
    raise UnsafeError("a persistent id stands where torch writes none")


def _check_headers(headers: list[Node], name: str) -> Literal["little", "big"]:
    magic, version, system = headers
    if magic != MAGIC_NUMBER:
        raise DamagedError("does not begin as torch's legacy files do", where=name)
    if version != PROTOCOL_VERSION:
        raise UnsupportedError("this version of the legacy format is not known", where=name)
    little = system.get("little_endian", True) if isinstance(system, dict) else True
    return "little" if little else "big"


def _loader(storages: dict[str, Storage]) -> Persistent:
    def load(pid: Node) -> Node:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and type(pid[1]) is Global:
            return pid[1]
        if type(pid) is not tuple or len(pid) != 6:
            raise UnsupportedError("a persistent id is not one of torch's storages")
        storage = parse_persistent_id(pid[:5])
        known = storages.setdefault(storage.key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            raise UnsafeError(f"storage {storage.key!r} is described in two ways")
        return known if pid[5] is None else view(known, pid[5])

    return load


def view(storage: Storage, described: Node) -> StorageView:
    """The stretch of a storage that `(key, offset, numel)` describes."""
    if type(described) is not tuple or len(described) != 3:
        raise DamagedError("a view of a storage is described wrongly")
    _, offset, numel = described
    if type(offset) is not int or type(numel) is not int:
        raise DamagedError("a view of a storage is described wrongly")
    if not 0 <= offset <= offset + numel <= storage.numel:
        raise UnsafeError(f"a view reaches outside storage {storage.key!r}")
    return StorageView(storage, offset, numel)


def without_views(root: Node) -> Node:
    """A tree in which views of storages that are no tensor's are storages of their own."""

    def change(node: Node) -> Node:
        if not isinstance(node, StorageView):
            return node
        whole, size = node.storage, node.storage.dtype.itemsize
        span = whole.spans[0].slice(node.offset * size, node.numel * size)
        return Storage(whole.dtype, node.numel, whole.device, (span,))

    if not any(isinstance(node, StorageView) for _, node in walk(root)):
        return root
    return rebuild(root, change)


def _place(
    storages: dict[str, Storage],
    keys: Node,
    source: Source,
    position: int,
    byteorder: Literal["little", "big"],
    reading: Reading,
) -> int:
    """Give each storage its span, in the order of `keys`; returns where the last one ends."""
    known = isinstance(keys, list) and all(type(key) is str for key in keys)
    if not known or sorted(keys) != sorted(storages):
        raise DamagedError("the list of storages does not fit the tree", where=source.name)
    total = sum(_COUNT + storage.nbytes for storage in storages.values())
    fits = position + total == source.size  # then a count that differs is what is damaged
    for key in keys:
        storage = storages[key]
        end = position + _COUNT + storage.nbytes
        if position + _COUNT <= source.size and (end <= source.size or not reading.salvages):
            _check_count(storage, source, position, byteorder, believed=fits and reading.salvages)
        if end > source.size:
            reading.lose(storage, _ends_inside(storage, source, end))
        else:
            storage.spans = (Span(source, position + _COUNT, storage.nbytes),)
        position = end
    return position


def _check_count(
    storage: Storage,
    source: Source,
    position: int,
    byteorder: Literal["little", "big"],
    *,
    believed: bool,
) -> None:
    """What stands before the bytes of a storage says how many elements it has."""
    count = int.from_bytes(source.read(position, _COUNT), byteorder, signed=True)
    if count != storage.numel and not believed:
        raise UnsafeError(
            f"storage {storage.key!r} has {count} elements where the tree says {storage.numel}",
            where=source.name,
        )


def _ends_inside(storage: Storage, source: Source, end: int) -> DamagedError:
    return DamagedError(
        f"ends inside storage {storage.key!r}, at byte {source.size} of {end} or more",
        where=source.name,
        hint="the file is cut short: copy or download it again",
    )
