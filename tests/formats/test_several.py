"""Several saves in one file: told apart, listed, never mixed; torch is the oracle of each."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from ckptfix import door
from ckptfix.errors import ReadError
from ckptfix.repair.recover import recover

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ["zip", "legacy"]


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((30, 20), value), "b": torch.full((200,), value + 0.5)}


def saved(value: Any, kind: str = "zip") -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=kind == "zip")
    return made.getvalue()


def tensors(path: Path, archive: int | None, folder: Path) -> dict[str, torch.Tensor]:
    found = recover(path, archive)
    assert not found.lost
    door.write(found.document, folder / "saved.pt", force=True)
    loaded: dict[str, torch.Tensor] = torch.load(folder / "saved.pt", weights_only=True)
    return loaded


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "recover", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_each_of_several_saves_is_taken_by_its_number(
    kind: str, count: int, tmp_path: Path
) -> None:
    parts = [saved(state(float(number)), kind) for number in range(count)]
    path = tmp_path / "several.pt"
    path.write_bytes(b"".join(parts))
    with pytest.raises(ReadError, match=f"holds {count} archives") as caught:
        recover(path)
    begins = [sum(map(len, parts[:number])) for number in range(count)]
    for number, begin in enumerate(begins[:20], 1):
        assert caught.value.details[number - 1].startswith(f"  {number}  at byte {begin:,}: ")
    for number in {1, 2, count}:
        found, wanted = tensors(path, number, tmp_path), state(number - 1.0)
        assert list(found) == list(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [40, 400, 700])
def test_the_last_of_them_may_be_cut_short(kind: str, cut: int, tmp_path: Path) -> None:
    whole = saved(state(1.0), kind)
    path = tmp_path / "cut.pt"
    path.write_bytes(whole + saved(state(2.0), kind)[:-cut])
    with pytest.raises(ReadError, match="holds 2 archives"):
        recover(path)
    assert torch.equal(tensors(path, 1, tmp_path)["w"], state(1.0)["w"])
    document = recover(path, 2).document
    door.write(document, tmp_path / "second.pt")
    second = torch.load(tmp_path / "second.pt", weights_only=True)
    assert second
    assert all(torch.equal(second[key], state(2.0)[key]) for key in second)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_them_may_be_cut_short(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    cut = 1200 if kind == "zip" else 400
    path.write_bytes(saved(state(1.0), kind)[:-cut] + saved(state(2.0), kind))
    with pytest.raises(ReadError, match="holds 2 archives"):
        recover(path)
    assert torch.equal(tensors(path, 2, tmp_path)["w"], state(2.0)["w"])
    first = recover(path, 1)
    assert first.saved + len(first.lost) == 2


def test_a_shorter_save_over_a_longer_one_is_not_mixed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "over.pt"
    path.write_bytes(saved({f"k{index}": torch.full((99,), 1.0) for index in range(9)}))
    shorter = {"k0": torch.full((99,), 2.0), "k1": torch.full((99,), 3.0)}
    with path.open("r+b") as file:
        torch.save(shorter, file)
    with pytest.raises(ReadError, match="holds 2 archives"):
        recover(path)
    found = tensors(path, 1, tmp_path)
    assert list(found) == list(shorter)
    assert all(torch.equal(found[key], shorter[key]) for key in shorter)


def test_an_archive_in_a_tensor_of_another_is_no_second_one(tmp_path: Path) -> None:
    inner = torch.frombuffer(bytearray(saved(state(1.0)) * 2), dtype=torch.uint8)
    path = tmp_path / "outer.pt"
    for surplus in (b"", b"rubbish"):
        path.write_bytes(saved({"inner": inner, "w": torch.ones(3)}) + surplus)
        found = tensors(path, None, tmp_path)
        assert torch.equal(found["inner"], inner)
    assert any("7 bytes follow" in step for step in recover(path).steps)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_file_of_a_distributed_checkpoint_is_not_one_archive(tmp_path: Path) -> None:
    save_distributed(
        {"model": state(1.0), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    (inside,) = (tmp_path / "dcp").glob("*.distcp")
    path = inside.rename(tmp_path / "alone.pt")
    done = run(path, tmp_path / "out.pt")
    assert done.returncode == 2
    assert "holds 3 archives" in done.stderr
    assert done.stderr.count("  at byte ") == 3
    assert not (tmp_path / "out.pt").exists()


def test_the_command_lists_them_and_takes_one(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    path.write_bytes(saved(state(1.0)) + saved(state(2.0)))
    out = tmp_path / "out.pt"
    done = run(path, out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == 1
    assert "  2  at byte " in done.stderr
    assert not out.exists()
    assert json.loads(run(path, out, "--json").stdout)["error"]["code"] == "several-archives"
    assert run(path, out, "--archive", "3").returncode == 2
    assert run(path, out, "--archive", "0").returncode == 2
    done = run(path, out, "--archive", "2")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out, weights_only=True)["w"], state(2.0)["w"])


def test_what_cannot_hold_several_has_no_numbers(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(state(1.0), tmp_path / "in.safetensors")
    done = run(tmp_path / "in.safetensors", tmp_path / "out.pt", "--archive", "1")
    assert (done.returncode, (tmp_path / "out.pt").exists()) == (2, False)
    (tmp_path / "one.pt").write_bytes(saved(state(1.0)))
    assert run(tmp_path / "one.pt", tmp_path / "out.pt", "--archive", "1").returncode == 0
    assert run(tmp_path / "one.pt", tmp_path / "out2.pt", "--archive", "2").returncode == 2


def test_reading_such_a_file_says_how_to_list_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    path.write_bytes(saved(state(1.0)) + saved(state(2.0)))
    with pytest.raises(ReadError) as caught:
        door.read(path)
    assert f"ckptfix recover {path}" in str(caught.value.hint)


@pytest.mark.parametrize("first", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("second", ["zip", "legacy", "safetensors"])
def test_saves_of_two_kinds_are_never_taken_for_one(
    first: str, second: str, tmp_path: Path
) -> None:
    import safetensors.torch

    def made(kind: str, value: float) -> bytes:
        if kind == "safetensors":
            return safetensors.torch.save(state(value))
        return saved(state(value), kind)

    path, out = tmp_path / "two.pt", tmp_path / "out.pt"
    path.write_bytes(made(first, 1.0) + made(second, 2.0))
    done = run(path, out)
    assert (done.returncode, out.exists()) == (2, False)
    hint = done.stderr.splitlines()[-1]
    if ": dd " in hint:
        command = hint.partition(": dd ")[2]
        subprocess.run(f"dd {command}", shell=True, check=True, capture_output=True, cwd=tmp_path)
        found = tensors(tmp_path / "two.pt.rest", None, tmp_path)
        assert torch.equal(found["w"], state(2.0)["w"])
    else:
        assert first == second
        assert "--archive 1" in hint
