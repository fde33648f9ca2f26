"""The `.metadata` of a DCP folder: what each item of a checkpoint is, and where its bytes lie.

One pickle of protocol 4, of `Metadata`, whose state is

    state_dict_metadata  {name: TensorStorageMetadata(properties, size, chunks), …, with `chunks`
                         a list of ChunkStorageMetadata(offsets, sizes);
                          name: BytesStorageMetadata()}
    planner_data         {name: path}, a path being a tuple of keys (text) and of places in lists
                         (numbers), in the order of the state dict; absent, None, or without the
                         name where the writer did not take the state dict apart (Megatron)
    storage_data         {MetadataIndex(fqn, offset, index):
                          _StorageInfo(relative_path, offset, length, transform_descriptors)}
    storage_meta         who saved it; since 2.4
    version              "1.0.0"; since some version after 2.8

Fields that are None may be left out. `properties` is a tuple that begins with the dtype, which is
the dtype of all chunks; the other fields in it mean nothing. `index` is a hint, and means nothing
either: an item is found by name and offset. Classes were moved about (1.13 has them under
`torch.distributed._shard`), so they are known by name. torch 1.12 wrote other ones, which are
refused. Sources: `torch.distributed.checkpoint.metadata` and `.filesystem` of 1.13 to 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import CkptfixError, DamagedError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import plain_pickle
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles.dangerous import is_dangerous
from ckptfix.pickles.torch_objects import sizes
from ckptfix.pieces.boxes import Box
from ckptfix.tree.document import Global, Inert, Node
from ckptfix.tree.dtypes import BY_NAME, DType
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptfix.bytes.source import Source
    from ckptfix.pickles.torch_objects import Builder
    from ckptfix.tree.document import Document

CLASS = "Metadata"

_MANY = 1000
"""What a `.metadata` may say beside what it says of items, of which each is written for itself: a
few bytes can refer to one long list again and again, and each time it would be looked through."""
_DIMENSIONS = 64
_NAME = 255
"""Bytes of the name of a file, which no system lets be longer."""
_MODULE = "torch.distributed."

Offset = tuple[int, ...] | None
"""Where a chunk begins; None: the item is no tensor."""

Path = tuple[str | int, ...]


class Item(NamedTuple):
    """Where the bytes of an item lie: a slice of a file, and what was done to them."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class Whole(NamedTuple):
    """What the metadata says of a tensor; `boxes` are its chunks."""

    dtype: DType
    shape: tuple[int, ...]
    boxes: list[Box]


class Metadata(NamedTuple):
    """What a `.metadata` says. `wholes` has None for what is no tensor."""

    wholes: dict[str, Whole | None]
    items: dict[tuple[str, Offset], Item]
    paths: dict[str, Path]
    copies: dict[tuple[str, Offset], list[Item]]
    """Further items of the same name and place, which other ranks saved."""
    notes: tuple[Finding, ...] = ()
    """What was noticed."""


def is_metadata(node: Node) -> bool:
    """Whether the root of a pickle is a `Metadata`."""
    return type(node) is Inert and _is_class(node.function, CLASS)


def read(source: Source, limits: Limits = DEFAULT) -> Metadata:
    """What a `.metadata` says. Raises `ReadError` and its kin."""
    named: list[Global] = []
    document = plain_pickle.read(source, limits, _BUILDERS, named)
    try:
        return _of_root(document.root)._replace(notes=tuple(_notes(document, named, source)))
    except CkptfixError as error:
        raise error.within(source.name) from None


def _notes(document: Document, named: list[Global], source: Source) -> Iterator[Finding]:
    """What torch would run that reads it, whether anything comes of it or not."""
    yield from (note for note in document.notes if note.code == "hidden-call")
    calls = [name.today for name in named if name not in _BUILDERS and is_dangerous(name)]
    if calls:
        message = f"{source.name} names {listed(calls)}, which would run or reach out where torch"
        yield Finding("dangerous-globals", f"{message} loads it; ckptfix reads without running it")


