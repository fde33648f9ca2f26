"""Folders of torch.distributed.checkpoint, beside what torch makes of them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptfix
from ckptfix import door
from ckptfix.bytes.source import FileSource
from ckptfix.errors import CkptfixError, DamagedError, ReadError, UnsafeError
from ckptfix.pieces.scattered import ScatteredSource
from tests.dcp_folders import along, as_dicts, consolidated, edit, grid, item, same, save, whole
from tests.pieces.test_joining import numbered
from tests.sharded import ckptfix_command, done

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int8,
    torch.int64, torch.complex64, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip


def model() -> dict[str, torch.Tensor]:
    """Tensors of every kind of shape and dtype."""
    state = {f"even.{str(dtype)[6:]}": numbered((8, 6), dtype) for dtype in DTYPES}
    state |= {
        "uneven": numbered((5, 3), torch.float32),
        "one row": numbered((1, 7), torch.float32),
        "cube": numbered((3, 5, 4), torch.int16),
        "vector": numbered((7,), torch.float32),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2**40 + 1),
        "yes": torch.tensor(True),
        "turned": numbered((7, 3), torch.float32).t(),
        "a.key.with.dots": numbered((4, 4), torch.float32),
    }
    return state


def training() -> dict[str, Any]:
    """A state dict, an optimizer, and all else that is saved beside them."""
    state = model()
    return {
        "model": state,
        "optimizer": {
            "state": {key: {"step": torch.tensor(3.0), "exp_avg": state[key]} for key in state},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(state)}],
        },
        "epoch": 7,
        "names": ["x", "y"],
        "mixed": [torch.ones(2), 5, "text", {"inside": torch.zeros(3)}],
        "pair": (torch.ones(2), 1),
        "config": {"b": None, "a": 1.5},
        "a/slash": torch.ones(1),
    }


SPLITS = {
    "whole": whole,
    "rows of 2": along(0, 2),
    "rows of 3": along(0, 3),
    "columns of 4": along(1, 4),
    "columns of 2": along(1, 2),
    "grid": grid(2, 3),
    "deep": along(2, 3),
}


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> Any:
    return SPLITS[request.param]


# --- what is in it


@pytest.mark.parametrize("writer", [{}, {"thread_count": 3}, {"single_file_per_rank": False}])
def test_everything_is_as_it_was_saved(tmp_path: Path, split: Any, writer: Any) -> None:
    state = training()
    folder = save(tmp_path / "step", state, split, **writer)
    assert same(ckptfix.load(folder), state)


def test_it_is_what_torch_makes_of_it(tmp_path: Path, split: Any) -> None:
    folder = save(tmp_path / "step", training(), split)
    theirs = consolidated(folder, tmp_path / "theirs.pt")
    assert same(as_dicts(ckptfix.load(folder)), as_dicts(theirs))


def test_it_becomes_one_file(tmp_path: Path, split: Any) -> None:
    state = training()
    save(tmp_path / "checkpoint-5", state, split, thread_count=2)
    done("convert", "checkpoint-5/", "whole.pt", cwd=tmp_path)
    assert same(torch.load(tmp_path / "whole.pt", weights_only=False), state)


def test_the_weights_become_a_safetensors_file(tmp_path: Path, split: Any) -> None:
    state = {key: value for key, value in model().items() if value.dtype != torch.complex64}
    save(tmp_path / "step", {"model": state, "epoch": 3}, split)
    done("convert", "step", "model.safetensors", cwd=tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert same({key: found[key] for key in state}, state)
    assert same(dict(ckptfix.load_state_dict(tmp_path / "step")), state)


def test_strides_stay(tmp_path: Path) -> None:
    images = numbered((8, 3, 4, 4), torch.float32).to(memory_format=torch.channels_last)
    state = {"turned": numbered((7, 3), torch.float32).t(), "images": images}
    for name, split in SPLITS.items():
        folder = save(tmp_path / name, state, split)
        found = ckptfix.load(folder)
        assert same(found, state)
        if "columns" not in name and name not in ("grid", "deep"):
            assert found["images"].stride() == images.stride()
    assert ckptfix.load(tmp_path / "whole")["turned"].stride() == (1, 3)


def test_rows_are_spans_of_the_files_and_columns_are_gathered(tmp_path: Path) -> None:
    state = {"w": numbered((64, 64), torch.float32)}
    rows = door.read(save(tmp_path / "rows", state, along(0, 4), thread_count=2)).root["w"]
    assert [type(span.source) for span in rows.storage.spans] == [FileSource] * 4
    assert all(span.crc is not None for span in rows.storage.spans)
    columns = door.read(save(tmp_path / "columns", state, along(1, 4))).root["w"]
    assert [type(span.source) for span in columns.storage.spans] == [ScatteredSource]


def test_the_verbs_take_it_as_a_file(tmp_path: Path, split: Any) -> None:
    state = {f"module.{key}": value for key, value in model().items()}
    save(tmp_path / "step", state, split)
    torch.save(state, tmp_path / "whole.pt")
    assert "module.uneven" in done("inspect", "step", cwd=tmp_path)
    assert "structure is sound" in done("check", "--read-data", "step", cwd=tmp_path)
    assert ckptfix_command("diff", "step", "whole.pt", cwd=tmp_path).returncode == 0
    assert "matches" in done("check", "step", "--like", "whole.pt", cwd=tmp_path)
    done("strip-prefix", "step", "stripped.pt", cwd=tmp_path)
    found = torch.load(tmp_path / "stripped.pt")
    assert same(dict(found), {key.removeprefix("module."): v for key, v in state.items()})
    done("fix", "step", "fixed.pt", "--like", "stripped.pt", cwd=tmp_path)
    assert same(dict(torch.load(tmp_path / "fixed.pt")), dict(found))


def test_one_value_is_not_two_that_are_alike(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(1), "a": {"c": torch.zeros(2)}, "list": [torch.ones(1)] * 12}
    assert same(ckptfix.load(save(tmp_path / "step", state)), state)


def test_what_dcp_loses_is_lost(tmp_path: Path) -> None:
    state = {"t": torch.ones(1), "no": {}, "numbers": {0: torch.ones(2)}, "l": [{}, torch.ones(1)]}
    found = ckptfix.load(save(tmp_path / "step", state))
    assert list(found) == ["t", "numbers", "l"]
    assert list(found["numbers"]) == ["0"]
    assert found["l"][0] is None


def test_a_state_dict_that_was_not_taken_apart_keeps_its_names(tmp_path: Path) -> None:
    state = {"decoder.w": torch.ones(2, 3), "decoder.b": torch.zeros(3)}
    folder = save(tmp_path / "step", state)
    edit(folder, lambda metadata: metadata.planner_data.clear())
    assert same(ckptfix.load(folder), state)
    edit(folder, lambda metadata: delattr(metadata, "planner_data"))
    assert same(ckptfix.load(folder), state)


# --- finding it


@pytest.mark.parametrize("named", ["step", "step/", "step/.metadata", "step/__0_0.distcp", "."])
def test_it_is_found_from_wherever_it_is_named(tmp_path: Path, named: str) -> None:
    state = training()
    save(tmp_path / "step", state, thread_count=2)
    done("convert", named, "whole.pt", cwd=tmp_path)
    assert same(torch.load(tmp_path / "whole.pt", weights_only=False), state)


def test_several_in_one_folder_are_listed(tmp_path: Path) -> None:
    for step in ("step-1", "step-2"):
        save(tmp_path / step, training())
    with pytest.raises(ReadError, match="holds 2 checkpoints in folders: step-1, step-2") as caught:
        ckptfix.open(tmp_path)
    assert str(tmp_path / "step-2") in str(caught.value.hint)


def test_pieces_beside_a_whole_checkpoint_are_told_apart(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", {"w": torch.ones(4)})
    save_file({"v": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ReadError, match=r"two checkpoints: in pieces, .*, and model.safetensors"):
        ckptfix.open(folder)
    assert list(ckptfix.load(folder / ".metadata")) == ["w"]
    assert list(ckptfix.load(folder / "__0_0.distcp")) == ["w"]
    assert list(ckptfix.load(folder / "model.safetensors")) == ["v"]


def test_accelerate_saves_two_folders_of_one_checkpoint(tmp_path: Path) -> None:
    state = training()
    save(tmp_path / "pytorch_model_fsdp_0", {"model": state["model"]}, along(0, 2))
    save(tmp_path / "optimizer_0", {"optimizer": state["optimizer"]}, along(0, 2))
    (tmp_path / "random_states_0.pkl").write_bytes(b"#")
    assert same(ckptfix.load(tmp_path), {"model": state["model"], "optimizer": state["optimizer"]})


@pytest.mark.parametrize("name", ["meta.pt", "common.pt"])
def test_what_a_trainer_keeps_beside_the_pieces_is_there(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "step", {"model": model()}, along(0, 2))
    rest = {"epoch": 3, "hyper_parameters": argparse.Namespace(lr=0.1), "rng": torch.ones(2)}
    torch.save(rest, folder / name)
    done("convert", "step", "whole.pt", cwd=tmp_path)
    found = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert same(found["model"], model())
    assert {key: str(value) for key, value in rest.items()} == {
        key: str(found[key]) for key in rest
    }
    torch.save({"model": 1}, folder / name)
    with pytest.raises(UnsafeError, match="model is in the pieces and beside them"):
        ckptfix.open(folder)


def test_files_of_an_earlier_save_are_told_and_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", {"w": torch.ones(4)})
    assert not ckptfix.open(folder).findings
    (folder / "__1_0.distcp").touch()  # a rank that had nothing to save
    assert not ckptfix.open(folder).findings
    (folder / "__7_0.distcp").write_bytes(b"anything")
    (found,) = ckptfix.open(folder).findings
    assert (found.code, "__7_0.distcp" in found.message) == ("surplus-shard", True)


# --- ranks that did not tell each other


def ranks(folder: Path, number: int, ranks_of: Callable[[str, int], list[int]]) -> Path:
    """Give each rank a `.metadata` of its own, with the items that `ranks_of` gives it."""
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").unlink()
    for rank in range(number):
        mine = pickle.loads(whole)
        mine.storage_data = {
            index: info
            for index, info in mine.storage_data.items()
            if rank in ranks_of(index.fqn, index.index or 0)
        }
        kept = {(index.fqn, tuple(index.offset or ())) for index in mine.storage_data}
        for name, held in [*mine.state_dict_metadata.items()]:
            for chunk in [*getattr(held, "chunks", ())]:
                if (name, tuple(chunk.offsets)) not in kept:
                    held.chunks.remove(chunk)
            if not any(name == other for other, _ in kept):
                del mine.state_dict_metadata[name], mine.planner_data[name]
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(mine))
    return folder


def test_what_each_rank_says_is_put_together(tmp_path: Path) -> None:
    state = {"model": model(), "epoch": 3}
    folder = save(tmp_path / "step", state, along(0, 12))
    ranks(folder, 12, lambda name, number: [number])
    found = ckptfix.load(folder)
    assert same(as_dicts(found), as_dicts(state))
    assert same(as_dicts(ckptfix.load(folder / "__10.metadata")), as_dicts(state))
    (folder / "__1.metadata").unlink()
    with pytest.raises(DamagedError, match=r"the piece that begins at \[1, 0\]"):
        ckptfix.open(folder)


@pytest.mark.parametrize("other", [torch.zeros(300), torch.ones(299), torch.ones(300).int(), 5])
def test_what_several_ranks_saved_has_to_be_the_same(tmp_path: Path, other: Any) -> None:
    def saved(rank: int, value: Any) -> bytes:
        folder = save(tmp_path / f"rank{rank}", {"w": value, "n": 7})

        def change(metadata: Any) -> None:
            for info in metadata.storage_data.values():
                info.relative_path = f"__{rank}_0.distcp"

        edit(folder, change)
        (tmp_path / f"__{rank}_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
        return (folder / ".metadata").read_bytes()

    for rank in (0, 1):
        (tmp_path / f"__{rank}.metadata").write_bytes(saved(rank, torch.ones(300)))
    assert same(ckptfix.load(tmp_path), {"w": torch.ones(300), "n": 7})
    (tmp_path / "__1.metadata").write_bytes(saved(1, other))
    with pytest.raises(UnsafeError, match=r"the ranks (saved different|disagree about)"):
        ckptfix.open(tmp_path)


# --- what is wrong with it


def refused(folder: Path, code: str, match: str) -> CkptfixError:
    with pytest.raises(CkptfixError, match=match) as caught:
        ckptfix.open(folder)
    assert caught.value.code == code
    assert str(folder) in str(caught.value)
    assert caught.value.hint is not None
    ran = ckptfix_command("convert", folder, folder.parent / "out.pt")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr
    assert not (folder.parent / "out.pt").exists()
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pieces of a tensor and one number, in three files."""
    state = {"w": numbered((8, 4), torch.float32), "n": 5}
    return save(tmp_path / "step", state, along(0, 4), thread_count=3)


