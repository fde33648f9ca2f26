"""Pieces of a tensor, each a tensor in some file, joined into one without reading any of them.

Where the pieces follow one another in the whole (rows of a matrix), its storage is their spans, and
the kernel copies them. Where they lie side by side (columns), the storage is a source that gathers
them when it is read (`scattered`). Strides stay where all pieces have the same order of dimensions,
as in `channels_last`; a piece that is strided otherwise is made row-major when it is read.

Checksums on record are kept where a span is copied whole; elsewhere what passes is held against
them (`bytes.checked`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.checked import CheckedSource
from ckptfix.bytes.span import Span, cut
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.errors import UnsafeError, UnsupportedError
from ckptfix.pieces import boxes
from ckptfix.pieces.boxes import Box, Runs
from ckptfix.pieces.scattered import Part, ScatteredSource
from ckptfix.tree.document import Storage, Tensor, contiguous_stride, extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.tree.dtypes import DType

Order = tuple[int, ...]
"""Dimensions from the one whose elements lie furthest apart to the one where they are closest."""


class Piece(NamedTuple):
    """A tensor as it lies in a file, and where it begins in the whole."""

    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def box(self) -> Box:
        """The part of the whole that it is."""
        return Box(self.offset, self.tensor.shape)


class Joiner:
    """Joins the pieces of the tensors of one checkpoint; storages may be shared among them."""

    def __init__(self) -> None:
        self._checked: dict[int, tuple[Storage, tuple[Span, ...]]] = {}

    def join(
        self, key: str, dtype: DType, shape: tuple[int, ...], pieces: Sequence[Piece]
    ) -> Tensor:
        """The tensor of which `pieces` are all pieces. Raises `ReadError` and its kin."""
        boxes.check(shape, [piece.box for piece in pieces])
        for piece in pieces:
            if piece.tensor.dtype is not dtype:
                raise UnsafeError(f"the piece {piece.box} is {piece.tensor.dtype}, not {dtype}")
        filled = [piece for piece in pieces if piece.tensor.numel]
        if len(filled) == 1:
            return filled[0].tensor
        if any(piece.tensor.metadata for piece in filled):
            raise UnsupportedError("a piece is conjugated or negated when it is read")
        order = _order(filled, len(shape))
        lying = tuple(shape[d] for d in order)
        spans = self._spans(key, dtype, lying, [_turned(piece, order) for piece in filled])
        tags = {piece.tensor.storage.device for piece in pieces}
        device = tags.pop() if len(tags) == 1 else "cpu"
        stride = dict(zip(order, contiguous_stride(lying), strict=True))
        whole = Tensor(Storage(dtype, 0, device, spans, key), dtype, shape, ())
        whole.storage.numel = whole.numel
        whole.stride = tuple(stride[d] for d in range(len(shape)))
        return whole

    def _spans(
        self, key: str, dtype: DType, shape: tuple[int, ...], pieces: list[Piece]
    ) -> tuple[Span, ...]:
        """The bytes of the whole in row-major order."""
        runs = [(Runs(shape, piece.box, dtype.itemsize), piece.tensor) for piece in pieces]
        if all(one.number == 1 for one, _ in runs):
            runs.sort(key=lambda pair: pair[0].begin)
            return tuple(span for _, tensor in runs for span in self._bytes(tensor))
        if not runs:
            return ()
        parts = [Part(piece.box, self._bytes(piece.tensor, check=True)) for piece in pieces]
        source = ScatteredSource(shape, dtype.itemsize, parts, f"the pieces of {key!r}")
        return (Span(source, 0, source.size),)

    def _bytes(self, tensor: Tensor, *, check: bool = False) -> tuple[Span, ...]:
        """The bytes of a tensor in row-major order; `check`: although they are not copied whole."""
        if not tensor.is_contiguous:
            size, word = tensor.dtype.itemsize, tensor.dtype.word
            layout = Layout(tensor.shape, tensor.stride, tensor.offset, size, word)
            made = StridedSource(self._sound(tensor.storage), layout, "a piece")
            return (Span(made, 0, tensor.nbytes),)
        begin, end = extent(tensor)
        whole = end - begin == tensor.storage.nbytes
        spans = tensor.storage.spans if whole and not check else self._sound(tensor.storage)
        return cut(spans, begin, end - begin)

    def _sound(self, storage: Storage) -> tuple[Span, ...]:
        """The spans of a storage, each held against its checksum although parts of it are used."""
        known = self._checked.get(id(storage))
        if known is None:
            label = f"storage {storage.key!r}"
            spans = tuple(
                span if span.crc is None else Span(CheckedSource(span, label), *span[1:3])
                for span in storage.spans
            )
            known = self._checked[id(storage)] = storage, spans
        return known[1]


def _order(pieces: Sequence[Piece], dimensions: int) -> Order:
    """The order of dimensions in which all pieces lie without gaps; row-major if there is none."""
    usual = tuple(range(dimensions))
    if all(piece.tensor.is_contiguous for piece in pieces):
        return usual
    largest = max((piece.tensor for piece in pieces), key=lambda tensor: tensor.numel)
    order = tuple(sorted(usual, key=lambda d: -largest.stride[d]))
    return order if all(_turned(p, order).tensor.is_contiguous for p in pieces) else usual


def _turned(piece: Piece, order: Order) -> Piece:
    """A piece with its dimensions in another order."""
    if order == tuple(range(len(order))):
        return piece
    offset, tensor = piece
    shape, stride = (tuple(one[d] for d in order) for one in (tensor.shape, tensor.stride))
    return Piece(tuple(offset[d] for d in order), replace(tensor, shape=shape, stride=stride))
