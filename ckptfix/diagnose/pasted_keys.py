"""The lists of keys in an error text, and the rule under which they fit: which code it is.

Texts name what a model misses and what it does not expect: torch in quotes, transformers in lists
and in a table, mmengine with commas, detectron2 in groups (`fc.{weight, bias}`). Lists are often
cut, by their library or by who pasted them, so a rule holds where all keys that are named agree.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.keys.wrappers import ANYWHERE, WRAPPERS
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEADING = re.compile(
    r"(?P<missing>Missing key\(s\) in state_dict:|missing keys? in state_dict:|missing_keys=|"
    r"missing keys in source state_dict:|newly initialized:|following keys are missing:|"
    r"buffers are not found in the checkpoint:|missing keys in the checkpoint model loaded:)|"
    r"(?P<unexpected>Unexpected key\(s\) in state_dict:|unexpected_keys=|unexpected key in source "
    r"state_dict:|unexpected key(?= \")|when initializing [^\s:]{1,200}:|"
    r"keys that are not used by the model:|unexpected keys in the checkpoint model loaded:)"
)
_QUOTED = re.compile(r"[\s,\[{(]*(?:\"([^\"\s]+)\"|'([^'\s]+)')|[\s,\[{(]*\"\{'([^'\s]+)'")
_BARE = re.compile(r"[\w/-]+(?:\.[\w/-]+)*(?:\.\{[^{}]*\})?")
_ROW = re.compile(r"([\w.{},-]+) \| (UNEXPECTED|MISSING)\b")
_MOST = 100_000


class Keys(NamedTuple):
    """What a text names."""

    missing: list[str]
    unexpected: list[str]


class Fit(NamedTuple):
    """The rule that fits: its code, what its command names, and what was seen."""

    code: str
    words: dict[str, str]
    seen: str


def keys_in(message: str) -> Keys | None:
    """The lists of keys in one message; None where it has none. The message is on one line."""
    keys = Keys([], [])
    headings = list(_HEADING.finditer(message))
    for heading, after in zip(headings, [*headings[1:], None], strict=False):
        end = len(message) if after is None else after.start()
        into = keys.missing if heading.lastgroup == "missing" else keys.unexpected
        into.extend(_listed(message, heading.end(), end))
    if "LOAD REPORT" in message:
        for row in _ROW.finditer(message):
            (keys.missing if row[2] == "MISSING" else keys.unexpected).append(row[1])
    return keys if keys.missing or keys.unexpected else None


def _listed(message: str, position: int, end: int) -> Iterator[str]:
    """The keys that follow a heading, in quotes or without."""
    found = 0
    while found < _MOST and (match := _QUOTED.match(message, position, end)):
        yield match[1] or match[2] or match[3]
        position = match.end()
        found += 1
    if found or message.find("size mismatch", position, end) >= 0:
        return
    for word in _BARE.findall(message[position:end]):
        group, brace, leaves = word.partition(".{")
        for leaf in leaves.rstrip("}").split(",") if brace else ():
            yield f"{group}.{leaf.strip()}"
        if not brace and "." in word:
            yield word


def fit(keys: Keys) -> Fit | None:
    """The first rule under which all the keys fit; None where none does."""
    missing, unexpected = _unique(keys.missing), _unique(keys.unexpected)
    return next((found for rule in _RULES if (found := rule(missing, unexpected))), None)


def _unique(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key for key in keys if key.strip(".…")))


def _nested(missing: list[str], unexpected: list[str]) -> Fit | None:
    """A training checkpoint where its state dict was meant."""
    tops = [key for key in unexpected if "." not in key]
    known = [name for name in _ENTRIES if name in tops]
    if not known or len(tops) < len(unexpected) or set(known) <= set(missing):
        return None
    held = next((name for name in known if name in _STATE_DICTS), "SELECT")
    return Fit("nested-state-dict", {"SELECT": held}, f"It has the entries {_some(unexpected)}.")


_STATE_DICTS = (
    "state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_state", "weights",
    "network", "net_state_dict", "generator", "params", "params_ema", "encoder", "teacher",
    "student", "module", "ema", "g_ema", "model_ema", "netG", "G", "gen", "state",
)  # fmt: skip
_ENTRIES = (
    *_STATE_DICTS, "epoch", "optimizer", "optimizer_state_dict", "best_prec1", "best_acc",
    "best_acc1", "arch", "args", "meta", "iteration", "global_step", "scheduler",
    "lr_schedulers", "optimizer_states", "pytorch-lightning_version", "loss", "step", "cfg",
    "config", "iter", "acc", "opt",
)  # fmt: skip


def _averaged(_: list[str], unexpected: list[str]) -> Fit | None:
    averaged = "n_averaged" in unexpected
    return Fit("averaged-model", {}, "`n_averaged` is among them.") if averaged else None


def _wrapped(missing: list[str], unexpected: list[str]) -> Fit | None:
    """Names that wrappers added to the checkpoint's keys."""
    names = [name for name in WRAPPERS if _everywhere(name, unexpected)]
    inside = [name for name in ANYWHERE if any(f"{name}." in key for key in unexpected)]
    for name in (*inside, *names):
        if not any(_component(name, key) for key in missing):
            code = _WRAPPED.get(name, "prefix-fsdp")
            held = [key for key in unexpected if _component(name, key)]
            return Fit(code, {}, f"{_of(held, unexpected)} {'has' if inside else 'begins with'} "
                       f"`{name}.`, such as {held[0]}.")  # fmt: skip
    return None


_WRAPPED = {"module": "prefix-module", "_orig_mod": "prefix-compile"}


def _everywhere(name: str, keys: list[str]) -> bool:
    return bool(keys) and all(key.startswith(f"{name}.") for key in keys)


