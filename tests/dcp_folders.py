"""Folders as `torch.distributed.checkpoint` writes them, in one process, in whatever pieces."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tests.sharded import bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    Boxes = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    Split = Callable[[str, torch.Tensor], Boxes]


class _Splitting(DefaultSavePlanner):
    """A planner that saves each tensor in the boxes that it is told, as ranks would."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self._pieces(item)]
        return dataclasses.replace(plan, items=items)

    def _pieces(self, item: Any) -> Iterator[Any]:
        if item.type != WriteItemType.TENSOR:
            yield item
            return
        name = item.index.fqn
        for number, (offset, size) in enumerate(self._split(name, self.state_dict[name])):
            chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
            yield dataclasses.replace(
                item,
                index=MetadataIndex(name, torch.Size(offset), number),
                type=WriteItemType.SHARD,
                tensor_data=dataclasses.replace(item.tensor_data, chunk=chunk),
            )

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        tensor, chunk = self.state_dict[write_item.index.fqn], write_item.tensor_data.chunk
        for d, (begin, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(d, begin, length)
        return tensor.detach().clone()


def whole(_: str, tensor: torch.Tensor) -> Boxes:
    """One piece, as a tensor that every rank has is saved."""
    return [((0,) * tensor.dim(), tuple(tensor.shape))]


def along(d: int, ranks: int) -> Split:
    """As FSDP splits what has that dimension: pieces of one size, the last shorter or empty."""

    def split(name: str, tensor: torch.Tensor) -> Boxes:
        if tensor.dim() <= d:
            return whole(name, tensor)
        size = -(-tensor.shape[d] // ranks)
        boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for rank in range(ranks):
            offset, shape = [0] * tensor.dim(), list(tensor.shape)
            offset[d] = min(rank * size, tensor.shape[d])
            shape[d] = min(size, tensor.shape[d] - offset[d])
            if shape[d] or not any(box[0] == tuple(offset) for box in boxes):
                boxes.append((tuple(offset), tuple(shape)))
        return boxes

    return split


def grid(rows: int, columns: int) -> Split:
    """As FSDP over tensor parallelism does: the first dimension and the second one."""

    def split(name: str, tensor: torch.Tensor) -> Boxes:
        if tensor.dim() < 2:
            return along(0, rows)(name, tensor)
        boxes = [
            ((top, left, *below[2:]), (height, width, *rest[2:]))
            for (top, *_), (height, *_) in along(0, rows)(name, tensor)
            for (below, rest) in along(1, columns)(name, tensor)
            for left, width in [(below[1], rest[1])]
            if height and width
        ]
        return boxes or whole(name, tensor)

    return split


def save(folder: Path, state: Mapping[str, Any], split: Split = whole, **writer: Any) -> Path:
    """Save a state dict; `writer` goes to `FileSystemWriter`, such as `thread_count`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save(
            dict(state),
            storage_writer=FileSystemWriter(folder, **writer),
            planner=_Splitting(split),
            no_dist=True,
        )
    return folder


def consolidated(folder: Path, out: Path) -> Any:
    """What torch's own converter makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, out)
    return torch.load(out, weights_only=False)


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change what `.metadata` says."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def item(metadata: Metadata, name: str, number: int = 0) -> Any:
    """Where the bytes of a piece lie, as `.metadata` has it."""
    found = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    return found[number]


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the bit, in their order."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and bits(one) == bits(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def as_dicts(node: Any) -> Any:
    """The same with every mapping a plain dict, sorted: torch's converter loses the order."""
    if isinstance(node, dict):
        return {key: as_dicts(node[key]) for key in sorted(node)}
    return [as_dicts(one) for one in node] if isinstance(node, list) else node
