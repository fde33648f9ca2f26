"""What a pickle does beside making its tree: calls whose result is dropped, values that are left.

Code is injected into a checkpoint by a call in front of it, whose result is taken off the stack, or
is left there below the checkpoint. An unpickler runs it, and what it makes is nowhere in the tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.findings import Finding
from ckptfix.pickles.allowed import is_allowed
from ckptfix.tree.document import Global, kind
from ckptfix.tree.dtypes import BY_STORAGE
from ckptfix.tree.walk import walk
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.pickles.machine import Machine, Stop
    from ckptfix.tree.document import Node


def beside(machine: Machine, stop: Stop) -> Iterator[Finding]:
    """What is worth knowing of a pickle that was read to its end, and does not show in its tree."""
    named = [name for name in machine.globals if not _is_understood(name, machine)]
    dropped = _not_in(stop.root, named) if named else []
    if dropped:
        names = listed([name.today for name in dropped])
        message = f"the pickle names {names}, and drops what comes of it: unpicklers run that"
        yield Finding("hidden-call", message)
    elif stop.left:
        left = f"{plural(len(stop.left), 'value')} ({listed(sorted(set(map(kind, stop.left))))})"
        yield Finding("left-on-stack", f"the pickle leaves {left} below the checkpoint")


def _is_understood(name: Global, machine: Machine) -> bool:
    """Whether the machine itself turns a name into something else, or torch lets it pass."""
    return name in machine.builders or name.name in BY_STORAGE or is_allowed(name)


def _not_in(root: Node, names: list[Global]) -> list[Global]:
    """The names that a tree does not hold; a class around another one is named with that."""
    held = {node for _, node in walk(root) if type(node) is Global}
    held |= {
        Global(inner.module, inner.name.rsplit(".", depth)[0])
        for inner in held
        for depth in range(1, inner.name.count(".") + 1)
    }
    return sorted(name for name in names if name not in held)
