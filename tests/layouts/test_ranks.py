"""What real processes saved in pieces, beside the whole of it; `fixtures/make_pieces.py` makes it.

The committed files are of four ranks; the slow tests make those of 2, 3, 4 and 6.
"""

from __future__ import annotations

import math
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.errors import CkptfixError, UnsupportedError
from ckptfix.formats import table
from ckptfix.formats.reading import Reading
from ckptfix.tree.document import Inert, Node, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME
from ckptfix.tree.rebuild import rebuild
from tests.conftest import FIXTURES
from tests.dcp_folders import as_dicts, consolidated, same
from tests.sharded import ckptfix_command, done

if TYPE_CHECKING:
    from pathlib import Path

SLOW = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3, 4, 6)]


@pytest.fixture(params=["committed", *SLOW], scope="module")
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the maker fills."""
    if request.param == "committed":
        return FIXTURES / "pieces"
    out = tmp_path_factory.mktemp("pieces")
    maker = FIXTURES / "make_pieces.py"
    command = [sys.executable, str(maker), str(out), "--ranks", str(request.param)]
    subprocess.run(command, check=True, timeout=300)
    return out


def whole(made: Path, name: str) -> Any:
    return torch.load(made / name, weights_only=False)


@pytest.mark.parametrize("folder", ["dcp", "local"])
def test_every_kind_of_tensor_is_whole_again(made: Path, folder: str) -> None:
    if (made / folder).is_dir():
        assert same(ckptfix.load(made / folder), whole(made, "whole.pt"))


def test_it_is_what_torch_makes_of_it(made: Path, tmp_path: Path) -> None:
    for folder in ("dcp", "fsdp2", "fsdp1_sharded_True"):
        theirs = consolidated(made / folder, tmp_path / "theirs.pt")
        assert same(as_dicts(ckptfix.load(made / folder)), as_dicts(theirs))


def test_strided_shards_of_dcp_are_boxes_as_any(made: Path) -> None:
    if (made / "strided").is_dir():
        assert same(ckptfix.load(made / "strided"), whole(made, "strided_whole.pt"))


def test_an_fsdp2_model_is_what_full_tensor_says(made: Path) -> None:
    found = ckptfix.load(made / "fsdp2")
    assert list(found) == ["model", "optimizer", "epoch"]
    assert same(dict(found["model"]), dict(whole(made, "fsdp2_whole.pt")))
    assert list(found["optimizer"]["state"]) == [
        key for key in found["model"] if "running" not in key and "tracked" not in key
    ]


@pytest.mark.parametrize("original", [True, False])
def test_an_fsdp1_model_is_its_full_state_dict(made: Path, original: bool) -> None:
    found = ckptfix.load(made / f"fsdp1_sharded_{original}")
    assert same(dict(found), dict(whole(made, "fsdp1_whole.pt")))


# --- files of ranks, as torch.save makes them


def ranks_of(made: Path, stem: str) -> list[Path]:
    return sorted(made.glob(f"{stem}_rank_*.pt"))


def test_dtensors_are_whole_again_whichever_file_is_named(made: Path) -> None:
    for path in ranks_of(made, "tensors"):
        assert same(ckptfix.load(path), whole(made, "whole.pt"))


def test_strided_shards_are_cut_where_torch_cuts_them(made: Path) -> None:
    for path in ranks_of(made, "strided"):
        assert same(ckptfix.load(path), whole(made, "strided_whole.pt"))


def test_a_training_checkpoint_of_ranks_is_what_dcp_says_it_is(made: Path) -> None:
    found = ckptfix.load(made / "fsdp2_rank_0.pt")
    assert same(dict(found["model"]), dict(whole(made, "fsdp2_whole.pt")))
    assert same(as_dicts(dict(found)), as_dicts(ckptfix.load(made / "fsdp2")))


@pytest.mark.parametrize("original", [True, False])
def test_sharded_tensors_are_the_full_state_dict(made: Path, original: bool) -> None:
    for path in ranks_of(made, f"fsdp1_sharded_{original}"):
        assert same(dict(ckptfix.load(path)), dict(whole(made, "fsdp1_whole.pt")))


def test_a_sum_is_refused(made: Path) -> None:
    with pytest.raises(UnsupportedError, match="sum: is a sum of which each rank has a part"):
        ckptfix.open(made / "partial_rank_0.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as verl leaves it: the files of four ranks."""
    for rank in range(4):
        name = f"model_world_size_4_rank_{rank}.pt"
        shutil.copy(FIXTURES / "pieces" / f"tensors_rank_{rank}.pt", tmp_path / name)
    return tmp_path


