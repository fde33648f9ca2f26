"""Tar archives that hold a checkpoint: the one in them, or a list of several."""

import tarfile
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import NotACheckpointError

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = ["cpu.pt", "legacy.pt", "plain.safetensors"]


def wanted() -> torch.Tensor:
    found: torch.Tensor = torch.load(FIXTURES / "cpu.pt")["linears.0.weight"]
    return found


def first(path: Path) -> torch.Tensor:
    return ckptfix.load_state_dict(path)["linears.0.weight"]


def tar(path: Path, mode: str, *names: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in names:
            archive.add(FIXTURES / name, arcname=f"folder/{name}")
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("name", FILES)
def test_an_archive_of_one_checkpoint(tmp_path: Path, name: str, mode: str) -> None:
    path = tar(tmp_path / "model.tar.gz", mode, name, "README.md", "make.py")
    assert torch.equal(first(path), wanted())


def test_an_archive_of_two_lists_them(tmp_path: Path) -> None:
    path = tar(tmp_path / "models.tar", "w", "cpu.pt", "legacy.pt")
    with pytest.raises(NotACheckpointError, match=r"cpu\.pt.*legacy\.pt") as caught:
        door.read(path)
    assert "tar xf" in str(caught.value.hint)


def test_a_tar_in_a_tar_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "inner.tar", "w", "cpu.pt")
    with tarfile.open(tmp_path / "outer.tar", "w") as archive:
        archive.add(tmp_path / "inner.tar", arcname="inner.tar")
    with pytest.raises(NotACheckpointError, match="tar archive"):
        door.read(tmp_path / "outer.tar")
