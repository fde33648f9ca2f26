"""Items that are known again: what is said of them is what reading them strictly says."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptfix.bytes.source import BytesSource
from ckptfix.errors import CkptfixError
from ckptfix.formats.reading import Reading
from ckptfix.layouts.dcp_items import Items
from ckptfix.tree.document import Tensor
from tests.pieces.test_joining import content, numbered

if TYPE_CHECKING:
    from collections.abc import Callable


def saved(value: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


def said(items: Items, data: bytes) -> Any:
    """What is read of an item, or the error that it is."""
    try:
        found = items.read(BytesSource(data, "file"), 0, len(data), "item")
    except CkptfixError as error:
        return (type(error), error.code)
    if not isinstance(found, Tensor):
        return found
    crcs = [span.crc for span in found.storage.spans]
    described = (found.dtype, found.shape, found.stride, found.offset, found.storage.device)
    return (*described, found.storage.numel, crcs, content(found))


ALIKE: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "other numbers": lambda: (saved(torch.ones(3)), saved(torch.zeros(3))),
    "another shape": lambda: (saved(torch.ones(2, 3)), saved(torch.ones(3, 2))),
    "another dtype": lambda: (saved(torch.ones(2)), saved(torch.ones(1, dtype=torch.int64))),
    "strides": lambda: (saved(torch.ones(2, 3)), saved(numbered((3, 2), torch.float32).t())),
    "untyped": lambda: (
        saved(torch.ones(4, dtype=torch.uint16)),
        saved(numbered((4,), torch.uint16)),
    ),
    "not a tensor": lambda: (saved(torch.ones(3)), saved(5)),
    "values": lambda: (saved("abc"), saved("abd")),
}


@pytest.mark.parametrize("pair", ALIKE)
def test_an_item_says_the_same_after_another_one(pair: str) -> None:
    items = Items(Reading())
    for data in ALIKE[pair]() * 2:
        assert said(items, data) == said(Items(Reading()), data)


@pytest.mark.parametrize("pair", ["other numbers", "another shape", "untyped"])
def test_an_item_with_any_byte_changed_is_what_strict_reading_says_it_is(pair: str) -> None:
    first, second = ALIKE[pair]()
    items = Items(Reading())
    said(items, first)
    said(items, second)
    differs = 0
    for at in range(len(second)):
        for bit in (0x01, 0x80):
            broken = bytearray(second)
            broken[at] ^= bit
            strictly = said(Items(Reading()), bytes(broken))
            assert said(items, bytes(broken)) == strictly, at
            differs += type(strictly[0]) is type
    assert differs > len(second) // 4


def test_a_pickle_that_names_another_record_is_not_taken_for_known() -> None:
    sound = saved(torch.ones(3))
    items = Items(Reading())
    said(items, sound)
    other = sound.replace(b"archive/data/0", b"archive/data/1")
    assert said(items, other) == said(Items(Reading()), other)
