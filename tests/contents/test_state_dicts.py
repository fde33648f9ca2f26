"""Which mappings are state dicts, what each is for, and which is meant."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptfix
from ckptfix import door
from ckptfix.contents.state_dicts import choose, choose_all, find, is_optimizer
from ckptfix.errors import SelectionError
from ckptfix.torch_bridge.describe import describe
from ckptfix.tree.document import Document
from tests.conftest import FIXTURES

if TYPE_CHECKING:
    from pathlib import Path

T = torch.ones(2)
NET = {"fc.weight": T, "fc.bias": T}
OTHER = {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}


def document(value: Any) -> Document:
    return Document(describe(value), "memory", "in.pt")


def found(value: Any) -> list[tuple[str, str]]:
    return [(state.path, state.role) for state in find(describe(value))]


def trained() -> dict[str, Any]:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NET, [("/", "model")]),
        ({"model": NET, "epoch": 3}, [("model", "model")]),
        ({"trainer": {"models": {"student": NET}}}, [("trainer/models/student", "model")]),
        ([{"state": [NET]}], [("0/state/0", "model")]),
        ({"model": NET, "rng_state": T}, [("model", "model")]),
        ({"model": NET, "rng_state": T, "cuda_rng": T}, [("model", "model")]),
        ({**NET, "more": NET}, [("/", "model")]),
        ({"state_dict": NET, "state_dict_ema": dict(NET)},
         [("state_dict", "model"), ("state_dict_ema", "ema")]),
        ({"ema": NET}, [("ema", "ema")]),
        ({"module.w": T, "n_averaged": torch.tensor(1)}, [("/", "swa")]),
        ({"w": T, "n_averaged": torch.tensor(1)}, [("/", "model")]),
        ({"w": T, "a": 1, "w_extra_state": 3, "b_extra_state": 4}, [("/", "model")]),
        ({"module": NET}, [("module", "model")]),
        ({"a/b": NET}, [("a/b", "model")]),
        ({"epoch": 3, "args": {"lr": 0.1}}, []),
        ({}, []),
    ],
    ids=str,
)  # fmt: skip
def test_state_dicts_are_found_where_they_stand(value: Any, expected: list[tuple[str, str]]):
    assert found(value) == expected


def test_an_optimizer_is_found_and_is_no_state_dict_of_a_model():
    state = trained()
    assert is_optimizer(describe(state))
    assert found({"model": NET, "optimizer": state}) == [
        ("model", "model"),
        ("optimizer", "optimizer"),
    ]
    assert choose(document({"model": NET, "optimizer": state})).path == "model"
    with_only_an_optimizer = document({"optimizer": state})
    with pytest.raises(SelectionError, match="the state of an optimizer, and no") as raised:
        choose(with_only_an_optimizer)
    assert str(raised.value.hint) == "see what it holds: ckptfix inspect in.pt"


def test_a_mapping_with_keys_that_are_no_names_is_no_state_dict():
    assert [role for _, role in found({"w": T, "b": T, 0: 1})] == ["loose"]


def test_a_mapping_that_stands_in_two_places_is_found_once():
    assert found({"a": NET, "b": NET}) == [("a", "model")]


def test_the_mapping_is_the_node_itself_and_splits_into_tensors_and_others():
    root = describe({"model": {**NET, "steps": 3, "extra": None, "c": T}})
    [state] = find(root)
    assert state.mapping is root["model"]
    assert list(state.tensors) == ["fc.weight", "fc.bias", "c"]
    assert state.others == {"steps": 3, "extra": None}


def test_choosing_by_path_and_by_being_the_only_one():
    one = document({"model": NET, "ema": dict(NET)})
    assert choose(one).path == "model"
    assert choose(one, "ema").role == "ema"
    assert choose(one, "/ema/").role == "ema"
    assert [state.path for state in choose_all(one)] == ["model", "ema"]
    assert [state.path for state in choose_all(one, ["ema", "model"])] == ["ema", "model"]
    assert choose(document({"ema": NET, "step": 1})).path == "ema"


def test_mappings_of_single_numbers_stand_back_behind_weights():
    scores = {"/runs/epoch=2_loss=0.12.ckpt": torch.tensor(0.12)}
    lightning = {"state_dict": NET, "callbacks": {"ModelCheckpoint": {"best_k_models": scores}}}
    assert choose(document(lightning)).path == "state_dict"
    normalizer = {"mean": torch.tensor(1.0), "std": torch.tensor(2.0)}
    assert choose(document({"model": NET, "normalizer": normalizer})).path == "model"
    assert choose(document({"model": NET, "normalizer": normalizer}), "normalizer").tensors
    assert choose(document({"normalizer": normalizer})).path == "normalizer"
    assert choose(document({"a": normalizer, "b": scores})).path == "a"
    other = {"mean": torch.tensor(3.0), "std": torch.tensor(2.0)}
    with pytest.raises(SelectionError, match="holds 2 state dicts: a, b"):
        choose(document({"a": normalizer, "b": other}))


def test_what_is_ambiguous_or_missing_is_refused_and_listed():
    two = document({"a": NET, "b": OTHER})
    with pytest.raises(SelectionError, match="holds 2 state dicts: a, b") as raised:
        choose(two)
    assert (raised.value.code, str(raised.value.hint)) == (
        "ambiguous-state-dict",
        "choose one: add --select a",
    )
    with pytest.raises(SelectionError, match="no state dict at 'c'; there is a, b") as raised:
        choose(two, "c")
    assert raised.value.code == "no-such-path"


@pytest.mark.parametrize("value", [{1: NET, "1": OTHER}, {"a/b": NET, "a": {"b": OTHER}}])
def test_two_state_dicts_at_one_path_are_never_confused(value: Any):
    clash = document(value)
    [path] = {state.path for state in find(clash.root)}
    with pytest.raises(SelectionError, match="2 state dicts"):
        choose(clash)
    with pytest.raises(SelectionError, match=f"has 2 state dicts at {path!r}"):
        choose(clash, path)


def test_a_message_lists_no_more_than_a_person_reads():
    many = document([{"w": torch.ones(2)} for _ in range(1000)])
    with pytest.raises(SelectionError, match="and 980 more") as raised:
        choose(many)
    assert len(str(raised.value)) < 200


def test_a_file_of_many_small_mappings_costs_no_quadratic_time():
    tensor = describe(T)
    root = [{"x": tensor, "y": tensor} for _ in range(100_000)]
    assert len(find(root)) == 100_000
    wide = {f"t{i}": tensor for i in range(30_000)} | {
        f"d{i}": {"x": tensor} for i in range(20_000)
    }
    assert len(find(wide)) == 1


def test_what_lies_absurdly_deep_is_no_state_dict():
    root: Any = {"w": describe(T)}
    for _ in range(50_000):
        root = [root]
    assert [state.role for state in find(root)] == ["loose"]


def test_ties_are_keys_that_name_one_tensor():
    state = choose(door.read(FIXTURES / "tied.pt"))
    assert state.ties == [["embed.weight", "lm_head.weight"]]
    assert choose(door.read(FIXTURES / "views.pt")).ties == []


class Table:
    """An object whose class is not there, with arrays in it, as pandas pickles its blocks."""

    def __init__(self, **columns: Any) -> None:
        self.__dict__ = columns


def _frame() -> Table:
    values = np.arange(6.0).reshape(2, 3)
    blocks = {
        "axes": [np.array(["a"], dtype=object)],
        "blocks": [{"values": values, "locs": T.numpy()}],
    }
    return Table(_mgr=Table(blocks=blocks, index={"data": values, "name": None}), attrs={})


def _optimizer() -> torch.optim.Optimizer:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


SCORES = {
    "ModelCheckpoint{'monitor': 'loss'}": {
        "best_model_score": torch.tensor(0.1),
        "current_score": torch.tensor(0.1),
    },
    "EarlyStopping": {"best_score": torch.tensor(0.2), "patience": 3},
}


@pytest.mark.parametrize(
    "beside",
    [
        {"frame": _frame()},
        {"optimizer": _optimizer()},
        {"optimizers": [_optimizer(), _optimizer()]},
        {"callbacks": SCORES},
        {"best": {"runs/epoch=1.ckpt": torch.tensor(0.5), "runs/epoch=2.ckpt": torch.tensor(0.4)}},
        {"meta": {"dataset_meta": {"classes": ("a", "b"), "palette": np.zeros((2, 3))}}},
        {"meta": {"dataset_meta": {"classes": ("a", "b"), "palette": torch.zeros(2, 3)}}},
        {"meta": {"classes": ["a"], "palette": np.zeros((1, 3)), "areas": np.zeros(1)}},
    ],
    ids=range(8),
)
def test_what_is_not_a_state_dict_is_not_one(tmp_path: Path, beside: dict[str, Any]):
    torch.save({"model": NET, **beside}, tmp_path / "in.pt")
    read = door.read(tmp_path / "in.pt")
    assert [state.path for state in find(read.root) if state.role != "optimizer"] == ["model"]
    torch.save({"epoch": 3, **beside}, tmp_path / "none.pt")
    roles = {state.role for state in find(door.read(tmp_path / "none.pt").root)}
    assert roles <= {"loose"}


def test_arrays_are_weights_where_a_mapping_has_nothing_else(tmp_path: Path):
    blobs = {"conv1_w": np.zeros((2, 2)), "conv1_b": np.zeros(2), "lr": 0.1}
    torch.save({"model": blobs, "__author__": "someone"}, tmp_path / "in.pt")
    assert [state.path for state in find(door.read(tmp_path / "in.pt").root)] == ["model"]


class Settings(dict):
    """A mapping of a class of its own."""


def test_a_state_dict_is_found_in_objects(tmp_path: Path):
    for holder in (Table(model=NET), Settings(model=NET), Namespace(model=NET)):
        torch.save({"run": holder}, tmp_path / "in.pt")
        assert [state.path for state in find(door.read(tmp_path / "in.pt").root)] == ["run/model"]


def test_copies_that_share_their_tensors_are_one():
    net = nn.Linear(2, 2)
    copies = document({"model": net.state_dict(), "net": net.state_dict(), "epoch": 3})
    assert choose(copies).path == "model"
    assert choose(copies, "net").path == "net"
    apart = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(SelectionError, match="holds 2 state dicts: model, net"):
        choose(document({"model": net.state_dict(), "net": apart}))


def test_one_mapping_in_two_places_is_chosen_by_either(tmp_path: Path):
    torch.save({"a": {"b": NET}, "c": NET, "d": [NET]}, tmp_path / "in.pt")
    read = door.read(tmp_path / "in.pt")
    for path in ("a/b", "c", "d/0", "/c/"):
        assert list(choose(read, path).tensors) == list(NET)
    with pytest.raises(SelectionError, match="no state dict at 'e'"):
        choose(read, "e")


def test_a_tensor_that_stands_alone_in_several_places_has_a_name_for_each(tmp_path: Path):
    torch.save([T, [T, T + 1]], tmp_path / "in.pt")
    [state] = find(door.read(tmp_path / "in.pt").root)
    assert (state.role, list(state.tensors)) == ("loose", ["0", "1.0", "1.1"])
    with pytest.raises(SelectionError, match=r"its tensors have no names \(list of 2\)"):
        ckptfix.load_into(nn.Linear(2, 2), tmp_path / "in.pt")


@pytest.mark.parametrize(
    ("value", "averages"),
    [
        ({"state_dict": NET, "callbacks": {"SWA": {"average_model_state": OTHER}}},
         "callbacks/SWA/average_model_state"),
        ({"state_dict": OTHER, "current_model_state": NET, "averaging_state": {"n_averaged": T[0]}},
         "state_dict"),
        ({"params": NET, "params_ema": OTHER}, "params_ema"),
        ({"params_ema": OTHER, "params": NET}, "params_ema"),
        ({"state_dict": NET, "ema_state_dict": {"module.fc.weight": T, "steps": T[0]}},
         "ema_state_dict"),
        ({"model": NET, "ema": {"online_model": OTHER, "shadow": {"w": T}}}, "ema/shadow"),
    ],
    ids=str,
)  # fmt: skip
def test_averages_are_one_model_in_another_state(value: Any, averages: str):
    states = find(describe(value))
    assert [state.path for state in states if state.is_average] == [averages]
    if "ema" not in value:
        assert choose(document(value)).mapping.keys() == NET.keys()
        assert choose(document(value)).path != averages
