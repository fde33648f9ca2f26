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
from functools import partial
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Literal

from ckptfix import pickles
from ckptfix.bytes.span import Span
from ckptfix.errors import CkptfixError, DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.formats.reading import Reading
from ckptfix.formats.several import Part, after, chosen, part_of
from ckptfix.formats.torch_zip import parse_persistent_id
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles.torch_objects import StorageView
from ckptfix.tree.document import Document, Global, Node, Storage
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.bytes.source import Source
    from ckptfix.findings import Finding
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
    return _read(source, Reading(limits))[0]


def salvage(source: Source, found: Salvage) -> Document:
    """The same, of a file of which bytes are missing behind its pickles, at the end or amidst."""
    return _read(chosen(source, _saves(source, found.limits), found), found)[0]


def _saves(source: Source, limits: Limits) -> list[Part]:
    """The saves in a file, one after another.

    Where one is whole, the next begins behind it; else where the next begins as that one did. What
    follows the last, and is none, counts to it.
    """
    data, shift = mapped(source)
    _, length = pickles.read(data, _refuse, name=source.name, start=shift)
    head = source.read(0, length - shift)
    starts, begin = [0], 0
    while begin >= 0:
        try:
            end = begin + _read(part_of(source, begin, source.size), Reading(limits))[1]
        except ReadError:
            end = -1
        if end == source.size:
            break
        follows = end > 0 and source.read(end, min(len(head), source.size - end)) == head
        begin = end if follows else max(data.find(head, shift + begin + 1) - shift, -1)
        starts += [begin] if begin > 0 else []
    ends = [*starts[1:], source.size]
    pairs = zip(starts, ends, strict=True)
    return [Part(begin, end, f"{NAME}, {end - begin:,} bytes") for begin, end in pairs]


def _read(source: Source, reading: Reading) -> tuple[Document, int]:
    """The document of a save, and where that ends in the source."""
    (data, shift), limits = mapped(source), reading.limits
    storages: dict[str, Storage] = {}
    label, position = source.name, shift
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
    end = _place(storages, keys, source, position - shift, byteorder, reading)
    root = without_views(root)
    if source.size > end:
        notes.append(after(source, end, "the last storage"))
    return Document(root, NAME, label, source.size, byteorder, notes=tuple(notes)), end


def mapped(source: Source) -> tuple[Data, int]:
    """Memory that the system fills as it is read, and where in it the source begins.

    Weights are never touched.
    """
    descriptor = source.fileno()
    if descriptor is None:
        return source.read(0, source.size), 0
    shift = source.begin % mmap.ALLOCATIONGRANULARITY
    start = source.begin - shift
    size = shift + source.size
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, offset=start), shift


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
    rows = [storages[key] for key in keys]
    total = sum(_COUNT + storage.nbytes for storage in rows)
    if position + total != source.size and reading.salvages:
        _place_around(rows, source, position, byteorder, reading)
        return position + total
    for storage in rows:
        end = position + _COUNT + storage.nbytes
        if position + _COUNT <= source.size and not reading.salvages:
            _check_count(storage, source, position, byteorder)
        if end > source.size:
            reading.lose(storage, _ends_inside(storage, source, end))
        else:
            storage.spans = (Span(source, position + _COUNT, storage.nbytes),)
        position = end
    return position


def _check_count(
    storage: Storage, source: Source, position: int, byteorder: Literal["little", "big"]
) -> None:
    """What stands before the bytes of a storage says how many elements it has."""
    count = int.from_bytes(source.read(position, _COUNT), byteorder, signed=True)
    if count != storage.numel:
        raise DamagedError(
            f"storage {storage.key!r} has {count} elements where the tree says {storage.numel}",
            where=source.name,
            hint="bytes are missing in it, or are others: copy or download it again",
        )


def _place_around(
    rows: list[Storage],
    source: Source,
    position: int,
    byteorder: Literal["little", "big"],
    reading: Reading,
) -> None:
    """Give spans to the storages before and behind what is missing, which is told by their counts.

    A count that is right where it is looked for shows that everything before it is there. So before
    a count that is wrong the last storage is lost, and those behind it are found from the end of
    the file. Where no count is wrong, the file is cut short; unless its end fits too.
    """
    begins = list(accumulate((_COUNT + row.nbytes for row in rows), initial=position))
    right = partial(_has_count, source, byteorder)
    whole = takewhile(lambda i: begins[i + 1] <= source.size and right(rows[i], begins[i]),
                      range(len(rows)))  # fmt: skip
    before, shift = sum(1 for _ in whole), source.size - begins[-1]
    last = 0  # of those that may hold the hole
    if before == len(rows):
        shift = 0  # bytes follow the last
    elif begins[before] + _COUNT <= source.size and not right(rows[before], begins[before]):
        while before and not rows[before - 1].nbytes:  # its count of 0 shows nothing
            before -= 1
        before = last = max(before - 1, 0)
        while before and (
            rows[before].nbytes <= _COUNT or right(rows[before], begins[before] + shift)
        ):
            before -= 1  # a number may stand for its count, or this fits from the end as well
    elif all(right(row, begin + shift) for row, begin in _last(rows, begins)):
        what = "it is cut short, or bytes are missing amidst: counts fit both"
        reading.skip("tensors may be exchanged", DamagedError(what, where=source.name))
        shift = -source.size
    else:
        shift = -source.size  # nothing is behind a cut
    behind = len(rows)
    while behind > max(before, last) + 1 and begins[behind - 1] + shift >= begins[before]:
        if not right(rows[behind - 1], begins[behind - 1] + shift):
            break
        behind -= 1
    for index, row in enumerate(rows):
        if index < before or index >= behind or not row.nbytes:
            begin = begins[index] + (shift if index >= behind else 0)
            row.spans = (Span(source, begin + _COUNT, row.nbytes),)
        else:
            reading.lose(row, _ends_inside(row, source, begins[index + 1]))


def _last(rows: list[Storage], begins: list[int]) -> Iterator[tuple[Storage, int]]:
    """The last storages up to one that is not empty, and where each should begin."""
    for row, begin in zip(reversed(rows), reversed(begins[:-1]), strict=True):
        yield row, begin
        if row.nbytes:
            return


def _has_count(
    source: Source, byteorder: Literal["little", "big"], storage: Storage, place: int
) -> bool:
    """Whether the number of a storage's elements stands somewhere."""
    if not 0 <= place <= source.size - _COUNT:
        return False
    count = source.read(place, _COUNT)
    return int.from_bytes(count, byteorder, signed=True) == storage.numel


def _ends_inside(storage: Storage, source: Source, end: int) -> DamagedError:
    return DamagedError(
        f"ends inside storage {storage.key!r}, at byte {source.size} of {end} or more",
        where=source.name,
        hint="the file is cut short: copy or download it again",
    )
