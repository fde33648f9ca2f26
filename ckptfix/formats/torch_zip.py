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
`constants.pkl` and `code/` beside; those of 2019 have a sixth part in their persistent ids, None.
Sources: `torch.serialization._save`,
caffe2/serialize/inline_container.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Literal

from ckptfix import pickles
from ckptfix.bytes.engine import check_crc
from ckptfix.contents.labels import label
from ckptfix.errors import (
    DamagedError,
    NotACheckpointError,
    ReadError,
    UnsafeError,
    UnsupportedError,
)
from ckptfix.findings import Finding
from ckptfix.formats.reading import Reading
from ckptfix.formats.table import EXTENSIONS, TORCH_ZIP
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip import writer as zip_writer
from ckptfix.formats.zip.layout import LOCAL_MAGIC
from ckptfix.hints import Hint, shell
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree import compare
from ckptfix.tree.document import Document, Global, Node, Storage
from ckptfix.tree.dtypes import BY_STORAGE
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.bytes.copy import Sink
    from ckptfix.bytes.source import Source
    from ckptfix.bytes.span import Span
    from ckptfix.formats.reading import Salvage
    from ckptfix.formats.zip.archive import Archive
    from ckptfix.tree.dtypes import DType

NAME = TORCH_ZIP.name

_PICKLE = "data.pkl"
_OWN = {
    "data.pkl", "byteorder", "version", ".format_version", ".storage_alignment",
    ".data/serialization_id",
}  # fmt: skip


def is_own(record: str) -> bool:
    """Whether a record is one that `write` writes anew; torch finds them whatever their case."""
    return record.lower() in _OWN


def recognises(source: Source) -> bool:
    """Whether a file is a zip archive."""
    return source.head(len(LOCAL_MAGIC)) == LOCAL_MAGIC


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """The document in a torch zip; reads the directory, the headers and the pickle.

    Where it is no torch zip, the checkpoints that were packed into it.
    """
    archive = zips.read(source, limits)
    if not _names_tensors(archive.spans):
        from ckptfix.formats import zip_of_files  # late, since few archives are that

        found = zip_of_files.read(archive.spans, source, Reading(limits), _inner)
        if found is not None:
            return found
    return _read(archive, source, limits)


def _inner(source: Source, reading: Reading) -> Document:
    """The document in a torch zip inside another archive, in which there is no third."""
    return _read(zips.read(source, reading.limits), source, reading.limits)


def _names_tensors(records: Iterable[str]) -> bool:
    """Whether an archive has a record that names tensors, as those of torch's have."""
    return any(record.endswith((_PICKLE, "model.json")) for record in records) and not any(
        record.endswith(("/archive_format", "/.data/extern_modules")) for record in records
    )


def _read(archive: Archive, source: Source, limits: Limits) -> Document:
    records = archive.spans
    notes = []
    if not any(span.crc for span in records.values() if span.length):
        notes.append(Finding("no-checksums", "the archive was saved without checksums"))
        records = {name: span.unchecked() for name, span in records.items()}
    refused = _refusal(archive)
    if refused is not None:
        notes.append(Finding("container-refused", refused))
    if source.size > archive.end:
        from ckptfix.formats import several

        notes.append(several.after(source, archive.end, "the archive"))
    return from_records(records, source.name, source.size, Reading(limits), tuple(notes))


def _refusal(archive: Archive) -> str | None:
    """Why torch's reader does not take an archive; None where it does.

    It takes the folder from the first record of the directory, finds every record in it, whatever
    the case of its letters, and a version that it knows.
    """
    if not archive.entries:
        return None
    names = [entry.name for entry in archive.entries]
    first = min(archive.entries, key=lambda entry: entry.place).name
    folder = first[: first.find("/") + 1]
    if not folder:
        return f"its record {first!r} lies in no folder: torch.load refuses the archive"
    outside = [name for name in names if not name.startswith(folder)]
    if outside:
        junk = ", packed by macOS, and left out" if _is_junk(outside[0]) or _is_junk(first) else ""
        what = f"{listed(outside, 1)} outside of its first folder, {folder!r}{junk}"
        return f"it holds {what}: torch.load refuses the archive"
    if _record(archive, folder + _PICKLE) is None:
        return f"its first folder, {folder!r}, holds no {_PICKLE}: torch.load refuses the archive"
    version = _record(archive, f"{folder}.data/version") or _record(archive, f"{folder}version")
    if version is None:
        return "it holds no record 'version': torch.load refuses the archive"
    if not _is_known(version):
        return "torch.load does not know the version that it states, and refuses the archive"
    return None


def _record(archive: Archive, wanted: str) -> Span | None:
    """A record, by its name in letters of any case."""
    if wanted in archive.spans or not wanted.endswith("version"):
        return archive.spans.get(wanted)
    found = (span for name, span in archive.spans.items() if name.lower() == wanted.lower())
    return next(found, None)


def _is_known(version: Span) -> bool:
    """Whether torch reads archives of such a version: 1 to 10, as C reads numbers."""
    number = re.match(rb"\s*\+?(\d{1,9})", version.slice(0, min(version.length, 32)).read())
    return number is not None and 1 <= int(number[1]) <= 10


