"""`convert --weights-only`: what `torch.load(weights_only=True)` loads, whatever was beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix import Checkpoint
from ckptfix.errors import SelectionError, UnsupportedError
from ckptfix.tree.document import Global, Inert
from ckptfix.tree.walk import walk
from tests.conftest import CHECKPOINTS, FIXTURES
from tests.oracles import ckptfix_command, done, unlike

if TYPE_CHECKING:
    from pathlib import Path

SEVERAL = {"ema.pt": "state_dict_ema"}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
def test_every_file_becomes_one_that_weights_only_loads(path: Path, tmp_path: Path) -> None:
    made = ckptfix.open(path).weights_only(SEVERAL.get(path.name))
    assert not [node for _, node in walk(made.document.root) if isinstance(node, Inert)]
    made.to_cpu().save(tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded
    assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
    select = (SEVERAL.get(path.name) or made_path(path), "/")
    assert ckptfix.diff(path, tmp_path / "out.pt", select=select).same


def made_path(path: Path) -> str:
    states = [s for s in ckptfix.open(path).state_dicts if s.role != "optimizer"]
    return states[0].path


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    state["count"] = 3
    state["w"] = torch.nn.Parameter(torch.rand(2))
    torch.save({"model": state, "epoch": 3, "kind": complex(1, 2)}, tmp_path / "in.pt")
    answer = json.loads(
        done("convert", "in.pt", "out.pt", "--weights-only", "--json", cwd=tmp_path)
    )
    assert {row["path"] for row in answer["left_out"]} == {"epoch", "kind", "model/count"}
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    del state["count"]
    state["w"] = state["w"].detach()
    assert unlike(state, loaded) is None
    assert loaded._metadata[""] == {"version": 2}


def test_sparse_tensors_stay_as_weights_only_loads_them(tmp_path: Path) -> None:
    sparse = torch.eye(4).to_sparse()
    torch.save({"s": sparse, "w": torch.ones(2)}, tmp_path / "in.pt")
    ckptfix.open(tmp_path / "in.pt").weights_only().save(tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(loaded["s"].to_dense(), torch.eye(4))


def test_a_tensor_that_weights_only_refuses_is_an_error_not_a_loss() -> None:
    document = ckptfix.open(FIXTURES / "cpu.pt").document
    rebuild = Global("torch._utils", "_rebuild_wrapper_subclass")
    theirs = Inert(rebuild, (Global("their_project", "Quantized"), "float32"))
    mapping = {**document.root, "q.weight": theirs}
    with pytest.raises(UnsupportedError, match=r"'q\.weight' is a .*weights_only=True") as refused:
        Checkpoint(replace(document, root=mapping)).weights_only()
    assert str(refused.value.hint) == "keep it: leave out --weights-only"


def test_the_state_dict_that_is_named_becomes_the_root() -> None:
    made = ckptfix.open(FIXTURES / "ema.pt").weights_only("state_dict")
    assert [state.path for state in made.state_dicts] == ["/"]
    with pytest.raises(SelectionError, match="no state dict at 'nope'"):
        ckptfix.open(FIXTURES / "ema.pt").weights_only("nope")


@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_quantized_lstm_packs_are_refused_not_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    torch.save(quantized.state_dict(), tmp_path / "in.pt")
    for out, options in (("out.pt", ["--weights-only"]), ("out.safetensors", [])):
        ran = ckptfix_command("convert", tmp_path / "in.pt", tmp_path / out, *options)
        assert ran.returncode == 2
        assert "_all_weight_values.0.param" in ran.stderr
        assert not (tmp_path / out).exists()
    assert ckptfix_command("fix", tmp_path / "in.pt", tmp_path / "all.pt").returncode == 0
    quantized.load_state_dict(torch.load(tmp_path / "all.pt", weights_only=False))
