"""Values that lie in another layout are refused by name, or that it cannot be seen is said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import KeyMismatchError, UnsupportedError
from tests.oracles import ckptfix_command


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def paddle(wrapped: bool) -> None:
    state: Any = {"weight": np.arange(4, dtype="f4").reshape(2, 2), "bias": np.ones(2, "f4")}
    state["StructuredToParameterName@@"] = {"weight": "linear_0.w_0", "bias": "linear_0.b_0"}
    value = {"model": state, "epoch": 3} if wrapped else state
    Path("in.pdparams").write_bytes(pickle.dumps(value, protocol=4))
    torch.save(nn.Linear(2, 2).state_dict(), "like.pt")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_paddlepaddle_is_refused_wherever_its_weights_would_be_taken(
    wrapped: bool,
) -> None:
    paddle(wrapped)
    for load in (
        lambda: ckptfix.load_state_dict("in.pdparams"),
        lambda: ckptfix.load_state_dict("in.pdparams", model=nn.Linear(2, 2)),
        lambda: ckptfix.load_into(nn.Linear(2, 2), "in.pdparams", strict=False),
    ):
        with pytest.raises(UnsupportedError, match="PaddlePaddle"):
            load()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fix", "in.pdparams", "out.pt"],
        ["fix", "in.pdparams", "out.pt", "--like", "like.pt"],
        ["fix", "like.pt", "out.pt", "--like", "in.pdparams"],
        ["convert", "in.pdparams", "out.safetensors"],
        ["convert", "in.pdparams", "out.pt", "--weights-only"],
    ],
    ids=" ".join,
)
def test_no_verb_writes_such_weights(arguments: list[str]) -> None:
    paddle(wrapped=False)
    ran = ckptfix_command(*arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "PaddlePaddle" in ran.stderr
    assert "\nhint: " in ran.stderr
    assert not list(Path().glob("out.*"))


def test_it_can_be_looked_at() -> None:
    paddle(wrapped=True)
    found = {row.code: row for row in ckptfix.open("in.pdparams").findings}
    assert found["other-framework"].where == "model"


# --- Conv1D


class Attention(nn.Module):
    def __init__(self, width: int, *, all_of_it: bool) -> None:
        super().__init__()
        if all_of_it:
            self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)


def turned(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key: it.t().contiguous() if it.dim() == 2 else it for key, it in state.items()}


def test_transposed_weights_are_called_that_where_the_shapes_show_it() -> None:
    model = Attention(4, all_of_it=True)
    torch.save(turned(model), "in.pt")
    with pytest.raises(KeyMismatchError, match="1 weight is transposed, and square ones may be"):
        ckptfix.load_into(model, "in.pt")


def test_where_only_square_weights_are_there_that_is_said() -> None:
    Path("net.py").write_text(
        "from torch import nn\ndef net(all_of_it):\n"
        "    layers = {'c_attn': nn.Linear(4, 12)} if all_of_it else {}\n"
        "    return nn.ModuleDict({**layers, 'c_proj': nn.Linear(4, 4)})\n"
    )
    for all_of_it in ("true", "false"):
        model = Attention(4, all_of_it=all_of_it == "true")
        state = model.state_dict() if all_of_it == "true" else turned(model)
        torch.save({f"module.{key}": value for key, value in state.items()}, "in.pt")
        given = ("--model", "net.py:net", "--init", f'{{"all_of_it": {all_of_it}}}')
        ran = ckptfix_command("fix", "-f", "in.pt", "out.pt", *given)
        assert ran.returncode == 0
        assert ("may be transposed" in ran.stderr) == (all_of_it == "false")
        checked = ckptfix_command("check", "out.pt", *given)
        assert checked.returncode == 0
        assert ("unseen-transpose" in checked.stdout) == (all_of_it == "false")
