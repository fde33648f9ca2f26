"""What every command that writes does alike: `--to`, the hint for a copy, JSON for errors too."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptfix
from ckptfix.errors import UnsupportedError, VerifyError, WriteError
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done

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
    assert (told["output_container"], told["output"]) == ("safetensors", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out/", "--to", "torch"], "out/: is a folder"),
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


# --- what is known of the bytes

WRITES = {
    "strip-prefix": [], "add-prefix": [], "rename": ["--sub", "bias", "b"], "to-cpu": [],
    "convert": [], "fix": [],
}  # fmt: skip
"""The verbs that copy weights, with an edit that each finds something to do for."""


def damaged(path: Path, key: str) -> Path:
    """A checkpoint with a flipped byte in one of its tensors."""
    tag = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: "cuda:0"
    try:
        weights = {f"module.layer.{i}.bias": torch.randn(70_000) for i in range(3)}
        torch.save({"state_dict": weights, "epoch": 3}, path)
    finally:
        torch.serialization.location_tag = tag
    data = bytearray(path.read_bytes())
    data[data.find(weights[key].numpy().tobytes()) + 100_001] ^= 4
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors", "out/"])
@pytest.mark.parametrize("verb", WRITES)
def test_damage_is_found_while_it_is_copied_and_named(verb: str, out: str, tmp_path: Path) -> None:
    source = damaged(tmp_path / "in.pt", "module.layer.1.bias")
    ran = ckptfix_command(verb, source, f"{tmp_path}/{out}", *WRITES[verb])
    assert ran.returncode == 2
    assert re.search(r"error: .*in\.pt: the bytes of .*layer\.1\.b.* do not have the", ran.stderr)
    assert "save what is whole: ckptfix recover" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--compact"], ["--weights-only"]])
@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_damage_is_found_in_what_is_computed_too(
    options: list[str], out: str, tmp_path: Path
) -> None:
    source = damaged(tmp_path / "in.pt", "module.layer.2.bias")
    ran = ckptfix_command("convert", source, tmp_path / out, *options)
    assert (ran.returncode, "checksum on record" in ran.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize(
    ("name", "known"),
    [("dataparallel.pt", "checked"), ("dataparallel.safetensors", "copied"),
     ("legacy_dataparallel_cuda.pt", "copied")],
)  # fmt: skip
@pytest.mark.parametrize("out", ["out.pt", "out.safetensors", "out/"])
def test_json_says_what_is_known_of_the_bytes(
    name: str, known: str, out: str, tmp_path: Path
) -> None:
    arguments = ("convert", FIXTURES / name, f"{tmp_path}/{out}", "--json", "--force")
    assert json.loads(done(*arguments))["bytes"] in (known, "shared")  # by the file system
    assert json.loads(done(*arguments, "--dry-run"))["bytes"] is None
    assert json.loads(done(*arguments, "--verify"))["bytes"] == "verified"


def test_verify_says_that_it_did(tmp_path: Path) -> None:
    told = done("strip-prefix", FIXTURES / "dataparallel.pt", tmp_path / "out.pt", "--verify")
    assert told.endswith("; read back and compared\n")


def test_verify_and_in_place_do_not_go_together(tmp_path: Path) -> None:
    source = Path(shutil.copy(FIXTURES / "dataparallel.pt", tmp_path))
    ran = ckptfix_command("strip-prefix", source, "--in-place", "--verify")
    assert (ran.returncode, "--verify reads OUT back" in ran.stderr) == (2, True)
    hint = ran.stderr.split("to read them: ")[1].splitlines()[0]
    assert hint == f"ckptfix check {source} --read-data"
    assert ckptfix_command(*hint.split()[1:]).returncode == 0


def test_the_library_verifies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", os.fstat(descriptor).st_size // 2)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint = ckptfix.open(FIXTURES / "dataparallel.safetensors")
    with pytest.raises(VerifyError, match="reads back other bytes"):
        ckptfix.save(checkpoint, tmp_path / "out.safetensors", verify=True)
    assert not list(tmp_path.iterdir())


# --- what a dry run shows

EVERY = ("resnet18_dataparallel_cuda.pt", "dataparallel_cuda_training.pt")
SHOWING: dict[str, list[str]] = {
    "strip-prefix": [], "add-prefix": [], "rename": ["--sub", "weight$", "w"], "fix": [],
}  # fmt: skip


@pytest.mark.parametrize("verb", SHOWING)
@pytest.mark.parametrize("name", EVERY)
def test_a_dry_run_lists_every_renamed_key_or_says_how_to_see_all(
    name: str, verb: str, tmp_path: Path
) -> None:
    source, out = FIXTURES / name, tmp_path / "out.pt"
    shown = done(verb, source, out, *SHOWING[verb], "--dry-run")
    (row,) = json.loads(done(verb, source, out, *SHOWING[verb], "--dry-run", "--json"))["renamed"]
    assert not out.exists()
    done(verb, source, out, *SHOWING[verb])
    before, after = (ckptfix.open(path).state_dicts[0].mapping for path in (source, out))
    changes = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert list(row["keys"].items()) == changes
    listed = [f"  {old} -> {new}" for old, new in changes]
    lines = shown.splitlines()
    if len(changes) <= 20:
        assert [line for line in lines[:-1] if " -> " in line] == listed
    else:
        assert [line for line in lines[:-1] if " -> " in line] == listed[:20]
        assert f"  … and {len(changes) - 20} more keys (--json has all)" in lines
    assert lines[-1].startswith(f"would write {out}: ")


def test_a_dry_run_says_in_which_state_dict_a_key_is_renamed(tmp_path: Path) -> None:
    both = {"gen": {"module.w": torch.ones(1)}, "disc": {"module.v": torch.ones(1)}}
    torch.save(both, tmp_path / "in.pt")
    shown = done("strip-prefix", "in.pt", "--in-place", "-n", cwd=tmp_path)
    assert shown.splitlines()[:-1] == ["gen", "  module.w -> w", "disc", "  module.v -> v"]


def test_a_dry_run_lists_what_would_be_cast(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "b": torch.ones(1), "n": torch.tensor(1)}, tmp_path / "in.pt")
    shown = done("convert", "in.pt", "out.pt", "--dtype", "bf16", "-n", cwd=tmp_path)
    assert shown.splitlines()[:-1] == ["  w: float32 -> bfloat16", "  b: float32 -> bfloat16"]
    assert done("convert", "in.pt", "out.pt", "--dtype", "bf16", cwd=tmp_path).count("\n") == 1
