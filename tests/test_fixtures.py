"""The main job on every fixture: both errors with plain torch, then gone, and nothing lost."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import ckptfix
from ckptfix import door
from ckptfix.tree import compare
from fixtures.foonet import FooNet
from fixtures.make import (
    FIXTURES,
    HERE,
    KEYS,
    LAYERS,
    NEURAL_NUM,
    ON_CUDA,
    RESNET_CLASSES,
    RESNET_WIDTH,
    UNSAFE,
    make,
    table,
    their_project,
)
from fixtures.resnet18 import ResNet18
from tests.oracles import ckptfix_command, done, unlike

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fixtures.make import Fixture

ROUNDED = {"dataparallel_cuda_training.pt", "resnet18_dataparallel_cuda.pt"}
"""Those that hold a step of training, which another processor may round differently."""

LAID_OUT = {"swa.pt"}
"""`module.*` beside `n_averaged`: for AveragedModel, and not to be stripped."""

BROKEN = [f for f in FIXTURES.values() if {ON_CUDA, KEYS} & {*f.says} and f.name not in LAID_OUT]
PREFIXED = [f for f in BROKEN if KEYS in f.says]
ALL = list(FIXTURES.values())


def each(fixtures: list[Fixture]) -> Any:
    return pytest.mark.parametrize("fixture", fixtures, ids=lambda fixture: fixture.name)


def bare_model(fixture: Fixture) -> nn.Module:
    if fixture.name.startswith("resnet18"):
        return ResNet18(RESNET_CLASSES, RESNET_WIDTH)
    return FooNet(NEURAL_NUM, LAYERS)


def plain_load(path: Path, **keywords: Any) -> Any:
    """What somebody without ckptfix calls."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, **keywords)


def by_torch(path: Path) -> Any:
    """Everything in a file of ours, on the CPU."""
    if path.suffix == ".safetensors":
        return plain_load(path)
    with their_project():
        return torch.load(path, map_location="cpu", weights_only=False)


def state_dict_in(loaded: Any) -> Any:
    return loaded.get("model_state_dict", loaded)


def weights(path: Path) -> list[torch.Tensor]:
    """The tensors of the one state dict in a file, in order, by torch."""
    return list(state_dict_in(by_torch(path)).values())


def same_document(one: Path, other: Path) -> str | None:
    return compare.difference(door.read(one).root, door.read(other).root)


# What the fixtures are


def test_the_readme_holds_the_table_and_every_file_is_there():
    assert table() in (HERE / "README.md").read_text()
    on_disk = {path.name for path in HERE.iterdir() if path.suffix in (".pt", ".safetensors")}
    assert on_disk == set(FIXTURES)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@each(ALL)
def test_making_a_fixture_again_gives_the_same_contents(fixture: Fixture, tmp_path: Path):
    again = make(fixture.name, tmp_path)
    committed, made = by_torch(HERE / fixture.name), by_torch(again)
    if fixture.name in ROUNDED:
        torch.testing.assert_close(state_dict_in(made), state_dict_in(committed))
        return
    assert same_document(HERE / fixture.name, again) is None
    assert unlike(made, committed) is None


# The errors, and their cures


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first error needs a machine without GPU")
@each([f for f in ALL if f.says])
def test_plain_torch_says_what_the_table_says(fixture: Fixture):
    path, said = HERE / fixture.name, list(fixture.says)
    if ON_CUDA in said:
        with pytest.raises(RuntimeError, match=re.escape(said.pop(0))):
            torch.load(path)
    if UNSAFE in said:
        with pytest.raises(pickle.UnpicklingError, match=re.escape(said.pop(0))):
            torch.load(path)
        with pytest.raises(ModuleNotFoundError, match=re.escape(said.pop(0))):
            torch.load(path, weights_only=False)
    if KEYS in said:
        with pytest.raises(RuntimeError, match=re.escape(said.pop(0))) as raised:
            bare_model(fixture).load_state_dict(weights_of(path))
        assert "Unexpected key(s) in state_dict" in str(raised.value)
    assert not said


def weights_of(path: Path) -> Any:
    return state_dict_in(plain_load(path, map_location="cpu"))


@each([f for f in ALL if not f.says])
def test_the_others_load_with_plain_torch(fixture: Fixture):
    assert plain_load(HERE / fixture.name)


@each(BROKEN)
def test_two_commands_mend_a_file_for_plain_torch(fixture: Fixture, tmp_path: Path):
    path = HERE / fixture.name
    if ON_CUDA in fixture.says:
        on_cpu = tmp_path / f"cpu-{fixture.name}"
        done("to-cpu", path, on_cpu)
        path = on_cpu
    if KEYS in fixture.says:
        bare = tmp_path / f"bare-{fixture.name}"
        done("strip-prefix", path, bare)
        path = bare
    loaded = state_dict_in(plain_load(path))
    assert unlike(list(loaded.values()), weights(HERE / fixture.name)) is None
    model = bare_model(fixture)
    model.load_state_dict(loaded)
    assert unlike(list(model.state_dict().values()), weights(HERE / fixture.name)) is None


@each(BROKEN)
def test_load_into_needs_no_command_at_all(fixture: Fixture):
    model = bare_model(fixture)
    report = ckptfix.load_into(model, HERE / fixture.name)
    assert report.identical
    assert report.matched == list(model.state_dict())
    assert unlike(list(model.state_dict().values()), weights(HERE / fixture.name)) is None


@each(BROKEN)
def test_load_state_dict_gives_the_keys_that_the_model_has(fixture: Fixture):
    model = bare_model(fixture)
    found = ckptfix.load_state_dict(HERE / fixture.name, model=model)
    assert list(found) == list(model.state_dict())
    assert unlike(list(found.values()), weights(HERE / fixture.name)) is None
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}


