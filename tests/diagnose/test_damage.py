"""Reading every byte: checksums, NaN and infinities."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptfix import door
from ckptfix.diagnose.damage import read_data
from ckptfix.tree.walk import storages

FIXTURES = Path(__file__).parents[2] / "fixtures"
FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2,
    torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinities_are_counted_by_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0]).to(dtype)
    weights = {"bad": values, "turned": torch.stack([values, values]).t(), "good": torch.ones(3)}
    torch.save({"model": weights}, tmp_path / "in.pt")
    found = read_data(door.read(tmp_path / "in.pt"))
    assert found.nan == {"model/bad": 1, "model/turned": 2}
    assert found.inf == {"model/bad": 2, "model/turned": 4}
    assert found.is_sound


def test_a_large_tensor_is_counted_to_its_end(tmp_path: Path) -> None:
    values = torch.zeros((1 << 22) + 5)
    values[-1] = float("nan")
    torch.save({"w": values}, tmp_path / "in.pt")
    assert read_data(door.read(tmp_path / "in.pt")).nan == {"w": 1}


def test_a_flipped_byte_is_damage(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0), "b": torch.ones(3)}, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[data.find(torch.arange(100.0).numpy().tobytes()) + 7] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    found = read_data(door.read(tmp_path / "in.pt"))
    assert (found.verified, len(found.damaged), found.is_sound) == (1, 1, False)
    assert "'0'" in found.damaged[0]


@pytest.mark.parametrize("name", ["legacy.pt", "plain.safetensors"])
def test_no_checksums_is_not_damage(name: str) -> None:
    found = read_data(door.read(FIXTURES / name))
    assert (found.verified, found.unverified, found.is_sound) == (0, 3, True)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "check", "--read-data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_reads_the_data_on_request(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "in.pt")
    done = run(tmp_path / "in.pt", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["sound"], answer["data"]["nan"]) == (0, True, {"w": 1})
    assert [row["code"] for row in answer["findings"]] == ["nan-values"]


@pytest.mark.parametrize("name", ["cpu.pt", "resnet18_dataparallel_cuda.pt"])
def test_check_never_passes_a_flipped_byte_of_a_tensor(tmp_path: Path, name: str) -> None:
    document = door.read(FIXTURES / name)
    spans = [span for storage in storages(document.root) for span in storage.spans if span.length]
    for span in random.Random(3).sample(spans, min(len(spans), 12)):
        data = bytearray((FIXTURES / name).read_bytes())
        data[span.offset + span.length // 2] ^= 0x10
        (tmp_path / "flip.pt").write_bytes(data)
        assert not read_data(door.read(tmp_path / "flip.pt")).is_sound
    done = run(tmp_path / "flip.pt")
    assert done.returncode == 1
    assert "checksum" in done.stdout
    assert "ckptfix recover" in done.stderr
