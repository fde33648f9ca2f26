"""torch's container of 2016 and 2017: a tar archive.

    sys_info   pickle, as in the legacy format
    storages   pickle: their count; for each a pickle (key, location, storage class), 8 bytes: the
               number of elements, and the elements; last a pickle: list of views
               (key, key of the storage, offset, numel), in elements
    tensors    pickle: their count; for each a pickle (key, key of the storage, tensor class), then
               4 bytes: number of dimensions, 4 bytes unused, 8 bytes each: shape, stride, offset
               (absent where the tree describes its tensors itself)
    pickle     the tree; persistent ids are keys of tensors or storages, or
               (class, source file, source text)

Numbers are little-endian. Source: `legacy_load` in `torch.serialization._legacy_load`.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

from ckptfix import pickles
from ckptfix.bytes.source import Reader
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError, NotACheckpointError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import torch_legacy
from ckptfix.formats.reading import Reading
from ckptfix.formats.torch_zip import parse_persistent_id
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles import torch_objects
from ckptfix.pickles.torch_objects import BUILDERS, StorageView
from ckptfix.tree.document import Document, Global, Node, Storage, Tensor, reach
from ckptfix.tree.dtypes import BY_STORAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage
    from ckptfix.pickles.machine import Data
    from ckptfix.pickles.torch_objects import Arguments

NAME = "torch tar"
_TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_RETRY = "the archive is cut short or damaged: copy or download it again"


def is_archive(source: Source) -> bool:
    """Whether a file is a tar archive, of whatever."""
    return source.head()[257:262] == b"ustar"


def recognises(source: Source) -> bool:
    """Whether a file is a tar archive with the members of this format."""
    return is_archive(source) and is_checkpoint(members_there(source))


def members(source: Source) -> Mapping[str, Span]:
    """The regular files of a tar archive, by name without a leading `./`."""
    import tarfile

    try:
        with tarfile.open(fileobj=Reader(source), mode="r:") as archive:
            return {
                entry.name.removeprefix("./"): Span(source, entry.offset_data, entry.size)
                for entry in archive
                if entry.isreg()
            }
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedError(
            f"is a damaged tar archive ({error})", where=source.name, hint=_RETRY
        ) from None


def members_there(source: Source) -> Mapping[str, Span]:
    """As `members`, as far as the file goes: the last one may be cut off."""
    import tarfile

    found = {}
    with contextlib.suppress(tarfile.TarError, EOFError, ValueError):
        for entry in tarfile.open(fileobj=Reader(source), mode="r:"):  # noqa: SIM115
            length = min(entry.size, source.size - entry.offset_data)
            if entry.isreg() and length >= 0:
                found[entry.name.removeprefix("./")] = Span(source, entry.offset_data, length)
    return found


def is_checkpoint(found: Mapping[str, Span]) -> bool:
    """Whether the members of a tar archive are those of this format."""
    return "pickle" in found and "storages" in found


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """The document in a tar archive. Members are read into memory only as far as pickles go."""
    return _read(source, members(source), Reading(limits))


def salvage(source: Source, found: Salvage) -> Document:
    """The same, of a file that may be cut short."""
    return _read(source, members_there(source), found)


def _read(source: Source, found: Mapping[str, Span], reading: Reading) -> Document:
    if not is_checkpoint(found):
        raise NotACheckpointError("is a tar archive, and not a checkpoint", where=source.name)
    refused = "torch.load refuses the container of 2017, unless weights_only=False is given"
    notes = [Finding("old-container", refused)]
    objects = _Objects(found, reading, notes)
    root, _ = pickles.read(
        found["pickle"].read(),
        objects.load,
        name=f"{source.name}: pickle",
        limits=reading.limits,
        builders={**BUILDERS, _TENSOR_V2: objects.tensor},
        notes=notes,
    )
    root = torch_legacy.without_views(root)
    return Document(root, NAME, source.name, source.size, notes=tuple(notes))


class _Objects:
    """The storages and tensors of an archive, by key."""

    def __init__(self, found: Mapping[str, Span], reading: Reading, notes: list[Finding]) -> None:
        self._notes = notes
        self._limits = reading.limits
        self._reading = reading
        self._storages: dict[str, Storage | StorageView] = {}
        self._tensors: dict[str, Tensor] = {}
        self._read_storages(found["storages"])
        if "tensors" in found:
            self._read_tensors(found["tensors"])

    def load(self, pid: Node) -> Node:
        """What a persistent id stands for."""
        if isinstance(pid, tuple) and len(pid) == 3 and type(pid[0]) is Global:
            return pid[0]
        if isinstance(pid, tuple):
            pid = parse_persistent_id(pid).key
        key = _key(pid)
        made = self._tensors.get(key) or self._storages.get(key)
        if made is None:
            raise DamagedError(f"no tensor or storage is called {key!r}")
        return made

    def tensor(self, args: Arguments, limits: Limits) -> Tensor | None:
        """A tensor; some writers describe its storage where its persistent id belongs."""
        if args and type(args[0]) is tuple:
            args = (self.load(args[0]), *args[1:])
        return torch_objects.tensor_v2(args, limits)

    def _read_storages(self, span: Span) -> None:
        try:
            self._read_each_storage(span, _Pickles(span, self._limits, self._notes))
        except DamagedError:
            if not self._reading.salvages:
                raise

    def _read_each_storage(self, span: Span, reader: _Pickles) -> None:
        for _ in range(reader.count()):
            key, device, cls = reader.row(3)
            dtype = BY_STORAGE.get(cls.name) if type(cls) is Global else None
            if dtype is None or type(device) is not str:
                raise UnsupportedError(
                    "the class of a storage is not known", where=span.source.name
                )
            (numel,) = reader.numbers("<q")
            storage = Storage(dtype, numel, device, key=_key(key))
            self._storages[storage.key] = storage
            if storage.nbytes > reader.remaining:
                self._reading.lose(storage, reader.too_short())
                return  # nothing follows what is cut off
            storage.spans = (reader.skip(storage.nbytes),)
        for view in reader.rest():
            key, root, offset, numel = view
            whole = self._storages.get(_key(root))
            if isinstance(whole, Storage):
                described = (None, offset, numel)
                self._storages[_key(key)] = torch_legacy.view(whole, described)

    def _read_tensors(self, span: Span) -> None:
        reader = _Pickles(span, self._limits, self._notes)
        for _ in range(reader.count()):
            key, storage, _ = reader.row(3)
            dimensions, _ = reader.numbers("<2i")
            if not 0 <= dimensions <= 64:
                raise DamagedError(f"a tensor of {dimensions} dimensions", where=span.source.name)
            shape = reader.numbers(f"<{dimensions}q")
            stride = reader.numbers(f"<{dimensions}q")
            (offset,) = reader.numbers("<q")
            layout = (offset, shape, stride)
            whole = self._storages.get(_key(storage))
            if whole is None and self._reading.salvages:
                whole = self._absent(_key(storage), shape, stride, offset)
            made = torch_objects.tensor(whole, None, layout, self._limits)
            if made is None:
                raise DamagedError(f"tensor {_key(key)!r} has no storage", where=span.source.name)
            self._tensors[_key(key)] = made

    def _absent(
        self, key: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> Storage:
        """What stands for a storage of which not even the description is there."""
        storage = Storage(BY_STORAGE["ByteStorage"], reach(offset, shape, stride), "cpu")
        self._reading.lose(storage, DamagedError(f"storage {key!r} is not described"))
        return storage


class _Pickles:
    """Reads a member that mixes pickles and raw bytes."""

    def __init__(self, span: Span, limits: Limits, notes: list[Finding]) -> None:
        self._span = span
        self._notes = notes
        self._data: Data = span.read()
        self._limits = limits
        self._position = 0

    def _next(self) -> Node:
        node, self._position = pickles.read(
            self._data,
            _refuse,
            name=self._span.source.name,
            start=self._position,
            limits=self._limits,
            notes=self._notes,
        )
        return node

    def count(self) -> int:
        """A pickled number of things to come."""
        found = self._next()
        if type(found) is not int or not 0 <= found <= len(self._data):
            raise DamagedError(
                "a count is not a number that fits", where=self._span.source.name, hint=_RETRY
            )
        return found

    def row(self, length: int) -> tuple[Node, ...]:
        """A pickled tuple of `length` values."""
        found = self._next()
        if type(found) is not tuple or len(found) != length:
            raise DamagedError(
                f"a row does not have {length} values", where=self._span.source.name, hint=_RETRY
            )
        return found

    def rest(self) -> list[tuple[Node, ...]]:
        """The pickled list at the end, where there is one: rows of four values."""
        found = self._next() if self._position < len(self._data) else []
        rows: list[Node] = found if isinstance(found, list) else [None]
        if not all(type(row) is tuple and len(row) == 4 for row in rows):
            raise DamagedError("views are described wrongly", where=self._span.source.name)
        return rows

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Raw numbers."""
        size = struct.calcsize(layout)
        if self._position + size > len(self._data):
            raise DamagedError("ends too soon", where=self._span.source.name, hint=_RETRY)
        found = struct.unpack_from(layout, self._data, self._position)
        self._position += size
        return found

    @property
    def remaining(self) -> int:
        """Bytes that are still to come."""
        return len(self._data) - self._position

    def too_short(self) -> DamagedError:
        """The error for bytes that go beyond the end."""
        return DamagedError("ends inside a storage", where=self._span.source.name, hint=_RETRY)

    def skip(self, length: int) -> Span:
        """The next bytes, as a span of the archive."""
        if not 0 <= length <= len(self._data) - self._position:
            raise self.too_short()
        span = self._span.slice(self._position, length)
        self._position += length
        return span


def _key(node: Node) -> str:
    """The key of a storage or tensor: text, or the address that it once had."""
    if type(node) is str or (type(node) is int and node.bit_length() <= 64):
        return str(node)
    raise DamagedError("a key is neither text nor a number", hint=_RETRY)


def _refuse(_: Node) -> Node:
    raise DamagedError("a persistent id stands where torch writes none")
