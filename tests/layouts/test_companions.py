"""What lies in a folder beside the weights goes with them into a folder, or is named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import ckptfix
from tests.oracles import ckptfix_command, done

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = {"config.json": "{}", "tokenizer.json": "[1]", "tokenizer.model": "\0\1", "LICENSE": "mine",
         "modeling_mine.py": "x = 1\n", "merges.txt": "a b"}  # fmt: skip
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["whole", "sharded", "old", "by its index"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as from the Hub, with the state of an optimizer, and a folder in it."""
    folder = tmp_path / "in"
    folder.mkdir()
    weights = {f"layers.{i}.weight": torch.rand(40) for i in range(6)}
    if request.param == "whole":
        save_file(weights, folder / "model.safetensors")
    elif request.param == "old":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        torch.save(weights, tmp_path / "whole.pt")
        done("convert", tmp_path / "whole.pt", f"{folder}/", "--max-shard-size", "300")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / ".gitattributes").write_text("hidden")
    (folder / "runs").mkdir()
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    return folder / INDEX if request.param == "by its index" else folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def told(*arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done(*arguments, "--json"))
    return found


@pytest.mark.parametrize("size", ["200", "1GB"])
def test_texts_go_into_a_folder_and_the_rest_is_named(
    source: Path, size: str, tmp_path: Path
) -> None:
    command = ("convert", source, f"{tmp_path}/out/", "--max-shard-size", size)
    dry = told(*command, "--dry-run")
    answer = told(*command)
    assert not set(dry) ^ set(answer)
    assert dry["carried"] == answer["carried"] == sorted(TEXTS)
    left = [{"path": "optimizer.pt", "kind": "file"}, {"path": "runs", "kind": "folder"}]
    assert dry["left_out"] == answer["left_out"] == left
    for name, text in TEXTS.items():
        assert (tmp_path / "out" / name).read_text() == text
    weights = {name for name in names(tmp_path / "out") if name.startswith("model")}
    assert names(tmp_path / "out") == weights | set(TEXTS)
    assert set(ckptfix.load_state_dict(tmp_path / "out")) == {
        f"layers.{i}.weight" for i in range(6)
    }


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_what_does_not_go_into_a_file_is_named(source: Path, out: str, tmp_path: Path) -> None:
    ran = ckptfix_command("convert", source, tmp_path / out)
    expected = sorted([*(f"{name} (file)" for name in [*TEXTS, "optimizer.pt"]), "runs (folder)"])
    assert ran.stderr == f"note: 8 things left out of it: {', '.join(expected)}\n"


def test_a_text_that_is_there_is_left_alone_and_named_where_it_is_another(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"mine": 1}')
    (out / "LICENSE").write_text(TEXTS["LICENSE"])
    answer = told("convert", source, f"{out}/")
    assert {"path": "config.json", "kind": "file: OUT has another one"} in answer["left_out"]
    assert "LICENSE" not in str(answer["left_out"])
    assert not {"config.json", "LICENSE"} & set(answer["carried"])
    assert (out / "config.json").read_text() == '{"mine": 1}'


def test_the_library_carries_and_names_them_too(source: Path, tmp_path: Path) -> None:
    if source.is_dir() and (source / INDEX).exists():
        left = ckptfix.open(source).save(f"{tmp_path}/out/")
        assert left == [("optimizer.pt", "file"), ("runs", "folder")]
        assert set(TEXTS) < names(tmp_path / "out")


def test_where_nothing_is_written_nothing_is_carried(source: Path, tmp_path: Path) -> None:
    if source.is_dir():
        for path in source.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-5])
        for path in source.glob("*.bin"):
            path.write_bytes(path.read_bytes()[:-5])
        assert ckptfix_command("convert", source, f"{tmp_path}/out/").returncode == 2
        assert not (tmp_path / "out").exists()


def test_a_single_file_has_no_companions(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    (tmp_path / "config.json").write_text("{}")
    answer = told("convert", tmp_path / "in.pt", f"{tmp_path}/out/")
    assert (answer["carried"], answer["left_out"]) == ([], [])
