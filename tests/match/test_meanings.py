"""Keys that change what a weight means are refused, by what they are, unless somebody says so."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import ckptfix
from ckptfix import door
from ckptfix.errors import ChangedMeaningError, CkptfixError, KeyMismatchError, SelectionError
from ckptfix.match import target as targets
from ckptfix.repair.plan import plan
from tests.oracles import ckptfix_command, unlike

State = dict[str, Any]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.ModuleDict({'q': nn.Linear(4, 4), 'v': nn.Linear(4, 4)})\n"
    )


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})


BESIDE: dict[str, tuple[str, State]] = {
    "LoRA": ("LoRA", {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2)}),
    "LoRA of PEFT": (
        "LoRA",
        {"v.lora_A.default.weight": torch.ones(2, 4), "v.lora_B.default.weight": torch.ones(4, 2)},
    ),
    "loralib": ("LoRA", {"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.ones(4, 2)}),
    "diffusers": ("LoRA", {"processor.q_lora.down.weight": torch.ones(2, 4)}),
    "kohya": (
        "LoRA",
        {"lora_unet_q.lora_up.weight": torch.ones(4, 2), "lora_unet_q.alpha": torch.tensor(1.0)},
    ),
    "LoRA under names of its own": ("LoRA", {"adapter.layers.0.lora_A.weight": torch.ones(2, 4)}),
    "LoRA under a weight's name": ("LoRA", {"q.weight.lora_A.weight": torch.ones(2, 4)}),
    "DoRA": ("LoRA", {"q.lora_magnitude_vector": torch.ones(4)}),
    "IA3": ("LoRA", {"q.ia3_l.default": torch.ones(4, 1)}),
    "a mask": ("pruning", {"q.weight_mask": torch.ones(4, 4)}),
    "a mask of its own": ("pruning", {"v.mask": torch.ones(4, 4)}),
    "spectral norm": ("spectral norm", {"q.weight_u": torch.ones(4), "q.weight_v": torch.ones(4)}),
    "spectral norm of old": ("spectral norm", {"q.u0": torch.ones(1, 4), "q.sv0": torch.ones(1)}),
    "fp8": ("quantization", {"q.weight_scale_inv": torch.ones(1, 1)}),
    "int8": ("quantization", {"v.SCB": torch.ones(4), "v.weight_format": torch.tensor(0)}),
    "compressed": (
        "quantization",
        {"q.weight_scale": torch.ones(1), "q.input_scale": torch.ones(1)},
    ),
    "bitsandbytes": ("quantization", {"q.weight.absmax": torch.ones(1)}),
    "masks of their own": ("pruning", {"masks.q.weight": torch.ones(4, 4)}),
    "DoRA of kohya": ("LoRA", {"q.dora_scale": torch.ones(4, 1)}),
    "RoAd": ("LoRA", {"q.road_theta.default": torch.ones(4)}),
    "AdapterHub": ("LoRA", {"q.loras.x.lora_B": torch.ones(4, 1)}),
    "an adapter": ("something more of their layers", {"q.adapter.down.weight": torch.ones(1, 4)}),
    "scores": ("something more of their layers", {"q.popup_scores": torch.ones(4, 4)}),
    "a gate of L0": ("something more of their layers", {"v.log_alpha": torch.ones(4)}),
    "trained for it": ("quantization", {"q.weight_fake_quant.scale": torch.ones(1)}),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_the_base_alone_is_taken_only_where_that_is_said(kind: str) -> None:
    name, more = BESIDE[kind]
    state = net().state_dict()
    torch.save({f"module.{key}": value for key, value in {**state, **more}.items()}, "in.pt")
    said = rf"\({name}, .*; the base alone is another model"
    with pytest.raises(ChangedMeaningError, match=said) as told:
        plan(door.read("in.pt"), targets.of_module(net()))
    for strict in (True, False):
        with pytest.raises(KeyMismatchError, match="another model"):
            ckptfix.load_into(net(), "in.pt", strict=strict)
    model = net()
    globs: Any = told.value.options["drop"]
    assert ckptfix.load_into(model, "in.pt", drop=globs).loads
    assert unlike(dict(model.state_dict()), dict(state)) is None


DICTS: dict[str, tuple[str, State]] = {
    "lora": ("LoRA", {"q.lora_A": torch.ones(1, 4), "q.lora_B": torch.ones(4, 1)}),
    "masks": ("pruning", {"q.weight": torch.ones(4, 4), "v.weight": torch.ones(4, 4)}),
    "adapter": ("LoRA", {"q.weight": torch.ones(4, 4)}),
}


@pytest.mark.parametrize("name", DICTS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_dict_beside_that_changes_the_weights_is_told(name: str, prefix: str) -> None:
    meaning, more = DICTS[name]
    state = net().state_dict()
    model = {prefix + key: value for key, value in state.items()}
    torch.save({"model": model, name: {prefix + k: v for k, v in more.items()}}, "in.pt")
    with pytest.raises(ChangedMeaningError, match=rf"{name} beside it .*\({meaning}, ") as told:
        plan(door.read("in.pt"), targets.of_module(net()))
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--model", "net.py:net")
    assert ran.returncode == 2
    assert "hint: to take the base alone: add --select model" in ran.stderr
    assert told.value.options["select"] == "model"
    assert not ckptfix.check(net(), "in.pt").loads
    checked = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    assert checked.returncode == 1
    command = shlex.split(checked.stdout.splitlines()[-1])
    assert "--select" in command
    assert ckptfix_command(*command[1:]).returncode == 0
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--model", "net.py:net", "--select", "model")
    assert ran.returncode == 0
    assert unlike(dict(torch.load("out.pt")), dict(state)) is None


def test_what_stands_beside_and_speaks_of_other_weights_is_no_matter() -> None:
    state = net().state_dict()
    others = {"lora": {"teacher.lora_A": torch.ones(1, 4)}, "masks": {"other": torch.ones(4)}}
    torch.save({"model": state, **others}, "in.pt")
    assert ckptfix.load_into(net(), "in.pt").loads


@pytest.mark.parametrize("kind", ["LoRA", "a mask", "fp8"])
def test_check_names_the_command_that_takes_the_base_alone(kind: str) -> None:
    state = net().state_dict()
    torch.save({"state_dict": {**state, **BESIDE[kind][1]}}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--model", "net.py:net")
    assert ran.returncode == 2
    assert "hint: to take the base alone: add --drop " in ran.stderr
    assert not Path("out.pt").exists()
    checked = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    assert checked.returncode == 1
    assert "the base alone is another model\nto take the base alone:\n" in checked.stdout
    assert ckptfix_command(*shlex.split(checked.stdout.splitlines()[-1])[1:]).returncode == 0
    assert unlike(dict(torch.load("in.fixed.pt")), dict(state)) is None


@pytest.mark.parametrize(
    "more",
    [
        {"logit_scale": torch.ones(1)},
        {"q.total_ops": torch.ones(1), "q.num_batches_tracked": torch.tensor(1)},
        {"masks.other.weight": torch.ones(4)},
        {"teacher.weight": torch.ones(4, 4), "teacher.lora_A.weight": torch.ones(2, 4)},
        {"attn_mask": torch.ones(4, 4)},
        {"head.weight_g": torch.ones(4, 1), "head.weight_v": torch.ones(4, 4)},
    ],
    ids=str,
)
def test_what_speaks_of_no_weight_that_is_taken_is_dropped_as_ever(more: State) -> None:
    state = net().state_dict()
    torch.save({**state, **more}, "in.pt")
    model = net()
    assert ckptfix.load_into(model, "in.pt").unexpected == list(more)
    assert unlike(dict(model.state_dict()), dict(state)) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "key", ["q.scales", "q.scaler", "q.w_scale", "q.zeros", "q.weight_scaler", "scales.q.weight"]
)
def test_scales_beside_packed_numbers_are_told_by_the_numbers(dtype: torch.dtype, key: str) -> None:
    state = net().state_dict()
    state["q.weight"] = torch.ones(4, 4).to(dtype)
    torch.save({**state, key: torch.ones(4)}, "in.pt")
    said = rf"\(quantization, .*{re.escape(key)}; the base alone"
    with pytest.raises(KeyMismatchError, match=said):
        ckptfix.load_into(net(), "in.pt")


def normed() -> State:
    model = net()
    spectral_norm(model["q"])
    return model.state_dict()


def parametrized() -> State:
    model = net()
    parametrizations.spectral_norm(model["q"])
    return model.state_dict()


def orthogonal() -> State:
    model = net()
    parametrizations.orthogonal(model["v"])
    return model.state_dict()


def weight_normed() -> State:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model["q"])
    return model.state_dict()


def wrapped() -> State:
    state = {key.replace("q.", "q.base_layer."): value for key, value in net().state_dict().items()}
    return state | {"q.lora_A.default.weight": torch.ones(2, 4)}


def adapter() -> State:
    return {
        "base_model.model.q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 2),
    }


def packed() -> State:
    state = net().state_dict()
    del state["q.weight"]
    return {**state, "q.qweight": torch.ones(1, 4, dtype=torch.int32), "q.scales": torch.ones(1, 4)}


def four_bits() -> State:
    state = net().state_dict()
    state["q.weight"] = torch.ones(8, 1, dtype=torch.uint8)
    return {**state, "q.weight.absmax": torch.ones(1), "q.weight.quant_map": torch.ones(16)}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (normed, "spectral norm"), (parametrized, "spectral norm"),
        (orthogonal, "a parametrization"),
        (weight_normed, "weight norm"), (wrapped, "PEFT"), (adapter, "LoRA"),
        (packed, "quantization"), (four_bits, "quantization"),
    ],
)  # fmt: skip
def test_weights_in_another_form_are_called_what_they_are(make: Any, name: str) -> None:
    torch.save(make(), "in.pt")
    with pytest.raises(RuntimeError):
        net().load_state_dict(torch.load("in.pt"))
    with pytest.raises(KeyMismatchError, match=f"(?:another form:|nothing but) {name}, ") as told:
        ckptfix.load_into(net(), "in.pt")
    assert "rename" not in str(told.value.hint)


def test_a_pattern_that_matches_no_key_is_refused() -> None:
    torch.save(net().state_dict() | {"x": torch.ones(1)}, "in.pt")
    for target in ([], ["--model", "net.py:net"]):
        ran = ckptfix_command("fix", "in.pt", "out.pt", "--drop", "x", "--drop", "lora*", *target)
        assert ran.returncode == 2
        assert ran.stderr.startswith("error: in.pt: no key matches 'lora*'\nhint: ")
    with pytest.raises(SelectionError):
        ckptfix.load_state_dict("in.pt", drop="lora*")
    assert "x" not in ckptfix.load_state_dict("in.pt", drop="x")


def test_patterns_match_whole_keys_and_are_dropped_before_anything_is_matched() -> None:
    state, other = net().state_dict(), net().state_dict()
    both = {f"module.{key}": value for key, value in other.items()} | state
    torch.save(both, "in.pt")
    with pytest.raises(CkptfixError):
        ckptfix.load_into(net(), "in.pt")
    ran = ckptfix_command(
        "fix", "in.pt", "out.pt", "--drop", "module.*", "--model", "net.py:net", "--json"
    )
    assert json.loads(ran.stdout)["dropped"] == [f"module.{key}" for key in other]
    assert unlike(dict(torch.load("out.pt")), dict(state)) is None


def test_without_a_model_keys_are_dropped_and_all_else_is_carried_along() -> None:
    torch.save({"model": {"a.w": torch.ones(2), "b.w": torch.ones(3)}, "epoch": 3}, "in.pt")
    assert ckptfix_command("fix", "in.pt", "out.pt", "--drop", "b.*").returncode == 0
    made = torch.load("out.pt")
    assert (list(made["model"]), made["epoch"]) == (["a.w"], 3)


# --- masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pruned_weights_are_multiplied_by_their_masks_as_torch_does(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    for layer in model.values():
        prune.random_unstructured(layer, "weight", 0.5)
        prune.random_unstructured(layer, "bias", 0.5)
    with torch.no_grad():
        weight: Any = model["q"].weight_orig
        weight[0, 0], weight[0, 1] = -0.0, float("nan")
    torch.save({"model": model.state_dict()}, "in.pt")
    with pytest.raises(KeyMismatchError, match="pruning"):
        ckptfix.load_into(net(), "in.pt")
    checked = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    command = shlex.split(checked.stdout.splitlines()[-1])[1:]
    assert "--apply-masks" in command
    assert ckptfix_command(*command).returncode == 0
    for layer in model.values():
        prune.remove(layer, "weight")
        prune.remove(layer, "bias")
    made = torch.load("in.fixed.pt")
    net().load_state_dict(made, strict=True)
    for key, value in model.state_dict().items():
        assert made[key].dtype is dtype
        is_nan = value.isnan()
        assert is_nan.equal(made[key].isnan())
        one, other = (torch.where(is_nan, 0, row) for row in (made[key], value))
        assert one.view(torch.uint8).equal(other.view(torch.uint8))


def test_where_nothing_is_pruned_there_is_no_mask_to_apply() -> None:
    torch.save(net().state_dict(), "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.safetensors", "--apply-masks")
    assert ran.returncode == 2
    assert "has no pruned weights" in ran.stderr


def test_a_pruned_model_takes_its_own_masks() -> None:
    model = net()
    prune.random_unstructured(model["q"], "weight", 0.5)
    torch.save(model.state_dict(), "in.pt")
    assert ckptfix.load_into(model, "in.pt").loads


# --- extra state


class Extra(nn.Linear):
    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("saved", [torch.ones(3), {"a": 1}, b"bytes", torch.ones(0), 5], ids=str)
@pytest.mark.parametrize("wanted", [torch.ones(7, 2), {"b": 2}, torch.ones(())], ids=str)
def test_extra_state_of_any_type_is_no_other_shape(saved: Any, wanted: Any) -> None:
    torch.save(Extra(saved).state_dict(), "in.pt")
    model = Extra(wanted)
    model.load_state_dict(torch.load("in.pt", weights_only=False))
    assert ckptfix.load_into(Extra(wanted), "in.pt").loads
    assert ckptfix.open("in.pt").check(model).loads
