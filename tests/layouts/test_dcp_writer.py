"""DCP folders that are written: what torch and ckptfix make of them, whole or not there."""

from __future__ import annotations

import array
import io
import os
import random
import signal
import subprocess
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import ckptfix
from ckptfix.errors import OutputExistsError, UnsupportedError, WriteError
from tests.conftest import FIXTURES
from tests.dcp_folders import along, as_dicts, consolidated, edit, grid, same, save
from tests.layouts.test_dcp import model, training
from tests.pieces.test_joining import numbered
from tests.sharded import DYING, ckptfix_command, contents, done, weights

if TYPE_CHECKING:
    from pathlib import Path


def written(state: Any, folder: Path, **options: Any) -> Path:
    """What a program holds, written as a DCP folder."""
    torch.save(state, folder.with_name("state.pt"))
    ckptfix.open(folder.with_name("state.pt")).save(folder, to="dcp", **options)
    return folder


def zeros(node: Any) -> Any:
    """The same tree with other values, for torch to load into."""
    if isinstance(node, torch.Tensor):
        return torch.zeros_like(node)
    if isinstance(node, dict):
        return {key: zeros(value) for key, value in node.items()}
    return [zeros(value) for value in node] if isinstance(node, list) else None


def loaded(folder: Path, template: Any) -> Any:
    """What torch loads from a folder into a tree of that form, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_load(template, storage_reader=FileSystemReader(folder), no_dist=True)
    return template


# --- what is in it


def test_it_is_what_was_there_to_ckptfix_and_to_torch(tmp_path: Path) -> None:
    state = training()
    folder = written(state, tmp_path / "out")
    assert sorted(os.listdir(folder)) == [".metadata", "__0_0.distcp"]
    assert same(ckptfix.load(folder), state)
    assert same(as_dicts(consolidated(folder, tmp_path / "theirs.pt")), as_dicts(state))
    assert same(loaded(folder, zeros(state)), state)


def test_an_optimizer_is_loaded_as_torch_would_load_its_own(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.ones(3, 7)).sum().backward()
    optimizer.step()
    state = {"model": dict(net.state_dict()), "optimizer": optimizer.state_dict()}
    mine = written(state, tmp_path / "mine")
    theirs = save(tmp_path / "theirs", state)
    assert same(loaded(mine, zeros(state)), loaded(theirs, zeros(state)))
    assert same(ckptfix.load(mine), ckptfix.load(theirs))


@pytest.mark.parametrize("split", [along(0, 3), along(1, 4), grid(2, 3)])
def test_pieces_become_one_folder(tmp_path: Path, split: Any) -> None:
    state = training()
    save(tmp_path / "ranks", state, split, thread_count=2)
    done("convert", "ranks", "out", "--to", "dcp", cwd=tmp_path)
    assert same(ckptfix.load(tmp_path / "out"), state)
    assert same(loaded(tmp_path / "out", zeros(state)), state)


@pytest.mark.parametrize("source", ["model.safetensors", "shards/", "old.pt"])
def test_any_container_becomes_one(tmp_path: Path, source: str) -> None:
    state = {key: value for key, value in model().items() if value.dtype != torch.complex64}
    state["turned"] = state["turned"].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    done("convert", "model.safetensors", "shards/", "--max-shard-size", "1kB", cwd=tmp_path)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    done("convert", source, "out/", "--to", "dcp", cwd=tmp_path)
    found = ckptfix.load(tmp_path / "out")
    assert same({key: found[key] for key in state}, state)
    assert same(loaded(tmp_path / "out", zeros(state)), state)


def test_each_item_is_a_whole_file_of_torch(tmp_path: Path) -> None:
    state: Any = {
        "w": numbered((8, 6), torch.bfloat16),
        "n": {"deep": [1, 2]},
        "t": (torch.ones(3), 1),
    }
    folder = written(state, tmp_path / "out")
    data, begins = (folder / "__0_0.distcp").read_bytes(), []

    def look(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            part = data[info.offset : info.offset + info.length]
            found = torch.load(io.BytesIO(part), weights_only=True)
            begins.append(info.offset)
            if index.fqn == "w":
                assert part.index(bytes(state["w"].view(torch.uint8).numpy())) % 64 == 0
                assert same(found, state["w"])
        assert sum(info.length for info in metadata.storage_data.values()) == len(data)

    edit(folder, look)
    assert len(begins) == 3


def test_tensors_are_there_without_the_rest_of_their_storages(tmp_path: Path) -> None:
    whole = numbered((400, 300), torch.float32)
    images = numbered((8, 3, 4, 4), torch.float32).to(memory_format=torch.channels_last)
    state = {
        "row": whole[3], "column": whole[:, 7], "corner": whole[1:3, 1:3], "images": images[2:4],
        "repeated": torch.ones(1).expand(3, 4), "turned": whole[:5].t(), "none": whole[:0],
    }  # fmt: skip
    folder = written(state, tmp_path / "out")
    assert (folder / "__0_0.distcp").stat().st_size < 40_000
    found = ckptfix.load(folder)
    assert same(found, state)
    assert found["images"].stride() == images.stride()
    assert found["turned"].stride() == (1, 300)
    assert same(loaded(folder, zeros(state)), state)


def test_what_is_beside_a_view_is_held_against_its_checksum(tmp_path: Path) -> None:
    state = {"w": numbered((100, 100), torch.float32)[:, 3]}
    torch.save(state, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    ran = ckptfix_command("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    assert (ran.returncode, "'w' do not have the checksum" in ran.stderr) == (2, True), ran.stderr
    assert os.listdir(tmp_path) == ["in.pt"]


def test_tensors_of_a_gpu_are_tagged_cpu(tmp_path: Path) -> None:
    source = FIXTURES / "dataparallel_cuda_training.pt"
    done("convert", source, "out", "--to", "dcp", cwd=tmp_path)
    found = loaded(tmp_path / "out", zeros(torch.load(source, "cpu", weights_only=False)))
    assert same(found, ckptfix.load(source, map_location="cpu"))


def test_equal_input_gives_equal_folders(tmp_path: Path) -> None:
    state = training()
    assert contents(written(state, tmp_path / "one")) == contents(written(state, tmp_path / "two"))


def test_what_is_not_there_afterwards_is_named(tmp_path: Path) -> None:
    state: Any = {
        "model": weights(),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "empty": {}, "none": []},
    }
    torch.save(state, tmp_path / "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    assert ran.returncode == 0
    assert "model/module.head.weight (its tie with model.module.embed.weight)" in ran.stderr
    assert "model (_metadata of the state dict)" in ran.stderr
    assert "optimizer/state (keys that are not text, and become text)" in ran.stderr
    found = ckptfix.load(tmp_path / "out")
    assert list(found["model"]) == list(state["model"])
    assert found["optimizer"] == {"state": {"0": {"step": torch.ones(1)}}, "empty": {}, "none": []}
    theirs = consolidated(tmp_path / "out", tmp_path / "theirs.pt")
    assert theirs["optimizer"]["empty"] == {}


def test_a_parameter_is_a_tensor_and_an_array_is_a_value(tmp_path: Path) -> None:
    state = {"p": nn.Parameter(torch.ones(3)), "a": torch.ones(2).numpy()}
    folder = written(state, tmp_path / "out")
    assert same(loaded(folder, {"p": torch.zeros(3)}), {"p": torch.ones(3)})
    assert ckptfix.load(folder)["a"].tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_model_of_any_number_of_ranks_loads_it(tmp_path: Path, ranks: int) -> None:
    done("convert", FIXTURES / "pieces" / "fsdp2", "whole.pt", cwd=tmp_path)
    done("convert", "whole.pt", "out/", "--to", "dcp", cwd=tmp_path)
    words = ["tests.fsdp_loads", str(tmp_path / "out"), str(tmp_path / "whole.pt"), str(ranks)]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=300)


# --- what cannot be in one


def refused(state: Any, tmp_path: Path, match: str) -> None:
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(UnsupportedError, match=match):
        ckptfix.open(tmp_path / "in.pt").save(tmp_path / "out", to="dcp")
    ran = ckptfix_command("convert", "in.pt", "out/", "--to", "dcp", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr
    assert os.listdir(tmp_path) == ["in.pt"]


def test_two_values_of_one_name_are_refused(tmp_path: Path) -> None:
    state: dict[Any, Any] = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    refused(state, tmp_path, "'a/b' and 'a.b' are both 'a.b' in a DCP folder")
    refused({"s": {1: 2, "1": 3}}, tmp_path, "'s/1' and 's/1' are both 's.1'")


def test_what_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["again"] = {"x": [state]}
    refused(state, tmp_path, "holds itself, or too much within one another")


def test_what_is_shared_again_and_again_is_refused(tmp_path: Path) -> None:
    node: Any = {"w": torch.ones(1)}
    for _ in range(60):
        node = {"a": node, "b": node}
    refused(node, tmp_path, "holds itself, or too much within one another")


def test_a_few_bytes_do_not_fill_a_disk(tmp_path: Path) -> None:
    one = torch.ones(1 << 24)
    torch.save({f"k{n}": one[n:] for n in range(600)}, tmp_path / "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    assert (ran.returncode, "would take 40" in ran.stderr) == (2, True), ran.stderr
    assert os.listdir(tmp_path) == ["in.pt"]


@pytest.mark.parametrize("root", [[torch.ones(2)], torch.ones(2), nn.Linear(2, 2)])
def test_what_is_no_mapping_is_refused(tmp_path: Path, root: Any) -> None:
    refused(root, tmp_path, "and a DCP folder holds a mapping")


def test_the_weights_of_a_whole_model_are_written_as_the_hint_says(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    hint = ran.stderr.rpartition("ckptfix ")[2].split()
    done(*hint, cwd=tmp_path)
    assert list(ckptfix.load(tmp_path / "in.pt.dcp")) == ["weight", "bias"]


# --- the folder


def test_the_verbs_write_one(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in model().items()}
    bare = model()
    torch.save({"model": state, "epoch": 3}, tmp_path / "in.pt")
    torch.save(bare, tmp_path / "bare.pt")
    done("strip-prefix", "in.pt", "stripped", "--to", "dcp", "--verify", cwd=tmp_path)
    assert same(ckptfix.load(tmp_path / "stripped"), {"model": bare, "epoch": 3})
    done("fix", "in.pt", "fixed/", "--to", "dcp", "--like", "bare.pt", cwd=tmp_path)
    assert same(dict(ckptfix.load_state_dict(tmp_path / "fixed")), bare)
    done("convert", "stripped", "again", "--to", "dcp", "--select", "model", cwd=tmp_path)
    assert same(ckptfix.load(tmp_path / "again"), bare)
    ran = ckptfix_command("diff", "stripped", "in.pt", "--select", "model", cwd=tmp_path)
    assert ran.returncode == 1


def test_dry_run_makes_no_folder(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "in.pt")
    assert "would write" in done("convert", "in.pt", "out", "--to", "dcp", "-n", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_checkpoint_that_is_there_is_replaced_only_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    old, new = {"old": torch.ones(5)}, {"new": torch.zeros(4)}
    folder = save(tmp_path / "out", old, thread_count=2)
    (folder / "__7_0.distcp").write_bytes(b"left by an earlier save")
    (folder / "config.json").write_text("{}")
    before = contents(folder)
    with pytest.raises(OutputExistsError, match=r"holds a checkpoint already \(\.metadata"):
        written(new, folder)
    assert contents(folder) == before
    written(new, folder, force=True)
    assert same(ckptfix.load(folder), new)
    assert not ckptfix.open(folder).findings
    assert len(contents(folder)) == 3
    assert (folder / "config.json").exists()


def test_shards_and_pieces_take_each_others_place(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(4)}
    torch.save(state, tmp_path / "in.pt")
    for to in ("dcp", "shards", "dcp", "shards"):
        size = ["--max-shard-size", "12B"] if to == "shards" else []
        done("convert", "in.pt", "out/", "--to", to, "-f", *size, cwd=tmp_path)
        assert same(dict(ckptfix.load_state_dict(tmp_path / "out")), state)


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", {"w": torch.ones(4)})
    before = contents(folder)
    for source in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        with pytest.raises(WriteError) as caught:
            ckptfix.open(source).save(folder, to="dcp", force=True)
        assert caught.value.code == "same-file"
    assert contents(folder) == before


def test_a_failure_at_any_file_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """The disk is full at the nth call to sync: a real error of a real system call's place."""
    old, new = {"old": torch.ones(5)}, {"new": torch.zeros(4)}
    torch.save(new, tmp_path / "new.pt")
    folder = written(old, tmp_path / "out")
    before, failures = contents(folder), 0
    real = os.fsync
    for nth in range(1, 20):
        calls = iter(range(1, 10_000))

        def fsync(descriptor: int, calls: Any = calls, nth: int = nth) -> None:
            if next(calls) == nth:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            ckptfix.open(tmp_path / "new.pt").save(folder, to="dcp", force=True)
        except WriteError:
            failures += 1
            monkeypatch.undo()
            assert contents(folder) == before
            continue
        monkeypatch.undo()
        if contents(folder) != before:
            assert same(ckptfix.load(folder), new)
            before = contents(written(old, folder, force=True))
        if next(calls) <= nth:
            break
    assert failures >= 2  # the items and .metadata


