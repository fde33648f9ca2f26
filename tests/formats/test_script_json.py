"""TorchScript of PyTorch 1.0, made here by its description, since nothing newer writes it."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import DamagedError, ReadError
from ckptfix.repair.recover import recover

VALUES = torch.arange(6, dtype=torch.float32)
WEIGHT = {
    "dims": ["2", "3"], "strides": ["3", "1"], "dataType": "FLOAT",
    "data": {"key": "tensors/0"}, "device": "cuda:0",
}  # fmt: skip
LAST = {**WEIGHT, "dims": ["2"], "strides": ["1"], "offset": "4"}
CONSTANT = {"dataType": "INT64", "data": {"key": "tensors/1"}, "device": "cpu"}
MODULE = {
    "name": "net",
    "submodules": [
        {"name": "fc", "parameters": [{"name": "weight"}, {"name": "bias", "tensorId": "1"}]}
    ],
}


def write(path: Path, tensors: list[Any], module: Any = MODULE) -> Path:
    model = {"protoVersion": "3", "mainModule": module, "tensors": tensors}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/version", "1")
        archive.writestr("net/tensors/0", VALUES.numpy().tobytes())
        archive.writestr("net/tensors/1", torch.tensor(7).numpy().tobytes())
        archive.writestr("net/model.json", json.dumps(model))
    return path


def test_tensors_by_attribute_path_and_constants_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "net.pt", [WEIGHT, LAST, CONSTANT])
    found = ckptfix.load_state_dict(path)
    assert list(found) == ["fc.weight", "fc.bias", "tensors.2"]
    assert torch.equal(found["fc.weight"], VALUES.view(2, 3))
    assert torch.equal(found["fc.bias"], VALUES[4:])
    assert found["fc.bias"].untyped_storage().data_ptr() == found["fc.weight"].data_ptr()
    assert found["tensors.2"].item() == 7


def test_it_becomes_files_that_torch_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "net.pt", [WEIGHT, LAST, CONSTANT])
    ckptfix.open(path).to_cpu().save(tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(loaded["fc.weight"], VALUES.view(2, 3))


@pytest.mark.parametrize(
    "tensors",
    [
        [{**WEIGHT, "dims": ["9", "9"]}],
        [{**WEIGHT, "strides": ["1"]}],
        [{**WEIGHT, "dataType": "STRING"}],
        [{**WEIGHT, "data": {"key": "tensors/9"}}],
        [{**WEIGHT, "dims": ["-1"]}],
        ["text"],
        [],
        7,
    ],
)
def test_what_is_described_wrongly_is_refused(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(ReadError):
        door.read(write(tmp_path / "net.pt", tensors))


@pytest.mark.parametrize("module", [7, {"parameters": [{}]}, {"submodules": [{"name": "x"}, 3]}])
def test_a_module_that_is_none_is_refused(tmp_path: Path, module: Any) -> None:
    with pytest.raises(ReadError):
        door.read(write(tmp_path / "net.pt", [WEIGHT], module))


def test_what_is_whole_of_it_is_recovered(tmp_path: Path) -> None:
    path = write(tmp_path / "net.pt", [WEIGHT, LAST, CONSTANT])
    found = recover(path)
    assert (found.saved, found.lost) == (3, [])
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "less.pt", "w") as new:
        for name in set(old.namelist()) - {"net/tensors/0"}:
            new.writestr(name, old.read(name))
    with pytest.raises(DamagedError, match="lacks 'tensors/0'"):
        door.read(tmp_path / "less.pt")
    found = recover(tmp_path / "less.pt")
    assert (found.saved, found.lost) == (1, ["fc.weight", "fc.bias"])
    cut = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(cut[: cut.rindex(b"PK\1\2")])
    assert recover(tmp_path / "cut.pt").lost == []
