"""Compacting: storages cut to what tensors use, with nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptfix
from ckptfix.diagnose.document import wasted
from ckptfix.edit.compacting import compact
from ckptfix.errors import DamagedError
from tests.conftest import FIXTURES
from tests.oracles import bits, done, unlike

if TYPE_CHECKING:
    from pathlib import Path


def compacted(value: object, folder: Path) -> tuple[dict, int]:
    """What torch loads once a value was saved, compacted and saved; and the bytes of the file."""
    torch.save(value, folder / "in.pt")
    ckptfix.open(folder / "in.pt").compact().save(folder / "out.pt", force=True)
    return torch.load(folder / "out.pt"), (folder / "out.pt").stat().st_size


def test_a_view_no_longer_costs_its_whole_storage(tmp_path: Path) -> None:
    big = torch.arange(100_000.0)
    loaded, size = compacted({"w": big[50_000:50_010]}, tmp_path)
    assert loaded["w"].tolist() == big[50_000:50_010].tolist()
    assert size < 4000


def test_views_that_overlap_still_share_memory_and_those_apart_one_storage(tmp_path: Path) -> None:
    big = torch.arange(10_000.0)
    views = {"a": big[100:200], "b": big[150:300], "c": big[9000:9010], "tied": big[100:200]}
    loaded, size = compacted(views, tmp_path)
    assert unlike(dict(views), loaded) is None
    assert size < 4000
    loaded["a"][60] = -1.0
    assert loaded["b"][10] == loaded["tied"][60] == -1.0
    assert loaded["c"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()


def test_a_column_of_a_matrix_becomes_row_major(tmp_path: Path) -> None:
    one, other = torch.rand(1000, 1000), torch.rand(1000, 1000)
    loaded, size = compacted({"column": one[:, 3], "block": other[5:9, 2:4].t()}, tmp_path)
    assert torch.equal(loaded["column"], one[:, 3])
    assert torch.equal(loaded["block"], other[5:9, 2:4].t())
    assert size < 8000


@pytest.mark.parametrize("name", ["views.pt", "dtypes.pt", "legacy.pt", "whole_module.pt"])
def test_fixtures_hold_the_same_afterwards_and_waste_nothing(name: str, tmp_path: Path) -> None:
    ckptfix.open(FIXTURES / name).compact().save(tmp_path / "out.pt")
    assert ckptfix.diff(FIXTURES / name, tmp_path / "out.pt", read_data=True).same
    made = ckptfix.open(tmp_path / "out.pt").document
    assert compact(made)[1] == wasted(made) == 0


def test_what_is_tight_already_is_left_as_it_is(tmp_path: Path) -> None:
    document = ckptfix.open(FIXTURES / "dataparallel_cuda_training.pt").document
    assert compact(document) == (document, 0)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_the_storage_of_a_quantized_tensor_is_left_whole(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.arange(64.0), 0.5, 0, torch.qint8)
    loaded, _ = compacted({"q": quantized[:8], "w": torch.ones(3)}, tmp_path)
    assert torch.equal(loaded["q"].dequantize(), quantized[:8].dequantize())


def test_damage_outside_the_part_that_is_kept_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save({"w": torch.full((5000,), 3.0)[:10]}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x00\x00\x40\x40" * 10)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum"):
        ckptfix.open(path).compact().save(tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A strided view of 64 numbers, anywhere in them, maybe empty or expanded."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    stride = draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
    return torch.arange(64.0).as_strided(shape, stride, draw(st.integers(0, 15)))


@given(chosen=st.lists(views(), min_size=1, max_size=6), shared=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_views_keep_their_values(
    chosen: list[torch.Tensor], shared: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    big = torch.arange(64.0)
    if shared:
        chosen = [big.as_strided(v.shape, v.stride(), v.storage_offset()) for v in chosen]
    value = {f"w{index}": view for index, view in enumerate(chosen)}
    loaded, _ = compacted(value, tmp_path_factory.mktemp("views"))
    assert {key: bits(tensor) for key, tensor in loaded.items()} == {
        key: bits(tensor) for key, tensor in value.items()
    }
    assert [tuple(t.shape) for t in loaded.values()] == [tuple(v.shape) for v in chosen]


def test_the_command_that_inspect_names_removes_the_finding(tmp_path: Path) -> None:
    path = tmp_path / "bloated.pt"
    torch.save({"w": torch.arange(100_000.0)[:10]}, path)
    finding = next(f for f in ckptfix.open(path).findings if f.code == "view-bloat")
    assert finding.command is not None
    answer = done(*str(finding.command).split()[1:])
    assert "399.9 kB" in answer or "400.0 kB" in answer
    made = ckptfix.open(path.with_name("bloated.compact.pt"))
    assert not [f for f in made.findings if f.code == "view-bloat"]
