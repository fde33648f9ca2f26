"""One table of dtypes: torch's name, torch's storage class, safetensors' name, size.

Sources: `torch.storage._dtype_to_storage_type_map` and `torch.serialization` (which storage class a
dtype is saved as; dtypes without one are saved as `UntypedStorage` through `_rebuild_tensor_v3`),
and the `Dtype` enum of safetensors 0.8.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class DType(NamedTuple):
    """A dtype as torch and safetensors know it."""

    name: str
    """torch's name without `torch.`, such as `float32`."""
    itemsize: int
    """Bytes of one element."""
    storage: str | None
    """The class in `torch` that holds it, such as `FloatStorage`; None: untyped storage."""
    safetensors: str | None
    """safetensors' name, such as `F32`; None: safetensors cannot hold it."""
    packed: int = 1
    """Elements, as safetensors counts them, in one element as torch counts them."""

    @property
    def word(self) -> int:
        """Bytes of the numbers that an element is made of, for byte order: a complex one is two."""
        return self.itemsize // 2 if self.name.startswith("complex") else self.itemsize

    @property
    def is_floating_point(self) -> bool:
        """Whether a cast between this dtype and float32 means anything."""
        return self.name.startswith(("float", "bfloat")) and self.packed == 1

    def __str__(self) -> str:
        return self.name


_ROWS = (
    DType("float64", 8, "DoubleStorage", "F64"),
    DType("float32", 4, "FloatStorage", "F32"),
    DType("float16", 2, "HalfStorage", "F16"),
    DType("bfloat16", 2, "BFloat16Storage", "BF16"),
    DType("int64", 8, "LongStorage", "I64"),
    DType("int32", 4, "IntStorage", "I32"),
    DType("int16", 2, "ShortStorage", "I16"),
    DType("int8", 1, "CharStorage", "I8"),
    DType("uint8", 1, "ByteStorage", "U8"),
    DType("bool", 1, "BoolStorage", "BOOL"),
    DType("complex64", 8, "ComplexFloatStorage", "C64"),
    DType("complex128", 16, "ComplexDoubleStorage", None),
    DType("qint8", 1, "QInt8Storage", None),
    DType("quint8", 1, "QUInt8Storage", None),
    DType("qint32", 4, "QInt32Storage", None),
    DType("quint4x2", 1, "QUInt4x2Storage", None),
    DType("quint2x4", 1, "QUInt2x4Storage", None),
    DType("uint16", 2, None, "U16"),
    DType("uint32", 4, None, "U32"),
    DType("uint64", 8, None, "U64"),
    DType("complex32", 4, None, None),
    DType("float8_e4m3fn", 1, None, "F8_E4M3"),
    DType("float8_e5m2", 1, None, "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, None, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, None, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, None, "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1, None, "F4", packed=2),
    *(DType(f"{sign}int{bits}", 1, None, None) for sign in ("", "u") for bits in range(1, 8)),
    *(DType(f"bits{shape}", 1, None, None) for shape in ("8", "1x8", "2x4", "4x2")),
    DType("bits16", 2, None, None),
)

UNTYPED = DType("untyped", 1, "UntypedStorage", None)
"""Stands for raw bytes: the dtype of an `UntypedStorage`, of which no tensor is made directly."""

BY_NAME = {row.name: row for row in _ROWS}
BY_STORAGE = {row.storage: row for row in (*_ROWS, UNTYPED) if row.storage is not None}
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS if row.safetensors is not None}


def is_copied(found: str, wanted: str) -> bool:
    """Whether torch's `copy_` takes a dense tensor of one dtype into one of another."""
    if found.startswith(_BITS) or wanted.startswith(_BITS):
        return found == wanted
    return not (_BELOW_BYTES.match(found) or _BELOW_BYTES.match(wanted))


def cast_loss(found: str, wanted: str) -> str:
    """What a cast does to values beyond rounding them; empty where it does nothing."""
    before, after = _family(found), _family(wanted)
    if before == "complex" and after != "complex":
        return "the imaginary part goes"
    if after == "bool" and before != "bool":
        return "all but 0 becomes 1"
    if after == "int" and before == "float":
        return "what follows the point goes"
    if before == after == "int" and not _holds(wanted, found):
        return "numbers out of its range become others"
    return ""


_BITS = ("bits", "float4")
_BELOW_BYTES = re.compile(r"u?int[1-7]$")


def _family(name: str) -> str:
    return next((it for it in ("complex", "bool", "float") if it in name), "int")


def _holds(wide: str, narrow: str) -> bool:
    """Whether one whole-number dtype has all numbers of another."""
    signed, other = not wide.startswith("u"), not narrow.startswith("u")
    bits, needed = (int(re.sub(r"\D", "", name) or 0) for name in (wide, narrow))
    if signed == other:
        return bits >= needed
    return signed and bits > needed


def swap_bytes(data: bytearray, word: int) -> None:
    """Turn round the bytes of each number of `word` bytes, in place."""
    for byte in range(word // 2):
        other = word - 1 - byte
        data[byte::word], data[other::word] = data[other::word], data[byte::word]
