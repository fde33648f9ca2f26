"""A document without what would run commands or code where somebody unpickles it.

What is left out is as little as can be: the entry of a mapping, or the item of a list (None stands
in its place). An object that is made with something dangerous is left out whole.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import UnsafeError
from ckptfix.hints import Hint, command
from ckptfix.pickles.dangerous import dangers, name_of
from ckptfix.tree.document import Global, Inert, OrderedMap, Tensor
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import LEAVES, children, walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from ckptfix.tree.document import Document, Node
    from ckptfix.tree.walk import Path


class Removed(NamedTuple):
    """A document without what is dangerous, and what is not in it."""

    document: Document
    left_out: list[tuple[str, str]]
    """Where each stood, and what it reaches out to: `("hook", "posix.system")`."""


def without_dangers(document: Document) -> Removed:
    """The document without what is dangerous.

    Raises `UnsafeError` where that is all there is.
    """
    found = dangers(document.root)
    if not found:
        return Removed(document, [])
    remover = _Remover(document.root, found)
    if remover.goes(document.root):
        raise UnsafeError(
            f"is nothing but a call of {listed(dict.fromkeys(map(name_of, found)))}",
            where=document.name,
            hint=Hint("see what it holds", command("inspect", document.name)),
        )
    root = rebuild(document.root, remover.change)
    return Removed(replace(document, root=root), remover.left_out)


class _Remover:
    """Knows from which nodes something dangerous can be reached, and takes it out of the others."""

    def __init__(self, root: Node, found: list[Global | Inert]) -> None:
        self.left_out: list[tuple[str, str]] = []
        self._names = {id(node): name_of(node) for node in found}
        self._paths: dict[int, Path] = {}
        above: defaultdict[int, list[int]] = defaultdict(list)
        for path, node in walk(root):
            self._paths[id(node)] = path
            if isinstance(node, Inert) and isinstance(node.state, dict):  # whose items are given
                self._paths[id(node.state)] = path
                above[id(node.state)].append(id(node))
                for _, child in children(node.state):
                    above[id(child)].append(id(node.state))
            for _, child in children(node):
                if type(child) not in LEAVES:
                    above[id(child)].append(id(node))
        self._within: dict[int, str] = {}
        """For each node that something dangerous is in, its name."""
        pending = list(self._names.items())
        while pending:
            node, name = pending.pop()
            if node not in self._within:
                self._within[node] = name
                pending += [(parent, name) for parent in above[node]]

    def goes(self, node: Node) -> bool:
        """Whether a node is dangerous itself, or an object that is made with what is."""
        if id(node) in self._names:
            return True
        if not isinstance(node, Inert):
            return False
        state = None if isinstance(node.state, dict) else node.state
        parts = (node.function, node.args, node.kwargs, state, *node.items)
        return any(id(part) in self._within for part in parts)

    def change(self, node: Node) -> Node:
        """A node without those of its parts that go."""
        if id(node) not in self._within:
            return node
        if isinstance(node, dict):
            kept = {key: value for key, value in node.items() if self._stays(node, key, value)}
            if not isinstance(node, OrderedMap):
                return kept
            stays = self._stays(node, "<attributes>", node.attributes)
            return OrderedMap(kept, node.attributes if stays else None)
        if type(node) in (list, tuple):
            items = enumerate(node)
            return type(node)(it if self._stays(node, str(at), it) else None for at, it in items)
        if isinstance(node, Inert):
            pairs = [(key, it) for key, it in node.pairs if self._stays(node, key, it)]
            return replace(node, pairs=pairs)
        if isinstance(node, Tensor):
            hooks = node.hooks if self._stays(node, "<hooks>", node.hooks) else None
            metadata = node.metadata if self._stays(node, "<metadata>", node.metadata) else None
            return replace(node, hooks=hooks, metadata=metadata)
        return node

    def _stays(self, node: Node, key: Node, value: Node) -> bool:
        gone = value if self.goes(value) else key
        if gone is key and id(key) not in self._within:
            return True
        path = (*self._paths[id(node)], key if type(key) in LEAVES else f"<{type(key).__name__}>")
        self.left_out.append(("/".join(map(str, path)), self._within[id(gone)]))
        return False
