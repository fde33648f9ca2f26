"""Floating-point numbers as bits: which are NaN or infinite, and what a cast makes of them.

Everything here works on one block of bytes with numpy, which is imported by the functions: torch
takes a second to import, and numpy a tenth. Values are those that `Tensor.to` gives on the CPU: to
the nearest, ties to even, by way of float32 where one side has 16 or 8 bits. A NaN stays NaN; its
payload is nobody's business, and torch's own depends on the processor.

Sources: IEEE 754; "FP8 Formats for Deep Learning" (arXiv 2209.05433); "8-bit Numerical Formats for
Deep Neural Networks" (arXiv 2206.02915) for the types `fnuz`; the OCP Microscaling specification
for `e8m0fnu`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptfix.tree.dtypes import DType

    Array = NDArray[Any]


class Form(NamedTuple):
    """How the bits of a number are divided; one is a sign where there is one."""

    bits: int
    exponent: int
    mantissa: int
    bias: int
    infinite: int | None
    """The bits of +inf; None where there are no infinities."""
    first: int
    """Bits from which on, without the sign, a number is not finite."""
    overflow: int
    """The bits of what is too large."""
    signed_zero: bool = True
    """Whether there is -0; its bits stand for NaN where there is none."""


FORMS = {
    "float64": Form(64, 11, 52, 1023, 0x7FF << 52, 0x7FF << 52, 0x7FF << 52),
    "float32": Form(32, 8, 23, 127, 0x7F800000, 0x7F800000, 0x7F800000),
    "float16": Form(16, 5, 10, 15, 0x7C00, 0x7C00, 0x7C00),
    "bfloat16": Form(16, 8, 7, 127, 0x7F80, 0x7F80, 0x7F80),
    "float8_e5m2": Form(8, 5, 2, 15, 0x7C, 0x7C, 0x7C),
    "float8_e4m3fn": Form(8, 4, 3, 7, None, 0x7F, 0x7E),  # older versions of torch gave NaN
    "float8_e5m2fnuz": Form(8, 5, 2, 16, None, 0x80, 0x80, signed_zero=False),
    "float8_e4m3fnuz": Form(8, 4, 3, 8, None, 0x80, 0x80, signed_zero=False),
}
"""The types that have a sign, by name; `float8_e8m0fnu` is a power of two without one."""

_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}

PIECE = 1 << 18
"""Numbers to be cast together. A few arrays of them stay near the core; of fewer, each step is so
short that threads wait for the interpreter instead of each other's end."""


def part(dtype: DType) -> str | None:
    """The type of the real numbers that an element is made of; None where it is none of `FORMS`."""
    name = _COMPLEX.get(dtype.name, dtype.name)
    return name if name in FORMS or name == "float8_e8m0fnu" else None


def words(data: bytes | bytearray | memoryview, size: int, byteorder: str) -> Array:
    """Bytes as unsigned numbers of `size` bytes, in the byte order of this machine."""
    import numpy as np

    found = np.frombuffer(data, f"u{size}")
    return found if byteorder == sys.byteorder or size == 1 else found.byteswap()


# --- NaN and infinities


def is_finite(numbers: Array, name: str) -> bool:
    """Whether none of some numbers, as `words` gives them, is NaN or infinite.

    Two reductions and no array: as signed integers the positive numbers that are not finite are the
    largest of all, as unsigned ones the negative numbers are.
    """
    if not len(numbers):
        return True
    if name == "float8_e8m0fnu":
        return int(numbers.max()) < 0xFF
    form = FORMS[name]
    signed = numbers.view(f"i{numbers.itemsize}")
    if not form.signed_zero:
        return int(signed.min()) > -form.first
    sign = 1 << (form.bits - 1)
    return int(signed.max()) < form.first and int(numbers.max()) < sign + form.first


def count(numbers: Array, name: str) -> tuple[int, int]:
    """How many of some numbers are NaN, and how many infinite."""
    import numpy as np

    if is_finite(numbers, name):
        return 0, 0
    if name == "float8_e8m0fnu":
        return int(np.count_nonzero(numbers == 0xFF)), 0
    form = FORMS[name]
    if not form.signed_zero:
        return int(np.count_nonzero(numbers == form.first)), 0
    plain = numbers & numbers.dtype.type((1 << (form.bits - 1)) - 1)
    infinite = 0 if form.infinite is None else int(np.count_nonzero(plain == form.infinite))
    return int(np.count_nonzero(plain >= form.first)) - infinite, infinite


# --- casts


class Losses(NamedTuple):
    """How many values a cast could not keep."""

    overflow: int = 0
    """Beyond the range of the new dtype: infinite, NaN or its largest number now."""
    underflow: int = 0
    """Zero now, and not before."""
    nan: int = 0
    """NaN before; NaN now too."""

    def plus(self, other: Losses) -> Losses:
        """The sum of both."""
        return Losses(*(one + more for one, more in zip(self, other, strict=True)))


def cast(old: Array, new: Array, before: str, after: str) -> Losses:
    """Put numbers of one type into `new` as numbers of another, and say what that lost.

    Both are words, as `words` gives them. A few arrays of their size are made meanwhile: hand over
    no more than `PIECE` at a time where that matters.
    """
    if (before, after) == ("float32", "bfloat16") and _to_bfloat16(old, new):
        return _underflow(old, new, before, after)
    _fill(old, new, before, after)
    if after == "float64" or (after == "float32" and before != "float64"):
        return Losses(nan=count(old, before)[0])
    return _losses(old, new, before, after)


