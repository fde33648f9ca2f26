"""Zip archives: Python's zipfile as the oracle, and archives about which readers disagree."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from ckptfix.bytes.source import BytesSource
from ckptfix.errors import DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.formats.zip import archive as zips
from ckptfix.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = {"a/data.pkl": b"tree" * 9, "a/data/0": bytes(range(256)), "a/empty": b"", "a/é": b"x"}


def pack(records: dict[str, bytes] = RECORDS, method: int = zipfile.ZIP_STORED) -> bytearray:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return bytearray(made.getvalue())


class Unseekable(io.RawIOBase):
    """A pipe, to which zipfile writes data descriptors, as torch does."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def streamed(records: dict[str, bytes] = RECORDS, method: int = zipfile.ZIP_STORED) -> bytearray:
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return pipe.data


def read(data: bytes | bytearray, limits: Limits | None = None) -> zips.Archive:
    return zips.read(BytesSource(bytes(data), "x.pt"), limits or Limits())


def contents(archive: zips.Archive) -> dict[str, tuple[bytes, int | None]]:
    return {name: (span.read(), span.crc) for name, span in archive.spans.items()}


def summed(records: dict[str, bytes]) -> dict[str, tuple[bytes, int]]:
    return {name: (data, zlib.crc32(data)) for name, data in records.items()}


def local_header(data: bytes | bytearray, index: int) -> int:
    return zipfile.ZipFile(io.BytesIO(data)).infolist()[index].header_offset


def central_header(data: bytes | bytearray, index: int) -> int:
    position = int.from_bytes(data[-6:-2], "little")
    for _ in range(index):
        position += 46 + sum(struct.unpack_from("<3H", data, position + 28))
    return position


def changed(data: bytearray, position: int, layout: str, value: Any) -> bytes:
    struct.pack_into(layout, data, position, value)
    return bytes(data)


# --- agreement with zipfile


def test_an_archive_of_nothing_holds_nothing() -> None:
    made = io.BytesIO()
    zipfile.ZipFile(made, "w").close()
    assert zips.read(BytesSource(made.getvalue())).spans == {}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_zipfile_writes(method: int) -> None:
    assert contents(read(pack(RECORDS, method))) == summed(RECORDS)


def test_reads_data_descriptors() -> None:
    data = streamed()
    assert data[6] & 8
    assert contents(read(data)) == summed(RECORDS)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("stated", [(22,), (18, 22), (14,), (14, 18, 22)])
def test_a_header_may_leave_some_of_its_numbers_to_the_descriptor(
    stated: tuple[int, ...], method: int
) -> None:
    data = streamed(method=method)  # macOS states the size alone
    for entry in zips.read_directory(bytes(data[data.find(b"PK\1\2") : -22]), len(RECORDS), ""):
        for field, number in ((14, entry.crc), (18, entry.packed), (22, entry.size)):
            if field in stated:
                struct.pack_into("<I", data, entry.header + field, number)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name: archive.read(name) for name in RECORDS} == RECORDS
    assert contents(read(data)) == summed(RECORDS)
    for field in set(stated) - {14}:  # what is stated has to be right all the same
        with pytest.raises(UnsafeError, match="disagree"):
            read(changed(bytearray(data), local_header(data, 0) + field, "<I", 5))


def test_leaves_out_entries_for_folders() -> None:
    data = pack({"a/": b"", "a/data.pkl": b"tree"})
    assert list(read(data).spans) == ["a/data.pkl"]


def test_accepts_a_comment_and_bytes_after_the_end() -> None:
    data = pack()
    with_comment = changed(data, len(data) - 2, "<H", 5) + b"hello"
    assert read(with_comment).end == len(with_comment)
    archive = read(with_comment + b"rubbish PK\x05\x06")
    assert contents(archive) == summed(RECORDS)
    assert archive.end == len(with_comment)


# --- archives about which readers disagree

LOCAL_FIELDS = {
    "method": (8, "<H", 8),
    "checksum": (14, "<I", 1),
    "packed size": (18, "<I", 3),
    "size": (22, "<I", 3),
    "name": (30, "<B", ord("b")),
    "encryption": (6, "<H", 1),
}


@pytest.mark.parametrize("field", LOCAL_FIELDS)
def test_header_and_directory_that_disagree_are_refused(field: str) -> None:
    data = pack()
    offset, layout, value = LOCAL_FIELDS[field]
    with pytest.raises(UnsafeError, match=r"disagree about 'a/data\.pkl'"):
        read(changed(data, local_header(data, 0) + offset, layout, value))


def test_sizes_in_64_bits_that_disagree_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a", "w", force_zip64=True) as file:
        file.write(b"12345678")
    data = bytearray(path.read_bytes())
    assert contents(read(data)) == summed({"a": b"12345678"})
    place = data.index(struct.pack("<QQ", 8, 8))
    with pytest.raises(UnsafeError, match="disagree about 'a'"):
        read(changed(data, place, "<Q", 5))


def test_names_that_are_there_twice_are_refused() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", b"one")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"two")
    with pytest.raises(UnsafeError, match=r"holds 'a/data.pkl' twice"):
        read(made.getvalue())


@pytest.mark.parametrize(("one", "other"), [("a/x", "a/X"), ("a/straße", "a/STRASSE")])
def test_names_that_differ_by_case_are_refused(one: str, other: str) -> None:
    with pytest.raises(UnsafeError, match="beside"):
        read(pack({one: b"1", other: b"2"}))


def test_a_name_that_zipfile_cuts_at_a_zero_byte_is_refused() -> None:
    data = bytes(pack({"a/data.pkl": b"1", "a/data.pkl?": b"2"})).replace(b"pkl?", b"pkl\0")
    assert zipfile.ZipFile(io.BytesIO(data)).infolist()[1].filename == "a/data.pkl"
    with pytest.raises(UnsafeError, match="zero byte"):
        read(data)


