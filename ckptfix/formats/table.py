"""The table of formats, and the one way from bytes to a document.

A format is a module of this package with the same few names as all others:

    NAME                        what people call it, and what a document says it was read from
    recognises(source)          whether these bytes are meant to be that, mostly by the first ones
    read(source, limits)        the document in it; raises `ReadError` and its kin
    salvage(source, found)      the same, of a file that is damaged: `found` notes what is missing
    unpack(source, reading)     in place of both, where it only lies around another file

and where it is written, `write(document, sink)` and `difference(document, found)`. A module is
imported when the formats before it did not recognise a file.

The order of recognition is the order of `ORDER`, and a matter of security: a file that could be two
things has to be the same one to every command. Magic numbers come first, from the strictest on;
what is told by a few characters comes after them; a pickle, which may begin with nearly anything,
is last. Whatever is in an archive or packed is recognised in the same order, but for what it came
out of, so that nothing nests without end.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from ckptfix.bytes.source import FileSource
from ckptfix.errors import (
    CkptfixError,
    DamagedError,
    InPlaceError,
    ReadError,
    UnsupportedError,
    VerifyError,
)
from ckptfix.findings import Finding
from ckptfix.formats.reading import Reading, Salvage
from ckptfix.hints import Hint, command
from ckptfix.tree.walk import storages

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    from ckptfix.bytes.copy import Checked, Sink
    from ckptfix.bytes.place import Place, Progress
    from ckptfix.bytes.source import Source
    from ckptfix.limits import Limits
    from ckptfix.tree.document import Document, Storage

    class Format(Protocol):
        """What a module of a format offers."""

        NAME: str

        def recognises(self, source: Source) -> bool:
            """Whether a file is meant to be in this format."""

        def read(self, source: Source, limits: Limits) -> Document:
            """The document in a file."""

        def salvage(self, source: Source, found: Salvage) -> Document:
            """The document in a damaged file."""

        def unpack(self, source: Source, reading: Reading) -> Source:
            """The file inside of this one."""

        def write(self, document: Document, sink: Sink) -> None:
            """Write a document to a file of its own."""

        def difference(self, document: Document, found: Document) -> str | None:
            """Where what was read back differs from what was written, or None."""


ORDER = (
    "torch_zip",
    "shard_index",
    "gzip",
    "torch_tar",
    "tar",
    "torch_legacy",
    "safetensors",
    "plain_pickle",
)
"""The modules of all formats that are read, in the order in which they are asked."""

WRAPPINGS = frozenset({"gzip", "tar"})
"""Those that only lie around a file."""

ALONE = frozenset({"shard_index"})
"""Those that mean nothing inside another file, since they speak of what lies beside them."""


def _module(name: str) -> Format:
    return cast("Format", importlib.import_module(f"ckptfix.formats.{name}"))


# --- reading


def read(source: Source, reading: Reading) -> Document:
    """The document in a file, in whatever format it is; its extension plays no part.

    Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or unsupported.
    """
    among: tuple[str, ...] = ORDER
    outer, packed = source, []
    while (name := recognised(source, reading, among)) in WRAPPINGS:
        among = tuple(other for other in among if other != name and other not in ALONE)
        packed.append(_module(name).NAME)
        source = _module(name).unpack(source, reading)
    if isinstance(reading, Salvage):
        document = _module(name).salvage(source, reading)
    else:
        document = _strictly(name, source, reading.limits)
    if not packed:
        return document
    message = f"it is packed with {' and '.join(packed)}, which torch.load does not unpack"
    notes = (Finding("container-refused", message), *document.notes)
    return replace(document, name=outer.name, notes=notes)


def _strictly(name: str, source: Source, limits: Limits) -> Document:
    try:
        return _module(name).read(source, limits)
    except DamagedError as error:
        from ckptfix.formats import not_checkpoints

        if error.code == DamagedError.code and not_checkpoints.transferred_as_text(source):
            what = "was transferred as a text: a byte was put before each line feed in it"
            hint = "transfer it again as binary (FTP: `binary`; git: mark it `-text` or use LFS)"
            raise DamagedError(what, where=source.name, hint=hint, code="text-mode") from error
        raise


def read_among(source: Source, limits: Limits, among: Iterable[str]) -> Document:
    """The document in a file that is in one of some formats. Raises as `read` does."""
    return _module(recognised(source, Reading(limits), among)).read(source, limits)


def is_among(source: Source, among: Iterable[str]) -> bool:
    """Whether a file is in one of some formats."""
    return any(_module(name).recognises(source) for name in among)


def recognised(source: Source, reading: Reading, among: Iterable[str] = ORDER) -> str:
    """The module of the format that a file is in. Raises `ReadError` where it is none of them."""
    for name in among:
        if _module(name).recognises(source):
            return name
    if reading.salvages:
        return _by_its_end(source)
    from ckptfix.formats import not_checkpoints

    raise not_checkpoints.explain(source)


def _by_its_end(source: Source) -> str:
    """The format of a file whose beginning is lost: an archive says what it is at its end."""
    from ckptfix.formats import not_checkpoints
    from ckptfix.formats.zip import recovery

    if recovery.listed(source):
        return "torch_zip"
    other = not_checkpoints.named(source)
    if other is not None and other.code != "empty":
        raise other
    raise UnsupportedError(
        "is not a checkpoint, or its beginning is lost",
        where=source.name,
        hint=Hint("see what it is", command("inspect", source.name)),
    )


def read_place(place: Place, reading: Reading) -> Document:
    """As `read`, of a file; an interrupted edit of it is undone first, and `notes` say so."""
    source = place.open()
    document = read(source, reading)
    if source.undone is None:
        return document
    return replace(document, notes=(Finding("rolled-back", source.undone), *document.notes))


# --- writing


class Writable(NamedTuple):
    """A container that ckptfix writes."""

    name: str
    extensions: tuple[str, ...]
    tensors_only: bool
    """Whether it holds one state dict of dense tensors and nothing else."""
    module: str

    def write(self, document: Document, sink: Sink) -> None:
        """Write a document to a file of its own."""
        _module(self.module).write(document, sink)

    def difference(self, document: Document, found: Document) -> str | None:
        """Where what was read back differs from what was written, or None."""
        return _module(self.module).difference(document, found)


TORCH_ZIP = Writable("torch zip", (".pt", ".pth", ".bin", ".ckpt", ".pth.tar"), False, "torch_zip")
SAFETENSORS = Writable("safetensors", (".safetensors",), True, "safetensors")
WRITABLE = (TORCH_ZIP, SAFETENSORS)
EXTENSIONS = tuple(extension for container in WRITABLE for extension in container.extensions)


def split_extension(path: str) -> tuple[str, str]:
    """A path without its extension, and the extension.

    That is the longest that a container has (`.pth.tar`, the name of torch's ImageNet example), or
    else what follows the last dot.
    """
    name = os.path.basename(path).lower()
    known = [one for one in EXTENSIONS if name.endswith(one) and name != one]
    if known:
        length = max(map(len, known))
        return path[:-length], path[-length:]
    return os.path.splitext(path)


def by_extension(path: str) -> Writable:
    """The container that the extension of a path asks for. Raises `UnsupportedError`."""
    _, extension = split_extension(path)
    for container in WRITABLE:
        if extension.lower() in container.extensions:
            return container
    raise UnsupportedError(
        f"no container has the extension {extension!r}",
        where=path,
        hint=f"end the name with one of {', '.join(EXTENSIONS)}, or with / for a folder of shards",
        code="extension",
    )


def write_place(
    document: Document,
    place: Place,
    container: Writable,
    *,
    force: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
    share: bool = True,
) -> Checked:
    """Write a document to a file, whole or not at all, and read it back before it gets its name.

    Bytes are held against the checksums on record while they are copied. Where only names or tags
    are other ones and the file system can, the output shares the blocks of the input, and they are
    not read, unless `share` is unset. With `verify` they are copied, and the output is read back
    and compared. Returns what is known of the bytes.

    Raises `DamagedError` where the input is damaged, `WriteError` and its kin, `UnsupportedError`
    for what the container cannot hold.
    """

    def check(written: Place) -> None:
        try:
            found = read(written.open(), Reading(document.limits))
        except CkptfixError as error:
            raise VerifyError(f"does not read back: {error}", where=place) from error
        differs = container.difference(document, found)
        if differs is not None:
            raise VerifyError(f"reads back differently at {differs}", where=place)

    with place.publish(force=force, progress=progress, check=check, verify=verify) as sink:
        if verify or not share or not _shared(document, container, sink):
            container.write(document, sink)
    return sink.result


def file_of(document: Document, storages: Iterable[Storage]) -> FileSource:
    """The one file in which all bytes of a document lie, and that can be patched.

    `storages` are those of the document. Raises `InPlaceError` where a copy has to be written
    instead.
    """
    if document.container not in [one.name for one in WRITABLE]:
        why = f"that cannot be done to a checkpoint in the form {document.container!r}"
        raise InPlaceError(document.name, why)
    sources = {span.source for storage in storages for span in storage.spans}
    sources.update(span.source for span in document.extras.values())
    files = [source for source in sources if isinstance(source, FileSource)]
    if len(files) < len(sources):
        raise InPlaceError(document.name, "its tensors are compressed, or have to be computed")
    if len(files) != 1:
        why = "its tensors do not lie in one file" if files else "there is no tensor in it"
        raise InPlaceError(document.name, why)
    return files[0]


def _shared(document: Document, container: Writable, sink: Sink) -> bool:
    """Whether the output became a clone of the input, with other names in it.

    An input in which something was noticed is written anew: that repairs its container.
    """
    if document.container != container.name or document.notes:
        return False
    held = list(storages(document.root))
    try:
        source = file_of(document, held)
        if not sink.clone(source):
            return False
        patches = importlib.import_module("ckptfix.formats.patches")  # late, as the formats are
        for patch in patches.make(document, source, held):
            sink.patch(patch)
    except (InPlaceError, ReadError):
        sink.restart()
        return False
    return True
