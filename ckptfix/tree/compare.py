"""Where two trees differ, if they do. Nothing recurses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor
from ckptfix.tree.dtypes import UNTYPED
from ckptfix.tree.walk import LEAVES, attributes_of, children, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable


def difference(left: Node, right: Node) -> str | None:
    """Where two trees first differ, as a path, or None where they are the same.

    The same means: equal values of equal types in equal order, the same sharing of storages,
    tensors of equal layout, storages of equal dtype, length, device and (where both are known)
    CRC.
    """
    return _Comparison().run(left, right)


class _Comparison:
    """Walks two trees side by side; each step says where they differ, if they do."""

    def __init__(self) -> None:
        self.partner: dict[int, int] = {}
        self.further: set[tuple[int, int]] = set()  # pairs of which one has another partner
        self.taken: set[int] = set()  # storages on the right
        self.pending: list[tuple[Place | None, Node, Node]] = []

    def run(self, left: Node, right: Node) -> str | None:
        found = self.nodes(None, left, right)
        while found is None and self.pending:
            found = self.nodes(*self.pending.pop())
        return found

    def nodes(self, place: Place | None, one: Node, other: Node) -> str | None:
        if type(one) is not type(other) or _shallow(one) != _shallow(other):
            return _spelled(place, "")
        if type(one) is Storage:
            return _spelled(place, self.storages(one, other))
        pair = (id(one), id(other))
        if type(one) in LEAVES or self.partner.get(id(one)) == id(other) or pair in self.further:
            return None
        if self.partner.setdefault(id(one), id(other)) != id(other):
            self.further.add(pair)
        for (name, below), (_, beside) in zip(_parts(one), _parts(other), strict=True):
            if is_plain(below) and is_plain(beside):  # no detour for what most nodes are
                found = self.tensors(below, beside)
                if found is not None:
                    return _spelled((place, name), found)
            elif type(below) is not str or below != beside:
                self.pending.append(((place, name), below, beside))
        return None

    def tensors(self, one: Tensor, other: Tensor) -> str | None:
        """Where two tensors differ that have nothing below them but their storages."""
        if (
            one.shape != other.shape
            or one.stride != other.stride
            or one.offset != other.offset
            or one.dtype is not other.dtype
            or one.requires_grad is not other.requires_grad
        ):
            return ""
        storage, beside = one.storage, other.storage
        alike = (
            storage.dtype is beside.dtype
            and storage.numel == beside.numel
            and storage.device == beside.device
        )
        if not alike and _described(storage) != _described(beside):
            return "/<storage>"
        found = self.storages(storage, beside)
        return None if found is None else f"/<storage>{found}"

    def storages(self, one: Storage, other: Storage) -> str | None:
        """The rest of what two storages of one description have to agree in."""
        known = self.partner.get(id(one))
        if known == id(other):
            return None
        if known is not None or id(other) in self.taken:
            return " (a shared storage)"
        if _crcs_differ(one, other):
            return " (its bytes)"
        self.partner[id(one)] = id(other)
        self.taken.add(id(other))
        return None


Place = tuple[Any, str]
"""A path as the place above and a name, put together only where it is needed."""


def _spelled(place: Place | None, found: str | None) -> str | None:
    """The path of a place with what was found there behind it, if something was."""
    if found is None:
        return None
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(name)
    return "/" + "/".join(reversed(names)) + found


def _parts(node: Node) -> Iterable[tuple[str, Node]]:
    parts = children(node)
    return [*parts, ("<storage>", node.storage)] if isinstance(node, Tensor) else parts


def _crcs_differ(one: Storage, other: Storage) -> bool:
    """Whether both are one stretch of bytes with a CRC on record, and not the same one."""
    if len(one.spans) != 1 or len(other.spans) != 1:
        return False
    crc, other_crc = one.spans[0].crc, other.spans[0].crc
    return crc is not None and other_crc is not None and crc != other_crc


def _layout(node: Tensor) -> tuple[Any, ...]:
    return (node.dtype, node.shape, node.stride, node.offset, node.requires_grad)


def _described(storage: Storage) -> tuple[Any, ...]:
    return (storage.dtype.storage or UNTYPED.storage, storage.nbytes, storage.device)


def _shallow(node: Node) -> Node:
    """What a node is, apart from what it holds."""
    if type(node) in LEAVES:
        return repr(node) if type(node) is float else node  # nan is nan, and -0.0 is not 0.0
    if isinstance(node, Tensor):
        return (*_layout(node), node.hooks is None, node.metadata is None)
    if isinstance(node, Storage):
        return _described(node)
    if isinstance(node, Inert):
        state = _shallow(node.state) if isinstance(node.state, dict) else None
        kinds = (type(node.state), type(node.kwargs))
        return (node.how, node.has_state, kinds, state, len(node.items), len(node.pairs))
    if isinstance(node, dict):
        keys = [
            key if type(key) is str else (type(key), _shallow(key))
            for key in node
            if type(key) in LEAVES
        ]
        return (keys, len(node), attributes_of(node) is not None)
    return node if type(node) is Global else len(node)
