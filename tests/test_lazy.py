"""Tensors that are read when they are asked for, one at a time or some rows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.errors import ReadError, SelectionError
from ckptfix.lazy import LazyStateDict
from ckptfix.tree.document import Document, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path


def files(state: dict[str, torch.Tensor], folder: Path) -> list[Path]:
    paths = [folder / name for name in ("in.pt", "legacy.pt", "in.safetensors")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    contiguous = {key: value.contiguous().clone() for key, value in state.items()}
    safetensors.torch.save_file(contiguous, paths[2])
    return paths


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_each_tensor_is_what_loading_all_of_them_gives(checkpoint: Path) -> None:
    try:
        whole: Any = ckptfix.load_state_dict(checkpoint)
    except ckptfix.CkptfixError:
        pytest.skip("it has no state dict, or several")
    opened = ckptfix.open(checkpoint)
    state = opened.state_dict()
    assert [*state, *state.others] == sorted(whole, key=[*state, *state.others].index)
    for key, lazy in state.items():
        assert unlike(lazy.load().detach(), whole[key].detach()) is None
        assert unlike(opened.tensor(key).detach(), whole[key].detach()) is None
        assert (lazy.shape, lazy.nbytes) == (tuple(whole[key].shape), whole[key].nbytes)
        assert f"torch.{lazy.dtype}" == str(whole[key].dtype)
        if lazy.shape and lazy.shape[0]:
            assert (
                unlike(lazy[: len(lazy) // 2].detach(), whole[key][: len(lazy) // 2].detach())
                is None
            )
            assert unlike(lazy[-1].detach(), whole[key][-1].detach()) is None


INDICES: list[Any] = [
    0, -1, 4, slice(None), slice(1, 3), slice(-2, None), slice(None, None, 2), slice(3, 1),
    slice(0, 100), (slice(1, 4), 0), (2, slice(1, None)), (slice(1, 4), slice(None), None),
    Ellipsis, None, [0, 2], (Ellipsis, 1), torch.tensor([True, False, True, False, True]), True,
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "part", "expanded"])
def test_an_index_means_what_it_means_in_torch(index: Any, layout: str, tmp_path: Path) -> None:
    made = {
        "plain": torch.arange(15.0).view(5, 3),
        "transposed": torch.arange(15.0).view(3, 5).t(),
        "part": torch.arange(60.0).view(10, 6)[2:7, 1:4],
        "expanded": torch.arange(5.0)[:, None].expand(5, 3),
    }[layout]
    for path in files({"w": made, "b": torch.ones(3)}, tmp_path):
        found = ckptfix.open(path).state_dict()["w"][index]
        assert torch.equal(found, made[index])


@pytest.mark.parametrize("index", [5, -6, slice(None, None, -1), (0, 3), slice(None, None, 0)])
def test_an_index_that_torch_refuses_is_refused(index: Any, tmp_path: Path) -> None:
    whole = torch.ones(5, 3)
    torch.save({"w": whole}, tmp_path / "in.pt")
    with pytest.raises((IndexError, ValueError)):
        _ = whole[index]
    with pytest.raises((IndexError, ValueError)):
        _ = ckptfix.open(tmp_path / "in.pt").state_dict()["w"][index]


def test_rows_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(4096, 256), "b": torch.ones(9)}, tmp_path / "in.pt")
    state = ckptfix.open(tmp_path / "in.pt").state_dict()
    read, really = [], os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        read.append(sum(map(len, buffers)))
        return really(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    assert torch.equal(state["w"][8:12], torch.zeros(4, 256))
    assert sum(read) == 4 * 256 * 4
    assert torch.equal(state["b"].load(), torch.ones(9))
    assert sum(read) == 4 * 256 * 4 + 36


def test_big_endian_numbers_are_turned_round() -> None:
    numbers = torch.arange(6.0)
    data = numbers.numpy().astype(">f4").tobytes()
    storage = Storage(BY_NAME["float32"], 6, "cpu", (Span(BytesSource(data), 0, 24),))
    node = Tensor(storage, storage.dtype, (3, 2), (2, 1))
    state = LazyStateDict(Document({"w": node}, "memory", byteorder="big"))
    assert torch.equal(state["w"].load(), numbers.view(3, 2))
    assert torch.equal(state["w"][1:], numbers.view(3, 2)[1:])


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save({"w": torch.ones(3)}, path)
    opened = ckptfix.open(path)
    opened.tensor("w").zero_()
    assert opened.tensor("w").tolist() == [1, 1, 1]
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ReadError, match="changed while it was read"):
        opened.tensor("w")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(3), "epoch": 3}, tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")
    with pytest.raises(SelectionError, match=r"has no tensor 'layer\.wieght'") as raised:
        opened.tensor("layer.wieght")
    assert str(raised.value.hint) == "did you mean 'layer.weight'?"
    with pytest.raises(SelectionError, match="has no state dict at 'model'"):
        opened.state_dict("model")
    with pytest.raises(KeyError):
        _ = opened.state_dict()["epoch"]
    assert dict(opened.state_dict().others) == {"epoch": 3}
    assert opened.tensor("layer.weight", map_location="meta").is_meta


def test_they_print_as_a_line(tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.ones(2, 2) for n in range(50_000)}
    torch.save(state, tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")
    lazy = opened.state_dict()
    assert repr(lazy["3.weight"]) == "LazyTensor('3.weight', float32 [2, 2], 16 bytes)"
    assert repr(lazy).endswith("in.pt': 50,000 tensors, 781.2 KiB)")
    [found] = opened.state_dicts
    assert repr(found) == "StateDict('/', model: 50,000 tensors, 781.2 KiB)"
    assert len(repr(opened)) < 300
    assert len(repr(opened.document)) < 200
    torch.save({f"{n}.weight": torch.ones(2, 2) for n in range(100)}, tmp_path / "few.pt")
    assert len(repr(ckptfix.check(nn.Linear(2, 2), tmp_path / "few.pt"))) < 500
    for node in (found.mapping["3.weight"], found.mapping["3.weight"].storage):
        assert len(repr(node)) < 100
