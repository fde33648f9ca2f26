"""Casting: the floats of state dicts as torch casts them, everything else untouched."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptfix
from ckptfix.edit.casting import CAST_TO, dtype_of
from ckptfix.errors import DamagedError, UnsupportedError
from ckptfix.tree.dtypes import BY_NAME
from tests.conftest import CHECKPOINTS, FIXTURES
from tests.oracles import bits, ckptfix_command, done, unlike

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=CAST_TO)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cast(value: object, dtype: object, folder: Path, name: str = "out.pt") -> dict:
    torch.save(value, folder / "in.pt")
    ckptfix.open(folder / "in.pt").cast(dtype).save(folder / name, force=True)
    loaded: dict = torch.load(folder / name)
    return loaded


def is_cast(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float4_e2m1fn_x2


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("container", ["out.pt", "out.safetensors"])
def test_every_dtype_is_cast_as_torch_casts_it(target: str, container: str, tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "dtypes.pt")
    wanted = {
        key: tensor.to(getattr(torch, target)) if is_cast(tensor) else tensor
        for key, tensor in state.items()
        if BY_NAME[str(tensor.dtype).removeprefix("torch.")].safetensors is not None
    }
    torch.save({key: state[key] for key in wanted}, tmp_path / "in.pt")
    ckptfix.open(tmp_path / "in.pt").cast(target).save(tmp_path / container)
    load = torch.load if container.endswith(".pt") else safetensors.torch.load_file
    loaded = load(tmp_path / container)
    assert {key: (t.dtype, told(t)) for key, t in loaded.items()} == {
        key: (t.dtype, told(t)) for key, t in wanted.items()
    }


def told(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor; NaN have one payload, which torch leaves to the processor."""
    if not is_cast(tensor):
        return bits(tensor)
    is_nan = tensor.double().isnan()
    return bits(torch.where(is_nan, 0, tensor.view(getattr(torch, f"int{8 * tensor.itemsize}"))))


def test_aliases_and_torch_dtypes_mean_what_they_say() -> None:
    names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    assert {alias: dtype_of(alias).name for alias in names} == names
    assert dtype_of(torch.float8_e5m2).name == "float8_e5m2"


@pytest.mark.parametrize("name", ["int8", "float12", "bool", "complex64", "float8_e8m0fnu", ""])
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        dtype_of(name)
    assert refused.value.code == "dtype"
    assert "bfloat16" in str(refused.value.hint)


def test_a_training_checkpoint_keeps_its_optimizer_and_its_ties(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    value = {
        "model": {"embed": weight, "head": weight, "steps": torch.tensor(3), "t": weight.t()},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(4, 3)}}, "param_groups": []},
        "mean": weight,
        "epoch": 3,
    }
    loaded = cast(value, "bfloat16", tmp_path)
    model = loaded.pop("model")
    del value["model"]
    assert unlike(value, loaded) is None
    assert torch.equal(model["embed"], weight.bfloat16())
    assert model["steps"].dtype == torch.int64
    assert len({model[key].untyped_storage().data_ptr() for key in ("embed", "head", "t")}) == 1
    assert torch.equal(model["t"], weight.t().bfloat16())


