"""Casting the floating-point tensors of state dicts, while they are written.

Integers, booleans, complex and quantized tensors stay as they are; so does everything outside state
dicts, an optimizer's state too. A cast storage holds what its tensors use and nothing else; tensors
that shared one share one afterwards, and names of one tensor stay names of one tensor.

Bytes are cast a chunk at a time when they are read, by torch, on the CPU, as `Tensor.to` does it.
What a cast loses is counted on the way, so it is known once the document is written.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.source import ComputedSource, Source
from ckptfix.bytes.span import Span, cut
from ckptfix.edit.compacting import checked, is_sparse, row_major, segments
from ckptfix.errors import UnsupportedError
from ckptfix.tree.document import Global, Inert, OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME, DType
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import storages, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.edit.compacting import Segment
    from ckptfix.tree.document import Document, Node

ALIASES = {
    "fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32",
    "fp16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip
CAST_TO = tuple(
    name
    for name, dtype in BY_NAME.items()
    if dtype.is_floating_point and name != "float8_e8m0fnu"  # which has no sign
)
"""The dtypes that can be cast to, by name."""

_WITHOUT_INFINITY = {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"}


class Losses(NamedTuple):
    """How many values a cast could not keep."""

    overflow: int = 0
    """Beyond the range of the new dtype: infinite, NaN or its largest number now."""
    underflow: int = 0
    """Zero now, and not before."""
    nan: int = 0
    """NaN before; NaN now too."""


class Counted(NamedTuple):
    """A stretch of elements, the last of which is not in it, and what was lost in it."""

    first: int
    last: int
    losses: Losses


@dataclass(frozen=True, eq=False)
class Cast:
    """One tensor, or several that overlap, cast from one dtype to another."""

    keys: tuple[str, ...]
    before: DType
    after: DType
    numel: int
    counted: list[Counted] = field(default_factory=list)
    """What was cast so far, in order, without overlaps: each element is counted once, in whatever
    pieces and however often it is written."""

    @property
    def losses(self) -> Losses:
        """What was lost, as far as the tensor has been written."""
        return Losses(*map(sum, zip(*(c.losses for c in self.counted), strict=True)))

    def uncounted(self, first: int, last: int) -> list[tuple[int, int]]:
        """The stretches of these elements that were not counted yet."""
        found = []
        for done in self.counted:
            if first < min(done.first, last):
                found.append((first, min(done.first, last)))
            first = max(first, done.last)
        return [*found, (first, last)] if first < last else found

    def count(self, first: int, last: int, losses: Losses) -> None:
        """Keep what was lost in elements that were not counted yet, joined to its neighbours."""
        joined: list[Counted] = []
        for row in sorted([*self.counted, Counted(first, last, losses)]):
            if joined and joined[-1].last == row.first:
                before = joined.pop()
                total = Losses(*map(sum, zip(before.losses, row.losses, strict=True)))
                row = Counted(before.first, row.last, total)
            joined.append(row)
        self.counted[:] = joined


class CastSource(Source):
    """Elements of `spans` as another dtype, cast when they are read."""

    def __init__(self, spans: Sequence[Span], cast: Cast, byteorder: str) -> None:
        self.name = cast.keys[0]
        self.size = cast.numel * cast.after.itemsize
        self.cast = cast
        self._spans = spans
        self._byteorder = byteorder
        self._computed = any(isinstance(span.source, ComputedSource) for span in spans)
        self._held: bytes | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; elements that this cuts are cast whole."""
        size = self.cast.after.itemsize
        first, last = offset // size, -(-(offset + length) // size)
        data = _cast(self._elements(first, last), first, self.cast, self._byteorder)
        start = offset - first * size
        return data[start : start + length]

    def _elements(self, first: int, last: int) -> bytes:
        """Bytes before the cast. What is computed is computed once and held until it is used."""
        size = self.cast.before.itemsize
        if not self._computed:
            return b"".join(s.read() for s in cut(self._spans, first * size, (last - first) * size))
        if self._held is None:
            self._held = b"".join(span.read() for span in self._spans)
        data = self._held[first * size : last * size]
        if last >= self.cast.numel:
            self._held = None
        return data


def _cast(data: bytes, first: int, cast: Cast, byteorder: str) -> bytes:
    """Elements from the `first` on, cast in the same byte order; what is lost is counted."""
    import torch

    if not data:
        return b""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    before = _swapped(raw, cast.before, byteorder).view(getattr(torch, cast.before.name))
    after = before.to(getattr(torch, cast.after.name))
    made = _swapped(after.view(torch.uint8), cast.after, byteorder)
    for begin, end in cast.uncounted(first, first + len(before)):
        new = slice(begin - first, end - first)
        cast.count(begin, end, _losses(before[new], after[new], cast.after))
    return ctypes.string_at(made.data_ptr(), made.nbytes)


def _swapped(raw: torch.Tensor, dtype: DType, byteorder: str) -> torch.Tensor:
    """Bytes from one byte order to this machine's, or back."""
    if byteorder == sys.byteorder or dtype.word == 1:
        return raw
    return raw.view(-1, dtype.word).flip(1).reshape(-1)


def _losses(before: torch.Tensor, after: torch.Tensor, dtype: DType) -> Losses:
    import torch

    if before.dtype.itemsize == 1:  # float8 has no comparisons of its own
        before = before.to(torch.float32)
    widened = after.to(torch.float32) if after.dtype.itemsize == 1 else after
    overflow = before.isfinite() & ~widened.isfinite()
    if dtype.name in _WITHOUT_INFINITY:
        overflow = overflow | (before.abs() > torch.finfo(after.dtype).max)
    underflow = (before != 0) & (widened == 0)
    return Losses(*(int(which.sum()) for which in (overflow, underflow, before.isnan())))


