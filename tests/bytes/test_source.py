"""Where bytes lie: files, memory, computed and packed bytes, read exactly or refused."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from typing import TYPE_CHECKING

import pytest

from ckptfix.bytes.engine import crc32
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import (
    CHUNK,
    BytesSource,
    FileSource,
    LazySource,
    ReadAhead,
    Reader,
    Source,
)
from ckptfix.bytes.span import Span
from ckptfix.bytes.unpacked import InflatedSource, inflate
from ckptfix.errors import DamagedError, ReadError
from tests.helpers import peak_memory

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(range(256)) * 20


def deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


def span(data: bytes) -> Span:
    return Span(BytesSource(data, "packed.pt"), 0, len(data))


def sources(tmp_path: Path) -> dict[str, Source]:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return {
        "file": FileSource(path),
        "bytes": BytesSource(DATA),
        "inflated": InflatedSource(span(deflated(DATA)), len(DATA)),
    }


@pytest.mark.parametrize("kind", ["file", "bytes", "inflated"])
def test_sources_give_the_bytes_that_are_asked_for(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[kind]
    assert source.size == len(DATA)
    for offset, length in ((0, len(DATA)), (0, 0), (100, 300), (len(DATA) - 1, 1)):
        assert source.read(offset, length) == DATA[offset : offset + length]
    whole = Span(source, 0, source.size)
    assert whole.read() == b"".join(whole.chunks(1000)) == DATA
    reader = Reader(source)
    assert (reader.read(), reader.tell()) == (DATA, len(DATA))
    assert reader.seek(-4, os.SEEK_END) == len(DATA) - 4
    assert io.BufferedReader(reader).read() == DATA[-4:]


@pytest.mark.parametrize("kind", ["file", "bytes", "inflated"])
@pytest.mark.parametrize(("offset", "length"), [(0, 5121), (5120, 1), (1 << 40, 1), (0, 1 << 50)])
def test_bytes_past_the_end_are_an_error(
    kind: str, offset: int, length: int, tmp_path: Path
) -> None:
    with pytest.raises(DamagedError, match=f"ends before byte {offset + length}") as caught:
        sources(tmp_path)[kind].read(offset, length)
    assert caught.value.hint is not None


def test_a_file_cut_short_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(DATA)
    source = FileSource(path)
    os.truncate(path, 1000)
    assert source.read(0, 1000) == DATA[:1000]
    with pytest.raises(DamagedError, match=r"cut\.pt: ends before byte 1001"):
        source.read(0, 1001)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"none\.pt: no such file") as caught:
        FileSource(tmp_path / "none.pt")
    assert str(caught.value.hint) == f"see what is there: ls {tmp_path}"


def test_a_file_is_closed_with_its_source(tmp_path: Path) -> None:
    source = sources(tmp_path)["file"]
    descriptor = source.fileno()
    assert descriptor is not None
    os.fstat(descriptor)
    del source
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def test_slices_keep_a_crc_only_for_the_whole() -> None:
    whole = Span(BytesSource(DATA), 10, 100, crc=7)
    part = whole.slice(5, 20)
    assert (part.read(), part.crc) == (DATA[15:35], None)
    assert whole.slice(0, 100) is whole
    assert whole.slice(0, 99).crc is None
    assert (whole.unchecked().crc, whole.unchecked().read()) == (None, whole.read())
    assert part.slice(20, 0).read() == b""


# --- packed bytes


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 1])
def test_deflated_bytes_of_any_length(size: int) -> None:
    data = (DATA * (size // len(DATA) + 1))[:size]
    assert InflatedSource(span(deflated(data)), size).read(0, size) == data


@pytest.mark.parametrize("promised", [0, len(DATA) - 1, len(DATA) + 1])
def test_deflated_bytes_of_another_length_are_refused(promised: int) -> None:
    source = InflatedSource(span(deflated(DATA)), promised)
    with pytest.raises(DamagedError, match=r"packed\.pt: deflated data does not unpack to"):
        source.fileno()


def test_a_bomb_costs_no_more_than_it_promises() -> None:
    bomb = deflated(bytes(512 << 20))
    assert len(bomb) < 1 << 20
    source = InflatedSource(span(bomb), 1000)
    with peak_memory(8 << 20), pytest.raises(DamagedError, match="not unpack to 1000 bytes"):
        source.read(0, 1000)


def test_inflating_a_bomb_takes_little_memory_at_once() -> None:
    bomb = span(deflated(bytes(64 << 20)))
    assert max(map(len, inflate(bomb, -15))) <= CHUNK


@pytest.mark.parametrize("damage", ["cut", "flipped", "nothing at all"])
def test_damaged_deflated_bytes_are_refused(damage: str) -> None:
    packed = deflated(os.urandom(5000))
    changed = {
        "cut": packed[:-100],
        "flipped": b"\xff" + packed[1:],
        "nothing at all": b"",
    }[damage]
    source = InflatedSource(span(changed), 5000)
    with pytest.raises(DamagedError, match=r"packed\.pt: "):
        source.read(0, 5000)


def test_bytes_after_the_end_of_deflated_data_are_ignored() -> None:
    source = InflatedSource(span(deflated(DATA) + b"more"), len(DATA))
    assert source.read(0, len(DATA)) == DATA


@pytest.mark.parametrize("wbits", [-15, 31])
@pytest.mark.parametrize("surplus", [0, 1, 3, 100, 258])
@pytest.mark.parametrize("chunks", [1, 2, 5, 16])
def test_zeros_unpack_whole_where_little_follows_a_full_chunk(
    chunks: int, surplus: int, wbits: int
) -> None:
    size = chunks * CHUNK + surplus
    engine = zlib.compressobj(wbits=wbits)
    packed = engine.compress(bytes(size)) + engine.flush()
    assert sum(map(len, inflate(span(packed), wbits))) == size


def test_joined_gzip_files_unpack_as_one() -> None:
    packed = span(gzip.compress(DATA) + gzip.compress(b"more"))
    assert b"".join(inflate(packed, 31)) == DATA + b"more"
    with pytest.raises(DamagedError, match="cut short"):
        b"".join(inflate(span(gzip.compress(DATA)[:-3]), 31))


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_reading_ahead_gives_the_same_bytes_in_any_order(size: int) -> None:
    ahead = ReadAhead(BytesSource(DATA), size)
    for offset, length in ((0, 10), (10, 10), (5, 30), (4000, 200), (len(DATA) - 3, 3), (0, 1)):
        assert ahead.read(offset, length) == DATA[offset : offset + length]


def test_reading_ahead_stops_where_the_source_does() -> None:
    with pytest.raises(DamagedError):
        ReadAhead(BytesSource(DATA), 64).read(len(DATA) - 3, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_file_is_opened_when_its_bytes_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    before = open_files()
    source = FileSource(path)
    assert open_files() == before
    assert source.read(1, 2) == b"bc"
    assert open_files() == before + 1
    del source
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_was_replaced_before_it_was_opened_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"abc")
    other.write_bytes(b"xyz")
    source = FileSource(path)
    other.replace(path)
    with pytest.raises(ReadError, match="was replaced while it was read"):
        source.read(0, 3)


def test_a_record_is_looked_up_when_its_bytes_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    looked: list[int] = []

    def locate() -> tuple[Source, int]:
        looked.append(1)
        return FileSource(path), 100

    source = LazySource(50, locate, "record")
    span = Span(source, 10, 20)
    assert not looked
    assert span.read() == DATA[110:130]
    assert crc32([span]) == zlib.crc32(DATA[110:130])
    with Place(tmp_path / "out").publish() as sink:
        sink.copy(Span(LazySource(len(DATA) - 100, locate, "record"), 5, len(DATA) - 105))
    assert (tmp_path / "out").read_bytes() == DATA[105:]
    assert looked == [1, 1]
    with pytest.raises(DamagedError, match="record: ends before byte 51"):
        source.read(0, 51)
