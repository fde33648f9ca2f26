"""What every command that writes does alike: `--to`, the hint for a copy, JSON for errors too."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix.errors import UnsupportedError, WriteError
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done

if TYPE_CHECKING:
    from pathlib import Path

DDP = FIXTURES / "dataparallel.pt"
VERBS: dict[str, list[str]] = {
    "strip-prefix": [],
    "add-prefix": [],
    "rename": ["--sub", "linears", "layers"],
    "to-cpu": [],
    "convert": [],
    "fix": [],
    "recover": [],
}


def source_of(verb: str) -> Path:
    return FIXTURES / ("dataparallel_cuda.pt" if verb == "to-cpu" else "dataparallel.pt")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("to", "container"),
    [("torch", "torch zip"), ("safetensors", "safetensors"), ("shards", "safetensors")],
)
def test_to_names_the_container_whatever_the_extension(
    verb: str, to: str, container: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    done(verb, source_of(verb), out, "--to", to, *VERBS[verb])
    assert out.is_dir() == (to == "shards")
    assert ckptfix.open(out).container == container


@pytest.mark.parametrize("verb", ["strip-prefix", "add-prefix", "rename", "to-cpu"])
def test_to_and_in_place_do_not_go_together(verb: str, tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    shutil.copy(source_of(verb), path)
    before = path.read_bytes()
    ran = ckptfix_command(verb, "--in-place", path, "--to", "torch", *VERBS[verb])
    assert ran.returncode == 2
    assert "--to and --in-place: give one of them" in ran.stderr
    assert path.read_bytes() == before


def test_a_dry_run_and_json_say_what_to_means(tmp_path: Path) -> None:
    told = json.loads(done("convert", DDP, tmp_path / "out", "--to", "safetensors", "-n", "--json"))
    assert (told["to"], told["output"]) == ("safetensors", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out/", "--to", "torch"], "out/: is a folder"),
        (["there", "--to", "safetensors"], "there: is a folder"),
        (["file.pt", "--to", "shards"], "file.pt: is a file, not a folder"),
        (["out", "--to", "torch", "--max-shard-size", "1GB"], "--max-shard-size is for shards"),
        (["out", "--to", "zip"], "'zip' is not one of"),
    ],
)
def test_what_does_not_go_together_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file.pt").write_bytes(b"mine")
    ran = ckptfix_command("convert", DDP, *arguments, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr
    assert ran.stderr.count("hint:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "there"]
    assert (tmp_path / "file.pt").read_bytes() == b"mine"


def test_the_library_takes_to_as_well(tmp_path: Path) -> None:
    ckptfix.open(DDP).save(tmp_path / "a.bin", to="safetensors")
    assert ckptfix.open(tmp_path / "a.bin").container == "safetensors"
    ckptfix.save({"w": torch.ones(2)}, tmp_path / "b", to="torch")
    assert torch.equal(torch.load(tmp_path / "b")["w"], torch.ones(2))
    with pytest.raises(UnsupportedError, match="'zip' is not a container that is written"):
        ckptfix.open(DDP).save(tmp_path / "c", to="zip")
    with pytest.raises(WriteError, match="is a folder"):
        ckptfix.open(DDP).save(f"{tmp_path}/d/", to="torch")


@pytest.mark.parametrize("name", ["in.pt", "a b.pt", "no_extension", "x.tar"])
def test_where_a_copy_is_needed_the_hint_makes_one(name: str, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "legacy.pt", tmp_path / name)
    ran = ckptfix_command(
        "rename", "--in-place", name, "--sub", "linears", "my layers", "--sub", "bias", "b",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 2
    words = shlex.split(ran.stderr.partition("hint: write a copy: ")[2])
    assert words[:3] == ["ckptfix", "rename", name]
    assert words[4:] == ["--sub", "linears", "my layers", "--sub", "bias", "b"]
    done(*words[1:], cwd=tmp_path)
    keys = ckptfix.open(tmp_path / words[3]).state_dicts[0].mapping
    assert all(key.startswith("my layers") for key in keys)


def error_of(*arguments: Any, cwd: Path) -> dict[str, Any]:
    ran = ckptfix_command(*arguments, cwd=cwd)
    assert ran.returncode == 2
    found: dict[str, Any] = json.loads(ran.stdout)["error"]
    return found


def test_errors_come_as_json_where_it_is_asked_for(tmp_path: Path) -> None:
    missing = error_of("inspect", "--json", "my dir/none it.pt", cwd=tmp_path)
    assert missing["code"] == "unreadable"
    assert error_of("convert", "--json", "a.pt", cwd=tmp_path)["code"] == "usage"
    assert error_of("strip-prefix", "a.pt", "--json", cwd=tmp_path)["code"] == "usage"
    wrong = error_of("convert", DDP, "out.pt", "--max-shard-size", "x", "--json", cwd=tmp_path)
    assert wrong["code"] == "usage"


def test_a_file_that_is_called_as_an_option_is_no_option(tmp_path: Path) -> None:
    shutil.copy(DDP, tmp_path / "--json")
    ran = ckptfix_command("inspect", "--", "--json", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert not ran.stdout.startswith("{")
