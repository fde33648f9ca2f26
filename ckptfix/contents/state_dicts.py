"""Find the state dicts in a tree, say what each is for, and pick the one that is meant.

A state dict is a mapping of names to tensors, at least half of whose values are tensors. Where
one lies inside another mapping, the inner one counts (`{"model": {…}, "rng_state": tensor}` is no
state dict), unless most of the outer one's values are tensors themselves. What an optimizer keeps
is found, but it is not a state dict of a model. Numpy arrays count only where all of a mapping is
arrays and numbers, and never inside an object: there they are a table's columns, or a palette.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ckptfix.contents import foreign
from ckptfix.contents.modules import is_module, take
from ckptfix.contents.tensors import as_tensor, is_array, is_packed, is_special_tensor
from ckptfix.errors import SelectionError, UnsupportedError
from ckptfix.hints import Hint, adding, command, naming
from ckptfix.tree.document import Inert, Node, OrderedMap, Tensor, kind
from ckptfix.tree.walk import LEAVES, PATH_DEPTH, Path, children, has_names, script_constants, walk
from ckptfix.words import listed, plural, size

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from ckptfix.tree.document import Document

Role = Literal["model", "ema", "swa", "optimizer", "generators", "loose"]
"""`generators`: states of random number generators. `loose`: tensors that stand in no state dict,
by their paths, where there is no state dict."""

_AVERAGES = re.compile(
    r"(?i)(?:^|[_-])(?:ema|swa|shadow|averaged?|polyak)(?:[_-]|$)|^avg(?:_model|$)|_avg$|"
    r"^ema\{|(?-i:[a-z](?:EMA|Ema)$)|^encoder_k$|^momentum_encoder|_momentum$|"
    r"^target_(?:network|encoder|net|model)(?:_|$)"
)
_PLAIN = re.compile(r"(?i)(?:^|_)(?:online|current)(?:_|$)")


class Made(NamedTuple):
    """How a target's shapes made tensors of what is in the files: code, what, and what became."""

    code: str
    found: str
    cure: str


