"""Edits: a document in, another document over the same bytes out. Nothing is read or written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.contents.modules import unwrapped
from ckptfix.contents.state_dicts import StateDict, optimizers
from ckptfix.contents.tensors import as_tensor, disguise, is_device_tensor
from ckptfix.door import beside, taking
from ckptfix.errors import SelectionError, UnsupportedError
from ckptfix.hints import Hint, command
from ckptfix.tree.document import (
    Document,
    Inert,
    Node,
    OrderedMap,
    Storage,
    Tensor,
    kind,
)
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import packed_bytes, script_constants, storages, walk

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ckptfix.keys.renaming import Renaming


def rename(document: Document, renamings: Iterable[tuple[StateDict, Renaming]]) -> Document:
    """The document with the keys of some of its state dicts renamed.

    Order stays. `_metadata` is renamed with the keys. So is an optimizer that is keyed by the
    names of the parameters (FSDP, `param_names`); one that is keyed by position needs nothing.
    Raises `SelectionError` where one of the state dicts is not its own.
    """
    renamed: dict[int, Node] = {}
    names: dict[str, str] = {}
    states = []
    for state, renaming in renamings:
        if state.origin is not None:
            raise has_no_keys(document, state)
        states.append(state)
        renamed[id(state.mapping)] = renamed_mapping(state.mapping, renaming)
        names.update(renaming.changes)
    for optimizer in optimizers(document.root):
        if _is_keyed_by_name(optimizer, names):
            renamed[id(optimizer)] = _renamed_optimizer(optimizer, names)
    return exchanged(document, states, renamed, tensors=False)


def exchanged(
    document: Document,
    states: Iterable[StateDict],
    new: Mapping[int, Node],
    *,
    tensors: bool = True,
) -> Document:
    """The document with other nodes in the place of some of its own, by their ids.

    `states` are those whose mappings, or tensors, they are. Raises `SelectionError` where one of
    them is of another document: nothing would come of that, and nobody would know. `tensors` is
    that of `rebuild`.
    """
    met: set[int] = set()

    def change(node: Node) -> Node:
        other = new.get(id(node))
        if other is None:
            return node
        met.add(id(node))
        return other

    root = rebuild(document.root, change, tensors=tensors)
    strange = new.keys() - met
    if strange:  # what is not met may be a part of what was replaced
        strange = strange.difference(id(node) for _, node in walk(document.root))
    for state in states if strange else ():
        if not strange.isdisjoint(map(id, (state.mapping, *state.mapping.values()))):
            raise SelectionError(
                f"{state.path!r} is a state dict of another checkpoint, or of an earlier edit",
                where=document.name,
                hint="take it from the checkpoint that is edited",
            )
    return replace(document, root=root)


def without(document: Document, states: Iterable[StateDict], gone: Collection[str]) -> Document:
    """The document without some keys of some of its state dicts. Versions of modules stay.

    Raises `SelectionError` where one of them is not its own.
    """
    smaller: dict[int, Node] = {}
    states = list(states)
    for state in states:
        if state.origin is not None:
            raise has_no_keys(document, state)
        smaller[id(state.mapping)] = mapping_without(state.mapping, gone)
    return exchanged(document, states, smaller, tensors=False)


def with_mapping(document: Document, state: StateDict, mapping: dict[str, Node]) -> Document:
    """The document with another mapping in the place of a state dict."""
    if state.origin is not None:
        raise has_no_keys(document, state)
    return replace(
        document,
        root=rebuild(
            document.root,
            lambda node: mapping if node is state.mapping else node,
            tensors=False,
        ),
    )


def mapping_without(mapping: dict[str, Node], gone: Collection[str]) -> dict[str, Node]:
    """A state dict without some keys."""
    items = {key: value for key, value in mapping.items() if key not in gone}
    return OrderedMap(items, mapping.attributes) if isinstance(mapping, OrderedMap) else items


def has_no_keys(document: Document, state: StateDict) -> UnsupportedError:
    """The refusal to change keys of what is no mapping in the tree, but a pickled model."""
    hint = Hint("take its tensors first", command("convert", document.name, "OUT.safetensors"))
    if isinstance(state.origin, Inert) and unwrapped(state.origin) is not state.origin:
        fix = command("fix", document.name, beside(document, "fixed"))
        hint = Hint("take the model out of its wrapper", fix)
    return UnsupportedError(
        f"is a {kind(state.origin)}, not a mapping whose keys could be renamed",
        where=state.path,
        hint=hint,
    ).within(document.name)


def renamed_mapping(mapping: dict[str, Node], renaming: Renaming) -> dict[str, Node]:
    """A state dict under new keys, its `_metadata` under new paths."""
    items = {renaming.keys.get(key, key): value for key, value in mapping.items()}
    if not isinstance(mapping, OrderedMap):
        return items
    if mapping.metadata is None:
        return OrderedMap(items, mapping.attributes)
    versions = OrderedMap(renaming.metadata(mapping.metadata))
    return OrderedMap(items, {**mapping.attributes, "_metadata": versions})


def _is_keyed_by_name(optimizer: dict[str, Node], names: Mapping[str, str]) -> bool:
    return any(name in names for name in optimizer["state"]) or any(
        isinstance(group, dict)
        and any(name in names for row in ("params", "param_names") for name in _strings(group, row))
        for group in optimizer["param_groups"]
    )


def _strings(group: Mapping[str, Node], row: str) -> list[str]:
    names = group.get(row)
    return [name for name in names if type(name) is str] if isinstance(names, list) else []


def _renamed_optimizer(optimizer: dict[str, Node], names: Mapping[str, str]) -> dict[str, Node]:
    state, groups = optimizer["state"], optimizer["param_groups"]
    new = {
        **optimizer,
        "state": type(state)((_new_name(key, names), value) for key, value in state.items()),
        "param_groups": [_renamed_group(group, names) for group in groups],
    }
    return OrderedMap(new, optimizer.attributes) if isinstance(optimizer, OrderedMap) else new


def _renamed_group(group: Node, names: Mapping[str, str]) -> Node:
    if not isinstance(group, dict):
        return group
    rows = {
        row: [_new_name(name, names) for name in group[row]]
        for row in ("params", "param_names")
        if _strings(group, row)
    }
    return {**group, **rows}


def _new_name(name: Node, names: Mapping[str, str]) -> Node:
    return names.get(name, name) if type(name) is str else name


# --- devices


def _check_embedded(document: Document) -> None:
    """Refuse a checkpoint that is kept as bytes, and has storages elsewhere than on the CPU."""
    from ckptfix.formats import embedded  # few documents have such bytes

    for path, inner in embedded.places(document):
        if any(storage.device != "cpu" for storage in storages(inner.root)):
            raise UnsupportedError(
                f"keeps a checkpoint as bytes at {path!r}, with storages that are not on the CPU",
                where=document.name,
                hint=Hint("take it out first", taking(document, path)),
            )


def to_cpu(document: Document) -> tuple[Document, Counter[str]]:
    """The document with every storage tagged `cpu`, and how many storages each other tag had.

    `torch.device` values among hyper-parameters are values like any other, and stay. Raises
    `UnsupportedError` where constants of a TorchScript program are on another device: they are part
    of the program; and where a checkpoint that is kept as bytes has some.
    """
    away = {tensor.storage.device for tensor in script_constants(document)} - {"cpu"}
    if away:
        raise UnsupportedError(
            f"is a TorchScript program with constants on {', '.join(sorted(away))}",
            where=document.name,
            hint="load it with torch.jit.load(path, map_location='cpu')",
        )
    if any(packed_bytes(document.root)):
        _check_embedded(document)
    moved: dict[int, Storage] = {}
    tags: Counter[str] = Counter()

    def on_cpu(storage: Storage) -> Storage:
        if storage.device == "cpu":
            return storage
        known = moved.get(id(storage))
        if known is None:
            tags[storage.device] += 1
            known = moved[id(storage)] = replace(storage, device="cpu")
        return known

    def change(node: Node) -> Node:
        if is_device_tensor(node):
            data, dtype, device, requires_grad = node.args
            tags[str(device)] += device != "cpu"
            if disguise(node):  # no torch builds one of those any longer
                return as_tensor(node) or node
            return replace(node, args=(data, dtype, "cpu", requires_grad))
        if isinstance(node, Tensor):
            storage = on_cpu(node.storage)
            return node if storage is node.storage else replace(node, storage=storage)
        return on_cpu(node) if isinstance(node, Storage) else node

    root = rebuild(document.root, change)
    return replace(document, root=root), +tags