def test_a_cast_storage_is_compact(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    loaded = cast({"column": big[:, 1], "row": big.clone()[1], "none": big[:0]}, "fp16", tmp_path)
    assert torch.equal(loaded["column"], big[:, 1].half())
    assert loaded["none"].shape == (0, 1000)
    assert (tmp_path / "out.pt").stat().st_size < 8000


def test_parameters_stay_parameters_and_whole_models_keep_their_class(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    loaded = cast({"w": weight, "again": weight}, "float64", tmp_path)
    assert isinstance(loaded["w"], torch.nn.Parameter)
    assert loaded["w"] is loaded["again"]
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(module, tmp_path / "model.pt")
    ckptfix.open(tmp_path / "model.pt").cast("half").save(tmp_path / "half.pt")
    halved = torch.load(tmp_path / "half.pt", weights_only=False)
    assert unlike(module.half().state_dict(), halved.state_dict()) is None


def test_losses_are_counted_where_they_happen(tmp_path: Path) -> None:
    values = [1.0, 1e5, -1e6, 65504.0, 1e-9, -1e-9, 0.0, -0.0, float("inf"), float("nan")]
    torch.save({"bad": torch.tensor(values), "good": torch.ones(7)}, tmp_path / "in.pt")
    made = ckptfix.open(tmp_path / "in.pt").cast("float16")
    assert {cast.losses for cast in made.casts} == {(0, 0, 0)}
    for _ in range(2):  # what is written twice is counted once
        made.save(tmp_path / "out.pt", force=True)
    assert {cast.keys: tuple(cast.losses) for cast in made.casts} == {
        ("bad",): (2, 2, 1),
        ("good",): (0, 0, 0),
    }


views = st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 3))
outputs = st.lists(st.sampled_from(["out.pt", "out.safetensors", "out/"]), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(views, min_size=1, max_size=5), outputs, st.integers(0, 2**32 - 1))
def test_overlapping_views_lose_each_value_once_however_they_are_saved(
    rows: list[tuple[int, int, int]], names: list[str], seed: int
) -> None:
    kinds = torch.tensor([1.0, 1e9, 1e-9, torch.nan])
    flat = kinds[torch.randint(4, (256,), generator=torch.Generator().manual_seed(seed))]
    used = torch.zeros(256, dtype=torch.bool)
    state = {}
    for number, (start, length, step) in enumerate(rows):
        state[f"w{number}"] = flat[start : start + length * step : step]
    sparse = any(step > 1 for *_, step in rows)
    for start, length, step in rows:
        used[start : start + length * step : 1 if sparse else step] = True
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, f"{folder}/in.pt")
        made = ckptfix.open(f"{folder}/in.pt").cast("float16")
        seen = []
        for name in names:
            made.save(f"{folder}/{name}", force=True)
            seen.append(tuple(map(sum, zip(*(row.losses for row in made.casts), strict=True))))
    assert len(set(seen)) == 1
    if not sparse:
        values = flat[used]
        wanted = [int((values == torch.tensor(value)).sum()) for value in (1e9, 1e-9)]
        assert seen[0] == (*wanted, int(values.isnan().sum()))


@pytest.mark.parametrize("second", ["again.safetensors", "again.pt"])
def test_a_second_save_in_other_pieces_counts_nothing_twice(second: str, tmp_path: Path) -> None:
    base = torch.full((3_000_000,), 1e9)
    torch.save({"a": base[:2_000_000], "b": base[1_000_000:]}, tmp_path / "in.pt")
    made = ckptfix.open(tmp_path / "in.pt").cast("float16")
    made.save(tmp_path / "out.safetensors")
    made.save(tmp_path / second)
    assert [row.losses.overflow for row in made.casts] == [3_000_000]


@pytest.mark.parametrize(
    ("dtype", "overflow"), [("float8_e4m3fn", 4), ("float8_e5m2", 2), ("float8_e4m3fnuz", 4)]
)
def test_dtypes_without_infinity_saturate_and_that_counts(
    dtype: str, overflow: int, tmp_path: Path
) -> None:
    value = torch.tensor([448.0 / 2, 3000.0, float("inf"), 1e6, -1e6, float("nan")])
    torch.save({"w": value}, tmp_path / "in.pt")
    made = ckptfix.open(tmp_path / "in.pt").cast(dtype)
    made.save(tmp_path / "out.pt")
    assert tuple(made.casts[0].losses) == (overflow, 0, 1)


def test_counts_are_exact_over_many_chunks(tmp_path: Path) -> None:
    value = torch.ones(3_000_001)
    value[::7] = 1e30
    torch.save({"w": value}, tmp_path / "in.pt")
    made = ckptfix.open(tmp_path / "in.pt").cast("float16")
    made.save(tmp_path / "out.safetensors")
    assert made.casts[0].losses.overflow == len(value[::7])
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")["w"]
    assert torch.equal(found, value.half())