def file_of(folder: Path, name: str, number: int = 0) -> Path:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    found: str = item(metadata, name, number).relative_path
    return folder / found


def test_a_save_that_did_not_finish(folder: Path) -> None:
    os.rename(folder / ".metadata", folder / ".metadata.tmp")
    refused(folder, "no-metadata", "the save did not finish")
    with pytest.raises(DamagedError, match="the save did not finish"):
        ckptfix.open(folder / "__0_0.distcp")


def test_a_file_that_is_not_there(folder: Path) -> None:
    gone = file_of(folder, "w", 2)
    gone.unlink()
    refused(folder, "piece-missing", f"files of pieces are not there: {gone.name}")


def test_a_file_that_is_cut_short(folder: Path) -> None:
    path = file_of(folder, "w", 3)
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "piece-missing", f"'w': its bytes end at .*, {path.name} at")


def test_a_chunk_that_nothing_says_where_it_is(folder: Path) -> None:
    def change(metadata: Any) -> None:
        gone = next(index for index in metadata.storage_data if index.offset == (4, 0))
        del metadata.storage_data[gone]

    edit(folder, change)
    refused(folder, "piece-missing", r"'w': nothing says where the bytes of the piece at \[4, 0\]")


def test_chunks_that_leave_a_gap(folder: Path) -> None:
    def change(metadata: Any) -> None:
        del metadata.state_dict_metadata["w"].chunks[1]

    edit(folder, change)
    refused(folder, "piece-missing", r"'w': the piece that begins at \[2, 0\] of \[8, 4\]")


