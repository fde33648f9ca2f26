"""gzip around a checkpoint: unpacked within bounds, refused where it is cut or grows."""

import gzip
import pickle
from pathlib import Path

import pytest
import safetensors.torch
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


def save(path: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    if kind == "plain":
        arrays = {key: tensor.numpy() for key, tensor in weights.items()}
        path.write_bytes(pickle.dumps(arrays))
    elif kind == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "plain"])
def test_what_stays_small_may_grow_as_it_likes(tmp_path: Path, kind: str) -> None:
    weights = {"w": torch.zeros(9 << 20), "b": torch.arange(9.0)}
    save(tmp_path / "in", kind, weights)
    data = (tmp_path / "in").read_bytes()
    packed = gzip.compress(data)
    assert len(data) > 500 * len(packed)
    (tmp_path / "in.gz").write_bytes(packed)
    found = ckptfix.load_state_dict(tmp_path / "in.gz")
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_many_objects_in_a_few_bytes_are_refused(tmp_path: Path) -> None:
    for body in (b"}" * 500_000, b"]" * 500_000):  # framed, as protocol 4 has it, or not
        for frame in (b"", b"\x95" + (len(body) + 3).to_bytes(8, "little")):
            data = gzip.compress(b"\x80\x04" + frame + b"(" + body + b"l.")
            (tmp_path / "in.gz").write_bytes(data)
            with pytest.raises(UnsafeError, match="opcodes"):
                door.read(tmp_path / "in.gz")
