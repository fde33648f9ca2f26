"""Whole pickled models, whose classes need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import UnsupportedError
from fixtures.make import their_project

FIXTURES = Path(__file__).parents[2] / "fixtures"


class Net(nn.Module):
    """Parameters, buffers of both kinds, a child that is None, a shared child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(3.0))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.body
        self.nothing = None


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
def test_the_state_dict_of_a_model(tmp_path: Path, wrap, zipped: bool) -> None:
    net = wrap(Net())
    torch.save(net, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert same(ckptfix.load_state_dict(tmp_path / "net.pt"), net.state_dict())
    assert ckptfix.load_into(Net(), tmp_path / "net.pt").loads


def test_the_class_need_not_be_there() -> None:
    with their_project():
        wanted = torch.load(FIXTURES / "whole_module.pt", weights_only=False).state_dict()
    assert same(ckptfix.load_state_dict(FIXTURES / "whole_module.pt"), wanted)


def test_it_converts_and_says_what_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    source = FIXTURES / "whole_module.pt"
    command = [sys.executable, "-m", "ckptfix", "convert", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "their_project.models.TheirNet, apart from its weights" in done.stderr
    assert same(ckptfix.load_state_dict(out), ckptfix.load_state_dict(FIXTURES / "whole_module.pt"))


def test_its_keys_cannot_be_renamed_in_the_model(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(Net()), tmp_path / "net.pt")
    with pytest.raises(UnsupportedError, match="keys") as caught:
        ckptfix.open(tmp_path / "net.pt").strip_prefix()
    assert "convert" in str(caught.value.hint)


def test_torchscript_by_attribute_path(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        torch.jit.trace(net, torch.ones(1, 3)).save(tmp_path / "net.pt")
    found = ckptfix.load_state_dict(tmp_path / "net.pt")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())


def test_a_model_that_holds_itself_ends(tmp_path: Path) -> None:
    net = Net()
    torch.save({"net": net, "twin": net}, tmp_path / "net.pt")
    assert same(ckptfix.load_state_dict(tmp_path / "net.pt"), net.state_dict())