def _size(args: tuple[Node, ...], limits: Limits) -> tuple[int, ...] | None:
    """`torch.Size((2, 3))`, of which there are hundreds of thousands: the tuple."""
    if len(args) != 1 or type(args[0]) is not tuple or len(args[0]) > _DIMENSIONS:
        return None
    return sizes(args[0])


def _as_it_is(args: tuple[Node, ...], limits: Limits) -> None:
    """What is kept as it was pickled."""


_CLASSES = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta",
    "ChunkStorageMetadata", "TensorProperties", "_StorageInfo", "_MEM_FORMAT_ENCODING",
    "MEM_FORMAT_ENCODING",
)  # fmt: skip
_MODULES = (
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.checkpoint.metadata",
    "torch.distributed._shard.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)  # fmt: skip
_BUILDERS: dict[Global, Builder] = {
    **{Global(module, name): _as_it_is for module in _MODULES for name in _CLASSES},
    Global("pathlib", "PosixPath"): _as_it_is,
    Global("torch", "Size"): _size,
}
"""What stands in every `.metadata`; only of one that names more are the names looked for."""


def _of_root(root: Node) -> Metadata:
    fields = _state(root, CLASS)
    if not isinstance(fields.get("storage_data"), dict):
        raise DamagedError("does not say where the bytes of any item lie")
    room = 2 * len(fields["storage_data"]) + _MANY
    wholes: dict[str, Whole | None] = {}
    for name, node in _pairs(fields, "state_dict_metadata"):
        whole = wholes[name] = _whole(node, room)
        room -= 0 if whole is None else len(whole.boxes)
    items: dict[tuple[str, Offset], Item] = {}
    for index, info in fields["storage_data"].items():
        found = _index(index)
        if found in items:
            raise UnsafeError(f"says twice where {_called(*found)} lies", code="piece-twice")
        items[found] = _item(info, found)
    paths = fields.get("planner_data")
    known = paths.items() if isinstance(paths, dict) else ()
    room = 100 * len(items) + _MANY
    of_names: dict[str, Path] = {}
    for name, path in known:
        if name in wholes:
            of_names[name] = _path(path, room)
            room -= len(path)
    return Metadata(wholes, items, of_names, {})


def merged(ranks: Sequence[Metadata]) -> Metadata:
    """What ranks say that saved without telling each other: each its own items.

    Raises `UnsafeError` where they speak of different tensors by one name.
    """
    first, *others = ranks
    for rank in others:
        first = first._replace(notes=(*first.notes, *rank.notes))
        for name, whole in rank.wholes.items():
            known = first.wholes.setdefault(name, whole)
            if known is whole:
                continue
            if known is None or whole is None or known[:2] != whole[:2]:
                raise UnsafeError(f"the ranks disagree about what {name!r} is")
            places = {box.offset for box in known.boxes}
            known.boxes.extend(box for box in whole.boxes if box.offset not in places)
        for index, item in rank.items.items():
            if first.items.setdefault(index, item) is not item:
                first.copies.setdefault(index, []).append(item)
        for name, path in rank.paths.items():
            if first.paths.setdefault(name, path) != path:
                raise UnsafeError(f"the ranks disagree about where {name!r} stands")
    return first


def _called(name: str, offset: Offset) -> str:
    return repr(name) if offset is None else f"the piece of {name!r} at {list(offset)}"


def _is_class(node: Node, name: str) -> bool:
    return type(node) is Global and node.name == name and node.module.startswith(_MODULE)


def _state(node: Node, name: str) -> dict[str, Node]:
    """The fields of an object of one of DCP's classes."""
    if type(node) is not Inert or not _is_class(node.function, name):
        what = str(node.function) if type(node) is Inert else type(node).__name__
        raise UnsupportedError(
            f"has {what} where {name} is expected",
            hint="save it anew with torch.distributed.checkpoint of torch 1.13 to 2.13",
        )
    if not isinstance(node.state, dict):
        raise DamagedError(f"describes a {name} wrongly")
    return node.state


def _pairs(fields: dict[str, Node], field: str) -> Iterator[tuple[str, Node]]:
    """The items of a field that maps names to something."""
    mapping = fields.get(field)
    if not isinstance(mapping, dict) or not all(type(name) is str for name in mapping):
        raise DamagedError(f"has no {field} that maps names")
    return iter(mapping.items())


def _whole(node: Node, room: int) -> Whole | None:
    """What is said of a tensor, of which there are no more than `room` pieces."""
    if type(node) is Inert and _is_class(node.function, "BytesStorageMetadata"):
        if isinstance(node.state, dict) and "storage_key" in node.state:
            raise _too_old()
        return None
    if type(node) is Inert and _is_class(node.function, "ShardedTensorStorageMetadata"):
        raise _too_old()
    fields = _state(node, "TensorStorageMetadata")
    if "storage_key" in fields:
        raise _too_old()
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise DamagedError("has a tensor without a list of chunks")
    if len(chunks) > room:
        raise UnsafeError("has more chunks than it says of where they lie", code="piece-missing")
    boxes = []
    for chunk in chunks:
        box = _state(chunk, "ChunkStorageMetadata")
        boxes.append(Box(_sizes(box.get("offsets")), _sizes(box.get("sizes"))))
    return Whole(dtype_in(fields.get("properties")), _sizes(fields.get("size")), boxes)


def _too_old() -> UnsupportedError:
    return UnsupportedError(
        "was written by torch 1.12, which had another format",
        hint="save it anew with torch 1.13 or later",
    )


def _sizes(node: Node) -> tuple[int, ...]:
    found = sizes(node) if type(node) is tuple and len(node) <= _DIMENSIONS else None
    if found is None:
        raise DamagedError("has something else where a torch.Size is expected")
    return found


def dtype_in(node: Node) -> DType:
    """The dtype in a `TensorProperties`, which is pickled as a tuple."""
    if type(node) is not Inert or not _is_class(node.function, "TensorProperties"):
        raise UnsupportedError("has a tensor without TensorProperties")
    named = node.state[0] if type(node.state) is tuple and node.state else None
    dtype = BY_NAME.get(named.name) if type(named) is Global and named.module == "torch" else None
    if dtype is None:
        raise UnsupportedError(f"has a tensor of the unknown dtype {named}")
    return dtype


def _index(node: Node) -> tuple[str, Offset]:
    fields = _state(node, "MetadataIndex")
    name, offset = fields.get("fqn"), fields.get("offset")
    if type(name) is not str:
        raise DamagedError("has an item without a name")
    return name, None if offset is None else _sizes(offset)


def _item(node: Node, index: tuple[str, Offset]) -> Item:
    fields = _state(node, "_StorageInfo")
    file, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    transforms = fields.get("transform_descriptors") or ()
    if type(file) is not str or not _is_plain(file):
        raise UnsafeError(
            f"puts {_called(*index)} in {repr(file)[:_NAME]}, "
            "which is not a name of a file beside it",
            hint="a piece lies in a file like __0_0.distcp, without a path",
            code="piece-name",
        )
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise UnsafeError(f"puts {_called(*index)} at byte {offset} of {length}")
    known = isinstance(transforms, (list, tuple)) and len(transforms) <= _MANY
    if not known or not all(type(one) is str for one in transforms):
        raise DamagedError(f"says wrongly what the bytes of {_called(*index)} went through")
    return Item(file, offset, length, tuple(transforms))


def _is_plain(name: str) -> bool:
    """Whether a name stays in its folder on every system."""
    return (
        len(name) <= _NAME
        and name.isprintable()
        and name == name.rstrip(". ")
        and name != ""
        and not set(name) & set('/\\:*?"<>|')
    )


def _path(node: Node, room: int) -> Path:
    if type(node) is tuple and len(node) > room:
        raise UnsafeError("has paths of too many keys")
    if type(node) is not tuple or not node or not all(type(part) in (str, int) for part in node):
        raise DamagedError("has an item whose path is not made of keys and numbers")
    return node