# --- the edit


def dtype_of(name: object) -> DType:
    """The dtype to cast to: `float16`, `fp16`, `torch.float16`. Raises `UnsupportedError`."""
    wanted = str(name).removeprefix("torch.").lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in CAST_TO:
        raise UnsupportedError(
            "is not a floating-point dtype to cast to",
            where=name,
            hint=f"take one of {', '.join(CAST_TO)}",
            code="dtype",
        )
    return BY_NAME[wanted]


class _User(NamedTuple):
    """What stands in one or more state dicts: the node, the tensor behind it, its keys."""

    node: Node
    tensor: Tensor
    keys: list[str]


def cast(document: Document, states: Iterable[StateDict], dtype: DType) -> Document:
    """The document with the floating-point tensors of some of its state dicts cast to `dtype`.

    Nothing is decoded yet: `casts` says what was lost, once the document is written.
    """
    states = list(states)
    groups: dict[tuple[int, DType], list[_User]] = {}
    for user in _users(states):
        if user.tensor.dtype.is_floating_point and user.tensor.dtype is not dtype:
            groups.setdefault((id(user.tensor.storage), user.tensor.dtype), []).append(user)
    new: dict[int, Node] = {}
    for users in groups.values():
        made = _cast_storage(users, dtype, document.byteorder)
        new.update((id(u.node), _rewrapped(u.node, made[id(u.tensor)])) for u in users)
    changed: dict[int, Node] = {}
    for state in states:
        changed.update(_replaced(state, new))
    return replace(document, root=rebuild(document.root, lambda node: changed.get(id(node), node)))


def _replaced(state: StateDict, new: dict[int, Node]) -> dict[int, Node]:
    """What stands for what, by id: the mapping; or, in a pickled model, each tensor in its place.

    Where a tensor of a mapping stands elsewhere too, it stays there as it was.
    """
    if state.origin is not None:
        return {id(node): new[id(node)] for node in state.mapping.values() if id(node) in new}
    items = {key: new.get(id(node), node) for key, node in state.mapping.items()}
    if isinstance(state.mapping, OrderedMap):
        items = OrderedMap(items, state.mapping.attributes)
    return {id(state.mapping): items}


def casts(document: Document) -> list[Cast]:
    """What is cast in a document, in the order in which it is written."""
    return [source.cast for source in _sources(document)]


def measure(document: Document) -> None:
    """Cast everything without writing it, so that the losses are known."""
    for source in _sources(document):
        for _ in Span(source, 0, source.size).chunks():
            pass


def others(document: Document, dtype: DType) -> int:
    """How many floating-point tensors are of another dtype: outside state dicts, or sparse."""
    nodes = (node for _, node in walk(document.root) if isinstance(node, Tensor))
    return sum(node.dtype.is_floating_point and node.dtype is not dtype for node in nodes)


def _sources(document: Document) -> list[CastSource]:
    spans = (span for storage in storages(document.root) for span in storage.spans)
    return [span.source for span in spans if isinstance(span.source, CastSource)]


def _users(states: Iterable[StateDict]) -> Iterable[_User]:
    users: dict[int, _User] = {}
    for state in states:
        prefix = "" if state.path == "/" else f"{state.path}/"
        for key, tensor in state.tensors.items():
            node = state.mapping[key]
            users.setdefault(id(node), _User(node, tensor, [])).keys.append(prefix + key)
    return users.values()


def _cast_storage(users: list[_User], dtype: DType, byteorder: str) -> dict[int, Tensor]:
    """What becomes of each of the tensors, by id: all of one storage, and of one dtype."""
    tensors = {id(user.tensor): user.tensor for user in users}
    storage = checked(users[0].tensor.storage)
    new = Storage(dtype, 0, storage.device, (), storage.key)
    made = {name: replace(t, storage=new, dtype=dtype, offset=0) for name, t in tensors.items()}
    for segment in segments(tensors.values()):
        dense = byteorder == "little" and is_sparse(segment)
        for tensor in segment.tensors:
            within = tensor.offset - segment.begin // tensor.dtype.itemsize
            made[id(tensor)].offset = new.numel + (0 if dense else within)
            if dense:
                made[id(tensor)].stride = contiguous_stride(tensor.shape)
        spans = _bytes_of(segment, storage, dense=dense)
        source = CastSource(spans, _described(segment, users, spans, dtype), byteorder)
        new.spans += (Span(source, 0, source.size),)
        new.numel += source.cast.numel
    return made


def _bytes_of(segment: Segment, storage: Storage, *, dense: bool) -> tuple[Span, ...]:
    if dense:
        return (row_major(segment.tensors[0], storage),)
    return cut(storage.spans, segment.begin, segment.end - segment.begin)


def _described(segment: Segment, users: list[_User], spans: Sequence[Span], dtype: DType) -> Cast:
    before = segment.tensors[0].dtype
    inside = set(map(id, segment.tensors))
    keys = tuple(key for user in users if id(user.tensor) in inside for key in user.keys)
    return Cast(keys, before, dtype, sum(span.length for span in spans) // before.itemsize)


def _rewrapped(node: Node, tensor: Tensor) -> Node:
    """A parameter over another tensor; what wraps one in another way becomes a plain tensor."""
    if isinstance(node, Inert) and node.function in _PARAMETERS:
        return replace(node, args=(tensor, *node.args[1:]))
    return tensor


_PARAMETERS = tuple(
    Global("torch._utils", f"_rebuild_parameter{kind}") for kind in ("", "_with_state")
)
