"""What `check` says: a verdict, a screen of keys at most, in the end the one line that helps."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command

SCREEN = 24


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, value: object, name: str) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(value, name)


def test_one_line_in_the_end_repairs_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    torch.save(net.state_dict(), "like.pt")
    on_a_gpu(monkeypatch, {"net": nn.DataParallel(net).state_dict(), "epoch": 3}, "in.pt")
    ran = ckptfix_command("check", "in.pt", "--like", "like.pt")
    lines = ran.stdout.splitlines()
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "warning device-tag" in ran.stdout
    assert [line for line in lines if "ckptfix " in line] == [lines[-1]]
    assert lines[-1] == "  ckptfix fix in.pt in.fixed.pt --like like.pt"
    keys = [line for line in lines if line.startswith(("  - ", "  + "))]
    assert {line[2] for line in keys} == {"-", "+"}
    assert len(keys) < SCREEN
    assert "… and 71 more (--json has all)" in ran.stdout
    assert ckptfix_command(*shlex.split(lines[-1])[1:]).returncode == 0
    net.load_state_dict(torch.load("in.fixed.pt"))
    assert ckptfix_command("check", "in.fixed.pt", "--like", "like.pt").returncode == 0


def test_keys_of_many_kinds_take_a_screen_too() -> None:
    names = [f"{kind}{n}" for kind in "abcd" for n in range(50)]
    torch.save({name: torch.ones(2) for name in names}, "like.pt")
    found = {f"a{n}": torch.ones(3) for n in range(50)}
    found |= {f"b{n}": torch.ones(2).half() for n in range(50)}
    found |= {f"c{n}": torch.ones(2).to_sparse() for n in range(50)}
    found |= {f"e{n}": torch.ones(2) for n in range(50)}
    torch.save(found, "in.pt")
    ran = ckptfix_command("check", "in.pt", "--like", "like.pt")
    lines = ran.stdout.partition("\nWith")[0].partition("\nstrict")[0].splitlines()
    listed = [line for line in lines if line.startswith("  ")]
    assert ran.returncode == 1
    assert {line[2] for line in listed} == {"-", "+", "!", "~", "…"}
    assert len(listed) <= SCREEN


WRAPPED = [
    ["cuda.pt"], ["ddp.pt"], ["dataparallel_cuda_training.pt"],
    ["legacy_dataparallel_cuda.pt", "torch_compile.pt"],
]  # fmt: skip


@pytest.mark.parametrize("names", WRAPPED)
def test_what_loads_with_map_location_into_a_wrapped_model_is_sound(names: list[str]) -> None:
    ran = ckptfix_command("check", *(FIXTURES / name for name in names))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("structure is sound (") == len(names)
    assert "warning " in ran.stdout


def test_an_error_is_a_no_and_the_verdict_says_so() -> None:
    torch.save({"head.weight": torch.empty(0), "body.weight": torch.empty(0)}, "in.pt")
    shutil.copy(FIXTURES / "cpu.pt", "sound.pt")
    ran = ckptfix_command("check", "sound.pt", "in.pt")
    first, _, second = ran.stdout.splitlines()[:3]
    assert ran.returncode == 1
    assert first.startswith("sound.pt: structure is sound (")
    assert second.startswith("in.pt: structure is sound, but it has 1 error (")
    assert "error   placeholders: " in ran.stdout
    assert ckptfix_command("inspect", "sound.pt", "in.pt").returncode == 0


def test_the_model_is_built_once_for_many_files() -> None:
    Path("net.py").write_text(
        "from torch import nn\nprint('building')\ndef net():\n    return nn.Linear(2, 2)\n"
    )
    for name in ("a.pt", "b.pt"):
        torch.save(nn.Linear(2, 2).state_dict(), name)
    torch.save(nn.Linear(3, 2).state_dict(), "c.pt")
    ran = ckptfix_command("check", "a.pt", "c.pt", "b.pt", "--model", "net.py:net")
    assert ran.returncode == 1
    verdicts = [line.split()[0] for line in ran.stdout.splitlines() if "match" in line]
    assert [name for name in verdicts if name.endswith(".pt")] == ["a.pt", "c.pt", "b.pt"]
    assert ran.stderr.count("building") == 1


def test_an_answer_has_an_error_where_and_only_where_it_is_a_no() -> None:
    """Both names are there; with a model that has both, that is no error."""
    both = {"module.a.weight": torch.ones(2), "a.weight": torch.zeros(2)}
    torch.save(both, "in.pt")
    for arguments, code in ((["in.pt"], 1), (["in.pt", "--like", "in.pt"], 0)):
        ran = ckptfix_command("check", *arguments, "--json")
        severities = [row["severity"] for row in json.loads(ran.stdout)["findings"]]
        assert (ran.returncode, "error" in severities) == (code, bool(code))
