"""Writing a checkpoint into a DCP folder; `dcp` and `dcp_metadata` describe the format.

What one rank would have saved: `torch.distributed.checkpoint.load` gives each of any number of
ranks its pieces of it. The checkpoint is taken apart as torch does it: mappings and lists that hold
mappings or tensors are opened, their keys joined by dots; each tensor is an item, row-major or
strided as it lies, without the rest of its storage, and tagged `cpu`; anything else is an item as
`torch.save` writes it. Keys become text. Where torch drops an empty mapping, it is kept here, as an
item.

The files of items have names that are free, `.metadata` is written last and names them, and only
then is what was there before removed. So the folder holds the old checkpoint or the new one, whole;
where the old one was shards, there is a moment at which it holds both, which readers refuse.
Sources: `torch.distributed.checkpoint` 2.13 (`_traverse`, `filesystem`, `default_planner`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import pickles
from ckptfix.bytes.checked import CheckedSource
from ckptfix.bytes.span import Span, cut
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.contents.tensors import as_tensor, is_array
from ckptfix.errors import CkptfixError, UnsafeError, UnsupportedError, VerifyError
from ckptfix.formats import torch_zip
from ckptfix.hints import Hint, command
from ckptfix.layouts import companions, dcp, dcp_metadata, shard_writer
from ckptfix.limits import DEFAULT
from ckptfix.tree import compare
from ckptfix.tree.document import (
    Document,
    Global,
    Inert,
    Node,
    OrderedMap,
    Storage,
    Tensor,
    contiguous_stride,
    extent,
    kind,
)
from ckptfix.tree.rebuild import REOPENED
from ckptfix.tree.walk import LEAVES, storages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptfix.bytes.copy import Checked, Sink
    from ckptfix.bytes.place import Place, Progress
    from ckptfix.layouts.dcp_metadata import Item, Path

_DEPTH = 500
"""Containers within one another, at most: torch takes a checkpoint apart by recursion."""

_GROWTH = 16
"""How many times its own size a checkpoint may take, if that is much: what shares bytes is written
as often as it is there."""


# --- taken apart


class Parts(NamedTuple):
    """A checkpoint taken apart: values by their names, where each stands, and what is lost."""

    items: dict[str, Node]
    paths: dict[str, Path]
    lost: list[tuple[str, str]]
    """Path and kind of what no DCP folder can hold."""


def take_apart(document: Document) -> Parts:
    """The items of a document. Raises `UnsupportedError` where it cannot be taken apart."""
    if not isinstance(document.root, dict):
        raise UnsupportedError(
            f"is a {kind(document.root)}, and a DCP folder holds a mapping",
            where=document.name,
            hint=Hint(
                "write its weights",
                command(
                    "convert", document.name, f"{document.name}.dcp/", to="dcp", weights_only=True
                ),
            ),
        )
    parts = Parts({}, {}, [(name, "record of the archive") for name in document.extras])
    seen: set[int] = set()
    again = 0
    tied: dict[object, str] = {}
    pending: list[Iterator[tuple[Path, Node]]] = [_opened((), document.root, parts)]
    while pending:
        for path, node in pending[-1]:
            if not _is_open(node):
                _keep(path, node, parts, tied, document)
                continue
            again += len(node) if id(node) in seen else 0
            seen.add(id(node))
            if len(pending) > _DEPTH or again > REOPENED:
                what = "holds itself, or too much within one another, for a DCP folder"
                raise UnsupportedError(f"{_spelled(path)!r} {what}", where=document.name)
            pending.append(_opened(path, node, parts))
            break
        else:
            pending.pop()
    return parts


def _spelled(path: Path) -> str:
    return "/".join(map(str, path))


def _is_open(node: Node) -> bool:
    """Whether a node is taken apart, and not an item."""
    if isinstance(node, dict):
        return bool(node) and all(type(key) in LEAVES for key in node)
    return type(node) is list and _holds_more(node)


def _holds_more(row: list[Node]) -> bool:
    """Whether a list holds a tensor or a mapping, in lists of any depth."""
    pending, seen = [row], {id(row)}
    for one in pending:
        for node in one:
            if isinstance(node, dict) or _tensor(node) is not None:
                return True
            if type(node) is list and id(node) not in seen:
                seen.add(id(node))
                pending.append(node)
    return False


def _opened(path: Path, node: Node, parts: Parts) -> Iterator[tuple[Path, Node]]:
    if isinstance(node, list):
        return (((*path, place), value) for place, value in enumerate(node))
    where = _spelled(path) or "/"
    if not all(type(key) is str for key in node):
        parts.lost.append((where, "keys that are not text, and become text"))
    attributes = node.attributes if isinstance(node, OrderedMap) else None
    if attributes:
        names = ", ".join(map(str, attributes)) if isinstance(attributes, dict) else "attributes"
        parts.lost.append((where, f"{names} of the state dict"))
    return (((*path, str(key)), value) for key, value in node.items())


def _keep(
    path: Path, node: Node, parts: Parts, tied: dict[object, str], document: Document
) -> None:
    name = ".".join(map(str, path))
    if name in parts.items:
        raise UnsupportedError(
            f"{_spelled(path)!r} and {_spelled(parts.paths[name])!r} are both {name!r} in a DCP "
            "folder, which joins keys by dots",
            where=document.name,
            hint="rename one of them",
        )
    tensor = _tensor(node)
    if tensor is not None:
        known = tied.setdefault(tensor.view, name) if tensor.numel else name
        if known != name:
            parts.lost.append((_spelled(path), f"its tie with {known}"))
    parts.items[name] = node if tensor is None else _alone(tensor, name)
    parts.paths[name] = path


def _tensor(node: Node) -> Tensor | None:
    """The tensor that a node is for torch; an array of numpy is none."""
    return None if is_array(node) else as_tensor(node)


def _alone(tensor: Tensor, name: str) -> Tensor:
    """A tensor over a storage of its own, as DCP clones those that are views."""
    nbytes = tensor.nbytes
    storage = Storage(tensor.dtype, tensor.numel, "cpu", (), name)
    made = replace(tensor, storage=storage, offset=0, requires_grad=False, hooks=None)
    if not nbytes:
        return made
    begin, end = extent(tensor)
    if (begin, end) == (0, tensor.storage.nbytes) and end == nbytes:
        storage.spans = tensor.storage.spans
        return made
    spans = tuple(
        span if span.crc is None else Span(CheckedSource(span, repr(name)), *span[1:3])
        for span in tensor.storage.spans
    )
    if end - begin == nbytes:
        storage.spans = cut(spans, begin, nbytes)
        return made
    import numpy as np  # noqa: F401 - now, and not while an output is half written

    size, word = tensor.dtype.itemsize, tensor.dtype.word
    layout = Layout(tensor.shape, tensor.stride, tensor.offset, size, word)
    storage.spans = (Span(StridedSource(spans, layout, repr(name)), 0, nbytes),)
    made.stride = contiguous_stride(tensor.shape)
    return made


def _check_growth(document: Document, parts: Parts) -> None:
    """Refuse a few bytes that would fill a disk."""
    whole = sum(storage.nbytes for storage in storages(document.root))
    total = sum(sum(held.nbytes for held in storages(item)) for item in parts.items.values())
    if total > max(_GROWTH * whole, whole + DEFAULT.repeated_bytes):
        raise UnsafeError(
            f"would take {total} bytes in a DCP folder, which has no ties, and has {whole}",
            where=document.name,
            hint=Hint(
                "write a .pt file instead: give OUT the extension .pt",
                python="save it to a .pt file instead",
            ),
        )


# --- written


def check_free(folder: Place, *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError`."""
    shard_writer.check_free(folder, force=force)


