"""What a program holds, written by ckptfix and read by torch."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import UnsupportedError
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path


def through(value: Any, tmp_path: Path) -> Any:
    ckptfix.save(value, tmp_path / "out.pt")
    return torch.load(tmp_path / "out.pt", weights_only=False)


@pytest.mark.parametrize(
    "value",
    [
        3,
        [1, 2.5, None, True, "text", b"bytes", bytearray(b"more"), (1, (2,))],
        {"a": {"b": {}}, 3: [], (1, 2): "tuple key"},
        OrderedDict(a=1, b=OrderedDict()),
        {"set": {1}, "frozen": frozenset("a"), "complex": 1 - 2j},
        {"device": torch.device("cuda:3"), "cpu": torch.device("cpu"), "dtype": torch.bfloat16},
        {"size": torch.Size([2, 3])},
        {"inf": float("inf"), "big": 2**200, "negative": -(2**63)},
        torch.arange(6).reshape(2, 3).t(),
        {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)},
        {"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag},
        {"parameter": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(1), False)},
        nn.BatchNorm1d(3).state_dict(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_torch_reads_back_what_was_saved(value: Any, tmp_path: Path):
    assert unlike(through(value, tmp_path), value) is None


def test_metadata_and_requires_grad_are_kept(tmp_path: Path):
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict(keep_vars=True)
    loaded = through(state, tmp_path)
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]
    assert loaded["0.weight"].requires_grad
    assert type(loaded["0.weight"]) is nn.Parameter


def test_tensors_that_share_memory_share_it_again(tmp_path: Path):
    whole = torch.rand(10)
    loaded = through({"a": whole[:6], "b": whole[4:], "c": whole}, tmp_path)
    loaded["a"][4] = 42
    assert loaded["b"][0] == 42
    assert loaded["c"][4] == 42


def test_storages_of_several_sizes_at_one_address_are_told_apart(tmp_path: Path):
    memory = bytearray(range(16))
    short = torch.frombuffer(memory, dtype=torch.uint8, count=4)
    long = torch.frombuffer(memory, dtype=torch.uint8, count=16)
    assert unlike(through([short, long], tmp_path), [short, long]) is None


def test_a_storage_that_does_not_fill_the_elements_of_its_dtype_is_cut(tmp_path: Path):
    odd = torch.arange(6, dtype=torch.uint8)[:4].view(torch.int32)
    assert unlike(through(odd, tmp_path), odd) is None


def test_one_storage_seen_as_two_dtypes(tmp_path: Path):
    floats = torch.rand(4)
    value = {"floats": floats, "bits": floats.view(torch.int32)}
    assert unlike(through(value, tmp_path), value) is None


def test_a_list_that_holds_itself(tmp_path: Path):
    value: list[Any] = [1]
    value.append(value)
    loaded = through(value, tmp_path)
    assert loaded[1] is loaded


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        nn.Linear(2, 2),
        Point(1, 2),
        object(),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        {"deep": [{"er": object()}]},
        torch.nn.functional.relu,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_torch_save_can_write_is_refused_and_nothing_written(value: Any, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="cannot be written") as raised:
        ckptfix.save(value, tmp_path / "out.pt")
    assert raised.value.hint is not None
    assert "torch.save" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_what_was_loaded_can_be_saved_over_itself(tmp_path: Path):
    path = tmp_path / "out.pt"
    value = {"w": torch.rand(1000), "epoch": 3}
    torch.save(value, path)
    loaded = ckptfix.load(path)
    loaded["w"][0] = 42
    value["w"][0] = 42  # type: ignore[index]
    ckptfix.save(loaded, path, force=True)
    assert unlike(torch.load(path), value) is None
