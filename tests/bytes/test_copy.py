"""What a sink promises: bytes are checked while they are copied, and read back where asked."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from ckptfix.bytes.journal import Patch
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import BLOCK, BytesSource, FileSource
from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError, ReadError, VerifyError
from tests.helpers import Computed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptfix.bytes.copy import Sink

DATA = os.urandom(2 * BLOCK + 12_345)
SIZES = [1, 4096, 4097, 300_000, BLOCK, len(DATA)]
"""Each way of copying has its sizes: gathered, here, by a worker, by several."""


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    (tmp_path / "source").write_bytes(DATA)
    return FileSource(tmp_path / "source")


def record(source: FileSource, length: int, wrong: int = 0) -> Span:
    return Span(source, 3, length, zlib.crc32(DATA[3 : 3 + length]) ^ wrong)


@pytest.mark.parametrize("length", [size for size in SIZES if size < len(DATA)])
@pytest.mark.parametrize("how", ["copy", "copy_summed", "check"])
def test_bytes_are_held_against_the_checksum_on_record(
    source: FileSource, length: int, how: str, tmp_path: Path
) -> None:
    def act(sink: Sink, span: Span) -> None:
        if how == "check":
            sink.check(span, "'w'")
            sink.copy(span.slice(0, length - 1), "'w'")
        elif how == "copy":
            sink.copy(span, "'w'")
        else:
            assert sink.copy_summed([b"x", span], "'w'").value() == zlib.crc32(
                b"x" + DATA[3 : 3 + length]
            ) or (span.crc != zlib.crc32(DATA[3 : 3 + length]))

    with Place(tmp_path / "out").publish() as sink:
        act(sink, record(source, length))
    with (
        pytest.raises(DamagedError, match="source: the bytes of 'w' do not have") as caught,
        Place(tmp_path / "wrong").publish() as sink,
    ):
        act(sink, record(source, length, wrong=1))
    assert caught.value.code == "crc-mismatch"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_name_is_looked_for_only_where_bytes_are_wrong(
    source: FileSource, tmp_path: Path
) -> None:
    asked = []

    def label() -> str:
        asked.append(1)
        return "'the weight'"

    with Place(tmp_path / "out").publish() as sink:
        sink.copy(record(source, 5000), label)
    assert asked == []
    with (
        pytest.raises(DamagedError, match="the bytes of 'the weight' do not"),
        Place(tmp_path / "wrong").publish() as sink,
    ):
        sink.copy(record(source, 5000, wrong=1), label)


def test_a_sink_says_what_is_known_of_the_bytes(source: FileSource, tmp_path: Path) -> None:
    def result(*spans: Span, verify: bool = False) -> str:
        with Place(tmp_path / "out").publish(force=True, verify=verify) as sink:
            sink.write(b"head")
            for span in spans:
                sink.copy(span)
        return sink.result

    right, unknown = record(source, 70_000), Span(source, 0, 70_000)
    assert result() == result(right) == result(right, Span(source, 9, 0)) == "checked"
    assert result(unknown) == result(right, unknown) == "copied"
    assert result(right, verify=True) == result(unknown, verify=True) == "verified"


@pytest.mark.parametrize("change", ["written", "longer", "shorter"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    source: FileSource, change: str, tmp_path: Path
) -> None:
    def copied() -> None:
        with Place(tmp_path / "out").publish() as sink:
            sink.copy(Span(source, 0, BLOCK))
            if change == "written":
                with open(source.name, "r+b") as file:
                    file.write(b"other")
                os.utime(source.name, ns=(0, 0))
            else:
                os.truncate(source.name, source.size + 1 if change == "longer" else 7)
            sink.copy(Span(source, 0, 100))

    with pytest.raises(ReadError, match=r"changed while it was read|shorter|ends before") as caught:
        copied()
    assert caught.value.where == source.name
    assert not (tmp_path / "out").exists()


# --- read back


def small_spans(sink: Sink, source: FileSource) -> None:
    for place in range(99):
        sink.copy(Span(source, place, 50), "'w'")


PARTS: dict[str, Callable[[Sink, FileSource], object]] = {
    "bytes": lambda sink, _: sink.write(b"0123456789" * 100),
    "many bytes": lambda sink, _: sink.write(DATA),
    "small spans": small_spans,
    "a span": lambda sink, source: sink.copy(Span(source, 3, 100_000), "'w'"),
    "blocks": lambda sink, source: sink.copy(Span(source, 3, len(DATA) - 3), "'w'"),
    "summed": lambda sink, source: sink.copy_summed([Span(source, 3, BLOCK), b"more"], "'w'"),
    "computed": lambda sink, _: sink.copy(Span(Computed(DATA), 5, BLOCK + 9), "'w'"),
    "memory": lambda sink, _: sink.copy(Span(BytesSource(DATA), 5, 5000), "'w'"),
}


def write(sink: Sink, source: FileSource, part: str) -> None:
    sink.write(b"before")
    PARTS[part](sink, source)
    sink.write(b"after")
    end = sink.position
    sink.patch(Patch(2, b"fo", b"FO"))
    sink.patch(Patch(end - 3, b"ter", b"TER"))


@pytest.mark.parametrize("part", PARTS)
def test_what_is_read_back_as_it_was_written_is_verified(
    source: FileSource, part: str, tmp_path: Path
) -> None:
    told: list[int] = []
    with Place(tmp_path / "out").publish(verify=True, progress=told.append) as sink:
        write(sink, source, part)
    assert sink.result == "verified"
    with Place(tmp_path / "plain").publish() as sink:
        write(sink, source, part)
    found = (tmp_path / "out").read_bytes()
    assert found == (tmp_path / "plain").read_bytes()
    assert found[:6] == b"beFOre"
    assert sum(told) >= len(found)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_one_other_byte_anywhere_is_seen_by_reading_back(
    source: FileSource, part: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk does that keeps something else than it was given."""
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        place = int(share * (os.fstat(descriptor).st_size - 1))
        byte = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([byte[0] ^ 1]), place)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(VerifyError, match="out: reads back other bytes than were written"),
        Place(tmp_path / "out").publish(verify=True) as sink,
    ):
        write(sink, source, part)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("part", PARTS)
def test_a_system_that_writes_other_bytes_is_seen_by_reading_back(
    source: FileSource, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, place: int) -> int:
        other = bytearray(data)
        other[len(other) // 2] ^= len(other) > 500  # all but the patches
        return real(descriptor, other, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(VerifyError), Place(tmp_path / "out").publish(verify=True) as sink:
        write(sink, source, part)


def test_threads_end_with_the_sink(source: FileSource, tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    with Place(tmp_path / "out").publish() as sink:
        sink.copy(Span(source, 0, len(DATA)))
    assert threading.active_count() == before
