"""What a program holds, described as a tree: the inverse of `materialize.tree`.

Tensors stay where they are; their bytes are fetched when they are written, a block at a time.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from ckptfix.bytes.source import Source, too_short
from ckptfix.bytes.span import Span
from ckptfix.errors import UnsupportedError
from ckptfix.torch_bridge.plain import described
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME, DType
from ckptfix.tree.rebuild import rebuild

if TYPE_CHECKING:
    from collections.abc import Callable


def describe(value: Any) -> Node:
    """A tree for tensors, containers and plain values.

    Raises `UnsupportedError` for objects of other classes, which only `torch.save` can pickle.
    """
    tensors = _Tensors()

    def change(value: Any) -> Node:
        if isinstance(value, torch.nn.Parameter):
            data = tensors.describe(value.detach())
            return Inert(_PARAMETER, (data, value.requires_grad, OrderedMap()))
        if isinstance(value, torch.Tensor):
            return tensors.describe(value)
        make = _NODES.get(type(value))
        if make is not None:
            return make(value)
        plain = described(value)
        if plain is not None:
            return plain
        raise UnsupportedError(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be written by ckptfix",
            hint="save it with torch.save, or leave it out",
        )

    return rebuild(value, change, _keep_metadata)


def _keep_metadata(value: Any, node: Node) -> None:
    metadata = getattr(value, "_metadata", None)
    if isinstance(node, OrderedMap) and metadata is not None:
        node.attributes = {"_metadata": OrderedMap(metadata)}


def _as_it_is(value: Any) -> Node:
    return value


def _set(value: set[Any] | frozenset[Any]) -> Node:
    return Inert(Global("builtins", type(value).__name__), (list(value),))


def _device(value: torch.device) -> Node:
    kind, _, index = str(value).partition(":")
    return Inert(Global("torch", "device"), (kind, int(index)) if index else (kind,))


_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_NODES: dict[type, Callable[[Any], Node]] = {
    **dict.fromkeys((dict, list, tuple, OrderedMap, Inert, Tensor, Storage, Global), _as_it_is),
    OrderedDict: OrderedMap,
    set: _set,
    frozenset: _set,
    complex: lambda value: Inert(Global("builtins", "complex"), (value.real, value.imag)),
    torch.Size: lambda value: Inert(Global("torch", "Size"), (tuple(value),)),
    torch.dtype: lambda value: Global("torch", str(value).removeprefix("torch.")),
    torch.device: _device,
}


class _Tensors:
    """Describes tensors; those that share memory share a storage."""

    def __init__(self) -> None:
        self._storages: dict[int, Storage] = {}

    def describe(self, value: torch.Tensor) -> Tensor:
        dtype = BY_NAME.get(str(value.dtype).removeprefix("torch."))
        if (
            dtype is None
            or value.is_quantized
            or value.is_meta
            or value.layout is not torch.strided
        ):
            raise UnsupportedError(
                f"a {value.layout} tensor of {value.dtype} on {value.device} cannot be written "
                "by ckptfix",
                hint="save it with torch.save",
            )
        bits = {name: True for name in ("conj", "neg") if getattr(value, f"is_{name}")()}
        return Tensor(
            self._storage(value.untyped_storage(), dtype),
            dtype,
            tuple(value.shape),
            tuple(value.stride()),
            int(value.storage_offset()),
            value.requires_grad,
            metadata=bits or None,
        )

    def _storage(self, storage: torch.UntypedStorage, dtype: DType) -> Storage:
        size, device = storage.nbytes(), str(storage.device)
        source = _Memory(storage)
        numel = size // dtype.itemsize
        span = Span(source, 0, numel * dtype.itemsize)
        described = Storage(dtype, numel, device, (span,))
        return self._storages.setdefault(storage._cdata, described)


class _Memory(Source):
    """The bytes of a storage in memory, on whatever device; a block at a time comes to the CPU."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.name, self.size = "a tensor in memory", storage.nbytes()
        self._storage = storage

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise too_short(self.name, offset, length)
        whole = torch.empty(0, dtype=torch.uint8, device=self._storage.device)
        part = whole.set_(self._storage)[offset : offset + length].cpu().contiguous()
        return ctypes.string_at(part.data_ptr(), length)
