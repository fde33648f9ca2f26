"""The library as a user meets it: the examples of the docs, and every public name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from ckptfix.errors import OutputExistsError, SelectionError, UnsupportedError
from fixtures.foonet import FooNet
from tests.conftest import FIXTURES
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path


def test_every_public_name_is_there_and_documented():
    for name in ckptfix._HOME_OF:
        assert getattr(ckptfix, name).__doc__
        assert name in dir(ckptfix)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(ckptfix, "nothing")  # noqa: B009


def test_opening_editing_and_saving_import_no_torch(tmp_path: Path):
    code = (
        "import sys, ckptfix\n"
        "ckpt = ckptfix.open(sys.argv[1])\n"
        "ckpt.findings, ckpt.state_dicts, ckpt.container\n"
        "ckpt.strip_prefix().to_cpu().save(sys.argv[2])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    source, target = FIXTURES / "dataparallel_cuda.pt", tmp_path / "out.safetensors"
    subprocess.run([sys.executable, "-c", code, str(source), str(target)], check=True)
    FooNet(4, 3).load_state_dict(safetensors.torch.load_file(target))


def test_the_example_of_the_documentation(tmp_path: Path):
    net = FooNet(4, 3)
    path = tmp_path / "ddp_cuda.pt"
    shutil.copy(FIXTURES / "dataparallel_cuda.pt", path)
    net.load_state_dict(ckptfix.load_state_dict(path, model=net))
    assert ckptfix.load_into(net, path).identical
    ckptfix.open(path).strip_prefix().to_cpu().save(tmp_path / "out.safetensors")
    expected = dict(net.state_dict())
    assert unlike(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected) is None


def test_a_checkpoint_tells_what_is_in_it():
    opened = ckptfix.open(FIXTURES / "dataparallel_cuda_training.pt")
    assert opened.container == "torch zip"
    assert [(state.path, state.role) for state in opened.state_dicts] == [
        ("model_state_dict", "model"),
        ("optimizer_state_dict", "optimizer"),
    ]
    assert [finding.code for finding in opened.findings] == ["device-tag", "prefix-wrapper"]


def test_each_edit_gives_another_checkpoint_and_none_changes_the_first():
    opened = ckptfix.open(FIXTURES / "dataparallel_cuda.pt")
    keys = list(opened.state_dicts[0].mapping)
    bare = opened.strip_prefix()
    assert list(bare.state_dicts[0].mapping) == [key.removeprefix("module.") for key in keys]
    assert all(key.startswith("net.") for key in bare.add_prefix("net.").state_dicts[0].mapping)
    assert [finding.code for finding in bare.to_cpu().findings] == []
    assert list(opened.state_dicts[0].mapping) == keys


def test_select_takes_one_name_or_several(tmp_path: Path):
    wrapped = nn.DataParallel(FooNet(2, 1)).state_dict()
    copies = [{key: value.clone() for key, value in wrapped.items()} for _ in range(2)]
    torch.save({"a": wrapped, "b": copies[0], "c": copies[1]}, tmp_path / "in.pt")
    opened = ckptfix.open(tmp_path / "in.pt")

    def changed(checkpoint: ckptfix.Checkpoint) -> list[str]:
        return [s.path for s in checkpoint.state_dicts if "linears.0.weight" in s.mapping]

    assert changed(opened.strip_prefix(select="b")) == ["b"]
    assert changed(opened.strip_prefix(select=["a", "c"])) == ["a", "c"]
    assert changed(opened.strip_prefix()) == ["a", "b", "c"]
    assert list(opened.select("b").document.root) == ["module.linears.0.weight"]
    with pytest.raises(SelectionError, match="there is a, b, c"):
        opened.strip_prefix(select="d")
    with pytest.raises(SelectionError, match="holds 3 state dicts"):
        opened.add_prefix()


def test_check_compares_with_a_model_as_the_keys_stand():
    net = FooNet(4, 3)
    assert ckptfix.check(net, FIXTURES / "cpu.pt").identical
    report = ckptfix.check(net, FIXTURES / "ddp.pt")
    assert (len(report.missing), len(report.unexpected)) == (3, 3)
    assert ckptfix.open(FIXTURES / "ema.pt").check(net, select="state_dict_ema").loads


def test_saving_says_what_is_left_out_and_never_overwrites(tmp_path: Path):
    opened = ckptfix.open(FIXTURES / "uninstalled_class.pt")
    target = tmp_path / "out.safetensors"
    assert opened.save(target) == [("hparams", "dict of 5")]
    before = target.read_bytes()
    with pytest.raises(OutputExistsError):
        opened.save(target)
    assert target.read_bytes() == before
    opened.save(target, force=True)
    assert opened.save(tmp_path / "out.pt") == []


def test_saving_what_a_program_holds(tmp_path: Path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert ckptfix.save({"net": net.state_dict(), "epoch": 3}, tmp_path / "a.pt") == []
    loaded = torch.load(tmp_path / "a.pt")
    assert unlike(loaded, {"net": net.state_dict(), "epoch": 3}) is None
    left_out = ckptfix.save({"net": net.state_dict(), "epoch": 3}, tmp_path / "a.safetensors")
    assert left_out == [("epoch", "int")]
    ckptfix.save(ckptfix.open(tmp_path / "a.pt"), tmp_path / "b.pt")
    assert unlike(torch.load(tmp_path / "b.pt"), loaded) is None
    with pytest.raises(UnsupportedError, match=r"torch\.nn"):
        ckptfix.save(net, tmp_path / "c.pt")


def test_limits_are_the_callers_choice(tmp_path: Path):
    with pytest.raises(ckptfix.CkptfixError):
        ckptfix.open(FIXTURES / "cpu.pt", limits=ckptfix.Limits(pickle_bytes=10))
