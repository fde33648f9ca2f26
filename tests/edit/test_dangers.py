"""What would run commands is left out by `fix`, as little as can be, and named."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

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
    "in slots": (lambda: {"model": W, "epoch": 3, "s": Slotted()}, "s"),
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
