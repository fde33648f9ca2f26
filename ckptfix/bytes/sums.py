"""CRC-32 of bytes that are summed in pieces: each piece alone, in any order, joined afterwards.

A CRC is a remainder of polynomials over GF(2), so that of two stretches in a row is that of the
first, multiplied by x to the power of the bits that follow, plus that of the second. Bits are
reflected as in zlib: the highest bit stands for 1. Source: zlib's `crc32_combine`.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def joined(first: int, second: int, length: int) -> int:
    """The CRC of two stretches in a row, the second of which has `length` bytes."""
    return _product(first, _power(8 * length)) ^ second if length else first


def _product(a: int, b: int) -> int:
    found = 0
    while a:
        if a & _ONE:
            found ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return found


@lru_cache(256)
def _power(exponent: int) -> int:
    """The power of x, by squaring."""
    if exponent < 2:
        return _ONE >> exponent
    half = _power(exponent // 2)
    square = _product(half, half)
    return _product(square, _ONE >> 1) if exponent % 2 else square
