"""Whole pickled models, whose classes need not be there."""

import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import UnsupportedError
from fixtures.make import their_project
from tests.oracles import ckptfix_command, done

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
    assert "ckptfix fix" in str(caught.value.hint)


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


def _quantized() -> nn.Module:
    from torch.ao import quantization

    net = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 3), quantization.DeQuantStub())
    net.eval().qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(net, inplace=True)
    net(torch.rand(2, 4))
    quantization.convert(net, inplace=True)
    return nn.Sequential(nn.Linear(2, 2), net)


def _dynamically_quantized() -> nn.Module:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Linear(4, 3))
    made: nn.Module = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    return made


class Unknown(nn.Module):
    """Pickled as a call of which nobody knows what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def __reduce__(self) -> Any:
        return rebuilt, (self.weight,)


def rebuilt(weight: nn.Parameter) -> Unknown:
    return Unknown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (_quantized, "1.1 (torch.ao.nn.quantized"),
        (_dynamically_quantized, "1 (torch.ao.nn.quantized.dynamic"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), Unknown()),
            "1 (tests.contents.test_modules.rebuilt",
        ),
    ],
)
@pytest.mark.parametrize("options", [(), ("--weights-only",)])
def test_a_model_is_never_taken_without_what_a_class_keeps_elsewhere(
    tmp_path: Path, make: Any, part: str, options: tuple[str, ...]
) -> None:
    torch.save({"model": make(), "epoch": 1}, tmp_path / "net.pt")
    out = tmp_path / ("out.pt" if options else "out.safetensors")
    ran = ckptfix_command("convert", tmp_path / "net.pt", out, *options)
    assert ran.returncode == 2, ran.stderr
    assert "keeps weights in a way that is not known" in ran.stderr
    assert part in ran.stderr
    assert not out.exists()
    with pytest.raises(UnsupportedError, match="not known"):
        ckptfix.load_state_dict(tmp_path / "net.pt")
    assert "unknown-state" in done("inspect", tmp_path / "net.pt")


class Persistent(Net):
    """Pickled as a call that is given its state and its source, as StyleGAN does it."""

    def __reduce__(self) -> Any:
        meta = OrderedDict(type="class", module_src="class Net: ...", state=dict(self.__dict__))
        return reconstructed, (meta,)


def reconstructed(meta: Any) -> nn.Module:
    raise AssertionError("code of the file was run")


def test_a_model_that_is_pickled_with_its_source_gives_its_tensors(tmp_path: Path) -> None:
    net = Persistent()
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"G": net, "D": None, "G_ema": Persistent()}))
    assert same(ckptfix.load_state_dict(tmp_path / "net.pkl"), net.state_dict())
    assert ckptfix.load_into(Net(), tmp_path / "net.pkl").loads


def test_what_a_frozen_program_holds_is_shown(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval())
        torch.jit.freeze(net).save(tmp_path / "net.pt")
    shown = done("inspect", tmp_path / "net.pt")
    assert "4 tensors of 92 bytes are constants of the program" in shown
    ran = ckptfix_command("convert", tmp_path / "net.pt", tmp_path / "out.safetensors")
    assert ran.returncode == 2
    assert "its 4 tensors are constants of a frozen TorchScript program" in ran.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_constants_on_another_device_are_not_called_those_of_the_cpu(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.script(nn.Sequential(nn.Linear(4, 3)).eval())
        torch.jit.freeze(net).save(tmp_path / "cpu.pt")
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as old,
        zipfile.ZipFile(tmp_path / "net.pt", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("constants.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, data)
    ran = ckptfix_command("to-cpu", tmp_path / "net.pt", tmp_path / "out.pt")
    assert ran.returncode == 2
    assert "is a TorchScript program with constants on cuda:0" in ran.stderr