def refused(path: Path, code: str, match: str) -> None:
    with pytest.raises(CkptfixError, match=match) as caught:
        ckptfix.open(path)
    assert caught.value.code == code
    assert caught.value.hint is not None
    ran = ckptfix_command("convert", path, path.parent / "out.pt")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\nhint: ") == 1
    assert "see how it is used" not in ran.stderr
    assert not (path.parent / "out.pt").exists()


def test_a_folder_of_ranks_becomes_one_file(folder: Path) -> None:
    (folder / "extra_state_world_size_4_rank_0.pt").write_bytes(b"#")
    done("convert", ".", "whole.pt", cwd=folder)
    found = torch.load(folder / "whole.pt", weights_only=False)
    assert same(found, whole(FIXTURES / "pieces", "whole.pt"))
    (folder / "whole.pt").unlink()
    done("convert", "model_world_size_4_rank_2.pt", "out.safetensors", cwd=folder)


def test_the_folder_is_still_known_once_something_was_made_of_it(folder: Path) -> None:
    done("fix", "model_world_size_4_rank_0.pt", "model_world_size_4_rank_0.fixed.pt", cwd=folder)
    shutil.copy(folder / "model_world_size_4_rank_1.pt", folder / "optim_world_size_4_rank_1.pt")
    assert same(ckptfix.load(folder), whole(FIXTURES / "pieces", "whole.pt"))


# --- as older versions of torch pickle them


def older(path: Path, out: Path) -> None:
    """Write a rank's file with its meshes as torch 2.8 has them: a tensor of ranks."""
    document = table.read_place(Place(path), Reading())

    def change(node: Node) -> Node:
        if isinstance(node, Inert) and str(node.function).endswith(".DeviceMesh"):
            shape = tuple(axis.state["shape"][0] for axis in node.state["_layout"].state["axes"])
            ranks = struct.pack(f"<{math.prod(shape)}q", *range(math.prod(shape)))
            span = Span(BytesSource(ranks), 0, len(ranks))
            storage = Storage(BY_NAME["int64"], math.prod(shape), "cpu", (span,))
            mesh = Tensor(storage, storage.dtype, shape, contiguous_stride(shape))
            state = {
                "device_type": "cpu",
                "mesh": mesh,
                "mesh_dim_names": node.state["_mesh_dim_names"],
                "_coordinate_on_dim": node.state["_coordinate_on_dim"],
            }
            return replace(node, state=state)
        if isinstance(node, Inert) and str(node.function).endswith(".DTensorSpec"):
            fields = ("mesh", "placements", "tensor_meta")
            return replace(node, state={key: node.state[key] for key in fields})
        return node

    root = rebuild(document.root, change)
    table.write_place(replace(document, root=root), Place(out), table.TORCH_ZIP)


@pytest.mark.parametrize("stem", ["tensors", "strided"])
def test_meshes_of_older_versions_are_read(tmp_path: Path, stem: str) -> None:
    for rank in range(4):
        name = f"{stem}_rank_{rank}.pt"
        older(FIXTURES / "pieces" / name, tmp_path / name)
    known = "whole.pt" if stem == "tensors" else f"{stem}_whole.pt"
    assert same(ckptfix.load(tmp_path), whole(FIXTURES / "pieces", known))
    (tmp_path / f"{stem}_rank_0.pt").rename(tmp_path / "alone.pt")
    refused(tmp_path / "alone.pt", "piece-missing", "files of 3 of 4 ranks are not there: 1, 2, 3")


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_is_not_there_is_named(folder: Path, rank: int) -> None:
    (folder / f"model_world_size_4_rank_{rank}.pt").unlink()
    other = folder / f"model_world_size_4_rank_{(rank + 1) % 4}.pt"
    refused(other, "piece-missing", f"files of 1 of 4 ranks are not there: {rank}")


