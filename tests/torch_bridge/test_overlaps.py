"""Tensors that share memory: what is loaded into one must not take away what another was given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import KeyMismatchError
from tests.oracles import code_of, unlike

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Module()
"""
MODELS = {
    "data": "self.b.weight = nn.Parameter(self.a.weight.data)",
    "detached": "self.b.weight = nn.Parameter(self.a.weight.detach())",
    "turned": "self.b.weight = nn.Parameter(self.a.weight.detach().t())",
    "rows": "self.b.weight = nn.Parameter(self.a.weight.data[1:3])",
    "columns": "self.b.weight = nn.Parameter(self.a.weight.data[:, :2])",
    "buffer": "self.b.register_buffer('weight', self.a.weight.data.view(2, 8))",
    "bits": "self.b.register_buffer('weight', self.a.weight.data.view(torch.int32))",
    "element": "self.b.register_buffer('weight', self.a.weight.data[2, 3])",
}
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda x: x,
    "detached": lambda x: x,
    "turned": lambda x: x.t(),
    "rows": lambda x: x[1:3],
    "columns": lambda x: x[:, :2],
    "buffer": lambda x: x.reshape(2, 8),
    "bits": lambda x: x.view(torch.int32),
    "element": lambda x: x[2, 3],
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def built(name: str) -> nn.Module:
    source = HEAD + f"        {MODELS[name]}\n"
    Path("net.py").write_text(source)
    space: dict[str, type[nn.Module]] = {}
    exec(source, space)
    return space["Net"]()


@pytest.mark.parametrize("name", MODELS)
def test_values_that_agree_load_and_others_are_refused_by_every_door(name: str) -> None:
    value = torch.rand(4, 4)
    same = {"a.weight": value, "b.weight": PARTS[name](value).clone()}
    torch.save(same, "same.pt")
    model = built(name)
    assert code_of("check", "same.pt", "--model", "net.py:Net") == 0
    assert ckptfix.load_into(model, "same.pt").loads
    assert unlike(dict(model.state_dict()), same) is None

    other = PARTS[name](value).clone()
    other[(-1,) * other.ndim] += 1
    torch.save({"a.weight": value, "b.weight": other}, "other.pt")
    lost = built(name)
    lost.load_state_dict(torch.load("other.pt"))
    assert not lost.state_dict()["a.weight"].equal(value)  # which is why it is refused
    assert code_of("check", "other.pt", "--model", "net.py:Net") == 1
    assert code_of("fix", "other.pt", "out.pt", "--model", "net.py:Net") == 2
    assert not Path("out.pt").exists()
    before = {key: it.clone() for key, it in model.state_dict().items()}
    for refusing in (ckptfix.load_into, lambda m, p: ckptfix.load_state_dict(p, model=m)):
        with pytest.raises(KeyMismatchError, match=r"'a\.weight' and 'b\.weight'"):
            refusing(model, "other.pt")
    assert unlike(dict(model.state_dict()), before) is None


def test_parts_of_one_storage_that_do_not_meet_are_no_tie() -> None:
    flat = torch.zeros(4, 4)
    model = nn.ParameterDict({"a": flat[:, :2], "b": flat[:, 2:]})
    torch.save({"a": torch.rand(4, 2), "b": torch.rand(4, 2)}, "in.pt")
    assert ckptfix.load_into(model, "in.pt").loads
    assert unlike(dict(model.state_dict()), torch.load("in.pt")) is None


def test_a_tie_of_memory_that_was_not_saved_is_made() -> None:
    model = built("data")
    torch.save({"a.weight": torch.rand(4, 4)}, "in.pt")
    assert code_of("fix", "in.pt", "out.pt", "--model", "net.py:Net") == 0
    model.load_state_dict(torch.load("out.pt"), strict=True)


@pytest.mark.parametrize(
    "make", ["torch.zeros(1, 3).expand(2, 3)", "torch.arange(3).expand(2, -1)"]
)
def test_nothing_is_copied_into_what_repeats_its_elements(make: str) -> None:
    source = f"{HEAD}        self.register_buffer('t', {make})\n"
    Path("net.py").write_text(source)
    space: dict[str, type[nn.Module]] = {}
    exec(source, space)
    model = space["Net"]()
    torch.save({key: value.clone() for key, value in model.state_dict().items()}, "in.pt")
    with pytest.raises(RuntimeError, match="more than one element"):
        model.load_state_dict(torch.load("in.pt"))
    assert code_of("check", "in.pt", "--model", "net.py:Net") == 1
    assert code_of("fix", "in.pt", "out.pt", "--model", "net.py:Net") == 2
    with pytest.raises(KeyMismatchError, match="expanded"):
        ckptfix.load_into(model, "in.pt")
