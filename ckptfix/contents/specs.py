"""What a state dict holds under each key: shape, dtype, and what kind of tensor it is.

Sources: what `torch.Tensor.__reduce_ex__` writes for sparse, quantized, nested and meta tensors and
for wrapper subclasses, and what `torch._utils._rebuild_*` reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.tensors import as_tensor, disguise, undressed
from ckptfix.report import LAZY, META, QUANTIZED, Spec
from ckptfix.tree.document import Global, Inert, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptfix.tree.document import Node


def specs(mapping: Mapping[str, Node], *, repaired: bool = False) -> dict[str, Spec]:
    """What a state dict holds under each key.

    With `repaired`, numpy arrays and tensors that are saved like them are the tensors that they
    hold, as `fix` and the loaders make them.
    """
    return {key: spec(node, repaired=repaired) for key, node in mapping.items()}


def spec(node: Node, *, repaired: bool = False) -> Spec:
    """What one value is."""
    tensor = as_tensor(node)
    if tensor is not None:
        kind = "" if repaired else disguise(node)
        return Spec(tensor.shape, tensor.dtype.name, kind)
    node = undressed(node)
    if isinstance(node, Inert) and type(node.function) is Global:
        describe = _SPECIAL.get(node.function)
        if describe is not None and isinstance(node.args, tuple):
            return describe(node.args) or Spec(None, None, node.function.name)
    return Spec(None, None)


Arguments = tuple["Node", ...]


def _sparse(args: Arguments) -> Spec | None:
    """`_rebuild_sparse_tensor(layout, (indices, values, size, is_coalesced))`.

    Compressed ones have two tensors of indices, and nothing after the size.
    """
    if len(args) < 2 or not isinstance(args[1], tuple):
        return None
    layout, parts = args[0], args[1]
    named = layout.args[0] if isinstance(layout, Inert) and layout.args else None
    kind = named.removeprefix("torch.") if isinstance(named, str) else "sparse"
    tensors = [tensor for tensor in map(as_tensor, parts) if tensor is not None]
    shape = next((found for part in parts if (found := _shape(part)) is not None), None)
    return Spec(shape, tensors[-1].dtype.name if tensors else None, kind)


def _quantized(args: Arguments) -> Spec | None:
    """`_rebuild_qtensor(storage, offset, size, stride, (scheme, …), …)`."""
    if len(args) < 5 or not isinstance(args[0], Storage):
        return None
    scheme = args[4][0] if isinstance(args[4], tuple) and args[4] else None
    name = scheme.name if isinstance(scheme, Global) else ""
    zero = as_tensor(args[4][2]) if isinstance(args[4], tuple) and len(args[4]) > 2 else None
    if (
        zero is not None and zero.dtype.is_floating_point
    ):  # torch writes the other name all the same
        name = "per_channel_affine_float_qparams"
    return Spec(_shape(args[2]), args[0].dtype.name, QUANTIZED.get(name, "quantized"))


def _nested(args: Arguments) -> Spec:
    """`_rebuild_nested_tensor(buffer, sizes, strides, offsets)`: tensors of several shapes."""
    buffer = as_tensor(args[0]) if args else None
    return Spec(None, buffer.dtype.name if buffer is not None else None, "nested")


def _meta(args: Arguments) -> Spec:
    """`_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)`."""
    return Spec(_shape(args[1]) if len(args) > 1 else None, _dtype(args[:1]), META)


def _wrapper(args: Arguments) -> Spec | None:
    """`_rebuild_wrapper_subclass(class, dtype, size, …)`: DTensor, and what torchao makes."""
    if len(args) < 3 or type(args[0]) is not Global:
        return None
    return Spec(_shape(args[2]), _dtype(args[1:2]), str(args[0]))


def _on_device(args: Arguments) -> Spec | None:
    """`_rebuild_device_tensor_from_…(data, dtype, device, requires_grad)`, which casts."""
    data = as_tensor(args[0]) if args else None
    return None if data is None else Spec(data.shape, _dtype(args[1:2]))


def _lazy(_: Arguments) -> Spec:
    """`UninitializedParameter(requires_grad)`, of a lazy module that never ran."""
    return Spec(None, None, LAZY)


def _dtype(args: Arguments) -> str | None:
    named = args[0] if args else None
    return named.name if type(named) is Global else None


def _shape(node: Node) -> tuple[int, ...] | None:
    if isinstance(node, Inert) and node.function == _SIZE and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple) or not all(type(size) is int for size in node):
        return None
    return node


_SIZE = Global("torch", "Size")
_UTILS = "torch._utils"
_SPECIAL: dict[Global, Callable[[Arguments], Spec | None]] = {
    Global(_UTILS, "_rebuild_sparse_tensor"): _sparse,
    Global(_UTILS, "_rebuild_sparse_csr_tensor"): _sparse,
    Global(_UTILS, "_rebuild_qtensor"): _quantized,
    Global(_UTILS, "_rebuild_nested_tensor"): _nested,
    Global(_UTILS, "_rebuild_meta_tensor_no_storage"): _meta,
    Global(_UTILS, "_rebuild_wrapper_subclass"): _wrapper,
    Global(_UTILS, "_rebuild_device_tensor_from_cpu_tensor"): _on_device,
    Global(_UTILS, "_rebuild_device_tensor_from_numpy"): _on_device,
    Global(_UTILS, "_rebuild_xla_tensor"): _on_device,
    Global("torch.nn.parameter", "UninitializedParameter"): _lazy,
    Global("torch.nn.parameter", "UninitializedBuffer"): _lazy,
    Global("torch.nested._internal.nested_tensor", "_rebuild_njt"): _nested,
}
