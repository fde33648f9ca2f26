"""Damage of every kind: what is whole is saved, what is lost is named, nothing is passed over."""

import gzip
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import ckptfix
from ckptfix.errors import CkptfixError
from ckptfix.repair.recover import Recovered, recover

NAMES = [f"layer{index}.weight" for index in range(6)]
KINDS = ["zip", "ours", "legacy", "safetensors"]
CHECKED = ["zip", "ours"]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(40, 10, generator=generator) for name in NAMES}


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        safetensors.torch.save_file(weights(), path)
    elif kind == "ours":
        ckptfix.save({"model": weights(), "epoch": 3}, path.with_suffix(".pt"))
        path.with_suffix(".pt").rename(path)
    else:
        value = {"model": weights(), "epoch": 3}
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def tensors(found: Recovered, folder: Path) -> dict[str, torch.Tensor]:
    from ckptfix import door

    door.write(found.document, folder / "saved.pt", force=True)
    loaded = torch.load(folder / "saved.pt", weights_only=True)
    return loaded.get("model", loaded)  # type: ignore[no-any-return]


def short(lost: list[str]) -> set[str]:
    return {name.rpartition("/")[2] for name in lost}


def test_a_whole_file_is_saved_whole(tmp_path: Path, kind: str) -> None:
    found = recover(write(tmp_path / "whole", kind))
    assert (found.lost, found.saved) == ([], len(NAMES))
    assert all(torch.equal(tensors(found, tmp_path)[name], weights()[name]) for name in NAMES)


def test_truncation_keeps_every_tensor_that_is_there(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "whole", kind).read_bytes()
    ends = {name: data.find(weights()[name].numpy().tobytes()) + 1600 for name in NAMES}
    saved_once = 0
    for size in sorted(random.Random(1).sample(range(1, len(data)), 200)):
        (tmp_path / "cut").write_bytes(data[:size])
        whole = {name for name in NAMES if ends[name] + (16 if kind == "zip" else 0) <= size}
        try:
            found = recover(tmp_path / "cut")
        except CkptfixError:
            assert not whole, size
            continue
        saved = tensors(found, tmp_path)
        assert set(saved) == set(NAMES) - short(found.lost)
        assert whole <= set(saved), size
        assert all(torch.equal(saved[name], weights()[name]) for name in saved)
        saved_once += bool(saved)
    assert saved_once > 50


def test_a_flipped_byte_never_passes_in_silence(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "whole", kind).read_bytes()
    for place in random.Random(2).sample(range(len(data)), 200):
        flipped = bytearray(data)
        flipped[place] ^= 0x40
        (tmp_path / "flip").write_bytes(flipped)
        try:
            found = recover(tmp_path / "flip")
        except CkptfixError:
            continue
        saved = tensors(found, tmp_path)
        wrong = [n for n in saved if n in NAMES and not torch.equal(saved[n], weights()[n])]
        assert not wrong or (kind not in CHECKED and found.unchecked), place


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "recover", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_names_what_is_lost_and_what_is_missing(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "whole.pt", kind)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-3000])
    done = run(tmp_path / "cut.pt", tmp_path / "out.pt", "--like", whole)
    assert done.returncode == 1, done.stderr
    assert "saved" in done.stdout
    assert "): lost" in done.stderr
    assert "): missing" in done.stderr
    assert torch.load(tmp_path / "out.pt", weights_only=True)


def test_nothing_to_save_leaves_nothing(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "whole", kind).read_bytes()
    (tmp_path / "cut").write_bytes(data[:100])
    done = run(tmp_path / "cut", tmp_path / "out.pt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out.pt").exists()


def test_a_folder_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(CkptfixError, match="is a folder") as caught:
        recover(tmp_path)
    assert (
        str(caught.value.hint) == f"recover its files one by one; see what is there: ls {tmp_path}"
    )


@pytest.mark.parametrize("packing", ["gzip", "tar"])
@pytest.mark.parametrize("cut", [0.4, 0.6, 0.9, 1.0])
def test_what_is_whole_in_a_packed_file_that_is_cut_is_saved(
    tmp_path: Path, packing: str, cut: float
) -> None:
    inner = write(tmp_path / "in.pt", "zip").read_bytes()
    with tarfile.open(tmp_path / "packed", "w") as archive:
        archive.add(tmp_path / "in.pt", "in.pt")
    if packing == "gzip":
        (tmp_path / "packed").write_bytes(gzip.compress(inner, 0))  # stored: lies there as it is
    data = (tmp_path / "packed").read_bytes()
    end = data.rfind(b"PK\5\6")
    data = data[: int(end * cut)] if cut < 1 else data
    (tmp_path / "packed").write_bytes(data)
    whole = {name for name in NAMES if weights()[name].numpy().tobytes() in data}
    found = recover(tmp_path / "packed")
    saved = tensors(found, tmp_path)
    assert saved.keys() | short(found.lost) == set(NAMES)
    assert saved.keys() >= whole
    assert all(torch.equal(saved[name], weights()[name]) for name in saved)
    assert (cut == 1.0) == (not found.lost)


