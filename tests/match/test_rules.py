"""Hints that rename: one rule for all that it changes, or none; run one after another."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix import door
from ckptfix.cli import group
from ckptfix.errors import KeyMismatchError
from ckptfix.match import target as targets
from ckptfix.match.choose import match
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path

State = dict[str, Any]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Holder(nn.Module):
    """A model whose state dict is what it is given."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            *path, last = key.split(".")
            module: nn.Module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name] or module
            module.register_parameter(last, nn.Parameter(torch.zeros_like(value)))


def followed(state: State, wanted: State) -> tuple[int, bool]:
    """How many renames the hints name, each of which is run; and whether it loads then."""
    torch.save(state, "0.pt")
    for step in range(9):
        try:
            match(door.read(f"{step}.pt"), targets.of_module(Holder(wanted)))
        except KeyMismatchError as error:
            words = shlex.split(str(error.hint).partition(": ckptfix ")[2])
            if words[:1] != ["rename"]:
                return step, False
            words[words.index(f"{step}.renamed.pt")] = f"{step + 1}.pt"
            assert group.main(words, "ckptfix", standalone_mode=False) == 0
        else:
            model = Holder(wanted)
            ckptfix.load_into(model, f"{step}.pt")
            assert unlike(dict(model.state_dict()), wanted) is None
            return step, True
    raise AssertionError("there is no end to it")


