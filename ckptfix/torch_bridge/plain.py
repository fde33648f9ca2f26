"""Objects of classes that Python and numpy bring along, and whose values are known.

They are made of what was pickled of them, without what the pickle names being called: each class
stands in a table here, with how its values are checked. What is not in it stays inert.
"""

from __future__ import annotations

import copyreg
import io
import os
import pathlib
import re
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor
from ckptfix.tree.rebuild import Making

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SCALARS = (str, int, float, bool, type(None), bytes)


def revived(node: Inert) -> Any:
    """What an inert object stands for, as a value or a `Making`; itself where that is not known."""
    make = _CONTAINERS.get(node.cls)
    found = make(node) if make is not None else _value(node)
    return node if found is None else found


# --- values


def _value(node: Node, depth: int = 3) -> Any:
    """The value of a node without containers, or None."""
    if not isinstance(node, Inert) or node.items or node.pairs or node.kwargs is not None:
        return None
    if node.cls in ("io.BytesIO", "_io.BytesIO"):
        return _bytes_io(node)
    if node.cls == "numpy.dtype":
        return _numpy_dtype(node)
    if str(node.function) in _NUMPY_SCALARS:
        return _numpy_scalar(node)
    make = _CALLS.get(node.cls)
    if make is None or node.has_state or node.how != "reduce" or not isinstance(node.args, tuple):
        return None
    args = [
        _value(part, depth - 1) if isinstance(part, Inert) and depth else part for part in node.args
    ]
    parts = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    if not all(isinstance(part, (*_SCALARS, timedelta, timezone)) for part in parts):
        return None
    try:
        return make(*args)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None


def _path(posix: bool) -> Callable[..., Any]:
    """A path of the system that it was saved on, which only names something on that system."""
    if posix:
        return pathlib.PurePosixPath if os.name == "nt" else pathlib.PosixPath
    return pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath


def _fraction(over: Any, under: Any) -> Fraction:
    if not type(over) is type(under) is int:  # a text may stand for a number of any length
        raise TypeError
    return Fraction(over, under)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch.device": torch.device,
    "torch.Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "complex": complex,
    "range": range,
    "slice": slice,
    "datetime.date": date,
    "datetime.time": time,
    "datetime.datetime": datetime,
    "datetime.timedelta": timedelta,
    "datetime.timezone": timezone,
    "decimal.Decimal": Decimal,
    "fractions.Fraction": _fraction,
}
for _module in ("pathlib", "pathlib._local"):
    _CALLS[f"{_module}.PosixPath"] = _path(posix=True)
    _CALLS[f"{_module}.WindowsPath"] = _path(posix=False)
    _CALLS[f"{_module}.PurePosixPath"] = pathlib.PurePosixPath
    _CALLS[f"{_module}.PureWindowsPath"] = pathlib.PureWindowsPath


def _bytes_io(node: Inert) -> Any:
    state = node.state
    if node.args or not isinstance(state, tuple) or len(state) != 3 or state[2] not in (None, {}):
        return None
    data, position, _ = state
    if not isinstance(data, bytes) or type(position) is not int or not 0 <= position < 1 << 62:
        return None
    made = io.BytesIO(data)
    made.seek(position)
    return made


_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def _numpy_dtype(node: Node) -> Any:
    if not isinstance(node, Inert) or node.cls != "numpy.dtype" or not node.args:
        return None
    code, order = node.args[0], "|"
    if isinstance(node.state, tuple) and len(node.state) > 1:
        order = node.state[1]
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([fiucb]\d{1,2}|[US]\d{1,6})", code):
        return None
    try:
        return np.dtype(code).newbyteorder(">" if order == ">" else "<" if order == "<" else "=")
    except TypeError:
        return None


def _numpy_scalar(node: Inert) -> Any:
    if node.has_state or not isinstance(node.args, tuple) or len(node.args) != 2:
        return None
    dtype, data = _numpy_dtype(node.args[0]), node.args[1]
    if dtype is None or not isinstance(data, bytes) or len(data) != dtype.itemsize or not data:
        return None
    return np.frombuffer(data, dtype)[0]


