"""The situations people are really in, by their numbers in the design, repaired and loaded.

What `fix` writes is loaded strictly by plain torch, and what the loader gives has the same values;
what must be refused is refused by both, by name, and leaves no file.
"""

from __future__ import annotations

import gzip
import random
import re
import shlex
import warnings
from argparse import Namespace
from collections import OrderedDict, defaultdict
from datetime import datetime
from pathlib import Path, PosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckptfix
from ckptfix import door
from ckptfix.cli import group
from ckptfix.errors import (
    CkptfixError,
    DamagedError,
    KeyCollisionError,
    KeyMismatchError,
    RenameError,
    SelectionError,
)
from ckptfix.match import target as targets
from ckptfix.repair.plan import Plan, plan
from fixtures.foonet import FooNet
from fixtures.make import Schedule, their_project
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done, unlike

State = dict[str, Any]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    """A convolution and a BatchNorm, whose version lives in `_metadata`."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)


def like(*keys: str) -> nn.Module:
    """A model with a parameter of two elements under each key."""
    root = nn.Module()
    for key in keys:
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(torch.rand(2)))
    return root


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def planned(model: nn.Module, path: Path | str = "in.pt", **options: Any) -> Plan:
    return plan(door.read(path), targets.of_module(model), **options)


def repairs(
    value: Any, model: nn.Module, wanted: State, *, dropped: list[str] | None = None
) -> Plan:
    """`value`, once saved, gives `model` the values of `wanted`, through `fix` and the loader."""
    torch.save(value, "in.pt")
    return mends_file("in.pt", model, wanted, dropped=dropped)


def mends_file(
    path: Path | str, model: nn.Module, wanted: State, *, dropped: list[str] | None = None
) -> Plan:
    made = planned(model, path)
    door.write(made.document, "out.pt", force=True)
    found = torch.load("out.pt", weights_only=True)
    model.load_state_dict(found, strict=True)
    assert unlike(dict(found), {key: wanted[key] for key in found}) is None
    assert found.keys() == wanted.keys()
    assert made.dropped == (dropped or [])
    assert unlike(told(path, model, made.dropped), found) is None
    return made


def told(path: Path | str, model: nn.Module, dropped: list[str]) -> State:
    """What the loader gives; a warning has to name what it drops, if it does."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        loaded = ckptfix.load_state_dict(path, model=model)
    assert [key for key in dropped[:5] if key not in str([row.message for row in caught])] == []
    assert len(caught) == bool(dropped)
    assert not caught or caught[0].filename == __file__
    return loaded


def refuses(kind: type[CkptfixError], said: str, model: nn.Module, **options: Any) -> CkptfixError:
    """Both ways refuse `in.pt` alike; the message has `said`, the hint something."""
    with pytest.raises(kind, match=said) as repaired:
        planned(model, **options)
    with pytest.raises(kind) as loaded:
        ckptfix.load_state_dict("in.pt", model=model)
    assert str(loaded.value) == str(repaired.value)
    assert repaired.value.hint
    return repaired.value


def test_1_ddp_keeps_order_and_metadata() -> None:
    net = Net()
    repairs(nn.DataParallel(net).state_dict(), Net(), net.state_dict())
    assert list(torch.load("out.pt")) == list(net.state_dict())
    assert torch.load("out.pt")._metadata == net.state_dict()._metadata  # type: ignore[attr-defined]


def test_2_a_child_of_ones_own_called_module_stays() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    path = FIXTURES / "own_child_module.pt"
    mends_file(path, model, torch.load(path))
    done("fix", path, "other.pt")
    assert unlike(torch.load("other.pt"), torch.load(path)) is None


def test_3_only_orig_mod_goes_where_the_target_owns_module() -> None:
    owner = like("module.0.weight", "module.0.bias")
    repairs(prefixed("_orig_mod.", owner.state_dict()), owner, owner.state_dict())


@pytest.mark.parametrize(
    "stack", ["module._orig_mod.", "_orig_mod.module.", "module.module.", "_forward_module."]
)
def test_4_stacks_of_wrappers_both_ways_round(stack: str) -> None:
    net = Net()
    repairs(prefixed(stack, net.state_dict()), Net(), net.state_dict())
    without = plan(door.read("in.pt"))
    assert list(without.renamed.values()) == list(net.state_dict())


