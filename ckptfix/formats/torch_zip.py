"""torch's zip container, as `torch.save` writes it since 1.6.

Under one folder, whose name means nothing and is taken from the first record:

    data.pkl               the tree, a pickle; storages are persistent ids
                           ("storage", class, key, location, number of elements)
    .format_version        "1"            (newer versions of torch)
    .storage_alignment     "64"           (newer versions of torch)
    byteorder              "little" or "big"
    data/KEY               the bytes of the storage KEY, stored, aligned to 64 bytes
    version                "3"
    .data/serialization_id 40 digits

Alignment comes from a padding extra field `FB` in the local header, which is what lets
`torch.load(mmap=True)` use a record where it lies. TorchScript archives look the same, with
`constants.pkl` and `code/` beside. Sources: `torch.serialization._save`,
caffe2/serialize/inline_container.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Literal

from ckptfix import pickles, trees
from ckptfix.document import Document, Global, Node, Storage
from ckptfix.dtypes import BY_STORAGE
from ckptfix.errors import DamagedError, NotACheckpointError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import zips
from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.files import Sink
    from ckptfix.spans import Source, Span

NAME = "torch zip"
MAGIC = b"PK\x03\x04"
EXTENSIONS = (".pt", ".pth", ".bin", ".ckpt")

_OWN = {
    "data.pkl", "byteorder", "version", ".format_version", ".storage_alignment",
    ".data/serialization_id",
}  # fmt: skip


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """The document in a torch zip; reads the directory, the headers and the pickle."""
    archive = zips.read(source, limits)
    folder = _folder(archive)
    checksums = any(record.crc for record in archive.records.values() if record.size)
    storages = _Storages(archive, folder, checksums)
    pickle = archive.span(f"{folder}data.pkl")
    if pickle.length > limits.pickle_bytes:
        raise UnsafeError(f"{source.name}: its pickle has {pickle.length} bytes")
    label = f"{source.name}: {folder}data.pkl"
    root, _ = pickles.read(pickle.read(), storages.load, name=label, limits=limits)
    extras = {
        name.removeprefix(folder): archive.span(name)
        for name in archive.records
        if name.removeprefix(folder) not in _OWN and name not in storages.names
    }
    return Document(
        root,
        "TorchScript zip" if "constants.pkl" in extras else NAME,
        source.name,
        source.size,
        _byteorder(archive, folder),
        extras=extras,
        archive=folder.rstrip("/"),
        notes=tuple(_notes(archive, checksums)),
    )


def _folder(archive: zips.Archive) -> str:
    """The folder of the records, with its slash; empty where the archive was packed without it."""
    first = next(iter(archive.records), "")
    folder = first[: first.find("/") + 1]
    if f"{folder}data.pkl" in archive.records:
        return folder
    found = [name for name in archive.records if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(found) != 1:
        raise NotACheckpointError(
            f"{archive.source.name}: a zip archive without a checkpoint (no data.pkl in it)",
            hint=f"see what it holds: unzip -l {archive.source.name}",
        )
    return found[0].removesuffix("data.pkl")


def _byteorder(archive: zips.Archive, folder: str) -> Literal["little", "big"]:
    if f"{folder}byteorder" not in archive.records:
        return "little"
    order = archive.span(f"{folder}byteorder").read()
    if order not in (b"little", b"big"):
        raise UnsupportedError(f"{archive.source.name}: byte order {order[:20]!r} is not known")
    return "little" if order == b"little" else "big"


def _notes(archive: zips.Archive, checksums: bool) -> Iterable[Finding]:
    if not checksums:
        yield Finding("no-checksums", "the archive was saved without checksums")
    surplus = archive.source.size - archive.end
    if surplus:
        yield Finding("trailing-bytes", f"{surplus} bytes follow the end of the archive")


class _Storages:
    """Turns persistent ids into storages over the records of an archive, one for each key."""

    def __init__(self, archive: zips.Archive, folder: str, checksums: bool) -> None:
        self._archive = archive
        self._folder = folder
        self._checksums = checksums
        self._known: dict[str, Storage] = {}
        self.names: set[str] = set()

    def load(self, pid: Node) -> Storage:
        storage = parse_persistent_id(pid)
        known = self._known.setdefault(storage.key, storage)
        if known is not storage:
            if (known.dtype, known.numel, known.device) != (
                storage.dtype,
                storage.numel,
                storage.device,
            ):
                raise UnsafeError(f"storage {storage.key!r} is described in two ways")
            return known
        storage.spans = (self._span(storage),)
        return storage

    def _span(self, storage: Storage) -> Span:
        name = f"{self._folder}data/{storage.key}"
        if name not in self._archive.records:
            raise DamagedError(f"the archive lacks {name!r}", hint="copy or download it again")
        self.names.add(name)
        span = self._archive.span(name)
        if span.length != storage.nbytes:
            raise UnsafeError(
                f"storage {storage.key!r} has {span.length} bytes where {storage.numel} elements "
                f"of {storage.dtype} take {storage.nbytes}"
            )
        return span if self._checksums else span.unchecked()


def parse_persistent_id(pid: Node) -> Storage:
    """The storage that `("storage", class, key, location, numel)` announces, without its bytes."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise UnsupportedError("a persistent id is not one of torch's storages")
    _, cls, key, device, numel = pid
    dtype = BY_STORAGE.get(cls.name) if type(cls) is Global else None
    if dtype is None:
        raise UnsupportedError(f"a storage of class {cls} is not known")
    if type(key) is not str or type(device) is not str or type(numel) is not int or numel < 0:
        raise DamagedError("a storage is described wrongly")
    return Storage(dtype, numel, device, key=key)


def write(document: Document, sink: Sink) -> None:
    """Write a document as a torch zip. Equal documents give equal bytes."""
    pickle, storages = pickles.write(document.root)
    folder = document.archive or "archive"
    writer = zips.Writer(sink)
    writer.add(f"{folder}/data.pkl", [pickle])
    writer.add(f"{folder}/.format_version", [b"1"])
    writer.add(f"{folder}/.storage_alignment", [b"64"])
    writer.add(f"{folder}/byteorder", [document.byteorder.encode()])
    for index, storage in enumerate(storages):
        writer.add(f"{folder}/data/{index}", storage.spans)
    for name, span in document.extras.items():
        writer.add(f"{folder}/{name}", [span])
    writer.add(f"{folder}/version", [b"3\n"])
    writer.add(f"{folder}/.data/serialization_id", [_serialization_id(writer.crcs)])
    writer.finish()


def _serialization_id(crcs: Iterable[int]) -> bytes:
    """40 digits that differ where the contents do, as torch makes them."""
    digest = hashlib.blake2b(repr(list(crcs)).encode(), digest_size=16).digest()
    return b"%020d%020d" % (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
    )


def difference(document: Document, found: Document) -> str | None:
    """Where a written file differs from the document it was made of: a path, or None."""
    if list(document.extras) != list(found.extras):
        return "its further records"
    return trees.difference(document.root, found.root)
