"""Checkpoints in several files: read as one, refused where they are not whole."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptfix
from ckptfix import door
from ckptfix.errors import (
    CkptfixError,
    DamagedError,
    ReadError,
    UnsafeError,
    UnsupportedError,
)
from ckptfix.limits import Limits
from ckptfix.repair.recover import recover
from tests.sharded import INDEX, ckptfix_command, described, edit_index, two_shards, write_shards

# --- reading


@pytest.mark.parametrize("extension", [".safetensors", ".bin"])
@pytest.mark.parametrize("by_index", [False, True], ids=["folder", "index"])
def test_a_folder_is_read_as_one_checkpoint(tmp_path: Path, extension: str, by_index: bool) -> None:
    folder = two_shards(tmp_path / "model", extension=extension)
    path = next(folder.glob("*.index.json")) if by_index else folder
    document = door.read(path)
    loaded = ckptfix.load_state_dict(path)
    assert document.name == str(path)
    assert (
        document.container
        == {".safetensors": "sharded safetensors", ".bin": "sharded torch zip"}[extension]
    )
    assert document.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    assert described(loaded) == described(
        {"a": torch.ones(2, 3), "b": torch.zeros(4), "c": torch.arange(5)}
    )


def test_legacy_shards_are_read_too(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model", extension=".bin")
    for shard in folder.glob("*.bin"):
        torch.save(torch.load(shard), shard, _use_new_zipfile_serialization=False)
    assert door.read(folder).container == "sharded torch legacy"
    assert torch.equal(ckptfix.load_state_dict(folder)["c"], torch.arange(5))


def test_keys_stand_in_the_order_of_the_weight_map(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = {key: content["weight_map"][key] for key in "cba"}
    (folder / INDEX).write_text(json.dumps(content))
    assert list(door.read(folder).root) == ["c", "b", "a"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    shard = folder / "model-00001-of-00002.safetensors"
    before = door.read(folder)
    with shard.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)
    assert list(door.read(folder).root) == list(before.root)


def test_shards_that_are_links_are_followed_as_in_the_cache_of_huggingface(tmp_path: Path) -> None:
    blobs = two_shards(tmp_path / "blobs")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert list(door.read(folder).root) == ["a", "b", "c"]


def test_a_tie_that_only_the_index_knows_is_restored(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model", metadata={"total_size": 1, "tied": "a"})
    root = door.read(folder).root
    assert root["tied"] is root["a"]


def test_a_tied_key_that_the_map_names_but_no_shard_holds_is_restored(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model", metadata={"tied": "a"})
    edit_index(folder, tied="model-00002-of-00002.safetensors")
    root = door.read(folder).root
    assert root["tied"] is root["a"]


def test_a_shard_alone_is_what_it_is(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    document = door.read(folder / "model-00002-of-00002.safetensors")
    assert (document.container, list(document.root)) == ("safetensors", ["c"])


def test_a_folder_with_only_a_whole_model_is_that_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    document = door.read(tmp_path)
    assert document.container == "safetensors"
    assert document.name == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["model-00007-of-00009.safetensors", "model-00003-of-00002.safetensors", "model.safetensors"],
)
def test_surplus_shards_are_noted(tmp_path: Path, name: str) -> None:
    folder = two_shards(tmp_path / "model")
    save_file({"old": torch.ones(1)}, folder / name)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"of another index")
    document = door.read(folder)
    assert list(document.root) == ["a", "b", "c"]
    assert [(note.code, name in note.message) for note in document.notes] == [
        ("surplus-shard", True),
        ("files-beside", False),
    ]
    assert "pytorch_model" not in document.notes[0].message


# --- what is refused


def refused(path: Path, error: type[CkptfixError], *words: str) -> str:
    """The hint of the error that reading a folder raises; its message has to hold `words`."""
    with pytest.raises(error) as caught:
        door.read(path)
    assert all(word in caught.value.message for word in words), caught.value.message
    ran = ckptfix_command("inspect", path)
    assert ran.returncode == 2
    assert (ran.stdout, ran.stderr.count("error:"), ran.stderr.count("hint:")) == ("", 1, 1)
    return str(caught.value.hint) or ""


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    hint = refused(folder, DamagedError, "1 of 2 shards", "model-00002-of-00002.safetensors")
    assert "ls " in hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(folder / "model-00002-of-00002.safetensors")
    refused(folder, DamagedError, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/model.safetensors",
        "//host/share/model.safetensors",
        "C:model.safetensors",
        "C:/model.safetensors",
        "..\\model.safetensors",
        "a\\model.safetensors",
        ".. /model.safetensors",
        "model.safetensors:stream.safetensors",
        "model\0.safetensors",
        "model.py",
        "model",
        "model.safetensors/",
        "model.safetensors ",
        "x" * 5000 + "/../model.safetensors",
        "",
        3,
        None,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_a_weight_map_that_leaves_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    folder = two_shards(tmp_path / "model")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["a"] = shard
    (folder / INDEX).write_text(json.dumps(content))
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeError, match="'a'"):
        door.read(folder)


def test_a_name_too_long_for_a_file_is_an_absent_shard(tmp_path: Path) -> None:
    folder = edit_index(two_shards(tmp_path / "model"), a="x" * 5000 + ".safetensors")
    with pytest.raises(DamagedError, match="not there"):
        door.read(folder)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {"a": torch.ones(2), "c": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}
    folder = write_shards(tmp_path / "model", *shards)
    refused(folder, UnsafeError, "'a'", "model-00001-of-00002", "model-00002-of-00002")


def test_a_key_that_stands_twice_in_the_index_is_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "model")
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"c": "x.bin", '))
    refused(folder, UnsafeError, "'c' twice")


def test_a_key_that_its_shard_lacks_is_named_with_the_shard_that_has_it(tmp_path: Path) -> None:
    folder = edit_index(two_shards(tmp_path / "model"), b="model-00002-of-00002.safetensors")
    refused(folder, DamagedError, "'b'", "model-00002-of-00002.safetensors", "model-00001", "does")


def test_a_key_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    folder = edit_index(two_shards(tmp_path / "model"), lost="model-00002-of-00002.safetensors")
    refused(folder, DamagedError, "'lost'", "does not hold it")


@pytest.mark.parametrize("extension", [".safetensors", ".bin"])
def test_a_key_that_the_map_lacks_is_named(tmp_path: Path, extension: str) -> None:
    shards = {"a": torch.ones(2), "surplus": torch.ones(3)}, {"b": torch.ones(1)}
    folder = write_shards(tmp_path / "model", *shards, extension=extension)
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    del content["weight_map"]["surplus"]
    index.write_text(json.dumps(content))
    refused(folder, UnsafeError, "'surplus'", "does not name")


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {}}',
        '{"metadata": {}}',
        '{"weight_map": []}',
        "{}",
        '{"weight_map": {"a": "model-1.safetensors"',
        '{"weight_map": ' + '{"a":' * 100_000,
        '{"weight_map": \x00}',
    ],
    ids=["empty", "no-map", "list", "nothing", "cut", "deep", "zero"],
)
def test_an_index_that_names_no_shards_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    hint = refused(tmp_path, DamagedError, INDEX)
    assert "again" in hint


def test_an_lfs_pointer_in_the_place_of_the_index_is_called_that(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(tmp_path, ReadError, "git-lfs")


def test_several_indexes_are_listed(tmp_path: Path) -> None:
    two_shards(tmp_path, extension=".bin")
    folder = two_shards(tmp_path)
    (folder / "tf_model.h5.index.json").write_text("{}")
    hint = refused(folder, ReadError, INDEX, "pytorch_model.bin.index.json")
    ran = subprocess.run([sys.executable, "-m", *hint.partition(": ")[2].split()], check=False)
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["a.pt", "b.safetensors"], "ckptfix inspect {}/a.pt"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "copy or download",
        ),
        (["notes.txt"], "ls {}"),
        ([], "ls {}"),
    ],
    ids=["two", "shards", "none", "empty"],
)
def test_a_folder_without_an_index_says_what_could_be_meant(
    tmp_path: Path, names: list[str], hint: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert hint.format(tmp_path) in refused(tmp_path, ReadError, str(tmp_path))


def test_a_shard_that_is_an_index_of_itself_does_not_recurse(tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    for name in (INDEX, shard):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(tmp_path, ReadError, shard, "JSON")


def test_shards_of_two_byte_orders_are_refused(tmp_path: Path) -> None:
    sharded_folder(tmp_path)
    for name, order in (("a", "little"), ("b", "big")):
        with zipfile.ZipFile(tmp_path / f"{name}.bin", "a") as archive:
            archive.writestr(f"{name}/byteorder", order)
    with pytest.raises(UnsupportedError, match="differ in byte order"):
        door.read(tmp_path)


def sharded_folder(folder: Path) -> None:
    """Two shards, without a record of their byte order."""
    for name in "ab":
        torch.save({name: torch.ones(2)}, folder / "whole")
        with (
            zipfile.ZipFile(folder / "whole") as old,
            zipfile.ZipFile(folder / f"{name}.bin", "w") as new,
        ):
            for record in ("data.pkl", "data/0", "version"):
                new.writestr(f"{name}/{record}", old.read(f"whole/{record}"))
    (folder / "whole").unlink()
    weight_map = {"weight_map": {"a": "a.bin", "b": "b.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))


def test_a_shard_that_maps_no_names_is_refused(tmp_path: Path) -> None:
    sharded_folder(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    with pytest.raises(UnsupportedError, match=r"b\.bin: is a shard that does not map names"):
        door.read(tmp_path)


def test_an_index_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    sharded_folder(tmp_path)
    with pytest.raises(UnsafeError, match=r"an index of \d+ bytes"):
        door.read(tmp_path, Limits(header_bytes=10))


# --- several models, twins, pipelines


def saved_as(path: Path, state: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


A, B = {"a": torch.ones(2, 3)}, {"b": torch.zeros(4)}


@pytest.mark.parametrize(
    "others", [["model_1.safetensors"], ["model_1.safetensors", "model_2.safetensors"]]
)
def test_several_models_of_accelerate_are_listed(tmp_path: Path, others: list[str]) -> None:
    saved_as(tmp_path / "model.safetensors", A)
    for name in (*others, "optimizer.bin", "random_states_0.pkl"):
        saved_as(tmp_path / name, B)
    hint = refused(tmp_path, ReadError, f"{len(others) + 1} models", "model.safetensors", *others)
    assert str(tmp_path / "model.safetensors") in hint
    ran = ckptfix_command("recover", tmp_path, tmp_path / "out.pt")
    assert (ran.returncode, (tmp_path / "out.pt").exists()) == (2, False)
    assert "model_1.safetensors" in ran.stderr


def test_one_model_of_accelerate_is_read(tmp_path: Path) -> None:
    saved_as(tmp_path / "model.safetensors", A)
    for name in ("optimizer.bin", "scheduler.bin", "optimizer_1.bin", "adapter_model.safetensors"):
        saved_as(tmp_path / name, B)
    document = door.read(tmp_path)
    assert list(document.root) == ["a"]
    assert [note.code for note in document.notes] == ["files-beside"]


@pytest.mark.parametrize("stored", ["whole", "shards"])
@pytest.mark.parametrize(
    ("twin", "code"),
    [
        ({"a": torch.ones(2, 3)}, "twin-beside"),
        ({"a": torch.zeros(2, 3)}, "twin-beside"),
        ({"a": torch.ones(2, 4)}, "twin-differs"),
        ({"a": torch.ones(2, 3).half()}, "twin-differs"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1)}, "twin-differs"),
        ({}, "twin-differs"),
    ],
)
def test_a_twin_is_named_and_how_it_differs(
    tmp_path: Path, stored: str, twin: dict[str, torch.Tensor], code: str
) -> None:
    if stored == "whole":
        saved_as(tmp_path / "model.safetensors", A)
    else:
        write_shards(tmp_path, A)
    saved_as(tmp_path / "pytorch_model.bin", twin)
    document = door.read(tmp_path)
    assert list(document.root) == ["a"]
    (note,) = document.notes
    assert note.code == code
    assert "pytorch_model.bin" in note.message
    assert note.command is not None
    same = twin.keys() == A.keys() and torch.equal(twin["a"].float(), A["a"])
    ran = ckptfix_command(*str(note.command).split()[1:])
    assert ran.returncode == (0 if same and code == "twin-beside" else 1), ran.stderr
    assert code in ckptfix_command("check", tmp_path).stdout


def test_a_twin_that_holds_the_names_of_ties_does_not_differ(tmp_path: Path) -> None:
    saved_as(tmp_path / "model.safetensors", A)
    saved_as(tmp_path / "pytorch_model.bin", {"head": A["a"], **A})
    assert [note.code for note in door.read(tmp_path).notes] == ["twin-beside"]


def test_a_twin_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    saved_as(tmp_path / "model.safetensors", A)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (tmp_path / "pytorch_model.bin").write_text(pointer)
    (note,) = door.read(tmp_path).notes
    assert note.code == "twin-differs"
    assert "git-lfs pointer" in note.message


def test_safetensors_beside_an_index_of_bin_is_a_twin(tmp_path: Path) -> None:
    write_shards(tmp_path, A, extension=".bin")
    saved_as(tmp_path / "model.safetensors", {**A, **B})
    notes = {note.code: note.message for note in door.read(tmp_path).notes}
    assert "model.safetensors" in notes["twin-differs"]


def test_the_folders_of_a_pipeline_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline", "unet": ["x", "Y"]}')
    (tmp_path / "scheduler").mkdir()
    saved_as(tmp_path / "unet" / "diffusion_pytorch_model.bin", A)
    saved_as(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", A)
    saved_as(tmp_path / "text_encoder" / "model.safetensors", B)
    saved_as(tmp_path / "vae" / "diffusion_pytorch_model.bin", B)
    hint = refused(tmp_path, ReadError, "text_encoder/, unet/, vae/")
    ran = subprocess.run([sys.executable, "-m", *hint.partition(": ")[2].split()], check=False)
    assert ran.returncode == 0
    for folder in ("text_encoder", "vae", "unet"):
        (tmp_path / folder).rename(tmp_path / f"_{folder}")
        hint = refused(tmp_path, ReadError, f"_{folder}/")
        ran = subprocess.run([sys.executable, "-m", *hint.partition(": ")[2].split()], check=False)
        assert ran.returncode == 0
        (tmp_path / f"_{folder}").rename(tmp_path / folder)


# --- what is whole of it


def recovered(folder: Path) -> tuple[list[str], list[str]]:
    found = recover(folder)
    return list(found.document.root), found.lost


def test_other_files_of_a_folder_are_not_mixed_into_what_is_recovered(tmp_path: Path) -> None:
    saved_as(tmp_path / "model.safetensors", A)
    saved_as(tmp_path / "pytorch_model.bin", {"a": torch.zeros(1), "old": torch.zeros(1)})
    saved_as(tmp_path / "optimizer.bin", {"state": torch.zeros(1)})
    assert recovered(tmp_path) == (["a"], [])


def test_shards_of_one_model_are_recovered_without_their_index(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model", A, B)
    (folder / INDEX).unlink()
    saved_as(folder / "optimizer.bin", {"state": torch.zeros(1)})
    assert recovered(folder) == (["a", "b"], [])


def test_shards_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    for stem in ("first", "second"):
        saved_as(tmp_path / f"{stem}-00001-of-00001.safetensors", A)
    with pytest.raises(ReadError, match=r"2 models: first\.safetensors, second\.safetensors"):
        recover(tmp_path)


def test_a_key_in_two_shards_is_not_guessed(tmp_path: Path) -> None:
    for number in (1, 2):
        saved_as(tmp_path / f"model-0000{number}-of-00002.safetensors", A)
    with pytest.raises(DamagedError, match="'a' is in 2 files"):
        recover(tmp_path)


def test_other_checkpoints_of_the_folder_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not door.read(tmp_path).notes
    for name in ("ema.safetensors", "adapter_model.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    (tmp_path / "config.json").write_text("{}")
    (note,) = door.read(tmp_path).notes
    assert note.code == "files-beside"
    names = "adapter_model.safetensors, ema.safetensors, optimizer.pt"
    assert note.message == f"not read, though it lies beside: {names}"
    ran = ckptfix_command("fix", tmp_path, tmp_path / "out.pt")
    assert "1 tensor copied, 4 things left behind" in ran.stdout
