"""Edits: what they change, and that nothing else does."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ckptfix import door
from ckptfix.contents.state_dicts import choose, choose_all
from ckptfix.edit import casting, edits, reduce
from ckptfix.errors import SelectionError, UnsupportedError
from ckptfix.keys import wrappers
from ckptfix.tree import compare, walk
from ckptfix.tree.document import Document, Tensor, kind
from tests.conftest import FIXTURES
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptfix.contents.state_dicts import StateDict


def saved(value: Any, tmp_path: Path) -> Document:
    torch.save(value, tmp_path / "in.pt")
    return door.read(tmp_path / "in.pt")


def written(document: Document, tmp_path: Path) -> Any:
    door.write(document, tmp_path / "out.pt", force=True)
    return torch.load(tmp_path / "out.pt", map_location="cpu", weights_only=False)


def stripped(document: Document) -> Document:
    return edits.rename(
        document, [(state, wrappers.strip(state.mapping)) for state in choose_all(document)]
    )


def test_an_edit_leaves_the_document_it_was_given_alone(checkpoint: Path):
    document, untouched = door.read(checkpoint), door.read(checkpoint)
    if checkpoint.name != "whole_module.pt":
        state = choose(document)
        edits.rename(document, [(state, wrappers.add(state.mapping))])
    edits.to_cpu(document)
    assert compare.difference(document.root, untouched.root) is None


def test_an_edit_moves_no_bytes():
    document = door.read(FIXTURES / "dataparallel_cuda_training.pt")
    after = edits.to_cpu(stripped(document))[0]
    spans = [storage.spans for storage in walk.storages(document.root)]
    assert [storage.spans for storage in walk.storages(after.root)] == spans


def trained(named: bool) -> tuple[nn.Module, Any]:
    net = nn.Linear(2, 2)
    parameters = net.named_parameters(prefix="module") if named else net.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return net, optimizer.state_dict()


def test_an_optimizer_that_is_keyed_by_position_stays_as_it_is(tmp_path: Path):
    net, state = trained(named=False)
    value = {"net": nn.DataParallel(net).state_dict(), "optimizer": state}
    after = written(stripped(saved(value, tmp_path)), tmp_path)
    assert list(after["net"]) == ["weight", "bias"]
    assert unlike(after["optimizer"], state) is None


def test_the_names_that_an_optimizer_keeps_are_renamed_with_the_keys(tmp_path: Path):
    net, state = trained(named=True)
    assert state["param_groups"][0]["param_names"] == ["module.weight", "module.bias"]
    value = {"net": nn.DataParallel(net).state_dict(), "optimizer": state}
    after = written(stripped(saved(value, tmp_path)), tmp_path)["optimizer"]
    assert after["param_groups"][0].pop("param_names") == ["weight", "bias"]
    del state["param_groups"][0]["param_names"]
    assert unlike(after, state) is None


def test_an_optimizer_keyed_by_name_as_fsdp_writes_it_is_renamed(tmp_path: Path):
    names = ["module.weight", "module.bias"]
    optimizer: dict[str, Any] = {
        "state": {name: {"step": torch.tensor(1.0), "exp_avg": torch.rand(2)} for name in names},
        "param_groups": [{"lr": 0.1, "params": names}],
    }
    value = {"net": {name: torch.rand(2) for name in names}, "optimizer": optimizer}
    after = written(stripped(saved(value, tmp_path)), tmp_path)["optimizer"]
    assert list(after["state"]) == ["weight", "bias"]
    assert after["param_groups"] == [{"lr": 0.1, "params": ["weight", "bias"]}]
    assert unlike([*after["state"].values()], [*optimizer["state"].values()]) is None


def test_other_attributes_of_an_ordered_dict_stay(tmp_path: Path):
    state: Any = OrderedDict({"module.w": torch.ones(1)})
    state._metadata = OrderedDict({"": {"version": 1}, "module": {"version": 7}})
    state.note = "kept"
    after = written(stripped(saved(state, tmp_path)), tmp_path)
    assert after.note == "kept"
    assert after._metadata == OrderedDict({"": {"version": 7}})


def test_a_mapping_in_two_places_stays_one(tmp_path: Path):
    state = {"module.w": torch.ones(1)}
    after = written(stripped(saved({"a": state, "b": [state]}, tmp_path)), tmp_path)
    assert after["a"] is after["b"][0]
    assert list(after["a"]) == ["w"]


def test_to_cpu_counts_what_it_tags_and_keeps_sharing():
    document, tags = edits.to_cpu(door.read(FIXTURES / "dataparallel_cuda_training.pt"))
    assert dict(tags) == {"cuda:0": 9}
    assert {storage.device for storage in walk.storages(document.root)} == {"cpu"}
    assert not edits.to_cpu(document)[1]


# Fitting


def test_reducing_to_one_state_dict_names_what_it_leaves_out(tmp_path: Path):
    net = {"w": torch.ones(1), "b": torch.ones(1)}
    value = {"epoch": 3, "models": {"a": net, "b": dict(net)}, "args": [1, 2]}
    document = saved(value, tmp_path)
    fitted = reduce.only(document, choose(document, "models/b"))
    assert fitted.left_out == [("epoch", "int"), ("args", "list of 2"), ("models/a", "dict of 2")]
    assert unlike(written(fitted.document, tmp_path), net) is None


@pytest.mark.parametrize("value", [{"1": {"net": {"w": torch.ones(1)}}, 1: 5}])
def test_keys_of_one_spelling_are_no_crash(value: Any, tmp_path: Path):
    document = saved(value, tmp_path)
    fitted = reduce.only(document, choose(document))
    assert list(written(fitted.document, tmp_path)) == ["w"]


def test_flattening_makes_every_tensor_dense_and_keeps_ties():
    document = door.read(FIXTURES / "views.pt")
    root = reduce.flatten(document, choose(document)).document.root
    assert all(isinstance(tensor, Tensor) and tensor.is_contiguous for tensor in root.values())
    tied = door.read(FIXTURES / "tied.pt")
    flat = reduce.flatten(tied, choose(tied)).document.root
    assert flat["embed.weight"] is flat["lm_head.weight"]


def test_the_container_is_chosen_by_the_name_of_the_output():
    document = door.read(FIXTURES / "dataparallel_cuda_training.pt")
    assert reduce.fit(document, door.resolve("out.pt").container).document.root is document.root
    fitted = reduce.fit(document, door.resolve("out.safetensors").container)
    assert [path for path, _ in fitted.left_out] == [
        "optimizer_state_dict", "lr_scheduler_state_dict", "epoch", "loss", "rng_state", "device",
    ]  # fmt: skip
    assert list(
        reduce.fit(document, door.resolve("out.pt").container, "model_state_dict").document.root
    ) == list(choose(document).mapping)
    with pytest.raises(UnsupportedError, match=r"no container has the extension '\.onnx'"):
        reduce.fit(document, door.resolve("out.onnx").container)


@pytest.mark.parametrize(
    ("node", "name"),
    [(3, "int"), (None, "None"), ({"a": 1}, "dict of 1"), ((1, 2), "tuple of 2"), ("x", "str")],
)
def test_things_are_called_what_a_person_would(node: Any, name: str):
    assert kind(node) == name


def foreign(tmp_path: Path) -> tuple[Document, list[StateDict]]:
    """A checkpoint, and the state dicts of another one, which holds the same."""
    wrapped = nn.DataParallel(nn.Linear(2, 2)).state_dict()
    (tmp_path / "other").mkdir()
    other = saved({"net": wrapped}, tmp_path / "other")
    return saved({"net": wrapped}, tmp_path), choose_all(other)


EDITS: dict[str, Callable[[Document, list[StateDict]], Document]] = {
    "rename": lambda document, states: edits.rename(
        document, [(state, wrappers.strip(state.mapping)) for state in states]
    ),
    "without": lambda document, states: edits.without(document, states, {"module.bias"}),
    "cast": lambda document, states: casting.cast(document, states, casting.dtype_of("bf16")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_state_dict_of_another_document_is_refused(edit: str, tmp_path: Path) -> None:
    document, others = foreign(tmp_path)
    with pytest.raises(SelectionError, match="'net' is a state dict of another checkpoint"):
        EDITS[edit](document, others)
    with pytest.raises(SelectionError):
        EDITS[edit](document, [*choose_all(document), *others])
    made = EDITS[edit](document, choose_all(document))
    assert compare.difference(made.root, document.root) is not None


def test_a_cast_of_a_pickled_model_of_another_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    document, other = (saved(nn.Linear(2, 2), folder) for folder in (tmp_path, tmp_path / "other"))
    with pytest.raises(SelectionError, match="'/' is a state dict of another checkpoint"):
        EDITS["cast"](document, choose_all(other))
    made = EDITS["cast"](document, choose_all(document))
    assert written(made, tmp_path).weight.dtype is torch.bfloat16
