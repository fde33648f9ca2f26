"""A checkpoint as a tree that a person likes to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.cli.output import more, size, text
from ckptfix.contents.state_dicts import StateDict, find
from ckptfix.contents.tensors import as_tensor
from ckptfix.edit.counting import held_by
from ckptfix.keys import wrappers
from ckptfix.layouts import in_pieces
from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor, kind
from ckptfix.tree.walk import children, files, storages
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.text import Text
    from rich.tree import Tree

    from ckptfix.tree.document import Document

_TENSORS, _VALUES, _DEPTH = 24, 12, 4
_DEEPEST = 50  # with everything shown
_FILES = 4
_SHORT, _LONG, _FEW, _NESTED = 60, 100, 12, 4
_INDENT = 4


def draw(document: Document, width: int, *, everything: bool = False) -> Tree:
    """The tree of a document for `width` columns; long lists are cut unless `everything`."""
    from rich.tree import Tree

    title = text((document.name, "bold"), f"  {document.container}, {size(document.nbytes)}")
    pieces = everything and document.container in _IN_PIECES
    if pieces:
        names = {name for storage in storages(document.root) for name in files(storage)}
        title.append_text(text(f", tensors in {plural(len(names), 'file')}"))
    tree = Tree(title, guide_style="dim")
    drawing = _Drawing(find(document.root), width, everything, pieces=pieces)
    if drawing.is_state(document.root) or not _holds(document.root):
        drawing.add(tree, "/", document.root, 1)
    else:
        title.append_text(text(f", {_told(document.root)}"))
        drawing.add_below(tree, document.root, 1)
    texts = dict(document.metadata)
    if texts:
        drawing.add(tree, "__metadata__", texts, 1)
    return tree


_IN_PIECES = frozenset({in_pieces.DCP, in_pieces.DCP_SAFETENSORS, in_pieces.RANKS})
"""Containers in which a tensor may lie in several files."""


class _Drawing:
    """Turns nodes into branches; a node that was drawn before is only named again.

    With `pieces`, each tensor is said to lie in its files.
    """

    def __init__(
        self, states: list[StateDict], width: int, everything: bool, *, pieces: bool
    ) -> None:
        self._pieces = pieces
        self._states = {id(state.node): state for state in states}
        rows = [] if everything else [row for state in states for row in _optimizer_rows(state)]
        self._rows = {id(row) for row in rows}
        self._width = width
        self._everything = everything
        self._drawn: set[int] = set()

    def is_state(self, node: Node) -> bool:
        """Whether a node is a state dict, or holds one by other names."""
        return id(node) in self._states

    def add(self, branch: Tree, name: str, node: Node, depth: int) -> None:
        """Draw a node, `depth` levels below the title, and what it holds."""
        below = branch.add(self._label(name, node))
        if id(node) not in self._rows:
            self.add_below(below, node, depth + 1)

    def add_below(self, branch: Tree, node: Node, depth: int) -> None:
        """Draw what a node holds under its branch."""
        if id(node) in self._drawn or not (self.is_state(node) or _holds(node)):
            return
        self._drawn.add(id(node))
        state = self._states.get(id(node))
        if state is not None and state.role != "optimizer":
            self._add_state(branch, state, depth)
        elif depth <= (_DEEPEST if self._everything else _DEPTH):
            self._add_values(branch, _values(node), depth)

    def _add_state(self, branch: Tree, state: StateDict, depth: int) -> None:
        tensors = list(state.tensors.items())
        shown = tensors[: self._limit(len(tensors), _TENSORS)]
        one_device = len({tensor.storage.device for tensor in state.tensors.values()}) == 1
        room = self._width - depth * _INDENT
        rows = _tensor_rows(shown, room, devices=not one_device, pieces=self._pieces)
        for row in rows:
            branch.add(row)
        _add_more(branch, len(tensors) - len(shown), "key")
        self._add_values(branch, list(state.others.items()), depth)

    def _add_values(self, branch: Tree, values: list[tuple[str, Node]], depth: int) -> None:
        shown = values[: self._limit(len(values), _VALUES)]
        for name, node in shown:
            self.add(branch, name, node, depth)
        _add_more(branch, len(values) - len(shown), "value")

    def _limit(self, count: int, limit: int) -> int:
        """How many of `count` to show: a line that says "1 more" could as well show it."""
        return count if self._everything or count <= limit + 1 else limit

    def _label(self, name: str, node: Node) -> Text:
        state = self._states.get(id(node))
        if state is not None:
            told, style = _describe_state(state), "green"
        elif id(node) in self._rows:
            told, style = ", ".join(f"{key} {_brief(value)}" for key, value in node.items()), ""
        else:
            told, style = _told(node), "dim" if _holds(node) else ""
        return text((name, "bold"), "  ", (told, style))


def _add_more(branch: Tree, hidden: int, noun: str) -> None:
    if hidden:
        branch.add(text((more(hidden, "--all shows them", noun), "dim")))


# --- state dicts


def prefix_of(state: StateDict) -> str:
    """The wrapper prefix that every key of a state dict begins with, or nothing."""
    if state.role == "optimizer":
        return ""
    return "".join(f"{part}." for part in wrappers.detect(state.mapping).leading)


def _describe_state(state: StateDict) -> str:
    found = list(storages(state.mapping))
    devices = "/".join(dict.fromkeys(storage.device for storage in found))
    if state.role == "optimizer":
        held, groups = len(state.mapping["state"]), len(state.mapping["param_groups"])
        parts = ["optimizer", plural(held, "parameter"), plural(groups, "group")]
    else:
        parts = [_ROLES[state.role], str(held_by(state))]
        if isinstance(state.origin, Inert):
            parts.insert(0, state.origin.cls)
    prefix = prefix_of(state)
    parts += [
        size(sum(storage.nbytes for storage in found)),
        devices,
        f"prefix {prefix}" if prefix else "",
    ]
    return ", ".join(part for part in parts if part)


_ROLES = {
    "model": "state dict",
    "ema": "state dict (EMA)",
    "swa": "state dict (SWA)",
    "loose": "no state dict",
    "generators": "states of random number generators",
}


def _tensor_rows(
    tensors: list[tuple[str, Tensor]], room: int, *, devices: bool, pieces: bool
) -> Iterable[Text]:
    """A line for each tensor, in columns as far as they fit into `room`."""
    cells = [
        (
            key,
            str(list(tensor.shape)),
            tensor.dtype.name,
            size(tensor.nbytes),
            tensor.storage.device if devices else "",
            listed(files(tensor.storage), _FILES) if pieces else "",
        )
        for key, tensor in tensors
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]  # files come last
    if widths:
        widths[0] = min(widths[0], max(room - sum(widths[1:]) - 2 * (len(widths) - 1), 0))
    for key, shape, dtype, nbytes, device, where in cells:
        yield text(
            f"{key:{widths[0]}}  ",
            (f"{shape:{widths[1]}}", "cyan"),
            f"  {dtype:{widths[2]}}  {nbytes:>{widths[3]}}",
            (f"  {device:{widths[4]}}" if device else "", "dim"),
            (f"  {where}" if where else "", "dim"),
        )


def _optimizer_rows(state: StateDict) -> Iterable[Node]:
    """What is shown on one line: the state of a parameter, the options of a group."""
    if state.role != "optimizer":
        return []
    rows = (*state.mapping["state"].values(), *state.mapping["param_groups"])
    return [row for row in rows if isinstance(row, dict)]


# --- other values


def _holds(node: Node) -> bool:
    """Whether there is more to a node than its label says."""
    if isinstance(node, Inert):
        return as_tensor(node) is None and _inline(node) is None
    return (isinstance(node, (dict, list)) or type(node) is tuple) and _inline(node) is None


def _values(node: Node) -> list[tuple[str, Node]]:
    """What a person wants to see inside a node; how it would be built only where that tells."""
    if not isinstance(node, Inert):
        return [(name, child) for name, child in children(node) if name != "<attributes>"]
    hidden = {"<function>", "<key>"}
    if not node.state:
        hidden.add("<state>")
    if not node.args or node.has_state or node.pairs or node.items:
        hidden.add("<args>")
    return [(name, child) for name, child in children(node) if name not in hidden]


def _told(node: Node) -> str:
    tensor = as_tensor(node)
    if tensor is not None:
        described = f"{list(tensor.shape)} {tensor.dtype} {size(tensor.nbytes)}"
        return f"{described} {tensor.storage.device}"
    if isinstance(node, Storage):
        return f"storage of {node.numel:,} {node.dtype}, {node.device}"
    return _inline(node) or (_call(node) if isinstance(node, Inert) else None) or kind(node)


def _brief(node: Node) -> str:
    """A node inside a line."""
    tensor = as_tensor(node)
    return str(list(tensor.shape)) if tensor is not None else _inline(node) or kind(node)


def _inline(node: Node, depth: int = _NESTED) -> str | None:
    """A value as Python would write it, where that is short and complete; tensors have no such."""
    if not depth or isinstance(node, (Tensor, Storage)):
        return None
    if isinstance(node, Inert):
        whole = not (node.has_state or node.kwargs or node.items or node.pairs)
        return _call(node, depth) if whole else None
    if isinstance(node, dict):
        return None if node else "{}"
    if type(node) is tuple or isinstance(node, list):
        inner = _joined(node, depth)
        left, right = "[]" if isinstance(node, list) else ("(", ",)" if len(node) == 1 else ")")
        return None if inner is None else f"{left}{inner}{right}"
    return _scalar(node)


def _call(node: Inert, depth: int = _NESTED) -> str | None:
    """`torch.device('cuda', 0)`: an object that nothing but its arguments tells about."""
    if node.has_state or type(node.args) is not tuple:
        return None
    inner = _joined(node.args, depth)
    return None if inner is None else f"{node.cls}({inner})"


def _joined(nodes: Iterable[Node], depth: int) -> str | None:
    nodes = list(nodes)
    if len(nodes) > _FEW:
        return None
    parts = [_inline(node, depth - 1) for node in nodes]
    joined = ", ".join(part for part in parts if part is not None)
    return None if None in parts or len(joined) > _LONG else joined


def _scalar(value: Node) -> str:
    if type(value) is Global:
        return value.today
    if type(value) in (str, bytes, bytearray):
        shown = repr(value[:_SHORT])
        return shown if len(value) <= _SHORT and len(shown) <= _SHORT else f"{shown[:_SHORT]}…"
    if type(value) is int and value.bit_length() > 4 * _SHORT:
        return f"int of {value.bit_length():,} bits"
    return repr(value)
