"""Items of a DCP folder: complete torch zips, of which a checkpoint may have hundreds of thousands.

Each is read as any torch zip. Small ones are much alike: torch writes the same records at the same
places, and only the pickle, the bytes of the tensor and the checksums differ. So one that equals,
in every other byte, an item that was read strictly is as sound as that, and costs a comparison; and
a pickle that was read before says the same again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from isal import isal_zlib

from ckptfix.bytes.source import BytesSource, LazySource, ReadAhead
from ckptfix.bytes.span import Span
from ckptfix.bytes.unpacked import UnpackedSource, unzstd
from ckptfix.errors import DamagedError, UnsafeError
from ckptfix.formats import table, torch_zip
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip.layout import CRC_IN_CENTRAL, CRC_IN_LOCAL, DESCRIPTOR_MAGIC
from ckptfix.limits import unpacked_bytes
from ckptfix.tree.document import Node, Storage, Tensor
from ckptfix.tree.walk import is_plain, storages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.bytes.source import Source
    from ckptfix.findings import Finding
    from ckptfix.formats.reading import Reading

_SMALL = 1 << 14
"""Items so small are read as a whole, many at a time."""
_AHEAD = 1 << 17
_KEPT = 1 << 12
"""Lengths of items, and pickles, that are known again."""
_SIMILAR = 4
"""Items of one length that others are compared with."""


class Items:
    """Reads items. `notes` and `orders` are what was noticed and which byte orders there were."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._ahead: dict[int, ReadAhead] = {}
        self._templates: dict[int, list[_Template]] = {}
        self._known: dict[bytes, Tensor] = {}
        self.notes: dict[Finding, None] = {}
        self.orders: set[str] = set()

    def read(self, source: Source, offset: int, length: int, name: str) -> Node:
        """What the item of `length` bytes at `offset` of a file holds; messages call it `name`.

        Raises `ReadError` and its kin.
        """
        if length > _SMALL:
            part = LazySource(length, lambda: (source, offset), name)
            return self._strictly(part, source, offset)
        ahead = self._ahead.get(id(source))
        if ahead is None:
            ahead = self._ahead[id(source)] = ReadAhead(source, _AHEAD)
        data = ahead.read(offset, length)
        for template in self._templates.get(length, ()):
            found = self._like(template, data, source, offset)
            if found is not None:
                return found
        root = self._strictly(BytesSource(data, name), source, offset)
        if not self._reading.salvages:
            self._keep(root, data, offset)
        return root

    def unpacked(self, source: Source, offset: int, length: int, name: str) -> Node:
        """What an item that is packed with zstd holds. Raises `ReadError` and its kin."""
        packed, cap, kept = Span(source, offset, length), unpacked_bytes(length), bytearray()
        size = 0
        for chunk in unzstd(packed):
            size += len(chunk)
            if size > cap:
                raise UnsafeError(f"{length} bytes of zstd unpack to more than {cap}")
            if size <= _SMALL:
                kept += chunk
        part: Source = BytesSource(bytes(kept), name)
        if size > _SMALL:
            part = UnpackedSource(lambda: unzstd(packed), size, name, (source,))
        return self._strictly(part, part, 0)

    def _like(self, template: _Template, data: bytes, source: Source, offset: int) -> Tensor | None:
        """The tensor in an item that is as another one was; None where it is not."""
        found = template.match(data)
        known = None if found is None else self._known.get(found[0])
        if found is None or known is None:
            return None
        dtype, numel, device = known.storage.dtype, known.storage.numel, known.storage.device
        if known.storage.key != template.key or known.storage.nbytes != template.nbytes:
            return None
        span = Span(source, offset + template.begin, template.nbytes, found[1])
        return replace(known, storage=Storage(dtype, numel, device, (span,)))

    def _strictly(self, part: Source, source: Source, offset: int) -> Node:
        """What the torch zip in `part` holds; its bytes are those of the file."""
        if not torch_zip.recognises(part):
            raise DamagedError(f"no item begins at byte {offset} of {part.name}")
        document = table.read(part, self._reading)
        self.notes.update(dict.fromkeys(document.notes))
        self.orders.add(document.byteorder)
        for storage in storages(document.root):
            storage.spans = tuple(
                span._replace(source=source, offset=span.offset + offset)
                if span.source is part
                else span
                for span in storage.spans
            )
        return document.root

    def _keep(self, root: Node, data: bytes, offset: int) -> None:
        """Let further items be compared with one that was read, if it is of the usual kind."""
        if not isinstance(root, Tensor) or not is_plain(root) or len(root.storage.spans) != 1:
            return
        records = zips.read(BytesSource(data), self._reading.limits)
        pickle = next(name for name in records.spans if name.endswith("data.pkl"))
        if len(self._known) < _KEPT:
            storage = replace(root.storage, spans=())
            self._known[records.spans[pickle].read()] = replace(root, storage=storage)
        similar = self._templates.setdefault(len(data), [])
        if len(self._templates) < _KEPT and len(similar) < _SIMILAR:
            tensor = f"{pickle.removesuffix('data.pkl')}data/{root.storage.key}"
            made = _Template.of(records, data, pickle, tensor)
            if made is not None:
                similar.append(made)