def write(
    document: Document,
    folder: Place,
    *,
    force: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
    texts: Iterable[Place] = (),
) -> Checked:
    """Write a checkpoint as one rank would save it; what is asked is as in `shard_writer.write`.

    Raises `UnsupportedError` for what cannot be taken apart, `WriteError` and its kin.
    """
    parts = take_apart(document)
    _check_growth(document, parts)
    with shard_writer.replaced(document, folder, _named, force=force) as (former, written):
        name = next(name for n in count() if (name := f"__0_{n}{dcp.SUFFIX}") not in former.names)
        written += filter(None, (companions.carry(text, folder) for text in texts))
        places: dict[str, Item] = {}
        with folder.below(name).publish(force=True, progress=progress, verify=verify) as sink:
            written.append(name)
            for key in sorted(parts.items, key=lambda key: isinstance(parts.items[key], Tensor)):
                begin = sink.position
                _write_item(parts.items[key], key, document, sink)
                places[key] = dcp_metadata.Item(name, begin, sink.position - begin)
        check = partial(_check, folder, parts)
        with folder.below(dcp.METADATA).publish(force=True, check=check, verify=verify) as told:
            told.write(pickles.write(_metadata(parts, places))[0])
        written.append(dcp.METADATA)
    return sink.result


def _write_item(item: Node, key: str, document: Document, sink: Sink) -> None:
    whole = Document(item, torch_zip.NAME, document.name, byteorder=document.byteorder)
    torch_zip.write(whole, sink, key)