def test_5_wrappers_inside_go_and_an_inner_module_stays_unless_the_target_says_otherwise() -> None:
    state = torch.load(FIXTURES / "fsdp_names.pt")
    names = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.2.weight"]
    for last in ("norms.0.module.weight", "norms.0.weight"):
        model = nn.Module()
        wanted = dict(zip([*names, last], state.values(), strict=True))
        for key, tensor in wanted.items():
            *path, name = key.split(".")
            module = model
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(name, nn.Parameter(torch.rand_like(tensor)))
        Path("out.pt").unlink(missing_ok=True)
        mends_file(FIXTURES / "fsdp_names.pt", model, wanted)


def test_6_only_the_leading_component_goes_and_never_a_part_of_a_name() -> None:
    model = like("sa1.mlp_module.layer0.w", "module_list.0.w", "submodule.w")
    repairs(prefixed("module.", model.state_dict()), model, model.state_dict())


def test_7_keys_that_would_become_one_are_refused() -> None:
    torch.save({"module.a.weight": torch.ones(2), "a.weight": torch.zeros(2)}, "in.pt")
    said = "'module.a.weight' and 'a.weight' would both become 'a.weight'"
    refuses(KeyCollisionError, said, like("a.weight"))
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert (ran.returncode, Path("out.pt").exists()) == (2, False)
    assert ran.stderr.splitlines() == [
        f"error: in.pt: {said}",
        "hint: say which model it is for: ckptfix fix in.pt in.fixed.pt --model FILE.py:NAME",
    ]
    both = like("module.a.weight", "a.weight")
    mends_file("in.pt", both, torch.load("in.pt"))


def test_8_weights_of_a_lightning_checkpoint_without_lightning() -> None:
    net = FooNet(4, 3)
    with their_project():
        callbacks = {"EarlyStopping": Schedule(1, 0.5)}
        value = {"state_dict": prefixed("model.", net.state_dict()), "epoch": 3}
        hparams = {"hyper_parameters": Namespace(lr=0.1), "callbacks": callbacks}
        torch.save(value | hparams, "in.pt")
    made = mends_file("in.pt", FooNet(4, 3), net.state_dict())
    assert {path for path, _ in made.left_out} == {"epoch", "hyper_parameters", "callbacks"}


def test_9_averages_fit_the_averaged_model_and_the_plain_one() -> None:
    net = Net()
    averaged = AveragedModel(net)
    torch.save(averaged.state_dict(), "in.pt")
    assert ckptfix.load_into(AveragedModel(Net()), "in.pt").identical
    wanted = net.state_dict()
    mends_file("in.pt", Net(), wanted, dropped=["n_averaged"])
    assert ckptfix.load_into(Net(), "in.pt").unexpected == ["n_averaged"]
    wrapped = nn.DataParallel(Net())
    assert ckptfix.load_into(wrapped, "in.pt").unexpected == ["n_averaged"]
    assert unlike(dict(wrapped.module.state_dict()), dict(wanted)) is None


def test_9_averaged_copies_stand_back_and_can_be_chosen() -> None:
    net, ema = Net(), Net()
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": ema.state_dict()}, "in.pt")
    made = mends_file("in.pt", Net(), net.state_dict())
    assert "state_dict_ema" in next(row.found for row in made.cures if row.code == "averaged-copy")
    door.write(planned(Net(), select="state_dict_ema").document, "ema.pt")
    assert unlike(torch.load("ema.pt"), ema.state_dict()) is None


def test_9_latent_diffusion_keeps_its_averages_beside() -> None:
    model = like("a.weight", "b.weight")
    ema = {"model_ema.aweight": torch.ones(2), "model_ema.bweight": torch.ones(2)}
    value = prefixed("model.", model.state_dict()) | ema
    repairs(value, model, model.state_dict(), dropped=list(ema))


