"""Pieces in files, joined, beside what torch makes of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfix.bytes.engine import crc32
from ckptfix.bytes.source import FileSource
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError, UnsafeError
from ckptfix.pieces.boxes import Box
from ckptfix.pieces.joining import Joiner, Piece
from ckptfix.torch_bridge.materialize import Materializer
from ckptfix.tree.document import Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME, DType
from tests.pieces.test_boxes import split

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = ("float32", "bool", "bfloat16", "int64", "float8_e5m2", "complex128")


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of which no two elements close to each other have the same bytes."""
    count = torch.Size(shape).numel()
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(count)
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count * size,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


class Files:
    """Pieces written to files, one file for all of some."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def put(self, tensor: torch.Tensor, before: int = 0) -> Tensor:
        """The description of a dense tensor, whose bytes are put into a file of its own."""
        self.number += 1
        path = self.folder / f"{os.urandom(4).hex()}.{self.number}"
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        flat = tensor.permute(order).contiguous().reshape(-1)
        path.write_bytes(b"#" * before + bytes(flat.view(torch.uint8).numpy()))
        dtype = known(tensor.dtype)
        span = Span(FileSource(path), before, tensor.nbytes)
        storage = Storage(
            dtype, tensor.numel(), "cpu", (span._replace(crc=crc32([span])),), path.name
        )
        return Tensor(storage, dtype, tuple(tensor.shape), tuple(tensor.stride()))

    def pieces(self, whole: torch.Tensor, boxes: list[Box]) -> list[Piece]:
        """Boxes of a tensor, each in a file; strides stay."""
        return [Piece(box.offset, self.put(dense(part(whole, box)))) for box in boxes]


def known(dtype: torch.dtype) -> DType:
    return BY_NAME[str(dtype).removeprefix("torch.")]


def part(whole: torch.Tensor, box: Box) -> torch.Tensor:
    for d, (begin, size) in enumerate(zip(*box, strict=True)):
        whole = whole.narrow(d, begin, size)
    return whole


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The same without gaps, its dimensions in the same order."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)


def content(tensor: Tensor) -> bytes:
    return b"".join(span.read() for span in tensor.storage.spans)


def checked(tensor: Tensor) -> bytes:
    """The bytes of a tensor, held against the checksums on record as writers do it."""
    data = content(tensor)
    pending = [span.source for span in tensor.storage.spans]
    while pending:
        source = pending.pop()
        pending.extend(source.below)
        source.check()
    return data


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tensor_in_pieces_is_the_tensor(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    name = data.draw(st.sampled_from(DTYPES))
    whole = numbered(shape, getattr(torch, name))
    order = data.draw(st.permutations(range(len(shape))))
    whole = dense(whole.permute(order))
    boxes = split(data.draw, tuple(whole.shape), data.draw(st.integers(0, 6)))
    pieces = Files(tmp_path).pieces(whole, boxes)
    joined = Joiner().join("key", BY_NAME[name], tuple(whole.shape), pieces)
    assert checked(joined) == content(joined)
    assert joined.storage.nbytes == sum(span.length for span in joined.storage.spans)
    assert bits(Materializer().tensor(joined)) == bits(whole)
    if len(joined.storage.spans) == 1 and joined.storage.nbytes:
        source, offset, length, _ = joined.storage.spans[0]
        begin = data.draw(st.integers(0, length))
        end = data.draw(st.integers(begin, length))
        wanted = joined.storage.spans[0].read()[begin:end]
        assert source.read(offset + begin, end - begin) == wanted


def columns(width: int, number: int, rows: int) -> list[Box]:
    return [Box((0, at * width), (rows, width)) for at in range(number)]


@pytest.mark.parametrize("width", [1, 3, 64, 100, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_columns_are_read_whatever_their_width(
    tmp_path: Path, width: int, dtype: torch.dtype
) -> None:
    rows = 3000
    whole = numbered((rows, 5 * width), dtype)
    pieces = Files(tmp_path).pieces(whole, columns(width, 5, rows))
    joined = Joiner().join("key", known(dtype), tuple(whole.shape), pieces)
    (span,) = joined.storage.spans
    assert b"".join(span.chunks(99_991)) == bits(whole)
    assert b"".join(span.chunks()) == bits(whole)


def test_rows_stay_spans_of_their_files(tmp_path: Path) -> None:
    whole = numbered((7, 3), torch.float32)
    boxes = [Box((4, 0), (3, 3)), Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((7, 0), (0, 3))]
    pieces = Files(tmp_path).pieces(whole, boxes)
    joined = Joiner().join("key", BY_NAME["float32"], (7, 3), pieces)
    assert [type(span.source) for span in joined.storage.spans] == [FileSource] * 3
    assert [span.crc for span in joined.storage.spans] == [
        pieces[number].tensor.storage.spans[0].crc for number in (1, 2, 0)
    ]
    assert content(joined) == bits(whole)


def test_pieces_in_the_order_of_channels_last_stay_in_it(tmp_path: Path) -> None:
    whole = numbered((6, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last)
    boxes = [Box((0, 0, 0, 0), (4, 3, 4, 5)), Box((4, 0, 0, 0), (2, 3, 4, 5))]
    joined = Joiner().join(
        "key", BY_NAME["float32"], tuple(whole.shape), Files(tmp_path).pieces(whole, boxes)
    )
    assert joined.stride == whole.stride()
    assert [type(span.source) for span in joined.storage.spans] == [FileSource] * 2


@pytest.mark.parametrize("box", [(2, 8), (8, 2)])
def test_a_piece_that_is_damaged_is_an_error(tmp_path: Path, box: tuple[int, int]) -> None:
    whole = numbered((8, 8), torch.float32)
    step = (2, 0) if box[0] == 2 else (0, 2)
    boxes = [Box((step[0] * i, step[1] * i), box) for i in range(4)]
    pieces = Files(tmp_path).pieces(whole, boxes)
    victim = tmp_path / pieces[2].tensor.storage.key
    data = bytearray(victim.read_bytes())
    data[5] ^= 1
    victim.write_bytes(data)
    joined = Joiner().join("key", BY_NAME["float32"], (8, 8), pieces)
    if box[0] == 2:  # a copy of whole spans keeps their checksums
        assert all(span.crc is not None for span in joined.storage.spans)
        return
    with pytest.raises(DamagedError, match="checksum") as caught:
        checked(joined)
    assert caught.value.code == "crc-mismatch"


def test_a_view_of_a_storage_is_checked_as_a_whole(tmp_path: Path) -> None:
    flat = Files(tmp_path).put(numbered((20,), torch.float32))
    pieces: list[Piece] = []
    for at in (0, 3):
        view: Any = Tensor(flat.storage, flat.dtype, (3,), (1,), offset=10 + at)
        pieces.append(Piece((at,), view))
    path = tmp_path / flat.storage.key
    joined = Joiner().join("key", flat.dtype, (6,), pieces)
    assert checked(joined) == path.read_bytes()[40:64]
    path.write_bytes(b"#" + path.read_bytes()[1:])
    with pytest.raises(DamagedError, match="checksum"):
        checked(Joiner().join("key", flat.dtype, (6,), pieces))


def test_pieces_of_another_dtype_are_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    pieces = [
        Piece((0,), files.put(numbered((2,), torch.float32))),
        Piece((2,), files.put(numbered((2,), torch.int32))),
    ]
    with pytest.raises(UnsafeError, match="int32, not float32"):
        Joiner().join("key", BY_NAME["float32"], (4,), pieces)
