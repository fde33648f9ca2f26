"""gzip around a checkpoint, and archives that hold one."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import NotACheckpointError, ReadError, UnsafeError

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


@pytest.mark.parametrize("name", FILES)
def test_gzip_around_a_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress((FIXTURES / name).read_bytes()))
    assert torch.equal(first(path), wanted())


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


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as packed:
        for _ in range(300):
            packed.write(bytes(1 << 20))
    with pytest.raises(UnsafeError, match="unpack"):
        door.read(path)


@pytest.mark.parametrize("times", [2, 1200])
def test_gzip_in_gzip_is_refused_before_it_grows(tmp_path: Path, times: int) -> None:
    data = (FIXTURES / "cpu.pt").read_bytes()
    for _ in range(times):
        data = gzip.compress(data, 1)
    (tmp_path / "deep.gz").write_bytes(data)
    with pytest.raises(UnsafeError, match="gzip inside gzip"):
        door.read(tmp_path / "deep.gz")


def test_a_tar_in_a_tar_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "inner.tar", "w", "cpu.pt")
    with tarfile.open(tmp_path / "outer.tar", "w") as archive:
        archive.add(tmp_path / "inner.tar", arcname="inner.tar")
    with pytest.raises(NotACheckpointError, match="tar archive"):
        door.read(tmp_path / "outer.tar")


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress((FIXTURES / "cpu.pt").read_bytes())
    for size in range(2, len(packed) - 1, 17):
        (tmp_path / "cut.gz").write_bytes(packed[:size])
        with pytest.raises(ReadError):
            door.read(tmp_path / "cut.gz")


@pytest.mark.parametrize("deep", [True, False])
def test_a_zip_that_was_unpacked(tmp_path: Path, deep: bool) -> None:
    with zipfile.ZipFile(FIXTURES / "cpu.pt") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path if deep else tmp_path / "cpu"
    assert torch.equal(first(folder), wanted())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["cpu/", "other/", ""])
def test_a_zip_that_was_packed_again(tmp_path: Path, top: str, method: int) -> None:
    path = tmp_path / "again.pt"
    with zipfile.ZipFile(FIXTURES / "cpu.pt") as old, zipfile.ZipFile(path, "w", method) as new:
        for folder in filter(None, (top, f"{top}data/")):
            new.writestr(folder, b"")
        for name in old.namelist():
            new.writestr(top + name.removeprefix("cpu/"), old.read(name))
    assert torch.equal(first(path), wanted())
    ckptfix.open(path).save(tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt", mmap=True)["linears.0.weight"], wanted())


def test_a_plain_zip_is_no_checkpoint(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    with pytest.raises(NotACheckpointError, match=r"no data\.pkl"):
        door.read(tmp_path / "x.zip")
