"""A torch zip that someone unpacked into a folder."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix.errors import DamagedError, ReadError
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


def unpacked(folder: Path, *names: str) -> Path:
    """A folder of unpacked archives."""
    for name in names:
        torch.save({"a": torch.ones(2), "b": torch.ones(3)}, folder / f"{name}.pt")
        with zipfile.ZipFile(folder / f"{name}.pt") as archive:
            archive.extractall(folder / "folder")
    return folder / "folder"


RECORDS = ["version", "byteorder", ".format_version", ".data/serialization_id"]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("record", [*RECORDS, "data/0", "data/1"])
def test_whatever_record_it_lacks_the_rest_is_recovered(
    tmp_path: Path, record: str, deep: bool
) -> None:
    folder = unpacked(tmp_path, "in")
    (folder / "in" / record).unlink()
    torch.save({"other": torch.ones(1)}, folder / "beside.pt")
    found = recover(folder if deep else folder / "in")
    lost = {"data/0": ["a"], "data/1": ["b"]}.get(record, [])
    assert found.lost == lost
    assert list(found.document.root) == [key for key in "ab" if key not in lost]


@pytest.mark.parametrize("deep", [True, False])
def test_without_its_pickle_it_is_called_what_it_is(tmp_path: Path, deep: bool) -> None:
    folder = unpacked(tmp_path, "in")
    (folder / "in" / "data.pkl").unlink()
    for read in (ckptfix.open, recover):
        with pytest.raises(DamagedError, match=r"unpacked, and lacks data\.pkl"):
            read(folder if deep else folder / "in")


def test_several_in_one_folder_are_listed(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, "first", "second")
    for read in (ckptfix.open, recover):
        with pytest.raises(ReadError, match="2 archives that were unpacked: first, second"):
            read(folder)
