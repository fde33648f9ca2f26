"""Every number that a command says is the number that torch and safetensors find in IN and OUT.

The oracles know nothing of ckptfix: `torch.load` with stand-ins for classes that are not there, and
`safetensors.safe_open`. Each verb that writes goes over every fixture, into every container.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import torch

from ckptfix.cli import group
from tests.conftest import CHECKPOINTS
from tests.helpers import named
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path

VERBS: dict[str, list[str]] = {
    "strip-prefix": [],
    "add-prefix": [],
    "rename": ["--sub", "bias", "b", "--sub", "module", "m"],
    "to-cpu": [],
    "convert": [],
    "convert --dtype": ["--dtype", "float16"],
    "convert --weights-only": ["--weights-only"],
    "fix": [],
    "recover": [],
}
RUNS = [*((verb, out) for out in ("out.pt", "out.safetensors") for verb in VERBS),
        ("convert", "out/"), ("rename", "out/")]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# --- what the oracles find


class _Unpickler(pickle.Unpickler):
    """Python's machine, with a stand-in for each class that is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return named(module, name)


_PICKLE = SimpleNamespace(
    __name__="stand-ins", Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load()
)


class Found:
    """What lies in a file: tensors that are distinct, keys, and where storages were saved from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tags: dict[int, str] = {}
        self.views: dict[Any, torch.Tensor] = {}
        self.mappings: list[dict[str, Any]] = []
        self.ties = 0
        self.kept: list[Any] = []
        if path.is_dir() or path.suffix == ".safetensors":
            self._read_safetensors(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        else:
            self.kept.append(torch.load(path, self._tagged, _PICKLE, weights_only=False))
            self._look(self.kept[0], set())

    def _read_safetensors(self, files: list[Path]) -> None:
        aliases: dict[str, str] = {}
        for file in files:
            with safetensors.safe_open(file, "pt") as opened:
                self.views |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                aliases |= opened.metadata() or {}
        names = [alias for alias, key in aliases.items() if key in self.views]
        self.ties = len(names)
        values = {**self.views, **{name: self.views[aliases[name]] for name in names}}
        self.mappings = [values]

    def _tagged(self, storage: Any, tag: str) -> Any:
        self.tags[storage._cdata] = tag
        return storage

    def _look(self, node: Any, seen: set[int]) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, torch.Tensor):
            self.views[_view(node)] = node
            return
        if isinstance(node, dict):
            tensors = {key: value for key, value in node.items() if isinstance(value, torch.Tensor)}
            if tensors and all(isinstance(key, str) for key in node):
                self.mappings.append(node)
                filled = [_view(value) for value in tensors.values() if value.numel()]
                self.ties += len(filled) - len(set(filled))
        below = [*node.values()] if isinstance(node, dict) else []
        below += node if isinstance(node, (list, tuple)) else []
        below += [vars(node)] if hasattr(node, "__dict__") else []
        for child in below:
            self._look(child, seen)


def _view(tensor: torch.Tensor) -> Any:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return id(tensor)
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


# --- inputs besides the fixtures


def _gpt2() -> dict[str, Any]:
    table = torch.randn(5, 2)
    keys = ("wte.weight", "h.0.weight", "lm_head.weight")
    return {f"module.{key}": torch.randn(2, 2) if "h." in key else table for key in keys}


def _several() -> dict[str, Any]:
    weights = {f"module.{key}": torch.randn(2) for key in ("a.weight", "a.bias")}
    return {"model": weights, "ema": {key: value + 1 for key, value in weights.items()}, "epoch": 1}


def _odd() -> dict[str, Any]:
    quantized = torch.quantize_per_channel(
        torch.ones(2), torch.ones(2), torch.zeros(2), 0, torch.qint8
    )
    return {"w": torch.ones(2), "s": torch.eye(3).to_sparse(), "q": quantized,
            "empty": torch.zeros(0), "none": torch.zeros(0), "n": 3}  # fmt: skip


MADE: dict[str, Any] = {
    "tied.made.pt": _gpt2,
    "several.pt": _several,
    "odd.pt": _odd,
    "places.pt": lambda: [torch.randn(3)] * 7 + [torch.ones(1), 3],
    "arrays.pt": lambda: {"w": np.ones(3, np.float32), "v": torch.ones(2), "n": 1},
    "moved.pt": lambda: {"model": {"module.w": torch.ones(2)}, "optimizer": {
        "state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}},
}  # fmt: skip
NAMES = [*(path.name for path in CHECKPOINTS), *MADE]


@pytest.fixture(params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Each fixture, and checkpoints that hold what few do."""
    path = tmp_path / str(request.param)
    known = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
    if path.name in known:
        shutil.copy(known[path.name], path)
        return path
    module: Any = torch.serialization
    tag = module.location_tag
    if path.name == "moved.pt":  # the optimizer is elsewhere, the weights are not
        module.location_tag = lambda one: "cuda:1" if one.nbytes() == 8 else tag(one)
    try:
        torch.save(MADE[path.name](), path)
    finally:
        module.location_tag = tag
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = group.main(list(map(str, arguments)), standalone_mode=False) or 0
    except Exception as error:  # noqa: BLE001 - refused; what it is is for other tests
        return 2, "", str(error)
    return int(code), *capsys.readouterr()


