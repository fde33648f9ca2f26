"""What is noticed about a checkpoint: each finding, and that its command does what it promises."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

import ckptfix
from ckptfix import door
from ckptfix.contents.state_dicts import find
from ckptfix.diagnose.document import diagnose, wasted
from ckptfix.findings import CODES, Finding, with_errors
from ckptfix.known_errors import KNOWN
from ckptfix.pickles.allowed import is_allowed
from ckptfix.tree.document import Global
from fixtures.foonet import FooNet
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done

if TYPE_CHECKING:
    from ckptfix.hints import Command


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def findings(path: str | Path) -> dict[str, Finding]:
    return {finding.code: finding for finding in ckptfix.open(path).findings}


def run_as_it_stands(command: Command | None) -> str:
    """Run a command through the shell, as somebody would who copies it."""
    assert command is not None
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    ran = subprocess.run(str(command), shell=True, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return command.arguments[-1]


def without_checksums() -> str:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    return "in.pt"


def with_another_save() -> Path:
    made = FIXTURES / "cpu.pt"
    Path("two.pt").write_bytes(made.read_bytes() + (FIXTURES / "plain.safetensors").read_bytes())
    return Path("two.pt")


def with_a_tail() -> str:
    Path("in.pt").write_bytes((FIXTURES / "legacy.pt").read_bytes() + b"surplus")
    return "in.pt"


def with_a_command() -> str:
    torch.save({"w": torch.ones(2), "f": os.system}, "in.pt")
    return "in.pt"


def with_a_call_that_nobody_knows() -> str:
    torch.save({"w": torch.ones(2), "f": Made()}, "in.pt")
    return "in.pt"


class Made:
    """Pickles as a call of a function of some project."""

    def __reduce__(self):
        return (of_paddle, ())


def of_paddle() -> str:
    state = {"fc.weight": np.ones((2, 2), "f4"), "fc.bias": np.ones(2, "f4")}
    names = {
        "StructuredToParameterName@@": {"fc.weight": "linear_0.w_0", "fc.bias": "linear_0.b_0"}
    }
    Path("in.pt").write_bytes(pickle.dumps(state | names, protocol=2))
    return "in.pt"


def for_mlx() -> str:
    safetensors.torch.save_file({"w": torch.ones(2)}, "in.safetensors", {"format": "mlx"})
    return "in.safetensors"


def misnamed() -> str:
    shutil.copy(FIXTURES / "plain.safetensors", "in.pt")
    return "in.pt"


def without_tensors() -> str:
    torch.save({"epoch": 3}, "in.pt")
    return "in.pt"


PRODUCED: dict[str, Any] = {
    "prefix-wrapper": lambda: FIXTURES / "ddp.pt",
    "partial-prefix": lambda: FIXTURES / "own_child_module.pt",
    "key-collision": lambda: FIXTURES / "mixed_prefix.pt",
    "wrapper-inside": lambda: FIXTURES / "fsdp_names.pt",
    "swa-layout": lambda: FIXTURES / "swa.pt",
    "device-tag": lambda: FIXTURES / "cuda.pt",
    "blocked-globals": lambda: FIXTURES / "uninstalled_class.pt",
    "dangerous-globals": with_a_command,
    "unknown-calls": with_a_call_that_nobody_knows,
    "other-framework": of_paddle,
    "view-bloat": lambda: FIXTURES / "views.pt",
    "tied-tensors": lambda: FIXTURES / "tied.pt",
    "no-checksums": without_checksums,
    "trailing-bytes": with_a_tail,
    "several-saves": with_another_save,
    "wrong-extension": misnamed,
    "no-state-dict": without_tensors,
    "metadata-format": for_mlx,
    "end-unproven": lambda: FIXTURES / "pieces" / "hf",
    "flat-parameters": lambda: FIXTURES / "pieces" / "fsdp1_local_False_rank_0.pt",
    "ranks-differ": lambda: FIXTURES / "pieces" / "replicas_rank_0.pt",
}
ELSEWHERE = {
    "surplus-shard", "rolled-back", "unused-records", "crc-mismatch", "nan-values", "inf-values",
    "unexpected-keys", "nested", "averaged-copy", "dropped-keys", "pruned-weights",
    "optimizer-state", "unseen-transpose", "meta-tensors", "placeholders", "packed-weights",
    "numpy-arrays", "unknown-state", "script-constants", "hidden-call", "container-refused",
    "left-on-stack", "old-container", "checkpoint-in-bytes", "twin-differs", "twin-beside",
    "files-beside",
    "tensor-parallel",
    "values-change",
}  # fmt: skip
"""Those that the tests of containers, the journal, `soundness`, `fix` and the judge produce."""


class Rebuilt:
    """A tensor as it is saved from a device that has no storages of its own."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("tag", ["xla:1", "hpu:0", "maia"])
