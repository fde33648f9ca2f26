"""Described tensors made into torch tensors, in memory of their own or over a map of their file.

Memory of their own is read from the file once: whatever becomes of the file then, they stay. Over a
map nothing is read until it is used, and a page that a program changes becomes its own; but whoever
writes to the file changes what is not read yet, and whoever cuts it short ends the process. Bytes
that lie where their dtype cannot be read (old containers do not align them), that are computed, or
that are in another byte order, are always read.
"""

from __future__ import annotations

import mmap
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.serialization import default_restore_location

from ckptfix.bytes.engine import fill
from ckptfix.bytes.source import everything
from ckptfix.bytes.span import cut
from ckptfix.contents.tensors import DEVICE_TENSORS, as_tensor, undressed
from ckptfix.errors import CkptfixError, UnsupportedError
from ckptfix.limits import DEFAULT
from ckptfix.pickles.torch_objects import check_layout
from ckptfix.torch_bridge import trusted
from ckptfix.torch_bridge.plain import revived
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import UNTYPED, swap_bytes
from ckptfix.tree.rebuild import rebuild

if TYPE_CHECKING:
    from ckptfix.bytes.source import Source
    from ckptfix.tree.dtypes import DType


Place = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]
MapLocation = (
    str
    | torch.device
    | Mapping[str, str]
    | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None]
    | None
)
"""As in `torch.load`, and `"auto"`."""