def test_chunks_that_overlap(folder: Path) -> None:
    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["w"].chunks[1]
        index = next(index for index in metadata.storage_data if index.offset == (2, 0))
        moved = type(index)("w", (1, 0))
        metadata.storage_data[moved] = metadata.storage_data.pop(index)
        chunk.offsets = torch.Size((1, 0))

    edit(folder, change)
    refused(folder, "pieces-overlap", "'w': the pieces .* overlap")


@pytest.mark.parametrize("offset", [(7, 0), (-1, 0), (0,), (1 << 63, 0)])
def test_chunks_that_are_not_inside(folder: Path, offset: tuple[int, ...]) -> None:
    def change(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["w"].chunks[1]
        index = next(index for index in metadata.storage_data if index.offset == (2, 0))
        fields = dict(vars(chunk), offsets=offset)
        vars(chunk).update(fields)
        moved = type(index)("w")
        object.__setattr__(moved, "offset", offset)
        metadata.storage_data[moved] = metadata.storage_data.pop(index)

    edit(folder, change)
    refused(folder, "piece-outside", "'w': the piece .* is not inside")


def test_a_piece_of_another_shape(folder: Path) -> None:
    def change(metadata: Any) -> None:
        first, second = (item(metadata, "w", number) for number in (0, 1))
        metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size((1, 4))
        assert first is not second

    edit(folder, change)
    refused(folder, "unsafe", r"'w': the piece \[1, 4\] at \[0, 0\] has the shape \[2, 4\]")


def test_a_piece_of_another_dtype(folder: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].properties.dtype = torch.int32

    edit(folder, change)
    refused(folder, "unsafe", "'w': the piece .* is float32, not int32")


NAMES = (
    "../evil.distcp", "/etc/passwd", "sub/x.distcp", "C:\\x.distcp", "C:x", "..", "", "a\0b", "x.",
    "\\\\host\\x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere(folder: Path, name: str) -> None:
    edit(folder, lambda metadata: setattr(item(metadata, "n"), "relative_path", name))
    refused(folder, "piece-name", "puts 'n' in .*, which is not a name of a file beside it")


def test_slices_over_each_other(folder: Path) -> None:
    def change(metadata: Any) -> None:
        first, second = item(metadata, "w", 0), item(metadata, "w", 1)
        second.relative_path, second.offset = first.relative_path, first.offset + 1

    edit(folder, change)
    refused(folder, "pieces-overlap", "two items overlap at byte 1")


def test_two_chunks_of_one_slice(folder: Path) -> None:
    def change(metadata: Any) -> None:
        first, second = item(metadata, "w", 0), item(metadata, "w", 1)
        vars(second).update(vars(first))

    edit(folder, change)
    refused(folder, "pieces-overlap", "two items overlap")


def test_two_entries_for_one_piece(folder: Path) -> None:
    def change(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "w")
        other = type(index)(index.fqn)
        metadata.storage_data[other] = metadata.storage_data[index]
        object.__setattr__(other, "offset", index.offset)  # when Python no longer looks

    edit(folder, change)
    refused(folder, "piece-twice", "says twice where the piece of 'w' at")


@pytest.mark.parametrize(("field", "value"), [("offset", -1), ("length", -1), ("offset", 1 << 70),
                                              ("length", 1 << 70), ("offset", 1.5)])  # fmt: skip
def test_places_that_no_file_has(folder: Path, field: str, value: Any) -> None:
    edit(folder, lambda metadata: setattr(item(metadata, "n"), field, value))
    with pytest.raises(CkptfixError) as caught:
        ckptfix.open(folder)
    assert caught.value.code in ("unsafe", "piece-missing", "pieces-overlap")


@pytest.mark.parametrize(
    "paths",
    [
        {"w": ("w",), "n": ("w",)},
        {"w": ("w",), "n": ("w", "n")},
        {"w": ("a", "w"), "n": ("a", 0)},
        {"w": (0,), "n": ("n",)},
        {"w": ("w",), "n": ("l", 1 << 40)},
        {"w": ("w",), "n": ("l", -1)},
        {"w": ("w",), "n": ()},
        {"w": ("w",), "n": "n"},
        {"w": ("w",), "n": (1.5,)},
    ],
)
def test_paths_that_no_tree_has(folder: Path, paths: Any) -> None:
    edit(folder, lambda metadata: setattr(metadata, "planner_data", paths))
    with pytest.raises(CkptfixError) as caught:
        ckptfix.open(folder)
    assert caught.value.code in ("unsafe", "damaged")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("state_dict_metadata", "is expected"),
        ("storage_data", "is expected"),
    ],
)
def test_another_class_in_the_place_of_one(folder: Path, where: str, what: str) -> None:
    def change(metadata: Any) -> None:
        for key in getattr(metadata, where):
            getattr(metadata, where)[key] = argparse.Namespace(relative_path="x")

    edit(folder, change)
    refused(folder, "unsupported", what)


