"""Folders of shards that are written: whole, or as they were."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptfix
from ckptfix import door
from ckptfix.errors import (
    OutputExistsError,
    VerifyError,
    WriteError,
)
from ckptfix.layouts import shard_writer
from ckptfix.layouts import shard_writer as sharding
from tests.conftest import FIXTURES
from tests.sharded import (
    DYING,
    INDEX,
    bits,
    ckptfix_command,
    contents,
    described,
    done,
    save,
    weights,
)

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


_KILLED = f"""
from ckptfix import door
from ckptfix.edit import reduce
{DYING}
fitted = reduce.fit(door.read(sys.argv[1]), door.SHARDS)
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
    assert said == f"wrote {tmp_path}/out/: torch zip to safetensors folder, 6 tensors, 1 tie\n"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) == 3


@pytest.mark.parametrize("size", ["", "0", "-1", "5XB", "GB", "1e9", "5 G B", "٣GB"])
def test_a_size_that_is_none_is_a_usage_error(tmp_path: Path, model: Path, size: str) -> None:
    ran = ckptfix_command("convert", model, tmp_path / "out", f"--max-shard-size={size}")
    assert (ran.returncode, (tmp_path / "out").exists()) == (2, False)
    assert "is not a size" in ran.stderr


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
    done("check", model, "--like", folder / INDEX)
    ran = ckptfix_command("check", folder, "--like", model)  # load_file lacks the tied key
    assert (ran.returncode, "the file lacks" in ran.stdout or "missing" in ran.stdout) == (1, True)
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


# --- names, and what is removed


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model"),
        ("adapter_model.bin", "adapter_model"),
        ("pytorch_model.bin", "model"),
        ("model.safetensors", "model"),
        ("t.pt", "model"),
    ],
)
@pytest.mark.parametrize("size", [250, 10_000])
def test_shards_are_called_as_the_input_is(name: str, stem: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    state = {key: value.clone().contiguous() for key, value in weights().items()}
    (save_file if name.endswith("s") else torch.save)(state, tmp_path / "in" / name)
    out = tmp_path / "out"
    done("convert", tmp_path / "in" / name, f"{out}/", "--max-shard-size", str(size))
    assert all(path.startswith(stem) for path in contents(out))
    assert (out / f"{stem}.safetensors").exists() == (size > 250)
    assert (out / f"{stem}.safetensors.index.json").exists() == (size == 250)
    again = tmp_path / "again"
    done("strip-prefix", out, f"{again}/")
    assert list(contents(again)) == [f"{stem}.safetensors"]
    assert len(ckptfix.load_state_dict(again)) == len(state)


def test_only_what_the_index_names_is_removed_and_that_is_said(tmp_path: Path) -> None:
    folder = save(weights(1), tmp_path / "out", 250)
    old = set(contents(folder))
    for name in ("model-00007-of-00009.safetensors", "other-00001-of-00002.safetensors"):
        save_file({"precious": torch.ones(1)}, folder / name)
    (folder / "pytorch_model.bin").write_bytes(b"mine")
    torch.save(weights(2), tmp_path / "in.pt")
    command = ("convert", tmp_path / "in.pt", f"{folder}/", "--force", "--json")
    before = contents(folder)
    assert set(json.loads(done(*command, "--dry-run"))["removed"]) == old
    assert contents(folder) == before
    assert set(json.loads(done(*command))["removed"]) == old
    assert set(contents(folder)) == {
        "model.safetensors",
        "pytorch_model.bin",
        "model-00007-of-00009.safetensors",
        "other-00001-of-00002.safetensors",
    }
    told = ckptfix_command("convert", tmp_path / "in.pt", f"{folder}/", "--force").stderr
    assert "note: 1 file of the checkpoint that was there replaced or removed: model.sa" in told


def test_another_model_in_the_folder_is_neither_removed_nor_joined(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "adapter_model.safetensors")
    torch.save(weights(), tmp_path / "in.pt")
    before = contents(folder)
    for more in ([], ["--force"], ["--force", "--dry-run"]):
        ran = ckptfix_command("convert", tmp_path / "in.pt", f"{folder}/", *more)
        assert (ran.returncode, "adapter_model.safetensors" in ran.stderr) == (2, True)
    assert contents(folder) == before
