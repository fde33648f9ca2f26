"""DCP's pieces in safetensors files: those of real ranks, and what can be wrong with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptfix
from ckptfix.errors import CkptfixError, DamagedError, UnsafeError
from tests.conftest import FIXTURES
from tests.dcp_folders import same
from tests.sharded import ckptfix_command, done

MADE = FIXTURES / "pieces"


def name(rank: int, number: int, total: int = 2) -> str:
    return f"shard-{rank:05d}-model-{number:05d}-of-{total:05d}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE / "hf", tmp_path / "sharded"))


def whole() -> dict[str, torch.Tensor]:
    found = torch.load(MADE / "whole.pt", weights_only=False)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def by_name(state: Any) -> dict[str, torch.Tensor]:
    return {key: state[key] for key in sorted(state) if key != "turned"}


def test_the_pieces_are_whole_again(folder: Path) -> None:
    assert same(by_name(ckptfix.load(folder)), by_name(whole()))


def test_it_becomes_one_file_that_says_nothing_of_pieces(folder: Path) -> None:
    done("convert", folder, folder.parent / "model.safetensors")
    out = folder.parent / "model.safetensors"
    assert same(by_name(load_file(out)), by_name(whole()))
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("named", [name(1, 1), name(4, 2)])
def test_one_file_finds_the_others(folder: Path, named: str) -> None:
    assert same(by_name(ckptfix.load(folder / named)), by_name(whole()))


def test_that_the_end_is_unproven_is_said(folder: Path) -> None:
    assert [found.code for found in ckptfix.open(folder).findings] == ["end-unproven"]
    done("check", folder, "--like", MADE / "hf")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_rank_that_is_not_there(folder: Path, rank: int) -> None:
    for number in (1, 2):
        (folder / name(rank, number)).unlink()
    with pytest.raises(DamagedError, match=f"lacks files of pieces: shard-0000{rank}") as caught:
        ckptfix.open(folder)
    assert caught.value.code == "piece-missing"
    assert ckptfix_command("convert", folder, folder.parent / "out.pt").returncode == 2


def test_a_file_that_is_not_there(folder: Path) -> None:
    (folder / name(2, 1)).unlink()
    with pytest.raises(DamagedError, match=r"the piece that begins at .* is missing"):
        ckptfix.open(folder)


def test_that_the_end_is_unproven_is_said_by_what_writes(folder: Path) -> None:
    ran = ckptfix_command("convert", folder, folder.parent / "out.pt")
    assert ran.returncode == 0
    assert "that there was no rank after them is written nowhere" in ran.stderr


def test_the_file_of_a_last_rank_that_is_not_there(folder: Path) -> None:
    (folder / name(4, 1)).unlink()
    what = "its last piece is as long as the first, and shard-00004-model-00001-of-… is not there"
    with pytest.raises(DamagedError, match=what) as caught:
        ckptfix.open(folder)
    assert caught.value.code == "piece-missing"
    ran = ckptfix_command("recover", folder, folder.parent / "saved.pt")
    assert ran.returncode == 1
    known = torch.load(MADE / "whole.pt", weights_only=False)
    found = torch.load(folder.parent / "saved.pt", weights_only=False)
    assert {"rows", "replicas"}.isdisjoint(found)
    assert {"uneven", "columns", "number"} <= set(found)
    assert same(dict(found), {key: known[key] for key in found})


def test_one_of_the_files_to_be_is_not_there(folder: Path) -> None:
    for rank in range(1, 5):
        (folder / name(rank, 2)).unlink()
    with pytest.raises(DamagedError, match="lacks files of pieces: …-model-00002-of"):
        ckptfix.open(folder)


def test_files_of_two_saves(folder: Path) -> None:
    shutil.copy(folder / name(1, 1), folder / name(1, 1, 3))
    with pytest.raises(UnsafeError, match="files of different saves: of 2, 3"):
        ckptfix.open(folder)


def put(path: Path, tensors: dict[str, torch.Tensor], info: Any) -> None:
    text = info if isinstance(info, str) else json.dumps(info)
    save_file(tensors, path, {"DCP_SHARDING_INFO": text, "DCP_VERSION": "1.0", "format": "pt"})


@pytest.mark.parametrize(
    "info",
    [
        "[]", "{", "null", '{"w": 5}', '{"w": {}}', '{"w": {"saved_offsets": 5}}',
        '{"w": {"saved_offsets": [-1, 0]}}', '{"w": {"saved_offsets": [1.5, 0]}}',
        '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [9223372036854775807, 0]}}',
        '{"w": {"saved_offsets": [1, 0]}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_offsets_that_no_pieces_have(tmp_path: Path, info: str) -> None:
    put(tmp_path / name(1, 1, 1), {"w": torch.ones(2, 2)}, info)
    with pytest.raises(CkptfixError, match=re.escape(str(tmp_path))):
        ckptfix.open(tmp_path)


def test_pieces_over_each_other(tmp_path: Path) -> None:
    for rank in (1, 2):
        offsets = {"w": {"saved_offsets": [rank - 1, 0]}}
        put(tmp_path / name(rank, 1, 1), {"w": torch.ones(2, 2)}, offsets)
    with pytest.raises(UnsafeError, match=r"'w': the pieces .* overlap"):
        ckptfix.open(tmp_path)


def test_pieces_that_differ_in_dtype(tmp_path: Path) -> None:
    for rank, dtype in ((1, torch.float32), (2, torch.int32)):
        offsets = {"w": {"saved_offsets": [2 * rank - 2, 0]}}
        put(tmp_path / name(rank, 1, 1), {"w": torch.ones(2, 2, dtype=dtype)}, offsets)
    with pytest.raises(UnsafeError, match="int32, not float32"):
        ckptfix.open(tmp_path)


def test_what_is_whole_is_recovered(folder: Path) -> None:
    path = folder / name(2, 2)
    path.write_bytes(path.read_bytes()[:-5])
    ran = ckptfix_command("recover", folder, folder.parent / "saved.pt")
    assert ran.returncode == 1, ran.stderr
    found = torch.load(folder.parent / "saved.pt")
    known = whole()
    assert 10 < len(found) < 16
    assert same(dict(found), {key: known[key] for key in found})


def test_other_files_of_that_name_are_not_taken_for_pieces(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / name(1, 1, 1))
    assert same(dict(ckptfix.load(tmp_path / name(1, 1, 1))), {"w": torch.ones(2)})
