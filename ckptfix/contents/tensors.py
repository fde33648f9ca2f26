"""The dense tensor that a node is, or plainly wraps: parameters, tensor subclasses, numpy arrays.

Such nodes stay in the tree as they were pickled; this is how the rest of ckptfix sees through them.
Sources: `torch._utils._rebuild_parameter`, `torch._tensor._rebuild_from_type_v2`, `Variable` and
`Parameter` of torch before 0.4, `numpy.ndarray.__reduce__`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.limits import DEFAULT
from ckptfix.pickles.torch_objects import BUILDERS
from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Callable


def as_tensor(node: Node) -> Tensor | None:
    """The dense tensor behind a node, or None. Nothing is decoded."""
    for _ in range(_DEPTH):
        if not isinstance(node, Inert):
            break
        unwrap = _WRAPPERS.get(node.function) if type(node.function) is Global else None
        node = unwrap(node) if unwrap is not None else None
    return node if isinstance(node, Tensor) else None


def without_disguise(node: Node) -> Node:
    """The tensor that `load_state_dict` takes, of a numpy array or a tensor saved as one."""
    if isinstance(node, Inert) and type(node.function) is Global and node.function in _DISGUISES:
        return as_tensor(node) or node
    return node


DEVICE_TENSORS = frozenset(
    Global("torch._utils", f"_rebuild_device_tensor_from_{kind}")
    for kind in ("numpy", "cpu_tensor")
)
"""How tensors of devices without storages of their own (XLA, HPU, …) are saved: with a copy on the
CPU, and the device as the third argument."""

_DEPTH = 8
"""How many wrappers may lie around a tensor; an object may hold itself."""


def _first_argument(node: Inert) -> Node:
    return node.args[0] if node.args else None


def _first_of_state(node: Inert) -> Node:
    """`Parameter` and `Variable` before 0.4: state `(data, …)`; later ones are given it at once."""
    return node.state[0] if isinstance(node.state, tuple) and node.state else _first_argument(node)


def _of_type(node: Inert) -> Node:
    """`_rebuild_from_type_v2(function, type, args, state)`: what `function(*args)` would be."""
    if len(node.args) != 4 or type(node.args[2]) is not tuple:
        return None
    function, _, args, _ = node.args
    build = BUILDERS.get(function) if type(function) is Global else None
    return build(args, DEFAULT) if build is not None else Inert(function, args)


def _of_device(node: Inert) -> Node:
    """`_rebuild_device_tensor_from_…(data, dtype, device, requires_grad)`, if it casts nothing."""
    data = as_tensor(node.args[0]) if len(node.args) == 4 else None
    dtype = Global("torch", data.dtype.name) if data is not None else None
    return data if dtype is not None and node.args[1] == dtype else None


_WRAPPERS: dict[Global, Callable[[Inert], Node]] = {
    Global("torch._utils", "_rebuild_parameter"): _first_argument,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first_argument,
    Global("torch.nn.parameter", "Parameter"): _first_of_state,
    Global("torch.autograd.variable", "Variable"): _first_of_state,
    Global("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    **dict.fromkeys(DEVICE_TENSORS, _of_device),
}


# --- numpy


def _array(node: Inert) -> Tensor | None:
    """`_reconstruct(ndarray, (0,), b"b")` with state (version, shape, dtype, fortran, data)."""
    if not isinstance(node.state, tuple) or len(node.state) != 5:
        return None
    _, shape, described, fortran, data = node.state
    if isinstance(data, str):  # Python 2 has one type for text and bytes
        data = data.encode("utf-8")
    return _of_buffer(data, described, shape, fortran is True)


def _frombuffer(node: Inert) -> Tensor | None:
    """`_frombuffer(data, dtype, shape, order)`: the same in protocol 5."""
    if len(node.args) != 4:
        return None
    data, described, shape, order = node.args
    return _of_buffer(data, described, shape, order == "F")


def _of_buffer(data: Node, described: Node, shape: Node, fortran: bool) -> Tensor | None:
    known = _numpy_dtype(described)
    if known is None or not isinstance(data, (bytes, bytearray)) or not _is_shape(shape):
        return None
    data = bytes(data)
    dtype, swapped = known
    tensor = Tensor(Storage(dtype, len(data) // dtype.itemsize, "cpu"), dtype, shape, ())
    if tensor.nbytes != len(data):
        return None
    tensor.storage.spans = (_span(data, dtype.word if swapped else 1),)
    reverse = tuple(reversed(shape))
    tensor.stride = contiguous_stride(reverse)[::-1] if fortran else contiguous_stride(shape)
    return tensor


def _is_shape(shape: Node) -> bool:
    return type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)


def _numpy_dtype(node: Node) -> tuple[DType, bool] | None:
    """The dtype that `dtype("f4", False, True)`, state (3, "<", …), is, and whether to swap."""
    if not isinstance(node, Inert) or node.function != Global("numpy", "dtype") or not node.args:
        return None
    code, order = node.args[0], "|"
    if isinstance(node.state, tuple) and len(node.state) > 1:
        order = node.state[1]
    code, order = (_text(part) for part in (code, order))
    dtype = BY_NAME.get(_NUMPY.get(code.lstrip("<>|="), ""))
    return None if dtype is None else (dtype, order == ">" or code.startswith(">"))


def _text(value: Node) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _span(data: bytes, word: int) -> Span:
    whole = Span(BytesSource(data, "a numpy array"), 0, len(data))
    if word == 1:
        return whole
    layout = Layout((len(data) // word,), (1,), 0, word, word, swap=True)
    return Span(StridedSource((whole,), layout, "a numpy array"), 0, len(data))


_NUMPY = {
    "f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32",
    "i8": "int64", "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool",
    "c8": "complex64", "c16": "complex128",
}  # fmt: skip
for _core in ("core", "_core"):  # since numpy 2
    _WRAPPERS[Global(f"numpy.{_core}.multiarray", "_reconstruct")] = _array
    _WRAPPERS[Global(f"numpy.{_core}.numeric", "_frombuffer")] = _frombuffer
_DISGUISES = DEVICE_TENSORS | {
    function for function, unwrap in _WRAPPERS.items() if unwrap in (_array, _frombuffer)
}