# --- what is said


def number(pattern: str, text: str) -> int | None:
    """The number that a text says, `no` being 0; None where it says none."""
    found = re.search(rf"(\d[\d,]*|\bno) {pattern}", text)
    return None if found is None else int(found[1].replace(",", "").replace("no", "0"))


def renamed(before: Found, after: Found) -> int:
    """How many keys got another name: mappings are those of IN, or the one that OUT is."""
    if len(after.mappings) == len(before.mappings):
        pairs = list(zip(before.mappings, after.mappings, strict=True))
    else:
        (new,) = after.mappings
        pairs = [(min(before.mappings, key=lambda old: _apart(old, new)), new)]
    return sum(not _is_in(old, key, value) for old, new in pairs for key, value in new.items())


def _is_in(mapping: dict[str, Any], key: str, value: Any) -> bool:
    there = mapping.get(key)
    if isinstance(value, torch.Tensor) and isinstance(there, torch.Tensor):
        return unlike(there, value) is None
    return key in mapping


def _keeps_names(before: Found) -> bool:
    """Whether IN has keys of its own; those of a pickled module and a list are made."""
    return isinstance(before.kept[0] if before.kept else {}, dict) and bool(before.mappings)


def _apart(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, int]:
    return abs(len(old) - len(new)), len(set(old) ^ set(new))


@pytest.mark.parametrize(("verb", "out"), RUNS)
def test_the_numbers_are_those_that_torch_and_safetensors_find(
    verb: str,
    out: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tally: Any,
) -> None:
    command: list[str | Path] = [verb.split()[0], source, f"{tmp_path}/{out}", *VERBS[verb]]
    dry = told(capsys, *command, "--dry-run")
    code, said, notes = told(capsys, *command)
    written = tmp_path / out.rstrip("/")
    if code == 2 or not written.exists():
        assert dry[0] == code
        return
    before, after = Found(source), Found(written)
    listed, _, told_last = dry[1].rpartition("would write")  # a dry run lists every change first
    assert "wrote" + told_last == said[said.rindex("wrote") :]
    assert listed.count("->") in (0, *range(1, 21))
    assert dry[2] == notes
    line = said.splitlines()[-1]
    numbers = {
        r"tensors?(?! [a-z]* ?cast)": len(after.views),
        r"ties?\b": after.ties,
        r"keys? renamed": renamed(before, after) if _keeps_names(before) else 0,
        r"keys? dropped": 0,
        r"of them cast": sum(t.dtype == torch.float16 for t in after.views.values())
        - _kept_half(before, after),
    }
    for pattern, found in numbers.items():
        if (count := number(pattern, line)) is not None:
            tally("numbers")
            assert count == found, (pattern, line)
    answer = json.loads(told(capsys, *command, "--json", "--force")[1])
    _same_in_json(answer, line, notes)
    if verb == "to-cpu":
        _same_tags(answer, line, before, after)


def _kept_half(before: Found, after: Found) -> int:
    """Tensors of OUT that were float16 before."""
    halves = Counter(t.numel() for t in before.views.values() if t.dtype == torch.float16)
    ours = Counter(t.numel() for t in after.views.values() if t.dtype == torch.float16)
    return (halves & ours).total()


def _same_in_json(answer: dict[str, Any], line: str, notes: str) -> None:
    assert line.endswith(answer["done"]) or answer["done"] in line
    left = number(r"things? left out of it", notes) or 0
    assert left == len(answer["left_out"])
    for field, pattern in (("copied", "tensors? copied"), ("saved", "tensors? saved")):
        if field in answer:
            assert answer[field] == number(pattern, line)
    rows = answer.get("renamed")
    if isinstance(rows, list):
        assert sum(len(row["keys"]) for row in rows) == (number("keys? renamed", line) or 0)
    once = number("tied keys? written once", notes) or 0
    assert len(answer.get("written_once", {})) == once


