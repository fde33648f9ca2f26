"""Two tensors compared: how often their bytes are made, and that pieces do not matter."""

from __future__ import annotations

import pytest

from ckptfix.bytes.source import CHUNK, ComputedSource
from ckptfix.bytes.span import Span
from ckptfix.diffs.values import Side, checksum, same_bytes
from ckptfix.tree.document import Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME


def computed(data: bytes, made: list[int]) -> Side:
    """A tensor whose bytes are made when they are read; each time is noted."""

    def compute() -> bytes:
        made.append(len(data))
        return data

    span = Span(ComputedSource(len(data), compute, "x"), 0, len(data))
    dtype = BY_NAME["uint8"]
    storage = Storage(dtype, len(data), "cpu", (span,), "0")
    return Side(Tensor(storage, dtype, (len(data),), (1,)), "little")


@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK + 1])
def test_a_computed_tensor_is_computed_once_for_each_pass(size: int) -> None:
    made: list[int] = []
    one, other = computed(b"x" * size, made), computed(b"x" * size, made)
    assert same_bytes(one, other) is True
    assert len(made) <= 2
    made.clear()
    checksum(one)
    assert len(made) <= 1


def test_a_difference_in_the_last_byte_of_a_computed_tensor_is_seen() -> None:
    size = 2 * CHUNK + 5
    one, other = computed(bytes(size), []), computed(bytes(size - 1) + b"x", [])
    assert same_bytes(one, other) is False
