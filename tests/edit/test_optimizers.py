"""An optimizer that `fix --keep-training-state` keeps goes with its parameters, or is left out.

The oracle is torch: what comes out is loaded into a new optimizer of the model, and each parameter
has the moments that it had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix import door
from ckptfix.match import target as targets
from ckptfix.repair.plan import Plan, plan
from tests.oracles import ckptfix_command

if TYPE_CHECKING:
    from pathlib import Path

State = dict[str, Any]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Body(nn.Module):
    """Two layers of one shape, and a norm with buffers."""

    def __init__(self, *layers: str) -> None:
        super().__init__()
        makers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}
        for name in layers or ("a", "b", "norm"):
            self.add_module(name, makers.get(name, nn.Linear(3, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A step; returns what the optimizer keeps for each parameter, by name."""
    model(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    return moments(model, optimizer)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for row in ("exp_avg", "momentum_buffer", "square_avg"):
            if row in optimizer.state.get(parameter, {}):
                found[name] = optimizer.state[parameter][row]
    return found


def repaired(wanted: nn.Module, **options: Any) -> tuple[Plan, Any]:
    made = plan(door.read("in.pt"), targets.of_module(wanted), keep_training_state=True, **options)
    door.write(made.document, "out.pt")
    return made, torch.load("out.pt", weights_only=False)


MAKERS = {
    "Adam": lambda rows: torch.optim.Adam(rows, 0.1),
    "SGD": lambda rows: torch.optim.SGD(rows, 0.1, momentum=0.9),
    "RMSprop": lambda rows: torch.optim.RMSprop(rows, 0.1),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("named", "had", "wants"),
    [
        (True, ("a", "b", "norm"), ("a", "norm")),
        (True, ("a", "b", "norm"), ("b",)),
        (True, ("a", "b", "norm"), ("norm", "b", "a")),
        (True, ("norm", "a", "head"), ("a", "norm")),
        (False, ("a", "b", "head"), ("a", "b")),
        (False, ("norm", "a", "head"), ("norm", "a")),
        (False, ("a", "head"), ("head",)),
        (False, ("a", "head"), ("head", "a")),
    ],
)
def test_it_keeps_the_state_of_the_parameters_that_stay(
    name: str, named: bool, had: tuple[str, ...], wants: tuple[str, ...]
) -> None:
    model, wanted = Body(*had), Body(*wants)
    rows: Any = model.named_parameters() if named else model.parameters()
    optimizer = MAKERS[name](rows)
    before = trained(model, optimizer)
    value = (
        {"module." + key: it for key, it in model.state_dict().items()}
        if not named
        else model.state_dict()
    )
    torch.save({"model": value, "optimizer": optimizer.state_dict(), "epoch": 3}, "in.pt")
    made, out = repaired(wanted)
    assert out["epoch"] == 3
    wanted.load_state_dict(out["model"], strict=True)
    after = MAKERS[name](wanted.parameters())
    after.load_state_dict(out["optimizer"])
    kept = moments(wanted, after)
    assert kept.keys() == {key for key in before if key.split(".")[0] in wants}
    assert all(value.equal(before[key]) for key, value in kept.items())
    assert "optimizer-state" in {row.code for row in made.cures}


def groups_of(model: nn.Module) -> torch.optim.Optimizer:
    weights: Any = [it for name, it in model.named_parameters() if name.endswith("weight")]
    others: Any = [it for name, it in model.named_parameters() if not name.endswith("weight")]
    return torch.optim.Adam([{"params": weights, "weight_decay": 0.1}, {"params": others}], 0.1)


def turned(model: nn.Module) -> torch.optim.Optimizer:
    layers: Any = list(model.children())[::-1]
    return torch.optim.Adam([it for layer in layers for it in layer.parameters()], 0.1)


def usual(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.1)


def of_the_first(model: nn.Module) -> torch.optim.Optimizer:
    first: Any = list(model.children())[:2]
    return torch.optim.Adam([it for layer in first for it in layer.parameters()], 0.1)


@pytest.mark.parametrize("make", [usual, turned, of_the_first])
@pytest.mark.parametrize("wants", [("b", "c"), ("c", "b", "a"), ("a", "c")])
def test_layers_of_one_shape_are_not_told_apart_by_an_order_that_nobody_wrote(
    make: Any, wants: tuple[str, ...]
) -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    optimizer = make(model)
    sum(layer(torch.rand(4, 3)).square().sum() for layer in model.values()).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "in.pt")
    made, out = repaired(nn.ModuleDict({name: nn.Linear(3, 3) for name in wants}))
    assert "optimizer" not in out
    row = next(row for row in made.cures if row.code == "optimizer-state")
    assert "which parameter" in row.found
    assert row.cure == "left out"


