"""gzip around a checkpoint: unpacked within bounds, refused where it is cut or grows."""

import gzip
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import ReadError, UnsafeError

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = ["cpu.pt", "legacy.pt", "plain.safetensors"]


def wanted() -> torch.Tensor:
    found: torch.Tensor = torch.load(FIXTURES / "cpu.pt")["linears.0.weight"]
    return found


def first(path: Path) -> torch.Tensor:
    return ckptfix.load_state_dict(path)["linears.0.weight"]


@pytest.mark.parametrize("name", FILES)
def test_gzip_around_a_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress((FIXTURES / name).read_bytes()))
    assert torch.equal(first(path), wanted())


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


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress((FIXTURES / "cpu.pt").read_bytes())
    for size in range(2, len(packed) - 1, 17):
        (tmp_path / "cut.gz").write_bytes(packed[:size])
        with pytest.raises(ReadError):
            door.read(tmp_path / "cut.gz")
