"""Edits: a document in, another document over the same bytes out. Nothing is read or written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.document import (
    Document,
    Inert,
    Node,
    OrderedMap,
    Storage,
    Tensor,
    contiguous_stride,
)
from ckptfix.errors import UnsupportedError
from ckptfix.files import check_crc
from ckptfix.formats import containers
from ckptfix.spans import ComputedSource, Span
from ckptfix.state_dicts import StateDict, choose, is_special_tensor, optimizers
from ckptfix.tensors import DEVICE_TENSORS, as_tensor
from ckptfix.trees import children, rebuild, walk

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterable, Mapping

    from ckptfix.renaming import Renaming


def rename(document: Document, renamings: Iterable[tuple[StateDict, Renaming]]) -> Document:
    """The document with the keys of some of its state dicts renamed.

    Order stays. `_metadata` is renamed with the keys. So is an optimizer that is keyed by the
    names of the parameters (FSDP, `param_names`); one that is keyed by position needs nothing.
    """
    renamed: dict[int, Node] = {}
    names: dict[str, str] = {}
    for state, renaming in renamings:
        if state.origin is not None:
            raise _has_no_keys(document, state)
        renamed[id(state.mapping)] = _renamed_mapping(state.mapping, renaming)
        names.update(renaming.changes)
    for optimizer in optimizers(document.root):
        if _is_keyed_by_name(optimizer, names):
            renamed[id(optimizer)] = _renamed_optimizer(optimizer, names)
    root = rebuild(document.root, lambda node: renamed.get(id(node), node), tensors=False)
    return replace(document, root=root)


def _has_no_keys(document: Document, state: StateDict) -> UnsupportedError:
    return UnsupportedError(
        f"{document.name}: {state.path} is a {kind(state.origin)}, not a mapping whose keys "
        "could be renamed",
        hint=f"take its tensors first: ckptfix convert {document.name} OUT.safetensors",
    )


def _renamed_mapping(mapping: dict[str, Node], renaming: Renaming) -> dict[str, Node]:
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


def to_cpu(document: Document) -> tuple[Document, Counter[str]]:
    """The document with every storage tagged `cpu`, and how many storages each other tag had.

    `torch.device` values among hyper-parameters are values like any other, and stay.
    """
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
        if isinstance(node, Inert) and node.function in DEVICE_TENSORS and len(node.args) == 4:
            data, dtype, device, requires_grad = node.args
            tags[str(device)] += device != "cpu"
            return replace(node, args=(data, dtype, "cpu", requires_grad))
        if isinstance(node, Tensor):
            storage = on_cpu(node.storage)
            return node if storage is node.storage else replace(node, storage=storage)
        return on_cpu(node) if isinstance(node, Storage) else node

    root = rebuild(document.root, change)
    return replace(document, root=root), +tags


# --- fitting a container


class Fitted(NamedTuple):
    """A document that a container can hold, and what of the original it leaves out."""

    document: Document
    left_out: list[tuple[str, str]]
    """Path and kind of each thing that is not in it, such as `("epoch", "int")`."""


def only(document: Document, state: StateDict) -> Fitted:
    """The document reduced to one state dict."""
    if state.mapping is document.root:
        return Fitted(document, [])
    left_out = _beside(document.root, state.node)
    if isinstance(state.origin, Inert):
        left_out.append((state.path, f"{state.origin.cls}, apart from its weights"))
    return Fitted(replace(document, root=state.mapping, extras={}), left_out)


def flatten(document: Document, state: StateDict) -> Fitted:
    """The document as safetensors holds it: one state dict, every value a dense row-major tensor.

    What is no tensor is left out. Tensors of another layout are made row-major when they are
    written, one at a time. Raises `UnsupportedError` for tensors that safetensors cannot hold: to
    leave one of those out would be to lose weights.
    """
    fitted = only(document, state)
    left_out = fitted.left_out
    flat = OrderedMap(attributes=state.metadata and {"_metadata": state.metadata})
    dense: dict[Hashable, Tensor] = {}  # tied tensors stay one
    for key, node in state.mapping.items():
        tensor = as_tensor(node)
        if tensor is not None:
            if tensor.view not in dense:
                dense[tensor.view] = _dense(tensor, key, document)
            flat[key] = dense[tensor.view]
        elif is_special_tensor(node):
            raise cannot_hold(document, key, *_special(node.cls))
        else:
            left_out.append((_below(state.path, key), kind(node)))
    return Fitted(replace(fitted.document, root=flat, extras={}), left_out)


def _dense(tensor: Tensor, key: str, document: Document) -> Tensor:
    if tensor.dtype.safetensors is None:
        raise cannot_hold(document, key, f"{tensor.dtype} tensor")
    swapped = document.byteorder != "little" and tensor.dtype.itemsize > 1
    plain = replace(tensor, requires_grad=False, hooks=None, metadata=None)
    if tensor.is_contiguous and not swapped and not tensor.metadata:
        return plain
    return _computed(tensor, key, document.byteorder)


def _computed(tensor: Tensor, key: str, byteorder: str) -> Tensor:
    """The same tensor over a storage of its own, whose bytes are gathered when they are written."""

    def gather() -> bytes:
        from ckptfix.materialize import contiguous_bytes

        for span in tensor.storage.spans:
            check_crc(span, repr(key))
        return contiguous_bytes(tensor, byteorder)

    source = ComputedSource(tensor.nbytes, gather, key)
    span = Span(source, 0, tensor.nbytes)
    storage = Storage(tensor.dtype, tensor.numel, "cpu", (span,), tensor.storage.key)
    return Tensor(storage, tensor.dtype, tensor.shape, contiguous_stride(tensor.shape))


_SPECIAL = (
    ("sparse", "sparse tensor", "x.to_dense()"),
    ("qtensor", "quantized tensor", "x.dequantize()"),
    ("nested", "nested tensor", "x.to_padded_tensor(0.0)"),
    ("meta", "meta tensor, without data", ""),
)


def _special(cls: str) -> tuple[str, str]:
    """What a person would call a tensor that is not dense, and what makes it dense in torch."""
    found = ((what, dense) for part, what, dense in _SPECIAL if part in cls)
    return next(found, ("tensor subclass", ""))


def cannot_hold(document: Document, key: str, what: str, dense: str = "") -> UnsupportedError:
    """The refusal of a value that safetensors has no form for; `dense` is code that makes one."""
    instead = f", or save {dense} of it in torch first" if dense else ""
    return UnsupportedError(
        f"{document.name}: {key!r} is a {what}, which safetensors cannot hold",
        hint=f"write a .pt file instead: give OUT the extension .pt{instead}",
    )


def kind(node: Node) -> str:
    """What a person would call a node: `int`, `dict of 3`, `argparse.Namespace`."""
    if isinstance(node, Inert):
        return node.cls
    if isinstance(node, (dict, list, tuple)):
        return f"{'dict' if isinstance(node, dict) else type(node).__name__} of {len(node)}"
    return type(node).__name__ if node is not None else "None"


def _below(path: str, key: str) -> str:
    return key if path == "/" else f"{path}/{key}"


def _beside(root: Node, kept: Node) -> list[tuple[str, str]]:
    """What lies beside the way from the root to `kept`, each whole."""
    way = next(path for path, node in walk(root) if node is kept)
    left: list[tuple[str, str]] = []
    above = "/"
    for step in way:
        left += [
            (_below(above, name), kind(child)) for name, child in children(root) if name != step
        ]
        root = dict(children(root)).get(step)
        above = _below(above, step)
    return left


def fit(document: Document, path: str | os.PathLike[str], select: str | None = None) -> Fitted:
    """The document as the container of an output path holds it, reduced to `select` if given."""
    if containers.writable(path).tensors_only:
        return flatten(document, choose(document, select))
    fitted = Fitted(document, []) if select is None else only(document, choose(document, select))
    texts = [(f"__metadata__/{key}", "str") for key in document.metadata if key != "format"]
    return fitted._replace(left_out=[*fitted.left_out, *texts])
