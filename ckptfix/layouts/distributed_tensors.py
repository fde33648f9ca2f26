"""The pieces of tensors that one rank pickles: DTensor and ShardedTensor.

Both are pickled as `torch._tensor._rebuild_from_type_v2(function, class, args, state)`.

DTensor (FSDP2, tensor parallelism): `args[2]` is the shape of the whole, the state has

    _local_tensor  the piece of this rank, a tensor like any other
    _spec          DTensorSpec: `mesh`, `placements`, and since some version after 2.8 `shard_order`

The mesh is an array of ranks: up to 2.8 at least a tensor `mesh`, later a row of ranks `_rank_map`
and for each dimension of the mesh sizes and strides in it (`_layout.axes`). For each dimension of
the mesh there is a placement: `Replicate` (each rank has all), `Shard(dim)` (cut like `torch.chunk`
does: pieces of the size of the first, the last ones shorter or empty), `_StridedShard(dim,
split_factor)` (the same, but cut after the mesh dimensions to its right), or `Partial` (the sum of
all ranks is the tensor). Where a piece begins is written nowhere; it follows from the coordinates
of the rank in the mesh, and the piece must have the size that follows from them as well.

ShardedTensor (FSDP1, torchrec): the state is `(local_shards, ShardedTensorMetadata,
ProcessGroupState, spec, init_rrefs)`. Each local shard has its tensor and where it lies, and the
metadata lists the pieces of all ranks. A rank without a piece has no local shards.

Sources: `torch.distributed.tensor._api`, `._dtensor_spec`, `.placement_types`, `.device_mesh`;
`torch.distributed._shard.sharded_tensor.api` and `.metadata` (1.13 to 2.13).
"""

from __future__ import annotations

import struct
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.layouts.dcp_metadata import dtype_in
from ckptfix.layouts.in_pieces import kind
from ckptfix.pickles.torch_objects import sizes
from ckptfix.pieces.boxes import Box
from ckptfix.pieces.joining import Piece
from ckptfix.tree.document import Global, Inert, Node, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptfix.tree.dtypes import DType

_MAX_DIMS = 64
ELSEWHERE = "load it in the program that saved it, and save its full state dict"
"""The hint for what is not known."""


class Part(NamedTuple):
    """What one rank has of a tensor."""

    dtype: DType
    shape: tuple[int, ...]
    """The shape of the whole."""
    pieces: list[Piece]
    ranks: int
    """How many ranks the tensor is spread over, as far as is known."""