@pytest.mark.parametrize("kind", ["numpy", "cpu_tensor"])
def test_a_device_in_a_rebuild_call_is_a_device_tag(kind: str, tag: str) -> None:
    function = getattr(torch._utils, f"_rebuild_device_tensor_from_{kind}")
    tensor = torch.arange(3.0)
    data = tensor.numpy() if kind == "numpy" else tensor
    torch.save({"w": Rebuilt(function, data, tensor.dtype, tag, False)}, "in.pt")
    found = findings("in.pt")["device-tag"]
    assert tag in found.message
    written = run_as_it_stands(found.command)
    assert "device-tag" not in findings(written)
    assert torch.equal(torch.load(written, weights_only=False)["w"], tensor)


@pytest.mark.parametrize("form", ["np", "mlx", "tf", "flax"])
def test_a_format_of_others_is_pt_once_it_is_written_anew(form: str) -> None:
    texts = {"license": "MIT", "format": form}
    safetensors.torch.save_file({"w": torch.ones(2)}, "in.safetensors", texts)
    written = run_as_it_stands(findings("in.safetensors")["metadata-format"].command)
    with safetensors.safe_open(written, "pt") as opened:
        assert opened.metadata() == {"license": "MIT", "format": "pt"}
    assert findings(written) == {}


@pytest.mark.parametrize("code", PRODUCED)
def test_each_code_is_found_where_it_belongs(code: str):
    found = findings(PRODUCED[code]())
    assert code in found
    assert found[code].severity is CODES[code][0]
    assert found[code].message


def test_every_code_is_produced_by_a_test():
    of_errors = {known.code for known in KNOWN}
    assert set(PRODUCED) | ELSEWHERE | of_errors == set(with_errors())


@pytest.mark.parametrize("name", ["cpu.pt", "legacy.pt", "plain.safetensors"])
def test_nothing_is_found_in_a_sound_file(name: str):
    assert findings(FIXTURES / name) == {}


def test_no_error_is_left_once_the_commands_were_run(checkpoint: Path):
    """Every command in a finding runs as it stands, and its finding is gone from what it wrote."""
    shutil.copy(checkpoint, checkpoint.name)
    for code, finding in findings(checkpoint.name).items():
        if finding.command is not None:
            written = run_as_it_stands(finding.command)
            assert code not in findings(written)


def test_the_commands_may_be_run_one_upon_another():
    shutil.copy(FIXTURES / "dataparallel_cuda_training.pt", "in.pt")
    path, repaired = "in.pt", []
    while found := [f for f in findings(path).values() if f.command is not None]:
        repaired.append(found[0].code)
        path = run_as_it_stands(found[0].command)
    assert repaired == ["device-tag", "prefix-wrapper"]
    FooNet(4, 3).load_state_dict(torch.load(path)["model_state_dict"])


@pytest.mark.parametrize(
    "name", ["a b.pt", "it's.pt", "$HOME.pt", "-n.pt", "no_extension", "x.tar"]
)
def test_commands_quote_names_of_any_kind(name: str):
    shutil.copy(FIXTURES / "dataparallel_cuda.pt", name)
    found = findings(f"./{name}")
    for code in ("device-tag", "prefix-wrapper"):
        assert Path(run_as_it_stands(found[code].command)).exists()