# --- containers


def _with_attributes(make: Callable[[], Any]) -> Callable[[Inert], Making | None]:
    def making(node: Inert) -> Making | None:
        state = node.state
        given = node.args[1:] if node.args[:1] == (node.function,) else node.args
        is_plain = not (given or node.items or node.pairs or node.kwargs is not None)
        if not is_plain or not isinstance(state, dict) or set(map(type, state)) - {str}:
            return None
        made = make()
        return Making(made, dict(state), vars(made).update)

    return making


def _counter(node: Inert) -> Making | None:
    parts = node.args[0] if len(node.args) == 1 else None
    if type(parts) is not dict or node.has_state or node.items or node.pairs:
        return None
    made: Counter[Any] = Counter()
    return Making(made, parts, lambda new: dict.update(made, new))


def _defaultdict(node: Inert) -> Making | None:
    factory = node.args[0] if len(node.args) == 1 else None
    make = _FACTORIES.get(factory.today) if isinstance(factory, Global) else None
    keys = [key for key, _ in node.pairs]
    unknown = make is None and factory is not None
    if unknown or node.has_state or node.items or not all(isinstance(k, _SCALARS) for k in keys):
        return None
    made: defaultdict[Any, Any] = defaultdict(make)
    return Making(made, dict(node.pairs), lambda new: dict.update(made, new))


_FACTORIES: dict[str, type] = {
    "list": list,
    "dict": dict,
    "set": set,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple": tuple,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
}


def _deque(node: Inert) -> Making | None:
    parts, most = (*node.args, (), None)[:2] if len(node.args) != 1 else (node.args[0], None)
    if not isinstance(parts, (list, tuple)) or node.has_state or node.pairs or len(node.args) > 2:
        return None
    if most is not None and (type(most) is not int or not 0 <= most < 1 << 62):
        return None
    made: deque[Any] = deque(maxlen=most)
    return Making(made, [*parts, *node.items], made.extend)


_CONTAINERS: dict[str, Callable[[Inert], Making | None]] = {
    "argparse.Namespace": _with_attributes(Namespace),
    "types.SimpleNamespace": _with_attributes(SimpleNamespace),
    "collections.Counter": _counter,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
}


# --- and back


def described(value: Any) -> Node:
    """What would be pickled of such an object; None for one of another class."""
    if isinstance(value, type):
        known = value in _FACTORIES.values()
        return Global(value.__module__, value.__qualname__) if known else None
    is_numpy = isinstance(value, (np.generic, np.dtype))
    if not (is_numpy or type(value) in _KNOWN or isinstance(value, pathlib.PurePath)):
        return None
    if type(value).__module__.partition(".")[0] not in _MODULES:
        return None
    reduced: Any = value.__reduce_ex__(2)
    function, args, state, items, pairs = (*reduced, None, None, None)[:5]
    node = Inert(_name(function), args, has_state=state is not None, state=state)
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        node = Inert(_name(args[0]), args[1:], None, "newobj", state is not None, state)
    node.items, node.pairs = list(items or ()), list(pairs or ())
    return node


def _name(function: Any) -> Global:
    return Global(function.__module__, function.__qualname__)


_KNOWN = frozenset(
    {Namespace, SimpleNamespace, Counter, defaultdict, deque, io.BytesIO, range, slice, date, time,
     datetime, timedelta, timezone, Decimal, Fraction}
)  # fmt: skip
_MODULES = frozenset(
    {"argparse", "types", "collections", "_io", "io", "builtins", "datetime", "decimal",
     "fractions", "pathlib", "numpy"}
)  # fmt: skip


# --- what is left


def unknown(value: Any) -> str:
    """What is in a value that ckptfix keeps and did not make: its class; empty for plain data."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, (Inert, Global, Storage, Tensor)):
            return one.cls if isinstance(one, Inert) else str(one)
        if id(one) not in seen:
            seen.add(id(one))
            pending.extend(_within(one))
    return ""


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return value
    attributes = getattr(value, "__dict__", None)
    return attributes.values() if isinstance(attributes, dict) else ()
