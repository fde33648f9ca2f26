"""Written zip archives, with Python's zipfile as the oracle."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes.copy import Sink
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource
from ckptfix.bytes.span import Span
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip import writer as zip_writer
from tests.formats.zip.test_archive import contents, summed

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from ckptfix.bytes.engine import Label


def written(path: Path, records: dict[str, list[Span | bytes]]) -> Path:
    with Place(path).publish() as sink:
        writer = zip_writer.Writer(sink)
        for name, parts in records.items():
            writer.add(name, parts)
        writer.finish()
    return path


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/\\"), min_size=1).map(
            str.casefold
        ),
        st.lists(st.binary(max_size=200), max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_zipfile_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, list[bytes]]
) -> None:
    path = tmp_path_factory.mktemp("zips") / "x.zip"
    written(path, {f"a/{name}": [*parts] for name, parts in records.items()})
    whole = {f"a/{name}": b"".join(parts) for name, parts in records.items()}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == whole
    again = zips.read(FileSource(path))
    assert contents(again) == summed(whole)
    assert {span.offset % 64 for span in again.spans.values()} == {0}


def test_the_crc_on_record_is_carried_and_others_are_computed(tmp_path: Path) -> None:
    big = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(big)
    source = FileSource(tmp_path / "source")
    carried = zlib.crc32(big[:100])
    records: dict[str, list[Span | bytes]] = {
        "a/carried": [Span(source, 0, 100, carried)],
        "a/big": [Span(source, 0, len(big))],
        "a/parts": [Span(source, 5, 2 << 20), b"between", Span(source, 0, 9, zlib.crc32(big[:9]))],
    }
    archive = zips.read(FileSource(written(tmp_path / "x.zip", records)))
    assert {name: span.crc for name, span in archive.spans.items()} == {
        "a/carried": carried,
        "a/big": zlib.crc32(big),
        "a/parts": zlib.crc32(big[5 : 5 + (2 << 20)] + b"between" + big[:9]),
    }


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    records: dict[str, list[Span | bytes]] = {f"a/{index}": [b""] for index in range(65_536)}
    path = written(tmp_path / "x.zip", records)
    assert list(zips.read(FileSource(path)).spans) == list(records)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == list(records)


class HoleSink(Sink):
    """Leaves a hole where a span would be copied, so that gigabytes cost nothing."""

    def copy(self, part: Span | bytes, label: Label = "") -> None:
        if isinstance(part, bytes):
            self.write(part)
            return
        self.flush()
        self._flushed += part.length
        os.lseek(self.descriptor, self._flushed, os.SEEK_SET)


def test_records_and_offsets_past_32_bits(tmp_path: Path) -> None:
    sizes = {"a/just under": 0xFFFFFFFE, "a/just over": 0xFFFFFFFF, "a/last": 1}
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 32)
    source, path = FileSource(tmp_path / "hole"), tmp_path / "x.zip"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    sink = HoleSink(descriptor, "x.zip")
    writer = zip_writer.Writer(sink)
    for name, size in sizes.items():
        writer.add(name, [Span(source, 0, size, crc=7)])
    writer.finish()
    sink.flush()
    os.close(descriptor)
    entries = zips.read(FileSource(path)).entries
    assert {entry.name: entry.size for entry in entries} == sizes
    with zipfile.ZipFile(path) as archive:
        found = {info.filename: (info.file_size, info.header_offset) for info in archive.infolist()}
    assert found == {entry.name: (entry.size, entry.header) for entry in entries}
    assert found["a/last"][1] > 0xFFFFFFFF
