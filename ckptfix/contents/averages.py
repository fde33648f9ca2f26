"""Averages of weights (EMA, SWA) beside the weights in one state dict: which key is whose average.

Four ways of naming are known. `ema_model.a.weight` beside `model.a.weight`, also inside a wrapper's
`ema_model.module.`; `model_ema.aweight` beside `model.a.weight`, its dots removed (`LitEma` of
latent diffusion); `ema_a_weight` beside `a.weight` (`EMAHook` of mmcv); `a.weight_ema` beside it.
Where each average has weights of its own shape, it can be put in their place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.state_dicts import StateDict, is_average
from ckptfix.contents.tensors import as_tensor
from ckptfix.tree.document import OrderedMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.tree.document import Node


class Averages(NamedTuple):
    """Averages in a state dict, in the place of the weights."""

    keys: str
    """Their keys, as a pattern: `model_ema.*`, `ema_*`, `*_ema`."""
    mapping: OrderedMap
    """The state dict with them instead of the weights, and without their own keys."""


def within(state: StateDict) -> list[Averages]:
    """The averages that lie in a state dict beside the weights."""
    starts = dict.fromkeys(start for key in state.mapping if (start := _start(key)) is not None)
    found = [_averages(state, start) for start in starts]
    return [one for one in (*found, _behind(state)) if one is not None]


def _start(key: str) -> str | None:
    """What a key of averages begins with; None for other keys."""
    if "." not in key:
        return "ema_" if key.startswith("ema_") else None
    return _start_of_module(key.rpartition(".")[0])


@lru_cache(1024)  # the keys of a module follow one another
def _start_of_module(path: str) -> str | None:
    components = path.split(".")
    for count, component in enumerate(components, 1):
        if is_average(component):
            return ".".join((*components[:count], ""))
    return None


def _averages(state: StateDict, start: str) -> Averages | None:
    mapping = state.mapping
    plain = [key for key in mapping if not key.startswith(start)]
    own = {key: node for key, node in mapping.items() if key.startswith(start)}
    wanted = [key for key, node in own.items() if _has_shape(node)]
    for name in _namings(plain, start) if wanted else ():
        names = {key: new for key in plain if (new := name(key)) in own}
        weights = {key: own[new] for key, new in names.items()}
        if {*names.values()}.issuperset(wanted) and all(
            _shape(node) == _shape(mapping[key]) for key, node in weights.items()
        ):
            items = {key: weights.get(key, mapping[key]) for key in plain}
            return Averages(f"{start}*", OrderedMap(items, _attributes(mapping)))
    if wanted and start.endswith(".") and not any(_has_shape(mapping[key]) for key in plain):
        return Averages(f"{start}*", OrderedMap((key[len(start) :], own[key]) for key in own))
    return None


def _behind(state: StateDict) -> Averages | None:
    """Averages that have the names of the weights, with `_ema` behind."""
    mapping = state.mapping
    own = {key.removesuffix(_END): node for key, node in mapping.items() if key.endswith(_END)}
    if not own or any(_shape(mapping.get(key)) != _shape(node) for key, node in own.items()):
        return None
    plain = [key for key in mapping if not key.endswith(_END)]
    items = {key: own.get(key, mapping[key]) for key in plain}
    return Averages(f"*{_END}", OrderedMap(items, _attributes(mapping)))


_END = "_ema"


def _namings(plain: list[str], start: str) -> Iterator[_Naming]:
    """How the averages of plain keys may be called, the plainest way first."""
    if start == "ema_":
        yield _Naming("", start, "_")
        return
    parent = ".".join(start.split(".")[:-2])
    parent = f"{parent}." if parent else ""
    below = [key[len(parent) :] for key in plain if key.startswith(parent)]
    children = dict.fromkeys(key.partition(".")[0] + "." for key in below if "." in key)
    for child in ("", *children):
        for wrapper in ("", "module."):
            yield _Naming(parent + child, start + wrapper, ".")
            yield _Naming(parent + child, start + wrapper, "")


class _Naming(NamedTuple):
    """The average of `{begin}a.weight` is called `{start}a{dot}weight`."""

    begin: str
    start: str
    dot: str

    def __call__(self, key: str) -> str | None:
        if not key.startswith(self.begin):
            return None
        return self.start + key[len(self.begin) :].replace(".", self.dot)


def _has_shape(node: Node) -> bool:
    """Whether a value has an average for sure: a count of steps may have none."""
    return bool(_shape(node))


def _shape(node: Node | None) -> tuple[int, ...] | None:
    tensor = as_tensor(node)
    return None if tensor is None else tensor.shape


def _attributes(mapping: dict[str, Node]) -> Node:
    return mapping.attributes if isinstance(mapping, OrderedMap) else None
