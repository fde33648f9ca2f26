"""Walking a tree: what a node holds, and every node of a tree once. Nothing recurses.

A tree is what `document` describes. Its nodes may be shared and may contain themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.source import FileSource, everything
from ckptfix.tree.document import Document, Global, Inert, Node, OrderedMap, Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LEAVES = frozenset({str, int, float, bool, type(None), bytes, bytearray})
_TEXT = {str}


def children(node: Node) -> Iterable[tuple[str, Node]]:
    """What a node holds, each with the path component that names it. Leaves hold nothing."""
    if isinstance(node, dict) and has_names(node) and attributes_of(node) is None:
        return node.items()
    return _children(node)


def has_names(node: dict[Node, Node]) -> bool:
    """Whether every key is text, as nearly everywhere."""
    return set(map(type, node)) == _TEXT


def attributes_of(node: dict[Node, Node]) -> Node:
    """The attributes pickled with a mapping; None where there are none."""
    return node.attributes if isinstance(node, OrderedMap) else None


def _children(node: Node) -> Iterator[tuple[str, Node]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if type(key) is str:
                yield key, value
                continue
            if type(key) not in LEAVES:
                yield "<key>", key
            yield str(key) if type(key) in LEAVES else f"<{type(key).__name__}>", value
        attributes = attributes_of(node)
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
        yield str(key) if type(key) in LEAVES else f"<{type(key).__name__}>", value


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
        if type(node) in LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if not is_plain(node) and (descend is None or descend(node)):
            deep = len(path) >= PATH_DEPTH  # or a million nested lists would take hours
            below = [
                (path if deep else (*path, name), child)
                for name, child in children(node)
                if type(child) not in LEAVES and (tensors or not is_plain(child))
            ]
            pending.extend(reversed(below))


def is_plain(node: Node) -> bool:
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


def packed_bytes(root: Node) -> Iterator[tuple[Path, bytes]]:
    """The values of bytes in a tree that begin as a zip or a pickle does, each once."""
    seen: set[int] = set()
    for path, node in walk(root, tensors=False):
        for name, value in children(node):
            is_bytes = type(value) in (bytes, bytearray) and value[:2] in (b"PK", b"\x80\x02")
            if is_bytes and id(value) not in seen:
                seen.add(id(value))
                yield (*path, name), value


def script_constants(document: Document) -> list[Tensor]:
    """The tensors that a TorchScript program holds as constants, without names.

    All weights of a frozen one are. They go where the program goes: with the extras of a document.
    """
    if not document.extras:
        return []
    return [node for _, node in walk(document.constants) if isinstance(node, Tensor)]


def nbytes(root: Node) -> int:
    """Bytes of all storages of a tree."""
    return sum(storage.nbytes for storage in storages(root))


def files(storage: Storage) -> list[str]:
    """The names of the files in which the bytes of a storage lie; `__9_0` before `__10_0`."""
    sources = (one for span in storage.spans for one in everything(span.source))
    names = {one.name for one in sources if isinstance(one, FileSource)}
    bare = {name.replace("\\", "/").rpartition("/")[2] for name in names}
    return sorted(bare, key=lambda name: (len(name), name))