def values(**shapes: tuple[int, ...]) -> State:
    return {key.replace("__", "."): torch.rand(shape) for key, shape in shapes.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for pattern, replacement in pairs:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


def numbered(name: str, *numbers: object) -> State:
    return {name.format(number): torch.rand(4, 4) for number in numbers}


LINEAR = values(
    encoder__0__weight=(4, 4), encoder__0__bias=(4,), encoder__1__weight=(4, 4),
    encoder__1__bias=(4,), head__weight=(3, 4), head__bias=(3,),
)  # fmt: skip
NORMS = values(
    emb__weight=(9, 4),
    emb__norm__weight=(4,),
    emb__norm__bias=(4,),
    layer__0__dense__weight=(4, 4),
    layer__0__dense__bias=(4,),
    layer__0__norm__weight=(4,),
    layer__0__norm__bias=(4,),
)
FITTING: dict[str, tuple[State, list[tuple[str, str]], int]] = {
    "a module": (LINEAR, [(r"^encoder", "backbone")], 1),
    "two modules": (LINEAR, [(r"^encoder", "backbone"), ("^head", "fc")], 2),
    "under a prefix": (LINEAR, [("^", "module."), ("head", "fc")], 1),
    "under a prefix of its own": (LINEAR, [("^", "model.net."), ("head", "fc.out")], 1),
    "a module inside": (NORMS, [(r"\bdense\b", "linear")], 1),
    "gamma and beta": (NORMS, [(r"norm\.weight", "norm.gamma"), (r"norm\.bias", "norm.beta")], 2),
    "a module less": (LINEAR, [(r"^encoder\.", "encoder.layers.")], 1),
    "a module less, of one": (LINEAR, [(r"^encoder\.0\.", "encoder.conv.0.")], 1),
    "a module more": (renamed(LINEAR, ("r\\.", "r.layers.")), [(r"\.layers\.", ".")], 1),
    "a number": (LINEAR, [(r"^encoder\.1\.", "encoder.7.")], 1),
    "a module less inside": (LINEAR, [(r"^encoder\.", "encoder.layers.body.")], 1),
    "a name for a number": (
        values(net__0__w=(2,), net__1__w=(3,)),
        [(r"net\.1\.", "net.out.")],
        1,
    ),
    "the last of many": (numbered("net.{}.w", *range(3)), [(r"net\.2\.", "net.11.")], 1),
    "the last of many names": (numbered("{}.w", "fc1", "fc2", "head"), [("head", "fc3")], 1),
    "a slip of the pen": (LINEAR, [("weight", "wieght")], 1),
}


@pytest.mark.parametrize("kind", FITTING)
def test_hints_that_are_followed_give_each_key_its_own_values(kind: str) -> None:
    wanted, pairs, steps = FITTING[kind]
    assert followed(renamed(wanted, *pairs), wanted) == (steps, True)


SEQUENTIAL = {f"net.{at}.{name}": torch.rand(4, 4) for at in (0, 3, 6) for name in ("weight", "w2")}
UNFIT: dict[str, tuple[State, State]] = {
    "only the order tells": (renamed(SEQUENTIAL, ("3", "4"), ("0", "1")), SEQUENTIAL),
    "twins": (
        values(a__w=(4, 4), b__w=(4, 4), c__w=(2,)),
        values(x__w=(4, 4), y__w=(4, 4), c__w=(2,)),
    ),
    "two of which one is meant": (
        values(old_head__weight=(3, 4), aux_head__weight=(3, 4), body__weight=(4, 4)),
        values(head__weight=(3, 4), body__weight=(4, 4)),
    ),
    "one for two": (
        values(fc__weight=(4, 4), body__weight=(4, 4)),
        values(fc1__weight=(4, 4), fc2__weight=(4, 4), body__weight=(4, 4)),
    ),
    "another shape": (values(fc__weight=(4, 3), a__w=(2,)), values(fd__weight=(4, 4), a__w=(2,))),
    "a direction for a weight": (
        values(fc__weight_v=(4, 4), a__w=(2,)),
        values(fc__weight=(4, 4), a__w=(2,)),
    ),
    "pruned": (
        values(fc__weight_orig=(4, 4), fc__weight_mask=(4, 4), a__w=(2,)),
        values(fc__weight=(4, 4), a__w=(2,)),
    ),
    "a bias for a weight": (values(bn__bias=(4,), a__w=(2,)), values(bn__weight=(4,), a__w=(2,))),
    "a mean for a variance": (
        values(bn__running_mean=(4,), a__w=(2,)),
        values(bn__running_var=(4,), a__w=(2,)),
    ),
    "numbered from 1": (numbered("layers.{}.w", 1, 2, 3), numbered("layers.{}.w", 0, 1, 2)),
    "numbered from 0": (numbered("conv{}.weight", 0, 1, 2), numbered("conv{}.weight", 1, 2, 3)),
    "with layers between": (numbered("net.{}.w", 0, 2, 4), numbered("net.{}.w", 0, 1, 2)),
    "past ten": (numbered("net.{}.w", *range(1, 13)), numbered("net.{}.w", *range(12))),
    "under a prefix, from 1": (
        numbered("module.layers.{}.weight", 1, 2, 3), numbered("layers.{}.weight", 0, 1, 2)
    ),
    "shifted by one name": (numbered("{}.w", *"qkv"), numbered("{}.w", *"kvo")),
    "anything of that shape": (
        values(queue_ptr=(4,), a__w=(2,)),
        values(norm__weight=(4,), a__w=(2,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_where_more_than_one_could_be_meant_no_rename_is_named(kind: str) -> None:
    state, wanted = UNFIT[kind]
    assert followed(state, wanted) == (0, False)


def test_a_square_weight_of_another_layer_may_be_transposed_and_that_is_said() -> None:
    state = values(conv1__weight=(4, 4), conv1__bias=(4,), conv2__weight=(4, 4), conv2__bias=(4,))
    wanted = {k.replace("weight", "lin.weight"): v for k, v in state.items()}
    torch.save(state, "in.pt")
    with pytest.raises(KeyMismatchError) as told:
        ckptfix.load_into(Holder(wanted), "in.pt")
    assert "is not its transpose, which a square weight does not tell" in str(told.value.hint)
    torch.save({**state, "conv1.weight": torch.rand(4, 3)}, "in.pt")
    wanted = {**wanted, "conv1.lin.weight": torch.rand(3, 4)}
    with pytest.raises(KeyMismatchError) as told:
        ckptfix.load_into(Holder(wanted), "in.pt")
    assert "conv1.weight" not in str(told.value.hint).replace("conv1.weight_", "")


def test_many_keys_take_no_longer_than_they_are() -> None:
    wanted = {f"layers.{at}.weight": torch.rand(2) for at in range(2000)}
    assert (
        followed({key.replace("layers", "blocks"): v for key, v in wanted.items()}, wanted)[0] <= 1
    )