@pytest.mark.parametrize("there", [(0, 1), (2, 3), (0, 3), (1, 2)])
def test_half_of_the_ranks_is_enough_where_they_are_replicas(
    tmp_path: Path, there: tuple[int, int]
) -> None:
    known = whole(FIXTURES / "pieces", "whole.pt")["replicas"]
    for rank in there:
        shutil.copy(FIXTURES / "pieces" / f"replicas_rank_{rank}.pt", tmp_path)
    own = torch.full((4,), there[0], dtype=torch.uint8)
    assert same(ckptfix.load(tmp_path), {"w": known, "rng_state": own})
    told = ckptfix.open(tmp_path).findings
    assert [(one.code, "rng_state" in one.message) for one in told] == [("ranks-differ", True)]
    (tmp_path / f"replicas_rank_{there[1]}.pt").unlink()
    refused(tmp_path / f"replicas_rank_{there[0]}.pt", "piece-missing", "files of 3 of 4 ranks")


def test_files_under_the_names_of_others_are_refused(folder: Path) -> None:
    one, other = (folder / f"model_world_size_4_rank_{rank}.pt" for rank in (0, 3))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    refused(one, "unsafe", "the file of rank 0 was saved as tensors_rank_3")


def test_one_rank_twice_is_refused(folder: Path) -> None:
    one, other = (folder / f"model_world_size_4_rank_{rank}.pt" for rank in (0, 1))
    other.write_bytes(one.read_bytes())
    refused(one, "unsafe", "the file of rank 1 was saved as tensors_rank_0")


def repacked(path: Path, old: bytes, new: bytes, folder: str | None = None) -> None:
    """Change the pickle of a torch zip, and the name of the folder in it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            first, _, rest = name.partition("/")
            if rest == "data.pkl":
                assert old in data
                data = data.replace(old, new)
            archive.writestr(f"{folder or first}/{rest}", data)


def test_a_piece_that_its_rank_does_not_have_is_refused(folder: Path) -> None:
    one, other = (folder / f"model_world_size_4_rank_{rank}.pt" for rank in (0, 3))
    one.write_bytes(other.read_bytes())
    repacked(one, b"epoch", b"epoch", folder="archive")
    refused(one, "unsafe", r"was saved by the rank at \[3\] of its mesh, not by rank 0")
    repacked(one, b"_coordinate_on_dim", b"_coordinate_on_xxx")
    refused(one, "unsafe", r"has a piece of .* where rank 0 has the piece")


def test_ranks_of_two_saves_are_refused(folder: Path) -> None:
    path = folder / "model_world_size_4_rank_1.pt"
    epoch = re.compile(rb"X\x05\x00\x00\x00epoch(?:q.|r....)K\x07", re.DOTALL)
    with zipfile.ZipFile(path) as archive:
        (found,) = epoch.findall(archive.read("tensors_rank_1/data.pkl"))
    repacked(path, found, found[:-1] + b"\x08")
    refused(path, "ranks-differ", "epoch differs in the files of ranks 0 and 1")


def test_two_ranks_that_differ_in_what_both_have_are_refused(folder: Path) -> None:
    path = folder / "model_world_size_4_rank_2.pt"
    data = bytearray(path.read_bytes())
    needle = torch.arange(4.0).numpy().tobytes()
    assert data.count(needle) == 1
    with zipfile.ZipFile(path) as archive:
        (name,) = [one for one in archive.namelist() if archive.read(one) == needle]
        records = {one: archive.read(one) for one in archive.namelist()}
    records[name] = torch.arange(4.0).flip(0).contiguous().numpy().tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in records.items():
            archive.writestr(one, content)
    refused(path, "ranks-differ", "plain differs in the files of ranks 0 and 2")


def test_sharded_tensors_under_the_names_of_others_are_refused(tmp_path: Path) -> None:
    for rank in range(4):
        source = FIXTURES / "pieces" / f"fsdp1_sharded_True_rank_{3 - rank}.pt"
        shutil.copy(source, tmp_path / f"x_rank{rank}.pt")
        repacked(tmp_path / f"x_rank{rank}.pt", b"scale", b"scale", folder="archive")
    refused(tmp_path / "x_rank0.pt", "unsafe", "was saved by rank 3, not by rank 0")


@pytest.mark.parametrize("name", ["model.pt", "step_500.pt", "500.bin"])
def test_one_file_alone_is_told_to_be_of_one_rank(tmp_path: Path, name: str) -> None:
    for stem in ("tensors", "fsdp1_sharded_True"):
        shutil.copy(FIXTURES / "pieces" / f"{stem}_rank_0.pt", tmp_path / name)
        refused(tmp_path / name, "piece-missing", "files of 3 of 4 ranks are not there: 1, 2, 3")


@pytest.mark.parametrize("name", ["{}.pt", "model_{}.pt", "a-rank-{}-b.pt", "x.RANK{}.bin"])
def test_files_find_each_other_by_their_numbers(tmp_path: Path, name: str) -> None:
    for rank in range(4):
        source = FIXTURES / "pieces" / f"tensors_rank_{rank}.pt"
        shutil.copy(source, tmp_path / name.format(rank))
    (tmp_path / "model_step_7.pt").write_bytes(b"#")
    found = ckptfix.load(tmp_path / name.format(2))
    assert same(found, whole(FIXTURES / "pieces", "whole.pt"))


def test_what_is_whole_is_recovered(folder: Path) -> None:
    (folder / "model_world_size_4_rank_3.pt").unlink()
    ran = ckptfix_command("recover", folder / "model_world_size_4_rank_0.pt", folder / "saved.pt")
    assert ran.returncode == 1, ran.stderr
    found = torch.load(folder / "saved.pt", weights_only=False)
    known = whole(FIXTURES / "pieces", "whole.pt")
    assert {"number", "same.everywhere", "plain", "epoch"} <= set(found)
    assert "rows" not in found
    assert same(dict(found), {key: known[key] for key in found})


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("length", [300, 3_000, 9_000, 11_000])
def test_what_is_whole_is_recovered_where_a_file_is_cut(
    folder: Path, rank: int, length: int
) -> None:
    path = folder / f"model_world_size_4_rank_{rank}.pt"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CkptfixError):
        ckptfix.open(folder)
    ran = ckptfix_command("recover", folder, folder / "saved.pt")
    assert ran.returncode in (0, 1), ran.stderr
    found = torch.load(folder / "saved.pt", weights_only=False)
    known = whole(FIXTURES / "pieces", "whole.pt")
    assert {"number", "same.everywhere", "replicas", "plain", "epoch"} <= set(found)
    assert same(dict(found), {key: known[key] for key in found})
    assert (len(found) == len(known)) is (ran.returncode == 0)


def test_what_is_whole_is_recovered_beside_a_sum(tmp_path: Path) -> None:
    for rank in range(4):
        path = tmp_path / f"x_rank_{rank}.pt"
        part = table.read_place(Place(FIXTURES / "pieces" / f"partial_rank_{rank}.pt"), Reading())
        shutil.copy(FIXTURES / "pieces" / f"tensors_rank_{rank}.pt", path)
        repacked(path, b"epoch", b"epoch", folder="archive")
        edited(path, lambda root, sums=part.root: {**sums, **root})
    refused(tmp_path, "partial", "sum: is a sum of which each rank has a part")
    ran = ckptfix_command("recover", tmp_path, tmp_path / "saved.pt")
    assert ran.returncode == 1, ran.stderr
    assert "(sum): lost" in ran.stderr
    assert same(dict(torch.load(tmp_path / "saved.pt", weights_only=False)),
                whole(FIXTURES / "pieces", "whole.pt"))  # fmt: skip


def edited(path: Path, change: Any) -> None:
    """Write a rank's file anew with another tree."""
    document = table.read_place(Place(path), Reading())
    changed = replace(document, root=change(document.root))
    path.unlink()
    table.write_place(changed, Place(path), table.TORCH_ZIP)


