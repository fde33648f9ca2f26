"""A zip archive that is no checkpoint itself: checkpoints packed into it, or another program's.

Checkpoints in a zip (stable-baselines3, TorchServe's .mar, a download of Kaggle's) are read, one
level deep: a member is a torch zip, a legacy file or safetensors. The document of one is that
checkpoint; of several, a mapping of their names, folders being mappings too. Whatever the members
unpack to is held against the size of the file, as with gzip.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.bytes.source import BytesSource, LazySource
from ckptfix.bytes.unpacked import InflatedSource, UnpackedSource
from ckptfix.errors import NotACheckpointError, ReadError, UnsafeError
from ckptfix.findings import Finding
from ckptfix.formats.table import is_among, read_among
from ckptfix.formats.zip.layout import LOCAL_MAGIC
from ckptfix.hints import Hint, shell
from ckptfix.limits import unpacked_bytes
from ckptfix.tree.document import Document
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptfix.bytes.source import Source
    from ckptfix.bytes.span import Span
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Node

    ReadZip = Callable[[Source, Reading], Document]

NAME = "zip"
_HEAD = 4096
_AMONG = ("torch_legacy", "safetensors")
"""What a member is beside torch's zip."""
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"\A[^/]*\.npy\Z", "numpy arrays (.npz)", "load it with numpy.load"),
    (
        r"data/aotinductor/",
        "a program that AOTInductor compiled",
        "take the checkpoint of the model that was compiled",
    ),
    (
        r"(?:\A|/)archive_format\Z|\Aserialized_exported_program\.json\Z",
        "a program of torch.export (.pt2)",
        "in Python: torch.save(torch.export.load({name!r}).state_dict, OUT)",
    ),
    (
        r"/\.data/extern_modules\Z",
        "a package of torch.package",
        "in Python: torch.package.PackageImporter({name!r}).load_pickle(PACKAGE, RESOURCE)",
    ),
    (
        r"\Amodel\.weights\.h5\Z",
        "a model of Keras (.keras)",
        "load it with keras.saving.load_model",
    ),
    (r"(?:\A|/)(?:saved_model\.pb|variables\.index)\Z", "a TensorFlow SavedModel", "unpack it"),
    (r"\Aword/|\Axl/|\Appt/", "a document of Office", "look for the checkpoint elsewhere"),
    (r"\.dist-info/", "a Python wheel", "install it with pip"),
    (r"\AMETA-INF/", "a Java archive", "look for the checkpoint elsewhere"),
)
"""What is called by the name of one of its members: pattern, what, what to do."""


def named(records: Mapping[str, Span], name: str) -> ReadError | None:
    """The error for an archive of another program, by the names in it; None where none tells."""
    for pattern, what, hint in _KINDS:
        if any(re.search(pattern, record) for record in records):
            said = f"is {what}, not a checkpoint of PyTorch"
            return NotACheckpointError(said, where=name, hint=hint.format(name=name))
    return None


def read(
    records: Mapping[str, Span], source: Source, reading: Reading, of_zip: ReadZip
) -> Document | None:
    """The checkpoints among the members; None where there is none. `of_zip` reads a torch zip.

    Raises `UnsafeError` where they unpack to more than the file may ask for, `ReadError` where
    they cannot be one document.
    """
    error = named(records, source.name)
    if error is not None:
        raise error
    members = {name: span for name, span in records.items() if not _is_junk(name)}
    _check_size(members, source)
    found = {name: span for name, span in members.items() if _is_checkpoint(span)}
    if not found:
        return None
    reading.narrow(source.size)
    documents = {
        name: _document(name, span, source, reading, of_zip) for name, span in found.items()
    }
    message = f"it is packed with {NAME}, which torch.load does not unpack"
    packed = Finding("container-refused", message)
    if len(documents) == 1:
        document = next(iter(documents.values()))
        return replace(document, name=source.name, notes=(packed, *document.notes))
    return _together(documents, source, packed)


def _check_size(members: Mapping[str, Span], source: Source) -> None:
    size, cap = sum(span.length for span in members.values()), unpacked_bytes(source.size)
    if size > cap:
        raise UnsafeError(
            f"{source.size} bytes of zip unpack to {size}",
            where=source.name,
            hint=Hint("unpack it yourself if you trust it", shell("unzip", files=[source.name])),
        )


def _is_junk(name: str) -> bool:
    """Whether a member is what macOS packs beside its files."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith("._")


def _is_checkpoint(span: Span) -> bool:
    """Whether a member begins as a container of torch's or safetensors does."""
    head = BytesSource(span.slice(0, min(span.length, _HEAD)).read())
    if head.head(len(LOCAL_MAGIC)) == LOCAL_MAGIC:
        return True
    return is_among(head, _AMONG)


def _document(name: str, span: Span, source: Source, reading: Reading, of_zip: ReadZip) -> Document:
    """The document in one member."""
    label = f"{source.name}:{name}"
    inner: Source
    if span.source is source:
        inner = LazySource(span.length, lambda: (source, span.offset), label)
    else:
        inner = UnpackedSource(span.chunks, span.length, label, (span.source,))
    if inner.head(len(LOCAL_MAGIC)) != LOCAL_MAGIC:
        return read_among(inner, reading.limits, _AMONG)
    document = of_zip(inner, reading)
    if isinstance(span.source, InflatedSource) and _is_deflated(document):
        raise UnsafeError(
            "is packed twice: a zip of packed records inside a packed zip", where=inner.name
        )
    return document


def _is_deflated(document: Document) -> bool:
    from ckptfix.tree.walk import storages

    spans = (span for storage in storages(document.root) for span in storage.spans)
    return any(isinstance(span.source, InflatedSource) for span in spans)


def _together(documents: Mapping[str, Document], source: Source, packed: Finding) -> Document:
    """Several checkpoints as one: a mapping of their names."""
    orders = {document.byteorder for document in documents.values()}
    if len(orders) > 1 or any(document.extras for document in documents.values()):
        raise ReadError(
            f"is a zip archive of {plural(len(documents), 'checkpoint')} of different kinds "
            f"({listed(documents)})",
            where=source.name,
            hint=Hint("unpack it, and give one of them", shell("unzip", files=[source.name])),
            code="several-checkpoints",
        )
    root: dict[object, Node] = {}
    for name, document in documents.items():
        *folders, base = name.split("/")
        at = root
        for folder in folders:
            below = at.setdefault(folder, {})
            if not isinstance(below, dict):
                raise UnsafeError(f"{folder!r} is a file and a folder", where=source.name)
            at = below
        at[base] = document.root
    first = next(iter(documents.values()))
    notes = dict.fromkeys(note for document in documents.values() for note in document.notes)
    return Document(
        root,
        first.container,
        source.name,
        source.size,
        first.byteorder,
        notes=(packed, *notes),
    )
