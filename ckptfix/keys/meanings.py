r"""Keys that change what a weight means: an update that is not merged, a mask, a norm, a scale.

To drop such a key as merely unexpected makes another model of the rest. The table says what each
is; `role_of` tells it of one key, by its name alone, and which weights it speaks of.

Sources: PEFT, loralib, diffusers and kohya's scripts (LoRA and its kin); `torch.nn.utils.prune`,
`spectral_norm`, `weight_norm` and `parametrize`; bitsandbytes, GPTQ, AWQ, compressed-tensors,
Quanto, HQQ and `torch.ao.quantization` (scales and packed weights).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfix.keys import globs
from ckptfix.keys.renaming import joined, prefix_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a kind of keys is for."""

    name: str
    what: str
    """What it does to the weights, as the end of a sentence."""
    instead: str
    """What to do, where it cannot be computed here."""


LORA = Meaning(
    "LoRA",
    "an update that is not merged into the weights",
    "merge it where it was trained (merge_and_unload of PEFT), and save that",
)
PRUNING = Meaning(
    "pruning",
    "a mask that the weights are multiplied by",
    "call torch.nn.utils.prune.remove where it was trained, and save that",
)
SPECTRAL = Meaning(
    "spectral norm",
    "vectors by which the weights are divided",
    "take it off where it was trained (remove_spectral_norm or parametrize.remove_parametrizations "
    "of torch.nn.utils), and save that",
)
WEIGHT_NORM = Meaning(
    "weight norm",
    "a length and a direction that the weights are made of",
    "take it off where it was trained (remove_weight_norm or parametrize.remove_parametrizations "
    "of torch.nn.utils), and save that",
)
PARAMETRIZED = Meaning(
    "a parametrization",
    "what the weights are computed from",
    "take it off where it was trained (parametrize.remove_parametrizations of torch.nn.utils), "
    "and save that",
)
QUANTIZED = Meaning(
    "quantization",
    "scales, or packed numbers, that the weights are made of",
    "dequantize it where it was quantized, and save that",
)
WRAPPED = Meaning(
    "PEFT",
    "weights of a layer that adapters are wrapped around",
    "merge the adapters where they were trained (merge_and_unload of PEFT), and save that",
)
UNKNOWN = Meaning(
    "something more of their layers",
    "which they may not be the same without",
    "build the model that was trained, or drop these keys",
)


@dataclass(frozen=True, slots=True)
class Role:
    """What one key is for, and of which weights it speaks."""

    meaning: Meaning
    module: str
    """The prefix of the module whose weights they are."""
    param: str | None = None
    """The one of them that is meant; None: all below that prefix."""
    needs_small: bool = False
    """Whether the name alone tells nothing: only beside a weight of one byte or less is it that."""
    stands_in: bool = False
    """Whether it stands in the place of the weight."""

    @property
    def subject(self) -> str:
        """The key that it speaks of, or the prefix of all of those."""
        return self.module + (self.param or "")


