"""State dicts loaded into programs: places, names, refusals; torch.load is the oracle."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import (
    KeyMismatchError,
    PartialPrefixError,
    ReadError,
    RenameError,
    SelectionError,
    UnsupportedError,
)
from fixtures.foonet import FooNet
from tests.conftest import FIXTURES
from tests.oracles import bits, sharing, unlike

if TYPE_CHECKING:
    from pathlib import Path
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

CUDA = FIXTURES / "cuda.pt"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def pair() -> dict[str, torch.Tensor]:
    return {"weight": torch.rand(2, 2), "bias": torch.rand(2)}


# Where tensors go


@pytest.mark.parametrize(
    "map_location",
    [
        "cpu",
        torch.device("cpu"),
        {"cuda:0": "cpu"},
        {"cuda:0": "meta"},
        "meta",
        torch.device("meta"),
        lambda storage, tag: storage,
        lambda storage, tag: torch.UntypedStorage(storage.nbytes(), device="meta"),
    ],
    ids=["str", "device", "dict", "dict-meta", "meta", "device-meta", "callable", "callable-meta"],
)
def test_map_location_means_what_it_means_in_torch(map_location: Any):
    ours = ckptfix.load(CUDA, map_location=map_location)
    theirs = torch.load(CUDA, map_location=map_location)
    assert [tensor.device for tensor in ours.values()] == [t.device for t in theirs.values()]
    if all(tensor.device.type == "cpu" for tensor in theirs.values()):
        assert unlike(ours, theirs) is None


def test_map_location_shows_a_callable_the_tags_that_were_saved():
    seen = []

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        seen.append((tag, storage.device.type, storage.nbytes()))
        return storage

    ckptfix.load(CUDA, map_location=place)
    assert seen == [("cuda:0", "cpu", 64)] * 3


@without_gpu
@pytest.mark.parametrize(
    "map_location", [None, "cuda:0", {"cpu": "cpu"}, lambda storage, tag: None]
)
def test_a_device_that_is_not_there_is_an_error_as_in_torch(map_location: Any):
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        torch.load(CUDA, map_location=map_location)
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        ckptfix.load(CUDA, map_location=map_location)


def test_map_location_none_leaves_tensors_that_were_on_the_cpu_there():
    loaded = ckptfix.load(FIXTURES / "cpu.pt", map_location=None)
    assert unlike(loaded, torch.load(FIXTURES / "cpu.pt")) is None


@without_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu():
    loaded = ckptfix.load_state_dict(CUDA, map_location="auto")
    assert {str(tensor.device) for tensor in loaded.values()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_a_gpu_where_there_is_one():
    loaded = ckptfix.load_state_dict(CUDA, map_location="auto")
    assert {tensor.device.type for tensor in loaded.values()} == {"cuda"}
    assert unlike(loaded, ckptfix.load_state_dict(CUDA)) is None


@pytest.mark.parametrize("map_location", ["meta", {"cpu": "meta", "cuda:0": "meta"}])
def test_rng_state_stays_on_the_cpu_wherever_the_rest_goes(map_location: Any):
    loaded = ckptfix.load(FIXTURES / "dataparallel_cuda_training.pt", map_location=map_location)
    assert loaded["model_state_dict"]["module.linears.0.weight"].is_meta
    torch.set_rng_state(loaded["rng_state"])


def test_values_that_are_no_tensors_come_back_as_torch_gives_them():
    path = FIXTURES / "dataparallel_cuda_training.pt"
    assert unlike(ckptfix.load(path), torch.load(path, map_location="cpu")) is None


# Memory


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ["cpu.pt", "legacy.pt", "plain.safetensors"])
def test_changing_a_loaded_tensor_never_changes_the_file(name: str, mmap: bool, tmp_path: Path):
    path = tmp_path / name
    shutil.copy(FIXTURES / name, path)
    loaded = ckptfix.load_state_dict(path, mmap=mmap)
    for tensor in loaded.values():
        tensor.fill_(7)
    assert path.read_bytes() == (FIXTURES / name).read_bytes()
    again = ckptfix.load_state_dict(path)
    assert unlike(again, ckptfix.load_state_dict(FIXTURES / name)) is None
    assert all((tensor == 7).all() for tensor in loaded.values())


@pytest.mark.parametrize("name", ["cpu.pt", "legacy.pt", "plain.safetensors", "tied.pt"])
def test_a_map_gives_what_reading_gives(name: str):
    path = FIXTURES / name
    mapped, read = (ckptfix.load(path, mmap=mmap) for mmap in (True, False))
    assert unlike(mapped, read) is None
    assert sharing(mapped) == sharing(read)


OVERWRITING = """
import os, sys, safetensors.torch, torch, ckptfix
path, wanted = sys.argv[1], torch.arange(300_000.0)