# Nothing is lost


@each(PREFIXED)
def test_strip_then_add_gives_the_checkpoint_back(fixture: Fixture, tmp_path: Path):
    source = HERE / fixture.name
    bare, again = tmp_path / f"bare-{fixture.name}", tmp_path / fixture.name
    if source.suffix == ".pt":  # a legacy file comes back in a zip
        bare, again = bare.with_suffix(".pt"), again.with_suffix(".pt")
    renamed = json.loads(done("strip-prefix", "--json", source, bare))["renamed"]
    assert all(row["removed"] for row in renamed)
    done("add-prefix", "--prefix", renamed[0]["removed"], bare, again)
    assert same_document(source, again) is None
    assert unlike(by_torch(again), by_torch(source)) is None


@each([f for f in ALL if f.name != "whole_module.pt"])
def test_add_then_strip_gives_the_checkpoint_back(fixture: Fixture, tmp_path: Path):
    source = HERE / fixture.name
    wrapped, again = tmp_path / f"wrapped-{fixture.name}", tmp_path / fixture.name
    done("add-prefix", source, wrapped)
    done("strip-prefix", "--prefix", "module", wrapped, again)
    assert same_document(source, again) is None
    assert unlike(by_torch(again), by_torch(source)) is None


@each([f for f in ALL if f.name not in ("dtypes.pt", "ema.pt")])
def test_to_safetensors_and_back_keeps_the_state_dict(fixture: Fixture, tmp_path: Path):
    source = HERE / fixture.name
    done("convert", source, tmp_path / "there.safetensors")
    done("convert", tmp_path / "there.safetensors", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert unlike(back, ckptfix.load_state_dict(source)) is None
    if fixture.name == "whole_module.pt":
        assert unlike(dict(back), dict(by_torch(source).state_dict())) is None
    elif fixture.name != "uninstalled_class.pt":
        assert unlike(dict(back), dict(state_dict_in(by_torch(source)))) is None


@pytest.mark.parametrize("path", ["state_dict", "state_dict_ema"])
def test_one_of_two_state_dicts_to_safetensors_and_back(path: str, tmp_path: Path):
    source = HERE / "ema.pt"
    done("convert", "--select", path, source, tmp_path / "there.safetensors")
    done("convert", tmp_path / "there.safetensors", tmp_path / "back.pt")
    assert unlike(torch.load(tmp_path / "back.pt"), torch.load(source)[path]) is None


def test_dtypes_that_safetensors_cannot_hold_are_refused_by_name(tmp_path: Path):
    ran = ckptfix_command("convert", HERE / "dtypes.pt", tmp_path / "out.safetensors")
    assert ran.returncode == 2
    assert "'bytes.complex32'" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_every_other_dtype_goes_to_safetensors_and_back(tmp_path: Path):
    loaded = torch.load(HERE / "dtypes.pt")
    for key in ("bytes.complex32", "bytes.complex128"):
        del loaded[key]
    torch.save(loaded, tmp_path / "in.pt")
    done("convert", tmp_path / "in.pt", tmp_path / "there.safetensors")
    done("convert", tmp_path / "there.safetensors", tmp_path / "back.pt")
    assert unlike(dict(torch.load(tmp_path / "back.pt")), loaded) is None
    opened = safetensors.torch.load_file(tmp_path / "there.safetensors")
    assert unlike({key: opened[key] for key in loaded}, loaded) is None


@pytest.mark.parametrize("verb", ["strip-prefix", "to-cpu"])
def test_a_training_checkpoint_keeps_all_that_is_no_weight(verb: str, tmp_path: Path):
    source, target = HERE / "dataparallel_cuda_training.pt", tmp_path / "out.pt"
    done(verb, source, target)
    before, after = by_torch(source), by_torch(target)
    model_before, model_after = before.pop("model_state_dict"), after.pop("model_state_dict")
    assert unlike(after, before) is None
    assert unlike([*model_after.values()], [*model_before.values()]) is None
    assert after["device"] == torch.device("cuda:0")
    assert after["epoch"] == 1
    torch.set_rng_state(torch.load(target, map_location="cpu")["rng_state"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors would be put on the GPU")
def test_a_mended_training_checkpoint_trains_on(tmp_path: Path):
    done("to-cpu", HERE / "dataparallel_cuda_training.pt", tmp_path / "cpu.pt")
    done("strip-prefix", tmp_path / "cpu.pt", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    model = FooNet(NEURAL_NUM, LAYERS)
    model.load_state_dict(loaded["model_state_dict"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    scheduler.load_state_dict(loaded["lr_scheduler_state_dict"])
    model(torch.ones(2, NEURAL_NUM)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [2.0] * LAYERS
    assert scheduler.get_last_lr() == [0.001]


def test_objects_of_unknown_classes_are_carried_along(tmp_path: Path):
    source, target = HERE / "uninstalled_class.pt", tmp_path / "out.pt"
    done("add-prefix", source, target)
    assert unlike(by_torch(target)["hparams"], by_torch(source)["hparams"]) is None
    assert next(iter(by_torch(target)["state_dict"])) == "module.linears.0.weight"


def test_a_command_never_touches_its_input(checkpoint: Path, tmp_path: Path):
    copy = tmp_path / checkpoint.name
    shutil.copy(checkpoint, copy)
    copy.chmod(0o444)
    for verb in ("strip-prefix", "add-prefix", "to-cpu"):
        ckptfix_command(verb, copy, tmp_path / f"{verb}-{checkpoint.name}")
    assert copy.read_bytes() == checkpoint.read_bytes()
