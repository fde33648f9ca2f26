"""Trees: what a node holds, walking, copying with changes, comparing. Nothing recurses.

A tree is what `document` describes. Its nodes may be shared and may contain themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptfix.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.dtypes import UNTYPED
from ckptfix.errors import UnsafeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LEAVES = frozenset({str, int, float, bool, type(None), bytes, bytearray})
_TEXT = {str}
_SIMPLE = frozenset({Tensor, Storage, Global})  # nodes that hold no containers worth a detour


def children(node: Node) -> Iterable[tuple[str, Node]]:
    """What a node holds, each with the path component that names it. Leaves hold nothing."""
    if isinstance(node, dict) and has_names(node) and _attributes(node) is None:
        return node.items()
    return _children(node)


def has_names(node: dict[Node, Node]) -> bool:
    """Whether every key is text, as nearly everywhere."""
    return set(map(type, node)) == _TEXT


def _attributes(node: dict[Node, Node]) -> Node:
    return node.attributes if isinstance(node, OrderedMap) else None


def _children(node: Node) -> Iterator[tuple[str, Node]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if type(key) is str:
                yield key, value
                continue
            if type(key) not in _LEAVES:
                yield "<key>", key
            yield str(key) if type(key) in _LEAVES else f"<{type(key).__name__}>", value
        attributes = _attributes(node)
        if attributes is not None:
            yield "<attributes>", attributes
    elif isinstance(node, (list, tuple)) and type(node) is not Global:
        for index, value in enumerate(node):
            yield str(index), value
    elif isinstance(node, Inert):
        yield from _inert_children(node)
    elif isinstance(node, Tensor):
        extras = (("<hooks>", node.hooks), ("<metadata>", node.metadata))
        yield from (extra for extra in extras if extra[1] is not None)


def _inert_children(node: Inert) -> Iterator[tuple[str, Node]]:
    yield "<function>", node.function
    yield "<args>", node.args
    if node.kwargs is not None:
        yield "<kwargs>", node.kwargs
    if isinstance(node.state, dict):
        yield from children(node.state)
    else:
        yield "<state>", node.state
    for index, value in enumerate(node.items):
        yield str(index), value
    for key, value in node.pairs:
        yield "<key>", key
        yield str(key) if type(key) in _LEAVES else f"<{type(key).__name__}>", value


REOPENED = 1_000_000
"""Items of tuples that hold themselves, met again inside them, before a tree is refused."""

Path = tuple[str, ...]

PATH_DEPTH = 100
"""Components of a path at most; what lies deeper is given the path of what holds it."""


def walk(
    root: Node, descend: Callable[[Node], bool] | None = None, *, tensors: bool = True
) -> Iterator[tuple[Path, Node]]:
    """Every node but leaves, once, parents first and in order, with the path it is first found at.

    `descend` may hold the walk back from what lies below a node. Without `tensors`, those with
    nothing below them are passed over.
    """
    seen: set[int] = set()
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if type(node) in _LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if not _is_plain(node) and (descend is None or descend(node)):
            deep = len(path) >= PATH_DEPTH  # or a million nested lists would take hours
            below = [
                (path if deep else (*path, name), child)
                for name, child in children(node)
                if type(child) not in _LEAVES and (tensors or not _is_plain(child))
            ]
            pending.extend(reversed(below))


def _is_plain(node: Node) -> bool:
    """Whether a node is a tensor with nothing below it, as nearly all are."""
    return type(node) is Tensor and node.hooks is None and node.metadata is None


def storages(root: Node) -> Iterator[Storage]:
    """Every storage of a tree, once, in the order in which a writer meets them."""
    seen: set[int] = set()
    for _, node in walk(root):
        storage = node.storage if isinstance(node, Tensor) else node
        if isinstance(storage, Storage) and id(storage) not in seen:
            seen.add(id(storage))
            yield storage


def nbytes(root: Node) -> int:
    """Bytes of all storages of a tree."""
    return sum(storage.nbytes for storage in storages(root))


def rebuild(
    root: Node,
    change: Callable[[Node], Node],
    finish: Callable[[Node, Node], None] | None = None,
    *,
    tensors: bool = True,
) -> Node:
    """A copy of a tree in which each node is what `change` makes of it.

    `change` is called once with each node that is no leaf, before its children are visited, and
    returns the node itself where it stays; what it returns is visited in its stead. `finish` is
    called with a container and its filled copy. Sharing and cycles are kept. Without `tensors`,
    those with nothing below them stay as they are, and `change` does not see them.
    """
    return _Rebuilder(change, finish, tensors).run(root)


class _Rebuilder:
    """Post-order copy with a stack of its own; containers are in `done` before they are filled."""

    def __init__(
        self,
        change: Callable[[Node], Node],
        finish: Callable[[Node, Node], None] | None,
        tensors: bool,
    ) -> None:
        self.change = change
        self.finish = finish
        self.tensors = tensors
        self.done: dict[int, Node] = {}
        self.kept: list[Node] = []  # ids stay taken only while their objects live
        self.pending: list[Callable[[], None]] = []
        self.opened: set[int] = set()
        self.reopened = 0

    def run(self, root: Node) -> Node:
        self.visit(root)
        while self.pending:
            self.pending.pop()()
        return self.get(root)

    def get(self, node: Node) -> Node:
        return self.done.get(id(node), node)  # leaves are not in there, nor what stays

    def stays(self, node: Node) -> bool:
        return not self.tensors and _is_plain(node)

    def visit(self, node: Node) -> None:
        if type(node) in _LEAVES or id(node) in self.done or self.stays(node):
            return
        new = self.change(node)
        self.kept.append(node)
        if new is not node:
            self.kept.append(new)
        if isinstance(new, (dict, list, Inert)):
            self._open(node, new)
        elif type(new) is tuple:
            self._reopen(node, len(new))
            self._later(lambda: self._close(node, new), new)
        else:
            self.done[id(node)] = new

    def _reopen(self, node: Node, length: int) -> None:
        """Count tuples that hold themselves: they are begun again inside themselves."""
        if id(node) in self.opened:
            self.reopened += length
            if self.reopened > REOPENED:
                raise UnsafeError("its tuples hold themselves in too many ways")
        self.opened.add(id(node))

    def _later(self, action: Callable[[], None], *parents: Node) -> None:
        """Run `action` once all that `parents` hold has been visited."""
        self.pending.append(action)
        for parent in parents:
            for child in self._below(parent)[::-1]:
                if type(child) in _SIMPLE:
                    self.visit(child)
                elif type(child) not in _LEAVES:
                    self.pending.append(lambda child=child: self.visit(child))  # type: ignore[misc]

    def _below(self, parent: Node) -> list[Node]:
        below = [child for _, child in children(parent)]
        return below if self.tensors else [child for child in below if not _is_plain(child)]

    def _open(self, node: Node, new: Node) -> None:
        """A container may hold itself, so an empty one stands in for it until it is filled."""
        shell = Inert(None) if isinstance(new, Inert) else type(new)()
        self.done[id(node)] = shell
        parts = (new.function, new.args, new.kwargs, new.state) if isinstance(new, Inert) else ()
        self._later(lambda: self._fill(node, shell, new), new)
        self.pending.extend((lambda part=part: self.visit(part)) for part in parts)  # type: ignore[misc]

    def _fill(self, node: Node, shell: Node, new: Node) -> None:
        if isinstance(new, dict):
            get = self.done.get
            for key, value in new.items():
                shell[key if type(key) is str else get(id(key), key)] = get(id(value), value)
            if isinstance(new, OrderedMap):
                shell.attributes = self.get(new.attributes)
        elif isinstance(new, list):
            shell.extend(map(self.get, new))
        else:
            self._fill_inert(shell, new)
        if self.finish is not None:
            self.finish(node, shell)

    def _fill_inert(self, shell: Inert, new: Inert) -> None:
        shell.function, shell.args = self.get(new.function), self.get(new.args)
        shell.kwargs, shell.how = self.get(new.kwargs), new.how
        shell.has_state, shell.state = new.has_state, self.get(new.state)
        shell.items = [self.get(item) for item in new.items]
        shell.pairs = [(self.get(key), self.get(value)) for key, value in new.pairs]

    def _close(self, node: Node, new: Node) -> None:
        if id(node) not in self.done:  # a tuple that holds itself was closed from inside
            self.done[id(node)] = tuple(map(self.get, new))


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
        if type(one) in _LEAVES or self.partner.get(id(one)) == id(other) or pair in self.further:
            return None
        if self.partner.setdefault(id(one), id(other)) != id(other):
            self.further.add(pair)
        for (name, below), (_, beside) in zip(_parts(one), _parts(other), strict=True):
            if _is_plain(below) and _is_plain(beside):  # no detour for what most nodes are
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
    if type(node) in _LEAVES:
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
            if type(key) in _LEAVES
        ]
        return (keys, len(node), _attributes(node) is not None)
    return node if type(node) is Global else len(node)