TAGS = ("cuda:3", "mps", "xla:0", "hpu", "npu:0", "privateuseone:0", "cpu:0")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_10_storages_of_any_device_come_out_on_the_cpu(
    tag: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: tag)
        torch.save(net.state_dict(), "in.pt", _use_new_zipfile_serialization=zipped)
    made = mends_file("in.pt", Net(), net.state_dict())
    assert [row.code for row in made.cures] == ["device-tag"]


def training(net: nn.Module) -> State:
    """What people save, with everything of situations 11 and 12."""
    return {
        "model": nn.DataParallel(net).state_dict(),
        "device": torch.device("cuda:3"),
        "rng_state": torch.get_rng_state(),
        "hparams": Namespace(lr=np.float64(0.1), out=PosixPath("/x"), on=PureWindowsPath("c:/y")),
        "seen": defaultdict(list, a=[1]),
        "when": datetime(2024, 1, 2),
    }


def test_11_12_everything_beside_the_weights_is_carried_or_named() -> None:
    net = Net()
    value = training(net)
    made = repairs(value, Net(), net.state_dict())
    assert {path for path, _ in made.left_out} == set(value) - {"model"}
    for number, wanted in enumerate((None, targets.of_module(Net()))):
        kept = plan(door.read("in.pt"), wanted, keep_training_state=True)
        door.write(kept.document, f"kept{number}.pt")
        found = torch.load(f"kept{number}.pt", weights_only=False)
        assert unlike(found.pop("model"), net.state_dict()) is None
        assert unlike(found, {key: value[key] for key in found}) is None
        assert list(found) == [key for key in value if key != "model"]
        torch.set_rng_state(found["rng_state"])


def test_13_a_whole_model_whose_source_is_gone() -> None:
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
    torch.save(net, "in.pt")
    mends_file("in.pt", Net(), net.state_dict())
    made = planned(Net(), keep_training_state=True)
    door.write(made.document, "kept.pt")
    Net().load_state_dict(torch.load("kept.pt"))


