"""`ckptfix.diff`: keys, shapes, dtypes, values, and everything beside state dicts."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptfix
from ckptfix.errors import SelectionError
from tests.conftest import CHECKPOINTS, FIXTURES

if TYPE_CHECKING:
    from pathlib import Path

    from ckptfix import Diff


def diff(a: Any, b: Any, folder: Path, **options: Any) -> Diff:
    torch.save(a, folder / "a.pt")
    torch.save(b, folder / "b.pt")
    return ckptfix.diff(folder / "a.pt", folder / "b.pt", **options)


def others(found: Diff) -> dict[str, tuple[str | None, str | None]]:
    return {row.path: (row.a, row.b) for row in found.others}


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
def test_every_file_is_the_same_as_itself_and_as_its_copy(
    path: Path, read_data: bool, tmp_path: Path
) -> None:
    assert ckptfix.diff(path, path, read_data=read_data).same
    ckptfix.open(path).save(tmp_path / "copy.pt")
    assert ckptfix.diff(path, tmp_path / "copy.pt", read_data=read_data).same


def test_each_kind_of_difference_is_told_apart(tmp_path: Path) -> None:
    a = {
        "same": torch.ones(2),
        "gone": torch.full((3,), 7.0),
        "shape": torch.zeros(2, 3),
        "dtype": torch.ones(2),
        "value": torch.tensor([1.0, 2.0, -4.0]),
    }
    b = {
        "same": torch.ones(2),
        "shape": torch.zeros(3, 2),
        "dtype": torch.ones(2).half(),
        "value": torch.tensor([1.0, 2.5, -5.0]),
        "new": torch.zeros(9),
    }
    (state,) = diff(a, b, tmp_path).state_dicts
    assert (list(state.removed), list(state.added), state.equal) == (["gone"], ["new"], 1)
    assert [(row.key, row.found.shape, row.wanted.shape) for row in state.shapes] == [
        ("shape", (2, 3), (3, 2))
    ]
    assert [(row.key, row.found.dtype, row.wanted.dtype) for row in state.dtypes] == [
        ("dtype", "float32", "float16")
    ]
    assert [(row.key, row.numel, tuple(row.distance)) for row in state.values] == [
        ("value", 3, (2, 1.0, 0.2))
    ]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ([1.0, math.nan], [1.0, math.nan], None),
        ([1.0, math.nan], [1.0, 2.0], (1, math.inf, math.inf)),
        ([math.inf, -math.inf], [math.inf, math.inf], (1, math.inf, math.inf)),
        ([0.0, 1.0], [-0.0, 1.0], (0, 0.0, 0.0)),
        ([0.0, 1.0], [0.5, 1.0], (1, 0.5, 1.0)),
    ],
)
def test_nan_infinity_and_minus_zero(
    one: list, other: list, distance: tuple | None, tmp_path: Path
) -> None:
    found = diff({"w": torch.tensor(one)}, {"w": torch.tensor(other)}, tmp_path)
    (state,) = found.state_dicts
    assert [tuple(row.distance) for row in state.values] == ([] if distance is None else [distance])
    assert found.same is (distance is None)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "max_abs"),
    [
        (torch.int64, 2**60, 2**60 + 1, 0.0),
        (torch.uint64, 2**63 + 3, 2**63, 0.0),
        (torch.uint8, 0, 255, 255.0),
        (torch.bool, True, False, 1.0),
        (torch.complex64, 3 + 4j, 0j, 5.0),
        (torch.float8_e4m3fn, 2.0, 3.0, 1.0),
    ],
)
def test_integers_booleans_complex_numbers_and_float8(
    dtype: torch.dtype, one: Any, other: Any, max_abs: float, tmp_path: Path
) -> None:
    a, b = (torch.tensor([value, value], dtype=dtype) for value in (one, other))
    (state,) = diff({"w": a}, {"w": b}, tmp_path).state_dicts
    assert (state.values[0].distance.differing, state.values[0].distance.max_abs) == (2, max_abs)


numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0])


@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_distances_are_what_plain_python_computes(
    pairs: list[tuple[float, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    (state,) = diff({"w": a}, {"w": b}, tmp_path_factory.mktemp("pair")).state_dicts
    gaps = [abs(x - y) for x, y in pairs if x != y and not (x != x and y != y)]
    found = [row.distance for row in state.values]
    assert sum(d.differing or 0 for d in found) == len(gaps)
    wanted = max((math.inf if gap != gap else gap for gap in gaps), default=0.0)
    assert max((d.max_abs or 0.0 for d in found), default=0.0) == wanted


@pytest.mark.parametrize("change", [torch.Tensor.t, lambda w: torch.cat([w, w])[:4].clone()])
def test_layout_makes_no_difference(change: Any, tmp_path: Path) -> None:
    weight = torch.rand(4, 5)
    moved = change(weight.t().contiguous()) if change is torch.Tensor.t else change(weight)
    assert torch.equal(moved, weight)
    assert diff({"w": weight}, {"w": moved}, tmp_path).same
    (state,) = diff({"w": weight}, {"w": moved + 1}, tmp_path).state_dicts
    assert state.values[0].distance.differing == 20


def test_recorded_checksums_are_believed_unless_the_data_is_to_be_read(tmp_path: Path) -> None:
    torch.save({"w": torch.full((5000,), 3.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.rindex(b"\x00\x00\x40\x40" * 10)] ^= 1
    (tmp_path / "b.pt").write_bytes(data)
    assert ckptfix.diff(tmp_path / "a.pt", tmp_path / "b.pt").same
    assert not ckptfix.diff(tmp_path / "a.pt", tmp_path / "b.pt", read_data=True).same


# --- renames


def test_a_prefix_is_recognised_as_one_rename(tmp_path: Path) -> None:
    found = ckptfix.diff(FIXTURES / "cpu.pt", FIXTURES / "dataparallel.pt")
    (state,) = found.state_dicts
    assert state.renamed == {f"linears.{i}.weight": f"module.linears.{i}.weight" for i in range(3)}
    assert (state.label, state.removed, state.added, state.equal) == ("added module.", {}, {}, 3)
    assert not found.same


def test_a_tensor_under_another_name_is_recognised_by_what_it_holds(tmp_path: Path) -> None:
    a = {"fc.w": torch.arange(6.0), "fc.b": torch.zeros(2), "x": torch.ones(1), "y": torch.ones(1)}
    b = {"head.w": torch.arange(6.0), "head.b": torch.ones(2), "z": torch.ones(1)}
    (state,) = diff(a, b, tmp_path).state_dicts
    assert state.renamed == {"fc.w": "head.w"}
    assert list(state.removed) == ["fc.b", "x", "y"]  # two could be `z`: nothing is guessed
    assert list(state.added) == ["head.b", "z"]
    (state,) = diff(a, b, tmp_path, keys_only=True).state_dicts
    assert state.renamed == {}


def test_renamed_tensors_are_compared_too(tmp_path: Path) -> None:
    a = {f"l.{i}": torch.full((2,), float(i)) for i in range(4)}
    b = {f"module.{key}": value + (key == "l.2") for key, value in a.items()}
    (state,) = diff(a, b, tmp_path).state_dicts
    assert [(row.key, row.other) for row in state.values] == [("l.2", "module.l.2")]


# --- everything else


def test_other_values_are_told_by_path(tmp_path: Path) -> None:
    a: dict[str, Any] = {
        "model": {"w": torch.ones(2), "n": torch.tensor(1)},
        "optimizer": {
            "state": {0: {"m": torch.ones(2)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "epoch": 3,
        "step": 3,
        "best": float("nan"),
        "only_a": [1, 2],
    }
    b = copy.deepcopy(a)
    b["optimizer"]["state"][0]["m"] += 1
    b["optimizer"]["param_groups"][0].update(lr=0.2, betas=(0.9, 0.999))
    b.update(epoch=4, step=4, only_b="x")
    del b["only_a"]
    found = diff(a, b, tmp_path)
    assert others(found) == {
        "optimizer/state/0/m": ("float32 [2]", "float32 [2]"),
        "optimizer/param_groups/0/lr": ("0.1", "0.2"),
        "optimizer/param_groups/0/betas/1": ("0.99", "0.999"),
        "epoch": ("3", "4"),
        "step": ("3", "4"),
        "only_a": ("list of 2", None),
        "only_b": (None, "'x'"),
    }
    assert found.state_dicts[0].same
    assert ckptfix.diff(tmp_path / "a.pt", tmp_path / "b.pt", keys_only=True).same
    assert ckptfix.diff(tmp_path / "a.pt", tmp_path / "b.pt", select="model").same


def test_objects_of_unknown_classes_are_compared_part_by_part() -> None:
    path = FIXTURES / "uninstalled_class.pt"
    found = ckptfix.diff(path, FIXTURES / "cpu.pt")
    assert others(found) == {"hparams": ("dict of 5", None)}


def test_a_state_dict_without_anything_beside_is_the_same_in_safetensors(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.rand(3, 4), t=torch.rand(4, 3).t(), n=torch.tensor(4))
    torch.save(state, tmp_path / "a.pt")
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "b.st")
    assert ckptfix.diff(tmp_path / "a.pt", tmp_path / "b.st").same


def test_versions_of_modules_count_where_both_have_them(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    older = copy.deepcopy(state)
    older._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert others(diff(state, older, tmp_path)) == {"_metadata//version": ("2", "1")}
    assert diff(state, dict(state), tmp_path).same


def test_state_dicts_are_paired_by_path_or_by_choice(tmp_path: Path) -> None:
    ema = FIXTURES / "ema.pt"
    found = ckptfix.diff(ema, ema, select=("state_dict", "state_dict_ema"))
    assert [(state.a, state.b) for state in found.state_dicts] == [("state_dict", "state_dict_ema")]
    assert not found.same
    assert [state.a for state in ckptfix.diff(ema, ema).state_dicts] == [
        "state_dict",
        "state_dict_ema",
    ]
    with pytest.raises(SelectionError, match="has no state dict at 'nope'"):
        ckptfix.diff(ema, ema, select="nope")


def test_trees_that_hold_themselves_and_deep_ones_come_to_an_end(tmp_path: Path) -> None:
    a: dict = {"w": torch.ones(1), "deep": []}
    a["self"] = a
    for _ in range(400):
        a["deep"] = [a["deep"]]
    assert diff({"m": {"w": torch.ones(1)}, "extra": a}, {"m": {"w": torch.ones(1)}, "extra": a},
                tmp_path).same  # fmt: skip


def test_equal_files_and_mere_keys_are_compared_without_torch(tmp_path: Path) -> None:
    ckptfix.open(FIXTURES / "plain.safetensors").save(tmp_path / "b.pt")
    ckptfix.open(FIXTURES / "dataparallel.pt").rename("weight", "w").save(tmp_path / "c.pt")
    program = (
        "import sys; from ckptfix import diff;"
        "assert diff(sys.argv[1], 'b.pt').same;"
        "assert len(diff('b.pt', 'c.pt', keys_only=True).state_dicts[0].added) == 3;"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(FIXTURES / "plain.safetensors")]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_open_checkpoints_are_compared_as_they_stand(tmp_path: Path) -> None:
    made = ckptfix.open(FIXTURES / "dataparallel.pt")
    assert ckptfix.diff(made.strip_prefix(), FIXTURES / "ddp.pt").state_dicts[0].renamed
    assert ckptfix.diff(made.strip_prefix().add_prefix(), made).same
