"""The few calls in a pickle that ckptfix understands: torch's tensors, and spellings of values.

Sources: `torch._utils._rebuild_tensor*`; how `pickle` spells OrderedDict, bytes, nested classes and
keyword arguments in protocol 2. Everything else stays an inert object, and so do these when their
arguments are not the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import UnsafeError
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME, UNTYPED, DType

if TYPE_CHECKING:
    from ckptfix.limits import Limits

Arguments = tuple[Node, ...]


def ordered_dict(args: Arguments, limits: Limits) -> Node | None:
    """`OrderedDict()`, or `OrderedDict([[key, value], …])` as Python 2 writes it."""
    if not args:
        return OrderedMap.__new__(OrderedMap)  # one a tensor: without a detour
    pairs: list[Node] = args[0] if len(args) == 1 and isinstance(args[0], list) else [None]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        return None
    return OrderedMap((key, value) for key, value in pairs if hashable(key, limits))


def encode(args: Arguments, limits: Limits) -> bytes | None:
    """`_codecs.encode("…", "latin1")`: bytes in protocol 2."""
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        return args[0].encode("latin-1")
    return None


def byte_array(args: Arguments, limits: Limits) -> bytearray | None:
    """`bytearray("…", "latin-1")` in protocol 2, `bytearray(b"…")` in 3 and 4, `bytearray()`."""
    if not args or (len(args) == 1 and type(args[0]) is bytes):
        return bytearray(*args)
    data = encode(args, limits)
    return None if data is None else bytearray(data)


def empty_bytes(args: Arguments, limits: Limits) -> bytes | None:
    """`bytes()`: empty bytes in protocol 2."""
    return None if args else b""


def nested_class(args: Arguments, limits: Limits) -> Global | None:
    """`getattr(Outer, "Inner")`: a nested class in protocols before 4."""
    if len(args) == 2 and type(args[0]) is Global and type(args[1]) is str:
        return class_name(args[0].module, f"{args[0].name}.{args[1]}", limits)
    return None


def new_with_keywords(args: Arguments, limits: Limits) -> Inert | None:
    """`copyreg.__newobj_ex__(cls, args, kwargs)`: the opcode NEWOBJ_EX in protocols before 4."""
    if len(args) == 3 and type(args[0]) is Global and type(args[1]) is tuple:
        return Inert(args[0], args[1], args[2], "newobj_ex")
    return None


class StorageView(NamedTuple):
    """A stretch of a storage, as old torch shares them; tensors are laid over the whole instead."""

    storage: Storage
    offset: int
    numel: int


def tensor_v1(args: Arguments, limits: Limits) -> Tensor | None:
    """`(storage, offset, size, stride)`: torch before 0.4."""
    return tensor(args[0], None, args[1:4], limits) if len(args) == 4 else None


def tensor_v2(args: Arguments, limits: Limits) -> Tensor | None:
    """`(storage, offset, size, stride, requires_grad, backward_hooks[, metadata])`."""
    if not 6 <= len(args) <= 7:
        return None
    metadata = args[6] if len(args) == 7 else None
    return tensor(args[0], None, args[1:4], limits, args[4], args[5], metadata)


def tensor_v3(args: Arguments, limits: Limits) -> Tensor | None:
    """As v2 over untyped storage, the dtype given after the hooks."""
    if not 7 <= len(args) <= 8:
        return None
    named = args[6]
    dtype = BY_NAME.get(named.name) if type(named) is Global and named.module == "torch" else None
    if dtype is None:
        return None
    return tensor(args[0], dtype, args[1:4], limits, args[4], args[5], *args[7:])


def tensor(
    storage: Node,
    dtype: DType | None,
    layout: Arguments,
    limits: Limits,
    requires_grad: Node = False,
    hooks: Node = None,
    metadata: Node = None,
) -> Tensor | None:
    """The tensor at `layout`: offset, shape, stride; its dtype is the storage's unless given.

    Raises `UnsafeError` where it leaves the storage.
    """
    offset, shape, stride = layout
    shape, stride = sizes(shape), sizes(stride)
    if type(offset) is not int or shape is None or stride is None or len(shape) != len(stride):
        return None
    if type(storage) is StorageView:
        offset, storage = storage.offset + offset, storage.storage
    if type(storage) is not Storage or (dtype is None and storage.dtype is UNTYPED):
        return None
    dtype = dtype or storage.dtype
    check_layout(storage, dtype, offset, shape, stride, limits)
    if type(hooks) is OrderedMap and not hooks and hooks.attributes is None:
        hooks = None
    return Tensor(storage, dtype, shape, stride, offset, requires_grad is True, hooks, metadata)


def sizes(node: Node) -> tuple[int, ...] | None:
    """The numbers of a tuple or a `torch.Size`; None for anything else."""
    if type(node) is not tuple:
        if type(node) is not Inert or node.function != _SIZE or len(node.args) != 1:
            return None
        return sizes(node.args[0]) if type(node.args[0]) is tuple else None
    for size in node:
        if type(size) is not int:
            return None
    return node


def check_layout(
    storage: Storage,
    dtype: DType,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    limits: Limits,
) -> None:
    """What torch checks when a tensor is set on a storage, before anything is allocated."""
    room = storage.numel * storage.dtype.itemsize
    problem = _problem(room, dtype.itemsize, offset, shape, stride, limits.tensor_bytes)
    if problem is not None:
        raise UnsafeError(problem.format(storage.key, storage.numel))


@lru_cache(4096)  # layouts come again and again
def _problem(
    room: int,
    itemsize: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    most: int,
) -> str | None:
    """What is wrong with a layout over `room` bytes; `{}` stand for the storage and its length."""
    sound = len(shape) <= _MAX_DIMS and 0 <= offset < _INT64
    last, count = offset, itemsize
    for size, step in zip(shape, stride, strict=True) if sound else ():
        sound = sound and 0 <= size < _INT64 and 0 <= step < _INT64
        count *= size
        last += (size - 1) * step
    if not sound:
        return "a tensor has sizes, strides or an offset that no tensor can have"
    if count and (last + 1) * itemsize > room:
        return (
            f"a tensor of shape {shape}, stride {stride}, offset {offset} reaches outside its "
            "storage {!r} of {} elements"
        )
    if count > most and count > room:
        return f"a tensor of shape {shape} would expand to {count} bytes"
    return None


_SIZE = Global("torch", "Size")
_INT64 = 1 << 63
_MAX_DIMS = 64
"""What torch's operations work with; products of more could take long."""


