"""Find the state dicts in a tree, say what each is for, and pick the one that is meant.

A state dict is a mapping of names to tensors, at least half of whose values are tensors. Where
one lies inside another mapping, the inner one counts (`{"model": {…}, "rng_state": tensor}` is no
state dict), unless most of the outer one's values are tensors themselves. What an optimizer keeps
is found, but it is not a state dict of a model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptfix.contents import foreign
from ckptfix.contents.modules import is_module, state_dict
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import SelectionError
from ckptfix.hints import Hint, adding, command, naming
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, Tensor
from ckptfix.tree.walk import PATH_DEPTH, Path, has_names, walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from ckptfix.tree.document import Document

Role = Literal["model", "ema", "swa", "optimizer", "loose"]
"""`loose`: tensors that stand in no state dict, by their paths, where there is no state dict."""

_AVERAGES = r"(?i)(?:^|_)(?:ema|swa|shadow)(?:_|$)|^encoder_k$|^momentum_encoder|_momentum$"
_SPECIAL_TENSORS = frozenset(
    Global("torch._utils", f"_rebuild_{kind}")
    for kind in (
        "qtensor", "sparse_tensor", "sparse_csr_tensor", "nested_tensor", "meta_tensor_no_storage",
        "wrapper_subclass", "device_tensor_from_cpu_tensor", "device_tensor_from_numpy",
        "xla_tensor",
    )
) | {Global("torch._tensor", "_rebuild_from_type_v2")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StateDict:
    """A state dict where it stands in a tree: `path` is joined by `/`, and `/` is the root."""

    path: str
    mapping: dict[str, Node]
    role: Role = "model"
    origin: Node = None
    """What the mapping was made of, where it is not in the tree itself: a pickled model, a list of
    tensors. Its keys cannot be renamed where they are."""

    @property
    def node(self) -> Node:
        """What stands in the tree: the mapping itself, or what it was made of."""
        return self.mapping if self.origin is None else self.origin

    @property
    def selection(self) -> str | None:
        """What `--select` has to say to mean it; None where it is the whole checkpoint."""
        return None if self.path == "/" else self.path

    @property
    def is_average(self) -> bool:
        """Whether these are averages of the weights, not the weights."""
        return self.role in ("ema", "swa")

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The dense tensors by key, in order."""
        found = ((key, as_tensor(value)) for key, value in self.mapping.items())
        return {key: tensor for key, tensor in found if tensor is not None}

    @cached_property
    def others(self) -> Mapping[str, Node]:
        """What is no dense tensor: integers, extra state, sparse and quantized tensors."""
        return {key: value for key, value in self.mapping.items() if key not in self.tensors}

    @cached_property
    def ties(self) -> list[list[str]]:
        """Keys that name one tensor, for each tensor that has several."""
        groups: dict[Hashable, list[str]] = {}
        for key, tensor in self.tensors.items():
            if tensor.numel:
                groups.setdefault(tensor.view, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]

    @property
    def metadata(self) -> Mapping[str, Node] | None:
        """Its `_metadata`: versions by module path."""
        return self.mapping.metadata if isinstance(self.mapping, OrderedMap) else None


def is_average(name: str) -> bool:
    """Whether a key or a module is called as averages of the weights are.

    Such are `state_dict_ema`, `params_ema`, `swa_model`, `shadow`; and the momentum encoders of
    contrastive learning: MoCo's `encoder_k`, `momentum_encoder` in its third version.
    """
    return re.search(_AVERAGES, name) is not None


def is_special_tensor(node: Node) -> bool:
    """Whether a node is a tensor that is not dense: quantized, sparse, nested, meta, a subclass."""
    return isinstance(node, Inert) and node.function in _SPECIAL_TENSORS


def is_optimizer(node: Node) -> bool:
    """Whether a node is the state dict of a `torch.optim` optimizer."""
    return (
        isinstance(node, dict)
        and isinstance(node.get("state"), dict)
        and isinstance(node.get("param_groups"), list)
    )


def optimizers(root: Node) -> Iterator[dict[str, Node]]:
    """The state dict of every optimizer in a tree, each once."""
    return (node for _, node in _candidates(root) if is_optimizer(node))


def _candidates(root: Node) -> Iterator[tuple[Path, Node]]:
    """Every node that may be a state dict, with the path of its own that it has."""
    for path, node in walk(root, descend=_may_hold_some, tensors=False):
        if len(path) < PATH_DEPTH:  # what lies deeper goes by the path of what holds it
            yield path, node


def find(root: Node) -> list[StateDict]:
    """Every state dict in a tree, in order, each once."""
    found: list[tuple[Path, StateDict]] = []
    whole: set[Path] = set()
    for path, node in _candidates(root):
        if is_optimizer(node):
            found.append((path, StateDict(_join(path), node, "optimizer")))
        elif is_module(node):
            mapping = state_dict(node)
            if mapping:
                found.append((path, StateDict(_join(path), mapping, _role(path, mapping), node)))
        elif (kinds := _kinds(node)) is not None and not _within(path, whole):
            found.append((path, StateDict(_join(path), node, _role(path, node))))
            if _mostly_tensors(kinds, node):
                whole.add(path)
    holders = {path[:depth] for path, _ in found for depth in range(len(path))}
    states = [
        state
        for path, state in found
        if state.role == "optimizer" or path in whole or path not in holders
    ]
    return states if of_models(states) else [*states, *_loose(root)]