def test_pieces_inside_of_tuples_are_refused(folder: Path) -> None:
    for rank in range(4):
        path = folder / f"model_world_size_4_rank_{rank}.pt"
        edited(path, lambda root: {**root, "pair": (1, root["rows"])})
    refused(path, "unsupported", "holds tensors in pieces inside of tuples or objects")


def test_a_deep_tree_of_ranks_takes_no_longer_than_it_is_deep(folder: Path) -> None:
    def deep(root: Any) -> Any:
        inner: Any = [7]
        for _ in range(20_000):
            inner = {"a key that is long enough for its path to be of many megabytes": inner}
        return {**root, "deep": inner}

    for rank in range(4):
        edited(folder / f"model_world_size_4_rank_{rank}.pt", deep)
    found = door.read(folder).root["deep"]
    for _ in range(20_000):
        (found,) = found.values()
    assert found == [7]


def without(field: str, cls: str, node: Node) -> Node:
    """An object of a class of torch's without one of its fields."""
    if isinstance(node, Inert) and str(node.function).endswith(f".{cls}"):
        return replace(node, state={key: one for key, one in node.state.items() if key != field})
    return node


@pytest.mark.parametrize(
    ("field", "cls", "code", "match"),
    [
        ("mesh", "DTensorSpec", "unsupported", "has nothing where torch has a DeviceMesh"),
        ("_layout", "DeviceMesh", "unsupported", "has nothing where torch has a _MeshLayout"),
        ("_rank_map", "DeviceMesh", "damaged", "rows: has a mesh whose ranks cannot be read"),
        ("placements", "DTensorSpec", "damaged", "rows: is a DTensor whose placements do not fit"),
        ("dim", "Shard", "damaged", "rows: is cut in dimension None of 2"),
    ],
)
def test_what_a_mesh_does_not_say_is_refused_by_name(
    folder: Path, field: str, cls: str, code: str, match: str
) -> None:
    for rank in range(4):
        path = folder / f"model_world_size_4_rank_{rank}.pt"
        edited(path, lambda root: rebuild(root, lambda node: without(field, cls, node)))
    refused(folder / "model_world_size_4_rank_1.pt", code, match)


