"""State dicts whose tensors are read when they are asked for, one at a time or only some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.span import cut
from ckptfix.contents.state_dicts import choose
from ckptfix.errors import SelectionError, UnsupportedError
from ckptfix.hints import Hint, command
from ckptfix.tree.document import Storage, Tensor, extent
from ckptfix.words import nearest, plural, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ckptfix.torch_bridge.materialize import MapLocation
    from ckptfix.tree.document import Document, Node


class LazyTensor:
    """A tensor in a file: what it is, and its values once they are asked for.

    `tensor.load()` reads all of it, `tensor[10:20]` only those rows; either gives a torch tensor in
    memory of its own. Nothing else of the file is read.

    Example:
        >>> import ckptfix
        >>> weight = ckptfix.open("model.pt").state_dict()["0.weight"]
        >>> weight.shape, weight.dtype, weight.nbytes
        ((4, 3), 'float32', 48)
        >>> weight[1:3].shape
        torch.Size([2, 3])
    """

    def __init__(self, document: Document, key: str, tensor: Tensor) -> None:
        self._document = document
        self._tensor = tensor
        self.key = key
        """Its name in the state dict."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size in each dimension, in elements."""
        return self._tensor.shape

    @property
    def dtype(self) -> str:
        """What its elements are, as torch calls it: `float32`, `bfloat16`, `int64`."""
        return self._tensor.dtype.name

    @property
    def device(self) -> str:
        """The device that it was saved from, such as `cuda:0`."""
        return self._tensor.storage.device

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self._tensor.nbytes

    def load(self, map_location: MapLocation = "cpu") -> torch.Tensor:
        """All of it, as a torch tensor.

        Args:
            map_location: where it goes, as in `torch.load`; or `"auto"`.

        Returns:
            A torch tensor in memory of its own.

        Raises:
            ReadError: the file cannot be read any longer, or was written to since it was opened.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").state_dict()["0.bias"].load().shape
            torch.Size([4])
        """
        return self._made(self._tensor, map_location)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Some of it, indexed as a torch tensor is.

        Of the first dimension only those rows are read that an integer or a slice asks for; any
        other index reads all of it.
        """
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not self.shape or not isinstance(first, (int, slice)) or isinstance(first, bool):
            return self.load()[index]
        length = self.shape[0]
        if isinstance(first, int):
            if not -length <= first < length:
                raise IndexError(f"row {first} of {self.key!r}, which has {length}")
            start, stop, step = first % length, first % length + 1, None
        else:
            start, stop, step = first.indices(length)
            if step < 1:
                raise ValueError("the step of a slice has to be greater than zero")
        rows = self._made(_rows(self._tensor, start, max(stop - start, 0)), "cpu")
        return rows[(0 if isinstance(first, int) else slice(None, None, step), *rest)]

    def _described(self, byteorder: str) -> Tensor:
        """What `Checkpoint.set` puts into a checkpoint in that order of bytes."""
        if byteorder != self._document.byteorder:
            raise UnsupportedError(
                "has numbers in another order of bytes",
                where=self._document.name,
                hint="save it with Checkpoint.save first",
            )
        return self._tensor

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.key!r}, {self.dtype} {list(self.shape)}, {size(self.nbytes)})"

    def _made(self, tensor: Tensor, map_location: MapLocation) -> torch.Tensor:
        from ckptfix.torch_bridge import materialize

        place, byteorder = materialize.placement(map_location), self._document.byteorder
        materializer = materialize.Materializer(place, byteorder)
        made = materializer.tensor(_alone(tensor) if byteorder == "little" else tensor)
        materializer.check()
        return made


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    offset = tensor.offset + start * tensor.stride[0]
    return replace(tensor, shape=(count, *tensor.shape[1:]), offset=offset)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor over a storage of no more bytes than it uses."""
    if not tensor.numel:
        return replace(tensor, storage=Storage(tensor.dtype, 0, tensor.storage.device), offset=0)
    begin, end = extent(tensor)
    spans = cut(tensor.storage.spans, begin, end - begin)
    numel = (end - begin) // tensor.dtype.itemsize
    storage = Storage(tensor.dtype, numel, tensor.storage.device, spans)
    return replace(tensor, storage=storage, offset=0)


class LazyStateDict(Mapping[str, LazyTensor]):
    """The dense tensors of a state dict by key, none of which is read before it is asked for.

    What else stands in it (numbers, extra state, sparse and quantized tensors) is in `others`.
    """

    def __init__(self, document: Document, path: str | None = None) -> None:
        state = choose(document, path)
        self.path = state.path
        """Where it stands in the checkpoint; `/` is the checkpoint itself."""
        self._document = document
        self._tensors = state.tensors
        self.others: Mapping[str, Node] = state.others
        """What is no dense tensor, as `ckptfix.open` describes it."""

    def __getitem__(self, key: str) -> LazyTensor:
        return LazyTensor(self._document, key, self._tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def named(self, key: str) -> LazyTensor:
        """The tensor with a key.

        Args:
            key: its name.

        Returns:
            What `self[key]` gives.

        Raises:
            SelectionError: there is none; the hint says what is spelled alike.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").state_dict().named("0.bias")
            LazyTensor('0.bias', float32 [4], 16 bytes)
        """
        if key in self._tensors:
            return self[key]
        near = nearest(key, self._tensors)
        see = Hint("see its keys", command("inspect", self._document.name, all=True))
        raise SelectionError(
            f"has no tensor {key!r}",
            where=self._document.name,
            hint=Hint(f"did you mean {near!r}?") if near else see,
            code="no-such-key",
        )

    def __repr__(self) -> str:
        nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        held = f"{plural(len(self), 'tensor')}, {size(nbytes)}"
        return f"LazyStateDict({self.path!r} of {self._document.name!r}: {held})"
