"""Which classes and functions do something when a pickle calls them: run commands, code, reach out.

Most names in a pickle stand for data: a Namespace, a date, a class of somebody's project. A name is
only looked at, never imported, and falls into one of three classes: it is known to be harmless, it
is dangerous, or nobody knows what a call of it does. Of the packages that are there wherever a
checkpoint is loaded, each function that is not known to be harmless is dangerous where it is called
(`known_names`). What comes of a call is not known either: to call that is dangerous.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptfix.pickles import known_names as known
from ckptfix.pickles.allowed import is_allowed
from ckptfix.tree.document import Global, Inert
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from ckptfix.tree.document import Node


class Verdict(IntEnum):
    """What is known of a name, or of a call."""

    HARMLESS = 0
    UNKNOWN = 1
    DANGEROUS = 2


@lru_cache(maxsize=1024)  # thousands of parameters are made by one function
def judge(name: Global, *, called: bool) -> Verdict:
    """What is known of a class or function; a name that only stands there is not `called`."""
    today = _qualified(name)
    if is_allowed(name) or today in known.NAMES:
        return Verdict.HARMLESS
    if today.startswith(known.DANGEROUS) or (called and today in known.CHANGING):
        return Verdict.DANGEROUS
    if today in known.CALLED_BY_THEM or today.startswith(known.MADE_BY_THEM):
        return Verdict.HARMLESS
    if any(part[:2] == part[-2:] == "__" for part in name.name.split(".")):
        return _way_around(name)  # a way to what lies around a class
    first, *parts = today.split(".")
    if first in known.LIBRARY or _reaches(parts):
        return Verdict.HARMLESS if _is_data(today) else Verdict.DANGEROUS
    if not called or _is_class(parts[-1]):
        return Verdict.HARMLESS
    if first in known.ALWAYS_THERE or parts[-1].lstrip("_") in known.VERBS:
        return Verdict.DANGEROUS
    return Verdict.UNKNOWN


def is_dangerous(name: Global, *, called: bool = True) -> bool:
    """Whether a class or function runs commands or code, or reaches files or the network."""
    return judge(name, called=called) is Verdict.DANGEROUS


def dangers(root: Node) -> list[Global | Inert]:
    """Every call in a tree of what is dangerous, and every name of it that is not called."""
    found = [node for _, node in walk(root, tensors=False) if _judged(node) is Verdict.DANGEROUS]
    called = {id(node.function) for node in found if isinstance(node, Inert)}
    return [node for node in found if id(node) not in called]


def unknown_calls(root: Node) -> list[Inert]:
    """Every call in a tree of a function that nobody knows."""
    return [node for _, node in walk(root, tensors=False) if _judged(node) is Verdict.UNKNOWN]


def name_of(danger: Global | Inert) -> str:
    """What a call, or a name, reaches out to: `posix.system`. Of a call of a result, its maker."""
    for _ in range(_DEPTH):
        if not isinstance(danger, Inert):
            break
        danger = danger.function
    return danger.today if isinstance(danger, Global) else "<computed>"


def _judged(node: Node) -> Verdict:
    if type(node) is Global:
        return judge(node, called=False)
    if not isinstance(node, Inert):
        return Verdict.HARMLESS
    return max([_made(node), *map(_called, _methods(node))])


def _made(node: Inert) -> Verdict:
    """What is known of the call that makes an object."""
    if node.how in ("newobj", "newobj_ex"):
        return judge(node.function, called=False) if type(node.function) is Global else _ABSURD
    if type(node.function) is not Global:
        return _called(node.function)
    return _call(node.function, node.args if isinstance(node.args, tuple) else ())


def _methods(node: Inert) -> list[Node]:
    """What an object is given that an unpickler calls, where it is given a state or items too."""
    args = node.args if isinstance(node.args, tuple) else ()
    given = [part for part in (*args, node.kwargs, node.state) if isinstance(part, dict)]
    if not given or not (node.has_state or node.items):
        return []
    found = [part.get(name) for part in given for name in ("__setstate__", "append", "extend")]
    return [method for method in found if isinstance(method, (Global, Inert))]


def _call(function: Global, args: tuple[Node, ...]) -> Verdict:
    """What is known of a call, by what is called and what that is given."""
    today = _qualified(function)
    if today == "builtins.getattr":  # a method of an object, or what lies around its class
        plain = len(args) == 2 and type(args[1]) is str and not args[1].startswith("__")
        return Verdict.HARMLESS if plain else Verdict.DANGEROUS
    if today == "builtins.type":  # with three arguments, it makes a class
        return Verdict.HARMLESS if len(args) == 1 else Verdict.DANGEROUS
    if today in known.IMPORTING:
        module = args[0].partition(".")[0] if args and type(args[0]) is str else ""
        return Verdict.HARMLESS if module in ("numpy", "scipy") else Verdict.DANGEROUS
    if today in known.ACCESSORS:  # of a part of the program, or an object; it is not called yet
        return Verdict.DANGEROUS if any(type(it) is Global for it in args) else Verdict.HARMLESS
    verdict = judge(function, called=True)
    if today in known.CALLERS:
        return max([verdict, *map(_given, args)])
    return verdict


def _given(argument: Node) -> Verdict:
    """What is known of an argument of what calls its arguments."""
    if isinstance(argument, Inert) and type(argument.function) is Global:
        if argument.how in ("newobj", "newobj_ex"):
            return Verdict.HARMLESS  # an object of a class, which is judged by itself
        if _qualified(argument.function) in known.TYPES:
            return Verdict.HARMLESS
    return _called(argument) if isinstance(argument, (Inert, Global)) else Verdict.HARMLESS


def _called(function: Node) -> Verdict:
    """What is known of a call with arguments that are not known."""
    pending, verdict = [function], Verdict.HARMLESS
    for _ in range(_DEPTH):
        if not pending:
            return verdict
        one = pending.pop()
        if type(one) is Global:
            opens = _qualified(one) in known.ACCESSORS | known.IMPORTING
            verdict = max(verdict, Verdict.DANGEROUS if opens else judge(one, called=True))
        elif isinstance(one, Inert) and _is_partial(one):
            pending += one.args[:1]
            pending += one.state[:1] if isinstance(one.state, tuple) else ()
        else:
            return Verdict.DANGEROUS
    return Verdict.DANGEROUS


def _is_partial(node: Inert) -> bool:
    return (
        type(node.function) is Global
        and _qualified(node.function) in known.PARTIAL
        and isinstance(node.args, tuple)
    )


_DEPTH = 16
_ABSURD = Verdict.DANGEROUS


# --- names


def _qualified(name: Global) -> str:
    today = name.today
    return today if "." in today else f"builtins.{today}"


def _way_around(name: Global) -> Verdict:
    """What is known of a name between underscores: how objects are made is harmless."""
    if name.name in ("__newobj__", "__newobj_ex__"):
        return Verdict.HARMLESS
    cls, _, method = name.name.rpartition(".")
    return judge(Global(name.module, cls), called=False) if method == "__new__" else _ABSURD


def _is_data(today: str) -> bool:
    """Whether a name of Python's own library stands for data, or for what only computes."""
    module = today.rpartition(".")[0]
    while module and module not in known.OF_DATA:  # the class that a class or a method belongs to
        module = module.rpartition(".")[0]
    inside = today.removeprefix(f"{module}.").split(".")
    if not module or _reaches(inside):
        return False
    if all(map(_is_class, inside)):
        return True
    public = not inside[0].startswith("_")
    return module in known.COMPUTING and public and (len(inside) == 1 or inside[0] in known.PURE)


def _reaches(parts: list[str]) -> bool:
    """Whether a name leads through a module that does everything: `random._os.system`."""
    return any(part.lstrip("_") in known.REACHING for part in parts)


def _is_class(name: str) -> bool:
    """Whether a name is written as classes and constants are."""
    return name.lstrip("_")[:1].isupper()