def _to_bfloat16(old: Array, new: Array) -> bool:
    """Round float32 to bfloat16, where none of it is near the end of the range; else False."""
    import numpy as np

    if not len(old):
        return True
    end = 0x7F7F8000  # from here on it rounds to infinity, or is NaN
    if int(old.view(np.int32).max()) >= end or int(old.max()) >= (1 << 31) + end:
        return False
    rounded = old >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += old
    new[:] = rounded.view(np.uint16)[1 if sys.byteorder == "little" else 0 :: 2]
    return True


def _fill(old: Array, new: Array, before: str, after: str) -> None:
    import numpy as np

    with np.errstate(all="ignore"):  # what is lost is counted
        if after == "float64":
            new[:] = _wide(old, before).astype(np.float64).view(np.uint64)
        elif after == "float32":
            new[:] = _wide(old, before).astype(np.float32).view(np.uint32)
        elif after == "float16":
            narrow = _wide(old, before).astype(np.float32).astype(np.float16)
            new[:] = narrow.view(np.uint16)
        else:
            _round(_wide(old, before).astype(np.float32, copy=False), new, FORMS[after])


def _wide(numbers: Array, name: str) -> Array:
    """The same values as float32, or as float64 where they are that."""
    import numpy as np

    if name in ("float64", "float32", "float16"):
        return numbers.view(f"f{numbers.itemsize}")
    if name == "bfloat16":
        wide: Array = numbers.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return _decoded(name)[numbers]


@lru_cache
def _decoded(name: str) -> Array:
    """The value of each of the 256 numbers of 8 bits."""
    import numpy as np

    if name == "float8_e8m0fnu":
        values = [2.0 ** (bits - 127) for bits in range(255)] + [float("nan")]
        return np.array(values, np.float32)
    form = FORMS[name]
    values = []
    for bits in range(256):
        plain, sign = bits & 0x7F, -1.0 if bits & 0x80 else 1.0
        if (bits if not form.signed_zero else plain) >= form.first and (
            form.signed_zero or bits == form.first
        ):
            values.append(sign * float("inf") if plain == form.infinite else float("nan"))
            continue
        exponent, mantissa = plain >> form.mantissa, plain & ((1 << form.mantissa) - 1)
        whole = mantissa + (1 << form.mantissa if exponent else 0)
        values.append(sign * whole * 2.0 ** (max(exponent, 1) - form.bias - form.mantissa))
    return np.array(values, np.float32)


def _round(values: Array, new: Array, form: Form) -> None:
    """Round float32 to a smaller form: to the nearest, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    plain = bits & np.uint32(0x7FFFFFFF)
    shift = 23 - form.mantissa
    rounded = plain >> np.uint32(shift)
    rounded &= np.uint32(1)
    rounded += plain
    rounded += np.uint32((1 << (shift - 1)) - 1)
    rounded >>= np.uint32(shift)
    made = rounded.astype(np.int64) - ((127 - form.bias) << form.mantissa)
    smallest = 2.0 ** (1 - form.bias)
    if form.bias < 127:  # below its smallest normal number the steps are all of one size
        tiny = np.abs(values) < np.float32(smallest)
        steps = np.abs(values[tiny]).astype(np.float64) * 2.0 ** (form.bias - 1 + form.mantissa)
        made[tiny] = np.rint(steps).astype(np.int64)
    last = form.first if form.signed_zero else 1 << (form.bits - 1)
    too_large = made >= last
    is_nan = plain > np.uint32(0x7F800000)
    sign = ((bits >> np.uint32(31)) << np.uint32(form.bits - 1)).astype(np.int64)
    if form.signed_zero:
        made[too_large] = form.overflow
        made[is_nan] = (1 << (form.bits - 1)) - 1
        made |= sign
    else:
        made = np.where(made == 0, 0, made | sign)
        made[too_large | is_nan] = form.overflow
    new[:] = made.astype(new.dtype)


def _losses(old: Array, new: Array, before: str, after: str) -> Losses:
    import numpy as np

    nan, infinite = count(old, before)
    if FORMS[after].infinite is None:
        overflow = int(np.count_nonzero(np.abs(_wide(old, before)) > _largest(after)))
    else:
        overflow = count(new, after)[1] - infinite
    return Losses(overflow, _underflow(old, new, before, after).underflow, nan)


def _largest(name: str) -> float:
    """The largest number that is finite."""
    return float(_decoded(name)[FORMS[name].first - 1])


def _underflow(old: Array, new: Array, before: str, after: str) -> Losses:
    zeros = _zeros(new, after)
    return Losses(0, zeros - _zeros(old, before) if zeros else 0, 0)


def _zeros(numbers: Array, name: str) -> int:
    """How many of some numbers are 0 or -0."""
    import numpy as np

    if name == "float8_e8m0fnu":
        return 0
    form = FORMS[name]
    if form.signed_zero:
        numbers = numbers & numbers.dtype.type((1 << (form.bits - 1)) - 1)
    return len(numbers) - int(np.count_nonzero(numbers))