def test_big_endian_files_are_cast_in_their_own_order(tmp_path: Path) -> None:
    state = {"w": torch.randn(5), "d": torch.randn(3, dtype=torch.float64)}
    torch.save(state, tmp_path / "little.pt")
    with (
        zipfile.ZipFile(tmp_path / "little.pt") as source,
        zipfile.ZipFile(tmp_path / "big.pt", "w") as made,
    ):
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                size = 4 if len(data) == 20 else 8
                data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
            made.writestr(name, data)
    ckptfix.open(tmp_path / "big.pt").cast("half").save(tmp_path / "half.pt")
    ckptfix.open(tmp_path / "half.pt").save(tmp_path / "half.safetensors")
    for loaded in (
        torch.load(tmp_path / "half.pt"),
        safetensors.torch.load_file(tmp_path / "half.safetensors"),
    ):
        assert {k: v.tolist() for k, v in loaded.items()} == {
            key: tensor.half().tolist() for key, tensor in state.items()
        }


def test_damage_is_seen_before_it_is_cast(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save({"w": torch.full((5000,), 3.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x00\x00\x40\x40" * 10)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum"):
        ckptfix.open(path).cast("half").save(tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
def test_a_cast_to_float64_loses_nothing(path: Path, tmp_path: Path) -> None:
    ckptfix.open(path).cast("float64").save(tmp_path / "out.pt")
    diff = ckptfix.diff(path, tmp_path / "out.pt")
    assert not any(state.values or state.renamed for state in diff.state_dicts)
    assert not diff.others


# --- the command


def test_convert_says_what_was_lost_and_what_was_not_cast(tmp_path: Path) -> None:
    training = {
        "model": {"a": torch.tensor([1e9, 1e-9]), "b": torch.tensor([1e9, float("nan")])},
        "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 1}]},
    }
    torch.save(training, tmp_path / "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out.pt", "--dtype", "fp16", cwd=tmp_path)
    assert ran.returncode == 0
    assert "2 of them cast to float16" in ran.stdout
    notes = ran.stderr.splitlines()
    elsewhere = "outside state dicts (an optimizer) or not dense: optimizer/state/0/m"
    assert notes == [
        "note: 2 values beyond the range of float16: model/a (1), model/b (1)",
        "note: 1 value too small for float16, zero now: model/a (1)",
        "note: 1 value NaN before and after: model/b (1)",
        f"note: 1 other floating-point tensor not cast, {elsewhere}",
    ]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_tensors_that_are_not_dense_are_named_where_they_are_not_cast(tmp_path: Path) -> None:
    model = {"w": torch.ones(2), "s": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}
    torch.save({"model": model, "mean": torch.ones(1)}, tmp_path / "in.pt")
    arguments = ("convert", "in.pt", "out.pt", "--dtype", "half", "--json")
    answer = json.loads(done(*arguments, cwd=tmp_path))
    assert answer["cast"]["not_cast"] == ["model/s", "model/csr", "mean"]


def test_a_dry_run_counts_too_and_json_has_every_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1e9]), "n": torch.tensor([1])}, tmp_path / "in.pt")
    arguments = ("convert", "in.pt", "out.safetensors", "--dtype", "half", "--json", "--dry-run")
    answer = json.loads(done(*arguments, cwd=tmp_path))
    row = {
        "keys": ["a"],
        "dtype": "float32",
        "elements": 1,
        "overflow": 1,
        "underflow": 0,
        "nan": 0,
    }
    assert answer["cast"] == {"dtype": "float16", "tensors": [row], "not_cast": []}
    assert list(tmp_path.iterdir()) == [tmp_path / "in.pt"]


def test_an_unknown_dtype_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    source, target = FIXTURES / "cpu.pt", tmp_path / "out.pt"
    ran = ckptfix_command("convert", source, target, "--dtype", "int8")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: int8: is not a floating-point dtype")
    assert "hint: take one of float64" in ran.stderr
    assert not target.exists()


def test_a_large_tensor_is_cast_in_little_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(64 << 20)}, tmp_path / "in.pt")
    program = (
        "import resource, sys, torch, ckptfix;"
        "c = ckptfix.open(sys.argv[1]).cast('half');"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "c.save(sys.argv[2]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert grown < 64 << 10  # kilobytes, of a file of 256 MB; what was mapped once is the system's