class Materializer:
    """Makes tensors of one document. Tensors that share a storage there share memory here.

    `place` puts a storage from the CPU where it belongs, given the tag it was saved with;
    `byteorder` is the document's; with `mapped` tensors lie over a private map of their file.
    """

    def __init__(
        self, place: Place | None = None, byteorder: str = "little", *, mapped: bool = False
    ) -> None:
        self._place = place
        self._swap = byteorder != sys.byteorder
        self._mapped = mapped
        self._maps: dict[int, tuple[Source, mmap.mmap]] = {}
        self._read: dict[int, Source] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._kept: list[Storage] = []
        self._marked = trusted.marked()
        self._depth = 0

    def tensor(self, tensor: Tensor, *, stay: bool = False) -> torch.Tensor:
        """The tensor that `tensor` describes; with `stay` on the CPU, wherever the others go."""
        dtype: torch.dtype = getattr(torch, tensor.dtype.name)
        storage = self._storage(tensor.storage, tensor.dtype, stay)
        made = torch.empty(0, dtype=dtype, device=storage.device)
        made.set_(storage, tensor.offset, tensor.shape, tensor.stride)
        bits = tensor.metadata if isinstance(tensor.metadata, dict) else {}
        if dtype.is_complex and bits.get("conj"):
            torch._C._set_conj(made, True)
        if (dtype.is_complex or dtype.is_floating_point) and bits.get("neg"):
            torch._C._set_neg(made, True)
        differentiable = dtype.is_complex or dtype.is_floating_point
        return made.requires_grad_(tensor.requires_grad and differentiable)

    def copy_into(self, out: torch.Tensor, tensor: Tensor) -> None:
        """Give a tensor that has memory the values of `tensor`; read straight into it if it can be.

        Of the storages nothing is kept then.
        """
        dtype: torch.dtype = getattr(torch, tensor.dtype.name)
        plain = not (self._swap or tensor.metadata) and tensor.is_contiguous
        if not (plain and out.is_cpu and out.dtype == dtype and out.is_contiguous()):
            out.copy_(self.tensor(tensor).reshape(out.shape))  # torch 0.3 had no 0-d tensors
        elif tensor.numel:
            spans = cut(tensor.storage.spans, tensor.offset * dtype.itemsize, tensor.nbytes)
            self._read.update((id(span.source), span.source) for span in spans)
            fill(out.detach().view(-1).view(torch.uint8).numpy().data, spans)

    def storage(self, storage: Storage) -> torch.UntypedStorage | torch.TypedStorage:
        """The storage that `storage` describes, as `torch.load` gives one that is in no tensor."""
        made = self._storage(storage, storage.dtype, stay=False)
        if storage.dtype is UNTYPED:
            return made
        dtype = getattr(torch, storage.dtype.name)
        return torch.TypedStorage(wrap_storage=made, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    def _storage(self, storage: Storage, dtype: DType, stay: bool) -> torch.UntypedStorage:
        known = self._storages.get(id(storage))
        if known is None:
            known = self._on_cpu(storage, dtype)
            if self._place is not None and not stay:
                known = self._place(known, storage.device)
            self._storages[id(storage)] = known
            self._kept.append(storage)
        return known

    def _on_cpu(self, storage: Storage, dtype: DType) -> torch.UntypedStorage:
        if not storage.nbytes:
            return torch.empty(0, dtype=torch.uint8).untyped_storage()
        self._read.update((id(span.source), span.source) for span in storage.spans)
        span = storage.spans[0]
        may_map = self._mapped and len(storage.spans) == 1 and not self._swap
        if may_map and span.source.fileno() is not None:
            begin = span.source.begin + span.offset
            if begin % dtype.word == 0:
                return _flat(self._map(span.source), begin, span.length)
        if self._swap:
            copied = bytearray(b"".join(part.read() for part in storage.spans))
            swap_bytes(copied, storage.dtype.word)
            return _flat(copied, 0, len(copied))
        own = torch.empty(sum(part.length for part in storage.spans), dtype=torch.uint8)
        fill(own.numpy().data, storage.spans)
        return own.untyped_storage()

    def of_marked_class(self, node: Inert) -> torch.Tensor | None:
        """A tensor of a class that the program has marked as safe, also in a parameter, or None."""
        if node.function in _PARAMETERS and node.args and isinstance(node.args[0], Inert):
            node = node.args[0]
        if not self._marked or self._depth > _DEPTH:
            return None
        self._depth += 1
        try:
            return trusted.tensor(node, self._marked, lambda part: tree(part, self))
        finally:
            self._depth -= 1

    def value(self, node: Inert) -> Any:
        """What an inert object stands for that is no tensor; itself where that is not known."""
        made = trusted.making(node, self._marked)
        return revived(node) if made is None else made

    def check(self) -> None:
        """Raise `ReadError` where a file was written to while it was read."""
        for source in self._read.values():
            for one in everything(source):
                one.check()

    def _map(self, source: Source) -> mmap.mmap:
        known = self._maps.get(id(source))
        if known is None:
            descriptor = source.fileno()
            assert descriptor is not None
            end = source.begin + source.size
            mapped = mmap.mmap(descriptor, end, access=mmap.ACCESS_COPY)
            known = self._maps[id(source)] = (source, mapped)
        return known[1]


_DEPTH = 8
"""How many tensors may lie around one another."""


def _flat(data: mmap.mmap | bytearray, offset: int, length: int) -> torch.UntypedStorage:
    flat = torch.frombuffer(data, dtype=torch.uint8, count=length, offset=offset)
    return flat.untyped_storage()


def placement(map_location: MapLocation) -> Place | None:
    """What `map_location` means, as in `torch.load`; None leaves everything on the CPU."""
    if map_location == "auto":
        map_location = _freest_device()
    if isinstance(map_location, torch.device):
        map_location = str(map_location)
    if map_location == "cpu":
        return None

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        if callable(map_location):
            found = map_location(storage, tag)
            return _restored(storage, tag) if found is None else found
        where = map_location.get(tag, tag) if isinstance(map_location, Mapping) else map_location
        return _restored(storage, where or tag)

    return place


def _restored(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
    """A storage on the device that a tag names; raises RuntimeError where it is not there."""
    placed: torch.UntypedStorage = default_restore_location(storage, tag)  # type: ignore[no-untyped-call]
    return placed


def _freest_device() -> str:
    """The visible GPU with the most free memory, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return f"cuda:{free.index(max(free))}"


# --- whole trees


def tree(root: Node, materializer: Materializer) -> Any:
    """A tree with its tensors made, and the plain objects that torch checkpoints hold.

    Parameters, sparse and quantized tensors, and those without bytes, become what they were, and so
    do objects whose values are known (`plain`); those of other classes stay `Inert`.
    RNG states stay on the CPU, where torch wants them.
    """
    rng = {id(node.storage) for node in _rng_states(root)}

    def change(node: Node) -> Any:
        if isinstance(node, Tensor):
            return materializer.tensor(node, stay=id(node.storage) in rng)
        if isinstance(node, dict):
            _check_keys(node)
            return OrderedDict(node) if isinstance(node, OrderedMap) else node
        if isinstance(node, Storage):
            return materializer.storage(node)
        if isinstance(node, Inert):
            dense = as_tensor(node)
            made = special(node, materializer) if dense is None else materializer.tensor(dense)
            if made is None:
                made = materializer.of_marked_class(node)
            return materializer.value(node) if made is None else _parameter(node, made)
        return _dtype(node) if type(node) is Global else node

    def finish(node: Node, made: Any) -> None:
        if isinstance(node, OrderedMap) and node.metadata is not None:
            made._metadata = OrderedDict(rebuild(node.metadata, change))

    return rebuild(root, change, finish)


def _check_keys(node: dict[Node, Node]) -> None:
    """Refuse a set that serves as a key; no pickle that was saved has one."""
    if any(type(key) is Inert and isinstance(revived(key), set) for key in node):
        raise UnsupportedError("a set serves as a key")


def _parameter(node: Inert, made: torch.Tensor) -> torch.Tensor:
    """What a parameter was; of numpy arrays and others that are seen as tensors, the tensor."""
    if node.function not in _PARAMETERS or not (made.is_floating_point() or made.is_complex()):
        return made
    return torch.nn.Parameter(made.detach(), requires_grad=_wants_gradient(node))


def _wants_gradient(node: Inert) -> bool:
    state = node.state if isinstance(node.state, tuple) else ()
    if node.function == _PARAMETER and len(node.args) < 2:  # of 2017, as torch reads those
        return bool(state[0] if len(state) == 3 else state[3] if len(state) == 5 else True)
    return len(node.args) > 1 and node.args[1] is True


_PARAMETER = Global("torch.nn.parameter", "Parameter")
_PARAMETERS = (
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
    _PARAMETER,
)


def _dtype(node: Global) -> Any:
    found = getattr(torch, node.name, None) if node.module == "torch" else None
    return found if isinstance(found, torch.dtype) else node


# --- tensors that are not dense


def special(node: Node, materializer: Materializer) -> torch.Tensor | None:
    """A sparse, quantized or meta tensor; None for others, and for one that is not sound."""
    node = undressed(node)
    if not isinstance(node, Inert) or not isinstance(node.args, tuple):
        return None
    make = _SPECIAL.get(str(node.function))
    try:
        return make(materializer, *node.args) if make is not None else None
    except (CkptfixError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        return None


def _sparse(materializer: Materializer, layout: Any, parts: tuple[Node, ...]) -> torch.Tensor:
    layout = getattr(torch, layout.args[0].removeprefix("torch."))
    given: list[Any] = [_part(part, materializer) for part in parts]
    if layout is torch.sparse_coo:
        is_coalesced = given[3] if len(given) > 3 else None
        return torch.sparse_coo_tensor(*given[:3], check_invariants=True, is_coalesced=is_coalesced)
    return torch.sparse_compressed_tensor(*given, layout=layout, check_invariants=True)


def _quantized(
    materializer: Materializer,
    storage: Storage,
    offset: int,
    size: Any,
    stride: tuple[int, ...],
    scheme: tuple[Any, ...],
    requires_grad: bool,
    *_: Node,
) -> torch.Tensor:
    check_layout(storage, storage.dtype, offset, tuple(size), stride, DEFAULT)
    kind, *rest = (_part(part, materializer) for part in scheme)
    memory = materializer.storage(storage)
    hooks: OrderedDict[Any, Any] = OrderedDict()
    given = (memory, offset, tuple(size), stride, (kind, *rest), False, hooks)
    made: torch.Tensor = torch._utils._rebuild_qtensor(*given)  # type: ignore[no-untyped-call]
    return made


def _without_bytes(
    materializer: Materializer, dtype: Global, size: Any, stride: Any, requires_grad: bool
) -> torch.Tensor:
    return torch.empty_strided(
        _part(size, materializer), stride, dtype=getattr(torch, dtype.name), device="meta"
    )


def _lazy(kind: Any, _: Materializer, requires_grad: Node) -> torch.Tensor:
    """What a lazy module that never ran has in the place of a parameter or a buffer."""
    return kind(requires_grad is True)  # type: ignore[no-any-return]


def _cast(materializer: Materializer, data: Node, dtype: Global, *_: Node) -> torch.Tensor:
    dense = as_tensor(data)
    if dense is None:
        raise TypeError
    return materializer.tensor(dense).to(getattr(torch, dtype.name))


def _part(node: Node, materializer: Materializer) -> Any:
    """An argument of a call that makes a tensor: a tensor, a size, a number, a scheme."""
    dense = as_tensor(node)
    if dense is not None:
        return materializer.tensor(dense)
    if isinstance(node, Inert):
        return revived(node)
    if type(node) is Global:
        return _SCHEMES[node.name]
    return node


_SCHEMES = {
    name: getattr(torch, name)
    for name in ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
}
_SPECIAL: dict[str, Callable[..., torch.Tensor]] = {
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_bytes,
    "torch.nn.parameter.UninitializedParameter": partial(_lazy, UninitializedParameter),
    "torch.nn.parameter.UninitializedBuffer": partial(_lazy, UninitializedBuffer),
    **{f"torch._utils.{function.name}": _cast for function in DEVICE_TENSORS},
}


# --- random number generators


def _rng_states(root: Node) -> list[Tensor]:
    """Byte tensors that stand under a key which says `rng`."""
    found, seen = [], set()
    pending: list[tuple[bool, Node]] = [(False, root)]
    while pending:
        inside, node = pending.pop()
        if isinstance(node, Tensor) and inside and node.dtype.name == "uint8":
            found.append(node)
        if isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            items = node.items() if isinstance(node, dict) else enumerate(node)
            pending.extend((inside or _says_rng(key), value) for key, value in items)
    return found


def _says_rng(key: Node) -> bool:
    return type(key) is str and "rng" in key.lower()
