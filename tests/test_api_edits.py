"""What `Checkpoint` is edited by: keys dropped, kept, set, merged, renamed; optimizers go along."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import RenameError, SelectionError, UnsupportedError
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 4))


def trained(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A training checkpoint of a model that has made a step."""
    model = net() if model is None else model
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, path)
    return model, optimizer


def written(checkpoint: ckptfix.Checkpoint, path: Path) -> Any:
    assert checkpoint.save(path) == []
    return torch.load(path)


def test_an_optimizer_goes_with_the_parameters_that_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")
    for number, edited in enumerate((opened.drop("2.*"), opened.keep("0.*", "1.*"))):
        found = written(edited, tmp_path / f"{number}.pt")
        assert list(found["model"]) == [key for key in model.state_dict() if key[0] != "2"]
        smaller = nn.Sequential(*list(model)[:2])  # type: ignore[call-overload]
        of_smaller = torch.optim.Adam(smaller.parameters())
        of_smaller.load_state_dict(found["optimizer"])
        for parameter in smaller.parameters():
            wanted = optimizer.state[parameter]["exp_avg"]
            assert torch.equal(of_smaller.state[parameter]["exp_avg"], wanted)
    assert len(opened.state_dict("model")) == len(model.state_dict())


def test_an_optimizer_of_which_it_cannot_be_told_is_left_out_by_name(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": [parameter]} for parameter in model.parameters()], 0.1, momentum=0.9
    )
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "in.pt")
    with pytest.warns(UserWarning, match="left out optimizer: it cannot be told"):
        edited = ckptfix.open(tmp_path / "in.pt").drop("0.*")
    assert list(written(edited, tmp_path / "out.pt")) == ["model", "epoch"]


def test_another_value_of_the_same_shape_keeps_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path / "in.pt")
    bias = torch.tensor([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = ckptfix.open(tmp_path / "in.pt").set("0.bias", bias, select="model")
    found = written(edited, tmp_path / "out.pt")
    assert unlike(found["optimizer"], optimizer.state_dict()) is None
    assert list(found["model"]) == list(model.state_dict())
    assert found["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert torch.equal(found["model"]["0.bias"], bias)


@pytest.mark.parametrize(("key", "value"), [("3.weight", torch.ones(2)), ("0.bias", torch.ones(9))])
def test_a_tensor_that_is_new_or_of_another_shape_leaves_the_optimizer_out(
    key: str, value: torch.Tensor, tmp_path: Path
) -> None:
    trained(tmp_path / "in.pt")
    with pytest.warns(UserWarning, match="left out optimizer"):
        edited = ckptfix.open(tmp_path / "in.pt").set(key, value)
    found = written(edited, tmp_path / "out.pt")
    assert list(found) == ["model", "epoch"]
    assert torch.equal(found["model"][key], value)


def test_what_is_merged_has_the_keys_of_both_and_the_versions_of_their_modules(
    tmp_path: Path,
) -> None:
    body, head = nn.Sequential(nn.Linear(3, 2)).state_dict(), nn.BatchNorm1d(2)
    torch.save(body, tmp_path / "body.pt")
    torch.save(
        {f"1.{key}": value for key, value in head.state_dict().items()}, tmp_path / "bare.pt"
    )
    both = nn.Sequential(nn.Linear(3, 2), head)
    whole = both.state_dict()
    for key in ("0.weight", "0.bias"):
        del whole[key]
    torch.save(whole, tmp_path / "head.pt")
    opened = ckptfix.open(tmp_path / "body.pt")
    ways: list[Any] = [
        tmp_path / "head.pt", str(tmp_path / "bare.pt"), ckptfix.open(tmp_path / "head.pt"),
        dict(whole), ckptfix.open(tmp_path / "head.pt").state_dict(),
    ]  # fmt: skip
    for number, other in enumerate(ways):
        found = written(opened.merge(other), tmp_path / f"{number}.pt")
        assert unlike(dict(found), {**body, **whole}) is None
    merged = written(opened.merge(tmp_path / "head.pt"), tmp_path / "last.pt")
    assert merged._metadata["1"] == {"version": 2}


def test_a_key_that_both_have_is_refused_unless_the_other_counts(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")
    with pytest.raises(RenameError, match="both have a key 'a'") as raised:
        opened.merge({"a": torch.zeros(2)})
    assert raised.value.__notes__ == ["hint: let the other one count: pass replace=True"]
    assert opened.merge({"a": torch.zeros(2)}, replace=True).tensor("a").tolist() == [0, 0]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "in.pt")
    with pytest.raises(UnsupportedError, match="cannot be written"):
        ckptfix.open(tmp_path / "in.pt").set("a", nn.Linear(2, 2))


def test_keys_are_renamed_by_a_mapping_too(tmp_path: Path) -> None:
    trained(tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")
    edited = opened.rename({"0.weight": "first.weight", "0.bias": "first.bias"})
    assert list(edited.state_dict("model"))[:3] == ["first.weight", "first.bias", "1.weight"]
    assert [state.role for state in edited.state_dicts] == ["model", "optimizer"]
    with pytest.raises(SelectionError, match="has no key 'none'"):
        opened.rename({"none": "some"})
    with pytest.raises(RenameError, match=r"'0\.bias' and '2\.bias' would both become"):
        opened.rename({"0.bias": "2.bias"})
    with pytest.raises(RenameError, match="wants a replacement"):
        opened.rename("^0")


def test_limits_hold_for_what_is_saved(tmp_path: Path) -> None:
    wide = torch.ones(1, 1).expand(1000, 1000)
    torch.save({"w": wide, "b": torch.ones(1)}, tmp_path / "in.pt")
    few = ckptfix.Limits(repeated_bytes=1000)
    with pytest.raises(ckptfix.CkptfixError, match="repeats its elements"):
        ckptfix.open(tmp_path / "in.pt", limits=few).save(tmp_path / "out.safetensors")
    assert ckptfix.open(tmp_path / "in.pt").save(tmp_path / "out.safetensors") == []


@pytest.mark.parametrize("in_place", [False, True])
def test_what_limits_admit_is_admitted_when_it_is_read_back(in_place: bool, tmp_path: Path) -> None:
    class Odd:
        """An object whose class has a very long name."""

    Odd.__qualname__ = Odd.__name__ = "O" * 1500
    globals()[Odd.__name__] = Odd
    torch.save(
        {"module.w": torch.ones(1), "module.b": torch.ones(1), "o": Odd()}, tmp_path / "in.pt"
    )
    with pytest.raises(ckptfix.CkptfixError):
        ckptfix.open(tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt", limits=ckptfix.Limits(name_characters=2000))
    edited = opened.rename("^module.", "")
    if in_place:
        edited.save_in_place()
    else:
        edited.save(tmp_path / "out.pt")
