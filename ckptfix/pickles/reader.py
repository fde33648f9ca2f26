"""Read a pickle into a tree, importing nothing.

Where Python's machine would look up a class or call something, this one makes an `Inert` object or
a `Global` and goes on (`opcodes`, `machine`); `torch_objects` lists the few calls it understands.
Memory stays in proportion to the pickle: the memo is a dict, nothing recurses.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ckptfix.errors import CkptfixError, DamagedError
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles.beside import beside
from ckptfix.pickles.machine import Machine, Stop
from ckptfix.pickles.opcodes import OPERATIONS, RETRY
from ckptfix.pickles.torch_objects import BUILDERS, Builder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.findings import Finding
    from ckptfix.pickles.machine import Data, Persistent
    from ckptfix.tree.document import Global, Node


def read(
    data: Data,
    persistent: Persistent,
    *,
    name: str,
    start: int = 0,
    limits: Limits = DEFAULT,
    builders: Mapping[Global, Builder] = BUILDERS,
    notes: list[Finding] | None = None,
    named: list[Global] | None = None,
) -> tuple[Node, int]:
    """Read one pickle from `data` at `start`; returns its tree and the position after its STOP.

    `persistent` turns a persistent id into a node, as torch uses them for storages. `builders` are
    the calls that are understood. `name` is what messages call the pickle. What the pickle does
    beside making its tree is put into `notes`, every class and function that it names into `named`.
    Raises `DamagedError` where the bytes are not a
    pickle or end too soon, and `UnsafeError` or `UnsupportedError` where they ask for what ckptfix
    refuses.
    """
    machine = Machine(data, persistent, limits, builders)
    position = start
    operations = OPERATIONS
    try:
        for _ in machine.allowance:
            position = operations[data[position]](machine, position + 1)
        raise machine.too_long()
    except Stop as stop:
        if notes is not None:
            notes += beside(machine, stop)
        if named is not None:
            named += machine.globals
        return stop.root, stop.position
    except CkptfixError as error:
        raise error.within(f"{name}: byte {position}") from None
    except IndexError:
        what = "the pickle ends too soon" if position >= len(data) - 16 else "stack underflow"
        raise DamagedError(what, where=f"{name}: byte {position}", hint=RETRY) from None
    except KeyError as error:
        what = f"nothing is memoized as {error}"
        raise DamagedError(what, where=f"{name}: byte {position}") from None
    except (ValueError, TypeError, struct.error) as error:
        raise DamagedError(str(error), where=f"{name}: byte {position}", hint=RETRY) from None
