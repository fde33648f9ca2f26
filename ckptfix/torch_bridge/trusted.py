"""Objects of classes that the program itself has marked as safe to load.

`torch.serialization.add_safe_globals` says which those are; packages with tensors of their own,
such as torchao, call it when they are imported. What torch's default loader makes of them is made
of them here. Nothing is imported because a file names it: a class that is not marked is a name.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from ckptfix.errors import UnsupportedError
from ckptfix.torch_bridge.plain import unknown
from ckptfix.tree.document import Global, Inert, Node
from ckptfix.tree.rebuild import Making

if TYPE_CHECKING:
    from collections.abc import Callable

_SCALARS = (str, int, float, bool, type(None), bytes)


def marked() -> dict[str, Any]:
    """The classes and functions that are marked, by the names that pickles have for them."""
    found: dict[str, Any] = {}
    for one in torch.serialization.get_safe_globals():
        if isinstance(one, tuple):
            found[one[1]] = one[0]
        elif hasattr(one, "__qualname__"):
            found[f"{one.__module__}.{one.__qualname__}"] = one
    return found


def making(node: Inert, known: dict[str, Any]) -> Any:
    """An object of a marked class, or the `Making` of one; None where it is not such an object."""
    cls = known.get(str(node.function)) if isinstance(node.function, Global) else None
    if not isinstance(cls, type) or node.items or node.pairs or node.kwargs is not None:
        return None
    if not isinstance(node.args, tuple) or not all(isinstance(a, _SCALARS) for a in node.args):
        return None
    try:
        if issubclass(cls, Enum):
            return None if node.has_state else cls(*node.args)
        if node.how != "newobj" or issubclass(cls, torch.Tensor):
            return None
        made = cls.__new__(cls, *node.args)
    except Exception:  # noqa: BLE001  # the code of that class
        return None
    return Making(made, node.state, lambda state: _set(made, state)) if node.has_state else made


def _set(made: Any, state: Any) -> None:
    try:
        if hasattr(made, "__setstate__"):
            made.__setstate__(state)
            return
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            for name, value in (part or {}).items():
                object.__setattr__(made, name, value)
    except Exception as error:
        kind = f"{type(made).__module__}.{type(made).__qualname__}"
        what = f"a {kind}, which the program has marked as safe, does not take its state: {error}"
        raise UnsupportedError(what, hint="load it with torch.load") from error


def tensor(
    node: Inert, known: dict[str, Any], parts_of: Callable[[Node], Any]
) -> torch.Tensor | None:
    """A tensor of a marked class that wraps others; None where it is no such tensor."""
    if node.function != _FROM_TYPE or not isinstance(node.args, tuple) or len(node.args) != 4:
        return None
    function, name, args, state = node.args
    cls = known.get(str(name)) if isinstance(name, Global) else None
    if function != _WRAPPER or not isinstance(args, tuple) or len(args) != 8:
        return None
    if not isinstance(cls, type) or not issubclass(cls, torch.Tensor) or args[0] != name:
        return None
    _, dtype, size, stride, offset, _, _, wants_gradient = args
    parts = parts_of(state)
    if unknown(parts):
        return None
    values = parts.values() if isinstance(parts, dict) else ()
    devices = (value.device for value in values if isinstance(value, torch.Tensor))
    try:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            parts_of(size),
            strides=parts_of(stride),
            dtype=parts_of(dtype),
            storage_offset=offset,
            layout=torch.strided,
            device=next(devices, torch.device("cpu")),
            requires_grad=wants_gradient,
        )
        return torch._tensor._rebuild_from_type_v2(lambda: made, cls, (), parts)  # type: ignore[no-untyped-call,no-any-return]
    except Exception:  # noqa: BLE001  # the code of that class
        return None


_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_WRAPPER = Global("torch._utils", "_rebuild_wrapper_subclass")
