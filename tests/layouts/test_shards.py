"""Checkpoints in several files: read as one, refused where not whole, written in shards."""

import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptfix
from ckptfix import door
from ckptfix.edit import reduce
from ckptfix.errors import (
    CkptfixError,
    DamagedError,
    OutputExistsError,
    ReadError,
    UnsafeError,
    UnsupportedError,
    VerifyError,
    WriteError,
)
from ckptfix.layouts import shard_writer
from ckptfix.layouts import shard_writer as sharding
from ckptfix.limits import Limits

FIXTURES = Path(__file__).parents[2] / "fixtures"
INDEX = "model.safetensors.index.json"


def ckptfix_command(*arguments: object, cwd: Path | None = None) -> Any:
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def done(*arguments: object, cwd: Path | None = None) -> str:
    ran = ckptfix_command(*arguments, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return str(ran.stdout)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def described(
    state: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """A state dict as values that can be compared to the bit."""
    return {key: (value.dtype, value.shape, bits(value)) for key, value in state.items()}


def weights(seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    """A small DDP model with a tie, a transposed tensor, an integer, an empty one, `_metadata`."""
    made = torch.Generator().manual_seed(seed)
    embed = torch.randn(6, 5, generator=made)
    state: OrderedDict[str, torch.Tensor] = OrderedDict(
        {
            "module.embed.weight": embed,
            "module.wide.weight": torch.randn(9, 10, generator=made),
            "module.bn.num_batches_tracked": torch.tensor(7),
            "module.turned": torch.randn(3, 7, generator=made).t(),
            "module.half": torch.randn(11, generator=made).half(),
            "module.none": torch.empty(0, 4),
            "module.head.weight": embed,
        }
    )
    versions = {"": {"version": 1}, "module": {"version": 1}, "module.bn": {"version": 2}}
    state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state


def write_shards(
    folder: Path, *shards: dict[str, torch.Tensor], extension: str = ".safetensors", **changes: Any
) -> Path:
    """A folder as transformers writes it; `changes` replace or add entries of the index."""
    folder.mkdir(exist_ok=True)
    stem = "model" if extension == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}{extension}" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if extension == ".safetensors":
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map, **changes}
    (folder / f"{stem}{extension}.index.json").write_text(json.dumps(content))
    return folder


def two_shards(folder: Path, **options: Any) -> Path:
    return write_shards(
        folder, {"a": torch.ones(2, 3), "b": torch.zeros(4)}, {"c": torch.arange(5)}, **options
    )


def edit_index(folder: Path, **changes: Any) -> Path:
    """Change entries of the weight map; None takes one out."""
    content = json.loads((folder / INDEX).read_text())
    merged = {**content["weight_map"], **changes}
    content["weight_map"] = {key: shard for key, shard in merged.items() if shard is not None}
    (folder / INDEX).write_text(json.dumps(content))
    return folder


def save(state: Any, folder: Path, size: int = 250, force: bool = False) -> Path:
    """Write a state dict as a folder of shards."""
    source = folder.parent / f"{folder.name}.source.pt"
    torch.save(state, source)
    fitted = reduce.fit(door.read(source), f"{folder}/")
    door.write(fitted.document, f"{folder}/", max_shard_size=size, force=force)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
        ("surplus-shard", True)
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
        (["weights.pt", "config.json"], "ckptfix inspect {}/weights.pt"),
        (["a.pt", "b.safetensors"], "ckptfix inspect {}/a.pt"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "copy or download",
        ),
        (["notes.txt"], "ls {}"),
        ([], "ls {}"),
    ],
    ids=["one", "two", "shards", "none", "empty"],
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


# --- writing


@pytest.mark.parametrize("size", [1, 100, 250, 400, 10_000])
def test_what_is_written_reads_back_and_loads_with_safetensors(tmp_path: Path, size: int) -> None:
    state = weights()
    folder = save(state, tmp_path / "out", size)
    assert described(ckptfix.load_state_dict(folder)) == described(state)
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            assert shard.metadata()["format"] == "pt"
            assert found.keys().isdisjoint(shard.keys())
            held = sum(shard.get_tensor(key).nbytes for key in shard.keys())  # noqa: SIM118
            assert held <= size or len(list(shard.keys())) == 1 or not shard.keys()
            found |= load_file(path)
    kept = [key for key in state if key != "module.head.weight"]
    assert {key: bits(found[key]) for key in kept} == {key: bits(state[key]) for key in kept}
    assert set(found) == set(kept)


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("module."): value for key, value in state.items()}


