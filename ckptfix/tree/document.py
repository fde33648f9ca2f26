"""What a checkpoint holds, without the weights: a plain Python tree over described tensors.

A `Document` is a tree of dict, list, tuple, str, bytes, bytearray, int, float, bool and None, and
of the five classes below (sets are inert objects too: to build one is to hash what a stranger
chose). Tensors are descriptions of where bytes lie; objects of other classes are kept inert.
Trees may share nodes and may contain themselves, so nothing here recurses. Nodes are not changed
once they are read: an edit makes a new tree over the same spans.
"""

from __future__ import annotations

import _compat_pickle
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptfix.bytes.span import Span
    from ckptfix.findings import Finding
    from ckptfix.tree.dtypes import DType

Node = Any
"""Anything that may stand in a tree; the pickle format admits no narrower type."""


class Global(NamedTuple):
    """A class or function that a pickle names, as a name only. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def today(self) -> str:
        """What Python 3 calls it: `int` for `__builtin__.long`, which older protocols write."""
        known = _compat_pickle.NAME_MAPPING.get((self.module, self.name))
        module, name = known or (
            _compat_pickle.IMPORT_MAPPING.get(self.module, self.module),
            self.name,
        )
        return name if module == "builtins" else f"{module}.{name}"


class OrderedMap(dict[Any, Any]):
    """A `collections.OrderedDict` and the attributes pickled with it.

    torch keeps the version of each module in the attribute `_metadata` of a state dict; a plain
    dict has no place for it.
    """

    attributes: Node = None

    def __init__(self, items: Any = (), attributes: Node = None) -> None:
        super().__init__(items)
        if attributes is not None:
            self.attributes = attributes

    @property
    def metadata(self) -> Mapping[str, Node] | None:
        """The `_metadata` of a state dict: version by module path, '' being the model itself."""
        found = self.attributes.get("_metadata") if isinstance(self.attributes, dict) else None
        return found if isinstance(found, dict) else None


@dataclass(eq=False, slots=True, repr=False)
class Storage:
    """The flat buffer that one or more tensors view; compared by identity.

    `spans` hold its bytes in order, nearly always one; `numel` counts elements of `dtype`; `device`
    is the location tag it was saved with, such as `cuda:0`.
    """

    dtype: DType
    numel: int
    device: str
    spans: tuple[Span, ...] = ()
    key: str = ""

    def __repr__(self) -> str:
        return f"Storage({self.key!r}, {self.numel:,} of {self.dtype.name}, {self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.numel * self.dtype.itemsize


@dataclass(eq=False, slots=True, repr=False)
class Tensor:
    """A strided view of a storage. `shape`, `stride` and `offset` count elements of `dtype`."""

    storage: Storage
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    requires_grad: bool = False
    hooks: Node = None
    """The `backward_hooks` pickled with it; None stands for the usual empty OrderedDict."""
    metadata: Node = None
    """Bits such as `conj` and `neg` that torch may pickle with it."""

    def __repr__(self) -> str:
        return f"Tensor({self.dtype.name} {list(self.shape)}, {self.storage.device})"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once however they are strided."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after another in row-major order, as torch defines it."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size == 1:
                continue
            if stride != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def view(self) -> tuple[int, str, tuple[int, ...], tuple[int, ...], int]:
        """Equal for two tensors that are one and the same view of one storage (a tie)."""
        return (id(self.storage), self.dtype.name, self.shape, self.stride, self.offset)


How = Literal["reduce", "newobj", "newobj_ex", "obj"]
"""How an object is made: a call, `cls.__new__`, the same with keywords, Python 2's instance."""


@dataclass(eq=False, slots=True, repr=False)
class Inert:
    """A pickled object of any class, kept as what would be needed to build it, and never built.

    `function(*args, **kwargs)` would make it, `state` is what it would be given then, `items` and
    `pairs` are what would be appended to it or set in it.
    """

    function: Node
    args: Node = ()
    kwargs: Node = None
    how: How = "reduce"
    has_state: bool = False
    state: Node = None
    items: list[Node] = field(default_factory=list)
    pairs: list[tuple[Node, Node]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Inert({self.cls})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in Inert.__slots__:
            raise AttributeError(name)
        where = f".attributes[{name!r}]" if name in self.attributes else ".attributes and .state"
        raise AttributeError(
            f"a {self.cls} is not built, since that would run its code: see {where}", name=name
        )

    @property
    def cls(self) -> str:
        """What a person would call its class, such as `argparse.Namespace`."""
        wrapped = isinstance(self.args, tuple) and self.args and isinstance(self.args[0], Global)
        if wrapped and str(self.function) in _CONSTRUCTORS:
            return str(self.args[0].today)
        return self.function.today if isinstance(self.function, Global) else "<computed>"

    @property
    def attributes(self) -> dict[Any, Node]:
        """The instance attributes that its state would set, by name."""
        return dict(_attributes(self.state))


_CONSTRUCTORS = frozenset(
    {"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__"}
)


def _attributes(state: Node) -> Iterator[tuple[Any, Node]]:
    """`copyreg`'s two forms of state: a dict, or a pair of a dict and a dict of slots."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for part in parts:
        if isinstance(part, dict):
            yield from part.items()


@dataclass(frozen=True, slots=True, repr=False)
class Document:
    """One checkpoint as read: its tree, and what its container keeps beside the tree."""

    root: Node
    container: str
    """How the bytes are wrapped: `torch zip`, `torch legacy`, `safetensors`, …"""
    name: str = "<memory>"
    """What messages call it, nearly always the path as it was given."""
    nbytes: int = 0
    """Bytes of the file."""
    byteorder: Literal["little", "big"] = "little"
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The `__metadata__` of a safetensors file."""
    extras: Mapping[str, Span] = field(default_factory=dict)
    """Records of a zip that are no part of the tree, carried along as they are."""
    archive: str = "archive"
    """The folder inside a zip that holds its records."""
    notes: tuple[Finding, ...] = ()
    """What was noticed while reading."""
    slices: tuple[str, ...] = ()
    """The paths of the files of all ranks of tensor parallelism, where it is one of theirs: each
    may have a slice of every tensor."""
    constants: Node = None
    """The constants of a TorchScript program, which are among its `extras`."""
    limits: Limits = DEFAULT
    """What its reader was allowed, and whoever reads its copy is."""

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.container})"


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major strides of a shape, in elements; sizes of 0 count as 1, as in torch."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def reach(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements a storage has at least, of which there is such a view."""
    steps = zip(shape, stride, strict=True)
    return max(offset + sum(max(size - 1, 0) * step for size, step in steps) + 1, 0)


def kind(node: Node) -> str:
    """What a person would call a node: `int`, `dict of 3`, `argparse.Namespace`."""
    if isinstance(node, Inert):
        return node.cls
    if isinstance(node, (dict, list, tuple)):
        return f"{'dict' if isinstance(node, dict) else type(node).__name__} of {len(node)}"
    return type(node).__name__ if node is not None else "None"


def extent(tensor: Tensor) -> tuple[int, int]:
    """Where the bytes of a tensor that is not empty begin and end in its storage."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    size = tensor.dtype.itemsize
    return tensor.offset * size, (tensor.offset + reach + 1) * size
