"""The situations people are really in, by their numbers in the design, with the stated outcomes.

Names alone are looked at in `test_wrappers`; here it is files, through the command line and the
library.
"""

from __future__ import annotations

import gzip
import json
import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.swa_utils import AveragedModel

import ckptfix
from ckptfix.errors import KeyCollisionError, RenameError
from fixtures.foonet import FooNet
from fixtures.make import Schedule, their_project
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done, unlike


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    """A convolution and a BatchNorm, whose version lives in `_metadata`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)


def saved(*keys: str, **others: Any) -> dict[str, torch.Tensor]:
    """`in.pt` with a tensor of its own under each key."""
    state = {key: torch.full((2,), float(number)) for number, key in enumerate(keys)}
    torch.save(state | others, "in.pt")
    return state


def stripped(*options: str) -> list[str]:
    """The keys that `strip-prefix` leaves, in order; the values have to be those of `in.pt`."""
    done("strip-prefix", *options, "in.pt", "out.pt")
    before, after = torch.load("in.pt"), torch.load("out.pt")
    assert unlike([*after.values()], [*before.values()]) is None
    return list(after)


def refused(code: int, message: str, *arguments: str) -> None:
    """The command ends with a code and says why; nothing is written."""
    ran = ckptfix_command(*arguments)
    assert ran.returncode == code, ran.stderr
    assert message in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    if code == 2:
        assert [line.partition(":")[0] for line in ran.stderr.splitlines()] == ["error", "hint"]
    assert not list(Path().glob("out*"))


def test_1_ddp_keeps_order_and_metadata():
    net = nn.DataParallel(Net())
    torch.save(net.state_dict(), "in.pt")
    done("strip-prefix", "in.pt", "out.pt")
    expected = net.state_dict()
    consume_prefix_in_state_dict_if_present(expected, "module.")
    assert unlike(torch.load("out.pt"), expected) is None
    assert torch.load("out.pt")._metadata["norm"] == {"version": 2}


def test_2_a_child_of_ones_own_called_module_is_not_stripped():
    refused(
        2, "'head.weight' does not", "strip-prefix", str(FIXTURES / "own_child_module.pt"), "out.pt"
    )
    model = nn.ModuleDict({"module": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    assert ckptfix.load_into(model, FIXTURES / "own_child_module.pt").identical


def test_3_only_orig_mod_goes_where_the_target_owns_module():
    state = saved("_orig_mod.module.0.weight", "_orig_mod.module.0.bias")
    owner = nn.ModuleDict({"module": nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))})
    assert list(ckptfix.load_state_dict("in.pt", model=owner)) == [
        "module.0.weight",
        "module.0.bias",
    ]
    ckptfix.load_into(owner, "in.pt")
    assert unlike([*owner.state_dict().values()], [*state.values()]) is None


@pytest.mark.parametrize(
    "stack", ["module._orig_mod.", "_orig_mod.module.", "module.module.", "_orig_mod."]
)
def test_4_stacks_of_wrappers_both_ways_round(stack: str):
    saved(f"{stack}a.weight", f"{stack}b.weight")
    assert stripped() == ["a.weight", "b.weight"]


def test_5_fsdp_and_checkpointing_go_anywhere_and_an_inner_module_stays():
    shutil.copy(FIXTURES / "fsdp_names.pt", "in.pt")
    plain = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.2.weight"]
    assert stripped() == [*plain, "norms.0.module.weight"]


def test_5_an_inner_module_goes_where_the_target_says_so():
    saved("net.norms.0.module.weight", "net.norms.0.module.bias")
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    model = nn.ModuleDict({"net": nn.ModuleDict({"norms": nn.ModuleList([norm])})})
    assert list(ckptfix.load_state_dict("in.pt", model=model)) == list(model.state_dict())


def test_6_only_the_leading_component_and_never_a_part_of_a_name():
    saved("module.sa1.mlp_module.layer0.w", "module.module_list.0.w", "module.submodule.w")
    assert stripped() == ["sa1.mlp_module.layer0.w", "module_list.0.w", "submodule.w"]


def test_6_names_that_merely_contain_module_are_nothing_to_strip():
    saved("module_list.0.w", "mlp_module.w", "submodule.w")
    refused(1, "no key has a wrapper's prefix", "strip-prefix", "in.pt", "out.pt")


def test_7_two_keys_that_would_become_one_are_refused_by_name():
    mixed = str(FIXTURES / "mixed_prefix.pt")
    for options in ([], ["--partial"], ["--prefix", "module.", "--partial"]):
        message = "'module.a.weight' and 'a.weight' would both become 'a.weight'"
        refused(2, message, "strip-prefix", *options, mixed, "out.pt")
    with pytest.raises(KeyCollisionError):
        ckptfix.open(mixed).strip_prefix(partial=True)


def test_8_weights_of_a_lightning_checkpoint_without_lightning():
    weights = {f"model.{key}": tensor for key, tensor in FooNet(4, 3).state_dict().items()}
    with their_project():
        callbacks = {"EarlyStopping": Schedule(1, 0.5)}
        lightning = {"state_dict": weights, "hyper_parameters": Namespace(lr=0.1), "epoch": 3}
        torch.save({**lightning, "callbacks": callbacks}, "in.ckpt")
    model = FooNet(4, 3)
    assert ckptfix.load_into(model, "in.ckpt").identical
    assert unlike([*model.state_dict().values()], [*weights.values()]) is None
    ran = ckptfix_command("convert", "in.ckpt", "out.safetensors")
    assert "callbacks (dict of 1)" in ran.stderr
    assert unlike(safetensors.torch.load_file("out.safetensors"), weights) is None


def test_9_swa_is_a_layout_and_nothing_to_strip():
    refused(1, "no key has a wrapper's prefix", "strip-prefix", str(FIXTURES / "swa.pt"), "out.pt")
    assert "AveragedModel" in done("inspect", FIXTURES / "swa.pt")
    assert ckptfix.load_into(AveragedModel(FooNet(4, 3)), FIXTURES / "swa.pt").identical


def test_9_averaged_weights_are_named_and_the_others_taken():
    states = json.loads(done("inspect", "--json", FIXTURES / "ema.pt"))["state_dicts"]
    assert [(state["path"], state["role"]) for state in states] == [
        ("state_dict", "model"),
        ("state_dict_ema", "ema"),
    ]
    ran = ckptfix_command("convert", FIXTURES / "ema.pt", "out.safetensors")
    told = "averages are not taken: state_dict_ema; --average takes them"
    assert ran.stderr.splitlines() == [
        f"note: {FIXTURES / 'ema.pt'}: {told}",
        "note: 1 thing left out of it: state_dict_ema (dict of 3)",
    ]
    done("convert", "--select", "state_dict_ema", FIXTURES / "ema.pt", "ema.safetensors")
    loaded = torch.load(FIXTURES / "ema.pt")
    assert (
        unlike(safetensors.torch.load_file("out.safetensors"), dict(loaded["state_dict"])) is None
    )
    averages = dict(loaded["state_dict_ema"])
    assert unlike(safetensors.torch.load_file("ema.safetensors"), averages) is None


def test_9_ema_weights_of_latent_diffusion_lie_beside_the_others():
    saved("model.a.weight", "model.b.weight", "model_ema.aweight", "model_ema.bweight")
    refused(1, "no key has a wrapper's prefix", "strip-prefix", "in.pt", "out.pt")


TAGS = ("cuda:0", "cuda:3", "mps", "xla:0", "hpu", "npu:0", "privateuseone:0", "cpu:0", "xpu:1")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("tag", TAGS)
def test_10_storages_of_any_device_load_and_come_out_tagged_cpu(
    tag: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
):
    state = {"w": torch.arange(3.0), "b": torch.ones(1)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: tag)
        torch.save(state, "in.pt", _use_new_zipfile_serialization=zipped)
    assert unlike(dict(ckptfix.load_state_dict("in.pt")), state) is None
    assert json.loads(done("inspect", "--json", "in.pt"))["devices"] == {tag: 2}
    assert f"2 from {tag}" in done("to-cpu", "in.pt", "out.pt")
    assert json.loads(done("inspect", "--json", "out.pt"))["devices"] == {"cpu": 2}
    assert unlike(torch.load("out.pt"), state) is None


def test_11_a_device_among_hyper_parameters_is_a_value_and_rng_state_stays_on_the_cpu():
    net = FooNet(4, 1).state_dict()
    hyper_parameters = {"device": torch.device("cuda:3"), "devices": [torch.device("cuda", 1)]}
    rng = {"rng_state": torch.get_rng_state(), "cuda_rng": [torch.get_rng_state()]}
    torch.save(
        {"model": nn.DataParallel(FooNet(4, 1)).state_dict(), **hyper_parameters, **rng}, "in.pt"
    )
    done("strip-prefix", "in.pt", "out.pt")
    loaded = ckptfix.load("out.pt", map_location="meta")
    assert list(loaded["model"]) == list(net)
    assert loaded["model"]["linears.0.weight"].is_meta
    assert (
        unlike({key: loaded[key] for key in (*hyper_parameters, *rng)}, hyper_parameters | rng)
        is None
    )
    torch.set_rng_state(torch.load("out.pt")["rng_state"])


IMPOSTORS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs"),
    "page": (b"\n\n\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "answer": (b'{"error": "Repository not found"}', "JSON"),
    "empty": (b"", "empty"),
    "zeros": (bytes(4096), "zero bytes"),
    "noise": (bytes(range(7, 256)), "checkpoint"),
    "text": (b"hello there\n", "checkpoint"),
}


@pytest.mark.parametrize("verb", ["strip-prefix", "to-cpu", "add-prefix", "convert"])
@pytest.mark.parametrize("name", IMPOSTORS)
def test_14_impostors_are_named(name: str, verb: str, tmp_path: Path):
    content, said = IMPOSTORS[name]
    (tmp_path / "in.pt").write_bytes(content)
    refused(2, said, verb, "in.pt", "out.pt")
    with pytest.raises(ckptfix.CkptfixError, match=said):
        ckptfix.load_state_dict("in.pt")


def test_14_a_checkpoint_under_the_wrong_name_is_read_by_its_bytes(tmp_path: Path):
    shutil.copy(FIXTURES / "plain.safetensors", "a.pt")
    shutil.copy(FIXTURES / "cpu.pt", "b.safetensors")
    assert unlike(dict(ckptfix.load("a.pt")), dict(ckptfix.load("b.safetensors"))) is None
    assert "mv a.pt a.safetensors" in done("inspect", "a.pt")
    assert "mv b.safetensors b.pt" in done("inspect", "b.safetensors")


def test_14_a_gzipped_checkpoint_is_read_or_named(tmp_path: Path):
    (tmp_path / "in.pt").write_bytes(gzip.compress(b"hello there\n" * 100))
    refused(2, "in.pt", "strip-prefix", "in.pt", "out.pt")


def test_16_tied_overlapping_and_strided_tensors_come_through():
    for name in ("tied.pt", "views.pt"):
        done("add-prefix", FIXTURES / name, f"wrapped-{name}")
        before, after = torch.load(FIXTURES / name), torch.load(f"wrapped-{name}")
        assert list(after) == [f"module.{key}" for key in before]
        assert unlike([*after.values()], [*before.values()]) is None
        assert [t.stride() for t in after.values()] == [t.stride() for t in before.values()]
    loaded = torch.load("wrapped-tied.pt")
    loaded["module.embed.weight"].zero_()
    assert not loaded["module.lm_head.weight"].any()
    loaded = torch.load("wrapped-views.pt")
    loaded["module.overlap.a"][4] = 42
    assert loaded["module.overlap.b"][0] == 42


def special() -> dict[str, Any]:
    """What may stand among tensors in a state dict, without what depends on the build of torch."""
    return {
        "module.w": torch.rand(3),
        "module.complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        "module.sparse": torch.eye(2).to_sparse(),
        "module.csr": torch.eye(2).to_sparse_csr(),
        "module.meta": torch.empty(3, device="meta"),
        "module.steps": 3,
        "module._extra_state": {"scale": torch.ones(1), "note": "x"},
        "module.b": torch.rand(1),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_16_numbers_extra_state_and_special_tensors_come_through():
    state = special()
    torch.save(state, "in.pt")
    done("strip-prefix", "in.pt", "out.pt")
    loaded = torch.load("out.pt", weights_only=False)
    assert list(loaded) == [key.removeprefix("module.") for key in state]
    for key in ("sparse", "csr"):
        assert loaded[key].layout == state[f"module.{key}"].layout
        assert torch.equal(loaded[key].to_dense(), torch.eye(2))
    assert loaded["meta"].is_meta
    plain = ("w", "complex", "steps", "_extra_state", "b")
    before = {key: state[f"module.{key}"] for key in plain}
    assert unlike({key: loaded[key] for key in plain}, before) is None


@pytest.mark.filterwarnings("ignore:torch.quantize_per", "ignore:TypedStorage is deprecated")
def test_16_a_quantized_tensor_comes_through():
    quantized = torch.quantize_per_tensor(torch.rand(4), 0.1, 2, torch.quint8)
    torch.save({"module.q": quantized, "module.w": torch.ones(1)}, "in.pt")
    done("strip-prefix", "in.pt", "out.pt")
    loaded = torch.load("out.pt")["q"]
    assert torch.equal(loaded.int_repr(), quantized.int_repr())
    assert (loaded.q_scale(), loaded.q_zero_point()) == (0.1, 2)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("module.complex", "a complex128 tensor, which"),
        ("module.sparse", "a sparse tensor, which"),
        ("module.csr", "a sparse tensor, which"),
        ("module.meta", "a meta tensor, without data, which"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_16_what_safetensors_cannot_hold_is_named_and_nothing_written(key: str, said: str):
    torch.save({key: special()[key], "module.w": torch.ones(1)}, "in.pt")
    refused(2, said, "convert", "in.pt", "out.safetensors")


def test_16_numbers_among_tensors_are_named_and_left_out_of_safetensors():
    state = {key: special()[key] for key in ("module.w", "module.steps", "module.b")}
    torch.save(state, "in.pt")
    ran = ckptfix_command("convert", "in.pt", "out.safetensors")
    assert ran.stderr == "note: 1 thing left out of it: module.steps (int)\n"
    del state["module.steps"]
    assert (
        unlike(safetensors.torch.load_file("out.safetensors"), dict(sorted(state.items()))) is None
    )


@pytest.mark.parametrize("verb", ["strip-prefix", "add-prefix", "to-cpu", "convert"])
@pytest.mark.parametrize("target", ["in.pt", "./in.pt", "link.pt", "hard.pt"])
def test_19_the_input_is_never_the_output(verb: str, target: str, tmp_path: Path):
    shutil.copy(FIXTURES / "dataparallel_cuda.pt", "in.pt")
    (tmp_path / "link.pt").symlink_to("in.pt")
    (tmp_path / "hard.pt").hardlink_to("in.pt")
    for options in ([], ["--force"]):
        refused(2, "is the input itself", verb, *options, "in.pt", target)
    assert (tmp_path / "in.pt").read_bytes() == (FIXTURES / "dataparallel_cuda.pt").read_bytes()


def test_19_saving_over_the_file_that_was_opened_needs_force_and_is_whole(tmp_path: Path):
    shutil.copy(FIXTURES / "dataparallel_cuda.pt", "in.pt")
    opened = ckptfix.open("in.pt").strip_prefix().to_cpu()
    with pytest.raises(ckptfix.CkptfixError, match="already"):
        opened.save("in.pt")
    opened.save("in.pt", force=True)
    FooNet(4, 3).load_state_dict(torch.load("in.pt"))


def test_ambiguity_between_prefixes_is_refused_by_the_command_too(tmp_path: Path):
    saved("student.weight", "student.bias", "teacher.weight", "teacher.bias")
    model = nn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises(RenameError, match="2 ways"):
        ckptfix.load_state_dict("in.pt", model=model)
    assert isinstance(ckptfix.load_state_dict("in.pt"), OrderedDict)
