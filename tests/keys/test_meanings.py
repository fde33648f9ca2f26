"""What keys are for, by their names."""

from __future__ import annotations

import pytest

from ckptfix.keys.globs import matching
from ckptfix.keys.meanings import is_there, patterns, role_of, roles

SPOKEN_OF = {
    "a.q.lora_A.weight": ("LoRA", "a.q."),
    "a.q.lora_A.default.weight": ("LoRA", "a.q."),
    "lora_A": ("LoRA", ""),
    "lora_unet_down_0.lora_up.weight": ("LoRA", ""),
    "attn1.processor.to_q_lora.down.weight": ("LoRA", "attn1.to_q."),
    "to_q.lora.up.weight": ("LoRA", "to_q."),
    "fc.ia3_l.default": ("LoRA", "fc."),
    "q.base_layer.weight": ("PEFT", "q.weight"),
    "score.modules_to_save.default.out.bias": ("PEFT", "score.out.bias"),
    "fc.weight_mask": ("pruning", "fc.weight"),
    "rnn.weight_hh_l0_mask": ("pruning", "rnn.weight_hh_l0"),
    "conv.mask": ("pruning", "conv.weight"),
    "fc.bias_orig": ("spectral norm", "fc.bias"),
    "weight_u": ("spectral norm", "weight"),
    "conv.sv0": ("spectral norm", "conv.weight"),
    "fc.weight_g": ("weight norm", "fc.weight"),
    "l.parametrizations.kernel.original": ("a parametrization", "l.kernel"),
    "l.weight.quant_state.bitsandbytes__nf4": ("quantization", "l.weight"),
    "l.weight_scale_inv": ("quantization", "l.weight"),
    "l.qzeros": ("quantization", "l.weight"),
    "e.gate_up_proj_blocks": ("quantization", "e.gate_up_proj"),
    "l._packed_params._packed_params": ("quantization", "l.weight"),
    "l.weight_fake_quant.activation_post_process.min_val": ("quantization", "l.weight"),
}


@pytest.mark.parametrize("key", SPOKEN_OF)
def test_a_key_says_of_which_weights_it_speaks(key: str) -> None:
    role = role_of(key)
    assert role is not None
    assert (role.meaning.name, role.subject) == SPOKEN_OF[key]
    assert is_there(role, sorted(["0", SPOKEN_OF[key][1] + ("" if role.param else "x"), "zz"]))
    assert not is_there(role, [] if not role.subject else ["0", "zz"])


@pytest.mark.parametrize(
    "key",
    [
        "fc.weight", "attn_mask", "token_mask", "position_ids", "rnn.weight_hh_l0", "bn.mean",
        "relative_position_bias_table", "gate_u", "gamma_v", "exploration.lora", "mask_token", "",
        ".", "lora", "a.scaled", "lora_A." + "x" * 600, "." * 500, "num_batches_tracked",
    ],
)  # fmt: skip
def test_most_keys_mean_what_they_say(key: str) -> None:
    assert role_of(key) is None


def test_what_stands_beside_it_tells_a_key() -> None:
    def kinds(*keys: str) -> set[str]:
        return {role.meaning.name for role in roles(keys).values()}

    assert kinds("a.weight_orig", "a.weight_mask") == {"pruning"}
    assert kinds("a.weight_orig", "a.weight_u", "a.weight_v") == {"spectral norm"}
    assert kinds("a.weight_g", "a.weight_v") == {"weight norm"}
    start = "a.parametrizations.weight."
    assert kinds(f"{start}original0", f"{start}original1") == {"weight norm"}
    assert kinds(f"{start}original", f"{start}0._u", f"{start}0._v") == {"spectral norm"}


def test_patterns_match_what_they_are_made_of_and_nothing_else() -> None:
    keys = ["a.lora_A.weight", "lora_A.weight", "b.c.lora_A.weight", "x[0].mask", "mask"]
    others = ["a.weight", "y.mask", "b.lora_A"]
    found = patterns(keys, others)
    assert found == ("*lora_A.weight", "x[[]0].mask", "mask")
    assert matching([*keys, *others], found, "x") == set(keys)
