"""Tensors of a model that lie in one another's memory: one tensor under two names, or parts of it.

`Parameter(embedding.weight.data)` is another object over the same memory, and so is `weight.t()`.
What is loaded into one is in the other as well, and what is loaded last stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from ckptfix.torch_bridge.materialize import Materializer
from ckptfix.torch_bridge.trial import is_plain

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from ckptfix.tree.document import Tensor


class View(NamedTuple):
    """Where a tensor lies in its storage."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """Its first byte, and the one behind its last."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        begin, size = self.offset * self.dtype.itemsize, self.dtype.itemsize
        return begin, begin + last * size + size


Overlap = dict[str, View]
"""Keys whose tensors may lie in one another's memory, in the order in which they are loaded."""


def ties(state: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys that name one tensor, whether by one object or by several."""
    groups: dict[Hashable, list[str]] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            name = (_storage(value), _view(value)) if _is_dense(value) else id(value)
            groups.setdefault(name, []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


def of(state: Mapping[str, Any]) -> tuple[Overlap, ...]:
    """What shares memory, and is no tie."""
    storages: dict[int, Overlap] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and _is_dense(value) and not repeats(value):
            storages.setdefault(_storage(value), {})[key] = _view(value)
    return tuple(
        {key: views[key] for key in views if key in keys}
        for views in storages.values()
        for keys in _touching(views)
    )


def _touching(views: Overlap) -> Iterator[set[str]]:
    """Groups of keys whose spans reach into one another, of more than one view."""
    group: set[str] = set()
    end = 0
    for key in sorted(views, key=lambda key: views[key].span):
        first, last = views[key].span
        if first >= end:
            if len({views[one] for one in group}) > 1:
                yield group
            group = set()
        group.add(key)
        end = max(end, last)
    if len({views[one] for one in group}) > 1:
        yield group


def overwritten(
    overlap: Overlap, tensors: Mapping[str, Tensor], byteorder: str
) -> Iterator[tuple[str, str]]:
    """Pairs of keys, of which the second would take away what was loaded into the first."""
    size = max(view.span[1] for view in overlap.values())
    memory = torch.zeros(size, dtype=torch.uint8).untyped_storage()
    materializer = Materializer(byteorder=byteorder)
    loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, view in overlap.items():
        if key not in tensors:
            continue
        own = torch.empty(0, dtype=view.dtype).set_(memory, view.offset, view.shape, view.stride)
        own.copy_(materializer.tensor(tensors[key]).detach().reshape(view.shape))
        for other, (there, bits) in list(loaded.items()):
            if not _bits(there).equal(bits):
                yield other, key
                del loaded[other]
        loaded[key] = own, _bits(own)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def repeats(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are one place in memory, where nothing can be copied."""
    rows = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 1 and any(size > 1 and not step for size, step in rows)


def _is_dense(value: torch.Tensor) -> bool:
    return not is_lazy(value) and is_plain(value) and value.numel() > 0


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _view(value: torch.Tensor) -> View:
    shape, stride = tuple(value.shape), tuple(value.stride())
    return View(value.dtype, int(value.storage_offset()), shape, stride)
