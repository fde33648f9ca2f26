"""Targets: models by reference, other checkpoints, reports; and every way to get none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from ckptfix import door
from ckptfix.contents.state_dicts import choose
from ckptfix.errors import TargetError
from ckptfix.match import judge
from ckptfix.match import target as targets
from ckptfix.report import Spec
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done

if TYPE_CHECKING:
    from pathlib import Path

FOONET = f"{FIXTURES / 'foonet.py'}:FooNet"

MODELS = """
print("importing")
from torch import nn

class Net(nn.Module):
    def __init__(self, width=2, bias=True):
        super().__init__()
        print("building")
        self.fc = nn.Linear(width, width, bias=bias)

class Outer:
    Inner = Net

def make(width):
    return Net(width)

built = Net(5)
number = 3

def not_a_model():
    return 3

def broken():
    raise ValueError("no such width\\nand more")

class Size: pass

class Wants(Net):
    def __init__(self, config, width=2):
        super().__init__(config.width)

class Typed(Net):
    def __init__(self, size: Size):
        super().__init__(size.width)

class Opens(Net):
    def __init__(self):
        super().__init__(len(open("names.txt").readlines()))

from abc import ABC, abstractmethod
class Abstract(Net, ABC):
    @abstractmethod
    def forward(self, x): ...

def exits():
    raise SystemExit(3)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a file of models."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


def shapes(reference: str, init: str | None = None) -> list[tuple[int, ...] | None]:
    return [spec.shape for spec in targets.of_reference(reference, init).specs.values()]


@pytest.mark.parametrize(
    ("reference", "init", "expected"),
    [
        ("models.py:Net", None, [(2, 2), (2,)]),
        ("models:Net", None, [(2, 2), (2,)]),
        ("./models.py:Net", '{"width": 3, "bias": false}', [(3, 3)]),
        ("models.py:Net", "[4]", [(4, 4), (4,)]),
        ("models.py:make", "[6]", [(6, 6), (6,)]),
        ("models.py:built", None, [(5, 5), (5,)]),
        ("models.py:Outer.Inner", None, [(2, 2), (2,)]),
        ("torch.nn:Linear", "[2, 3]", [(3, 2), (3,)]),
    ],
)
def test_a_model_is_built_from_its_reference(models: Path, reference: str, init, expected):
    assert shapes(reference, init) == expected


def test_a_huge_model_takes_no_memory(tmp_path: Path):
    (tmp_path / "huge.py").write_text(
        "from torch import nn\n"
        "def huge():\n"
        "    return nn.Sequential(*(nn.Linear(100_000, 100_000) for _ in range(100)))\n"
    )
    assert (
        sum(spec.numel for spec in targets.of_reference(f"{tmp_path}/huge.py:huge").specs.values())
        > 1e12
    )


VALUES = """
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

class Net(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.fc, widths = nn.Linear(3, 3), torch.tensor([2, 3, 3])
        exec(code, {"self": self, "widths": widths, "torch": torch, "np": np, "nn": nn,
                    "orthogonal": parametrizations.orthogonal})
"""
WANTS_VALUES = {
    "item": "self.a = nn.Linear(widths[0].item(), 2)",
    "float": "self.rates = [float(x) for x in torch.linspace(0, 0.1, 3)]",
    "numpy": "self.a = nn.Linear(int(widths.numpy().sum()), 2)",
    "to the CPU": "self.a = nn.Linear(int(widths.to('cpu').sum()), 2)",
    "unique": "self.a = nn.Linear(len(torch.unique(widths)), 2)",
    "from_numpy": "self.register_buffer('a', torch.from_numpy(np.ones(3)) * torch.ones(3))",
    "orthogonal": "orthogonal(self.fc)",
    "a check": "assert widths.max() == 3, 'no such width'; nn.init.constant_(self.fc.weight, 1)",
    "a choice": "self.a = nn.Linear(2, 2) if widths.sum() > 3 else None",
}


@pytest.mark.parametrize("code", WANTS_VALUES.values(), ids=WANTS_VALUES)
def test_a_model_whose_code_wants_values_is_built_on_the_cpu(code: str, models: Path):
    (models / "values.py").write_text(VALUES)
    said: list[str] = []
    wanted = targets.of_reference("values.py:Net", json.dumps([code]), said.append)
    space: dict[str, object] = {}
    exec(VALUES, space)
    model = space["Net"](code)  # type: ignore[operator]
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: spec.shape for key, spec in wanted.specs.items()} == expected
    assert all("values.py:Net is built on the CPU: " in line for line in said)
    torch.save(model.state_dict(), "net.pt")
    ran = ckptfix_command("check", "net.pt", "--model", "values.py:Net",
                          "--init", json.dumps([code]), cwd=models)  # fmt: skip
    assert ran.returncode == 0
    assert ("note: values.py:Net is built on the CPU" in ran.stderr) == bool(said)


