"""A copy of a tree with changes. Nothing recurses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.errors import UnsafeError
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.walk import LEAVES, children, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable


_SIMPLE = frozenset({Tensor, Storage, Global})  # nodes that hold no containers worth a detour


class Making(NamedTuple):
    """An object that is there before what it holds is made, and is given that afterwards.

    What `change` may return for a node: `fill` is called with what became of `parts`.
    """

    made: Any
    parts: Node
    fill: Callable[[Any], None]


REOPENED = 1_000_000
"""Items of tuples that hold themselves, met again inside them, before a tree is refused."""


def rebuild(
    root: Node,
    change: Callable[[Node], Node],
    finish: Callable[[Node, Node], None] | None = None,
    *,
    tensors: bool = True,
) -> Node:
    """A copy of a tree in which each node is what `change` makes of it.

    `change` is called once with each node that is no leaf, before its children are visited, and
    returns the node itself where it stays; what it returns is visited in its stead, apart from a
    `Making`. `finish` is
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
        return not self.tensors and is_plain(node)

    def visit(self, node: Node) -> None:
        if type(node) in LEAVES or id(node) in self.done or self.stays(node):
            return
        new = self.change(node)
        self.kept.append(node)
        if new is not node:
            self.kept.append(new)
        if type(new) is Making:
            self.done[id(node)] = new.made
            self._later(lambda: new.fill(self.get(new.parts)), (new.parts,))
        elif isinstance(new, (dict, list, Inert)):
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
                elif type(child) not in LEAVES:
                    self.pending.append(lambda child=child: self.visit(child))  # type: ignore[misc]

    def _below(self, parent: Node) -> list[Node]:
        below = [child for _, child in children(parent)]
        return below if self.tensors else [child for child in below if not is_plain(child)]

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