def test_an_optimizer_that_keeps_nothing_is_cut_to_size() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "in.pt")
    wanted = nn.ModuleDict({name: nn.Linear(3, 3) for name in "ab"})
    _, out = repaired(wanted)
    torch.optim.SGD(wanted.parameters(), 0.1).load_state_dict(out["optimizer"])


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    next(model.parameters()).requires_grad_(False)
    return torch.optim.Adam([it for it in model.parameters() if it.requires_grad], 0.1)


def backwards(model: nn.Module) -> torch.optim.Optimizer:
    rows: Any = list(model.parameters())
    rows.reverse()
    return torch.optim.Adam(rows, 0.1)


@pytest.mark.parametrize("make", [groups_of, frozen, backwards])
def test_it_is_left_out_by_name_where_nobody_can_tell(make: Any) -> None:
    model = Body("a", "norm", "head")
    optimizer = make(model)
    trained(model, optimizer)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "in.pt"
    )
    made, out = repaired(Body("a", "norm"))
    assert "optimizer" not in out
    assert out["epoch"] == 3
    assert ("optimizer", "the state of an optimizer") in made.left_out


def test_it_stays_as_it_is_where_every_parameter_stays() -> None:
    model = Body()
    optimizer = groups_of(model)
    trained(model, optimizer)
    state = {f"module.{key}": it for key, it in model.state_dict().items()} | {
        "step": torch.ones(1)
    }
    torch.save({"model": state, "optimizers": [optimizer.state_dict()]}, "in.pt")
    made, out = repaired(Body())
    assert made.dropped == ["step"]
    assert len(out["optimizers"][0]["state"]) == len(list(model.parameters()))
    assert made.left_out == []


def test_averages_have_no_optimizer() -> None:
    model = Body("a", "head")
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    trained(model, optimizer)
    both = {"model": model.state_dict(), "model_ema": Body("a", "head").state_dict()}
    torch.save({**both, "optimizer": optimizer.state_dict()}, "in.pt")
    _, out = repaired(Body("a"))
    assert len(out["optimizer"]["state"]) == 2


def test_of_two_models_the_optimizer_of_the_other_one_stays() -> None:
    one, two = Body("a", "norm", "head"), Body("norm", "head")
    optimizers = [torch.optim.Adam(model.parameters(), 0.1) for model in (one, two)]
    for model, optimizer in zip((one, two), optimizers, strict=True):
        trained(model, optimizer)
    states = {"G": one.state_dict(), "D": two.state_dict()}
    kept = {f"optimizer_{name}": it.state_dict() for name, it in zip("GD", optimizers, strict=True)}
    torch.save({**states, **kept}, "in.pt")
    made, out = repaired(Body("a", "norm"), select="G")
    assert len(out["optimizer_G"]["state"]) == 4
    assert len(out["optimizer_D"]["state"]) == 4
    assert [row.where for row in made.cures if row.code == "optimizer-state"] == ["optimizer_G"]


def test_one_that_is_keyed_by_name_follows_the_names() -> None:
    model = Body("a", "b")
    names = [f"module.{name}" for name, _ in model.named_parameters()]
    optimizer = {
        "state": {
            name: {"step": 1, "exp_avg": torch.full((1,), float(at))}
            for at, name in enumerate(names)
        },
        "param_groups": [{"lr": 0.1, "params": names}],
    }
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer}, "in.pt")
    _, out = repaired(Body("b"))
    assert out["optimizer"]["param_groups"][0]["params"] == ["b.weight", "b.bias"]
    assert [row["exp_avg"].item() for row in out["optimizer"]["state"].values()] == [2, 3]


def test_drop_without_a_model_takes_its_state_along() -> None:
    model = Body("a", "head")
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    before = trained(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "in.pt")
    assert ckptfix_command("fix", "in.pt", "out.pt", "--drop", "a.*").returncode == 0
    out = torch.load("out.pt")
    wanted = Body("head")
    wanted.load_state_dict(out["model"])
    after = torch.optim.Adam(wanted.parameters(), 0.1)
    after.load_state_dict(out["optimizer"])
    assert moments(wanted, after)["head.weight"].equal(before["head.weight"])


def test_values_are_never_mixed_up_in_silence() -> None:
    """An optimizer whose moments have other shapes than the parameters is of another model."""
    model = Body("a", "b")
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    optimizer = torch.optim.Adam(other.parameters(), 0.1)
    trained(other, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "in.pt")
    made, out = repaired(Body("a"))
    assert "optimizer" not in out
    assert ckptfix.open("out.pt").findings == []
    assert [path for path, _ in made.left_out] == ["optimizer"]