def test_the_call_that_shows_why_a_model_is_not_built_can_be_run(models: Path):
    with pytest.raises(TargetError) as raised:
        targets.of_reference("models.py:broken")
    command = str(raised.value.hint).removeprefix("try it: ")
    tried = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=models)
    assert "ValueError: no such width" in tried.stderr


def test_a_folder_of_transformers_names_its_model(models: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4}
    config = transformers.BertConfig(**sizes, num_attention_heads=1)
    for make in (transformers.BertModel, transformers.BertForMaskedLM):
        model = make(config)
        model.save_pretrained("bert")
        wanted = targets.of_reference("hf:bert")
        assert list(wanted.specs) == list(model.state_dict())
    (tmp_path / "bert" / "config.json").write_text('{"architectures": ["Unheard"]}')
    with pytest.raises(TargetError, match=r"config\.json cannot be read"):
        targets.of_reference("hf:bert")


def test_a_folder_that_is_none_of_transformers_is_a_target_error(models: Path):
    pytest.importorskip("transformers")
    with pytest.raises(TargetError, match=r"there is no config\.json in models"):
        targets.of_reference("hf:models")


def test_what_a_model_prints_does_not_get_into_the_answer(models: Path):
    torch.save({"fc.weight": torch.rand(2, 2), "fc.bias": torch.rand(2)}, "net.pt")
    ran = ckptfix_command("check", "net.pt", "--model", "models.py:Net", "--json", cwd=models)
    assert json.loads(ran.stdout)["loads"] is True
    assert "importing" in ran.stderr
    assert "building" in ran.stderr


@pytest.mark.parametrize(
    ("reference", "init", "message", "hint"),
    [
        ("models.py", None, "is not of the form", "for example: --model"),
        (":Net", None, "is not of the form", "for example: --model"),
        ("missing.py:Net", None, "there is no file missing.py", "see what is there: ls ."),
        ("no.such.module:Net", None, "No module named 'no'", "try it:"),
        ("models.py:Nett", None, "there is no 'Nett' in it", "it defines Net, Outer"),
        ("models.py:Net", "{", "is not JSON", "for example: --init"),
        ("models.py:Net", "3", "neither a JSON object nor an array", "for example: --init"),
        ("models.py:Net", '{"depth": 3}', "cannot be built: TypeError", "--init"),
        ("models.py:number", None, "cannot be built", "name an nn.Module class, a function"),
        ("models.py:not_a_model", None, "type int, which is not an nn.Module", "nn.Module class"),
        ("models.py:broken", None, "cannot be built: ValueError: no such width", "try it: "),
        ("models.py:exits", None, "cannot be built: SystemExit: 3", "try it: "),
        ("models.py:make", None, "cannot be built: TypeError", """--init '{"width": value}'"""),
        ("models.py:Net", "[1, 2, 3]", "cannot be built: TypeError", '"width": value, "bias"'),
        ("models.py:Wants", None, "TypeError", "a function that makes config and returns the"),
        ("models.py:Typed", None, "TypeError", "a function that makes size and returns the model"),
        ("models.py:Opens", None, "FileNotFoundError", "its code opens names.txt: run ckptfix in"),
        ("models.py:Abstract", None, "TypeError", "Abstract is abstract"),
        ("script.py:Net", None, "cannot be imported: SystemExit: 2", "try it: "),
        ("syntax.py:Net", None, "cannot be imported: SyntaxError", "try it: "),
    ],
)
def test_every_failure_is_a_target_error_with_a_hint(models: Path, reference, init, message, hint):
    (models / "script.py").write_text("import sys\nsys.exit(2)\n")
    (models / "syntax.py").write_text("def\n")
    with pytest.raises(TargetError, match=message) as raised:
        targets.of_reference(reference, init)
    assert raised.value.hint is not None
    assert hint in str(raised.value.hint)
    assert "\n" not in raised.value.message


def test_a_training_script_that_parses_arguments_is_an_error_and_no_silent_exit(models: Path):
    (models / "train.py").write_text(
        "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n"
    )
    ran = ckptfix_command("check", FIXTURES / "cpu.pt", "--model", "train.py:Net", cwd=models)
    assert ran.returncode == 2
    assert "error: --model train.py:Net: cannot be imported: SystemExit: 2" in ran.stderr
    assert ran.stdout == ""