@dataclass(frozen=True, eq=False, repr=False)
class StateDict:
    """A state dict where it stands in a tree: `path` is joined by `/`, and `/` is the root."""

    path: str
    mapping: dict[str, Node]
    role: Role = "model"
    origin: Node = None
    """What the mapping was made of, where it is not in the tree itself: a pickled model, a list of
    tensors. Its keys cannot be renamed where they are."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Parts of a pickled model that may hold weights which are in no key: path, and class."""
    made: tuple[Made, ...] = ()
    """What was done for a target to have its tensors, which a program that loads it would lack."""
    unmade: Mapping[str, str] = field(default_factory=dict)
    """Keys of which the target's shapes make no tensors, and why."""

    def __repr__(self) -> str:
        return f"StateDict({self.path!r}, {self.role}: {self.contents})"

    @property
    def contents(self) -> str:
        """What it holds, for people: `267 tensors, 44.7 MiB`."""
        if self.role == "optimizer":
            return f"{plural(len(self.mapping['state']), 'parameter')} with state"
        others = f", {plural(len(self.others), 'other')}" if self.others else ""
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"{plural(len(self.tensors), 'tensor')}, {size(nbytes)}{others}"

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

    Such are `state_dict_ema`, `params_ema`, `swa_model`, `shadow`, `average_model_state`; and the
    momentum encoders of contrastive learning: MoCo's `encoder_k`, `momentum_encoder` in its third
    version.
    """
    return _AVERAGES.search(name) is not None


def are_averages(names: Iterable[str]) -> bool:
    """Whether what lies at a path holds averages; the innermost name that says so decides.

    `ema/online_model` has the weights that are trained, beside their averages.
    """
    for name in reversed(tuple(names)):
        if _PLAIN.search(name) or is_average(name):
            return _PLAIN.search(name) is None
    return False


def is_optimizer(node: Node) -> bool:
    """Whether a node is the state dict of a `torch.optim` optimizer."""
    return isinstance(node, dict) and _has_parameter_groups(node)


def _is_optimizer_object(node: Node) -> bool:
    """Whether a node is a pickled optimizer itself."""
    return isinstance(node, Inert) and _has_parameter_groups(node.attributes)


def _has_parameter_groups(attributes: Mapping[Any, Node]) -> bool:
    state, groups = attributes.get("state"), attributes.get("param_groups")
    return isinstance(state, (dict, Inert)) and isinstance(groups, list)


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
    objects: set[Path] = set()
    for path, node in _candidates(root):
        if is_optimizer(node):
            found.append((path, StateDict(_join(path), node, "optimizer")))
            continue
        if is_module(node):
            found += _of_module(path, node)
            continue
        is_object = isinstance(node, Inert)
        if is_object and (node.has_state or node.args):
            objects.add(path)
        mapping: Node = as_mapping(node) if is_object else node
        if _within(path, whole):
            continue
        kinds = _kinds(mapping, deep=bool(path), arrays=not _within(path, objects))
        if kinds is None or _are_scores(path, mapping):
            continue
        mostly = _mostly_tensors(kinds, mapping)
        if mostly or not is_object:
            origin = node if is_object else None
            found.append((path, StateDict(_join(path), mapping, _role(path, mapping), origin)))
        if mostly:
            whole.add(path)
    holders = {path[:depth] for path, _ in found for depth in range(len(path))}
    states = [
        (path, state)
        for path, state in found
        if state.role == "optimizer" or path in whole or path not in holders
    ]
    return _or_loose(_with_swapped_averages(states), root)


def _or_loose(states: list[StateDict], root: Node) -> list[StateDict]:
    """The state dicts; where none is of a model, what else there is of tensors."""
    if of_models(states):
        return states
    known = {state.role for state in states}
    return [*states, *(state for state in _loose(root) if state.role not in known)]


def as_mapping(node: Inert) -> dict[str, Node] | None:
    """What is in a mapping of a class of its own, derived from dict; None for any other object."""
    if node.args or node.items or not all(type(key) is str for key, _ in node.pairs):
        return None
    if node.has_state and not isinstance(node.state, dict):
        return None
    return OrderedMap(node.pairs, node.state if node.has_state else None)


def _of_module(path: Path, module: Inert) -> Iterator[tuple[Path, StateDict]]:
    taken = take(module)
    if taken.mapping or taken.unknown:
        role = _role(path, taken.mapping)
        yield path, StateDict(_join(path), taken.mapping, role, module, taken.unknown)


def _with_swapped_averages(states: list[tuple[Path, StateDict]]) -> list[StateDict]:
    """Lightning's `WeightAveraging` saves the averages as `state_dict`, the weights beside it."""
    paths = {path for path, _ in states}
    return [
        replace(state, role="ema")
        if path[-1:] == ("state_dict",) and (*path[:-1], "current_model_state") in paths
        else state
        for path, state in states
    ]


def _loose(root: Node) -> list[StateDict]:
    """The tensors of a tree that has no state dict: a bare tensor, a list of them, RNG states.

    A tensor that stands in several places has a name for each.
    """
    tensors: dict[str, Node] = {}
    seen: set[int] = set()
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if _is_tensor(node):
            tensors[".".join(path) or "tensor"] = node
        elif id(node) not in seen and _may_hold_some(node):
            seen.add(id(node))
            deep = len(path) >= PATH_DEPTH
            below = [
                (path if deep else (*path, name), child)
                for name, child in children(node)
                if type(child) not in LEAVES
            ]
            pending.extend(reversed(below))
    role: Role = "generators" if _are_generators((), tensors) else "loose"
    return [StateDict("/", tensors, role, root)] if tensors else []


def beside_loose(root: Node) -> list[tuple[str, str]]:
    """Path and kind of what `_loose` has no name for, as a whole where no tensor is in it."""
    holding = _holding(root)
    left: list[tuple[str, str]] = []
    first: dict[int, str] = {}
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        place = _join(path)
        if _is_tensor(node):
            continue
        if id(node) not in holding:
            left.append((place, kind(node)))
        elif id(node) in first:
            left.append((place, f"{kind(node)}, the same as {first[id(node)]}"))
        else:
            first[id(node)] = place
            below = list(children(node))
            if isinstance(node, Inert):
                left.append((place, f"{node.cls}, apart from its tensors"))
                below = [row for row in below if id(row[1]) in holding]
            deep = len(path) >= PATH_DEPTH
            pending += [(path if deep else (*path, name), child) for name, child in below[::-1]]
    return left


