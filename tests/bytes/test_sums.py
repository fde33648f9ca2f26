"""CRC-32 of stretches that are joined, with zlib as the oracle."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes.sums import joined


@given(st.lists(st.binary(max_size=300)))
def test_stretches_joined_have_the_crc_of_the_whole(parts: list[bytes]) -> None:
    total = 0
    for part in parts:
        total = joined(total, zlib.crc32(part), len(part))
    assert total == zlib.crc32(b"".join(parts))


@given(st.binary(max_size=50), st.integers(0, 1 << 22))
def test_a_long_stretch_follows_a_short_one(first: bytes, length: int) -> None:
    second = bytes(length)
    assert joined(zlib.crc32(first), zlib.crc32(second), length) == zlib.crc32(first + second)