def test_a_tensor_is_whole_wherever_a_cut_falls_in_what_follows_it(tmp_path: Path) -> None:
    data = write(tmp_path / "in.pt", "zip").read_bytes()
    raw = weights()[NAMES[1]].numpy().tobytes()
    end = data.find(raw) + len(raw)
    for cut in range(end - 2, end + 30):
        (tmp_path / "in.pt").write_bytes(data[:cut])
        found = recover(tmp_path / "in.pt")
        saved = tensors(found, tmp_path)
        assert (NAMES[1] in saved) == (cut >= end)
        assert all(torch.equal(saved[name], weights()[name]) for name in saved)
        assert found.unchecked == (end <= cut < end + 16)


def test_gzip_whose_checksum_is_wrong_is_said_to_be_damaged(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(write(tmp_path / "in.pt", "legacy").read_bytes(), 0))
    (tmp_path / "in.pt").write_bytes(data)
    assert not any("damaged" in step for step in recover(tmp_path / "in.pt").steps)
    data[data.find(weights()[NAMES[2]].numpy().tobytes()) + 7] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    found = recover(tmp_path / "in.pt")
    assert any("damaged" in step for step in found.steps)
    assert found.unchecked == found.saved


# --- bytes that are missing amidst, or are too many


def legacy(path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A legacy file of many storages, and where the count and the bytes of each lie."""
    pairs = zip("abcdefgh", torch.randn(8, 50), strict=True)
    state = {name: tensor.clone() for name, tensor in pairs}
    state["step"], state["empty"] = torch.tensor(1), torch.empty(0)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    places = {}
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        at = data.rfind(raw) if name != "step" else data.rfind(b"\1" + bytes(7) + raw) + 8
        places[name] = (at - 8, at + len(raw))
    return data, {name: place for name, place in places.items() if name != "empty"}


@pytest.mark.parametrize("size", [1, 8, 64, 300, 500])
@pytest.mark.parametrize("extra", [b"", b"\r" * 3])
def test_a_hole_in_a_legacy_file_costs_only_what_lay_in_it(
    tmp_path: Path, size: int, extra: bytes
) -> None:
    data, places = legacy(tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    first = min(begin for begin, _ in places.values())
    saved_once = 0
    for begin in range(first, len(data) - size - 500, 37):
        (tmp_path / "hole.pt").write_bytes(data[:begin] + extra + data[begin + size :])
        found = recover(tmp_path / "hole.pt")
        saved = tensors(found, tmp_path)
        assert saved.keys() | set(found.lost) == set(whole)
        told = any("may be exchanged" in step for step in found.steps)  # the counts fit twice
        assert told or all(torch.equal(saved[name], whole[name]) for name in saved), begin
        before = {name for name, (_, end) in places.items() if end + 40 < begin}
        behind = {name for name, (start, _) in places.items() if start > begin + size + 208}
        assert before <= saved.keys(), begin
        assert told or behind <= saved.keys(), begin
        saved_once += bool(before and behind)
    assert saved_once > 5


def test_a_hole_as_long_as_a_storage_is_said_to_fit_twice(tmp_path: Path) -> None:
    alike = {f"k{index}": torch.full((50,), float(index)) for index in range(8)}
    torch.save(alike, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "whole.pt").read_bytes()
    for begin in (len(data) - 900, len(data) - 216, len(data) - 209):
        (tmp_path / "hole.pt").write_bytes(data[:begin] + data[begin + 208 :])
        steps = recover(tmp_path / "hole.pt").steps
        assert any("tensors may be exchanged" in step for step in steps)
    (tmp_path / "cut.pt").write_bytes(data[:-230])
    assert not any("exchanged" in step for step in recover(tmp_path / "cut.pt").steps)


def test_bytes_behind_the_end_of_safetensors_are_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", "safetensors")
    path.write_bytes(path.read_bytes() + b"tail")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    done = subprocess.run(
        [sys.executable, "-m", "ckptfix", "check", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "hint: " in done.stderr
    assert f"ckptfix recover {path}" in done.stderr
    done = run(path, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "4 bytes follow the last tensor" in done.stderr
    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], weights()[name]) for name in NAMES)


def test_a_hole_between_tensors_of_safetensors_costs_none(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", "safetensors")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    last = max(NAMES, key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 12, end + 12]
    made = json.dumps(header).encode()
    at = start + begin
    path.write_bytes(
        len(made).to_bytes(8, "little") + made + data[start:at] + b"x" * 12 + data[at:]
    )
    with pytest.raises(CkptfixError, match="leaves a hole"):
        ckptfix.open(path)
    found = recover(path)
    assert found.lost == []
    assert any("leaves a hole" in step for step in found.steps)
    saved = tensors(found, tmp_path)
    assert all(torch.equal(saved[name], weights()[name]) for name in NAMES)


def test_a_count_that_fits_from_both_ends_tells_nothing(tmp_path: Path) -> None:
    """A number 1 behind its count 1: with 8 bytes missing before it, one stands for the other."""
    path = tmp_path / "in.pt"
    for _ in range(20):  # storages stand in the order of their addresses
        whole = {"a": torch.randn(50), "step": torch.tensor(1), "b": torch.randn(50)}
        torch.save(whole, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        for name in ("a", "b"):
            begin = data.rfind(whole[name].numpy().tobytes()) + 64
            (tmp_path / "hole.pt").write_bytes(data[:begin] + data[begin + 8 :])
            found = recover(tmp_path / "hole.pt")
            saved = tensors(found, tmp_path)
            told = any("may be exchanged" in step for step in found.steps)
            assert told or all(torch.equal(saved[key], whole[key]) for key in saved)