def _is_junk(record: str) -> bool:
    """Whether a record is no part of an archive, but what macOS packs beside its files."""
    return record.startswith("__MACOSX/")


def salvage(source: Source, found: Salvage) -> Document:
    """The document in what is whole of a damaged torch zip: `zip.recovery` finds the records."""
    from ckptfix.formats.zip import recovery

    whole = _packed(source, found)
    if whole is not None:
        return whole
    records = recovery.records(source, found)
    if not any(name.rpartition("/")[2] in recovery.HEADS for name in records):
        raise DamagedError(
            "the record that names the tensors (data.pkl) is lost",
            where=source.name,
            hint="nothing can be recovered from it; look for another copy",
        )
    return from_records(records, source.name, source.size, found)


def _packed(source: Source, found: Salvage) -> Document | None:
    """What was packed into a sound archive that is no torch zip; None for any other."""
    from ckptfix.formats import zip_of_files

    try:
        records = zips.read(source, found.limits).spans
    except ReadError:
        return None
    if _names_tensors(records):
        return None
    return zip_of_files.read(records, source, Reading(found.limits), _inner)


def from_records(
    records: Mapping[str, Span],
    name: str,
    size: int,
    reading: Reading,
    notes: tuple[Finding, ...] = (),
) -> Document:
    """The document in the records of an archive of `size` bytes.

    A storage whose record is absent or short is for `reading` to refuse or to note.
    """
    records = {record: span for record, span in records.items() if not _is_junk(record)}
    if not any(record.endswith("data.pkl") for record in records):
        from ckptfix.formats import script_json

        model = script_json.model_in(records)
        if model is not None:
            return script_json.read(records, model, name, size, reading)
    folder = _folder(records, name)
    pickle = records[f"{folder}data.pkl"]
    limits = reading.limits.of_packed(size)  # where it is deflated
    if pickle.length > limits.pickle_bytes:
        what = f"its pickle has {pickle.length} bytes; more than {limits.pickle_bytes} are refused"
        raise UnsafeError(what, where=name)
    check_crc(pickle, f"{folder}data.pkl")
    outside = [record for record in records if not record.startswith(folder)]
    if any(f"{folder}{record}" in records for record in outside):
        raise UnsafeError(f"holds a record of one name inside {folder!r} and outside", where=name)
    storages = _Storages(records, folder, reading)
    label = f"{name}: {folder}data.pkl"
    beside: list[Finding] = []
    root, _ = pickles.read(pickle.read(), storages.load, name=label, limits=limits, notes=beside)
    notes = (*notes, *beside)
    others = {
        record.removeprefix(folder): span
        for record, span in storages.unclaimed.items()
        if not is_own(record.removeprefix(folder))
    }
    extras = {record: span for record, span in others.items() if not record.startswith("data/")}
    if len(others) > len(extras):
        unused = sum(span.length for record, span in others.items() if record not in extras)
        message = f"{len(others) - len(extras)} records of {unused} bytes belong to no tensor"
        notes = (*notes, Finding("unused-records", message))
    return Document(
        root,
        "TorchScript zip" if "constants.pkl" in extras else NAME,
        name,
        size,
        _byteorder(records, folder, name),
        extras=extras,
        archive=folder.rstrip("/").rpartition("/")[2],
        notes=notes,
        constants=_constants(records, folder, name, limits),
    )


def _constants(records: Mapping[str, Span], folder: str, name: str, limits: Limits) -> Node:
    """The constants of a TorchScript program, their storages under `constants/`; else None.

    They are carried along as they are, whatever they hold: where they cannot be read, None.
    """
    record = f"{folder}constants.pkl"
    pickle = records.get(record)
    if pickle is None or pickle.length > limits.pickle_bytes:
        return None
    storages = _Storages(records, folder, Reading(limits), "constants/")
    try:
        return pickles.read(pickle.read(), storages.load, name=f"{name}: {record}", limits=limits)[
            0
        ]
    except ReadError:
        return None


def _folder(records: Mapping[str, Span], name: str) -> str:
    """The folder of the records, with its slash; empty where the archive was packed without it.

    What lies inside of it is its own, another `data.pkl` too.
    """
    folders: list[str] = []
    for record in sorted(records):
        base = record.rpartition("/")[2]
        within = record.removesuffix(base)
        if base == _PICKLE and not (folders and within.startswith(folders[-1])):
            folders.append(within)
    if len(folders) == 1:
        return folders[0]
    if folders:
        raise ReadError(
            f"is a zip archive of {len(folders)} checkpoints ({listed(folders)})",
            where=name,
            hint=Hint("unpack it, and give one of them", shell("unzip", files=[name])),
            code="several-checkpoints",
        )
    held = [record for record in records if record.lower().endswith(EXTENSIONS)]
    if held:
        raise NotACheckpointError(
            f"is a zip archive that files were packed into ({listed(held)})",
            where=name,
            hint=Hint("unpack it, and give one of them", shell("unzip", files=[name])),
        )
    raise NotACheckpointError(
        "is a zip archive without a checkpoint (no data.pkl in it)",
        where=name,
        hint=Hint("see what it holds", shell("unzip", "-l", files=[name])),
    )