def test_the_hint_of_a_failed_import_can_be_run(models: Path):
    (models / "broken.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(TargetError) as raised:
        targets.of_reference("broken.py:Net")
    assert raised.value.hint is not None
    tried = subprocess.run(str(raised.value.hint).removeprefix("try it: "), shell=True,
                           capture_output=True, text=True, cwd=models)  # fmt: skip
    assert "No module named 'nothing_of_the_kind'" in tried.stderr


# Other checkpoints, and reports


@pytest.mark.parametrize("name", ["cpu.pt", "legacy.pt", "plain.safetensors"])
def test_another_checkpoint_is_a_target(name: str):
    assert done("check", FIXTURES / "cuda.pt", "--like", FIXTURES / name)
    ran = ckptfix_command("check", FIXTURES / "dataparallel.pt", "--like", FIXTURES / name)
    assert ran.returncode == 1


def test_the_json_of_inspect_is_a_target(tmp_path: Path):
    report = tmp_path / "keys.json"
    report.write_text(done("inspect", "--json", FIXTURES / "cpu.pt"))
    assert targets.of_file(report).specs == targets.of_file(FIXTURES / "cpu.pt").specs
    assert done("check", FIXTURES / "cuda.pt", "--like", report)
    ran = ckptfix_command("check", FIXTURES / "ddp.pt", "--like", report)
    assert ran.returncode == 1
    assert "They match once renamed (removed module.):\n  ckptfix fix " in ran.stdout


def test_records_of_several_files_are_no_target(tmp_path: Path):
    report = tmp_path / "keys.json"
    report.write_text(done("inspect", "--json", FIXTURES / "cpu.pt", FIXTURES / "ddp.pt"))
    with pytest.raises(TargetError, match=r"lists 2 files: .*cpu\.pt, .*ddp\.pt"):
        targets.of_file(report)
    indented = json.dumps(json.loads(report.read_text().splitlines()[1]), indent=2)
    report.write_text(indented)
    assert targets.of_file(report).specs == targets.of_file(FIXTURES / "ddp.pt").specs


def test_a_report_lists_what_is_no_tensor_too(tmp_path: Path):
    torch.save({"w": torch.ones(1), "b": torch.ones(1), "w_extra_state": 3}, tmp_path / "x.pt")
    report = tmp_path / "keys.json"
    report.write_text(done("inspect", "--json", tmp_path / "x.pt"))
    assert targets.of_file(report).specs["w_extra_state"] == Spec(None, None)
    assert done("check", tmp_path / "x.pt", "--like", report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"state_dicts": []}', "lists 0 state dicts: none"),
        ('{"state_dicts": [{"role": "model", "tensors": [{}]}]}', "JSON"),
        ('{"state_dicts": 3}', "JSON"),
        ('{"state_dicts": [3]}', "JSON"),
        ("{" * 100_000, "JSON"),
        ("", "empty"),
    ],
)
def test_a_file_that_is_neither_is_a_target_error(content: str, message: str, tmp_path: Path):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(TargetError, match=message) as raised:
        targets.of_file(tmp_path / "keys.json")
    assert raised.value.hint is not None


def test_a_missing_file_and_an_ambiguous_one_are_target_errors(tmp_path: Path):
    with pytest.raises(TargetError, match="cannot compare with"):
        targets.of_file(tmp_path / "missing.pt")
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "two.pt")
    with pytest.raises(TargetError, match="holds 2 state dicts: a, b") as raised:
        targets.of_file(tmp_path / "two.pt")
    assert (
        str(raised.value.hint)
        == f"take one out of it first: ckptfix convert {tmp_path}/two.pt OUT --select PATH"
    )


@pytest.mark.parametrize(
    "options", [("--model", FOONET, "--like", "x.pt"), ("--init", "[4]"), ("--model", FOONET)]
)
def test_check_refuses_targets_that_make_no_sense(options: tuple[str, ...]):
    ran = ckptfix_command("check", FIXTURES / "cpu.pt", *options)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: --")


def test_a_model_in_memory_is_a_target_wherever_it_lives():
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    specs = targets.of_module(model).specs
    assert specs["running_mean"] == Spec((3,), "float32")
    assert specs["num_batches_tracked"] == Spec((), "int64")
    assert targets.of_module(nn.LazyLinear(2)).specs["weight"] == Spec(None, None, "lazy")


@pytest.mark.parametrize("init", ['{"neural_num": 4, "layers": 3}', "[4, 3]", "[4]"])
def test_the_report_of_a_fixture_against_its_model(init: str):
    document = door.read(FIXTURES / "cpu.pt")
    wanted = targets.of_reference(FOONET, init)
    report = judge.as_it_stands(document, choose(document), wanted)
    assert report.identical
    assert report.share == 1.0
