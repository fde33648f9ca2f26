"""What the opcodes of a pickle act on: the stack, the marks, the memo, and the bytes themselves.

Every length is held against the bytes that remain. Calls become inert objects, apart from the few
that `builders` understand; names become `Global`s.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from ckptfix.errors import DamagedError, UnsafeError
from ckptfix.pickles.torch_objects import Builder, class_name, hashable
from ckptfix.tree.document import Global, How, Inert, Node

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Mapping

    from ckptfix.limits import Limits

    Data = bytes | mmap.mmap
    Persistent = Callable[[Node], Node]


class Stop(Exception):  # noqa: N818 - it is no error
    """Carries the result out of the loop."""

    def __init__(self, root: Node, position: int, left: list[Node]) -> None:
        self.root, self.position, self.left = root, position, left


class Machine:
    """The state that opcodes act on; `stack` is what lies above the topmost mark."""

    __slots__ = (
        "allowance", "builders", "data", "framed", "globals", "length", "limits", "marks", "memo",
        "persistent", "stack",
    )  # fmt: skip

    def __init__(
        self,
        data: Data,
        persistent: Persistent,
        limits: Limits,
        builders: Mapping[Global, Builder],
    ) -> None:
        self.builders = builders
        self.data = data
        self.length = len(data)
        self.persistent = persistent
        self.limits = limits
        self.stack: list[Node] = []
        self.marks: list[list[Node]] = []
        self.memo: dict[int, Node] = {}
        self.globals: dict[Global, Global] = {}
        self.framed = False
        self.allowance = repeat(None, limits.opcodes)
        """One for each opcode that may still come; running out of them is `too_long`."""

    def too_long(self) -> UnsafeError:
        """The error for a pickle of more opcodes than are read."""
        return UnsafeError(f"more than {self.limits.opcodes} opcodes")

    def pop_mark(self) -> list[Node]:
        """What lies above the topmost mark, taken off with it."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def take(self, position: int, length: int) -> bytes:
        """`length` bytes, if so many remain."""
        if not 0 <= length <= len(self.data) - position:
            raise DamagedError(f"{length} bytes are announced, {len(self.data) - position} remain")
        return self.data[position : position + length]

    def line(self, position: int) -> tuple[bytes, int]:
        """The bytes up to a newline, and the position after it."""
        end = self.data.find(b"\n", position)
        if end < 0:
            raise DamagedError("a line does not end")
        return self.data[position:end], end + 1

    def name(self, module: str, name: str) -> Global:
        """The one `Global` for a class or function of that name."""
        found = Global(module, name)
        known = self.globals.get(found)
        if known is None:
            known = self.globals[found] = class_name(module, name, self.limits)
        return known

    def call(self, function: Node, args: Node, how: How = "reduce", kwargs: Node = None) -> Node:
        """What stands for `function(*args)`: what a builder makes of it, or an inert object."""
        if type(args) is not tuple:
            raise DamagedError(f"a {type(args).__name__} stands for the arguments of a call")
        if how == "reduce" and type(function) is Global and function in self.builders:
            built = self.builders[function](args, self.limits)
            if built is not None:
                return built
        if not isinstance(function, (Global, Inert)):
            raise UnsafeError(f"a {type(function).__name__} is called")
        return Inert(function, args, kwargs, how)

    def check_key(self, key: Node) -> None:
        """Refuse a dict key that cannot be hashed, or not quickly."""
        if type(key) not in _SCALARS:
            hashable(key, self.limits)


_SCALARS = frozenset({str, int, float, bool, bytes, type(None), Inert, Global})
