"""Strided elements in row-major order, with numpy and torch as oracles."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfix.bytes import strided
from ckptfix.bytes.source import BytesSource, FileSource, Source
from ckptfix.bytes.span import Span
from ckptfix.bytes.strided import Layout, StridedSource
from ckptfix.errors import DamagedError
from tests.helpers import Computed
from tests.oracles import bits

if TYPE_CHECKING:
    from pathlib import Path

FLAT = torch.arange(5000, dtype=torch.int32)
BYTES = bits(FLAT)


def over(source: Source, tensor: torch.Tensor, *cuts: int, lead: int = 0) -> StridedSource:
    """A view of FLAT, whose bytes lie in `source` from `lead` on, in spans that begin at cuts."""
    edges = [0, *cuts, len(BYTES)]
    spans = [Span(source, lead + a, b - a) for a, b in pairwise(edges)]
    offset = int(tensor.storage_offset())
    layout = Layout(tuple(tensor.shape), tensor.stride(), offset, 4, 4)
    return StridedSource(spans, layout, "w")


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    stride = [draw(st.integers(0, 40)) for _ in shape]
    offset = draw(st.integers(0, 100))
    return FLAT.as_strided(shape, stride, offset)


@settings(max_examples=200)
@given(views(), st.data(), st.sampled_from([0, 1 << 16]))
def test_any_stretch_of_any_view_is_that_of_torch(
    view: torch.Tensor, data: st.DataObject, near: int
) -> None:
    strided._NEAR = near
    meant = bits(view.clone())
    source = over(BytesSource(BYTES), view, *data.draw(st.sampled_from([(), (400,), (8, 1000)])))
    assert source.size == len(meant)
    for _ in range(3):
        begin = data.draw(st.integers(0, len(meant)))
        length = data.draw(st.integers(0, len(meant) - begin))
        assert source.read(begin, length) == meant[begin : begin + length]
    assert source.read(0, source.size) == meant


@pytest.mark.parametrize("where", ["file", "memory", "two files"])
def test_what_is_too_large_to_be_held_is_mapped(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "HELD", 100)
    monkeypatch.setattr(strided, "_NEAR", 0)
    (tmp_path / "a").write_bytes(b"x" * 77 + BYTES)
    source = FileSource(tmp_path / "a") if where != "memory" else BytesSource(b"x" * 77 + BYTES)
    view = FLAT[:4900].view(70, 70).t()
    made = over(source, view, *((4000,) if where == "two files" else ()), lead=77)
    assert made.read(0, made.size) == bits(view.clone())
    assert made.read(1001, 77) == bits(view.clone())[1001:1078]


def test_a_file_cut_short_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "_NEAR", 0)
    for held in (1 << 20, 100):
        monkeypatch.setattr(strided, "HELD", held)
        (tmp_path / "a").write_bytes(BYTES)
        made = over(FileSource(tmp_path / "a"), FLAT.view(50, 100).t())
        os.truncate(tmp_path / "a", 100)
        with pytest.raises(DamagedError, match="ends before"):
            made.read(0, made.size)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugates_and_negatives_are_those_of_torch(dtype: torch.dtype) -> None:
    value = torch.randn(6, 5, dtype=dtype)
    size = value.element_size()
    source = BytesSource(bits(value))
    for conj in (False, True):
        for neg in (False, True):
            layout = Layout((5, 6), (1, 5), 0, size, size // 2, conj=conj, neg=neg)
            made = StridedSource([Span(source, 0, source.size)], layout, "w").read(0, source.size)
            meant = value.t().conj() if conj else value.t()
            meant = -meant if neg else meant
            found = np.frombuffer(made, meant.resolve_conj().numpy().dtype).reshape(5, 6)
            assert torch.equal(torch.from_numpy(found.copy()), meant.resolve_conj())


def test_numbers_are_turned_round() -> None:
    big = np.arange(10, dtype=">u4")
    source = BytesSource(big.tobytes())
    layout = Layout((5, 2), (1, 5), 0, 4, 4, swap=True)
    made = StridedSource([Span(source, 0, 40)], layout, "w")
    assert made.read(0, 40) == big.astype("<u4").reshape(2, 5).T.tobytes()


def test_nothing_is_held_once_all_was_given_in_whatever_order() -> None:
    view = FLAT[:4900].view(70, 70).t()
    made = over(BytesSource(BYTES), view)
    strided._NEAR = 0
    try:
        for start in (9800, 0, 4900, 14_700):
            assert made._given == 0 or made._array is not None
            assert made.read(start, 4900) == bits(view.clone())[start : start + 4900]
    finally:
        strided._NEAR = 1 << 16
    assert made._array is None


def test_rows_with_gaps_are_read_a_few_at_a_time() -> None:
    wide = torch.arange(4_000_000, dtype=torch.int32).view(1000, 4000)
    source = Computed(bits(wide))
    view = wide[:, :3900]
    spans = [Span(source, 0, source.size)]
    made = StridedSource(spans, Layout((1000, 3900), (4000, 1), 0, 4, 4), "w")
    meant = bits(view.contiguous())
    assert made.read(15_600 * 500, 31_200) == meant[15_600 * 500 :][:31_200]
    assert sum(length for _, length in source.made) < 50_000
