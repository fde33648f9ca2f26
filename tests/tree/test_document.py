"""Descriptions of tensors and objects, against torch and pickle."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.tree.document import Global, Inert, OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME
from tests.helpers import read

shapes = st.lists(st.integers(0, 4), max_size=4)


def described(tensor: torch.Tensor) -> Tensor:
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    storage = Storage(dtype, tensor.untyped_storage().nbytes() // dtype.itemsize, "cpu")
    layout = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    return Tensor(storage, dtype, *layout)


@given(shapes)
def test_contiguous_strides_are_torchs(shape: list[int]) -> None:
    assert contiguous_stride(tuple(shape)) == torch.empty(shape).stride()


@given(shapes, st.data())
def test_contiguity_is_what_torch_calls_it(shape: list[int], data: Any) -> None:
    tensor = torch.empty(shape, dtype=torch.float64).permute(
        data.draw(st.permutations(range(len(shape))))
    )
    if shape and data.draw(st.booleans()):
        tensor = tensor[:1] if data.draw(st.booleans()) else tensor[..., ::2]
    ours = described(tensor)
    assert ours.is_contiguous == tensor.is_contiguous()
    assert (ours.numel, ours.nbytes) == (tensor.numel(), tensor.nbytes)


def test_ties_are_equal_views_of_one_storage() -> None:
    one = described(torch.zeros(2, 3))
    tied = Tensor(one.storage, one.dtype, (2, 3), (3, 1))
    other = Tensor(one.storage, one.dtype, (3, 2), (2, 1))
    assert one.view == tied.view != other.view
    assert one.view != described(torch.zeros(2, 3)).view
    assert one != tied  # nodes are themselves, whatever they hold


def test_metadata_of_a_state_dict() -> None:
    state_dict = torch.nn.BatchNorm1d(1).state_dict()
    plain = OrderedDict(a=1)
    plain.__dict__["_metadata"] = dict(state_dict.__dict__["_metadata"])
    found = read(pickle.dumps(plain, 2))
    assert (type(found), found.metadata) == (OrderedMap, {"": {"version": 2}})
    assert OrderedMap().metadata is None
    assert OrderedMap(attributes={"_metadata": 5}).metadata is None
    assert OrderedMap(attributes=[1]).metadata is None


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_called_by_their_class(protocol: int) -> None:
    found = read(pickle.dumps(argparse.Namespace(lr=0.1, name="x"), protocol))
    assert (found.cls, found.attributes) == ("argparse.Namespace", {"lr": 0.1, "name": "x"})
    path = read(pickle.dumps(PurePosixPath("a", "b"), protocol))
    assert path.cls.startswith("pathlib")


def test_attributes_in_slots_are_attributes() -> None:
    made = Inert(Global("m", "n"), has_state=True, state=({"a": 1}, {"b": 2}))
    assert made.attributes == {"a": 1, "b": 2}
    assert Inert(Global("m", "n"), has_state=True, state=[1]).attributes == {}
    assert Inert(made).cls == "<computed>"


def test_a_name_is_shown_with_its_module() -> None:
    assert str(Global("torch.nn", "Linear")) == "torch.nn.Linear"