def _holding(root: Node) -> set[int]:
    """What holds a tensor that `_loose` names, by id."""
    above: dict[int, list[int]] = {}
    seen: set[int] = set()
    pending, holding = [root], list[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if _is_tensor(node):
            holding.append(id(node))
        elif type(node) not in LEAVES and _may_hold_some(node):
            for _, child in children(node):
                above.setdefault(id(child), []).append(id(node))
                pending.append(child)
    found: set[int] = set()
    while holding:
        one = holding.pop()
        if one not in found:
            found.add(one)
            holding += above.get(one, ())
    return found


def _may_hold_some(node: Node) -> bool:
    return not is_optimizer(node) and not is_module(node) and not _is_optimizer_object(node)


def _kinds(node: Node, *, deep: bool, arrays: bool) -> list[bool] | None:
    """Which values of a state dict are tensors, in order; None for what does not look like one.

    `deep` says that the node is not the root, `arrays` whether numpy arrays can be weights there.
    """
    if not isinstance(node, dict) or not has_names(node):
        return None
    kinds = [
        type(value) is Tensor or _is_tensor(value) or is_packed(value) for value in node.values()
    ]
    tensors = sum(kinds)
    if not tensors:
        return None
    if 2 * tensors < len(node) and 2 * tensors < len(node) - _extra_states(node):
        return None
    rest = [value for value, kind in zip(node.values(), kinds, strict=True) if not kind]
    texts = any(type(value) in (str, list, tuple) for value in rest)
    if deep and texts and 2 * tensors == len(node):
        return None
    if (not arrays or texts) and any(map(is_array, node.values())):
        return None
    return kinds


def _is_tensor(node: Node) -> bool:
    return as_tensor(node) is not None or is_special_tensor(node)


def _extra_states(mapping: dict[Node, Node]) -> int:
    return sum(1 for key in mapping if key.endswith("_extra_state"))


def _are_scores(path: Path, mapping: dict[str, Node]) -> bool:
    """Whether a mapping holds what callbacks keep: single numbers, by file or in `callbacks`."""
    if "callbacks" not in path and not any("/" in key or "\\" in key for key in mapping):
        return False
    return all(
        (tensor := as_tensor(value)) is None or not tensor.shape for value in mapping.values()
    )


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


def _are_generators(path: Path, mapping: dict[str, Node]) -> bool:
    """Whether a mapping holds states of random number generators: rows of bytes, called so."""
    tensors = [tensor for node in mapping.values() if (tensor := as_tensor(node)) is not None]
    if not tensors or any(t.dtype.name != "uint8" or len(t.shape) != 1 for t in tensors):
        return False
    if any(tensor.numel == _MERSENNE_TWISTER for tensor in tensors):
        return True
    names = " ".join((*path, *map(str, mapping)))
    return _GENERATOR.search(names) is not None


_MERSENNE_TWISTER = 5056
"""Bytes of what `torch.get_rng_state()` gives."""
_GENERATOR = re.compile(r"(?i)(?:^|[^a-z])(?:rng|seed|random|generator)s?(?![a-z])")


def _role(path: Path, mapping: dict[str, Node]) -> Role:
    if _are_generators(path, mapping):
        return "generators"
    if (
        len(mapping) > 1
        and "n_averaged" in mapping
        and all(key == "n_averaged" or key.startswith("module.") for key in mapping)
    ):
        return "swa"
    return "ema" if are_averages(path) else "model"


def _join(path: Path) -> str:
    return "/".join(path) or "/"


# --- picking


def of_models(states: Iterable[StateDict]) -> list[StateDict]:
    """Those that hold a model's weights."""
    return [state for state in states if state.role not in ("optimizer", "generators")]


def choose(document: Document, path: str | None = None) -> StateDict:
    """The state dict at `path`, or without one the only one that can be meant.

    Averages (`ema`, `swa`), and mappings of nothing but single numbers (a normalizer's mean), stand
    back where exactly one other state dict is there; copies that share their tensors are one.

    Raises:
        SelectionError: there is none, or several; it lists what there is.
        UnsupportedError: a part of the model that is meant keeps its weights in an unknown way.
    """
    if path is not None:
        return known(document, choose_all(document, [path])[0])
    states = of_models(find(document.root))
    if not states:
        raise _none(document)
    weights = [state for state in states if not _only_numbers(state)] or states
    candidates = distinct([state for state in weights if not state.is_average] or weights)
    if len(candidates) > 1:
        raise SelectionError(
            f"holds {len(states)} state dicts: {_listed(states)}",
            where=document.name,
            hint=adding("choose one", "select", candidates[0].path),
            code="ambiguous-state-dict",
        )
    return known(document, candidates[0])


def known(document: Document, state: StateDict) -> StateDict:
    """A state dict, unless it is only a part of a pickled model, or of another framework.

    Raises `UnsupportedError`.
    """
    foreign.check(document, state.path, state.mapping)
    if not state.unknown:
        return state
    names = (f"{path} ({cls})" for path, cls in state.unknown.items())
    raise UnsupportedError(
        f"keeps weights in a way that is not known: {listed(names, 4)}",
        where=f"{document.name}: {state.path}" if state.selection else document.name,
        hint="in the program that made it, save the state_dict() of the model instead",
    )


def distinct(states: Sequence[StateDict]) -> list[StateDict]:
    """The state dicts, but of copies that share all their tensors only the first."""
    if len(states) < 2:
        return list(states)
    return list({_identity(state): state for state in reversed(states)}.values())[::-1]


def _identity(state: StateDict) -> Hashable:
    if not state.tensors or any(type(value) not in LEAVES for value in state.others.values()):
        return id(state.node)
    views = tuple((key, tensor.view) for key, tensor in state.tensors.items())
    return views, repr(state.others)


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
    path = path.strip("/") or "/"
    found = [state for state in states if state.path == path]
    if not found:
        there = list(_nodes_at(document.root, path))
        found = [
            replace(state, path=path, role=_role(tuple(path.split("/")), state.mapping))
            for state in states
            if any(node is state.node for node in there)
        ]
    if len(distinct(found)) > 1:
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


def _nodes_at(root: Node, path: str) -> Iterator[Node]:
    """What stands at a path, also where the same thing stands elsewhere before it."""
    pending: list[tuple[str, Node]] = [(path, root)]
    while pending:
        rest, node = pending.pop()
        for name, child in children(node) if type(node) not in LEAVES else ():
            if rest == name:
                yield child
            elif rest.startswith(f"{name}/"):
                pending.append((rest[len(name) + 1 :], child))


def _listed(states: Sequence[StateDict]) -> str:
    return listed((state.path for state in states), 20)


def instead(document: Document) -> str | None:
    """What a document without weights is known to hold, as the end of `it holds …`."""
    roles = {state.role for state in find(document.root)}
    nodes = [node for _, node in _candidates(document.root)]
    told = []
    if "optimizer" in roles or any(map(_is_optimizer_object, nodes)):
        told.append("the state of an optimizer")
    if "generators" in roles:
        told.append("states of random number generators")
    names = set(document.root) if isinstance(document.root, dict) else set()
    if names >= {"last_epoch", "_step_count"} or names >= {"last_epoch", "base_lrs"}:
        told.append("the state of a learning rate scheduler")
    if names >= {"scale", "growth_factor", "backoff_factor"}:
        told.append("the state of a gradient scaler")
    return f"{' and '.join(told)}, and no weights" if told else None


def _none(document: Document) -> SelectionError:
    frozen = len(script_constants(document))
    other = instead(document)
    what = f"holds {other}" if other else "holds no state dict (nothing maps names to tensors)"
    return SelectionError(
        f"holds no state dict: its {frozen} tensors are constants of a frozen TorchScript program, "
        "and have no names"
        if frozen
        else what,
        where=document.name,
        hint=Hint("see what it holds", command("inspect", document.name)),
        code="no-state-dict",
    )
