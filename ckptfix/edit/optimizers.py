"""What an optimizer keeps, once keys of its model are renamed, dropped, or in another order.

Where it is keyed by name, it follows the names. Nearly always it is keyed by position: by the order
in which parameters were given to it, which is a habit and nowhere on record. Where no parameter
goes or changes its place, it stays as it is, whatever that order. Else only shapes tell: what is
kept for a parameter that goes has to have another shape than all that stay, and where the order
changes, each its own. An optimizer of which that cannot be told is left out, by name, since torch
would refuse it or give layers what belongs to others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.state_dicts import StateDict, find, of_models
from ckptfix.contents.tensors import as_tensor
from ckptfix.tree.document import OrderedMap, Tensor
from ckptfix.tree.rebuild import rebuild

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ckptfix.tree.document import Document, Node

Optimizer = dict[str, "Node"]


class Followed(NamedTuple):
    """A document whose optimizers fit its parameters again."""

    document: Document
    changed: list[tuple[str, str]]
    """Where an optimizer stands that was changed, and what was done."""
    left_out: list[str]
    """Where those stood that are not in it."""


def follow(document: Document, state: StateDict, names: Mapping[str, str]) -> Followed:
    """The document with its optimizers after a change of keys, but for that change itself.

    `names` has the new name of each key that stays, in the order that the model has them.
    """
    changes: dict[int, Optimizer | None] = {}
    changed, left_out = [], []
    states = find(document.root)
    others = [it for it in of_models(states) if it.path != state.path and not it.is_average]
    for found in states:
        if found.role != "optimizer":
            continue
        new = _followed(found.mapping, state, names, others)
        if new is found.mapping:
            continue
        changes[id(found.mapping)] = new
        if new is None:
            left_out.append(found.path)
        else:
            kept, all_of_them = len(new["state"]), len(found.mapping["state"])
            how = "" if _has_names(new) else ", told by their shapes"
            what = f"the state of {kept} of {all_of_them} parameters is kept{how}"
            changed.append((found.path, what))
    if not changes:
        return Followed(document, [], [])
    return Followed(_replaced(document, changes), changed, left_out)


def leave_out(document: Document) -> Followed:
    """The document without its optimizers, where nobody can tell what they would have to hold."""
    found = [state for state in find(document.root) if state.role == "optimizer"]
    if not found:
        return Followed(document, [], [])
    gone = _replaced(document, {id(state.mapping): None for state in found})
    return Followed(gone, [], [state.path for state in found])


def _replaced(document: Document, changes: Mapping[int, Optimizer | None]) -> Document:
    gone = {key for key, new in changes.items() if new is None}

    def change(node: Node) -> Node:
        if isinstance(node, dict) and any(id(value) in gone for value in node.values()):
            kept = {key: value for key, value in node.items() if id(value) not in gone}
            node = OrderedMap(kept, node.attributes) if isinstance(node, OrderedMap) else kept
        elif type(node) is list:
            return [None if id(item) in gone else item for item in node]
        return changes.get(id(node), node)

    return replace(document, root=rebuild(document.root, change, tensors=False))


def _followed(
    optimizer: Optimizer, state: StateDict, names: Mapping[str, str], others: Iterable[StateDict]
) -> Optimizer | None:
    """An optimizer after the change; itself where it needs none, None where that cannot be told."""
    groups = optimizer["param_groups"]
    there = _parameters(state)
    kept = [key for key in names if key in there]
    stays = kept == list(there)
    if not all(map(_is_plain, groups)):
        return optimizer if stays else None
    rows = [row for group in groups for row in group["params"]]
    if any(name in state.mapping for name in (*optimizer["state"], *rows) if type(name) is str):
        return _renamed(optimizer, state, names)
    if all(_is_named(group, state) for group in groups):
        return _of_names(optimizer, names)
    if stays:
        return optimizer
    remaining = {key: it for key, it in there.items() if key in names}  # no others were parameters
    of_this = next((it for it in (there, remaining) if _is_of(optimizer, rows, it)), None)
    if any(_is_of(optimizer, rows, _parameters(other)) for other in others):
        return None if of_this else optimizer
    new = None if of_this is None else _told_by_shapes(optimizer, rows, there, kept)
    if new == rows:
        return optimizer
    return None if new is None or len(groups) != 1 else _of_positions(optimizer, [new], names)


def _has_names(optimizer: Optimizer) -> bool:
    groups = optimizer["param_groups"]
    keys = (*optimizer["state"], *(row for group in groups for row in group["params"]))
    return any(type(key) is str for key in keys) or any("param_names" in it for it in groups)


Shape = tuple[int, ...]


def _told_by_shapes(
    optimizer: Optimizer, rows: Sequence[Node], there: Mapping[str, Tensor], kept: Sequence[str]
) -> list[Node] | None:
    """The positions of the parameters that stay, in their new order; None: shapes do not tell."""
    if not optimizer["state"]:  # nothing is kept that could be given to another
        return list(rows[: len(kept)])
    shape_of = {key: _shape(tensor.shape, tensor.numel) for key, tensor in there.items()}
    stay = Counter(shape_of[key] for key in kept)
    if any(shape_of[key] in stay for key in there if key not in kept):
        return None
    shapes = {row: _shape_kept(optimizer["state"].get(row)) for row in rows}
    staying = [row for row in rows if shapes[row] in stay]
    if Counter(shapes[row] for row in staying) != stay:
        return None
    if list(kept) == [key for key in there if key in kept]:
        return staying
    if len(stay) < len(kept):
        return None
    at = {shapes[row]: row for row in staying}
    return [at[shape_of[key]] for key in kept]


def _shape(shape: Shape, numel: int) -> Shape:
    """The shape of a parameter; of single numbers one, since what is kept for them may have any."""
    return (1,) if numel == 1 else shape


def _shape_kept(kept: Node) -> Shape | None:
    """The shape of the parameter that something is kept for; None where that does not tell."""
    found = _shapes(kept)
    if not found and isinstance(kept, dict) and any(map(as_tensor, kept.values())):
        return (1,)
    return found.pop() if len(found) == 1 else None


def _is_plain(group: Node) -> bool:
    """Whether a group lists parameters by numbers or names, as all do."""
    params = group.get("params") if isinstance(group, dict) else None
    return isinstance(params, list) and all(type(row) in (int, str) for row in params)


def _is_named(group: Mapping[str, Node], state: StateDict) -> bool:
    """Whether a group says the names of its parameters, which are keys of the state dict."""
    found = group.get("param_names")
    return (
        isinstance(found, list)
        and len(found) == len(group["params"])
        and all(type(name) is str and name in state.mapping for name in found)
    )


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _parameters(state: StateDict) -> dict[str, Tensor]:
    """What a state dict holds of a model's parameters: no counters, no buffers, a tie once."""
    found: dict[str, Tensor] = {}
    seen = set()
    for key, tensor in state.tensors.items():
        if key.endswith(_BUFFERS) or tensor.view in seen:
            continue
        if tensor.dtype.is_floating_point or tensor.dtype.name.startswith("complex"):
            found[key] = tensor
            seen.add(tensor.view)
    return found


