"""The averages of a checkpoint (EMA, SWA) taken instead of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.averages import within
from ckptfix.contents.state_dicts import StateDict, are_averages, choose_all, distinct
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import SelectionError
from ckptfix.hints import Hint, adding, command
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.contents.averages import Averages
    from ckptfix.tree.document import Document, Node


class Taken(NamedTuple):
    """A checkpoint in which averages stand where a state dict can be selected."""

    document: Document
    path: str
    """The path of the state dict that is the averages."""
    place: str
    """Where they came from, for people: `ema`, `state_dict: model_ema.*`."""


def take(document: Document, select: str | None = None) -> Taken:
    """The only averages in a checkpoint, or in its state dict at `select`.

    Averages that lie beside the weights in one state dict are put in their place. Raises
    `SelectionError` where there are none, or several.
    """
    found = _found(document, select)
    if not found:
        at = "" if select is None else f" at {select!r}"
        unnamed = next(_lists(document.root), None)
        raise SelectionError(
            f"holds no averages of weights{at}"
            if unnamed is None
            else f"holds averages without names: {unnamed}, a list in the order of the parameters",
            where=document.name,
            hint=Hint("see what it holds", command("inspect", document.name)),
            code="no-averages",
        )
    if len(found) > 1:
        raise SelectionError(
            f"holds {len(found)} averages of weights: {listed(map(_place, found), 20)}",
            where=document.name,
            hint=adding("choose one", "select", found[0][0].path),
            code="ambiguous-state-dict",
        )
    state, averages = found[0]
    place = _place(found[0])
    if averages is None:
        return Taken(document, state.path, place)
    mapping = averages.mapping

    def change(node: Node) -> Node:
        return mapping if node is state.node else node

    changed = replace(document, root=rebuild(document.root, change))
    return Taken(changed, state.path, place)


def _lists(root: Node) -> Iterator[str]:
    """Where averages are a list of tensors, as torch_ema's `shadow_params`."""
    for path, node in walk(root, tensors=False):
        if type(node) is list and node and are_averages(path) and as_tensor(node[0]) is not None:
            yield "/".join(path)


def places(document: Document) -> list[str]:
    """Where averages of weights stand in a checkpoint, for people."""
    return list(map(_place, _found(document, None)))


_Found = tuple[StateDict, "Averages | None"]


def _found(document: Document, select: str | None) -> list[_Found]:
    """The state dicts that are averages, and those that hold some."""
    states = distinct(choose_all(document, [select] if select is not None else ()))
    found: list[_Found] = []
    for state in states:
        inside = within(state)
        found += [(state, averages) for averages in inside]
        if not inside and state.is_average and any(map(_has_shape, state.tensors.values())):
            found.append((state, None))
    return found


def _has_shape(tensor: object) -> bool:
    return bool(getattr(tensor, "shape", ()))


def _place(found: _Found) -> str:
    state, averages = found
    if averages is None:
        return state.path
    return averages.keys if state.path == "/" else f"{state.path}: {averages.keys}"
