"""What to overwrite in a file so that it holds an edited tree: only its pickle or its header.

The new pickle or header has to take as many bytes as the old one, because what follows cannot move.
A shorter header is padded with spaces. A shorter pickle is padded before its STOP with opcodes that
change nothing: BINPUT (2 bytes) and LONG_BINPUT (5 bytes) put the finished root under number 0 of
the memo, where nobody looks it up any more. They make any number of bytes but 1 and 3; for those,
one small integer is written with a byte more (BININT2 in place of BININT1). `torch.load` takes all
of these with and without `weights_only`. In a zip the CRC-32 of the pickle changes too, wherever it
stands.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

from ckptfix import pickles
from ckptfix.bytes.journal import Patch
from ckptfix.bytes.source import FileSource
from ckptfix.errors import InPlaceError
from ckptfix.formats import safetensors, torch_zip
from ckptfix.formats.table import SAFETENSORS
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip.layout import CRC_IN_CENTRAL, CRC_IN_LOCAL, STORED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.bytes.source import Source
    from ckptfix.bytes.span import Span
    from ckptfix.formats.zip.archive import Archive, Entry
    from ckptfix.tree.document import Document, Storage, Tensor

_CRC = struct.Struct("<I")


def make(document: Document, source: Source, storages: Iterable[Storage]) -> list[Patch]:
    """The patches that turn the file that a document was read from into that document.

    `storages` are those of the document. Raises `InPlaceError` where a copy has to be written
    instead.
    """
    if document.container == SAFETENSORS.name:
        made = _safetensors(document, source)
    else:
        made = _torch_zip(document, source, storages)
    return [patch for patch in made if patch.old != patch.new]


def _check_room(document: Document, what: str, length: int, room: int) -> None:
    if length > room:
        more = f"{length - room} byte{'s' if length - room > 1 else ''}"
        raise InPlaceError(document.name, f"its {what} would grow by {more}")


# --- torch zip


def _torch_zip(document: Document, source: Source, storages: Iterable[Storage]) -> list[Patch]:
    archive = zips.read(source)
    folder = f"{document.archive}/" if document.archive else ""
    name = f"{folder}data.pkl"
    entry = next((entry for entry in archive.entries if entry.name == name), None)
    if entry is None:
        raise InPlaceError(document.name, "its records lie in another folder than torch's do")
    if entry.method != STORED:
        raise InPlaceError(document.name, "its pickle is compressed")
    _check_records(document, archive, folder, storages)
    pickle, _ = pickles.write(document.root, own_keys=True)
    span = archive.spans[name]
    _check_room(document, "pickle", len(pickle), span.length)
    new, old = padded(pickle, span.length), span.read()
    if len(new) != len(old):
        raise InPlaceError(document.name, "its pickle cannot be padded to its old length")
    patches = [Patch(span.offset, old, new)]
    if any(entry.crc for entry in archive.entries):  # or it was saved without checksums
        crc = _CRC.pack(zlib.crc32(new))
        patches += [Patch(at, _CRC.pack(entry.crc), crc) for at in _places(archive, entry, span)]
    return patches


def _check_records(
    document: Document, archive: Archive, folder: str, storages: Iterable[Storage]
) -> None:
    """Every storage is a record of this very archive, and every record is what it was."""
    names = (name.removeprefix(folder) for name in archive.spans)
    unclaimed = {name for name in names if not torch_zip.is_own(name)}
    for storage in storages:
        record = archive.spans.get(f"{folder}data/{storage.key}")
        if record is None or not _is_record(storage, record):
            raise InPlaceError(document.name, "its tensors are not those of the file")
        unclaimed.discard(f"data/{storage.key}")
    known = {note.code for note in document.notes}
    unused = {name for name in unclaimed if name.startswith("data/")}
    if unclaimed - unused != set(document.extras) or (unused and "unused-records" not in known):
        raise InPlaceError(document.name, "what was left out would stay in the file")


def _is_record(storage: Storage, record: Span) -> bool:
    places = [(span.offset, span.length) for span in storage.spans]
    return places == [(record.offset, record.length)] and isinstance(record.source, FileSource)


def _places(archive: Archive, entry: Entry, span: Span) -> list[int]:
    """Where the CRC-32 of a record stands: in the directory, in its header or its descriptor."""
    places = [archive.directory + entry.place + CRC_IN_CENTRAL]
    end = span.offset + span.length
    later = [other.header for other in archive.entries if other.header >= end]
    gap = min([archive.directory, *later]) - end
    if gap:  # a descriptor, with or without a signature of 4 bytes
        places.append(end + (4 if gap in (16, 24) else 0))
    in_header = entry.header + CRC_IN_LOCAL
    if any(span.source.read(in_header, _CRC.size)) or not gap:
        places.append(in_header)
    return places


def padded(pickle: bytes, length: int) -> bytes:
    """A pickle of the same meaning in exactly `length` bytes; or of others, if that cannot be."""
    missing = length - len(pickle)
    if missing in (1, 3):
        pickle = _widened(pickle)
        missing = length - len(pickle)
    long = missing // 5 - (missing % 5 in (1, 3))
    if missing <= 0 or long < 0:
        return pickle
    return pickle[:-1] + b"q\0" * ((missing - 5 * long) // 2) + b"r\0\0\0\0" * long + b"."


def _widened(pickle: bytes) -> bytes:
    """A pickle whose first integer below 256 takes one byte more."""
    import pickletools

    try:
        for opcode, value, place in pickletools.genops(pickle):
            if opcode.name == "BININT1" and value is not None and place is not None:
                return pickle[:place] + b"M%c\0" % value + pickle[place + 2 :]
    except ValueError:  # pickletools is stricter about names than Python is
        pass
    return pickle


# --- safetensors


def _safetensors(document: Document, source: Source) -> list[Patch]:
    length = int.from_bytes(source.read(0, 8), "little")
    old = source.read(8, length)
    before: dict[str, Any] = json.loads(old)
    header = _header(document, 8 + length)
    if _layout(header) != _layout(before):
        raise InPlaceError(document.name, "its tensors are not those of the file")
    new = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    _check_room(document, "header", len(new), length)
    return [Patch(8, old, new.ljust(length))]


def _header(document: Document, start: int) -> dict[str, Any]:
    """The header of a tree whose tensors stay where they are; data begins at `start`."""
    tensors, aliases = safetensors.without_ties(document.root)
    metadata = {**document.metadata, **aliases, **safetensors.module_versions(document.root)}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, tensor in tensors.items():
        if not _is_whole(tensor):
            raise InPlaceError(document.name, f"the bytes of {name!r} would change")
        header[name] = safetensors.description(tensor, tensor.storage.spans[0].offset - start)
    return header


def _is_whole(tensor: Tensor) -> bool:
    spans = tensor.storage.spans
    one = len(spans) == 1 and spans[0].length == tensor.nbytes
    return one and tensor.offset == 0 and tensor.is_contiguous


def _layout(header: Mapping[str, Any]) -> list[Any]:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sorted([*entry["data_offsets"], entry["dtype"], entry["shape"]] for entry in entries)