class Decoder:
    """Says what the nodes of one file mean. `rank` is that of the file, where it is known."""

    def __init__(self, rank: int | None, byteorder: str) -> None:
        self.rank = rank
        self._order = "<" if byteorder == "little" else ">"
        self._meshes: dict[int, tuple[Node, list[int], list[int]]] = {}

    def part(self, node: Inert) -> Part:
        """What the rank has of the tensor. Raises `ReadError` and its kin."""
        if kind(node) == "DTensor":
            return self._dtensor(node)
        return self._sharded(node)

    def rank_in(self, node: Inert) -> int | None:
        """The rank that a piece says it is of; None where it does not say."""
        _, _, _, state = node.args
        if kind(node) == "ShardedTensor":
            group = state[2] if type(state) is tuple and len(state) == 5 else None
            rank = _fields(group, "ProcessGroupState").get("global_rank")
            return rank if type(rank) is int else None
        mesh = _fields(_spec(state).get("mesh"), "DeviceMesh")
        rank, told, whole = (mesh.get(key) for key in ("_rank", "_coordinate_on_dim", "mesh"))
        if type(rank) is int:
            return rank
        place = sizes(tuple(told) if isinstance(told, list) else told)
        if not isinstance(whole, Tensor) or place is None or len(place) != len(whole.shape):
            return None
        at = sum(
            coordinate * stride
            for coordinate, (stride,) in zip(place, _row_major(whole.shape), strict=True)
        )
        return self._numbers(whole)[at] if 0 <= at < whole.numel else None

    # --- DTensor

    def _dtensor(self, node: Inert) -> Part:
        _, _, args, state = node.args
        local = _attributes(state).get("_local_tensor")
        shape = sizes(args[2]) if type(args) is tuple and len(args) > 2 else None
        if not isinstance(local, Tensor) or shape is None or len(shape) > _MAX_DIMS:
            raise DamagedError("is a DTensor without its piece or its shape")
        spec = _spec(state)
        counts, place = self._mesh(spec.get("mesh"))
        placements = spec.get("placements")
        if type(placements) is not tuple or len(placements) != len(counts):
            raise DamagedError("is a DTensor whose placements do not fit its mesh")
        box = Box((0,) * len(shape), shape)
        for mesh_dimension, d in _cuts(placements, counts, len(shape), spec):
            box = _cut(box, d, counts[mesh_dimension], place[mesh_dimension])
        if local.shape != box.size:
            raise UnsafeError(
                f"has a piece of {list(local.shape)} where rank {self.rank} has the piece {box}",
                hint="each file has to have the name that it was saved under",
            )
        return Part(local.dtype, shape, [Piece(box.offset, local)], prod(counts))

    def _mesh(self, mesh: Node) -> tuple[list[int], list[int]]:
        """How many ranks a mesh has in each dimension, and the coordinates of the file's rank."""
        known = self._meshes.get(id(mesh))
        if known is None:
            fields = _fields(mesh, "DeviceMesh")
            counts, place = self._coordinates(fields)
            told = fields.get("_coordinate_on_dim")
            if isinstance(told, (list, tuple)) and list(told) != place:
                raise UnsafeError(
                    f"was saved by the rank at {list(told)} of its mesh, not by rank {self.rank}",
                    hint="each file has to have the name that it was saved under",
                )
            known = self._meshes[id(mesh)] = mesh, counts, place
        return known[1:]

    def _coordinates(self, fields: Mapping[str, Node]) -> tuple[list[int], list[int]]:
        whole = fields.get("mesh")
        if isinstance(whole, Tensor):
            counts, strides = [[size] for size in whole.shape], _row_major(whole.shape)
            ranks = self._numbers(whole)
        else:
            counts, strides = _axes(fields.get("_layout"))
            ranks = self._numbers(fields.get("_rank_map"))
        if self.rank is None:
            raise UnsupportedError(
                "does not say which rank saved it, and its name does not either",
                hint="give it a name that ends in its rank, such as model_rank0.pt",
            )
        if ranks.count(self.rank) != 1:
            raise UnsafeError(f"rank {self.rank} is not in the mesh of its tensors")
        at = ranks.index(self.rank)
        place = []
        for sizes_, steps in zip(counts, strides, strict=True):
            coordinate = 0
            for size, step in zip(sizes_, steps, strict=True):
                coordinate = coordinate * size + at // max(step, 1) % size
            place.append(coordinate)
        return [prod(one) for one in counts], place

    def _numbers(self, tensor: Node) -> list[int]:
        """The numbers of a small tensor of integers."""
        code = _INTEGERS.get(tensor.dtype.name) if isinstance(tensor, Tensor) else None
        if code is None or not tensor.is_contiguous or tensor.numel > _MOST_RANKS:
            raise DamagedError("has a mesh whose ranks cannot be read")
        begin = tensor.offset * tensor.dtype.itemsize
        data = b"".join(span.read() for span in tensor.storage.spans)
        data = data[begin : begin + tensor.nbytes]
        if len(data) < tensor.nbytes:
            raise DamagedError("has a mesh whose ranks are cut off")
        return list(struct.unpack(f"{self._order}{tensor.numel}{code}", data))

    # --- ShardedTensor

    def _sharded(self, node: Inert) -> Part:
        state = node.args[3]
        if type(state) is not tuple or len(state) != 5 or not isinstance(state[0], list):
            raise UnsupportedError(
                "is a ShardedTensor as torch 1.11 and earlier pickled them",
                hint="save it anew with torch 1.13 or later",
            )
        local, metadata, group, *_ = state
        told = _fields(metadata, "ShardedTensorMetadata")
        shape, every = sizes(told.get("size")), told.get("shards_metadata")
        if shape is None or not isinstance(every, list):
            raise DamagedError("is a ShardedTensor without its shape or its pieces")
        rank = _fields(group, "ProcessGroupState").get("global_rank")
        if self.rank is not None and rank != self.rank:
            raise UnsafeError(
                f"was saved by rank {rank}, not by rank {self.rank}",
                hint="each file has to have the name that it was saved under",
            )
        known = {_box(shard) for shard in every}
        pieces = []
        for shard in local:
            fields = _fields(shard, "Shard")
            tensor, box = fields.get("tensor"), _box(fields.get("metadata"))
            if not isinstance(tensor, Tensor) or tensor.shape != box.size or box not in known:
                raise DamagedError(f"is a ShardedTensor without its piece {box}")
            pieces.append(Piece(box.offset, tensor))
        dtype = dtype_in(told.get("tensor_properties"))
        ranks = _fields(group, "ProcessGroupState").get("global_world_size")
        return Part(dtype, shape, pieces, ranks if type(ranks) is int else len(known))


_INTEGERS = {"int32": "i", "int64": "q", "int16": "h", "int8": "b", "uint8": "B"}
_MOST_RANKS = 1 << 20


def _fields(node: Node, name: str) -> dict[str, Node]:
    """The attributes of an object of one of torch's classes, by the last part of its name."""
    known = type(node) is Inert and type(node.function) is Global
    if not known or node.function.name.rpartition(".")[2] != name:
        what = node.cls if type(node) is Inert else type(node).__name__
        what = "nothing" if node is None else what
        raise UnsupportedError(f"has {what} where torch has a {name}", hint=ELSEWHERE)
    return dict(node.attributes)


