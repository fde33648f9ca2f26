"""Pruned weights multiplied by their masks: `weight_orig` and `weight_mask` become `weight`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.span import MadeSource, Span
from ckptfix.contents.state_dicts import StateDict, choose, find, of_models
from ckptfix.edit.compacting import gathered
from ckptfix.edit.edits import has_no_keys
from ckptfix.errors import SelectionError
from ckptfix.hints import Hint, command
from ckptfix.keys.renaming import without_collisions
from ckptfix.tree import floats
from ckptfix.tree.document import OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.rebuild import rebuild

if TYPE_CHECKING:
    from ckptfix.tree.document import Document, Node

_ORIG, _MASK = "_orig", "_mask"


class Applied(NamedTuple):
    """A document whose pruned weights are computed, and the keys of those, by state dict."""

    document: Document
    keys: dict[str, list[str]]


def apply_masks(document: Document, select: str | None = None) -> Applied:
    """The document with each pruned weight multiplied by its mask, when it is read.

    Raises:
        SelectionError: there is no such state dict, or nothing in it is pruned.
        UnsupportedError: a pruned weight is part of a pickled model.
    """
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    made: dict[int, Node] = {}
    keys: dict[str, list[str]] = {}
    for state in states:
        pruned = _pruned(state)
        if pruned and state.origin is not None:
            raise has_no_keys(document, state)
        if pruned:
            keys[state.path] = [key.removesuffix(_ORIG) for key in pruned]
            made[id(state.mapping)] = _multiplied(document, state.mapping, pruned)
    if not keys:
        raise SelectionError(
            "has no pruned weights (no key ends in _orig with one in _mask beside it)",
            where=document.name,
            hint=Hint("see its keys", command("inspect", document.name, all=True)),
            code="no-such-key",
        )
    root = rebuild(document.root, lambda node: made.get(id(node), node), tensors=False)
    return Applied(replace(document, root=root), keys)


def _pruned(state: StateDict) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight and the mask of each `…_orig` that has a mask of its shape."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in state.mapping:
        weight = state.tensors.get(key) if key.endswith(_ORIG) else None
        mask = state.tensors.get(key.removesuffix(_ORIG) + _MASK)
        if weight is None or mask is None or weight.shape != mask.shape:
            continue
        if weight.dtype.name in floats.FORMS and floats.is_known(mask.dtype.name):
            found[key] = weight, mask
    return found


def _multiplied(
    document: Document, mapping: dict[str, Node], pruned: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Node]:
    masks = {key.removesuffix(_ORIG) + _MASK for key in pruned}
    kept = [key for key in mapping if key not in masks]
    names = without_collisions(
        {key: key.removesuffix(_ORIG) if key in pruned else key for key in kept}
    )
    items = {
        names[key]: _product(document, names[key], *pruned[key]) if key in pruned else mapping[key]
        for key in kept
    }
    attributes = mapping.attributes if isinstance(mapping, OrderedMap) else None
    return OrderedMap(items, attributes) if isinstance(mapping, OrderedMap) else items


class _Product(MadeSource):
    """The elements of a weight, each multiplied by that of its mask, when they are read."""

    def __init__(self, key: str, weight: Tensor, mask: Tensor, byteorder: str) -> None:
        self.name, self.size = key, weight.nbytes
        self._dtypes = weight.dtype, mask.dtype
        self._spans = gathered(weight, byteorder, repr(key)), gathered(mask, byteorder, repr(key))
        self._byteorder = byteorder

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; elements that this cuts are computed whole."""
        size = self._dtypes[0].itemsize
        first, last = offset // size, -(-(offset + length) // size)
        weight, mask = (
            floats.words(
                span.slice(first * dtype.itemsize, (last - first) * dtype.itemsize).read(),
                dtype.itemsize,
                "little",
            )
            for span, dtype in zip(self._spans, self._dtypes, strict=True)
        )
        made = floats.product(weight, mask, self._dtypes[0].name, self._dtypes[1].name)
        data = floats.words(made.tobytes(), size, self._byteorder).tobytes()
        start = offset - first * size
        return data[start : start + length]


def _product(document: Document, key: str, weight: Tensor, mask: Tensor) -> Tensor:
    source = _Product(key, weight, mask, document.byteorder)
    storage = Storage(weight.dtype, weight.numel, "cpu", (Span(source, 0, weight.nbytes),))
    return Tensor(storage, weight.dtype, weight.shape, contiguous_stride(weight.shape))