def _is_of(optimizer: Optimizer, rows: Sequence[Node], parameters: Mapping[str, Tensor]) -> bool:
    """Whether an optimizer is one of some parameters: by their number, and by shapes.

    Where it has several groups, nobody knows the order, and only the shapes are told.
    """
    if len(rows) != len(parameters):
        return False
    shapes = [parameter.shape for parameter in parameters.values()]
    kept = [_shapes(optimizer["state"].get(at)) for at in rows]
    if len(optimizer["param_groups"]) == 1:
        return all(found <= {shape} for found, shape in zip(kept, shapes, strict=True))
    return not Counter(shape for found in kept for shape in found) - Counter(shapes)


def _shapes(kept: Node) -> set[tuple[int, ...]]:
    """The shapes of what is kept for a parameter, apart from single numbers."""
    values = map(as_tensor, kept.values()) if isinstance(kept, dict) else ()
    return {value.shape for value in values if value is not None and value.numel != 1}


def _of_positions(
    optimizer: Optimizer, positions: Sequence[Sequence[Node]], names: Mapping[str, str]
) -> Optimizer:
    """An optimizer of some of its parameters, for each group in their new order."""
    number = {old: new for new, old in enumerate(at for group in positions for at in group)}
    groups = []
    for group, kept in zip(optimizer["param_groups"], positions, strict=True):
        new = {**group, "params": [number[at] for at in kept]}
        if isinstance(group.get("param_names"), list):
            pairs = zip(group["params"], group["param_names"], strict=False)
            name = {at: names.get(old, old) for at, old in pairs if type(old) is str}
            new["param_names"] = [name.get(at) for at in kept]
        groups.append(new)
    state = optimizer["state"]
    kept_state = type(state)((new, state[old]) for old, new in number.items() if old in state)
    return _like(optimizer, {**optimizer, "state": kept_state, "param_groups": groups})


def _like(optimizer: Optimizer, new: Optimizer) -> Optimizer:
    """The same kind of mapping; the same one where nothing of it was changed."""
    parts = ("state", "param_groups")
    if all(_rows(new[part]) == _rows(optimizer[part]) for part in parts):
        return optimizer
    return OrderedMap(new, optimizer.attributes) if isinstance(optimizer, OrderedMap) else new


def _rows(part: Node) -> list[Node]:
    if isinstance(part, dict):
        return [(key, id(value)) for key, value in part.items()]
    return [(group["params"], group.get("param_names")) for group in part]


def _of_names(optimizer: Optimizer, names: Mapping[str, str]) -> Optimizer:
    """An optimizer whose groups say the names of their parameters."""
    positions = []
    for group in optimizer["param_groups"]:
        at_name = dict(zip(group["param_names"], group["params"], strict=True))
        order = names if len(optimizer["param_groups"]) == 1 else group["param_names"]
        positions.append([at_name[name] for name in order if name in names and name in at_name])
    return _of_positions(optimizer, positions, names)


def _renamed(optimizer: Optimizer, state: StateDict, names: Mapping[str, str]) -> Optimizer:
    """An optimizer that is keyed by the names of the parameters (FSDP)."""

    def kept(rows: Iterable[Node]) -> list[Node]:
        return [name for name in rows if name in names or name not in state.mapping]

    old = optimizer["state"]
    made = type(old)((names.get(key, key), old[key]) for key in kept(old))
    groups = [
        {**group, "params": [names.get(name, name) for name in kept(group["params"])]}
        for group in optimizer["param_groups"]
    ]
    return _like(optimizer, {**optimizer, "state": made, "param_groups": groups})
