"""`ckptfix diff` as a process: exit codes, what a person reads, what a program reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with `a.pt` and `b.pt`, which differ in many ways."""
    layers = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(30)}
    long = "a_rather_long_name_of_a_module." * 3 + "weight"
    common = {"bias": torch.ones(2), "gone": torch.rand(3), long: torch.zeros(4)}
    torch.save({"model": {**layers, **common}, "epoch": 3}, tmp_path / "a.pt")
    changed = {key: value + 1 for key, value in layers.items()}
    changed |= {"bias": torch.ones(3), "new": torch.rand(5), long: torch.full((4,), 1e-3)}
    torch.save({"model": changed, "epoch": 4}, tmp_path / "b.pt")
    return tmp_path


def test_exit_codes_are_those_of_diff(pair: Path) -> None:
    codes = [
        ckptfix_command("diff", *arguments, cwd=pair).returncode
        for arguments in (("a.pt", "a.pt"), ("a.pt", "b.pt"), ("a.pt", "nope.pt"), ("a.pt",))
    ]
    assert codes == [0, 1, 2, 2]


def test_the_answer_fits_a_terminal_and_long_lists_are_cut(pair: Path) -> None:
    answer = ckptfix_command("diff", "a.pt", "b.pt", cwd=pair).stdout
    lines = answer.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 30
    assert "  - gone  float32 [3]" in lines
    assert "  + new  float32 [5]" in lines
    assert "  ! bias  [2] -> [3]" in lines
    assert "  ~ epoch: 3 -> 4" in lines
    assert "  ~ layers.9.weight  | all 2, abs 1.0e+00, rel 1.0e-01" not in lines
    assert "  … and 21 more (--all has them)" in lines
    assert " ".join(lines[-3:]) == (
        "model: 0 keys equal, 1 only in A, 1 only in B, 1 of another shape, "
        "31 of other values 1 other difference"
    )


def test_all_lists_everything_with_whole_keys(pair: Path) -> None:
    answer = ckptfix_command("diff", "a.pt", "b.pt", "--all", cwd=pair).stdout
    assert "more (--all" not in answer
    assert "a_rather_long_name_of_a_module." * 3 in answer
    assert answer.count("| all 2, abs 1.0e+00") == 30


def test_json_has_everything(pair: Path) -> None:
    ran = ckptfix_command("diff", "a.pt", "b.pt", "--json", cwd=pair)
    found = json.loads(ran.stdout)
    assert (found["schema"], found["same"], ran.returncode) == (2, False, 1)
    (state,) = found["state_dicts"]
    assert len(state["values"]) == 31
    assert state["values"][1] == {
        "key": "layers.1.weight",
        "other": "layers.1.weight",
        "elements": 2,
        "differing": 2,
        "max_abs": 1.0,
        "max_rel": 0.5,
    }
    assert state["shapes"] == [
        {
            "key": "bias",
            "input": {"shape": [2], "dtype": "float32", "kind": ""},
            "other": {"shape": [3], "dtype": "float32", "kind": ""},
        }
    ]
    assert found["others"] == [{"path": "epoch", "input": "3", "other": "4"}]


def test_infinite_differences_are_valid_json(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0])}, tmp_path / "a.pt")
    torch.save({"w": torch.tensor([float("nan")])}, tmp_path / "b.pt")
    ran = ckptfix_command("diff", "a.pt", "b.pt", "--json", cwd=tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (state,) = json.loads(ran.stdout, parse_constant=refuse)["state_dicts"]
    assert state["values"][0]["max_abs"] is None


def test_keys_only_sees_no_values(pair: Path) -> None:
    ran = ckptfix_command("diff", "a.pt", "b.pt", "--keys-only", cwd=pair)
    assert ran.returncode == 1
    assert "other values" not in ran.stdout
    assert "alike, values not compared" in ran.stdout


def test_select_is_for_both_sides_or_for_each(tmp_path: Path) -> None:
    ema = FIXTURES / "ema.pt"
    both = ckptfix_command("diff", ema, ema, "--select", "state_dict_ema")
    each = ckptfix_command("diff", ema, ema, "--select", "state_dict", "--select", "state_dict_ema")
    many = ckptfix_command("diff", ema, ema, *["--select", "state_dict"] * 3)
    none = ckptfix_command("diff", ema, ema, "--select", "nope")
    codes = [ran.returncode for ran in (both, each, many, none)]
    assert codes == [0, 1, 2, 2]
    assert "state_dict (A), state_dict_ema (B)" in each.stdout
    assert "hint: take one of those: --select state_dict" in none.stderr


def test_a_strangers_keys_cannot_command_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[31mred": torch.ones(1), "w": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pt")
    ran = ckptfix_command("diff", "a.pt", "b.pt", cwd=tmp_path)
    assert "\x1b[31mred" not in ran.stdout
    assert r"\x1b[31mred" in ran.stdout


def test_the_page_says_the_numbers_of_the_terminal(tmp_path: Path) -> None:
    weights = {f"module.layers.{i}.weight": torch.rand(3) for i in range(6)}
    before: dict[str, Any] = {
        **weights,
        "module.n": 3,
        "module.s": torch.eye(2).to_sparse(),
        "module.gone": 1,
    }
    after = {key.removeprefix("module."): value for key, value in before.items()}
    after["layers.0.weight"] = weights["module.layers.0.weight"] + 1
    after["layers.1.weight"] = weights["module.layers.1.weight"].half()
    after["layers.2.weight"] = torch.rand(4)
    after["s"] = torch.eye(2)
    after["new"] = after.pop("gone") + 1
    torch.save({"model": before, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"model": after, "epoch": 4}, tmp_path / "b.pt")
    ran = ckptfix_command("diff", "a.pt", "b.pt", "--html", "page.html", "--all", cwd=tmp_path)
    page = (tmp_path / "page.html").read_text("utf-8")
    found = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert " ".join(ran.stdout.split()).endswith(" ".join(found["facts"]))
    assert found["facts"] == [
        (
            "model: 4 keys equal, 1 only in A, 1 only in B, 8 renamed, 1 of another shape, "
            "1 of another dtype, 2 of other values"
        ),
        "2 other differences",
    ]
    changes = {row["key"]: row["change"] for row in found["tensors"]}
    counts = {what: sum(what in each.split(", ") for each in changes.values())
              for what in ("removed", "added", "renamed", "shape", "dtype", "values")}  # fmt: skip
    assert list(counts.values()) == [1, 1, 8, 1, 1, 2]
    assert changes["module.layers.0.weight"] == "renamed, values"
    assert "model/module.s: sparse" in ran.stdout.replace("torch._utils._rebuild_", "")
