"""Two tensors compared: how often their bytes are made, and that pieces do not matter."""

from __future__ import annotations

import pytest

from ckptfix.bytes.source import BLOCK
from ckptfix.bytes.span import Span
from ckptfix.diffs.values import Side, checksum, same_bytes
from ckptfix.tree.document import Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from tests.helpers import Computed


def side(source: Computed) -> Side:
    """A tensor whose bytes are made when they are read."""
    span = Span(source, 0, source.size)
    dtype = BY_NAME["uint8"]
    storage = Storage(dtype, source.size, "cpu", (span,), "0")
    return Side(Tensor(storage, dtype, (source.size,), (1,)), "little")


@pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK + 1])
def test_each_byte_of_a_computed_tensor_is_made_once_for_each_pass(size: int) -> None:
    one, other = Computed(b"x" * size), Computed(b"x" * size)
    assert same_bytes(side(one), side(other)) is True
    assert sum(length for _, length in one.made) == sum(length for _, length in other.made) == size
    assert all(length <= BLOCK for _, length in one.made)
    one.made.clear()
    checksum(side(one))
    assert sum(length for _, length in one.made) == size


def test_a_difference_in_the_last_byte_of_a_computed_tensor_is_seen() -> None:
    size = 2 * BLOCK + 5
    one, other = Computed(bytes(size)), Computed(bytes(size - 1) + b"x")
    assert same_bytes(side(one), side(other)) is False