_KILLED = f"""
import ckptfix
{DYING}
ckptfix.open(sys.argv[1]).save(sys.argv[2], to="dcp", force=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment_the_folder_holds_the_old_checkpoint_or_the_new_one(
    tmp_path: Path,
) -> None:
    old, new = {"old": torch.ones(5)}, {"new": torch.zeros(4)}
    seen = []
    for left in random.Random(0).sample(range(24), 10):
        folder = written(old, tmp_path / "out", force=True)
        torch.save(new, tmp_path / "new.pt")
        command = [sys.executable, "-c", _KILLED, f"{tmp_path}/new.pt", str(folder), str(left)]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
        found = ckptfix.load(folder)
        seen.append(same(found, new))
        assert seen[-1] or same(found, old)
        for stray in folder.glob(".*.tmp"):
            stray.unlink()
    assert set(seen) == {True, False}


def test_a_damaged_input_leaves_no_folder(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000), "v": torch.zeros(2)}, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[data.index(b"\0\0\x80\x3f" * 9)] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    ran = ckptfix_command("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    assert (ran.returncode, "'w' do not have the checksum" in ran.stderr) == (2, True), ran.stderr
    assert os.listdir(tmp_path) == ["in.pt"]


def test_numbers_of_the_other_byte_order_stay_what_they_are(tmp_path: Path) -> None:
    state = {"w": numbered((3, 5), torch.int32), "column": numbered((3, 5), torch.int32)[:, 1]}
    torch.save(state, tmp_path / "little.pt")
    with (
        zipfile.ZipFile(tmp_path / "little.pt") as little,
        zipfile.ZipFile(tmp_path / "in.pt", "w") as big,
    ):
        for name in little.namelist():
            data = little.read(name)
            if "/data/" in name:
                numbers = array.array("i", data)
                numbers.byteswap()
                data = numbers.tobytes()
            big.writestr(name, b"big" if name.endswith("byteorder") else data)
    done("convert", "in.pt", "out", "--to", "dcp", cwd=tmp_path)
    assert same(ckptfix.load(tmp_path / "out"), state)
    assert same(loaded(tmp_path / "out", zeros(state)), state)
