"""The tensor that a node is, or plainly wraps: parameters, tensor subclasses, numpy arrays.

Such nodes stay in the tree as they were pickled; this is how the rest of ckptfix sees through them.
A tensor that is not dense, or that was saved in a way that is not known, is special: it is never
taken for a value that may be left out.
Sources: `torch._utils._rebuild_parameter`, `torch._tensor._rebuild_from_type_v2`, `Variable` and
`Parameter` of torch before 0.4, `numpy.ndarray.__reduce__`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.limits import DEFAULT
from ckptfix.pickles.torch_objects import BUILDERS
from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME, DType
from ckptfix.tree.walk import storages, walk

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard


def as_tensor(node: Node) -> Tensor | None:
    """The dense tensor behind a node, or None. Nothing is decoded."""
    if type(node) is Inert:
        node = _unwrapped(node)
    return node if isinstance(node, Tensor) else None


def is_array(node: Node) -> bool:
    """Whether a node is a numpy array."""
    return type(node) is Inert and node.function in _ARRAYS


def is_special_tensor(node: Node) -> bool:
    """Whether a node is a tensor that is not dense: quantized, sparse, nested, meta, a subclass.

    So is a parameter round such a tensor, and one whose state is not what any torch writes.
    """
    if type(node) is not Inert or type(node.function) is not Global or not _makes_tensors(node):
        return False
    return as_tensor(node) is None


def is_packed(node: Node) -> bool:
    """Whether a node is what quantized modules save in the place of their weights.

    A tuple with a special tensor in it, or an object of TorchScript with any tensor (of LSTMs).
    """
    if type(node) is tuple:
        return any(is_special_tensor(inner) for _, inner in walk(node))
    if not isinstance(node, Inert) or node.cls != SCRIPT_OBJECT:
        return False
    return any(type(inner) is Tensor or is_special_tensor(inner) for _, inner in walk(node.state))


SCRIPT_OBJECT = "torch.ScriptObject"
"""The class of what TorchScript keeps for code of C++."""


def special_class(node: Inert) -> str:
    """What a person would call the class of a special tensor, apart from a parameter round it."""
    inner = _unwrapped(node)
    return inner.cls if isinstance(inner, Inert) else node.cls


def _unwrapped(node: Inert) -> Node:
    """What lies in all wrappers of a node."""
    for _ in range(_DEPTH):
        unwrap = _WRAPPERS.get(node.function) if type(node.function) is Global else None
        inner = node if unwrap is None else unwrap(node)
        if inner is node or type(inner) is not Inert:
            return inner
        node = inner
    return None


def _makes_tensors(node: Inert) -> bool:
    """Whether what makes an object makes nothing but tensors, dense or not."""
    module, name = str(node.function.module), str(node.function.name)
    if module == "torch._utils" or module == "torch._tensor":
        return name.startswith("_rebuild_")
    if module in _TENSOR_MODULES:
        return name.endswith("Tensor")
    return node.function in _TENSOR_CLASSES or name in ("DTensor", "ShardedTensor")


def without_disguise(node: Node) -> Node:
    """The tensor that `load_state_dict` takes, of a numpy array or a tensor saved as one."""
    if isinstance(node, Inert) and type(node.function) is Global and node.function in _DISGUISES:
        return as_tensor(node) or node
    return node


def disguise(node: Node) -> str:
    """What a tensor is saved as that `torch.load` does not give back as one; empty for others."""
    unwrap = _unwrapping(node)
    if unwrap in (_array, _frombuffer):
        return "numpy array"
    return "XLA tensor" if unwrap is not None and node.function == _XLA else ""


def undressed(node: Node) -> Node:
    """What a parameter, or a tensor of another class, was made of: a tensor of any kind."""
    for _ in range(_DEPTH):
        unwrap = _unwrapping(node)
        if unwrap is None or unwrap not in (_first_argument, _of_variable, _of_type):
            break
        node = unwrap(node)
    return node


def _unwrapping(node: Node) -> Callable[[Any], Node] | None:
    if not isinstance(node, Inert) or type(node.function) is not Global:
        return None
    return _WRAPPERS.get(node.function)


_XLA = Global("torch._utils", "_rebuild_xla_tensor")
"""What torch before 1.12 saved tensors of TPUs with, and no torch has any longer."""
DEVICE_TENSORS = frozenset(
    Global("torch._utils", f"_rebuild_device_tensor_from_{kind}")
    for kind in ("numpy", "cpu_tensor")
) | {_XLA}
"""How tensors of devices without storages of their own (XLA, HPU, …) are saved: with a copy on the
CPU, and the device as the third argument."""

_DEPTH = 8
"""How many wrappers may lie around a tensor; an object may hold itself."""


def device_tags(root: Node) -> Counter[str]:
    """How many storages, and tensors of devices without storages, have each tag."""
    tags = Counter(storage.device for storage in storages(root))
    calls = {id(node): node for _, node in walk(root) if is_device_tensor(node)}
    tags.update(str(node.args[2]) for node in calls.values())
    return tags


def is_device_tensor(node: Node) -> TypeGuard[Inert]:
    """Whether a node rebuilds a tensor on a device that has no storages of its own."""
    return isinstance(node, Inert) and node.function in DEVICE_TENSORS and len(node.args) == 4


def _first_argument(node: Inert) -> Node:
    return node.args[0] if node.args else None


def _of_variable(node: Inert) -> Node:
    """`Parameter` and `Variable` before 0.4, which are given their data at once, or as state.

    The state is `(requires_grad, volatile, hooks)` or begins with the data.
    """
    if not node.has_state:
        return _first_argument(node)
    state = node.state if isinstance(node.state, tuple) else ()
    if len(state) == 3 and type(state[0]) in (bool, int):
        return _first_argument(node)
    return state[0] if state else None


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
    Global("torch.nn.parameter", "Parameter"): _of_variable,
    Global("torch.autograd.variable", "Variable"): _of_variable,
    Global("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    **dict.fromkeys(DEVICE_TENSORS, _of_device),
}

_TENSOR_MODULES = frozenset({"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"})
_TENSOR_CLASSES = frozenset(
    Global("torch.nn.parameter", name)
    for name in ("Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer")
) | {Global("torch.autograd.variable", "Variable")}


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
_ARRAYS = {function for function, unwrap in _WRAPPERS.items() if unwrap in (_array, _frombuffer)}
_DISGUISES = DEVICE_TENSORS | _ARRAYS