def test_what_is_damaged_in_a_file_is_never_taken_for_sound(folder: Path) -> None:
    state = ckptfix.load(folder)
    path = file_of(folder, "w", 1)
    for at in range(0, path.stat().st_size, 7):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x20
        broken = folder.parent / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        (broken / path.name).write_bytes(data)
        with contextlib.suppress(CkptfixError):
            assert same(ckptfix.load(broken, verify=True), state), at


def test_columns_are_checked_before_they_are_written(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", {"w": numbered((8, 64), torch.float32)}, along(1, 4))
    span = door.read(folder).root["w"].storage.spans[0]
    needle = torch.Tensor.numpy(ckptfix.load(folder)["w"][0, 16:32]).tobytes()
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 1] ^= 1
    path.write_bytes(data)
    assert isinstance(span.source, ScatteredSource)
    for out in ("out.pt", "out.safetensors"):
        ran = ckptfix_command("convert", "step", out, cwd=tmp_path)
        assert ran.returncode == 2
        assert "checksum" in ran.stderr
        assert not (tmp_path / out).exists()
    assert ckptfix_command("check", "--read-data", "step", cwd=tmp_path).returncode == 1


def test_what_is_whole_of_it_is_recovered(tmp_path: Path) -> None:
    state = {"a": numbered((8, 4), torch.float32), "b": numbered((8, 4), torch.float32), "n": 5}
    folder = save(tmp_path / "step", state, along(0, 4), single_file_per_rank=False)
    file_of(folder, "b", 2).unlink()
    ran = ckptfix_command("recover", "step", "saved.pt", cwd=tmp_path)
    assert ran.returncode in (0, 1), ran.stderr
    assert "(b): lost" in ran.stderr
    found = torch.load(tmp_path / "saved.pt")
    assert same(found, {"a": state["a"], "n": 5})