def test_a_mesh_without_the_place_of_its_rank_is_read_by_the_name_of_the_file(folder: Path) -> None:
    for rank in range(4):
        path = folder / f"model_world_size_4_rank_{rank}.pt"

        def change(node: Node) -> Node:
            return without("_rank", "DeviceMesh", without("_coordinate_on_dim", "DeviceMesh", node))

        edited(path, lambda root, change=change: rebuild(root, change))
    assert same(ckptfix.load(folder), whole(FIXTURES / "pieces", "whole.pt"))
    (folder / "model_world_size_4_rank_1.pt").rename(folder / "alone.pt")
    refused(folder / "alone.pt", "unsupported", "does not say which rank saved it")


# --- flat parameters


def model_of(name: str) -> str:
    return f"{FIXTURES / 'make_pieces.py'}:{name}"


FLAT = [
    ("fsdp1_local_False_rank_0.pt", "Net", "fsdp1_whole.pt"),
    ("fsdp1_local_True_rank_1.pt", "Net", "fsdp1_whole.pt"),
    ("fsdp1_local_False", "Net", "fsdp1_whole.pt"),
    ("fsdp1_local_True", "Net", "fsdp1_whole.pt"),
    ("fsdp1_tied_rank_0.pt", "Tied", "fsdp1_tied_whole.pt"),
    ("fsdp1_mixed", "Tied", "fsdp1_tied_whole.pt"),
]


def built(name: str) -> torch.nn.Module:
    """A model of the maker's."""
    made: torch.nn.Module = runpy.run_path(str(FIXTURES / "make_pieces.py"))[name]()
    return made


@pytest.mark.parametrize(("name", "model", "known"), FLAT)
def test_flat_parameters_are_the_full_state_dict_of_a_model(
    made: Path, name: str, model: str, known: str
) -> None:
    found = ckptfix.load_state_dict(made / name, model=built(model))
    assert same(dict(found), dict(whole(made, known)))
    assert not ckptfix.open(made / name).check(built(model)).loads


@pytest.mark.parametrize(("name", "known"), [(one, known) for one, _, known in FLAT[1:4:2]])
def test_flat_parameters_are_those_of_another_checkpoint(
    made: Path, tmp_path: Path, name: str, known: str
) -> None:
    done("fix", made / name, tmp_path / "out.pt", "--like", made / known)
    assert same(dict(ckptfix.load(tmp_path / "out.pt")), dict(whole(made, known)))
    (tmp_path / "keys.json").write_text(done("inspect", "--json", made / known))
    out = tmp_path / "out.safetensors"
    done("fix", made / name, out, "--like", tmp_path / "keys.json")
    assert same(dict(ckptfix.load(out)), dict(whole(made, known)))


@pytest.mark.parametrize("name", [one for one, *_ in FLAT])
def test_flat_parameters_alone_are_refused(tmp_path: Path, name: str) -> None:
    path = FIXTURES / "pieces" / name
    for verb, out in (("convert", "out.pt"), ("fix", "out.safetensors")):
        ran = ckptfix_command(verb, path, tmp_path / out)
        assert ran.returncode == 2, (verb, ran.stdout)
        assert "parameters lie flat in" in ran.stderr
        assert f"hint: say which model it is for, {OR_WHICH}: ckptfix fix" in ran.stderr
    with pytest.raises(UnsupportedError, match="parameters lie flat in"):
        ckptfix.open(path).save(tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())
    (told,) = ckptfix.open(path).findings
    assert told.code == "flat-parameters"
    assert "_flat_param" in told.message


OR_WHICH = "or which checkpoint has its shapes (--like)"


