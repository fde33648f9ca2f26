"""How many tensors a document holds: what torch or safetensors find in the file made of it.

A tensor is counted once, however many keys name it: those are ties. Everything that says a number
of tensors takes it from here, and from the document that is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.state_dicts import find, of_models
from ckptfix.contents.tensors import as_tensor, is_array, is_special_tensor
from ckptfix.tree.document import Inert, Tensor
from ckptfix.tree.walk import script_constants, walk
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.formats.table import Writable
    from ckptfix.tree.document import Document, Node


class Held(NamedTuple):
    """What a document holds."""

    tensors: int
    arrays: int
    """Numpy arrays, which torch does not give back as tensors."""
    ties: int
    """Keys for a tensor that has another key already."""
    written_once: Mapping[str, str]
    """Those of them that a container of tensors has as other names alone, each with the key that
    its tensor stands under."""

    def __str__(self) -> str:
        parts = [plural(self.tensors, "tensor")]
        parts += [plural(self.arrays, "numpy array")] if self.arrays else []
        parts += [plural(self.ties, "tie")] if self.ties else []
        return ", ".join(parts)


NOBODY_ASKED = Held(0, 0, 0, {})
"""In the place of a count that nobody reads; nothing is written once there."""


def held(document: Document, container: Writable | None = None) -> Held:
    """What a document holds; or, where it fits a container of tensors, what is written of it."""
    if container is not None and container.tensors_only:
        from ckptfix.formats import safetensors  # which most outputs are not

        tensors, aliases = safetensors.without_ties(document.root)
        return Held(len(tensors), 0, len(aliases), aliases)
    found, arrays = set[object](), 0
    for node in (*_tensors(document.root), *script_constants(document)):
        tensor = as_tensor(node)
        if is_array(node):
            arrays += 1
        else:
            found.add(id(node) if tensor is None else tensor.view)
    states = (state for state in of_models(find(document.root)) if state.role != "loose")
    ties = sum(len(keys) - 1 for state in states for keys in state.ties)
    return Held(len(found), arrays, ties, {})


def held_by(state: StateDict) -> Held:
    """What a state dict holds. Those of its values that are no tensors are not counted."""
    arrays = sum(is_array(state.mapping[key]) for key in state.tensors)
    ties = sum(len(keys) - 1 for keys in state.ties)
    special = sum(is_special_tensor(node) for node in state.others.values())
    return Held(len(state.tensors) + special - ties - arrays, arrays, ties, {})


def distinct(root: Node) -> list[Tensor]:
    """The dense tensors of a tree, each once, whatever is wrapped round them."""
    found = {}
    for node in _tensors(root):
        tensor = as_tensor(node)
        if tensor is not None:
            found[tensor.view] = tensor
    return list(found.values())


def _tensors(root: Node) -> list[Node]:
    """What torch makes a tensor of, and arrays: not what lies inside of one."""
    return [node for _, node in walk(root, lambda node: not _is_one(node)) if _is_one(node)]


def _is_one(node: Node) -> bool:
    if type(node) is Tensor:
        return True
    return type(node) is Inert and (as_tensor(node) is not None or is_special_tensor(node))
