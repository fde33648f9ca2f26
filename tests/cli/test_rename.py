"""`ckptfix rename` and `Checkpoint.rename`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest
import torch

import ckptfix
from ckptfix.errors import KeyCollisionError, RenameError
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done, unlike

if TYPE_CHECKING:
    from pathlib import Path


def test_keys_are_renamed_in_turn_and_nothing_else_changes(tmp_path: Path) -> None:
    source = FIXTURES / "dataparallel_cuda_training.pt"
    arguments = ("--sub", r"^module\.linears\.(\d)", r"layer\1.fc", "--sub", r"\.fc", ".linear")
    answer = done("rename", source, tmp_path / "out.pt", *arguments)
    assert "3 keys renamed (module.linears.0.weight -> layer0.linear.weight, …)" in answer
    before, after = (
        torch.load(path, map_location="cpu", weights_only=False)
        for path in (source, tmp_path / "out.pt")
    )
    old, new = before.pop("model_state_dict"), after.pop("model_state_dict")
    assert list(new) == [f"layer{i}.linear.weight" for i in range(3)]
    assert unlike(list(old.values()), list(new.values())) is None
    assert unlike(before, after) is None


def test_versions_of_modules_and_named_optimizers_follow(tmp_path: Path) -> None:
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    optimizer = {"state": {"0.weight": {"step": 1}}, "param_groups": [{"params": ["0.weight"]}]}
    torch.save({"model": norm, "optimizer": optimizer}, tmp_path / "in.pt")
    ckptfix.open(tmp_path / "in.pt").rename(r"^0\.", "norm.").save(tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    assert loaded["model"]._metadata["norm"] == {"version": 2}
    assert list(loaded["optimizer"]["state"]) == ["norm.weight"]
    assert loaded["optimizer"]["param_groups"][0]["params"] == ["norm.weight"]


def test_only_the_state_dict_that_is_selected(tmp_path: Path) -> None:
    options = ("--select", "state_dict_ema", "--sub", "weight$", "w", "--json")
    answer = json.loads(done("rename", FIXTURES / "ema.pt", tmp_path / "out.pt", *options))
    assert [row["path"] for row in answer["renamed"]] == ["state_dict_ema"]
    assert answer["renamed"][0]["keys"]["linears.0.weight"] == "linears.0.w"
    loaded = torch.load(tmp_path / "out.pt")
    assert all(key.endswith(".weight") for key in loaded["state_dict"])
    assert all(key.endswith(".w") for key in loaded["state_dict_ema"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--sub", r"^nothing\.", ""), 1, r"no key matches '^nothing\\.'"),
        (("--sub", r"\d", "x"), 2, "would both become 'linears.x.weight'"),
        (("--sub", "(", ""), 2, "'(' is not a regular expression"),
        (("--sub", "linears", r"\1"), 2, "is not a replacement for 'linears'"),
        (("--sub", "linears", r"\g<x>"), 2, "is not a replacement for 'linears'"),
        (("--sub", "linears"), 2, "requires 2 arguments"),
        ((), 2, "Missing option '--sub'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_written(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    ran = ckptfix_command("rename", FIXTURES / "cpu.pt", tmp_path / "out.pt", *arguments)
    assert ran.returncode == code
    assert said in ran.stdout + ran.stderr
    assert ("hint: " in ran.stderr) is (code == 2)
    assert not list(tmp_path.iterdir())


def test_a_collision_names_both_keys() -> None:
    with pytest.raises(KeyCollisionError, match=r"'linears.0.weight' and 'linears.1.weight'"):
        ckptfix.open(FIXTURES / "cpu.pt").rename(r"\d", "x")


def test_the_hint_for_a_bad_expression_is_one_that_works(tmp_path: Path) -> None:
    torch.save({"a(b": torch.ones(1), "c": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(RenameError) as refused:
        ckptfix.open(tmp_path / "in.pt").rename("a(", "z")
    pattern = shlex.split(str(refused.value.hint))[-2]
    keys = ckptfix.open(tmp_path / "in.pt").rename(pattern, "z").state_dicts[0].mapping
    assert list(keys) == ["zb", "c"]
