"""Two tensors of one shape held against each other: equal bytes, and if not, how far apart.

Bytes are compared without torch: by the checksums on record, or a block at a time. Only tensors
whose bytes differ, or cannot be laid side by side, are decoded, one at a time.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.engine import are_equal, crc32
from ckptfix.bytes.source import CHUNK
from ckptfix.bytes.span import cut
from ckptfix.tree.document import extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ckptfix.bytes.span import Span
    from ckptfix.tree.document import Tensor
    from ckptfix.tree.dtypes import DType


class Distance(NamedTuple):
    """How far apart two tensors are. NaN is equal to NaN; infinities of one sign are equal."""

    differing: int | None
    """Elements whose values differ; 0 where only bits do, as those of 0 and -0;
    None: they are no numbers."""
    max_abs: float | None
    """The largest absolute difference, infinite where one of two is."""
    max_rel: float | None
    """The largest difference relative to the larger magnitude of the two."""

    @property
    def in_bits_only(self) -> bool:
        """Whether the values are the same."""
        return self.differing == 0


class Side(NamedTuple):
    """A tensor, and the byte order of the document that it is in."""

    tensor: Tensor
    byteorder: str


def same_bytes(a: Side, b: Side, *, read_data: bool = False) -> bool | None:
    """Whether two tensors of one shape and dtype have equal bytes.

    None where the bytes do not lie in one order, so that they have to be decoded. Checksums on
    record are believed unless `read_data` is set.
    """
    ours, theirs = _comparable(a, b)
    if ours is None or theirs is None:
        return None
    if not read_data and len(ours) == len(theirs) == 1:
        (one,), (other,) = ours, theirs
        if None not in (one.crc, other.crc):
            return one.crc == other.crc
    return are_equal(ours, theirs)


def same_values(a: Side, b: Side) -> bool:
    """Whether two tensors are one, or have one shape, one dtype and equal values."""
    one, other = a.tensor, b.tensor
    if one.view == other.view:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    same = same_bytes(a, b)
    return distance(a, b).in_bits_only if same is None else same


def checksum(side: Side) -> int | None:
    """The CRC-32 of a row-major tensor, from the record or computed; None for other layouts."""
    spans = _row_major(side.tensor)
    if spans is None or (side.byteorder != "little" and side.tensor.dtype.word > 1):
        return None
    return spans[0].crc if len(spans) == 1 and spans[0].crc is not None else crc32(spans)


def _comparable(a: Side, b: Side) -> tuple[Sequence[Span] | None, Sequence[Span] | None]:
    """The bytes of both where equal bytes mean equal elements."""
    if a.byteorder != b.byteorder and a.tensor.dtype.word > 1:
        return None, None
    one, other = a.tensor, b.tensor
    if one.stride == other.stride and not (one.metadata or other.metadata):
        return _extent(one), _extent(other)
    return _row_major(one), _row_major(other)


def _row_major(tensor: Tensor) -> tuple[Span, ...] | None:
    if not tensor.is_contiguous or tensor.metadata:
        return None
    return cut(tensor.storage.spans, tensor.offset * tensor.dtype.itemsize, tensor.nbytes)


def _extent(tensor: Tensor) -> tuple[Span, ...] | None:
    """The bytes that a tensor spans, if it leaves none of them out."""
    begin, end = extent(tensor) if tensor.numel else (0, 0)
    return cut(tensor.storage.spans, begin, end - begin) if tensor.nbytes >= end - begin else None


# --- distance


def distance(a: Side, b: Side) -> Distance:
    """How far apart the values of two tensors of one shape are. Imports torch."""
    if not (_is_number(a.tensor.dtype) and _is_number(b.tensor.dtype)):
        return Distance(None, None, None)
    ours, theirs = _flat(a), _flat(b)
    pieces = [
        _distance(ours[start : start + CHUNK], theirs[start : start + CHUNK])
        for start in range(0, len(ours), CHUNK)
    ]
    differing, absolute, relative = zip(*pieces, strict=True) if pieces else ((0,), (0.0,), (0.0,))
    return Distance(sum(differing), max(absolute), max(relative))


def _is_number(dtype: DType) -> bool:
    known = r"u?int(8|16|32|64)|bool|complex(32|64|128)|b?float.*"
    return dtype.packed == 1 and re.fullmatch(known, dtype.name) is not None


def _flat(side: Side) -> torch.Tensor:
    from ckptfix.torch_bridge.materialize import Materializer

    materializer = Materializer(byteorder=side.byteorder, mapped=True)
    return materializer.tensor(side.tensor).detach().reshape(-1)


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float, float]:
    import torch

    complex_ = ours.is_complex() or theirs.is_complex()
    wide = torch.complex128 if complex_ else torch.float64
    x, y = ours.to(wide), theirs.to(wide)
    unequal = (x != y) & ~(x.isnan() & y.isnan())
    if ours.dtype == theirs.dtype and not (ours.is_floating_point() or complex_):
        exact = getattr(torch, f"int{8 * ours.itemsize}")  # float64 has 53 bits
        unequal = ours.view(exact) != theirs.view(exact)
    if not unequal.any():
        return 0, 0.0, 0.0
    x, y = x[unequal], y[unequal]
    gap = (x - y).abs()
    relative = gap / torch.maximum(x.abs(), y.abs())
    return int(unequal.sum()), _largest(gap), _largest(relative)


def _largest(values: torch.Tensor) -> float:
    """The largest of some values; NaN, which comes of NaN and infinities, is larger than all."""
    return float(values.nan_to_num(nan=math.inf, posinf=math.inf).max())