def test_nothing_in_it_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/canary",)

    folder = save(tmp_path / "step", {"w": torch.ones(2), "evil": Evil()})
    edit(folder, lambda metadata: setattr(metadata, "storage_meta", Evil()))
    (tmp_path / "canary").unlink(missing_ok=True)  # torch's pickler made none; to be sure
    assert sorted(ckptfix.load(folder)) == ["evil", "w"]
    for verb in ("inspect", "check", "convert", "fix"):
        out = [f"{verb}.pt"] if verb in ("convert", "fix") else []
        ckptfix_command(verb, "step", *out, cwd=tmp_path)
    assert not (tmp_path / "canary").exists()


def test_bytes_that_are_packed_are_refused_by_name(folder: Path) -> None:
    def change(metadata: Any) -> None:
        item(metadata, "w", 1).transform_descriptors = ["stream.zstd/2"]

    edit(folder, change)
    refused(folder, "unsupported", r"'w': its bytes are packed \(stream.zstd/2\)")


def test_a_value_in_the_place_of_a_piece_is_refused(folder: Path) -> None:
    def change(metadata: Any) -> None:
        vars(item(metadata, "w", 0)).update(vars(item(metadata, "n")))
        del metadata.state_dict_metadata["n"]
        del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == "n")]

    edit(folder, change)
    refused(folder, "unsafe", r"'w': the piece at \[\d, 0\] is not a tensor")