class _Template(NamedTuple):
    """An item that was read strictly, and the stretches of it that may be others."""

    fixed: tuple[tuple[int, int, bytes], ...]
    """Begin, end and bytes of what has to be equal."""
    sums: tuple[tuple[int, ...], ...]
    """Where the checksums of each record stand that may differ: all of one have to be equal."""
    pickle: tuple[int, int]
    """Where the pickle begins and ends; its checksums are the first of `sums`."""
    begin: int
    nbytes: int
    """Where the bytes of the tensor lie; their checksums are the second of `sums`."""
    key: str
    """What the pickle has to call them."""

    @classmethod
    def of(cls, records: zips.Archive, data: bytes, pickle: str, tensor: str) -> _Template | None:
        """The template of an archive that holds these two records; None for unusual ones."""
        held = {name: span for name, span in records.spans.items() if span.crc}
        if pickle not in held or tensor not in held:
            return None
        identity = next((name for name in held if name.endswith("serialization_id")), None)
        names = [pickle, tensor] if identity is None else [pickle, tensor, identity]
        entries = {entry.name: entry for entry in records.entries}
        if any(entries[name].method or held[name].source.size != len(data) for name in names):
            return None
        sums = [tuple(_sums_of(entries[name], held[name], records, data)) for name in names]
        free = [(held[name].offset, held[name].offset + held[name].length) for name in names]
        other = [(at, at + 4) for places in sums for at in places]
        fixed, at = [], 0
        for start, end in [*sorted(free + other), (len(data), len(data))]:
            fixed.append((at, start, data[at:start]))
            at = end
        begin, _ = free[1]
        key = tensor.rpartition("/")[2]
        return cls(tuple(fixed), tuple(sums), free[0], begin, held[tensor].length, key)

    def match(self, data: bytes) -> tuple[bytes, int] | None:
        """The pickle and the tensor's checksum of an item of the same length; None: it differs."""
        for begin, end, wanted in self.fixed:
            if data[begin:end] != wanted:
                return None
        found = []
        for first, *others in self.sums:
            crc = data[first : first + 4]
            if any(data[at : at + 4] != crc for at in others):
                return None
            found.append(int.from_bytes(crc, "little"))
        begin, end = self.pickle
        pickle = data[begin:end]
        return (pickle, found[1]) if isal_zlib.crc32(pickle) == found[0] else None


def _sums_of(entry: zips.Entry, span: Span, records: zips.Archive, data: bytes) -> Iterator[int]:
    """Where the checksum of a record stands: in the directory, and beside the record."""
    yield records.directory + entry.place + CRC_IN_CENTRAL
    crc = entry.crc.to_bytes(4, "little")
    if data[entry.header + CRC_IN_LOCAL :].startswith(crc):
        yield entry.header + CRC_IN_LOCAL
    end = span.offset + span.length
    if data[end:].startswith(DESCRIPTOR_MAGIC + crc):
        yield end + len(DESCRIPTOR_MAGIC)
