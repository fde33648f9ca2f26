"""What would run commands is left out by `fix`, as little as can be, and named."""

from __future__ import annotations

import os
import shlex
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from tests.oracles import ckptfix_command, unlike


class Call:
    """An object that pickles as a call; the call is harmless, where somebody should make it."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command() -> Call:
    return Call(os.system, "touch ran")


W = {"w": torch.arange(3.0)}
AROUND = {
    "an entry": (lambda: {"model": W, "x": command(), "epoch": 3}, "x"),
    "a key": (lambda: {"model": W, "epoch": 3, (1, 2): 4, command(): 5}, "<Inert>"),
    "in a list": (lambda: {"model": W, "epoch": 3, "callbacks": [1, command()]}, "callbacks/1"),
    "in a tuple": (lambda: {"model": W, "epoch": 3, "a": {"b": (command(), 1)}}, "a/b/0"),
    "in an object": (
        lambda: {"model": W, "epoch": 3, "args": Namespace(lr=1, f=os.system)},
        "args/f",
    ),
    "in slots": (lambda: {"model": W, "epoch": 3, "s": Slotted()}, "s/f"),
    "made with it": (lambda: {"model": W, "epoch": 3, "f": partial(os.system, "touch ran")}, "f"),
    "a default": (lambda: {"model": W, "epoch": 3, "d": defaultdict(partial(os.system, ""))}, "d"),
    "a method of it": (
        lambda: {"model": W, "epoch": 3, "g": Call(getattr, W["w"], "__class__")},
        "g",
    ),
    "among attributes": (
        lambda: {"model": with_attribute(), "epoch": 3},
        "model/<attributes>/_hook",
    ),
    "code": (lambda: {"model": W, "epoch": 3, "y": {"z": Call(eval, "open('ran', 'w')")}}, "y/z"),
}


class Slotted:
    __slots__ = ("f",)

    def __init__(self) -> None:
        self.f = command()


def with_attribute() -> Any:
    state: Any = OrderedDict(W)
    state._hook = command()
    return state


@pytest.mark.parametrize("around", AROUND)
def test_fix_leaves_out_what_would_run_and_nothing_else(around: str) -> None:
    make, place = AROUND[around]
    torch.save(make(), "in.pt")
    before = {found.code: found for found in ckptfix.open("in.pt").findings}
    assert before["dangerous-globals"].severity == "error"
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 0
    assert f"left out of it: {place} (" in ran.stderr
    assert "dangerous-globals" not in {found.code for found in ckptfix.open("out.pt").findings}
    made = torch.load("out.pt", weights_only=False)
    assert made["epoch"] == 3
    assert unlike(dict(made["model"]), W) is None
    assert not Path("ran").exists()


def test_what_is_in_the_place_of_a_weight_is_not_a_weight() -> None:
    torch.save({"w": W["w"], "v": command(), "u": torch.ones(2)}, "in.pt")
    assert ckptfix_command("fix", "in.pt", "out.pt").returncode == 0
    assert list(torch.load("out.pt")) == ["w", "u"]


def test_it_is_kept_where_that_is_said() -> None:
    torch.save({"module.w": W["w"], "module.v": W["w"], "module.x": command()}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--keep-dangerous")
    assert ran.returncode == 0
    assert "dangerous-globals" in {found.code for found in ckptfix.open("out.pt").findings}


def test_a_call_and_nothing_else_is_refused() -> None:
    torch.save(command(), "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: in.pt: is nothing but a call of ")
    assert "hint: " in ran.stderr
    assert not Path("out.pt").exists()


def test_data_that_weights_only_refuses_is_no_danger() -> None:
    value = {"model": W, "args": Namespace(lr=1, path=Path("x")), "f": partial(int, base=2)}
    torch.save(value, "in.pt")
    codes = [found.code for found in ckptfix.open("in.pt").findings]
    assert "blocked-globals" in codes
    assert "dangerous-globals" not in codes
    assert ckptfix_command("fix", "in.pt", "out.pt").returncode == 0


# --- the weights are never left out


def dangerous_parameter() -> Any:
    weight: Any = nn.Parameter(torch.arange(4.0).reshape(2, 2))
    weight.hook = command()
    weight.lr_scale = 0.5
    return weight


def dangerous_tensor() -> Any:
    weight: Any = torch.arange(3.0)
    weight.hook = os.system
    return weight


class Quiet(torch.Tensor):
    """A tensor of another class."""


def dangerous_subclass() -> Any:
    weight: Any = torch.arange(3.0).as_subclass(Quiet)
    weight.hook = os.system
    return weight


def dangerous_sparse() -> Any:
    weight: Any = nn.Parameter(torch.eye(2).to_sparse())
    weight.hook = command()
    return weight


WEIGHTS = [dangerous_parameter, dangerous_tensor, dangerous_subclass, dangerous_sparse]


@pytest.mark.parametrize("make", WEIGHTS)
def test_an_attribute_of_a_weight_does_not_cost_the_weight(make: Any) -> None:
    weight = make()
    torch.save({"model": {"a.weight": weight, "b": torch.ones(2)}, "epoch": 3}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 0, ran.stderr
    assert "(posix.system)" in ran.stderr
    assert "dangerous-globals" not in {found.code for found in ckptfix.open("out.pt").findings}
    made = torch.load("out.pt", weights_only=False)["model"]
    assert list(made) == ["a.weight", "b"]
    assert type(made["a.weight"]) is type(weight)
    assert torch.equal(made["a.weight"].to_dense(), weight.to_dense())
    assert not hasattr(made["a.weight"], "hook")
    assert getattr(made["a.weight"], "lr_scale", None) == getattr(weight, "lr_scale", None)
    assert not Path("ran").exists()


def test_a_target_finds_a_weight_with_such_an_attribute() -> None:
    torch.save({"a.weight": dangerous_parameter()}, "in.pt")
    torch.save({"a.weight": torch.zeros(2, 2)}, "like.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--like", "like.pt")
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load("out.pt")["a.weight"], dangerous_parameter())


def traced() -> Any:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))


def test_of_a_model_that_is_made_by_running_its_code_the_weights_stay() -> None:
    model = traced()
    torch.save({"net": model, "epoch": 3}, "in.pt")
    assert "dangerous-globals" in {found.code for found in ckptfix.open("in.pt").findings}
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 0, ran.stderr
    assert "left out of it: net (torch.fx.graph_module.reduce_graph_module, apart" in ran.stderr
    made = torch.load("out.pt")
    assert made["epoch"] == 3
    assert unlike(dict(made["net"]), dict(model.state_dict())) is None


def test_such_a_model_and_nothing_else_becomes_its_state_dict() -> None:
    model = traced()
    torch.save(model, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 0, ran.stderr
    assert unlike(dict(torch.load("out.pt")), dict(model.state_dict())) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"model": Call(exec, "pass", {"model": W}), "epoch": 3},
        lambda: {"model": Call(os.system, W), "epoch": 3},
        lambda: Call(exec, "pass", W),
        lambda: {"model": {command(): W["w"]}, "epoch": 3},
    ],
)
def test_weights_that_would_go_too_are_refused(make: Any) -> None:
    torch.save(make(), "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert ran.returncode == 2
    assert not Path("out.pt").exists()
    assert "error: in.pt: " in ran.stderr


def test_what_the_refusal_says_takes_the_weights_alone() -> None:
    torch.save({"model": Call(exec, "pass", {"model": W}), "epoch": 3}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    hint = shlex.split(ran.stderr.partition("hint: ")[2].partition(": ckptfix ")[2])
    assert ckptfix_command(*hint).returncode == 0
    assert torch.equal(safetensors.torch.load_file(hint[2])["w"], W["w"])


def test_a_state_dict_that_is_selected_is_the_one_that_stays() -> None:
    torch.save({"model": W, "other": Call(exec, "pass", {"v": torch.ones(2)})}, "in.pt")
    assert ckptfix_command("fix", "in.pt", "out.pt").returncode == 2
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--select", "model")
    assert ran.returncode == 0, ran.stderr
    assert unlike(dict(torch.load("out.pt")["model"]), W) is None


def sorted_(state: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(state.items()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize("around", [lambda m: m, nn.DataParallel], ids=["alone", "in a wrapper"])
def test_a_compiled_model_is_a_model(around: Any) -> None:
    inner = nn.Linear(2, 2)
    torch.save({"net": around(torch.compile(inner)), "epoch": 3}, "in.pt")
    assert "dangerous-globals" not in {found.code for found in ckptfix.open("in.pt").findings}
    weights = dict(inner.state_dict())
    assert ckptfix_command("fix", "in.pt", "out.pt").returncode == 0
    made = torch.load("out.pt", weights_only=False)
    assert made["epoch"] == 3
    assert unlike(dict(made["net"].state_dict()), weights) is None
    assert ckptfix_command("fix", "in.pt", "out.safetensors").returncode == 0
    assert unlike(sorted_(safetensors.torch.load_file("out.safetensors")), sorted_(weights)) is None
    assert ckptfix_command("convert", "in.pt", "whole.safetensors").returncode == 0
    assert len(safetensors.torch.load_file("whole.safetensors")) == 2
    assert unlike(dict(ckptfix.load_state_dict("in.pt", model=nn.Linear(2, 2))), weights) is None


def test_deep_and_wide_arguments_take_no_time() -> None:
    value: Any = (os.system,)
    for _ in range(30):
        value = (*(value,) * 50, {"a": value})
    torch.save({"model": W, "x": Call(dict.fromkeys, value)}, "in.pt")
    assert ckptfix_command("fix", "in.pt", "out.pt").returncode == 0


# --- what carries it along says so


CARRYING = {
    "convert": [],
    "to-cpu": [],
    "strip-prefix": ["--partial"],
    "add-prefix": [],
    "rename": ["--sub", "w", "u"],
}


@pytest.mark.parametrize("verb", CARRYING)
def test_a_verb_that_carries_a_call_along_says_so(verb: str) -> None:
    torch.save({"module.w": W["w"], "module.v": W["w"], "hook": command()}, "cpu.pt")
    with zipfile.ZipFile("cpu.pt") as saved, zipfile.ZipFile("in.pt", "w") as tagged:
        for name in saved.namelist():
            on_gpu = saved.read(name).replace(b"X\x03\0\0\0cpu", b"X\x04\0\0\0cuda")
            tagged.writestr(name, on_gpu)
    ran = ckptfix_command(verb, "in.pt", "out.pt", *CARRYING[verb])
    assert ran.returncode == 0, ran.stderr
    assert "note: carries calls along that would run: posix.system; " in ran.stderr
    assert "ckptfix fix in.pt in.fixed.pt leaves them out" in ran.stderr


def test_a_container_of_tensors_carries_none_and_says_nothing_of_it() -> None:
    torch.save({"w": W["w"], "v": W["w"] + 1, "hook": command()}, "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out.safetensors")
    assert ran.returncode == 0
    assert "carries" not in ran.stderr
