"""Tensors that several ranks saved, each the whole of it: whether they are one and the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.engine import are_equal
from ckptfix.bytes.span import Span, cut
from ckptfix.tree.document import extent

if TYPE_CHECKING:
    from ckptfix.tree.document import Tensor


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, and strided alike.

    Where both are all that a checksum on record is of, the checksums are compared; elsewhere the
    bytes from the first element to the last are.
    """
    if (one.dtype, one.shape, one.stride) != (other.dtype, other.shape, other.stride):
        return False
    if not one.numel:
        return True
    mine, theirs = _spans(one), _spans(other)
    if len(mine) == len(theirs) == 1 and None not in (mine[0].crc, theirs[0].crc):
        return mine[0].crc == theirs[0].crc
    return are_equal(mine, theirs)


def _spans(tensor: Tensor) -> tuple[Span, ...]:
    begin, end = extent(tensor)
    return cut(tensor.storage.spans, begin, end - begin)