def moved(data: bytearray, start: int, count: int) -> bytes:
    """`data` with the places that its directory holds moved to suit `count` bytes at `start`."""
    entries = struct.unpack_from("<H", data, len(data) - 12)[0]
    for index in range(entries):
        place = central_header(data, index) + 42
        (offset,) = struct.unpack_from("<I", data, place)
        if offset >= start:
            struct.pack_into("<I", data, place, offset + count)
    (directory,) = struct.unpack_from("<I", data, len(data) - 6)
    struct.pack_into("<I", data, len(data) - 6, directory + count)
    return bytes(data[:start]) + b"?" * count + bytes(data[start:])


def test_bytes_before_the_archive_are_refused() -> None:
    with pytest.raises(UnsafeError, match="bytes"):
        read(moved(pack(), 0, 10))
    with pytest.raises(ReadError):
        read(b"?" * 10 + pack())


def test_bytes_between_records_are_refused() -> None:
    data = pack()
    with pytest.raises(UnsafeError, match="belong to no record"):
        read(moved(data, local_header(data, 1), 16))


def test_two_archives_in_one_file_are_refused() -> None:
    with pytest.raises(UnsafeError, match="before the archive or inside it"):
        read(pack() + pack({"b/data.pkl": b"other"}))


def test_records_that_overlap_are_refused() -> None:
    inner = bytes(pack({"b/inner": b"1234"}))
    data = pack({"a/outer": inner, "b/inner": b"1234"})
    place = central_header(data, 1) + 42
    with pytest.raises(UnsafeError, match="overlap"):
        read(changed(data, place, "<I", data.index(b"PK\x03\x04", 4)))


def test_a_record_that_only_the_local_headers_show_is_refused() -> None:
    data = pack()
    first, second = central_header(data, 0), central_header(data, 1)
    shorter = bytearray(data[:first] + data[second:])
    struct.pack_into("<2H", shorter, len(shorter) - 14, len(RECORDS) - 1, len(RECORDS) - 1)
    size = struct.unpack_from("<I", data, len(data) - 10)[0]
    struct.pack_into("<I", shorter, len(shorter) - 10, size - (second - first))
    with pytest.raises(UnsafeError, match="belong to no record"):
        read(shorter)


@pytest.mark.parametrize("count", [0, 3, 5, 0xFFFF])
def test_a_wrong_count_of_records_is_refused(count: int) -> None:
    data = pack()
    struct.pack_into("<2H", data, len(data) - 14, count, count)
    with pytest.raises(ReadError):
        read(data)


# --- what is not read, and what asks for too much


def test_encrypted_records_are_refused() -> None:
    data = pack()
    for place in (local_header(data, 0) + 6, central_header(data, 0) + 8):
        struct.pack_into("<H", data, place, 1)
    with pytest.raises(UnsupportedError, match=r"'a/data.pkl' is encrypted"):
        read(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused(method: int) -> None:
    with pytest.raises(UnsupportedError, match=f"packed with method {method}"):
        read(pack(RECORDS, method))


def test_archives_in_several_parts_are_refused() -> None:
    data = pack()
    with pytest.raises(UnsupportedError, match="one part of several"):
        read(changed(data, len(data) - 18, "<H", 1))


def test_a_record_in_another_part_is_refused() -> None:
    data = pack()
    moved_away = changed(data, central_header(data, 1) + 34, "<H", 1)
    with pytest.raises(UnsupportedError, match="another part of a divided archive"):
        read(moved_away)


@pytest.mark.parametrize("claimed", [1000, 3_000_000])
def test_a_bomb_unpacks_to_no_more_than_it_declares(claimed: int) -> None:
    data = pack({"a/bomb": bytes(2_000_000)}, zipfile.ZIP_DEFLATED)
    struct.pack_into("<I", data, local_header(data, 0) + 22, claimed)
    struct.pack_into("<I", data, central_header(data, 0) + 24, claimed)
    span = read(data).spans["a/bomb"]
    with pytest.raises(DamagedError, match=f"does not unpack to {claimed} bytes"):
        span.read()


def test_damaged_deflate_is_named_as_such() -> None:
    data = pack({"a/x": b"hello" * 99}, zipfile.ZIP_DEFLATED)
    data[33:43] = b"\xff" * 10
    with pytest.raises(DamagedError, match=r"x\.pt: "):
        read(data).spans["a/x"].read()


def test_more_records_than_the_limit_are_refused() -> None:
    with pytest.raises(UnsafeError, match="4 records"):
        read(pack(), Limits(records=3))


# --- damage


@pytest.mark.parametrize("make", [pack, streamed])
def test_cut_anywhere_it_is_refused(make: Any) -> None:
    data = bytes(make())
    for length in range(len(data)):
        with pytest.raises(ReadError):
            read(data[:length])


@pytest.mark.parametrize("mask", [0x01, 0x08, 0x80, 0xFF])
def test_one_damaged_byte_never_changes_what_is_read(mask: int) -> None:
    """It is refused, or stood where nothing depends on it; only data have to be summed."""
    data = pack()
    before = contents(read(data))
    inside = {
        place
        for span in read(data).spans.values()
        for place in range(span.offset, span.offset + span.length)
    }
    refused = 0
    for place in sorted(set(range(len(data))) - inside):
        damaged = bytes(data[:place]) + bytes([data[place] ^ mask]) + bytes(data[place + 1 :])
        try:
            assert contents(read(damaged)) == before, place
        except ReadError:
            refused += 1
    assert refused > len(data) // 3
