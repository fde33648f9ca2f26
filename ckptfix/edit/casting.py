"""Casting the floating-point tensors of state dicts, while they are written.

Integers, booleans, complex and quantized tensors stay as they are; so does everything outside state
dicts, an optimizer's state too. A cast storage holds what its tensors use and nothing else; tensors
that shared one share one afterwards, and names of one tensor stay names of one tensor.

Bytes are cast a block at a time when they are read, as `Tensor.to` does it on the CPU (see
`floats`). What a cast loses is counted on the way, so it is known once the document is written.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.engine import blocks, in_order, look
from ckptfix.bytes.span import MadeSource, Span, cut
from ckptfix.edit import edits
from ckptfix.edit.compacting import checked, gathered, is_sparse, segments
from ckptfix.errors import UnsupportedError
from ckptfix.tree import floats
from ckptfix.tree.document import Global, Inert, OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME, DType
from ckptfix.tree.floats import Losses
from ckptfix.tree.walk import storages, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.edit.compacting import Segment
    from ckptfix.tree.document import Document, Node

ALIASES = {
    "fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32",
    "fp16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip
CAST_TO = tuple(name for name in BY_NAME if name in floats.FORMS)
"""The dtypes that can be cast to, by name."""


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
        total = Losses()
        for row in self.counted:
            total = total.plus(row.losses)
        return total

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
                row = Counted(before.first, row.last, before.losses.plus(row.losses))
            joined.append(row)
        self.counted[:] = joined


class CastSource(MadeSource):
    """Elements of `spans` as another dtype, cast when they are read."""

    def __init__(self, spans: Sequence[Span], cast: Cast, byteorder: str) -> None:
        self.name = cast.keys[0]
        self.size = cast.numel * cast.after.itemsize
        self.cast = cast
        self._spans = spans
        self._byteorder = byteorder
        self._lock = allocate_lock()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; elements that this cuts are cast whole."""
        size = self.cast.after.itemsize
        first, last = offset // size, -(-(offset + length) // size)
        made = bytearray((last - first) * size)
        self._fill(first, memoryview(made))
        start = offset - first * size
        return bytes(made[start : start + length])

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`."""
        size = self.cast.after.itemsize
        if offset % size or len(buffer) % size:
            buffer[:] = self.read(offset, len(buffer))
        else:
            self._fill(offset // size, buffer)

    def _fill(self, first: int, buffer: memoryview) -> None:
        """Cast elements from the `first` on into a buffer, as many as that takes."""
        cast, size = self.cast, self.cast.after.itemsize
        count, losses = len(buffer) // size, Losses()
        for start in range(0, count, floats.PIECE):
            stop = min(start + floats.PIECE, count)
            made = floats.words(buffer[start * size : stop * size], size, sys.byteorder)
            numbers = self._numbers(first + start, first + stop)
            losses = losses.plus(floats.cast(numbers, made, cast.before.name, cast.after.name))
            if self._byteorder != sys.byteorder and cast.after.word > 1:
                made.byteswap(inplace=True)
        self._count(first, first + count, losses)

    def _numbers(self, first: int, last: int) -> floats.Array:
        """Elements before the cast: they are there until this thread reads others."""
        size = self.cast.before.itemsize
        spans = cut(self._spans, first * size, (last - first) * size)
        data = look(spans[0], 1) if len(spans) == 1 else b"".join(span.read() for span in spans)
        return floats.words(data, size, self._byteorder)

    def _count(self, first: int, last: int, losses: Losses) -> None:
        """Keep what was lost in some elements, but for those counted before."""
        with self._lock:
            rest = self.cast.uncounted(first, last)
            if rest == [(first, last)]:
                self.cast.count(first, last, losses)
                return
        for begin, end in rest:
            for start in range(begin, end, floats.PIECE):
                stop = min(start + floats.PIECE, end)
                self._count(start, stop, self._losses(start, stop))

    def _losses(self, first: int, last: int) -> Losses:
        size = self.cast.after.itemsize
        made = floats.words(bytearray((last - first) * size), size, sys.byteorder)
        before, after = self.cast.before.name, self.cast.after.name
        return floats.cast(self._numbers(first, last), made, before, after)


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

    Nothing is decoded yet: `casts` says what was lost, once the document is written. Raises
    `SelectionError` where one of them is not its own.
    """
    import numpy as np  # noqa: F401 - now, and not while an output is half written

    states = list(states)
    groups: dict[tuple[int, DType], list[_User]] = {}
    for user in _users(states):
        if _is_cast(user.tensor, dtype):
            groups.setdefault((id(user.tensor.storage), user.tensor.dtype), []).append(user)
    new: dict[int, Node] = {}
    for users in groups.values():
        made = _cast_storage(users, dtype, document.byteorder)
        new.update((id(u.node), _rewrapped(u.node, made[id(u.tensor)])) for u in users)
    changed: dict[int, Node] = {}
    for state in states:
        changed.update(_replaced(state, new))
    return edits.exchanged(document, states, changed)


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


def count(states: Iterable[StateDict], dtype: DType) -> int:
    """How many tensors of state dicts are cast to a dtype; one with several keys counts once."""
    tensors = (user.tensor for user in _users(states) if _is_cast(user.tensor, dtype))
    return len({tensor.view for tensor in tensors})


def _is_cast(tensor: Tensor, dtype: DType) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype is not dtype


def measure(document: Document) -> None:
    """Cast everything without writing it, so that the losses are known."""
    whole = [Span(source, 0, source.size) for source in _sources(document)]
    for _ in in_order(lambda block: len(look(block)), blocks(whole)):
        pass


def others(document: Document, dtype: DType) -> list[str]:
    """Where floating-point tensors of another dtype are: outside state dicts, or not dense."""
    found = (
        "/".join(takewhile(lambda part: not part.startswith("<"), map(str, path)))
        for path, node in walk(document.root)
        if isinstance(node, Tensor) and node.dtype.is_floating_point and node.dtype is not dtype
    )
    return list(dict.fromkeys(found))


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
    storage = users[0].tensor.storage
    storage = checked(storage, f"storage {storage.key!r} ({users[0].keys[0]})")
    new = Storage(dtype, 0, storage.device, (), storage.key)
    made = {name: replace(t, storage=new, dtype=dtype, offset=0) for name, t in tensors.items()}
    for segment in segments(tensors.values()):
        negated = dtype.itemsize == 1 and _is_negated(segment, users, byteorder)
        dense = negated or (byteorder == "little" and is_sparse(segment))
        for tensor in segment.tensors:
            within = tensor.offset - segment.begin // tensor.dtype.itemsize
            made[id(tensor)].offset = new.numel + (0 if dense else within)
            if dense:
                made[id(tensor)].stride = contiguous_stride(tensor.shape)
            if negated:
                made[id(tensor)].metadata = None
        spans = _bytes_of(segment, storage, dense=dense, negated=negated)
        source = CastSource(spans, _described(segment, users, spans, dtype), byteorder)
        new.spans += (Span(source, 0, source.size),)
        new.numel += source.cast.numel
    return made


def _is_negated(segment: Segment, users: list[_User], byteorder: str) -> bool:
    """Whether a segment is one tensor that torch negates as it is read, which no float8 can be.

    Raises `UnsupportedError` where others lie in the segment too.
    """
    bits = (tensor.metadata for tensor in segment.tensors)
    if not any(isinstance(one, dict) and one.get("neg") for one in bits):
        return False
    if len(segment.tensors) > 1 or byteorder != "little":
        raise UnsupportedError(
            "is a negated view of what has other names too, and float8 has none",
            where=users[0].keys[0],
            hint="save x.resolve_neg() of it in torch first",
        )
    return True


def _bytes_of(
    segment: Segment, storage: Storage, *, dense: bool, negated: bool
) -> tuple[Span, ...]:
    if dense:
        first = replace(segment.tensors[0], storage=storage)
        return (gathered(first if negated else replace(first, metadata=None)),)
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