IMPOSTORS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs"),
    "page": (b"\n\n\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "answer": (b'{"error": "Repository not found"}', "JSON"),
    "empty": (b"", "empty"),
    "zeros": (bytes(4096), "zero bytes"),
    "gzip": (gzip.compress(b"hello there\n" * 100), "checkpoint"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_14_impostors_are_named_and_leave_nothing(name: str) -> None:
    content, said = IMPOSTORS[name]
    Path("in.pt").write_bytes(content)
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert (ran.returncode, Path("out.pt").exists()) == (2, False)
    assert said in ran.stderr
    assert "hint: " in ran.stderr
    with pytest.raises(CkptfixError, match=said):
        ckptfix.load_state_dict("in.pt", model=Net())


def test_14_a_wrong_extension_changes_nothing() -> None:
    net = Net()
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    safetensors.torch.save_file(prefixed("module.", state), "in.pt")
    mends_file("in.pt", Net(), state)


CONTAINERS = ("zip", "legacy", "safetensors", "gzip")


def written(container: str, state: State) -> bytes:
    if container == "safetensors":
        return safetensors.torch.save(state)
    torch.save(state, "whole.pt", _use_new_zipfile_serialization=container != "legacy")
    data = Path("whole.pt").read_bytes()
    return gzip.compress(data) if container == "gzip" else data


def fix(data: bytes) -> State | None:
    """What the command makes of a file; None where it refuses, and then it has left nothing."""
    Path("in.pt").write_bytes(data)
    try:
        code = group.main(["fix", "--force", "in.pt", "out.pt"], "ckptfix", standalone_mode=False)
    except CkptfixError:
        code = 2
    left = sorted(path.name for path in Path().iterdir() if path.name not in ("in.pt", "whole.pt"))
    assert left == ([] if code == 2 else ["out.pt"])
    if code == 2:
        return None
    found: State = ckptfix.load("out.pt")
    Path("out.pt").unlink()
    return found


@pytest.mark.parametrize("container", CONTAINERS)
def test_15_flipped_bytes_never_pass_where_there_are_checksums(container: str) -> None:
    state = prefixed("module.", FooNet(4, 3).state_dict())
    data, chance, passed = written(container, state), random.Random(5), 0
    expected = {key.removeprefix("module."): value for key, value in state.items()}
    whole = fix(data)
    assert whole is not None
    assert unlike(dict(whole), expected) is None
    for _ in range(200):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        found = fix(bytes(damaged))
        if found is not None:
            passed += 1
            assert container in ("legacy", "safetensors") or unlike(dict(found), expected) is None
    assert passed < 200


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_15_truncated_files_are_refused(container: str, share: float) -> None:
    data = written(container, prefixed("module.", FooNet(4, 3).state_dict()))
    assert fix(data[: int(len(data) * share)]) is None
    with pytest.raises(CkptfixError):
        ckptfix.load_state_dict("in.pt")


def test_15_a_flipped_byte_of_a_tensor_is_named_even_where_there_is_nothing_to_mend() -> None:
    data = bytearray(written("zip", {"w": torch.arange(100.0)}))
    data[data.find(torch.arange(100.0).numpy().tobytes()) + 7] ^= 1
    Path("in.pt").write_bytes(data)
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert (ran.returncode, Path("out.pt").exists()) == (2, False)
    assert "checksum" in ran.stderr
    assert "save what is whole: ckptfix recover in.pt in.recovered.pt\n" in ran.stderr
    with pytest.raises(CkptfixError, match="checksum"):
        door.write(door.read("in.pt"), "out.pt")


def test_15_a_loader_that_verifies_refuses_a_flipped_byte_and_leaves_the_model_alone() -> None:
    net = FooNet(4, 3)
    trained = prefixed("module.", FooNet(4, 3).state_dict())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    data = bytearray(written("zip", {"model": trained, "other": {"w": torch.arange(100.0)}}))
    data[data.find(torch.arange(100.0).numpy().tobytes()) + 7] ^= 1
    Path("in.pt").write_bytes(data)
    loaded = ckptfix.load_state_dict("in.pt", model=net, select="model", verify=True)
    expected = {key.removeprefix("module."): value for key, value in trained.items()}
    assert unlike(dict(loaded), expected) is None
    weight = next(value for value in trained.values() if value.numel() > 8)
    data[data.find(weight.numpy().tobytes()) + 7] ^= 1
    Path("in.pt").write_bytes(data)
    with pytest.raises(DamagedError, match="checksum"):
        ckptfix.load_state_dict("in.pt", model=net, select="model", verify=True)
    with pytest.raises(DamagedError, match="checksum"):
        ckptfix.load_into(net, "in.pt", select="model", verify=True)
    with pytest.raises(DamagedError, match="checksum"):
        ckptfix.load("in.pt", verify=True)
    assert unlike(dict(net.state_dict()), before) is None


def test_15_a_file_without_checksums_is_mended() -> None:
    net = Net()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(nn.DataParallel(net).state_dict(), "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    mends_file("in.pt", Net(), net.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.lm_head = nn.Linear(2, 5, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("saved", ["embed.weight", "lm_head.weight"])
def test_16_a_tie_that_was_not_saved_is_made(saved: str) -> None:
    weight = torch.rand(5, 2)
    repairs({saved: weight}, Tied(), {"embed.weight": weight, "lm_head.weight": weight})
    for found in (torch.load("out.pt"), ckptfix.load_state_dict("in.pt", model=Tied())):
        assert found["embed.weight"].data_ptr() == found["lm_head.weight"].data_ptr()
    assert ckptfix.load_into(Tied(), "in.pt").identical


@pytest.mark.parametrize("turned", [False, True])
def test_16_tensors_that_are_one_in_the_model_have_to_be_equal_in_the_file(turned: bool) -> None:
    weight = torch.rand(5, 2)
    copy = weight.t().contiguous().t() if turned else weight.clone()
    both = {"embed.weight": weight, "lm_head.weight": copy}
    repairs(prefixed("module.", both), Tied(), both)
    copy[0, 0] += 1
    torch.save(prefixed("module.", both), "in.pt")
    said = "'embed.weight' and 'lm_head.weight' are one tensor of Tied, and two different ones"
    refuses(KeyMismatchError, said, Tied())


def test_16_views_and_turned_tensors_keep_their_values() -> None:
    base = torch.arange(8.0)
    state = {"a": base[:2], "b": base[1:3], "c": torch.rand(2, 2).t()[0]}
    repairs(prefixed("module.", state), like("a", "b", "c"), state)


def test_16_extra_state_and_numbers_are_carried() -> None:
    state = {
        "w": torch.rand(3),
        "steps": 3,
        "b": torch.ones(1),
        "_extra_state": {"scale": torch.ones(1)},
    }
    torch.save(prefixed("module.", state), "in.pt")
    door.write(plan(door.read("in.pt")).document, "out.pt")
    assert unlike(torch.load("out.pt"), state) is None


def classifier(classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, classes))
    )


def embeddings(words: int, places: int) -> nn.Module:
    parts = {"word_embeddings": nn.Embedding(words, 4)}
    parts["position_embeddings"] = nn.Embedding(places, 4)
    return nn.ModuleDict({"embeddings": nn.ModuleDict(parts), "out": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("found", "wanted", "said", "hint"),
    [
        (
            classifier(1000), classifier(10),
            "only the classifier head differs: fc.weight [1000, 4] vs [10, 4]",
            "1000 classes",
        ),
        (
            embeddings(30, 8), embeddings(33, 8),
            "only the vocabulary differs: embeddings.word_embeddings.weight [30, 4] vs [33, 4]",
            "vocabulary of 30",
        ),
        (
            embeddings(30, 8), embeddings(30, 16),
            "only the position embedding differs: embeddings.position_embeddings.weight [8, 4] vs",
            "8 positions",
        ),
        (nn.Linear(3, 2), nn.Linear(4, 2), "a shape differs: weight [2, 3] vs [2, 4]", "inspect"),
        (Net(2), Net(3), "6 shapes differ, the first: conv.weight [2, 1, 3, 3]", "--init"),
        (classifier(10), embeddings(3, 3), "nothing matches: is this the right model?", "inspect"),
        (nn.Linear(4, 4, bias=False), nn.Linear(4, 4), "the file lacks bias", "inspect"),
    ],
    ids=["head", "vocabulary", "positions", "width", "widths", "wrong-model", "missing"],
)  # fmt: skip
def test_17_what_differs_is_told_apart(
    found: nn.Module, wanted: nn.Module, said: str, hint: str
) -> None:
    torch.save(nn.DataParallel(found).state_dict(), "in.pt")
    error = refuses(KeyMismatchError, re.escape(said), wanted)
    assert hint in str(error.hint)


def test_17_a_buffer_too_many_is_dropped_by_name_by_both() -> None:
    net, surplus = Net(), {"embeddings.position_ids": torch.arange(4)}
    repairs({**net.state_dict(), **surplus}, Net(), net.state_dict(), dropped=list(surplus))
    for strict in (True, False):
        report = ckptfix.load_into(Net(), "in.pt", strict=strict)
        assert (report.missing, report.unexpected) == ([], list(surplus))


def test_17_the_refusal_is_the_table_that_check_prints() -> None:
    torch.save(classifier(1000).state_dict(), "in.pt")
    torch.save(classifier(10).state_dict(), "like.pt")
    with pytest.raises(KeyMismatchError) as raised:
        ckptfix.load_into(classifier(10), "in.pt")
    table = str(raised.value).splitlines()[1:]
    checked = ckptfix_command("check", "in.pt", "--like", "like.pt").stdout.splitlines()
    assert table == [line for line in checked if line][1 : len(table) + 1]


def test_18_an_absent_shard_is_named() -> None:
    torch.save(nn.DataParallel(Net()).state_dict(), "in.pt")
    shards = ["convert", "in.pt", "shards/", "--max-shard-size", "100"]
    assert ckptfix_command(*shards).returncode == 0
    gone = sorted(Path("shards").glob("*.safetensors"))[1]
    gone.unlink()
    ran = ckptfix_command("fix", "shards", "out.pt")
    assert (ran.returncode, Path("out.pt").exists()) == (2, False)
    assert gone.name in ran.stderr
    with pytest.raises(CkptfixError, match=gone.name):
        ckptfix.load_state_dict("shards", model=Net())


@pytest.mark.parametrize("name", ["in.pt", "./in.pt", "link.pt"])
def test_19_the_input_is_never_the_output(name: str) -> None:
    torch.save(nn.DataParallel(Net()).state_dict(), "in.pt")
    before = Path("in.pt").read_bytes()
    Path("link.pt").symlink_to("in.pt")
    ran = ckptfix_command("fix", "--force", "in.pt", name)
    assert (ran.returncode, Path("in.pt").read_bytes()) == (2, before)
    assert "is the input itself" in ran.stderr


def test_20_deepspeed_keeps_its_weights_under_module() -> None:
    net = Net()
    value = {"module": prefixed("_forward_module.", net.state_dict()), "ds_version": "0.9"}
    made = repairs(value, Net(), net.state_dict())
    assert {path for path, _ in made.left_out} == {"ds_version"}


# --- parts of larger models, and twins


def contrastive(query: nn.Module, key: nn.Module) -> tuple[State, list[str]]:
    """A checkpoint as MoCo saves it, and what of it is not the query encoder."""
    rest = prefixed("module.encoder_k.", key.state_dict()) | {"module.queue": torch.ones(8)}
    value = prefixed("module.encoder_q.", query.state_dict()) | rest
    return {"state_dict": value, "epoch": 3}, list(rest)


def test_a_part_of_a_larger_model_is_taken_out_and_the_rest_is_not_unexpected() -> None:
    query, key = Net(), Net(5)
    value, rest = contrastive(query, key)
    repairs(value, Net(), query.state_dict(), dropped=rest)
    model = Net()
    report = ckptfix.load_into(model, "in.pt")
    assert unlike(model.state_dict(), query.state_dict()) is None
    assert [key.removeprefix("module.") for key in report.unexpected] == [
        key.removeprefix("module.") for key in rest
    ]


def test_a_surplus_inside_the_part_is_dropped_too() -> None:
    net, rest = Net(), {"encoder_q.fc.weight": torch.ones(2), "queue": torch.ones(8)}
    value = prefixed("encoder_q.", net.state_dict()) | rest
    repairs(value, Net(), net.state_dict(), dropped=list(rest))


def test_a_prefix_that_the_model_has_is_added() -> None:
    net = Net()
    model = nn.ModuleDict({"backbone": net})
    repairs(net.state_dict(), model, model.state_dict())


def test_a_prefix_is_exchanged_for_the_one_that_the_model_has_where_nothing_else_fits() -> None:
    net = Net()
    model = nn.ModuleDict({"backbone": net})
    repairs(nn.ModuleDict({"encoder": net}).state_dict(), model, model.state_dict())
    assert torch.load("out.pt")._metadata["backbone.norm"] == {"version": 2}
    value, rest = contrastive(net, Net())
    made = repairs(value, model, model.state_dict(), dropped=rest)
    assert made.cures[0].cure == "removed module.encoder_q., added backbone."
    nearer = prefixed("module.backbone.", net.state_dict()) | prefixed(
        "module.aux.", Net().state_dict()
    )
    repairs(nearer, model, model.state_dict(), dropped=list(nearer)[len(nearer) // 2 :])
    torch.save(nn.ModuleDict({"fc": nn.Linear(2, 2)}).state_dict(), "in.pt")
    refuses(KeyMismatchError, "nothing matches", nn.ModuleDict({"linear": nn.Linear(2, 2)}))
    torch.save(prefixed("a.", net.state_dict()) | prefixed("b.", Net().state_dict()), "in.pt")
    refuses(RenameError, r"2 ways: removed a\., added backbone\.; removed b\.", model)


AVERAGES = {
    "MoCo": lambda net, copy: contrastive(net, copy)[0],
    "MoCo 3": lambda net, copy: (
        prefixed("base_encoder.", net.state_dict())
        | prefixed("momentum_encoder.", copy.state_dict())
    ),
    "part": lambda net, copy: (
        prefixed("model.", net.state_dict()) | prefixed("ema_model.", copy.state_dict())
    ),
    "in front": lambda net, copy: {"ema": copy.state_dict(), "model": net.state_dict()},
    "below": lambda net, copy: {
        "model": net.state_dict(),
        "ema": {"module": copy.state_dict(), "decay": 0.9},
    },
    "named": lambda net, copy: {"net": net.state_dict(), "ema_net": copy.state_dict()},
    "SWA": lambda net, copy: {
        "model": net.state_dict(),
        "swa_model": AveragedModel(copy).state_dict(),
    },
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_stand_back_wherever_they_are_and_are_said_to(name: str) -> None:
    net, copy = Net(), Net()
    value = AVERAGES[name](net, copy)
    torch.save(value, "in.pt")
    made = planned(Net())
    door.write(made.document, "out.pt")
    assert unlike(dict(torch.load("out.pt")), dict(net.state_dict())) is None
    model = Net()
    report = ckptfix.load_into(model, "in.pt")
    assert unlike(model.state_dict(), net.state_dict()) is None
    (place,) = report.passed_over
    (told,) = (row.found for row in made.cures if row.code == "averaged-copy")
    assert told == f"averages that fit as well: {place}"


@pytest.mark.parametrize("key", ["ema", "state_dict"])
def test_a_state_dict_with_nothing_beside_it_is_taken_out(key: str) -> None:
    net = Net()
    made = repairs({key: net.state_dict()}, Net(), net.state_dict())
    assert [(row.code, row.where, row.cure) for row in made.cures] == [("nested", key, "taken out")]


def test_numpy_arrays_become_the_tensors_that_load_state_dict_takes() -> None:
    net = Net()
    repairs({"model": {k: v.numpy() for k, v in net.state_dict().items()}}, Net(), net.state_dict())


def test_one_key_that_is_there_twice_is_the_cause_that_is_named() -> None:
    net = Net()
    value = prefixed("module.", net.state_dict()) | {"conv.bias": torch.zeros(2)}
    torch.save(value, "in.pt")
    said = "'module.conv.bias' and 'conv.bias' would both become 'conv.bias'"
    refuses(KeyCollisionError, said, Net())


def test_twins_are_refused_and_the_hint_decides_for_one() -> None:
    student, teacher = Net(), Net()
    twins = [prefixed("student.", student.state_dict()), prefixed("teacher.", teacher.state_dict())]
    torch.save(twins[0] | twins[1], "in.pt")
    error = refuses(RenameError, r"2 ways: removed student\.; removed teacher\.", Net())
    command = str(error.hint).removeprefix("choose one: ckptfix ")
    assert ckptfix_command(*shlex.split(command)).returncode == 0
    made = planned(Net(), "in.part.pt")
    door.write(made.document, "out.pt")
    assert unlike(dict(torch.load("out.pt")), dict(student.state_dict())) is None
    assert made.dropped == list(twins[1])


def test_twins_that_come_equally_near_are_refused_without_strict_too() -> None:
    state = Net().state_dict()
    del state["norm.bias"]
    copied = {key: value.clone() for key, value in state.items()}
    torch.save({"a": state, "b": copied}, "in.pt")
    refuses(KeyMismatchError, "lacks norm.bias", Net())
    with pytest.raises(SelectionError, match="2 state dicts come equally near Net: a, b"):
        ckptfix.load_into(Net(), "in.pt", strict=False)
    report = ckptfix.load_into(Net(), "in.pt", select="b", strict=False)
    assert report.missing == ["norm.bias"]


# --- what is said, and the commands that are named


def saved_model(source: str) -> None:
    Path("net.py").write_text(f"from torch import nn\ndef net():\n    return {source}\n")


def test_a_refusal_is_a_list_with_a_line_for_each_key() -> None:
    torch.save(classifier(1000).state_dict(), "in.pt")
    torch.save(classifier(10).state_dict(), "like.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--like", "like.pt")
    lines = ran.stderr.splitlines()
    assert [line.partition(":")[0] for line in (lines[0], lines[-1])] == ["error", "hint"]
    assert "    ! fc.weight: [1000, 4], wanted [10, 4]" in lines
    assert "\\n" not in ran.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [("fc.wieght", "fc.weight"), ("layers.0.attn.q", "layers.0.attention.q"), ("a.b.c", "a.bb.c")],
)
def test_the_nearest_name_comes_with_a_command_that_renames(old: str, new: str) -> None:
    torch.save({"model": {old: torch.ones(2), "last": torch.ones(2)}, "epoch": 3}, "in.pt")
    error = refuses(KeyMismatchError, f"lacks {re.escape(new)}", like(new, "last"))
    said, _, command = str(error.hint).partition(": ckptfix ")
    assert said == f"if {old!r} is meant for {new!r}"
    assert ckptfix_command(*shlex.split(command)).returncode == 0
    assert ckptfix.load_into(like(new, "last"), "in.renamed.pt").loads


def test_of_keys_that_are_there_twice_a_command_takes_one() -> None:
    net = Net()
    torch.save({"net": prefixed("module.", Net().state_dict()) | net.state_dict()}, "in.pt")
    error = refuses(KeyCollisionError, "would both become", Net())
    said, _, command = str(error.hint).partition(": ckptfix ")
    assert said == "to take 'conv.weight'"
    assert ckptfix_command(*shlex.split(command)).returncode == 0
    model = Net()
    assert len(ckptfix.load_into(model, "in.renamed.pt").unexpected) == len(net.state_dict())
    assert unlike(model.state_dict(), net.state_dict()) is None


def test_check_names_the_fix_that_makes_it_load() -> None:
    saved_model("nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))")
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    part = prefixed("encoder.", net.state_dict())
    torch.save({"G": part | {"head": torch.ones(2)}, "D": {"w": torch.ones(2)}}, "in.pt")
    ran = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    assert ran.returncode == 1
    assert ran.stdout.startswith("in.pt (G) does not match")
    assert ckptfix_command(*shlex.split(ran.stdout.splitlines()[-1])[1:]).returncode == 0
    net.load_state_dict(torch.load("in.fixed.pt"), strict=True)


def test_check_says_why_nothing_mends_it() -> None:
    torch.save(classifier(1000).state_dict(), "in.pt")
    torch.save(classifier(10).state_dict(), "like.pt")
    ran = ckptfix_command("check", "in.pt", "--like", "like.pt")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-2:] == [
        "only the classifier head differs: fc.weight [1000, 4] vs [10, 4]",
        "build the model with 1000 classes (--init), load it, then replace 'fc'",
    ]


def test_what_was_done_is_counted_and_what_was_dropped_is_named() -> None:
    net = Net()
    value = {"net": prefixed("module.", net.state_dict()) | {"module.queue": torch.ones(2)}}
    torch.save(value | {"epoch": 3}, "in.pt")
    torch.save({k: v.half() for k, v in net.state_dict().items()}, "like.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--like", "like.pt")
    assert ran.stdout.splitlines()[-1] == (
        "wrote out.pt: 7 tensors copied, 7 keys renamed, none cast, 1 key dropped, "
        "1 thing left behind"
    )
    assert "note: 1 key dropped: module.queue\n" in ran.stderr
    assert "of another dtype; torch casts them as it loads: conv.weight, " in ran.stderr


def test_a_file_that_is_cut_short_is_refused_with_the_command_that_saves_what_is_whole() -> None:
    torch.save({"a": torch.ones(500), "b": torch.ones(500)}, "in.pt")
    Path("in.pt").write_bytes(Path("in.pt").read_bytes()[:4000])
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    command = ran.stderr.rpartition("save what is whole: ckptfix ")[2]
    assert ckptfix_command(*shlex.split(command)).returncode == 1
    assert unlike(torch.load("in.recovered.pt"), {"a": torch.ones(500)}) is None


def test_check_names_every_tensor_that_is_damaged() -> None:
    state = {"a": torch.arange(9.0), "b": torch.arange(9.0, 20.0), "c": torch.ones(3)}
    torch.save(state, "in.pt")
    data = Path("in.pt").read_bytes()
    for key in ("a", "b"):
        found = state[key].numpy().tobytes()
        data = data.replace(found, found[:-1] + b"x")
    Path("in.pt").write_bytes(data)
    ran = ckptfix_command("check", "--read-data", "in.pt")
    assert ran.returncode == 1
    assert [line.split("(")[1][0] for line in ran.stdout.splitlines()] == ["a", "b"]