def _same_tags(answer: dict[str, Any], line: str, before: Found, after: Found) -> None:
    held = before.tags
    if after.path.suffix != ".pt":  # of one state dict alone
        mapping = min(
            (node for node in _mappings(before.kept[0])),
            key=lambda node: _apart(node, after.mappings[0]),
        )
        inside = {value.untyped_storage()._cdata for value in mapping.values()}
        held = {key: tag for key, tag in held.items() if key in inside}
    else:
        assert set(after.tags.values()) <= {"cpu"}
    away = Counter(tag for tag in held.values() if tag != "cpu")
    assert answer["retagged"] == away
    assert number("storages? tagged cpu", line) == away.total()


def _mappings(node: Any) -> Any:
    if isinstance(node, dict):
        if any(isinstance(value, torch.Tensor) for value in node.values()):
            yield node
        for value in node.values():
            yield from _mappings(value)


# --- the state dict that was selected


@pytest.mark.parametrize(
    "arguments",
    [
        ["strip-prefix"],
        ["add-prefix"],
        ["rename", "--sub", "weight", "w"],
        ["recover"],
        ["convert"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("out", ["out.safetensors", "out/"])
def test_what_is_selected_is_what_is_written(
    arguments: list[str], out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_several(), tmp_path / "in.pt")
    verb, *options = arguments
    selected = [*options, "--select", "ema"]
    assert told(capsys, verb, tmp_path / "in.pt", f"{tmp_path}/{out}", *selected)[0] == 0
    (written,) = Found(tmp_path / out.rstrip("/")).mappings
    ema = torch.load(tmp_path / "in.pt")["ema"]
    assert sorted(map(str, written.values())) == sorted(map(str, ema.values()))


def test_two_state_dicts_do_not_fit_where_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_several(), tmp_path / "in.pt")
    selected = ("--select", "model", "--select", "ema")
    command = ("strip-prefix", tmp_path / "in.pt", tmp_path / "out.safetensors", *selected)
    code, _, error = told(capsys, *command)
    assert (code, "several are selected (model, ema)" in error) == (2, True)
    assert not (tmp_path / "out.safetensors").exists()


# --- of how many keys


NET = """
import torch
def Net(): return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
"""


@pytest.mark.parametrize("prefix", ["", "other."])
def test_a_verdict_is_about_all_keys_of_the_model(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    weights = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    for name, state in (("new.pt", weights), ("old.pt", old)):
        torch.save(state, tmp_path / name)
        said = told(capsys, "check", tmp_path / name, "--model", f"{tmp_path}/net.py:Net")[1]
        found = re.search(r"(\d+) of (\d+) keys match", said)
        matching = sum(key in net.state_dict() for key in state)
        assert found is not None
        assert list(map(int, found.groups())) == [matching, len(net.state_dict())]
        filled = "1 missing and filled by the model itself" in said
        assert filled == (name == "old.pt" or prefix != "")


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors", "out/"])
def test_a_repair_for_a_model_says_what_it_did(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {key.removeprefix("module."): value for key, value in _gpt2().items()}
    torch.save(wanted, tmp_path / "like.pt")
    given = {**_gpt2(), "module.head.weight": torch.ones(3), "module.head.bias": torch.ones(3)}
    torch.save({"model": given, "optimizer": {"t": torch.ones(9)}, "epoch": 1}, tmp_path / "in.pt")
    like = ["--like", str(tmp_path / "like.pt"), "--select", "model"]
    command = ["fix", str(tmp_path / "in.pt"), f"{tmp_path}/{out}", *like]
    line = told(capsys, *command)[1].splitlines()[-1]
    after = Found(tmp_path / out.rstrip("/"))
    assert set(after.mappings[0]) == set(wanted)
    counts = [number(what, line) for what in ("tensors? copied", "keys? renamed", "keys? dropped")]
    assert counts == [len(after.views), 3, 2] == [2, 3, 2]
    answer = json.loads(told(capsys, *command, "--force", "--json")[1])
    assert (answer["copied"], len(answer["dropped"])) == (2, 2)
    assert len(answer["written_once"]) == (0 if out == "out.pt" else 1)


@pytest.mark.parametrize("verb", ["strip-prefix", "add-prefix", "rename"])
def test_an_edit_in_place_says_the_keys_that_torch_finds(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(_several(), tmp_path / "in.pt")
    before = Found(tmp_path / "in.pt")
    select = ["--select", "ema"] if verb == "add-prefix" else []
    line = told(capsys, verb, tmp_path / "in.pt", "--in-place", *VERBS[verb], *select)[1]
    assert number("keys? renamed", line) == renamed(before, Found(tmp_path / "in.pt"))
    assert number("keys? renamed", line)