def _byteorder(records: Mapping[str, Span], folder: str, name: str) -> Literal["little", "big"]:
    if f"{folder}byteorder" not in records:
        return "little"
    order = records[f"{folder}byteorder"].read()
    if order not in (b"little", b"big"):
        raise UnsupportedError(f"byte order {order[:20]!r} is not known", where=name)
    return "little" if order == b"little" else "big"


class _Storages:
    """Turns persistent ids into storages over the records of an archive, one for each key."""

    def __init__(
        self, records: Mapping[str, Span], folder: str, reading: Reading, data: str = "data/"
    ) -> None:
        self._reading = reading
        self._data = folder + data
        self._known: dict[str, Storage] = {}
        self.unclaimed = dict(records)
        """Records that are no storage's, as far as was seen."""

    def load(self, pid: Node) -> Storage:
        """The storage that a persistent id describes; TorchScript of 2019 adds a None to it."""
        if type(pid) is tuple and len(pid) == 6 and pid[5] is None:
            pid = pid[:5]
        storage = parse_persistent_id(pid)
        key = storage.key
        known = self._known.setdefault(key, storage)
        if known is not storage:
            if _description(known) != _description(storage):
                raise UnsafeError(f"storage {key!r} is described in two ways")
            return known
        name = self._data + key
        span, nbytes = self.unclaimed.get(name), storage.numel * storage.dtype.itemsize
        if span is not None and self._reading.salvages:
            from ckptfix.formats.zip import recovery

            span = recovery.without_descriptor(span, nbytes)
        if span is not None and span.length == nbytes:
            storage.spans = (span,)
            del self.unclaimed[name]
        else:
            self._reading.lose(storage, self._error(storage, name, span))
        return storage

    def _error(self, storage: Storage, name: str, span: Span | None) -> ReadError:
        if span is None:
            return DamagedError(f"the archive lacks {name!r}", hint="copy or download it again")
        return UnsafeError(
            f"storage {storage.key!r} has {span.length} bytes where {storage.numel} elements "
            f"of {storage.dtype} take {storage.nbytes}"
        )


def _description(storage: Storage) -> tuple[DType, int, str]:
    return storage.dtype, storage.numel, storage.device


def parse_persistent_id(pid: Node) -> Storage:
    """The storage that `("storage", class, key, location, numel)` announces, without its bytes."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise UnsupportedError("a persistent id is not one of torch's storages")
    _, cls, key, device, numel = pid
    dtype = BY_STORAGE.get(cls.name) if type(cls) is Global else None
    if dtype is None:
        named = cls if type(cls) is Global else type(cls).__name__
        raise UnsupportedError(f"a storage of class {named} is not known")
    if type(key) is not str or type(device) is not str or type(numel) is not int:
        raise DamagedError("a storage is described wrongly")
    if not 0 <= numel < 1 << 63:
        raise UnsafeError(f"a storage of {numel:#x} elements is announced")
    return Storage(dtype, numel, device, (), key)


def write(document: Document, sink: Sink, key: str | None = None) -> None:
    """Write a document as a torch zip, from where the sink stands. Equal documents, equal bytes.

    `key` is what messages call it where it is a part of another one.
    """
    pickle, storages = pickles.write(document.root)
    folder = document.archive or "archive"
    writer = zip_writer.Writer(sink)
    writer.add(f"{folder}/data.pkl", [pickle])
    writer.add(f"{folder}/.format_version", [b"1"])
    writer.add(f"{folder}/.storage_alignment", [b"64"])
    writer.add(f"{folder}/byteorder", [document.byteorder.encode()])
    for index, storage in enumerate(storages):
        named = partial(label, document.root, storage) if key is None else f"{key!r}"
        writer.add(f"{folder}/data/{index}", storage.spans, named)
    for name, span in document.extras.items():
        writer.add(f"{folder}/{name}", [span])
    writer.add(f"{folder}/version", [b"3\n"])
    writer.add(f"{folder}/.data/serialization_id", [_serialization_id(writer.crcs())])
    writer.finish()


def _serialization_id(crcs: Iterable[int]) -> bytes:
    """40 digits that differ where the contents do, as torch makes them; no secret depends on it."""
    every = b"".join(crc.to_bytes(4, "little") for crc in crcs)
    number = int.from_bytes(every + b"\1", "little")
    return b"".join(b"%020d" % (number % prime) for prime in _PRIMES)


_PRIMES = ((1 << 64) - 59, (1 << 64) - 83)
"""The largest of 64 bits. The remainders are a checksum; `hashlib` takes 6 ms to be imported."""


def difference(document: Document, found: Document) -> str | None:
    """Where a written file differs from the document it was made of: a path, or None."""
    if list(document.extras) != list(found.extras):
        return "its further records"
    return compare.difference(document.root, found.root)