def _check(folder: Place, parts: Parts, written: Place) -> None:
    """Read a folder back through a `.metadata` that has another name yet."""
    try:
        found = dcp.leaves(folder, written)
    except CkptfixError as error:
        raise VerifyError(f"does not read back: {error}", where=folder) from error
    for name, item in parts.items.items():
        value = found.get(parts.paths[name], _Nothing)
        differs = compare.difference(item, value)
        if differs is not None or len(found) != len(parts.items):
            raise VerifyError(f"reads back differently at {name}{differs or ''}", where=folder)


class _Nothing:
    """Stands for what was not read back."""


def _named(folder: Place, _: object) -> Iterable[str]:
    """The files that the `.metadata` of a folder names; none where it cannot be read."""
    try:
        told = dcp_metadata.read(folder.below(dcp.METADATA).open())
    except CkptfixError:
        return ()
    return [item.file for item in told.items.values()]


# --- what is where


def _metadata(parts: Parts, places: dict[str, Item]) -> Node:
    """The `Metadata` of items, each of one piece. What is alike is one object."""
    made = _Objects()
    wholes = {
        name: made.whole(item) if isinstance(item, Tensor) else made.BYTES
        for name, item in parts.items.items()
    }
    data = {made.index(name, parts.items[name]): made.info(place) for name, place in places.items()}
    fields = {
        "state_dict_metadata": wholes,
        "planner_data": dict(parts.paths),
        "storage_data": data,
        "storage_meta": None,
    }
    return _object("Metadata", fields)


_METADATA = "torch.distributed.checkpoint.metadata"


def _object(name: str, state: Node, module: str = _METADATA) -> Inert:
    return Inert(Global(module, name), (), None, "newobj", has_state=True, state=state)


class _Objects:
    """Makes the objects of a `.metadata`."""

    BYTES = _object("BytesStorageMetadata", {})

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, ...], Inert] = {}
        self._wholes: dict[tuple[str, tuple[int, ...]], Inert] = {}
        layout = Global("torch.serialization", "_get_layout")
        self._layout = Inert(layout, ("torch.strided",))
        self._format = Inert(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))

    def size(self, numbers: tuple[int, ...]) -> Inert:
        """A `torch.Size`."""
        known = self._sizes.get(numbers)
        if known is None:
            known = self._sizes[numbers] = Inert(Global("torch", "Size"), (numbers,))
        return known

    def whole(self, tensor: Tensor) -> Inert:
        """What is said of a tensor of one piece."""
        alike = (tensor.dtype.name, tensor.shape)
        known = self._wholes.get(alike)
        if known is None:
            dtype = Global("torch", tensor.dtype.name)
            properties = (dtype, self._layout, False, self._format, False)
            size, origin = self.size(tensor.shape), self.size((0,) * len(tensor.shape))
            state = {
                "properties": _object("TensorProperties", properties),
                "size": size,
                "chunks": [_object("ChunkStorageMetadata", {"offsets": origin, "sizes": size})],
            }
            known = self._wholes[alike] = _object("TensorStorageMetadata", state)
        return known

    def index(self, name: str, item: Node) -> Inert:
        """What an item is looked up by."""
        state: dict[str, Node] = {"fqn": name, "index": None}
        if isinstance(item, Tensor):
            state.update(index=0, offset=self.size((0,) * len(item.shape)))
        return _object("MetadataIndex", state)

    def info(self, place: Item) -> Inert:
        """Where an item lies."""
        state = {"relative_path": place.file, "offset": place.offset, "length": place.length}
        return _object("_StorageInfo", state, "torch.distributed.checkpoint.filesystem")
