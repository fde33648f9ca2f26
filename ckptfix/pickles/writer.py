"""A tree as a pickle of protocol 2: what `torch.save` writes and `weights_only=True` reads.

Shared nodes are written once and referred to, cycles included. An object gets a memo number when it
is referred to for the first time (its PUT is put behind what made it), so that the pickle is no
longer than the one that it replaces. Every container is a generator that yields its children,
which keeps the writer off Python's stack.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptfix.errors import UnsafeError, UnsupportedError
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import UNTYPED, DType
from ckptfix.tree.rebuild import REOPENED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Hashable, Iterable

    Frame = Generator[Node, None, None]


def write(root: Node, *, own_keys: bool = False) -> tuple[bytes, list[Storage]]:
    """The pickle of a tree, and its storages: the n-th is the one that the pickle calls `str(n)`.

    With `own_keys` the pickle calls each storage by the key that it was read with. Raises
    `UnsupportedError` for a node that no tree may hold.
    """
    return _Writer(own_keys).run(root)


class _Writer:
    def __init__(self, own_keys: bool) -> None:
        self.own_keys = own_keys
        self.chunks: list[bytes] = [b"\x80\x02"]
        self.emit = self.chunks.append
        self.memo: dict[Hashable, int | bytes] = {}
        """Which chunk ends an object; once something referred to it, the opcode that does."""
        self.referred = 0
        self.kept: list[Node] = []  # tuples made here: an id is taken only while its object lives
        self.storages: list[Storage] = []
        self.usual: dict[Hashable, tuple[bytes, bytes, bytes]] = {}
        self.opened: set[int] = set()
        self.reopened = 0

    def run(self, root: Node) -> tuple[bytes, list[Storage]]:
        frames: list[Iterable[Node]] = [iter((root,))]
        while frames:
            for node in frames[-1]:
                write = _WRITERS.get(type(node))
                if write is None:
                    raise UnsupportedError(f"a {type(node).__name__} cannot be pickled here")
                frame = write(self, node)  # what writes the rest, of a container
                if frame is not None:
                    frames.append(frame)
                    break
            else:
                frames.pop()
        self.emit(b".")
        return b"".join(self.chunks), self.storages

    def remember(self, key: Hashable) -> None:
        """Know what `key` stands for as that which the last chunk ends."""
        self.memo[key] = len(self.chunks) - 1

    def refer(self, key: Hashable) -> bool:
        """Write a reference to what `key` stands for, if it was written."""
        reference = self.memo.get(key)
        if reference is None:
            return False
        if isinstance(reference, int):
            reference = self.memo[key] = self.memoize(reference)
        self.emit(reference)
        return True

    def memoize(self, place: int) -> bytes:
        """Put what a chunk ends into the memo; returns the opcode that refers to it."""
        number = self.referred
        self.referred += 1
        short = number < 256
        self.chunks[place] += b"q%c" % number if short else b"r" + _U4.pack(number)
        return b"h%c" % number if short else b"j" + _U4.pack(number)

    # --- leaves

    def write_none(self, _: None) -> None:
        self.emit(b"N")

    def write_bool(self, value: bool) -> None:
        self.emit(b"\x88" if value else b"\x89")

    def write_int(self, value: int) -> None:
        self.emit(_integer(value))

    def write_float(self, value: float) -> None:
        self.emit(b"G" + _F8.pack(value))

    def write_str(self, value: str) -> None:
        if not self.refer(value):
            text = value.encode("utf-8", "surrogatepass")
            self.emit(b"X" + _U4.pack(len(text)) + text)
            self.remember(value)

    def write_global(self, value: Global) -> Frame | None:
        if self.refer(value):
            return None
        outer, _, inner = value.name.rpartition(".")
        if outer:  # protocol 2 cannot name a nested class: getattr(Outer, "Inner"), as Python does
            return self.reduce(value, _GETATTR, (Global(value.module, outer), inner))
        self.emit(f"c{value.module}\n{value.name}\n".encode())
        self.remember(value)
        return None

    def write_bytes(self, value: bytes) -> Frame | None:
        if not value:
            return self.shared(value, _BYTES, ())
        return self.shared(value, _ENCODE, (value.decode("latin-1"), "latin1"))

    def write_bytearray(self, value: bytearray) -> Frame | None:
        return self.shared(value, _BYTEARRAY, (value.decode("latin-1"), "latin-1"))

    # --- containers

    def shared(self, node: Node, function: Global, args: tuple[Node, ...]) -> Frame | None:
        return None if self.refer(id(node)) else self.reduce(id(node), function, args)

    def reduce(self, key: Hashable, function: Global, args: tuple[Node, ...]) -> Frame:
        self.kept.append(args)
        yield function
        yield args
        self.emit(b"R")
        self.remember(key)

    def write_tuple(self, node: tuple[Node, ...]) -> Frame | None:
        if not node:
            self.emit(b")")
            return None
        return None if self.refer(id(node)) else self.tuple_frame(node)

    def tuple_frame(self, node: tuple[Node, ...]) -> Frame:
        length = len(node)
        self.open(node, length)
        if length > 3:
            self.emit(b"(")
        yield from node
        if id(node) in self.memo:  # it holds itself, and was completed from inside
            self.emit(b"1" if length > 3 else b"0" * length)
            self.refer(id(node))
        else:
            self.emit((b"t", b"\x85", b"\x86", b"\x87")[length if length <= 3 else 0])
            self.remember(id(node))

    def open(self, node: Node, length: int) -> None:
        """Begin what cannot be referred to until it is whole; refuse what never gets there.

        What holds itself is begun again inside itself, which squares the size of the pickle.
        """
        if id(node) in self.opened:
            self.reopened += length
            if self.reopened > REOPENED:
                raise UnsafeError("its tuples hold themselves in too many ways")
        self.opened.add(id(node))

    def write_list(self, node: list[Node]) -> Frame | None:
        return None if self.refer(id(node)) else self.list_frame(node)

    def list_frame(self, node: list[Node]) -> Frame:
        self.emit(b"]")
        self.remember(id(node))
        yield from self.items(node)

    def write_dict(self, node: dict[Node, Node]) -> Frame | None:
        return None if self.refer(id(node)) else self.dict_frame(node)

    def dict_frame(self, node: dict[Node, Node]) -> Frame:
        self.emit(b"}")
        self.remember(id(node))
        yield from self.pairs(node.items())

    def write_ordered(self, node: OrderedMap) -> Frame | None:
        return None if self.refer(id(node)) else self.ordered_frame(node)

    def ordered_frame(self, node: OrderedMap) -> Frame:
        yield _ORDERED_DICT
        self.emit(b")R")
        self.remember(id(node))
        yield from self.pairs(node.items())
        if node.attributes is not None:
            yield node.attributes
            self.emit(b"b")

    def items(self, items: Collection[Node]) -> Frame:
        if items:
            self.emit(b"(" if len(items) > 1 else b"")
            yield from items
            self.emit(b"e" if len(items) > 1 else b"a")

    def pairs(self, pairs: Collection[tuple[Node, Node]]) -> Frame:
        if pairs:
            self.emit(b"(" if len(pairs) > 1 else b"")
            for key, value in pairs:
                yield key
                yield value
            self.emit(b"u" if len(pairs) > 1 else b"s")

    # --- objects

    def write_inert(self, node: Inert) -> Frame | None:
        return None if self.refer(id(node)) else self.inert_frame(node)

    def inert_frame(self, node: Inert) -> Frame:
        yield from _CALLS[node.how](self, node)
        if id(node) in self.memo:  # its arguments hold it, and it was completed from inside
            self.emit(b"0")
            self.refer(id(node))
            return
        self.remember(id(node))
        yield from self.items(node.items)
        yield from self.pairs(node.pairs)
        if node.has_state:
            yield node.state
            self.emit(b"b")

    def call_reduce(self, node: Inert) -> Frame:
        yield node.function
        if node.function in _SETS and len(node.args) == 1 and type(node.args[0]) is list:
            yield from self.members(node.args[0])
        else:
            yield node.args
        self.emit(b"R")

    def members(self, items: list[Node]) -> Frame:
        """The argument of a set, never shared: a set inside itself would be made of half of it."""
        self.open(items, len(items))
        self.emit(b"]")
        yield from self.items(items)
        self.emit(b"\x85")

    def call_newobj(self, node: Inert) -> Frame:
        yield node.function
        yield node.args
        self.emit(b"\x81")

    def call_newobj_ex(self, node: Inert) -> Frame:
        args = (node.function, node.args, node.kwargs)
        self.kept.append(args)
        yield _NEWOBJ_EX
        yield args
        self.emit(b"R")

    def call_obj(self, node: Inert) -> Frame:
        self.emit(b"(")
        yield node.function
        yield from node.args
        self.emit(b"o")

    # --- tensors

    def write_storage(self, node: Storage) -> None:
        if self.refer(id(node)):
            return
        typed = node.dtype.storage is not None and node.dtype is not UNTYPED
        self.emit(b"(")
        self.write_str("storage")
        self.write_global(_storage_class(node.dtype))
        self.write_str(node.key if self.own_keys else str(len(self.storages)))
        self.write_str(node.device)
        self.emit(_integer(node.numel if typed else node.nbytes) + b"tQ")
        self.remember(id(node))
        self.storages.append(node)

    def write_tensor(self, node: Tensor) -> Frame | None:
        if self.refer(id(node)) or self.write_usual(node):
            return None
        plain = node.dtype is node.storage.dtype and node.dtype.storage is not None
        self.write_global(_TENSOR_V2 if plain else _TENSOR_V3)
        self.emit(b"(")
        self.write_storage(node.storage)
        self.emit(_integer(node.offset))
        self.emit(_integers(node.shape))
        self.emit(_integers(node.stride))
        self.write_bool(node.requires_grad)
        if not plain or node.hooks is not None or node.metadata is not None:
            return self.tensor_frame(node, plain)
        self.no_hooks()
        self.emit(b"tR")
        self.remember(id(node))
        return None

    def write_usual(self, node: Tensor) -> bool:
        """Write a tensor that is like an earlier one, apart from its own new storage."""
        storage = node.storage
        if node.hooks is not None or node.metadata is not None or id(storage) in self.memo:
            return False
        likeness = (
            node.dtype.name, storage.dtype.name, storage.device, storage.numel,
            node.offset, node.shape, node.stride, node.requires_grad,
        )  # fmt: skip
        parts = self.usual.get(likeness)
        if parts is None:
            parts = self.parts_of(node)
            if parts is None:
                return False
            self.usual[likeness] = parts
        before, between, after = parts
        key = (storage.key if self.own_keys else str(len(self.storages))).encode()
        self.emit(before + _U4.pack(len(key)) + key + between)
        self.remember(id(storage))
        self.emit(after)
        self.remember(id(node))
        self.storages.append(storage)
        return True

    def parts_of(self, node: Tensor) -> tuple[bytes, bytes, bytes] | None:
        """What stands before the key of its storage, up to the storage's end, and after that.

        None where something in it was not referred to before.
        """
        storage = node.storage
        if node.dtype is not storage.dtype or node.dtype.storage is None or node.dtype is UNTYPED:
            return None
        named = (_TENSOR_V2, "storage", _storage_class(node.dtype), storage.device, _ORDERED_DICT)
        references = [known for known in map(self.memo.get, named) if isinstance(known, bytes)]
        if len(references) < len(named):
            return None
        tensor, word, cls, device, hooks = references
        layout = _integer(node.offset) + _integers(node.shape) + _integers(node.stride)
        return (
            tensor + b"((" + word + cls + b"X",
            device + _integer(storage.numel) + b"tQ",
            layout + (b"\x88" if node.requires_grad else b"\x89") + hooks + b")RtR",
        )

    def no_hooks(self) -> None:
        self.write_global(_ORDERED_DICT)
        self.emit(b")R")

    def tensor_frame(self, node: Tensor, plain: bool) -> Frame:
        """What follows the layout of a tensor that is not the usual one."""
        if node.hooks is None:
            self.no_hooks()
        else:
            yield node.hooks
        if not plain:
            self.write_global(Global("torch", node.dtype.name))
        if node.metadata is not None:
            yield node.metadata
        self.emit(b"tR")
        self.remember(id(node))


_U4, _F8 = struct.Struct("<I"), struct.Struct(">d")

_GETATTR = Global("__builtin__", "getattr")
_BYTES = Global("__builtin__", "bytes")
_BYTEARRAY = Global("__builtin__", "bytearray")
_ENCODE = Global("_codecs", "encode")
_NEWOBJ_EX = Global("copy_reg", "__newobj_ex__")
_ORDERED_DICT = Global("collections", "OrderedDict")
_SETS = frozenset(
    Global(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")
)
_TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_TENSOR_V3 = Global("torch._utils", "_rebuild_tensor_v3")


def _storage_class(dtype: DType) -> Global:
    if dtype.storage is None or dtype is UNTYPED:
        return Global("torch.storage", "UntypedStorage")
    return Global("torch", dtype.storage)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    length = (value if value >= 0 else ~value).bit_length() // 8 + 1
    size = b"\x8a%c" % length if length < 256 else b"\x8b" + _U4.pack(length)
    return size + value.to_bytes(length, "little", signed=True)


@lru_cache(1024)  # shapes come again and again
def _integers(values: tuple[int, ...]) -> bytes:
    body = b"".join(map(_integer, values))
    if len(values) > 3:
        return b"(" + body + b"t"
    return body + (b")", b"\x85", b"\x86", b"\x87")[len(values)]


_CALLS = {
    "reduce": _Writer.call_reduce,
    "newobj": _Writer.call_newobj,
    "newobj_ex": _Writer.call_newobj_ex,
    "obj": _Writer.call_obj,
}

_WRITERS: dict[type, Callable[[_Writer, Node], Frame | None]] = {
    type(None): _Writer.write_none,
    bool: _Writer.write_bool,
    int: _Writer.write_int,
    float: _Writer.write_float,
    str: _Writer.write_str,
    bytes: _Writer.write_bytes,
    bytearray: _Writer.write_bytearray,
    Global: _Writer.write_global,
    tuple: _Writer.write_tuple,
    list: _Writer.write_list,
    dict: _Writer.write_dict,
    OrderedMap: _Writer.write_ordered,
    Inert: _Writer.write_inert,
    Storage: _Writer.write_storage,
    Tensor: _Writer.write_tensor,
}
