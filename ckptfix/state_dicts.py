"""Find the state dicts in a tree, say what each is for, and pick the one that is meant.

A state dict is a mapping of names to tensors, at least half of whose values are tensors. Where
one lies inside another mapping, the inner one counts (`{"model": {…}, "rng_state": tensor}` is no
state dict), unless most of the outer one's values are tensors themselves. What an optimizer keeps
is found, but it is no state dict of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptfix.document import Global, Inert, Node, OrderedMap, Tensor, as_tensor
from ckptfix.errors import SelectionError
from ckptfix.trees import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ckptfix.document import Document

Role = Literal["model", "ema", "swa", "optimizer"]

_EMA_NAMES = frozenset(
    {"ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema_params", "shadow",
     "shadow_params", "params_ema"}
)  # fmt: skip
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

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The dense tensors by key, in order."""
        found = ((key, as_tensor(value)) for key, value in self.mapping.items())
        return {key: tensor for key, tensor in found if tensor is not None}

    @cached_property
    def others(self) -> Mapping[str, Node]:
        """What is no dense tensor: integers, extra state, sparse and quantized tensors."""
        return {key: value for key, value in self.mapping.items() if key not in self.tensors}

    @property
    def metadata(self) -> Mapping[str, Node] | None:
        """Its `_metadata`: versions by module path."""
        return self.mapping.metadata if isinstance(self.mapping, OrderedMap) else None


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


def find(root: Node) -> list[StateDict]:
    """Every state dict in a tree, in order, each once."""
    found: dict[tuple[str, ...], StateDict] = {}
    for path, node in walk(root, descend=lambda node: not is_optimizer(node)):
        if is_optimizer(node):
            found[path] = StateDict(_join(path), node, "optimizer")
        elif _looks_like_one(node) and not _within(path, found):
            found[path] = StateDict(_join(path), node, _role(path, node))
    models = [path for path, state in found.items() if state.role != "optimizer"]
    holders = {path[:depth] for path in found for depth in range(len(path))}
    kept = [path for path in models if path not in holders or _mostly_tensors(found[path].mapping)]
    return [state for path, state in found.items() if path in kept or state.role == "optimizer"]


def _looks_like_one(node: Node) -> bool:
    if not isinstance(node, dict) or not node:
        return False
    tensors = sum(_is_tensor(value) for key, value in node.items() if type(key) is str)
    return tensors > 0 and 2 * tensors >= len(node) - _extra_states(node)


def _is_tensor(node: Node) -> bool:
    return as_tensor(node) is not None or is_special_tensor(node)


def _extra_states(mapping: dict[Node, Node]) -> int:
    return sum(1 for key in mapping if type(key) is str and key.endswith("_extra_state"))


def _mostly_tensors(mapping: dict[str, Node]) -> bool:
    tensors = sum(
        _is_tensor(value) for key, value in mapping.items() if "rng" not in str(key).lower()
    )
    return 2 * tensors > len(mapping) - _extra_states(mapping)


def _within(path: tuple[str, ...], found: Mapping[tuple[str, ...], StateDict]) -> bool:
    """Whether a path lies inside a state dict, most of whose values are tensors."""
    above = (found.get(path[:depth]) for depth in range(len(path)))
    return any(state is not None and _mostly_tensors(state.mapping) for state in above)


def _role(path: tuple[str, ...], mapping: dict[str, Node]) -> Role:
    if path and path[-1].lower() in _EMA_NAMES:
        return "ema"
    if "n_averaged" in mapping and all(
        key == "n_averaged" or key.startswith("module.") for key in mapping
    ):
        return "swa"
    return "model"


def _join(path: tuple[str, ...]) -> str:
    return "/".join(path) or "/"


# --- picking


def of_models(states: Iterable[StateDict]) -> list[StateDict]:
    """Those that hold a model's weights."""
    return [state for state in states if state.role != "optimizer"]


def choose(document: Document, path: str | None = None) -> StateDict:
    """The state dict at `path`, or without one the only one that can be meant.

    Averaged copies (`ema`) stand back where exactly one other state dict is there. Raises
    `SelectionError`, which lists what there is.
    """
    states = of_models(find(document.root))
    if path is not None:
        return choose_all(document, [path])[0]
    plain = [state for state in states if state.role != "ema"]
    candidates = plain or states
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise _none(document)
    listed = ", ".join(state.path for state in states)
    raise SelectionError(
        f"{document.name}: holds {len(states)} state dicts: {listed}",
        hint=f"choose one: add --select {states[0].path}",
        code="ambiguous-state-dict",
    )


def choose_all(document: Document, paths: Sequence[str] = ()) -> list[StateDict]:
    """The state dicts at `paths`, or without any all of them. Raises `SelectionError`."""
    states = of_models(find(document.root))
    if not states:
        raise _none(document)
    known = {state.path: state for state in states}
    chosen = []
    for path in paths:
        state = known.get(path.strip("/") or "/")
        if state is None:
            raise SelectionError(
                f"{document.name}: has no state dict at {path!r}; there is {', '.join(known)}",
                hint=f"take one of those: --select {next(iter(known))}",
                code="no-such-path",
            )
        chosen.append(state)
    return chosen or states


def _none(document: Document) -> SelectionError:
    return SelectionError(
        f"{document.name}: holds no state dict (nothing maps names to tensors)",
        hint=f"see what it holds: ckptfix inspect {document.name}",
        code="no-state-dict",
    )