def save():
    if path.endswith(".safetensors"):
        safetensors.torch.save_file({"w": wanted}, path)
    else:
        torch.save({"w": wanted}, path, _use_new_zipfile_serialization="legacy" not in path)

def load_into(path):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.empty(300_000, device="meta"))
    ckptfix.load_into(model, path)
    return dict(model.state_dict())

def zeros(loaded):
    with open(path, "r+b") as file:
        file.write(bytes(os.path.getsize(path)))

overwrites = {
    "torch.save": lambda loaded: torch.save(loaded, path),
    "torch.save of less": lambda loaded: torch.save({"w": torch.zeros(1)}, path),
    "cut short": lambda loaded: os.truncate(path, 100),
    "emptied": lambda loaded: open(path, "wb").close(),
    "zeros": zeros,
    "ckptfix.save": lambda loaded: ckptfix.save(loaded, path, to="torch", force=True),
}
for how, overwrite in overwrites.items():
    for load in (ckptfix.load, ckptfix.load_state_dict, load_into):
        save()
        loaded = load(path)
        print(how, load.__name__, flush=True)
        overwrite(loaded)
        assert torch.equal(loaded["w"], wanted)
"""


@pytest.mark.parametrize("name", ["last.pt", "legacy.pt", "last.safetensors"])
def test_overwriting_what_was_loaded_changes_nothing_in_memory(name: str, tmp_path: Path):
    command = [sys.executable, "-c", OVERWRITING, str(tmp_path / name)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout.splitlines()[-1:], ran.stderr)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = saved({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "in.pt")

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        with path.open("r+b") as file:
            file.seek(0, 2)
            file.write(b"x")
        return storage

    with pytest.raises(ReadError, match="was changed while it was read"):
        ckptfix.load(path, map_location=place)
    path = saved(pair(), tmp_path / "in.pt")
    with pytest.raises(ReadError, match="was changed while it was read"):
        ckptfix.load_state_dict(path, map_location=place)


def test_a_map_does_not_hold_the_file_in_memory(tmp_path: Path):
    path = tmp_path / "big.pt"
    with path.open("wb") as file:
        torch.save({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, file)
    code = (
        "import sys, ckptfix, ckptfix.loaders\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "before = anonymous()\n"
        "loaded = ckptfix.load_state_dict(sys.argv[1], mmap=True)\n"
        "total = int(loaded['w'].sum())\n"
        "print(anonymous() - before)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", code, str(path)]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert grown < 32 << 10


def test_tensors_outlive_the_file(tmp_path: Path):
    path = tmp_path / "gone.pt"
    shutil.copy(FIXTURES / "cpu.pt", path)
    loaded = ckptfix.load_state_dict(path)
    path.unlink()
    assert unlike(loaded, torch.load(FIXTURES / "cpu.pt")) is None


@pytest.mark.parametrize("name", ["tied.pt", "views.pt"])
def test_shared_storages_share_memory_as_after_torch_load(name: str):
    def groups_of(loaded: dict[str, torch.Tensor]) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for key, tensor in loaded.items():
            if tensor.numel():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
        return sorted(groups.values())

    ours, theirs = ckptfix.load_state_dict(FIXTURES / name), torch.load(FIXTURES / name)
    assert groups_of(ours) == groups_of(theirs)
    layout = {key: (t.stride(), t.storage_offset()) for key, t in theirs.items()}
    assert {key: (t.stride(), t.storage_offset()) for key, t in ours.items()} == layout
    assert unlike(dict(ours), dict(theirs)) is None


def test_a_change_to_a_tied_tensor_is_seen_through_its_other_name():
    loaded = ckptfix.load_state_dict(FIXTURES / "tied.pt")
    loaded["embed.weight"][0, 0] = 42
    assert loaded["lm_head.weight"][0, 0] == 42


# Everything in a file


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_load_gives_what_torch_load_gives(checkpoint: Path):
    if checkpoint.suffix == ".safetensors" or checkpoint.name in (
        "uninstalled_class.pt",
        "whole_module.pt",
    ):
        pytest.skip("torch cannot load it")
    theirs = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert unlike(ckptfix.load(checkpoint), theirs) is None


def test_objects_of_unknown_classes_come_back_inert():
    hparams = ckptfix.load(FIXTURES / "uninstalled_class.pt")["hparams"]
    assert isinstance(hparams["schedule"], ckptfix.Inert)
    assert hparams["schedule"].cls == "their_project.models.Schedule"
    assert hparams["schedule"].attributes == {"warmup": 100, "peak": 0.1}


def test_plain_objects_of_torch_and_python_come_back_as_they_were(tmp_path: Path):
    value = {
        "device": torch.device("cuda:3"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "complex": 1 - 2j,
        "bytes": b"\x00\xff",
        "nested": [(1, None, True), {"a": float("inf")}],
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    }
    path = saved(value, tmp_path / "values.pt")
    loaded = ckptfix.load(path)
    assert unlike(loaded, torch.load(path, weights_only=False)) is None
    assert type(loaded["parameter"]) is nn.Parameter
    assert not loaded["parameter"].requires_grad


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_bare_storages_come_back_as_torch_gives_them(tmp_path: Path):
    value = {"typed": torch.arange(3.0).storage(), "raw": torch.arange(3.0).untyped_storage()}
    loaded = ckptfix.load(saved(value, tmp_path / "storages.pt"))
    assert loaded["typed"].dtype is torch.float32
    assert loaded["typed"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["raw"].tolist() == value["raw"].tolist()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_sparse_quantized_and_meta_tensors_come_back_as_torch_gives_them(tmp_path: Path):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    scales, zeros = torch.tensor([0.1, 0.2]).double(), torch.tensor([1, 2])
    value = {
        "coo": dense.to_sparse(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((1, 1)),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 3, torch.quint8),
        "per channel": torch.quantize_per_channel(dense, scales, zeros, 1, torch.qint8),
        "meta": dense.to("meta"),
        "parameter": nn.Parameter(dense.to_sparse()),
    }
    path = saved({**value, "epoch": 3}, tmp_path / "q.pt")
    loaded = ckptfix.load(path)
    assert loaded["epoch"] == 3
    assert type(loaded["parameter"]) is nn.Parameter
    for key, wanted in value.items():
        found = loaded[key]
        assert (found.layout, found.dtype, found.shape) == (
            wanted.layout,
            wanted.dtype,
            wanted.shape,
        )
        if key == "meta":
            assert found.is_meta
        elif found.is_quantized:
            assert torch.equal(found, wanted)
        else:
            assert torch.equal(found.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("damage", ["index", "size"])
def test_a_sparse_tensor_that_is_not_sound_is_refused_by_name(damage: str, tmp_path: Path):
    sparse = torch.eye(3).to_sparse()
    indices = sparse.indices() + (7 if damage == "index" else 0)
    size = (3, 3) if damage == "index" else (2**40, 2**40)

    class Odd:
        def __reduce__(self) -> Any:
            parts = (indices, sparse.values(), torch.Size(size), False)
            return torch._utils._rebuild_sparse_tensor, (torch.sparse_coo, parts)

    path = saved({"w": Odd(), "b": torch.ones(2)}, tmp_path / "odd.pt")
    with pytest.raises(UnsupportedError, match="'w' is a tensor of another kind"):
        ckptfix.load_state_dict(path)


# State dicts


def test_without_a_model_keys_and_metadata_stay_as_saved():
    path = FIXTURES / "dataparallel_cuda_training.pt"
    loaded = ckptfix.load_state_dict(path)
    theirs = torch.load(path, map_location="cpu")["model_state_dict"]
    assert unlike(loaded, theirs) is None
    assert loaded._metadata[""] == {"version": 1}  # type: ignore[attr-defined]


def test_metadata_follows_the_keys_that_the_model_wants(tmp_path: Path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    path = saved(nn.DataParallel(net).state_dict(), tmp_path / "dp.pt")
    loaded = ckptfix.load_state_dict(path, model=net)
    assert unlike(loaded, net.state_dict()) is None


def test_the_model_may_be_the_wrapped_one():
    model = nn.DataParallel(FooNet(4, 3))
    report = ckptfix.load_into(model, FIXTURES / "cpu.pt")
    assert report.identical
    assert (
        unlike([*model.state_dict().values()], [*torch.load(FIXTURES / "cpu.pt").values()]) is None
    )


def test_the_model_may_live_on_the_meta_device_while_keys_are_fitted():
    with torch.device("meta"):
        model = FooNet(4, 3)
    loaded = ckptfix.load_state_dict(FIXTURES / "dataparallel_cuda.pt", model=model)
    model.load_state_dict(loaded, assign=True)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_select_names_one_of_several():
    path = FIXTURES / "ema.pt"
    for name in ("state_dict", "state_dict_ema"):
        assert unlike(ckptfix.load_state_dict(path, select=name), torch.load(path)[name]) is None
    with pytest.raises(SelectionError, match="there is state_dict, state_dict_ema"):
        ckptfix.load_state_dict(path, select="nowhere")


def test_weights_are_taken_before_their_averages():
    path = FIXTURES / "ema.pt"
    assert unlike(ckptfix.load_state_dict(path), torch.load(path)["state_dict"]) is None


def test_of_several_state_dicts_the_one_that_fits_is_taken(tmp_path: Path):
    generator, discriminator = nn.Linear(3, 5), nn.Conv2d(1, 2, 3)
    both = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    path = saved({**both, "step": 4}, tmp_path / "gan.pt")
    for name, model in (("generator", nn.Linear(3, 5)), ("discriminator", nn.Conv2d(1, 2, 3))):
        assert ckptfix.load_into(model, path).identical
        assert unlike(model.state_dict(), both[name]) is None


def test_without_a_model_several_state_dicts_are_refused_and_listed(tmp_path: Path):
    path = saved({"a": pair(), "b": pair()}, tmp_path / "two.pt")
    with pytest.raises(SelectionError, match="holds 2 state dicts: a, b") as raised:
        ckptfix.load_state_dict(path)
    assert str(raised.value.hint) == "choose one: add --select a"
    with pytest.raises(SelectionError, match="a, b"):
        ckptfix.load_into(nn.Linear(2, 2), path)
    assert ckptfix.load_into(nn.Linear(2, 2), path, select="b").identical


@pytest.mark.parametrize("strict", [True, False])
def test_two_ways_to_fit_are_refused_and_listed(strict: bool, tmp_path: Path):
    flat = {f"{who}.{key}": t for who in ("student", "teacher") for key, t in pair().items()}
    path = saved(flat, tmp_path / "distilled.pt")
    model = nn.Linear(2, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RenameError, match=r"2 ways: removed student\.; removed teacher\."):
        ckptfix.load_into(model, path, strict=strict)
    assert unlike(before, [*model.parameters()]) is None


# Refusals


def test_a_mismatch_carries_the_report_and_prints_as_a_list(tmp_path: Path):
    path = saved({"weight": torch.rand(3, 2), "extra": torch.rand(1)}, tmp_path / "other.pt")
    model = nn.Linear(2, 2)
    before = [bits(parameter) for parameter in model.parameters()]
    with pytest.raises(KeyMismatchError) as raised:
        ckptfix.load_into(model, path)
    report = raised.value.report
    assert report.missing == ["bias"]
    assert report.unexpected == ["extra"]
    assert [row.key for row in report.shape_mismatch] == ["weight"]
    assert str(raised.value).splitlines() == [
        f"{path}: does not match Linear: the file lacks bias",
        "0 of 2 keys match, 0.0% of the elements",
        "1 missing, 1 unexpected, 1 of another shape",
        "missing: wanted, and not in the file",
        "  - bias",
        "unexpected: in the file, and not wanted",
        "  + extra",
        "of another shape",
        "  ! weight: [3, 2], wanted [2, 2]",
    ]
    assert [bits(parameter) for parameter in model.parameters()] == before


def test_strict_false_loads_what_there_is_and_says_what_stayed(tmp_path: Path):
    state = {"module.weight": torch.rand(2, 2), "module.extra": torch.rand(1)}
    model = nn.Linear(2, 2)
    bias = model.bias.clone()
    report = ckptfix.load_into(model, saved(state, tmp_path / "part.pt"), strict=False)
    assert (report.matched, report.missing, report.unexpected) == (["weight"], ["bias"], ["extra"])
    assert report.random_numel == 2
    assert unlike(model.weight, state["module.weight"]) is None
    assert unlike(model.bias, bias) is None


def test_strict_false_does_not_forgive_another_shape(tmp_path: Path):
    path = saved({**pair(), "bias": torch.rand(3)}, tmp_path / "shape.pt")
    model = nn.Linear(2, 2)
    weight = model.weight.clone()
    with pytest.raises(KeyMismatchError, match=re.escape("! bias: [3], wanted [2]")):
        ckptfix.load_into(model, path, strict=False)
    assert unlike(model.weight, weight) is None


def test_a_number_where_the_model_wants_a_tensor_is_a_mismatch(tmp_path: Path):
    path = saved({"weight": 3, "bias": torch.rand(2)}, tmp_path / "number.pt")
    with pytest.raises(KeyMismatchError, match="! weight: no tensor"):
        ckptfix.load_into(nn.Linear(2, 2), path)


def test_a_sparse_tensor_is_refused_before_the_model_is_touched(tmp_path: Path):
    path = saved({**pair(), "weight": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    model = nn.Linear(2, 2)
    bias = model.bias.clone()
    with pytest.raises(
        KeyMismatchError, match="weight is sparse_coo, where the model has it dense"
    ):
        ckptfix.load_into(model, path)
    assert unlike(model.bias, bias) is None


def test_errors_are_caught_under_one_name(tmp_path: Path):
    with pytest.raises(ReadError):
        ckptfix.load(tmp_path / "missing.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ckptfix.CkptfixError):
        ckptfix.load_state_dict(tmp_path / "empty.pt")


# What torch forgives, too


@pytest.mark.parametrize("prefix", ["", "module."])
def test_batch_norm_from_before_torch_0_4_1_loads_as_in_torch(prefix: str, tmp_path: Path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    old = OrderedDict(
        (prefix + key, tensor)
        for key, tensor in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    path = saved(old, tmp_path / "old.pt")
    if not prefix:
        net.load_state_dict(torch.load(path))
    assert ckptfix.load_into(net, path).loads


def test_a_counter_missing_from_a_newer_state_dict_is_missed(tmp_path: Path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = net.state_dict()
    del state["1.num_batches_tracked"]
    path = saved(state, tmp_path / "new.pt")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        net.load_state_dict(torch.load(path))
    with pytest.raises(KeyMismatchError, match=r"lacks 1\.num_batches_tracked"):
        ckptfix.load_into(net, path)


def with_weight_norm(of_old: bool) -> Any:
    convolution = nn.Conv1d(2, 3, 1)
    if of_old:
        with pytest.warns(FutureWarning, match="weight_norm"):
            return nn.utils.weight_norm(convolution)
    return nn.utils.parametrizations.weight_norm(convolution)


@pytest.mark.parametrize("of_old", [True, False])
def test_weight_norm_loads_from_its_old_names_and_into_them(of_old: bool, tmp_path: Path):
    source, target = with_weight_norm(of_old), with_weight_norm(not of_old)
    with torch.no_grad():
        source.get_parameter("bias").add_(1)
        for name, weight in source.named_parameters():
            weight.mul_(2 if name.endswith(("_g", "original0")) else 1)
    path = saved({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "in.pt")
    ckptfix.load_into(target, path)
    given = torch.rand(1, 2, 4)
    assert torch.equal(source(given), target(given))


def test_a_lazy_module_takes_the_shapes_of_the_file(tmp_path: Path):
    path = saved(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    model = nn.LazyLinear(2)
    ckptfix.load_into(model, path)
    assert model.weight.shape == (2, 3)


def test_extra_state_is_given_to_the_module(tmp_path: Path):
    class Counted(nn.Linear):
        seen = 0

        def get_extra_state(self) -> int:
            return self.seen

        def set_extra_state(self, state: int) -> None:
            self.seen = state

    first, second = Counted(2, 2), Counted(2, 2)
    first.seen = 12
    path = saved(nn.DataParallel(first).state_dict(), tmp_path / "extra.pt")
    assert ckptfix.load_into(second, path).loads
    assert second.seen == 12


# Plain dicts


def test_strip_prefix_of_a_plain_dict_keeps_values_and_metadata():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = nn.DataParallel(net).state_dict()
    keys = list(state)
    stripped = ckptfix.strip_prefix(state)
    assert unlike(stripped, net.state_dict()) is None
    assert all(a is b for a, b in zip(stripped.values(), state.values(), strict=True))
    assert list(state) == keys
    assert unlike(ckptfix.add_prefix(stripped), state) is None


def test_strip_prefix_of_a_plain_dict_refuses_what_only_some_keys_carry():
    with pytest.raises(PartialPrefixError, match=re.escape("1 of 2 keys begin with 'net.'")):
        ckptfix.strip_prefix({"net.a": 1, "b": 2}, "net")
    assert dict(ckptfix.strip_prefix({"net.a": 1, "b": 2}, "net", partial=True)) == {"a": 1, "b": 2}


# --- what the report says once it is loaded


def test_what_was_left_out_does_not_make_the_report_say_that_it_does_not_load(
    tmp_path: Path,
) -> None:
    net = nn.Linear(2, 2)
    path = saved({**net.state_dict(), "extra": torch.ones(1)}, tmp_path / "in.pt")
    assert not ckptfix.check(net, path).loads
    report = ckptfix.load_into(net, path)
    assert (report.loads, report.unexpected) == (True, ["extra"])
    assert report.identical


def test_what_kept_its_values_does(tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(2, 2)}, tmp_path / "in.pt")
    report = ckptfix.load_into(nn.Linear(2, 2), path, strict=False)
    assert (report.loads, report.missing) == (False, ["bias"])


# --- in other processes


def load_elsewhere(path: str) -> None:
    ckptfix.load_into(nn.Linear(2, 2), path)


def test_an_error_arrives_from_a_process_pool_with_its_report(tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(2, 2)}, tmp_path / "in.pt")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(KeyMismatchError, match="the file lacks bias") as raised:
            pool.submit(load_elsewhere, str(path)).result()
        assert raised.value.report.missing == ["bias"]
        assert raised.value.hint is not None
        with pytest.raises(ReadError, match="no such file"):
            pool.submit(load_elsewhere, str(tmp_path / "none.pt")).result()