def _component(name: str, key: str) -> bool:
    return f".{name}." in f".{key}"


def _unwrapped(missing: list[str], unexpected: list[str]) -> Fit | None:
    """`module.` before every key that the model wants, and before none that it gets."""
    leads = any(key.startswith("module.") for key in unexpected)
    if leads or not unexpected or not _everywhere("module", missing):
        return None
    return Fit("prefix-missing", {}, f"{_of(missing, missing, 'missing')} begins with `module.`.")


def _prefixed(missing: list[str], unexpected: list[str]) -> Fit | None:
    """A prefix that one of the lists has, and without which it is the other one."""
    wanted, given = set(missing), set(unexpected)
    ours, theirs = _leading(missing), _leading(unexpected)
    for there in theirs[1:]:
        if _meet(wanted, {key[len(there) :] for key in given}):
            seen = f"{_of(unexpected, unexpected)} begins with `{there}`."
            return Fit("prefix-surplus", {"PREFIX": there}, seen)
    for here in ours[1:]:
        if _meet(given, {key[len(here) :] for key in wanted}):
            seen = f"{_of(missing, missing, 'missing')} begins with `{here}`."
            return Fit("prefix-lacking", {"PREFIX": here}, seen)
    return None


def _replaced(missing: list[str], unexpected: list[str]) -> Fit | None:
    """A prefix in the place of another one."""
    wanted, given = set(missing), set(unexpected)
    for there in _leading(unexpected)[1:]:
        for here in _leading(missing)[1:]:
            if _meet(wanted, {here + key[len(there) :] for key in given}):
                words = {"^PREFIX": f"^{re.escape(there)}", "REPLACED": here}
                return Fit("prefix-replaced", words, f"`{there}` stands where `{here}` is wanted.")
    return None


def _meet(some: set[str], others: set[str]) -> bool:
    """Whether most keys of two lists are the same, though each may have been cut."""
    return 2 * len(some & others) > max(len(some), len(others))


def _leading(keys: list[str]) -> list[str]:
    """The prefixes that all keys share, from the empty one on, at most five components long."""
    if not keys:
        return [""]
    first, last = min(keys).split(".")[:-1], max(keys).split(".")[:-1]
    found = [""]
    for one, other in zip(first[:5], last[:5], strict=False):
        if one != other:
            break
        found.append(f"{found[-1]}{one}.")
    return found


def _marked(missing: list[str], unexpected: list[str]) -> Fit | None:
    """Keys that say by their last components what they are."""
    for code, pattern in _MARKS:
        for keys, kind in ((unexpected, "unexpected"), (missing, "missing")):
            held = [key for key in keys if pattern.search(key)]
            if held:
                return Fit(code, {}, f"{_of(held, keys, kind)} is of that kind, as {held[0]}.")
    return None


_MARKS = (
    ("lora-keys", re.compile(r"\.lora_(?:[AB]|down|up|embedding_[AB])\b|\.lora_magnitude")),
    (
        "quantized-keys",
        re.compile(
            r"\.(?:qweight|qzeros|g_idx|SCB|weight_format|absmax|quant_map|quant_state\.\S+|"
            r"weight_scale(?:_inv)?|weight_packed|_packed_params\S*|zero_point)$"
        ),
    ),
    (
        "changed-names",
        re.compile(
            r"(?:^|\.)parametrizations\.\w+\.original|(?:^|\.)weight_[gv]$|\.weight_(?:orig|mask)$|"
            r"(?:LayerNorm|layer_norm)\.(?:gamma|beta)$|\.weight_u$"
        ),
    ),
)


def _leftover(missing: list[str], unexpected: list[str]) -> Fit | None:
    """Only keys that no model needs, on one side or on both."""
    if unexpected and not missing and all(_LEFTOVER.search(key) for key in unexpected):
        return Fit("leftover-keys", {}, f"All that is unexpected: {_some(unexpected)}.")
    if missing and not unexpected and all(_MADE.search(key) for key in missing):
        return Fit("missing-counters", {}, f"All that is missing: {_some(missing)}.")
    return None


_LEFTOVER = re.compile(
    r"(?:^|\.)(?:position_ids|inv_freq|num_batches_tracked|total_ops|total_params|masked_bias|"
    r"attn\.bias|relative_position_index|attn_mask|token_type_ids|mask_token_id|_float_tensor)$"
)
_MADE = re.compile(
    r"(?:^|\.)(?:position_ids|inv_freq|num_batches_tracked|relative_position_index)$"
)


def _headed(missing: list[str], unexpected: list[str]) -> Fit | None:
    """Only the last layers differ."""
    if not missing or not unexpected or not all(_HEAD.match(key) for key in missing + unexpected):
        return None
    return Fit("another-head", {}, f"It lacks {_some(missing)}, and has {_some(unexpected)}.")


_HEAD = re.compile(
    r"(?:\w+\.){0,2}(?:fc|head|heads|classifier|last_linear|linear|output|cls|lm_head|score|logits|"
    r"qa_outputs|pooler|pre_classifier|decode_head|cls_head|aux_classifier|AuxLogits)\b"
)


def _of(some: list[str], every: list[str], kind: str = "unexpected") -> str:
    if len(some) < len(every):
        return f"{len(some)} of {plural(len(every), f'{kind} key')}"
    return f"Each of {plural(len(every), f'{kind} key')} that the text names"


def _some(keys: list[str]) -> str:
    named = ", ".join(keys[:3])
    return named if len(keys) <= 3 else f"{named} and {len(keys) - 3} more"


_RULES: tuple[Callable[[list[str], list[str]], Fit | None], ...] = (
    _nested,
    _averaged,
    _wrapped,
    _unwrapped,
    _prefixed,
    _marked,
    _headed,
    _replaced,
    _leftover,
)
