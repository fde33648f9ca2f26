"""Names of keys: situations people are in, torch's own rename as the oracle, properties."""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.swa_utils import AveragedModel

from ckptfix.errors import KeyCollisionError, PartialPrefixError, RenameError
from ckptfix.keys import prefixes, wrappers
from ckptfix.keys.renaming import prefix_of, rename

if TYPE_CHECKING:
    from ckptfix.keys.renaming import Renaming


def new_keys(renaming: Renaming) -> list[str]:
    return list(renaming.keys.values())


def only(renamings: list[Renaming]) -> Renaming:
    assert len(renamings) == 1, [renaming.label for renaming in renamings]
    return renamings[0]


def state_dict_of(module: nn.Module) -> Any:
    """A real state dict, with the `_metadata` that torch's annotations leave out."""
    return module.state_dict()


class Net(nn.Module):
    """Holds a BatchNorm, whose version lives in `_metadata`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())


# Section 11 of the design, by number


def test_1_ddp_keys_and_metadata_are_renamed_as_torch_does() -> None:
    state_dict = state_dict_of(nn.DataParallel(Net()))
    metadata: dict[str, object] = dict(state_dict._metadata)
    renaming = wrappers.strip(state_dict)
    ours = {new: metadata[old] for old, new in renaming.of_modules(metadata).items()}
    keys = list(state_dict)
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    assert list(renaming.keys) == keys
    assert new_keys(renaming) == list(state_dict) == list(Net().state_dict())
    assert list(ours.items()) == list(state_dict._metadata.items())
    assert ours["block.0"] == {"version": 2}
    assert (renaming.changed, renaming.removed, renaming.added) == (len(keys), "module.", "")
    assert renaming.label == "removed module."


def test_1_the_entry_of_the_wrapped_module_replaces_that_of_the_wrapper() -> None:
    state_dict: Any = OrderedDict({"module.w": torch.zeros(1)})
    metadata = {"": {"of": "wrapper"}, "module": {"of": "model"}, "module.conv": {}}
    state_dict._metadata = dict(metadata)
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    renamed = wrappers.strip(["module.w"]).of_modules(metadata)
    assert renamed == {"module": "", "module.conv": "conv"}
    ours = {new: metadata[old] for old, new in renamed.items()}
    assert ours == state_dict._metadata


def test_2_a_child_of_the_models_own_called_module_stays() -> None:
    keys = ["module.weight", "head.weight"]
    assert wrappers.strip(keys).changed == 0
    seen = wrappers.detect(keys)
    assert seen.own_child
    assert seen.leading == ()
    assert (seen.carrying, seen.lacking) == (("module.weight",), ("head.weight",))
    assert new_keys(wrappers.strip(keys, partial=True)) == ["weight", "head.weight"]


def test_2_a_child_called_module_stays_under_ddp_too() -> None:
    keys = ["module.module.weight", "module.head.weight"]
    assert new_keys(wrappers.strip(keys)) == ["module.weight", "head.weight"]
    assert new_keys(wrappers.strip(keys, partial=True)) == ["module.weight", "head.weight"]
    assert wrappers.detect(keys).leading == ("module",)
    assert wrappers.detect(keys).own_child


def test_3_a_target_that_owns_module_keeps_it() -> None:
    keys = ["_orig_mod.module.0.weight", "_orig_mod.module.0.bias"]
    renaming = only(prefixes.fits(keys, ["module.0.bias", "module.0.weight"]))
    assert new_keys(renaming) == ["module.0.weight", "module.0.bias"]
    assert renaming.removed == "_orig_mod."
    assert renaming.of_modules(["", "_orig_mod", "_orig_mod.module", "_orig_mod.module.0"]) == {
        "_orig_mod": "",
        "_orig_mod.module": "module",
        "_orig_mod.module.0": "module.0",
    }


@pytest.mark.parametrize(
    "stack", ["module._orig_mod.", "_orig_mod.module.", "module.module.", "_forward_module.module."]
)
def test_4_stacks_of_wrappers_go_whole(stack: str) -> None:
    plain = ["conv.weight", "bn.running_mean"]
    keys = [stack + key for key in plain]
    renaming = wrappers.strip(keys)
    assert new_keys(renaming) == plain
    assert renaming.removed == stack
    assert wrappers.detect(keys).leading == tuple(stack.split(".")[:-1])
    paths = ["", stack.split(".")[0], stack[:-1], f"{stack}conv"]
    assert renaming.of_modules(paths) == {stack[:-1]: "", f"{stack}conv": "conv"}


def test_4_orig_mod_inside_only_some_keys_does_not_hide_that_all_lead_with_module() -> None:
    keys = ["_orig_mod.module.a.weight", "module._orig_mod.b.weight", "module.c.weight"]
    assert new_keys(wrappers.strip(keys)) == ["a.weight", "b.weight", "c.weight"]


def test_5_fsdp_and_activation_checkpointing_go_wherever_they_stand() -> None:
    keys = [
        "layers.0._fsdp_wrapped_module.x",
        "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.attn.w",
        "head.w",
    ]
    renaming = wrappers.strip(keys)
    assert new_keys(renaming) == ["layers.0.x", "layers.1.attn.w", "head.w"]
    assert renaming.changed == 2
    assert renaming.removed == (
        "_fsdp_wrapped_module., _fsdp_wrapped_module._checkpoint_wrapped_module."
    )
    assert wrappers.detect(keys).inside == {
        "_fsdp_wrapped_module": 2,
        "_checkpoint_wrapped_module": 1,
    }
    assert renaming.of_modules(["", "layers.0", "layers.0._fsdp_wrapped_module"]) == {
        "": "",
        "layers.0._fsdp_wrapped_module": "layers.0",
    }


def test_5_module_inside_stays_unless_the_target_says_otherwise() -> None:
    keys = ["net.norms.0.module.weight", "net.head.weight"]
    assert wrappers.strip(keys).changed == 0
    assert wrappers.detect(keys).inside == {"module": 1}
    renaming = only(prefixes.fits(keys, ["net.norms.0.weight", "net.head.weight"]))
    assert new_keys(renaming) == ["net.norms.0.weight", "net.head.weight"]
    back = only(prefixes.fits(renaming.keys.values(), keys))
    assert new_keys(back) == keys
    assert back.added == "module."
    assert back.of_modules(["net.norms.0"]) == {"net.norms.0": "net.norms.0.module"}


def test_6_only_the_leading_component_goes() -> None:
    keys = ["module.sa1.mlp_module.layer0.w", "module.module_list.0.w", "module.submodule.module"]
    assert new_keys(wrappers.strip(keys)) == [
        "sa1.mlp_module.layer0.w",
        "module_list.0.w",
        "submodule.module",
    ]
    assert wrappers.strip(["module_list.0.w", "submodule.w", "mlp_module.w"]).changed == 0


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_7_two_keys_that_would_become_one_are_refused_by_name(wrapper: str) -> None:
    keys = ["a.bias", "a.weight", f"{wrapper}.a.weight"]
    with pytest.raises(KeyCollisionError) as caught:
        wrappers.strip(keys, partial=True)
    error = caught.value
    assert (error.first, error.second, error.new) == ("a.weight", keys[2], "a.weight")
    assert wrappers.detect(keys).collision == ("a.weight", keys[2])


def test_9_averaged_model_is_a_layout_and_no_partial_prefix() -> None:
    state_dict = AveragedModel(Net()).state_dict()
    seen = wrappers.detect(state_dict)
    assert seen.layout == "swa"
    assert seen.inside == {}
    assert not seen.own_child
    assert seen.collision is None
    assert wrappers.strip(state_dict).changed == 0
    best = prefixes.closest(state_dict, Net().state_dict())
    assert set(new_keys(best)) == {"n_averaged", *Net().state_dict()}


def test_9_averages_of_latent_diffusion_are_a_layout() -> None:
    assert wrappers.detect(["model.conv.w", "model_ema.convw", "model_ema.decay"]).layout == "ema"
    assert wrappers.detect(["model.conv.w", "model_emas.w"]).layout is None
    assert wrappers.detect(["module.n_averaged", "module.w"]).layout is None


# strip and add


@pytest.mark.parametrize(
    "stack", ["_module.", "module._module.", "_module.module.", "_orig_mod._module."]
)
def test_what_opacus_adds_goes_where_every_key_leads_with_it(stack: str) -> None:
    keys = ["conv.weight", "fc.0.bias"]
    renaming = wrappers.strip([stack + key for key in keys])
    assert new_keys(renaming) == keys
    assert renaming.removed == stack
    assert wrappers.detect([stack + key for key in keys]).leading == tuple(stack.split(".")[:-1])


@pytest.mark.parametrize(
    "keys",
    [
        ["_module.weight", "weight"],
        ["_module.0.weight", "_encoder._module.weight", "head.bias"],
        ["embedder._module.weight", "embedder._module.bias"],
        ["_module_list.0.w", "_module_list.1.w"],
    ],
)
@pytest.mark.parametrize("partial", [True, False])
def test_a_child_of_the_models_own_called_underscore_module_stays(
    keys: list[str], partial: bool
) -> None:
    assert not wrappers.strip(keys, partial=partial).changed
    assert wrappers.detect(keys).collision is None


@pytest.mark.parametrize("prefix", ["model.net", "model.net."])
def test_a_named_prefix_goes_from_the_start_once(prefix: str) -> None:
    renaming = wrappers.strip(["model.net.a.w", "model.net.model.net.w"], prefix=prefix)
    assert new_keys(renaming) == ["a.w", "model.net.w"]
    assert renaming.removed == "model.net."


@pytest.mark.parametrize("prefix", ["mod", "odule", "modul", "module.a.w", "absent"])
def test_a_named_prefix_is_matched_by_component(prefix: str) -> None:
    assert wrappers.strip(["module.a.w"], prefix=prefix).changed == 0


def test_a_prefix_that_only_some_keys_carry_is_refused_unless_partial() -> None:
    keys = ["model.a.w", "models.w", "loss.w"]
    with pytest.raises(PartialPrefixError) as caught:
        wrappers.strip(keys, prefix="model")
    error = caught.value
    assert error.prefix == "model."
    assert (error.carrying, error.lacking) == (keys[:1], keys[1:])
    renaming = wrappers.strip(keys, prefix="model", partial=True)
    assert new_keys(renaming) == ["a.w", "models.w", "loss.w"]


def test_a_parameter_called_module_carries_no_prefix() -> None:
    keys = ["module", "module.weight"]
    assert wrappers.strip(keys).changed == 0
    with pytest.raises(PartialPrefixError):
        wrappers.strip(keys, prefix="module")
    assert new_keys(wrappers.strip(keys, partial=True)) == ["module", "weight"]
    assert wrappers.strip(["_orig_mod", "a._orig_mod"]).changed == 0


def test_nothing_to_strip_changes_nothing() -> None:
    keys = ["conv.weight", "fc.bias"]
    renaming = wrappers.strip(keys)
    assert renaming.changed == 0
    assert renaming.label == "unchanged"
    assert renaming.keys == {key: key for key in keys}
    assert renaming.of_modules(["", "conv", "fc"]) == {"": "", "conv": "conv", "fc": "fc"}
    assert wrappers.strip([]).changed == 0
    assert wrappers.detect([]).leading == ()


@pytest.mark.parametrize("prefix", ["module", "module."])
def test_add_moves_the_root_below_the_wrapper(prefix: str) -> None:
    renaming = wrappers.add(Net().state_dict(), prefix)
    assert new_keys(renaming) == list(nn.DataParallel(Net()).state_dict())
    assert renaming.of_modules(["", "conv"]) == {"": "module", "conv": "module.conv"}
    assert (renaming.removed, renaming.added, renaming.label) == ("", "module.", "added module.")


def test_metadata_goes_under_the_wrapper_and_back_as_torch_writes_it() -> None:
    plain, wrapped = state_dict_of(Net()), state_dict_of(nn.DataParallel(Net()))
    under = wrappers.add(plain).metadata(plain._metadata)
    assert list(under.items()) == list(wrapped._metadata.items())
    back = wrappers.strip(wrapped).metadata(wrapped._metadata)
    assert list(back.items()) == list(plain._metadata.items())


# rename --sub


def test_substitute_renames_keys_and_their_modules() -> None:
    renaming = wrappers.substitute(["module.conv.w", "module.fc.w"], r"^module\.(\w+)", r"net.\1_x")
    assert new_keys(renaming) == ["net.conv_x.w", "net.fc_x.w"]
    assert renaming.of_modules(["module.conv"]) == {"module.conv": "net.conv_x"}


def test_substitute_that_strips_renames_metadata_as_strip_does() -> None:
    paths = ["", "module", "module.conv"]
    renaming = wrappers.substitute(["module.conv.w"], r"^module\.", "")
    assert renaming.of_modules(paths) == wrappers.strip(["module.conv.w"]).of_modules(paths)


def test_substitute_of_a_parameters_name_leaves_modules() -> None:
    renaming = wrappers.substitute(["gamma.gamma"], r"gamma$", "weight")
    assert new_keys(renaming) == ["gamma.weight"]
    assert renaming.of_modules(["gamma"]) == {"gamma": "gamma"}
    assert renaming.label == "renamed"


def test_substitute_refuses_collisions_and_invalid_expressions() -> None:
    with pytest.raises(KeyCollisionError):
        wrappers.substitute(["layer1.w", "layer2.w"], r"\d", "")
    for pattern, replacement in (("(", ""), ("a", r"\1"), ("a", r"\g<name>"), ("a", "\\")):
        with pytest.raises(RenameError) as refused:
            wrappers.substitute(["a"], pattern, replacement)
        assert refused.value.code == "bad-pattern"


# With a target

PLAIN = ["conv.weight", "conv.bias", "fc.weight"]


def with_prefix(prefix: str) -> list[str]:
    return [prefix + key for key in PLAIN]


WRAPPED = ["", "module.", "_orig_mod.", "module._orig_mod."]
NAMED = ["model.", "module.model.net.", "net._orig_mod."]
PAIRS = [*product(WRAPPED, WRAPPED + NAMED), *product(NAMED, WRAPPED)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_target_decides_what_goes_and_what_comes(ours: str, theirs: str) -> None:
    renaming = only(prefixes.fits(with_prefix(ours), with_prefix(theirs)))
    assert new_keys(renaming) == with_prefix(theirs)
    assert renaming == prefixes.closest(with_prefix(ours), with_prefix(theirs))
    metadata = renaming.of_modules([ours[:-1], f"{ours}conv"])
    assert metadata == {ours[:-1]: theirs[:-1], f"{ours}conv": f"{theirs}conv"}


def test_one_name_of_the_users_own_is_not_taken_for_another() -> None:
    assert prefixes.fits(["fc.weight", "fc.bias"], ["linear.weight", "linear.bias"]) == []
    assert prefixes.fits(with_prefix("model."), with_prefix("backbone.")) == []
    assert prefixes.fits(with_prefix("model.net."), with_prefix("model.")) == []


def test_an_exact_match_is_the_only_answer() -> None:
    keys = ["module.module.w", "module.w"]
    assert only(prefixes.fits(keys, reversed(keys))).changed == 0


def test_the_target_may_own_a_child_called_module() -> None:
    keys = ["module.module.w", "module.w"]
    assert new_keys(only(prefixes.fits(keys, ["w", "module.w"]))) == ["module.w", "w"]


def test_two_ways_that_fit_are_both_listed() -> None:
    keys = ["_orig_mod.a.module.w", "a.a._orig_mod.w"]
    ways = prefixes.fits(keys, ["a.module.w", "module.module.w"])
    assert sorted(map(new_keys, ways)) == [
        ["a.module.w", "module.module.w"],
        ["module.module.w", "a.module.w"],
    ]


def test_the_target_may_have_its_wrappers_elsewhere() -> None:
    keys = ["module.layers.0._fsdp_wrapped_module.w", "module.n"]
    target = ["_orig_mod.layers.0._checkpoint_wrapped_module.w", "_orig_mod.n"]
    renaming = only(prefixes.fits(keys, target))
    assert new_keys(renaming) == target
    assert renaming.removed == "module., _fsdp_wrapped_module."
    assert renaming.added == "_orig_mod., _checkpoint_wrapped_module."


@pytest.mark.parametrize("pair", [("", ""), ("module.", ""), ("", "_orig_mod.")])
@pytest.mark.parametrize("to_the_old", [False, True])
def test_weight_norm_of_old_is_that_of_today(pair: tuple[str, str], to_the_old: bool) -> None:
    old = ["conv.weight_g", "conv.weight_v", "conv.bias", "n"]
    new = [f"conv.parametrizations.weight.original{i}" for i in (0, 1)] + ["conv.bias", "n"]
    ours, theirs = (new, old) if to_the_old else (old, new)
    ours, theirs = ([p + key for key in keys] for p, keys in zip(pair, (ours, theirs), strict=True))
    assert new_keys(only(prefixes.fits(ours, theirs))) == theirs
    assert prefixes.fits(ours, theirs[1:]) == []


def test_weight_norm_in_both_spellings_is_left_as_it_is() -> None:
    keys = ["a.weight_g", "a.weight_v", "a.parametrizations.weight.original0"]
    assert new_keys(only(prefixes.fits([f"module.{key}" for key in keys], keys))) == keys


def test_nothing_fits_where_a_key_is_missing_or_too_many() -> None:
    assert prefixes.fits(with_prefix("module."), PLAIN[1:]) == []
    assert prefixes.fits(with_prefix("module.")[1:], PLAIN) == []


def test_closest_strips_in_spite_of_missing_and_surplus_keys() -> None:
    keys = [*with_prefix("model."), "model.head.weight", "loss.weight"]
    best = prefixes.closest(keys, [*PLAIN, "extra.weight"])
    assert new_keys(best) == [*PLAIN, "head.weight", "loss.weight"]
    assert best.removed == "model."


def test_closest_adds_in_spite_of_missing_and_surplus_keys() -> None:
    best = prefixes.closest([*PLAIN, "old.w"], [*with_prefix("backbone."), "head.w"])
    assert new_keys(best) == [*with_prefix("backbone."), "backbone.old.w"]


def test_closest_leaves_keys_that_match_nothing_better() -> None:
    assert prefixes.closest(PLAIN, ["a", "b"]).changed == 0
    assert prefixes.closest([], PLAIN).changed == 0
    assert prefixes.closest(PLAIN, []).changed == 0


def test_one_key_that_matches_by_chance_is_no_reason_to_strip() -> None:
    keys = [*PLAIN, "teacher.head.weight"]
    assert prefixes.closest(keys, [*PLAIN, "head.weight"]).changed == 0


def test_nearest_lists_a_student_and_a_teacher_of_one_build() -> None:
    keys = [*with_prefix("encoder_q."), *with_prefix("encoder_k."), "queue"]
    choices = prefixes.nearest(keys, PLAIN)
    assert {choice.removed for choice in choices} == {"encoder_q.", "encoder_k."}
    assert only(prefixes.nearest(with_prefix("module."), PLAIN)).removed == "module."


def test_fifty_thousand_keys_take_no_time_to_speak_of() -> None:
    plain = [f"layers.{i // 100}.experts.{i % 100}.w{j}" for i in range(10_000) for j in range(5)]
    keys = [f"module.{key}" for key in plain]
    start = time.process_time()
    assert only(prefixes.fits(keys, plain)).removed == "module."
    assert prefixes.closest([*keys, "n_averaged"], plain).removed == "module."
    assert wrappers.detect(keys).leading == ("module",)
    assert time.process_time() - start < 60, "generous, for slow machines: quadratic takes hours"


# Properties

COMPONENTS = st.sampled_from(
    [*wrappers.WRAPPERS, "module_list", "mlp_module", "submodule", "modules", "conv", "0", "weight"]
) | st.text(max_size=4)
KEYS = st.lists(
    st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join).filter(bool), unique=True
)
LED = st.lists(
    st.lists(st.sampled_from(["module", "conv", "w", ""]), min_size=1, max_size=5)
    .map(".".join)
    .filter(bool),
    unique=True,
)
NAMES = st.sampled_from(["model", "module", "_orig_mod", "model.net", "a.module.b"])


@given(KEYS, NAMES)
def test_strip_undoes_add_for_any_keys(keys: list[str], prefix: str) -> None:
    added = wrappers.add(keys, prefix)
    stripped = wrappers.strip(added.keys.values(), prefix=prefix)
    assert list(added.keys) == new_keys(stripped) == keys


@given(KEYS)
def test_strip_keeps_every_key_and_their_order_or_refuses(keys: list[str]) -> None:
    if wrappers.detect(keys).collision:
        with pytest.raises(KeyCollisionError):
            wrappers.strip(keys, partial=True)
        return
    renaming = wrappers.strip(keys)
    assert list(renaming.keys) == keys
    assert len(set(new_keys(renaming))) == len(keys)
    assert wrappers.strip(new_keys(renaming)).changed == 0, "once is enough"


@given(LED)
def test_keys_go_the_way_of_their_modules(keys: list[str]) -> None:
    renaming = wrappers.strip(keys)
    for old, new in renaming.keys.items():
        prefix = prefix_of(old)
        assert new == renaming.rule(prefix) + old.removeprefix(prefix)
    assert renaming == rename(keys, wrappers._wrapper_rule(keys, partial=False))


@given(KEYS)
def test_names_that_only_contain_a_wrappers_name_are_left_alone(keys: list[str]) -> None:
    plain = [key for key in keys if not wrappers.WRAPPERS.keys() & set(key.split("."))]
    assert wrappers.strip(plain).changed == 0
    seen = wrappers.detect(plain)
    assert (seen.leading, seen.inside, seen.carrying, seen.collision) == ((), {}, (), None)


@given(KEYS, KEYS)
def test_fits_and_nearest_tell_the_truth_about_any_keys(keys: list[str], target: list[str]) -> None:
    for renaming in prefixes.fits(keys, target):
        assert set(new_keys(renaming)) == set(target)
    for renaming in prefixes.nearest(keys, target):
        assert list(renaming.keys) == keys
        assert len(set(new_keys(renaming))) == len(keys)


@given(KEYS)
def test_what_strip_does_fits_the_target_that_it_leads_to(keys: list[str]) -> None:
    try:
        renaming = wrappers.strip(keys)
    except KeyCollisionError:
        return
    assert new_keys(renaming) in map(new_keys, prefixes.fits(keys, renaming.keys.values()))