def _loose(root: Node) -> list[StateDict]:
    """The tensors of a tree that has no state dict: a bare tensor, a list of them, RNG states."""
    tensors: dict[str, Node] = {}
    for path, node in walk(root, descend=_may_hold_some_loose):
        if _is_tensor(node):
            tensors[".".join(path) or "tensor"] = node
    return [StateDict("/", tensors, "loose", root)] if tensors else []


def _may_hold_some_loose(node: Node) -> bool:
    return _may_hold_some(node) and not _is_tensor(node)


def _may_hold_some(node: Node) -> bool:
    return not is_optimizer(node) and not is_module(node)


def _kinds(node: Node) -> list[bool] | None:
    """Which values of a state dict are tensors, in order; None for what does not look like one."""
    if not isinstance(node, dict) or not has_names(node):
        return None
    kinds = [type(value) is Tensor or _is_tensor(value) for value in node.values()]
    tensors = sum(kinds)
    few = 2 * tensors < len(node) and 2 * tensors < len(node) - _extra_states(node)
    return None if few or not tensors else kinds


def _is_tensor(node: Node) -> bool:
    return as_tensor(node) is not None or is_special_tensor(node)


def _extra_states(mapping: dict[Node, Node]) -> int:
    return sum(1 for key in mapping if key.endswith("_extra_state"))


def _mostly_tensors(kinds: list[bool], mapping: dict[str, Node]) -> bool:
    """Whether most values are tensors, those of random number generators left out."""
    tensors = sum(kinds)
    if "rng" in "\n".join(mapping).lower():
        pairs = zip(kinds, mapping, strict=True)
        tensors = sum(kind for kind, key in pairs if "rng" not in key.lower())
    return 2 * tensors > len(mapping) or 2 * tensors > len(mapping) - _extra_states(mapping)


def _within(path: Path, whole: set[Path]) -> bool:
    """Whether a path lies inside a state dict, most of whose values are tensors."""
    return any(path[:depth] in whole for depth in range(len(path)))


def _role(path: Path, mapping: dict[str, Node]) -> Role:
    if "n_averaged" in mapping and all(
        key == "n_averaged" or key.startswith("module.") for key in mapping
    ):
        return "swa"
    return "ema" if any(map(is_average, path)) else "model"


def _join(path: Path) -> str:
    return "/".join(path) or "/"


# --- picking


def of_models(states: Iterable[StateDict]) -> list[StateDict]:
    """Those that hold a model's weights."""
    return [state for state in states if state.role != "optimizer"]


def choose(document: Document, path: str | None = None) -> StateDict:
    """The state dict at `path`, or without one the only one that can be meant.

    Averages (`ema`, `swa`), and mappings of nothing but single numbers (the scores that Lightning
    keeps, a normalizer's mean), stand back where exactly one other state dict is there. Raises
    `SelectionError`, which lists what there is.
    """
    states = of_models(find(document.root))
    if path is not None:
        return _known(document, choose_all(document, [path])[0])
    weights = [state for state in states if not _only_numbers(state)] or states
    candidates = [state for state in weights if not state.is_average] or weights
    if len(candidates) == 1:
        return _known(document, candidates[0])
    if not candidates:
        raise _none(document)
    raise SelectionError(
        f"holds {len(states)} state dicts: {_listed(states)}",
        where=document.name,
        hint=adding("choose one", "select", states[0].path),
        code="ambiguous-state-dict",
    )


def _known(document: Document, state: StateDict) -> StateDict:
    foreign.check(document, state.path, state.mapping)
    return state


def _only_numbers(state: StateDict) -> bool:
    return not state.others and all(tensor.shape == () for tensor in state.tensors.values())


def choose_all(document: Document, paths: Sequence[str] = ()) -> list[StateDict]:
    """The state dicts at `paths`, or without any all of them. Raises `SelectionError`."""
    states = of_models(find(document.root))
    if not states:
        raise _none(document)
    return [_at(document, states, path) for path in paths] or states


def _at(document: Document, states: Sequence[StateDict], path: str) -> StateDict:
    """The state dict at a path; keys that hold a `/`, or are no text, may make two of one path."""
    found = [state for state in states if state.path == (path.strip("/") or "/")]
    if len(found) > 1:
        raise SelectionError(
            f"has {len(found)} state dicts at {path!r}",
            where=document.name,
            hint=Hint("see what it holds", command("inspect", document.name)),
            code="ambiguous-state-dict",
        )
    if not found:
        raise SelectionError(
            f"has no state dict at {path!r}; there is {_listed(states)}",
            where=document.name,
            hint=naming("take one of those", "select", states[0].path),
            code="no-such-path",
        )
    return found[0]


def _listed(states: Sequence[StateDict]) -> str:
    return listed((state.path for state in states), 20)


def _none(document: Document) -> SelectionError:
    return SelectionError(
        "holds no state dict (nothing maps names to tensors)",
        where=document.name,
        hint=Hint("see what it holds", command("inspect", document.name)),
        code="no-state-dict",
    )