_PARAM = r"(?P<param>\w+)"
_ADAPTERS = (
    "lora|hada|lokr|oft|boft|ia3|vera|loha|adalora|dora|glora|road|randlora|bone|miss|hra|fourierft"
)
_SCALES = (
    r"qzeros|g_idx|SCB|weight_format|scale_weight|scale_input|qscale|"
    r"weight_(?:scale|zero_point|shape|global_scale|fake_quant|quantizer)\w*(?:\..+)?|"
    r"(?:input|output)_(?:scale|zero_point)|"
    r"weight\.(?:_scale|_shift|absmax|quant_map|nested_\w+|quant_state\..+)"
)
_ROWS: tuple[tuple[Meaning, str, str], ...] = (
    # LoRA and its kin
    (LORA, r"processor\.(?P<layer>\w+)_lora\.(?:down|up)\..+", ""),
    (LORA, r"(?P<layer>\w+)_lora\.(?:down|up)\..+", ""),
    (LORA, r"lora\.(?:down|up|A|B)\..+", ""),
    (LORA, rf"(?:{_ADAPTERS})_\w+(?:\..+)?", ""),
    (LORA, r"loras\..+", ""),
    (WRAPPED, r"(?:base_layer|original_module)\.(?P<param>.+)", "in"),
    (WRAPPED, r"modules_to_save\.\w+\.(?P<param>.+)", "in"),
    # what weights are computed from
    (PARAMETRIZED, r"parametrizations\.(?P<param>\w+)\..+", "in"),
    (PRUNING, rf"{_PARAM}_mask", "like"),
    (PRUNING, r"mask", "weight"),
    (SPECTRAL, rf"{_PARAM}_(?:orig|bar)", "in like"),
    (SPECTRAL, rf"{_PARAM}_u", "like"),
    (SPECTRAL, r"(?:u|sv)\d+", "weight"),
    (WEIGHT_NORM, rf"{_PARAM}_v", "in like"),
    (WEIGHT_NORM, rf"{_PARAM}_g", "like"),
    # quantization
    (QUANTIZED, r"(?:qweight|weight_packed|W_q|weight\._data)", "in weight"),
    (QUANTIZED, r"_packed_params\..+", "in weight"),
    (QUANTIZED, rf"{_PARAM}_(?:blocks|packed|quantized)", "in"),
    (QUANTIZED, _SCALES, "weight"),
    (QUANTIZED, r"(?:scalers?|scales?|w_scale|zeros|zero_points?|biases)", "small weight"),
    (QUANTIZED, rf"{_PARAM}_(?:scales?|scaler|scale_inv)", "small"),
)  # fmt: skip
"""Meaning, the keys, and: the parameter that is meant where the key does not say it, `in` where the
key stands in its place, `small` where it is only that beside a weight of one byte, `like` where the
parameter has to be called as weights are."""
_FRONTS = (
    (PRUNING, re.compile(r"(?:\w+_)?masks?(?:_\w+)?|mask_scores|scores"), False),
    (QUANTIZED, re.compile(r"(?:\w+_)?scal(?:es?|ers?)|zero(?:s|_points?)|absmax"), True),
    (LORA, re.compile(r"loras?(?:_\w+)?|adapters?|delta|deltas|diff"), False),
)
"""Meaning, what stands before the key of a weight, and whether only one of few bits has it."""
_TABLE = [(meaning, re.compile(pattern), rest.split()) for meaning, pattern, rest in _ROWS]


def role_of(key: str) -> Role | None:
    """What a key is for, if it changes what weights mean; by its name alone."""
    if len(key) > _LONGEST:
        return None
    parts = key.split(".")
    ends = [(joined(parts[:at]), ".".join(parts[at:])) for at in _starts(parts)]
    for meaning, pattern, rest in _TABLE:
        for module, end in ends:
            found = pattern.fullmatch(end)
            if found is not None:
                role = _role(meaning, module, found.groupdict(), rest)
                if role is not None:
                    return role
    return None


def role_beside(name: str, key: str, within: str = "") -> Role | None:
    """What a value is for that stands under the key of a weight, but in something with a name.

    Such as `masks.conv.weight`, or `conv.weight` in a dict of its own under `masks`. Both stand
    within the same prefix.
    """
    for meaning, pattern, needs_small in _FRONTS:
        if pattern.fullmatch(name):
            return Role(meaning, within + prefix_of(key), last_of(key), needs_small)
    return None


def beside(unused: Iterable[str], taken: Sequence[str]) -> dict[str, Role]:
    """Keys that are those of weights that are taken, below a component such as `masks`.

    What is taken is sorted.
    """
    found = {}
    for key in unused:
        parts = key.split(".")
        for at, name in enumerate(parts[:-1]):
            role = role_beside(name, ".".join(parts[at + 1 :]), joined(parts[:at]))
            if role is not None and is_there(role, taken):
                found[key] = role
    return found


def in_layers(unused: Iterable[str], taken: Iterable[str]) -> dict[str, Role]:
    """Keys in the layers of weights that are taken, which nobody has: they may depend on these.

    A layer has no parts of its own among what is taken. What a module computes or counts by itself
    is nothing that weights depend on.
    """
    direct = {prefix_of(key) for key in taken}
    layers = direct - {prefix for each in direct for prefix in _outer(each)} - {""}
    found = {}
    for key in unused:
        layer = next((prefix for prefix in _outer(key) if prefix in layers), None)
        if layer is not None and not _COMPUTED.search(key):
            found[key] = Role(UNKNOWN, layer)
    return found