def _attributes(state: Node) -> dict[str, Node]:
    """The attributes of a DTensor: the second of two, the first being those of its Python class."""
    fields = state[-1] if type(state) is tuple and state else state
    return fields if isinstance(fields, dict) else {}


def _spec(state: Node) -> dict[str, Node]:
    return _fields(_attributes(state).get("_spec"), "DTensorSpec")


def _row_major(shape: Sequence[int]) -> list[list[int]]:
    """The strides of an array, each alone in a list."""
    return [[prod(shape[d + 1 :])] for d in range(len(shape))]


def _axes(layout: Node) -> tuple[list[list[int]], list[list[int]]]:
    """The sizes and strides of each dimension of a mesh; one that was flattened has several."""
    fields = _fields(layout, "_MeshLayout")
    axes, counts, strides = fields.get("axes"), [], []
    if not isinstance(axes, (list, tuple)):
        raise UnsupportedError("has a mesh whose layout is not known", hint=ELSEWHERE)
    for axis in axes:
        found = _fields(axis, "_FlatLayout")
        shape, stride = sizes(found.get("shape")), sizes(found.get("stride"))
        if shape is None or stride is None or len(shape) != len(stride) or 0 in shape:
            raise DamagedError("has a mesh whose layout is wrong")
        counts.append(list(shape))
        strides.append(list(stride))
    return counts, strides


def _cuts(
    placements: Sequence[Node], counts: list[int], dimensions: int, spec: Mapping[str, Node]
) -> list[tuple[int, int]]:
    """The cuts of a tensor, in order: the dimension of the mesh, and that of the tensor."""
    order: list[tuple[int, int]] = []
    for at in reversed(range(len(placements))):
        placement = placements[at]
        name = placement.function.name if type(placement) is Inert else type(placement).__name__
        if name == "Replicate":
            continue
        if name not in ("Shard", "_StridedShard"):
            raise _not_placed(name)
        fields = _fields(placement, name)
        d = fields.get("dim")
        if type(d) is not int or not -dimensions <= d < dimensions:
            raise DamagedError(f"is cut in dimension {d} of {dimensions}")
        d %= dimensions
        if name == "Shard":
            order.insert(0, (at, d))
            continue
        inner = prod(counts[other] for other, along in order if along == d)
        if fields.get("split_factor") != inner:
            raise UnsupportedError(
                f"is cut by {name} with the factor {fields.get('split_factor')}, not {inner}",
                hint=ELSEWHERE,
            )
        order.append((at, d))
    return _as_ordered(order, spec)


def _as_ordered(order: list[tuple[int, int]], spec: Mapping[str, Node]) -> list[tuple[int, int]]:
    """The cuts in the order that a newer torch writes down, where it does."""
    told = spec.get("shard_order")
    if type(told) is not tuple or spec.get("use_strided_shard_as_shard_order") is True:
        return order
    meant = []
    for entry in told:
        args = entry.args if type(entry) is Inert else None
        if type(args) is not tuple or len(args) != 2 or type(args[1]) is not tuple:
            raise UnsupportedError("has an order of cuts that is not known", hint=ELSEWHERE)
        meant += [(at, args[0]) for at in args[1]]
    if sorted(meant) != sorted(order):
        raise UnsafeError("is cut in one way by its placements, and in another by their order")
    return meant


def _not_placed(name: str) -> UnsupportedError:
    if name in ("Partial", "_Partial"):
        return UnsupportedError(
            "is a sum of which each rank has a part (Partial)",
            hint="redistribute it before it is saved; what is in the files is not the tensor",
            code="partial",
        )
    return UnsupportedError(f"is placed by {name}, which is not known", hint=ELSEWHERE)


def _cut(box: Box, d: int, count: int, place: int) -> Box:
    """The piece of a box that `torch.chunk` gives the rank at a place, of so many."""
    offset, size = list(box.offset), list(box.size)
    length = -(-size[d] // count)
    begin = min(length * place, size[d])
    offset[d] += begin
    size[d] = min(length, size[d] - begin)
    return Box(tuple(offset), tuple(size))


def _box(node: Node) -> Box:
    """Where a shard lies, as its `ShardMetadata` says."""
    fields = _fields(node, "ShardMetadata")
    offset, size = (_numbers(fields.get(key)) for key in ("shard_offsets", "shard_sizes"))
    if offset is None or size is None:
        raise DamagedError("has a piece of which is not said where it lies")
    return Box(offset, size)


def _numbers(node: Node) -> tuple[int, ...] | None:
    return sizes(tuple(node) if isinstance(node, list) else node)