def test_the_index_is_as_huggingface_hub_writes_it(tmp_path: Path) -> None:
    state = weights()
    folder = save(state, tmp_path / "out")
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    assert list(index["weight_map"]) == [key for key in state if key != "module.head.weight"]
    assert index["metadata"]["module.head.weight"] == "module.embed.weight"
    assert index["metadata"]["total_size"] == sum(
        state[key].nbytes for key in state if key != "module.head.weight"
    )


def test_each_shard_holds_the_keys_that_the_map_puts_there(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "out")
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            assert set(shard.keys()) == {key for key in placed if placed[key] == path.name}


def test_ties_and_module_versions_come_back(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "out")
    root = door.read(folder).root
    assert root["module.head.weight"] is root["module.embed.weight"]
    assert root.metadata["module.bn"] == {"version": 2}


def test_what_fits_into_one_shard_is_one_file_without_an_index(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "out", 10_000)
    assert list(contents(folder)) == ["model.safetensors"]
    assert len(door.read(folder).root) == len(weights())


def test_equal_input_gives_equal_folders(tmp_path: Path) -> None:
    one, other = save(weights(), tmp_path / "one"), save(weights(), tmp_path / "other")
    assert contents(one) == contents(other)


def test_a_large_tensor_has_a_shard_for_itself_and_none_is_empty(tmp_path: Path) -> None:
    sizes = [500, 4, 4, 500, 500, 4]
    state = {f"k{n}": torch.ones(size) for n, size in enumerate(sizes)}
    folder = save(state, tmp_path / "out", 100)
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    groups: dict[str, list[str]] = {}
    for key, shard in placed.items():
        groups.setdefault(shard, []).append(key)
    assert list(groups.values()) == [["k0"], ["k1", "k2"], ["k3"], ["k4"], ["k5"]]
    assert len(list(folder.glob("*.safetensors"))) == len(groups)


# --- replacing what is there


@pytest.mark.parametrize("first", [250, 10_000], ids=["sharded", "whole"])
@pytest.mark.parametrize("second", [250, 100, 10_000], ids=["alike", "smaller", "whole"])
def test_force_replaces_the_checkpoint_and_leaves_nothing_of_it(
    tmp_path: Path, first: int, second: int
) -> None:
    folder = save(weights(1), tmp_path / "out", first)
    (folder / "config.json").write_text("{}")
    before = contents(folder)
    with pytest.raises(OutputExistsError, match="already"):
        save(weights(2), folder, second)
    assert contents(folder) == before
    save(weights(2), folder, second, force=True)
    found = door.read(folder)
    assert not found.notes
    assert described(ckptfix.load_state_dict(folder)) == described(weights(2))
    named = {"config.json", *_files_of(folder)}
    assert set(contents(folder)) == named


def _files_of(folder: Path) -> set[str]:
    if not (folder / INDEX).exists():
        return {"model.safetensors"}
    return {INDEX, *json.loads((folder / INDEX).read_text())["weight_map"].values()}


