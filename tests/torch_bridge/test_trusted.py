"""Tensors and objects of classes that a program has marked as safe, as torch has them."""

from __future__ import annotations

import enum
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import UnsupportedError
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Rounding(enum.Enum):
    DOWN = "down"


@dataclass(frozen=True)
class Packing:
    """How values lie, as packages of quantized tensors say it."""

    width: int
    rounding: Rounding


class Scaled(torch.Tensor):
    """Small integers times a scale, that pass for floating-point numbers."""

    whole: torch.Tensor
    scale: torch.Tensor
    packing: Packing

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor, packing: Packing) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor, packing: Packing) -> None:
        self.whole, self.scale, self.packing = whole, scale, packing

    def __tensor_flatten__(self) -> Any:
        return ["whole", "scale"], self.packing

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, packing: Packing, size: Any, stride: Any) -> Any:
        return cls(inner["whole"], inner["scale"], packing)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].whole, args[0].scale, args[0].packing)
        if func is torch.ops.aten.clone.default:
            return cls(args[0].whole.clone(), args[0].scale.clone(), args[0].packing)
        if func is torch.ops.aten.copy_.default:
            args[0].whole.copy_(args[1].whole)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(func)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def scaled() -> Scaled:
    whole = torch.arange(6, dtype=torch.int8).view(2, 3)
    return Scaled(whole, torch.tensor(0.5), Packing(8, Rounding.DOWN))


@contextmanager
def marked() -> Iterator[None]:
    with torch.serialization.safe_globals([Scaled, Packing, Rounding]):
        yield


def saved(path: Path) -> Path:
    torch.save(
        {"weight": nn.Parameter(scaled(), False), "bias": torch.ones(2), "w": scaled()}, path
    )
    return path


def test_what_is_marked_becomes_what_torch_makes_of_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt")
    with marked():
        ours: Any = ckptfix.load(path)
        theirs: Any = torch.load(path, weights_only=True)
        state: Any = ckptfix.load_state_dict(path)
    for found in (ours, state):
        for key in ("weight", "w"):
            assert type(found[key]) is type(theirs[key]) is Scaled
            assert found[key].shape == theirs[key].shape
            assert found[key].packing == theirs[key].packing == Packing(8, Rounding.DOWN)
            for part in ("whole", "scale"):
                assert unlike(getattr(found[key], part), getattr(theirs[key], part)) is None
        assert isinstance(found["weight"], nn.Parameter) == isinstance(
            theirs["weight"], nn.Parameter
        )


def test_a_model_on_meta_takes_it(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, device="meta")
    model.weight = nn.Parameter(scaled(), requires_grad=False)
    path = saved(tmp_path / "in.pt")
    with marked():
        report = ckptfix.load_into(model, path)
    assert report.assigned == 1
    weight: Any = model.weight
    assert type(weight) is Scaled
    assert torch.equal(weight.whole, scaled().whole)


@pytest.mark.parametrize("some", [[], [Scaled], [Scaled, Packing]])
def test_what_is_not_marked_or_holds_what_is_not_is_refused_by_name(
    some: list[Any], tmp_path: Path
) -> None:
    path = saved(tmp_path / "in.pt")
    with torch.serialization.safe_globals(some):
        for load in (ckptfix.load_state_dict, lambda path: torch.load(path, weights_only=True)):
            with pytest.raises((UnsupportedError, pickle.UnpicklingError), match=r"weight|Weights"):
                load(path)
    assert isinstance(ckptfix.load(path)["weight"], ckptfix.Inert)


class Picky:
    """An object that takes only some states."""

    def __setstate__(self, state: Any) -> None:
        if "lr" not in state:
            raise ValueError("no lr in it")
        self.lr = state["lr"]


@pytest.mark.parametrize("good", [True, False])
def test_an_object_is_given_its_state_or_refused(good: bool, tmp_path: Path) -> None:
    value = Picky()
    value.__dict__.update({"lr": 0.1} if good else {"rate": 1})
    torch.save({"it": value}, tmp_path / "in.pt")
    with torch.serialization.safe_globals([Picky]):
        if good:
            assert ckptfix.load(tmp_path / "in.pt")["it"].lr == 0.1
        else:
            with pytest.raises(UnsupportedError, match=r"Picky, .* does not take its state: no lr"):
                ckptfix.load(tmp_path / "in.pt")