def _outer(key: str) -> Iterator[str]:
    """The prefixes of a key, or of a prefix, that are shorter than it."""
    end = key.rfind(".", 0, len(key) - 1)
    while end >= 0:
        yield key[: end + 1]
        end = key.rfind(".", 0, end)


_COMPUTED = re.compile(
    r"(?:^|\.)(?:total_ops|total_params|num_batches_tracked|running_(?:mean|var)|position_ids|"
    r"relative_(?:position_index|coords_table)|attn_mask|masked_bias|inv_freq|_extra_state|"
    r"_float_tensor|version|\w+_ema)$"
)


_LONGEST = 500
"""Characters of a key at most that is looked at: no model has longer ones."""

_DEEPEST = 5
"""Components at most that the end of a key has which says what it is for."""


def _starts(parts: list[str]) -> Iterable[int]:
    """Where the end of a key may begin; LoRA says it anywhere, even at the beginning."""
    first = next((at for at, part in enumerate(parts) if part.startswith("lora_")), len(parts))
    last = range(max(len(parts) - _DEEPEST, 0), len(parts))
    return last if first >= last.start else [first, *last]


def _role(
    meaning: Meaning, module: str, groups: Mapping[str, str], rest: Collection[str]
) -> Role | None:
    param = groups.get("param", "weight" if "weight" in rest else None)
    if "like" in rest and not ("weight" in (param or "") or param in _PARAMETERS):
        return None
    layer = f"{groups['layer']}." if "layer" in groups else ""
    return Role(meaning, module + layer, param, "small" in rest, "in" in rest)


_PARAMETERS = frozenset({"bias", "kernel", "in_proj_bias"})


def is_there(role: Role, keys: Sequence[str]) -> bool:
    """Whether sorted keys have one that a role speaks of."""
    at = bisect_left(keys, role.subject)
    if at == len(keys):
        return False
    return keys[at] == role.subject if role.param else keys[at].startswith(role.subject)


def roles(keys: Iterable[str]) -> dict[str, Role]:
    """The role of each key that has one, all of them taken together.

    `weight_orig` beside `weight_mask` is pruned, beside `weight_u` it has a spectral norm; so is
    `weight_v` told from that of weight norm.
    """
    keys = list(keys)
    found = {key: role for key in keys if (role := role_of(key)) is not None}
    there = set(keys)
    return {key: _told_apart(role, there) for key, role in found.items()}


def _told_apart(role: Role, there: Collection[str]) -> Role:
    start = f"{role.module}{role.param}"
    inner = f"{role.module}parametrizations.{role.param}."
    kind = role.meaning
    if kind in (SPECTRAL, WEIGHT_NORM) and f"{start}_mask" in there:
        kind = PRUNING
    elif kind is WEIGHT_NORM and f"{start}_g" not in there:
        kind = SPECTRAL
    elif kind is PARAMETRIZED and f"{inner}original0" in there:
        kind = WEIGHT_NORM
    elif kind is PARAMETRIZED and f"{inner}0._u" in there:
        kind = SPECTRAL
    return role if kind is role.meaning else _of(role, kind)


def _of(role: Role, meaning: Meaning) -> Role:
    return Role(meaning, role.module, role.param, role.needs_small, role.stands_in)


def patterns(keys: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match keys, and none of the others: by what the keys end with."""
    found: dict[str, None] = {}
    others = list(others)
    for key in keys:
        role = role_of(key)
        end = key[len(role.module) :] if role is not None else key
        known = f"*{globs.escaped(end)}" in found
        if not known and (role is None or any(other.endswith(end) for other in others)):
            found[globs.escaped(key)] = None
        elif not known:
            found[f"*{globs.escaped(end)}"] = None
    return tuple(found)


def last_of(key: str) -> str:
    """The last component of a key."""
    return key[len(prefix_of(key)) :]
