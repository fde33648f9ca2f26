"""Whole pickled models as state dicts: a tensor's name is the path of attributes that leads to it.

An `nn.Module` keeps `_parameters`, `_buffers` and `_modules` in its state; its class need not be
there. Buffers named in `_non_persistent_buffers_set` are left out, as `Module.state_dict` does. A
TorchScript module (class `__torch__.…`) keeps all of them as plain attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptfix.contents.tensors import as_tensor
from ckptfix.tree.document import Global, Inert, Node, OrderedMap

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCRIPTED = "__torch__"


def is_module(node: Node) -> bool:
    """Whether a node is a pickled model, eager or scripted."""
    return isinstance(node, Inert) and (_is_eager(node) or _is_scripted(node))


def state_dict(module: Inert) -> OrderedMap:
    """The tensors of a pickled model by dotted path, in the order of `Module.state_dict`."""
    found = OrderedMap()
    pending: list[tuple[str, Inert]] = [("", module)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if id(node) in seen and prefix.count(".") > _DEPTH:
            continue  # a module that holds itself
        seen.add(id(node))
        found.update((prefix + name, value) for name, value in _own(node))
        children = [(f"{prefix}{name}.", child) for name, child in _children(node)]
        pending.extend(reversed(children))
    return found


_DEPTH = 64


def _own(node: Inert) -> Iterator[tuple[str, Node]]:
    """The tensors of a module itself, by name."""
    if _is_scripted(node):
        yield from ((name, value) for name, value in _named(node.attributes) if _has_tensor(value))
        return
    attributes = node.attributes
    hidden = _strings(attributes.get("_non_persistent_buffers_set"))
    for name, value in _named(attributes["_parameters"]):
        if value is not None:
            yield name, value
    for name, value in _named(attributes["_buffers"]):
        if value is not None and name not in hidden:
            yield name, value


def _children(node: Inert) -> Iterator[tuple[str, Inert]]:
    held = node.attributes if _is_scripted(node) else node.attributes["_modules"]
    yield from ((name, child) for name, child in _named(held) if is_module(child))


def _is_eager(node: Inert) -> bool:
    attributes = node.attributes
    return all(isinstance(attributes.get(name), dict) for name in _KEPT)


def _is_scripted(node: Inert) -> bool:
    function = node.function
    named = isinstance(function, Global) and function.module.split(".")[0] == _SCRIPTED
    return named and isinstance(node.state, dict)


_KEPT = ("_parameters", "_buffers", "_modules")


def _named(mapping: dict[Any, Node]) -> Iterator[tuple[str, Node]]:
    yield from ((name, value) for name, value in mapping.items() if type(name) is str)


def _has_tensor(value: Node) -> bool:
    return as_tensor(value) is not None


def _strings(node: Node) -> set[str]:
    """The names in a set, which is an inert object, or in a list."""
    held = node.args[0] if isinstance(node, Inert) and node.args else node
    return {name for name in held if type(name) is str} if isinstance(held, list) else set()
