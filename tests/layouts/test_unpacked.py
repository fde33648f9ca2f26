"""A torch zip that someone unpacked into a folder."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix.errors import DamagedError
from ckptfix.repair.recover import recover

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = ["cpu.pt", "legacy.pt", "plain.safetensors"]


def wanted() -> torch.Tensor:
    found: torch.Tensor = torch.load(FIXTURES / "cpu.pt")["linears.0.weight"]
    return found


def first(path: Path) -> torch.Tensor:
    return ckptfix.load_state_dict(path)["linears.0.weight"]


@pytest.mark.parametrize("deep", [True, False])
def test_a_zip_that_was_unpacked(tmp_path: Path, deep: bool) -> None:
    with zipfile.ZipFile(FIXTURES / "cpu.pt") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path if deep else tmp_path / "cpu"
    assert torch.equal(first(folder), wanted())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_its_records_are_opened_when_their_bytes_are_wanted(tmp_path: Path) -> None:
    torch.save({f"w{index}": torch.ones(2) for index in range(300)}, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        archive.extractall(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    document = ckptfix.open(tmp_path / "in").document
    assert len(os.listdir("/proc/self/fd")) - before < 5
    assert len(document.root) == 300


def test_what_is_whole_of_it_is_recovered(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "in" / "data" / "1").unlink()
    with pytest.raises(DamagedError, match="lacks"):
        ckptfix.open(tmp_path / "in")
    found = recover(tmp_path / "in")
    assert (list(found.document.root), found.lost) == (["a"], ["b"])
