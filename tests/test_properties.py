"""What holds for every checkpoint that torch can save, on checkpoints that hypothesis makes up."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject

import ckptfix
from ckptfix.errors import CkptfixError
from tests.oracles import has_a_reason, sharing, unlike
from tests.strategies import SUITE, folder, state_dicts, trees


def loaded(path: Any) -> Any:
    """As torch loads it; where `weights_only` refuses what torch wrote, without it."""
    try:
        return torch.load(path, weights_only=True)
    except pickle.UnpicklingError:  # integers past 255 bytes, complex numbers
        return torch.load(path, weights_only=False)


def same(one: Any, other: Any) -> None:
    assert unlike(one, other) is None
    assert sharing(one) == sharing(other)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_comes_through_to_the_bit(zipped: bool):
    @SUITE
    @given(trees())
    def holds(tree: Any) -> None:
        with folder() as tmp:
            torch.save(tree, tmp / "in.pt", _use_new_zipfile_serialization=zipped)
            try:
                before = loaded(tmp / "in.pt")
            except AttributeError:  # torch cannot read uint16 from its own older container
                assert not zipped
                reject()
            ckptfix.open(tmp / "in.pt").save(tmp / "out.pt")
            same(loaded(tmp / "out.pt"), before)
            same(ckptfix.load(tmp / "in.pt"), before)

    holds()


@SUITE
@given(trees())
def test_what_a_program_holds_is_saved_as_torch_saves_it(tree: Any):
    with folder() as tmp:
        torch.save(tree, tmp / "in.pt")
        ckptfix.save(tree, tmp / "out.pt")
        assert unlike(loaded(tmp / "out.pt"), loaded(tmp / "in.pt")) is None


@SUITE
@given(state_dicts())
def test_a_state_dict_loads_as_torch_loads_it(state: Any):
    with folder() as tmp:
        torch.save(state, tmp / "in.pt")
        same(ckptfix.load_state_dict(tmp / "in.pt"), torch.load(tmp / "in.pt"))


@SUITE
@given(state_dicts())
def test_stripping_undoes_adding(state: Any):
    assume("" not in state)  # `module.` alone is a last component, which stays
    with folder() as tmp:
        torch.save(state, tmp / "in.pt")
        added = ckptfix.open(tmp / "in.pt").add_prefix()
        added.save(tmp / "added.pt")
        assert list(torch.load(tmp / "added.pt")) == [f"module.{key}" for key in state]
        ckptfix.open(tmp / "added.pt").strip_prefix("module.").save(tmp / "out.pt")
        same(torch.load(tmp / "out.pt"), torch.load(tmp / "in.pt"))


@SUITE
@given(state_dicts())
def test_a_renaming_can_be_undone(state: Any):
    with folder() as tmp:
        torch.save(state, tmp / "in.pt")
        there = ckptfix.open(tmp / "in.pt").rename(r"\A", "x.y.")
        there.rename(r"\Ax\.y\.", "").save(tmp / "out.pt")
        same(torch.load(tmp / "out.pt"), torch.load(tmp / "in.pt"))


@SUITE
@given(state_dicts())
def test_safetensors_keeps_the_state_dict(state: Any):
    with folder() as tmp:
        torch.save(state, tmp / "in.pt")
        ckptfix.open(tmp / "in.pt").save(tmp / "between.safetensors")
        ckptfix.open(tmp / "between.safetensors").save(tmp / "out.pt")
        before, after = torch.load(tmp / "in.pt"), torch.load(tmp / "out.pt")
        assert set(after) == set(before)
        assert unlike({key: after[key] for key in before}, dict(before)) is None
        for key, tensor in before.items():
            tied = (name for name in before if before[name] is tensor and tensor.numel())
            ties = set(tied) - {"format", "ckptfix.module_versions"}  # those are metadata's own
            if key not in ties:
                continue
            assert ties <= {name for name in after if after[name] is after[key]}


@SUITE
@given(trees())
def test_what_safetensors_cannot_hold_is_refused_with_a_reason(tree: Any):
    with folder() as tmp:
        torch.save(tree, tmp / "in.pt")
        try:
            ckptfix.open(tmp / "in.pt").save(tmp / "out.safetensors")
        except CkptfixError as refusal:
            has_a_reason(refusal)
            assert not (tmp / "out.safetensors").exists()
        else:
            assert ckptfix.open(tmp / "out.safetensors").state_dicts


@pytest.mark.parametrize("name", ["format", "ckptfix.module_versions"])
def test_a_name_that_metadata_uses_is_no_tie(name: str):
    tensor = torch.ones(2)
    with folder() as tmp:
        torch.save(OrderedDict([("pt", tensor), (name, tensor)]), tmp / "in.pt")
        ckptfix.open(tmp / "in.pt").save(tmp / "out.safetensors")
        assert list(ckptfix.load(tmp / "out.safetensors")) == ["pt", name]
        torch.save(OrderedDict(pt=tensor), tmp / "in.pt")
        ckptfix.open(tmp / "in.pt").save(tmp / "out.safetensors", force=True)
        assert list(ckptfix.load(tmp / "out.safetensors")) == ["pt"]