def class_name(module: str, name: str, limits: Limits) -> Global:
    """A name that a pickle of any protocol can spell; raises `UnsafeError` for others."""
    if len(module) + len(name) > limits.name_characters:
        raise UnsafeError(f"a class name of {len(module) + len(name)} characters")
    if "\n" in module or "\n" in name:
        raise UnsafeError("a class name that holds a line break")
    f"{module}.{name}".encode()  # UnicodeEncodeError: half a surrogate pair
    return Global(module, name)


def hashable(key: Node, limits: Limits) -> bool:
    """True where hashing `key` is sure to be quick; raises TypeError or `UnsafeError` otherwise.

    Hashing a tuple recurses in C, without a limit, and visits shared parts again and again.
    """
    pending, visited = [key], 0
    while pending:
        node = pending.pop()
        visited += 1
        if visited > limits.key_nodes:
            raise UnsafeError(f"a dict key holds more than {limits.key_nodes} values")
        if isinstance(node, tuple):
            pending.extend(node)
        elif isinstance(node, (dict, list, bytearray)):
            raise TypeError(f"a {type(node).__name__} cannot be a dict key")
    return True


Builder = Callable[[Arguments, "Limits"], Node | None]
"""Makes the node that a call stands for, or None to leave the call inert."""

BUILDERS: Mapping[Global, Builder] = {
    Global("collections", "OrderedDict"): ordered_dict,
    Global("_codecs", "encode"): encode,
    **{Global(module, "bytes"): empty_bytes for module in ("builtins", "__builtin__")},
    **{Global(module, "bytearray"): byte_array for module in ("builtins", "__builtin__")},
    **{Global(module, "getattr"): nested_class for module in ("builtins", "__builtin__")},
    **{Global(module, "__newobj_ex__"): new_with_keywords for module in ("copyreg", "copy_reg")},
    Global("torch._utils", "_rebuild_tensor"): tensor_v1,
    Global("torch._utils", "_rebuild_tensor_v2"): tensor_v2,
    Global("torch._utils", "_rebuild_tensor_v3"): tensor_v3,
}
