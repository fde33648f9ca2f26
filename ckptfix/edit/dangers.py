"""A document without what would run commands or code where somebody unpickles it.

What is left out is as little as can be: the entry of a mapping, or the item of a list (None stands
in its place). An object that is made with something dangerous is left out whole; a model that is,
becomes its state dict. The weights are never left out: where they would be, this is refused.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.modules import is_module, take
from ckptfix.contents.state_dicts import choose_all, find, of_models
from ckptfix.errors import UnsafeError
from ckptfix.formats.table import split_extension
from ckptfix.hints import Hint, command
from ckptfix.pickles.dangerous import dangers, name_of
from ckptfix.tree.document import Global, Inert, OrderedMap, Tensor
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import LEAVES, children, storages, walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.tree.document import Document, Node
    from ckptfix.tree.walk import Path


class Removed(NamedTuple):
    """A document without what is dangerous, and what is not in it."""

    document: Document
    left_out: list[tuple[str, str]]
    """Where each stood, and what it reaches out to: `("hook", "posix.system")`."""


def without_dangers(document: Document, select: str | None = None) -> Removed:
    """The document without what is dangerous.

    Raises `UnsafeError` where that is all there is, or where weights would go with it: those of the
    state dict at `select`, or of any.
    """
    found = dangers(document.root)
    if not found:
        return Removed(document, [])
    remover = _Remover(document.root, found)
    if remover.goes(document.root) and not is_module(document.root):
        raise UnsafeError(
            f"is nothing but a call of {listed(dict.fromkeys(map(name_of, found)))}",
            where=document.name,
            hint=Hint("see what it holds", command("inspect", document.name)),
        )
    root = rebuild(remover.instead(document.root), remover.change)
    _check_weights(document, select, root)
    left = dangers(root)
    if left:
        raise UnsafeError(
            f"calls {name_of(left[0])} to make what cannot be made without that",
            where=document.name,
            hint=Hint("see what it holds", command("inspect", document.name)),
        )
    return Removed(replace(document, root=root), remover.left_out)


def _check_weights(document: Document, select: str | None, root: Node) -> None:
    """Refuse to go on without a tensor of a state dict that may be meant."""
    selected = [] if select is None else [select]
    states = choose_all(document, selected) if selected else of_models(find(document.root))
    kept = {id(storage) for storage in storages(root)}
    for state in states:
        if any(id(storage) not in kept for storage in storages(dict(state.mapping))):
            out = f"{split_extension(document.name)[0]}.weights.safetensors"
            raise UnsafeError(
                f"the weights at {state.path!r} are a part of what is dangerous, and would go too",
                where=document.name,
                hint=Hint(
                    "take the weights alone",
                    command("convert", document.name, out, select=state.selection),
                ),
            )


class _Remover:
    """Knows from which nodes something dangerous can be reached, and takes it out of the others."""

    def __init__(self, root: Node, found: list[Global | Inert]) -> None:
        self.left_out: list[tuple[str, str]] = []
        self._names = {id(node): name_of(node) for node in found}
        self._paths: dict[int, Path] = {}
        self._losing: dict[int, bool] = {}
        above: defaultdict[int, list[int]] = defaultdict(list)
        for path, node in walk(root):
            self._paths[id(node)] = _said(path)
            if isinstance(node, Inert) and isinstance(node.state, dict):  # whose items are given
                self._paths[id(node.state)] = self._paths[id(node)]
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
        return self._goes(node, _DEPTH)

    def _goes(self, node: Node, depth: int) -> bool:
        if id(node) in self._names:
            return True
        if not isinstance(node, Inert):
            return False
        state = None if isinstance(node.state, dict) else node.state
        if any(id(part) in self._within for part in (node.function, node.kwargs, *node.items)):
            return True
        return not all(self._can_lose_it(part, depth) for part in (node.args, state))

    def _can_lose_it(self, part: Node, depth: int) -> bool:
        """Whether what is dangerous in a part of an object lies in a mapping, or in a tensor.

        So do the attributes of a parameter, and of an object with slots.
        """
        if id(part) not in self._within:
            return True
        if isinstance(part, (dict, Tensor)):
            return True
        if depth and id(part) not in self._losing:
            self._losing[id(part)] = False  # where it holds itself
            if type(part) is tuple:
                can = all(self._can_lose_it(one, depth - 1) for one in part)
            else:
                can = isinstance(part, Inert) and not self._goes(part, depth - 1)
            self._losing[id(part)] = can
        return self._losing.get(id(part), False)

    def instead(self, node: Node) -> Node:
        """What stays of a node that goes: the weights of a model."""
        if not self.goes(node) or not is_module(node):
            return node
        taken = take(node)
        if not taken.mapping or taken.unknown:
            return node
        where, name = self._place(node), self._within[id(node)]
        self.left_out.append((where, f"{name}, apart from the weights"))
        return OrderedMap((key, it) for key, it in taken.mapping.items() if not self.goes(it))

    def change(self, node: Node) -> Node:
        """A node without those of its parts that go."""
        if id(node) not in self._within:
            return node
        if isinstance(node, dict):
            kept = self._kept(node, node.items())
            if not isinstance(node, OrderedMap):
                return dict(kept)
            stays = self._stays(node, "<attributes>", node.attributes)
            return OrderedMap(kept, node.attributes if stays else None)
        if type(node) in (list, tuple):
            items = [(str(at), self.instead(it)) for at, it in enumerate(node)]
            return type(node)(it if self._stays(node, at, it) else None for at, it in items)
        if isinstance(node, Inert):
            return replace(node, pairs=self._kept(node, node.pairs))
        if isinstance(node, Tensor):
            hooks = node.hooks if self._stays(node, "<hooks>", node.hooks) else None
            metadata = node.metadata if self._stays(node, "<metadata>", node.metadata) else None
            return replace(node, hooks=hooks, metadata=metadata)
        return node

    def _kept(self, node: Node, pairs: Iterable[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
        instead = [(key, self.instead(it)) for key, it in pairs]
        return [(key, it) for key, it in instead if self._stays(node, key, it)]

    def _stays(self, node: Node, key: Node, value: Node) -> bool:
        gone = value if self.goes(value) else key
        if gone is key and id(key) not in self._within:
            return True
        name = key if type(key) in LEAVES else f"<{type(key).__name__}>"
        what = self._within[id(gone)]
        where = "/".join(map(str, (*self._paths[id(node)], name)))
        self.left_out.append((where, what))
        return False

    def _place(self, node: Node) -> str:
        return "/".join(self._paths[id(node)]) or "/"


def _said(path: Path) -> Path:
    """A path without the steps that say nothing to people: an argument, a part of a state."""
    return tuple(
        name for before, name in pairwise(("", *path)) if not {before, name} & {"<args>", "<state>"}
    )


_DEPTH = 8
"""How far what is given to an object is looked into; it may hold itself."""