@pytest.mark.skipif(os.name != "posix", reason="needs limits")
def test_more_files_than_a_process_may_have_open_at_first_are_read(tmp_path: Path) -> None:
    state = {f"w{n}": torch.full((40, 4), n) for n in range(120)}
    save(tmp_path / "step", state, along(1, 2), single_file_per_rank=False)
    few = "import resource, runpy, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
    few += "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard)); "
    few += "sys.argv = ['ckptfix', 'convert', 'step', 'whole.pt']; "
    few += "runpy.run_module('ckptfix', run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", few], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert same(torch.load(tmp_path / "whole.pt"), state)


def test_many_items_take_no_longer_than_they_are_many(tmp_path: Path) -> None:
    state = {f"layer.{n}.weight": torch.full((4,), n) for n in range(2000)}
    folder = save(tmp_path / "step", state, along(0, 2))
    assert same(ckptfix.load(folder), state)


# --- packed items


def packed(folder: Path, how: str) -> None:
    """Have `.metadata` say that an item went through something."""

    def change(metadata: Any) -> None:
        vars(item(metadata, "w"))["transform_descriptors"] = [how]

    edit(folder, change)


@pytest.mark.parametrize("how", ["stream.zstd/1", "stream.zstd/2", "stream.other/1"])
def test_items_that_cannot_be_unpacked_are_refused_by_name(tmp_path: Path, how: str) -> None:
    folder = save(tmp_path / "step", {"w": torch.ones(3)})
    packed(folder, how)
    known = importlib.util.find_spec("zstandard") is not None
    told = "zstd, which the package zstandard unpacks" if how == "stream.zstd/1" else f"({how})"
    ran = ckptfix_command("convert", folder, tmp_path / "out.pt")
    assert ran.returncode == 2
    assert known or told in ran.stderr
    assert ran.stderr.count("\nhint: ") == 1
    assert not (tmp_path / "out.pt").exists()


def test_items_packed_with_zstd_are_read_where_that_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    extensions = pytest.importorskip("torch.distributed.checkpoint._extension")
    state = training() | {"large": numbered((300, 200), torch.float32)}
    folder = save(tmp_path / "step", state, along(0, 2), _extensions=[extensions.ZStandard()])
    assert same(ckptfix.load(folder), state)
    done("convert", folder, tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt", weights_only=False), state)


# --- ties


@pytest.mark.parametrize("split", [whole, along(0, 3)])
def test_what_may_have_been_one_tensor_is_told(tmp_path: Path, split: Any) -> None:
    embed = numbered((6, 4), torch.float32)
    state = {"embed.weight": embed, "head.weight": embed, "other": embed + 1, "bias": embed[0]}
    ones = {f"norm.{number}": torch.ones(2, 2) for number in range(3)}  # which are many
    folder = save(tmp_path / "step", {**state, **ones, "bias.2": embed[0].clone()}, split)
    (told,) = ckptfix.open(folder).findings
    assert told.code == "tied-tensors"
    assert told.message.endswith("perhaps one tensor: embed.weight = head.weight")