@pytest.mark.parametrize("name", [one for one, model, _ in FLAT if model == "Net"])
def test_check_says_that_flat_parameters_have_to_be_split(name: str) -> None:
    ran = ckptfix_command("check", FIXTURES / "pieces" / name, "--model", model_of("Net"))
    assert ran.returncode == 1
    assert "parameters lie flat in" in ran.stdout
    assert "ckptfix fix" in ran.stdout


def test_flat_parameters_that_are_of_another_model_are_refused(tmp_path: Path) -> None:
    path = FIXTURES / "pieces" / "fsdp1_local_False_rank_0.pt"
    ran = ckptfix_command("fix", path, tmp_path / "out.pt", "--model", model_of("Tied"))
    assert ran.returncode == 2
    wanted = "_flat_param cannot be split into parameters: it has 53 elements, the parameters of"
    assert wanted in ran.stderr
    assert "hint: name the very model that was trained: ckptfix fix" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_parameters_under_their_own_names_are_joined_from_the_flat_ones(made: Path) -> None:
    full = whole(made, "fsdp1_whole.pt")
    found = ckptfix.load(made / "fsdp1_local_True_rank_0.pt")
    for name, tensor in full.items():
        assert same(found[name].flatten(), tensor.flatten()), name


@pytest.mark.parametrize("rank", range(4))
def test_of_flat_parameters_that_is_recovered_which_is_sure_to_be_whole(
    tmp_path: Path, rank: int
) -> None:
    for other in {0, 1, 2, 3} - {rank}:
        shutil.copy(FIXTURES / "pieces" / f"fsdp1_local_True_rank_{other}.pt", tmp_path)
    path = next(tmp_path.iterdir())
    refused(path, "piece-missing", f"files of 1 of 4 ranks are not there: {rank}")
    assert ckptfix_command("recover", path, tmp_path / "saved.pt").returncode == 1
    found = torch.load(tmp_path / "saved.pt", weights_only=False)
    full = whole(FIXTURES / "pieces", "fsdp1_whole.pt")
    assert {key for key in full if "norm.running" in key} < set(found)
    assert ("scale" in found) is (rank != 0)  # which lies on the first rank alone
    assert "first.weight" not in found or rank == 3
    for name, tensor in found.items():
        assert same(tensor.flatten(), full[name].flatten()), name


def test_a_pickled_piece_that_is_damaged_is_not_taken_for_the_end(tmp_path: Path) -> None:
    for rank in range(4):
        shutil.copy(FIXTURES / "pieces" / f"fsdp1_local_True_rank_{rank}.pt", tmp_path)
    path = tmp_path / "fsdp1_local_True_rank_1.pt"
    with zipfile.ZipFile(path) as archive:
        lost = archive.read("fsdp1_local_True_rank_1/data/1")
    path.write_bytes(path.read_bytes().replace(lost, bytes(len(lost))))
    assert ckptfix_command("recover", path, tmp_path / "saved.pt").returncode == 1
    found = torch.load(tmp_path / "saved.pt", weights_only=False)
    assert "first.weight" not in found
    full = whole(FIXTURES / "pieces", "fsdp1_whole.pt")
    for name, value in found.items():
        assert name not in full or same(value.flatten(), full[name].flatten())


def test_a_training_checkpoint_with_flat_parameters_gives_its_model(tmp_path: Path) -> None:
    for rank in range(4):
        path = tmp_path / f"x_rank_{rank}.pt"
        shutil.copy(FIXTURES / "pieces" / f"fsdp1_local_False_rank_{rank}.pt", path)
        repacked(path, b"norm", b"norm", folder="archive")

        def change(root: Any) -> Any:
            (shard,) = root["_flat_param"].args[3][0]
            part = shard.attributes["tensor"]
            kept = {"exp_avg": replace(part, storage=replace(part.storage)), "step": 3.0}
            groups = [{"lr": 0.1, "params": [0]}]
            return {"model": root, "optimizer": {"state": {0: kept}, "param_groups": groups}}

        edited(path, change)
    found = ckptfix.load_state_dict(tmp_path, model=built("Net"))
    assert same(dict(found), whole(FIXTURES / "pieces", "fsdp1_whole.pt"))
    told = {one.code: one.message for one in ckptfix.open(tmp_path).findings}
    assert told["ranks-differ"].endswith("left out: optimizer/state/0/exp_avg")
    assert ckptfix.open(tmp_path).document.root["optimizer"]["state"][0]["exp_avg"] is None