def test_a_misnamed_file_whose_name_looks_like_an_option_can_be_renamed():
    shutil.copy(FIXTURES / "plain.safetensors", "-n.pt")
    assert run_as_it_stands(findings("./-n.pt")["wrong-extension"].command) == "./-n.safetensors"
    assert Path("-n.safetensors").exists()


def test_each_state_dict_is_named_and_can_be_stripped_alone():
    wrapped = nn.DataParallel(FooNet(2, 1)).state_dict()
    torch.save({"student": wrapped, "teacher": dict(wrapped)}, "in.pt")
    found = [f for f in ckptfix.open("in.pt").findings if f.code == "prefix-wrapper"]
    assert [finding.where for finding in found] == ["student", "teacher"]
    loaded = torch.load(run_as_it_stands(found[1].command))
    assert list(loaded["student"]) == ["module.linears.0.weight"]
    assert list(loaded["teacher"]) == ["linears.0.weight"]


def test_a_pickled_model_is_not_offered_a_command_that_refuses_it():
    torch.save(nn.DataParallel(nn.Linear(2, 2)), "in.pt")
    command = findings("in.pt")["prefix-wrapper"].command
    if command is not None:
        run_as_it_stands(command)


def test_inspect_shows_the_findings_and_their_commands():
    shutil.copy(FIXTURES / "dataparallel_cuda.pt", "in.pt")
    shown = done("inspect", "in.pt")
    for finding in findings("in.pt").values():
        assert finding.code in shown
        assert finding.command is None or str(finding.command) in shown


# The parts


def test_waste_is_what_no_tensor_reaches():
    large = torch.rand(1000)
    torch.save({"a": large[:10], "b": large[5:15], "c": torch.rand(4)}, "in.pt")
    assert 4000 - 80 <= wasted(door.read("in.pt")) <= 4000 - 60
    torch.save({"a": torch.rand(1, 3).expand(400, 3), "b": torch.rand(3, 4).t()}, "in.pt")
    assert wasted(door.read("in.pt")) == 0


# Against torch


def test_the_classes_that_weights_only_admits_are_torchs():
    allowed = {name: Global(*name.rpartition(".")[::2]) for name in _get_allowed_globals()}
    assert [name for name, found in allowed.items() if not is_allowed(found)] == []


MODULES = ("torch", "torch.cuda", "torch.sparse", "torch._utils", "torch._tensor", "builtins",
           "collections", "torch.storage", "torch.serialization", "torch.nn.parameter", "os",
           "copyreg", "_codecs", "posix", "torch.cuda.sparse")  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_nothing_else_is_admitted(module: str):
    allowed = _get_allowed_globals()
    names = [name for name in dir(import_module(module)) if f"{module}.{name}" not in allowed]
    assert [name for name in names if is_allowed(Global(module, name))] == []


def test_a_class_is_blocked_exactly_where_torch_refuses_it(checkpoint: Path):
    if checkpoint.suffix == ".safetensors":
        assert "blocked-globals" not in findings(checkpoint)
        return
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
        refused = False
    except Exception as error:  # noqa: BLE001 - torch raises what it likes
        refused = "Weights only load failed" in str(error)
    assert ("blocked-globals" in findings(checkpoint)) == refused


# Remedies


def test_the_cure_of_a_file_from_before_torch_0_4_1_makes_it_load():
    net = nn.DataParallel(nn.Sequential(nn.BatchNorm1d(2)))
    old = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save(old, "in.pt")
    Path("net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.BatchNorm1d(2))\n"
    )
    ran = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1] == "  ckptfix fix in.pt in.fixed.pt --model net.py:net"
    done("fix", "in.pt", "in.fixed.pt", "--model", "net.py:net")
    done("check", "in.fixed.pt", "--model", "net.py:net")
    net.module.load_state_dict(torch.load("in.fixed.pt"))


def test_diagnosing_does_not_depend_on_what_is_found_first():
    document = door.read(FIXTURES / "dataparallel_cuda_training.pt")
    assert diagnose(document) == diagnose(document)
    assert len(find(document.root)) == 2
