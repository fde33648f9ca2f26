"""Whole pickled models as state dicts: a tensor's name is the path of attributes that leads to it.

An `nn.Module` keeps `_parameters`, `_buffers` and `_modules` in its state; its class need not be
there. Some projects pickle it as a call that is given this state (StyleGAN's `persistence`).
What `torch.compile` made of one is pickled as a call that is given the model.
Buffers named in `_non_persistent_buffers_set` are left out, as `Module.state_dict` does. A
TorchScript module (class `__torch__.…`) keeps all of them as plain attributes.

What a class keeps elsewhere is not known: quantized modules pack their weights into objects of the
program. Such parts are named, so that a model is never taken without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.contents.tensors import SCRIPT_OBJECT, as_tensor, is_special_tensor
from ckptfix.errors import UnsafeError
from ckptfix.tree.document import Global, Inert, Node, OrderedMap, kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SCRIPTED = "__torch__"
_KEPT = ("_parameters", "_buffers", "_modules")
"""What quantized modules keep their weights in: an object of TorchScript's own classes."""


class Taken(NamedTuple):
    """What could be taken of a pickled model."""

    mapping: OrderedMap
    """Its tensors by dotted path."""
    unknown: dict[str, str]
    """Parts that may hold weights which are in no key, by path, and the class of each."""


def is_module(node: Node) -> bool:
    """Whether a node is a pickled model, eager or scripted."""
    for _ in range(_DEPTH):
        if not isinstance(node, Inert):
            return False
        compiled = _compiled(node)
        if compiled is None:
            return _is_scripted(node) or _state(node) is not None
        node = compiled
    return False


def _compiled(node: Inert) -> Node:
    """The model of which `torch.compile` made this one."""
    args = node.args
    return args[0] if node.cls == _COMPILED and isinstance(args, tuple) and args else None


def take(module: Inert) -> Taken:
    """The tensors of a pickled model by dotted path, in the order of `Module.state_dict`."""
    found, unknown = OrderedMap(), dict[str, str]()
    pending: list[tuple[str, Node]] = [("", module)]
    seen: set[int] = set()
    visited = 0
    while pending:
        prefix, node = pending.pop()
        visited += 1
        if visited > _MODULES:
            raise UnsafeError(f"a pickled model holds more than {_MODULES} modules")
        if id(node) in seen and prefix.count(".") > _DEPTH:
            continue  # a module that holds itself
        seen.add(id(node))
        tensors, children, packed = _scripted(node) if _is_scripted(node) else _eager(node)
        found.update((prefix + name, value) for name, value in tensors)
        if packed is not None:
            unknown[prefix.removesuffix(".") or "/"] = packed
        for name, child in reversed(children):
            if is_module(child):
                pending.append((f"{prefix}{name}.", child))
            else:
                unknown[prefix + name] = kind(child)
    return Taken(found, unknown)


def unwrapped(module: Inert) -> Inert:
    """The model in the `DataParallel`, `torch.compile`, … that was pickled round it."""
    for _ in range(_DEPTH):
        state = _state(module) or {}
        held = state.get("_modules", {}).get("module") if module.cls in _AROUND else None
        inner = _compiled(module) or held
        if not isinstance(inner, Inert) or not is_module(inner):
            break
        module = inner
    return module


_AROUND = frozenset(
    {
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
    }
)
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_DEPTH = 64
_MODULES = 1_000_000
_Parts = tuple[list[tuple[str, Node]], list[tuple[str, Node]], str | None]
"""Tensors by name, children by name, and the class that keeps weights elsewhere, if one does."""


def _eager(node: Inert) -> _Parts:
    compiled = _compiled(node)
    if compiled is not None:
        return [], [("_orig_mod", compiled)], None
    state = _state(node) or {}
    hidden = _strings(state.get("_non_persistent_buffers_set"))
    tensors = [(name, value) for name, value in _named(state["_parameters"]) if value is not None]
    tensors += [
        (name, value)
        for name, value in _named(state["_buffers"])
        if value is not None and name not in hidden
    ]
    children = [(name, child) for name, child in _named(state["_modules"]) if child is not None]
    packs = any(isinstance(value, Inert) and value.cls == SCRIPT_OBJECT for value in state.values())
    return tensors, children, node.cls if packs or _is_quantized(node) else None


def _is_quantized(node: Inert) -> bool:
    """Whether torch packs the weights of a module of that class, or keeps scales beside them."""
    module, _, name = node.cls.rpartition(".")
    if name in ("Quantize", "DeQuantize"):
        return False
    return module.startswith("torch.") and "quantized" in module.split(".")


def _scripted(node: Inert) -> _Parts:
    tensors, children = list[tuple[str, Node]](), list[tuple[str, Node]]()
    for name, value in _named(node.attributes):
        if as_tensor(value) is not None or is_special_tensor(value):
            tensors.append((name, value))
        elif isinstance(value, Inert) and _is_named_as_scripted(value) and _holds_something(value):
            children.append((name, value))
    return tensors, children, None


def _holds_something(node: Inert) -> bool:
    return bool(node.state)


def _state(node: Inert) -> Mapping[Any, Node] | None:
    """The state of a pickled eager module: its own, or what the call that makes it is given."""
    own = node.attributes
    if _is_state(own):
        return own
    if node.how != "reduce" or node.has_state:
        return None
    pending, visited = [*_below(node.args)], 0
    found: dict[int, Mapping[Any, Node]] = {}
    while pending and visited < _SEARCHED:
        one = pending.pop()
        visited += 1
        mapping = _mapping(one)
        if mapping is not None and _is_state(mapping):
            found[id(one)] = mapping
        else:
            pending.extend(_below(one))
    return next(iter(found.values())) if len(found) == 1 else None


_SEARCHED = 64
"""Nodes among the arguments of a call that are looked at for the state of a module."""


def _below(node: Node) -> list[Node]:
    """What a plain container, or an object that is a mapping, holds."""
    mapping = _mapping(node)
    held = mapping.values() if mapping is not None else node if type(node) is tuple else ()
    return [value for value in held if isinstance(value, (dict, tuple, Inert))]


def _mapping(node: Node) -> Mapping[Any, Node] | None:
    if isinstance(node, dict):
        return node
    if isinstance(node, Inert) and node.pairs:
        return {key: value for key, value in node.pairs if type(key) is str}
    return None


def _is_state(attributes: Mapping[Any, Node]) -> bool:
    return all(isinstance(attributes.get(name), dict) for name in _KEPT)


def _is_scripted(node: Node) -> bool:
    return isinstance(node, Inert) and _is_named_as_scripted(node) and isinstance(node.state, dict)


def _is_named_as_scripted(node: Inert) -> bool:
    function = node.function
    return isinstance(function, Global) and function.module.split(".")[0] == _SCRIPTED


def _named(mapping: Mapping[Any, Node]) -> Iterator[tuple[str, Node]]:
    yield from ((name, value) for name, value in mapping.items() if type(name) is str)


def _strings(node: Node) -> set[str]:
    """The names in a set, which is an inert object, or in a list."""
    held = node.args[0] if isinstance(node, Inert) and node.args else node
    return {name for name in held if type(name) is str} if isinstance(held, list) else set()