def test_shards_without_an_index_are_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    save_file({"precious": torch.ones(1)}, folder / "model-00001-of-00003.safetensors")
    before = contents(folder)
    with pytest.raises(OutputExistsError):
        save(weights(), folder)
    assert contents(folder) == before


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "out")
    before = contents(folder)
    for source in (folder, folder / INDEX, folder / "model-00001-of-00003.safetensors"):
        document = door.read(source)
        with pytest.raises(WriteError, match="input itself") as caught:
            door.write(document, folder, force=True)
        assert caught.value.code == "same-file"
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("target", "words"), [("file/", "is a file"), ("a/b/", "does not exist")], ids=["file", "deep"]
)
def test_a_folder_that_cannot_be_made_is_refused_early(
    tmp_path: Path, target: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    ran = ckptfix_command("convert", FIXTURES / "cpu.pt", f"{tmp_path}/{target}")
    assert ran.returncode == 2
    assert words in ran.stderr
    assert list(contents(tmp_path)) == ["file"]


def test_a_damaged_input_leaves_no_folder(tmp_path: Path) -> None:
    state = weights()
    torch.save(state, tmp_path / "model.pt")
    data = bytearray((tmp_path / "model.pt").read_bytes())
    place = data.index(bits(state["module.wide.weight"]))
    data[place] ^= 1
    (tmp_path / "model.pt").write_bytes(data)
    ran = ckptfix_command("convert", "model.pt", "out/", "--max-shard-size", "250", cwd=tmp_path)
    assert (ran.returncode, "checksum" in ran.stderr) == (2, True), ran.stderr
    assert list(contents(tmp_path)) == ["model.pt"]


def test_a_failure_at_any_file_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """The disk is full at the nth call to sync: a real error of a real system call's place."""
    folder = save(weights(1), tmp_path / "out")
    before, failures = contents(folder), 0
    real = os.fsync
    for nth in range(1, 50):
        calls = iter(range(1, 10_000))

        def fsync(descriptor: int, calls: Any = calls, nth: int = nth) -> None:
            if next(calls) == nth:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            save(weights(2), folder, force=True)
        except WriteError:
            failures += 1
            monkeypatch.undo()
            assert contents(folder) == before
            continue
        monkeypatch.undo()
        if set(contents(folder)) != set(before) or contents(folder) != before:
            assert described(ckptfix.load_state_dict(folder)) == described(weights(2))
            before = contents(save(weights(1), folder, force=True))
        if next(calls) <= nth:
            break
    assert failures >= 4  # three shards and the index


_KILLED = """
import sys, os, signal
from ckptfix import door
from ckptfix.edit import reduce
left = int(sys.argv[3])
def dying(call):
    def wrapped(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return wrapped
for name in ("fsync", "link", "replace", "unlink", "open"):
    setattr(os, name, dying(getattr(os, name)))
fitted = reduce.fit(door.read(sys.argv[1]), sys.argv[2])
door.write(fitted.document, sys.argv[2], force=True, max_shard_size=250)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment_the_folder_holds_the_old_checkpoint_or_the_new_one(
    tmp_path: Path,
) -> None:
    folder = save(weights(1), tmp_path / "out")
    torch.save(weights(2), tmp_path / "new.pt")
    old, new = weights(1), weights(2)
    seen = []
    for left in random.Random(0).sample(range(60), 14):
        save(weights(1), folder, force=True)
        command = [sys.executable, "-c", _KILLED, f"{tmp_path}/new.pt", f"{folder}/", str(left)]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
        loaded = dict(ckptfix.load_state_dict(folder))
        seen.append(described(loaded) == described(new))
        assert seen[-1] or described(loaded) == described(old)
        for stray in folder.glob(".*.tmp"):
            stray.unlink()
    assert set(seen) == {True, False}


# --- the command line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("size", ["250", "250B", "0.25kB", "0.25 KB"])
def test_convert_writes_shards_of_a_size(tmp_path: Path, model: Path, size: str) -> None:
    said = done("convert", model, tmp_path / "out", "--max-shard-size", size)
    assert said == f"wrote {tmp_path}/out/: torch zip to safetensors folder, 7 tensors\n"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) == 3


@pytest.mark.parametrize("size", ["", "0", "-1", "5XB", "GB", "1e9", "5 G B", "٣GB"])
def test_a_size_that_is_none_is_a_usage_error(tmp_path: Path, model: Path, size: str) -> None:
    ran = ckptfix_command("convert", model, tmp_path / "out", f"--max-shard-size={size}")
    assert (ran.returncode, (tmp_path / "out").exists()) == (2, False)
    assert "is no size" in ran.stderr


def test_shards_in_a_name_of_a_file_are_refused(tmp_path: Path, model: Path) -> None:
    ran = ckptfix_command("convert", model, tmp_path / "out.pt", "--max-shard-size", "1GB")
    assert ran.returncode == 2
    assert f"{tmp_path}/out.pt/" in ran.stderr
    assert list(contents(tmp_path)) == ["model.pt"]


def test_dry_run_makes_no_folder(tmp_path: Path, model: Path) -> None:
    assert "would write" in done("convert", model, f"{tmp_path}/out/", "--dry-run")
    assert list(contents(tmp_path)) == ["model.pt"]


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors", "out/", "there"])
def test_edits_take_a_folder_and_give_any_container(tmp_path: Path, out: str) -> None:
    folder = save(weights(), tmp_path / "in")
    (tmp_path / "there").mkdir()
    done("strip-prefix", folder, out, cwd=tmp_path)
    found = door.read(tmp_path / out)
    assert set(found.root) == set(_without_prefix(weights()))
    assert found.root.metadata["bn"] == {"version": 2}
    assert described(ckptfix.load_state_dict(tmp_path / out)) == described(
        _without_prefix(weights())
    )


def test_a_renamed_tie_does_not_come_back_under_its_old_name(tmp_path: Path) -> None:
    save(weights(), tmp_path / "in", 10_000)
    done("add-prefix", tmp_path / "in", f"{tmp_path}/more/", "--prefix", "x.")
    done("strip-prefix", tmp_path / "more", tmp_path / "less.safetensors", "--prefix", "x.")
    assert door.read(tmp_path / "less.safetensors").metadata == {"format": "pt"}
    assert set(door.read(tmp_path / "less.safetensors").root) == set(weights())


def test_inspect_check_and_diff_take_a_folder(tmp_path: Path, model: Path) -> None:
    folder = save(weights(), tmp_path / "in")
    report = json.loads(done("inspect", "--json", folder))
    assert report["container"] == "sharded safetensors"
    assert [row["key"] for row in report["state_dicts"][0]["tensors"]] == list(weights())
    command = next(row["command"] for row in report["findings"] if row["code"] == "prefix-wrapper")
    assert command == f"ckptfix strip-prefix {folder} {folder}.stripped/"
    done("check", folder)
    done("check", folder, "--like", model)
    done("check", model, "--like", folder / INDEX)
    weights_only = tmp_path / "weights.pt"
    torch.save(weights(), weights_only)
    done("diff", weights_only, folder)


@pytest.mark.parametrize("name", [".", "..", "./", "model.pt"])
def test_the_command_for_a_folder_can_be_run_whatever_it_is_called(
    tmp_path: Path, name: str
) -> None:
    home = tmp_path / "home" / "inner"
    home.mkdir(parents=True)
    save(weights(), {"..": home.parent, "model.pt": home / "model.pt"}.get(name, home))
    report = json.loads(done("inspect", "--json", name, cwd=home))
    assert [row["code"] for row in report["findings"]] == ["prefix-wrapper", "tied-tensors"]
    done(*report["findings"][0]["command"].split()[1:], cwd=home)


_MEASURED = """
import sys, pathlib, threading
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        stop.wait(0.002)
watcher = threading.Thread(target=watch); watcher.start()
from ckptfix import cli
sys.argv = ["ckptfix", *sys.argv[1:]]
try:
    cli.main()
finally:
    stop.set(); watcher.join()
    print(peak, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_sharding_a_large_model_takes_little_memory(tmp_path: Path) -> None:
    state = {f"layers.{n}.weight": torch.full((5, 1 << 20), n + 0.5) for n in range(10)}
    torch.save(state, tmp_path / "big.pt")
    arguments = ["convert", tmp_path / "big.pt", tmp_path / "out", "--max-shard-size", "50MB"]
    command = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, torch_was_imported = ran.stderr.split()
    assert int(peak) < 64 << 10  # kB
    assert torch_was_imported == "False"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    loaded = ckptfix.load_state_dict(tmp_path / "out")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


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


def test_a_folder_that_does_not_read_back_keeps_its_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{index}": torch.full((10,), float(index)) for index in range(4)}
    torch.save(state, tmp_path / "in.pt")
    (tmp_path / "out").mkdir()
    document = ckptfix.open(tmp_path / "in.pt").document
    door.write(document, tmp_path / "out", max_shard_size=40)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    written = shard_writer._index

    def other(document: Any, shards: Any) -> bytes:
        return written(document, shards).replace(b'"w3"', b'"w9"')

    monkeypatch.setattr(sharding, "_index", other)
    with pytest.raises(VerifyError, match=r"out: does not read back: .*'w9'"):
        door.write(document, tmp_path / "out", max_shard_size=40, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
