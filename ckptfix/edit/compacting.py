"""Storages cut to what their tensors use: a view saves its whole storage, however little it shows.

What a tensor uses is its extent, from the first of its bytes to the last. Extents that overlap are
one segment, and the segments of a storage, one after another, are the storage that remains. So
tensors that share a storage share one afterwards, and those that overlap overlap as before. Bytes
are cut, not decoded, with one exception: a tensor that is alone in its segment and skips bytes in
it (a column of a matrix) is made row-major when it is written.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.checked import CheckedSource
from ckptfix.bytes.span import Span, cut
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.contents import labels
from ckptfix.tree.document import Storage, Tensor, contiguous_stride, extent
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.bytes.engine import Label
    from ckptfix.tree.document import Document, Node


class Segment(NamedTuple):
    """A stretch of a storage, in bytes, and the tensors that lie in it."""

    begin: int
    end: int
    tensors: list[Tensor]


def compact(document: Document) -> tuple[Document, int]:
    """The document with every storage cut to what its tensors use, and how many bytes that saves.

    A storage that stands in the tree itself, as that of a quantized tensor does, is left whole.
    """
    users, whole = _users(document.root)
    changed: dict[int, Tensor] = {}
    saved = 0
    for tensors in users.values():
        storage = tensors[0].storage
        named = partial(labels.label, document.root, storage)
        if id(storage) not in whole:
            smaller = _compacted(tensors, named, gather=document.byteorder == "little")
            changed.update(smaller)
            saved += storage.nbytes - next(iter(smaller.values())).storage.nbytes if smaller else 0
    if not changed:
        return document, 0
    root = rebuild(document.root, lambda node: changed.get(id(node), node))
    return replace(document, root=root), saved


def _users(root: Node) -> tuple[dict[int, list[Tensor]], set[int]]:
    """The tensors of each storage, and the storages that are used without one."""
    users: dict[int, list[Tensor]] = {}
    whole: set[int] = set()
    for _, node in walk(root):
        if isinstance(node, Tensor):
            users.setdefault(id(node.storage), []).append(node)
        elif isinstance(node, Storage):
            whole.add(id(node))
    return users, whole


def segments(tensors: Iterable[Tensor]) -> list[Segment]:
    """The stretches of a storage that its tensors use, in order; empty tensors use none.

    They begin and end where an element of the largest dtype among them could.
    """
    used = [tensor for tensor in tensors if tensor.numel]
    unit = max((user.dtype.itemsize for t in used for user in (t, t.storage)), default=1)
    found: list[Segment] = []
    for tensor in sorted(used, key=extent):
        begin, end = extent(tensor)
        begin, end = begin - begin % unit, min(end + -end % unit, tensor.storage.nbytes)
        if found and begin < found[-1].end:
            last = found.pop()
            found.append(Segment(last.begin, max(end, last.end), [*last.tensors, tensor]))
        else:
            found.append(Segment(begin, end, [tensor]))
    return found


def gathered(tensor: Tensor, byteorder: str = "little", label: Label = "") -> Span:
    """The elements of a tensor in row-major order, little-endian, gathered when they are read."""
    import numpy as np  # noqa: F401 - now, and not while an output is half written

    dtype = tensor.dtype
    bits = tensor.metadata if isinstance(tensor.metadata, dict) else {}
    is_complex = dtype.name.startswith("complex")
    layout = Layout(
        tensor.shape,
        tensor.stride,
        tensor.offset,
        dtype.itemsize,
        dtype.word,
        swap=byteorder != "little" and dtype.word > 1,
        conj=is_complex and bool(bits.get("conj")),
        neg=(is_complex or dtype.is_floating_point) and bool(bits.get("neg")),
    )
    storage = checked(tensor.storage, label)
    source = StridedSource(storage.spans, layout, f"storage {storage.key!r}")
    return Span(source, 0, tensor.nbytes)


def checked(storage: Storage, label: Label = "") -> Storage:
    """The same storage, of which parts are used: they are held against the checksums on record.

    `label` is what messages call its bytes.
    """
    label = label or f"storage {storage.key!r}"
    spans = (
        span
        if span.crc is None or isinstance(span.source, CheckedSource)
        else Span(CheckedSource(span, label), span.offset, span.length)
        for span in storage.spans
    )
    return replace(storage, spans=tuple(spans))


def is_sparse(segment: Segment) -> bool:
    """Whether a tensor is alone in a segment and leaves a part of it out."""
    return len(segment.tensors) == 1 and segment.tensors[0].nbytes < segment.end - segment.begin


def _compacted(tensors: list[Tensor], named: Label, *, gather: bool) -> dict[int, Tensor]:
    """What becomes of each tensor of one storage, by id; empty where nothing can be saved."""
    storage = checked(tensors[0].storage, named)
    smaller = replace(storage, numel=0, spans=())
    gather = gather and len({tensor.dtype.itemsize for tensor in tensors}) == 1
    empty = [tensor for tensor in tensors if not tensor.numel]
    moved = {id(tensor): replace(tensor, storage=smaller, offset=0) for tensor in empty}
    position = 0
    for segment in segments(tensors):
        begin, end, users = segment
        if gather and is_sparse(segment):
            smaller.spans += (gathered(replace(users[0], storage=storage, metadata=None)),)
            moved[id(users[0])] = _row_major_at(users[0], smaller, position)
        else:
            smaller.spans += cut(storage.spans, begin, end - begin)
            moved.update((id(user), _shifted(user, smaller, position - begin)) for user in users)
        position = sum(span.length for span in smaller.spans)
    smaller.numel = position // storage.dtype.itemsize
    return moved if position < storage.nbytes else {}


def _shifted(tensor: Tensor, storage: Storage, shift: int) -> Tensor:
    """The same view of another storage, `shift` bytes further on."""
    offset = tensor.offset + shift // tensor.dtype.itemsize
    return replace(tensor, storage=storage, offset=offset)


def _row_major_at(tensor: Tensor, storage: Storage, position: int) -> Tensor:
    """The tensor as its elements lie in a storage from byte `position`, in row-major order."""
    offset = position // tensor.dtype.itemsize
    stride = contiguous_stride(tensor.shape)
    return replace(tensor, storage=storage, stride=stride, offset=offset)
