"""What several test modules share: small readings, comparisons, pickles put together by hand."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ckptfix import pickles
from ckptfix.bytes.source import Source, too_short

if TYPE_CHECKING:
    from collections.abc import Iterator


def read(data: bytes, **options: Any) -> Any:
    """The tree of one pickle; persistent ids become `("pid", id)`."""
    return pickles.read(data, lambda pid: ("pid", pid), name="t.pkl", **options)[0]


def write(root: Any) -> bytes:
    """The pickle of a tree."""
    return pickles.write(root)[0]


def through(value: Any, protocol: int = 2) -> Any:
    """A value that went through Python's pickler, the reader, the writer, Python's unpickler."""
    return pickle.loads(write(read(pickle.dumps(value, protocol))))


def unmeasured() -> dict[str, str]:
    """The environment of a process whose lines are not counted: its children are cut off anyway,
    and counting would take the time that they may have."""
    return {name: text for name, text in os.environ.items() if not name.startswith("COV")}


@contextmanager
def peak_memory(most: int) -> Iterator[None]:
    """Fails where what runs inside takes more than `most` bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


class Computed(Source):
    """Bytes that are made when they are read; `made` has what was asked for, and by whom."""

    def __init__(self, data: bytes, size: int | None = None, name: str = "computed") -> None:
        self.name, self.size = name, len(data) if size is None else size
        self.made: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        self.made.append((offset, length))
        self.threads.add(threading.get_ident())
        data = self._data[offset : offset + length]
        if len(data) < length:
            raise too_short(self.name, offset, length)
        return data


def u4(number: int) -> bytes:
    return struct.pack("<I", number)


def u8(number: int) -> bytes:
    return struct.pack("<Q", number)


def laughs(levels: int, empty: bytes, pair: bytes) -> bytes:
    """Opcodes for `levels` containers, each holding the one before it twice: 2**levels leaves.

    `empty` makes the innermost; `pair` makes one of the two values on the stack, above a mark.
    """
    steps = [b"(h%ch%c" % (index, index) + pair + b"q%c" % (index + 1) for index in range(levels)]
    return empty + b"q\x00" + b"".join(steps)


class StandIn:
    """An object of any class, as Python's own machine would have built it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = super().__new__(cls)
        made.__dict__.update(args=args, kwargs=kwargs, state=None, items=[], pairs=[])
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = (state,)

    def __call__(self, *args: Any) -> Any:
        return named("call", "of")(self, *args)

    def append(self, item: Any) -> None:
        self.__dict__["items"].append(item)

    def extend(self, items: Any) -> None:
        self.__dict__["items"].extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["pairs"].append((key, value))


class _Named(type):
    """A class that holds whatever nested class it is asked for."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return named(cls.__module__, f"{cls.__qualname__}.{name}")


def named(module: str, name: str) -> type:
    """A stand-in for a class or function."""
    return _Named(name, (StandIn,), {"__module__": module, "__qualname__": name})


_PLAIN = {
    "collections.OrderedDict", "builtins.set", "builtins.frozenset", "builtins.bytearray",
    "builtins.bytes", "builtins.complex", "builtins.getattr", "_codecs.encode",
    "copyreg.__newobj_ex__",
}  # fmt: skip


class StandInUnpickler(pickle.Unpickler):
    """Python's machine with a stand-in for every class: an independent reading of a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if f"{module}.{name}" in _PLAIN:
            return super().find_class(module, name)
        return named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return named("persistent", "id")(pid)


def independent(data: bytes) -> Any:
    """What Python's own machine reads in a pickle, as text-like values that can be compared."""
    return comparable(StandInUnpickler(io.BytesIO(data), encoding="utf-8").load())


def comparable(value: Any) -> Any:
    """A value as nested tuples with types, bits of floats, order and sharing of objects."""
    return _Comparable().of(value)


class _Comparable:
    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []

    def of(self, value: Any) -> Any:
        kind = type(value).__name__
        if isinstance(value, float):
            return (kind, struct.pack(">d", value))
        if isinstance(value, complex):
            return (kind, self.of(value.real), self.of(value.imag))
        if isinstance(value, tuple):
            return (kind, *map(self.of, value))
        if isinstance(value, (set, frozenset)):
            return (kind, *sorted((self.of(item) for item in value), key=repr))
        if isinstance(value, type):
            return (kind, value.__module__, value.__qualname__)
        if isinstance(value, (list, dict, bytearray, StandIn)):
            return self.shared(value)
        return (kind, value)

    def shared(self, value: Any) -> Any:
        if id(value) in self.numbers:
            return ("again", self.numbers[id(value)])
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)
        kind = type(value).__name__
        if isinstance(value, dict):
            pairs = [(self.of(key), self.of(item)) for key, item in value.items()]
            return (
                kind,
                *pairs,
                *map(self.of, [vars(value)] if hasattr(value, "__dict__") else []),
            )
        if isinstance(value, StandIn):
            return (type(value).__module__, kind, *map(self.of, vars(value).values()))
        return (kind, bytes(value) if isinstance(value, bytearray) else [*map(self.of, value)])
