"""torch's zip container: torch itself, zipfile and unzip as the oracles."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.bytes.source import BytesSource, FileSource
from ckptfix.bytes.span import Span
from ckptfix.errors import (
    DamagedError,
    NotACheckpointError,
    ReadError,
    UnsafeError,
    UnsupportedError,
)
from ckptfix.formats import table, torch_zip
from ckptfix.formats.reading import Reading
from ckptfix.formats.zip import archive as zips
from ckptfix.limits import Limits
from ckptfix.tree import compare
from ckptfix.tree.document import Document, OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_NAME
from tests.conftest import FIXTURES
from tests.formats.zip.test_writer import HoleSink
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UNLOADABLE = {"uninstalled_class.pt", "whole_module.pt"}  # their classes are nowhere


def saved(path: Path, value: Any = None) -> Path:
    if value is None:
        value = {"w": torch.arange(100.0), "b": torch.ones(3, dtype=torch.bfloat16), "epoch": 3}
    torch.save(value, path)
    return path


def rewritten(path: Path, out: Path) -> Path:
    door.write(door.read(path), out)
    return out


def repacked(
    path: Path, out: Path, records: dict[str, bytes | None], method: int = zipfile.ZIP_STORED
) -> Path:
    """`path` with some records replaced, added, or left out (None)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        whole = {name: old.read(name) for name in old.namelist()} | records
        for name, data in whole.items():
            if data is not None:
                new.writestr(name, data)
    return out


def codes(document: Document) -> list[str]:
    return [finding.code for finding in document.notes]


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, map_location="cpu", **options)


# --- what is written


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_same_from_what_is_written(
    torch_zip_file: Path, tmp_path: Path, mmap: bool
) -> None:
    out = rewritten(torch_zip_file, tmp_path / "out.pt")
    if torch_zip_file.name in UNLOADABLE:
        again = door.read(out).root
        assert compare.difference(door.read(torch_zip_file).root, again) is None
        return
    meant = load(torch_zip_file, weights_only=True)
    assert unlike(load(out, weights_only=True, mmap=mmap), meant) is None


def test_zip_tools_find_nothing_wrong_with_what_is_written(
    torch_zip_file: Path, tmp_path: Path
) -> None:
    out = rewritten(torch_zip_file, tmp_path / "out.pt")
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip") is None:
        pytest.skip("unzip is not installed")
    done = subprocess.run(["unzip", "-tq", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_record_is_aligned_to_64_bytes(torch_zip_file: Path, tmp_path: Path) -> None:
    archive = zips.read(FileSource(rewritten(torch_zip_file, tmp_path / "out.pt")))
    assert {span.offset % 64 for span in archive.spans.values()} == {0}


def test_equal_documents_give_equal_bytes(torch_zip_file: Path, tmp_path: Path) -> None:
    first = rewritten(torch_zip_file, tmp_path / "1.pt").read_bytes()
    assert rewritten(torch_zip_file, tmp_path / "2.pt").read_bytes() == first
    assert rewritten(tmp_path / "1.pt", tmp_path / "3.pt").read_bytes() == first


def test_name_of_the_archive_and_further_records_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path / "odd name.pt")
    extras: dict[str, bytes | None] = {
        "odd name/extra/notes.txt": b"hello",
        "odd name/.hidden": b"",
    }
    out = rewritten(repacked(path, tmp_path / "more.pt", extras), tmp_path / "out.pt")
    with zipfile.ZipFile(out) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"odd name"}
        assert {name: archive.read(name) for name in extras} == extras
    assert unlike(load(out), load(path)) is None


def test_big_endian_files_stay_big_endian(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    big = repacked(path, tmp_path / "big.pt", {"x/byteorder": b"big"})
    out = rewritten(big, tmp_path / "out.pt")
    assert door.read(out).byteorder == "big"
    assert unlike(load(out), load(big)) is None


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    path = saved(tmp_path / "x.pt", {"all": base, "turned": base.T, "row": base[1], "same": base})
    found = load(rewritten(path, tmp_path / "out.pt"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert found["turned"].stride() == (1, 4)
    assert found["row"].storage_offset() == 4


# torch makes no plain tensors of the others: quantized ones, raw bits, less than a byte
DTYPES = [name for name in BY_NAME if not re.match(r"q|bits|u?int[1-7]$", name)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_keeps_its_bits(name: str, tmp_path: Path) -> None:
    storage = torch.arange(256, dtype=torch.uint8).untyped_storage()
    value = torch.empty(0, dtype=getattr(torch, name)).set_(storage)
    path = saved(tmp_path / "x.pt", [value.as_strided([256 // value.itemsize], [1])])
    found = load(rewritten(path, tmp_path / "out.pt"))[0]
    assert (found.dtype, found.shape) == (value.dtype, (256 // value.itemsize,))
    assert bytes(found.untyped_storage()) == bytes(range(256))


def test_storages_past_4_gib_are_memory_mapped_by_torch(tmp_path: Path) -> None:
    """A sparse file: torch finds the few bytes behind gigabytes of zeros."""
    size = (1 << 32) + 64
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", size)
    huge = flat("uint8", size, Span(FileSource(tmp_path / "hole"), 0, size, 0))
    small = flat("int32", 2, Span(BytesSource(b"\1\0\0\0\2\0\0\0"), 0, 8))
    descriptor = os.open(tmp_path / "x.pt", os.O_RDWR | os.O_CREAT)
    sink = HoleSink(descriptor, "x.pt")
    torch_zip.write(Document(OrderedMap({"huge": huge, "small": small}), "memory"), sink)
    sink.flush()
    os.close(descriptor)
    (tmp_path / "hole").unlink()
    found = torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)
    assert found["huge"].shape == (size,)
    assert found["small"].tolist() == [1, 2]
    document = door.read(tmp_path / "x.pt")
    assert document.root["small"].storage.spans[0].offset > 1 << 32


def flat(dtype: str, numel: int, span: Span) -> Tensor:
    storage = Storage(BY_NAME[dtype], numel, "cpu", (span,))
    return Tensor(storage, BY_NAME[dtype], (numel,), contiguous_stride((numel,)))


# --- what is read


def test_deflated_archives_are_read(torch_zip_file: Path, tmp_path: Path) -> None:
    path = repacked(torch_zip_file, tmp_path / "x.pt", {}, zipfile.ZIP_DEFLATED)
    out = rewritten(path, tmp_path / "out.pt")
    assert out.read_bytes() == rewritten(torch_zip_file, tmp_path / "plain.pt").read_bytes()


def test_archives_without_a_folder_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "flat.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name.partition("/")[2], old.read(name))
    assert unlike(load(rewritten(tmp_path / "flat.pt", tmp_path / "out.pt")), load(path)) is None


def test_files_saved_without_checksums_get_them(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    document = door.read(path)
    assert codes(document) == ["no-checksums"]
    door.write(document, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
    assert codes(door.read(tmp_path / "out.pt")) == []


def script(path: Path) -> Path:
    """A TorchScript archive."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.jit.script(model).save(str(path))
    return path


def of_2019(path: Path, out: Path, sixth: bytes = b"N") -> Path:
    """TorchScript as PyTorch 1.2 to 1.4 wrote it: its persistent ids have a sixth part."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        pickle = archive.read(name)
    assert pickle.count(b"tQ") > 4
    return repacked(path, out, {name: pickle.replace(b"tQ", sixth + b"tQ")})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_of_2019_is_read(tmp_path: Path) -> None:
    path = of_2019(script(tmp_path / "script.pt"), tmp_path / "old.pt")
    ckptfix.open(path).save(tmp_path / "new.pt")
    wanted = torch.jit.load(str(path)).state_dict()
    written = torch.jit.load(str(tmp_path / "new.pt")).state_dict()
    found = ckptfix.load_state_dict(path)
    assert len(wanted) == 7
    assert list(found) == list(wanted) == list(written)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_another_sixth_part_of_a_persistent_id_is_refused(tmp_path: Path) -> None:
    path = of_2019(script(tmp_path / "script.pt"), tmp_path / "old.pt", b"K\x01")
    with pytest.raises(UnsupportedError, match="persistent id"):
        door.read(path)


def test_further_records_without_checksums_get_them_too(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "x.pt"), tmp_path / "more.pt", {"x/extra": b"hello"})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            data[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
        place = archive.start_dir
    while data[place : place + 4] == b"PK\x01\x02":
        data[place + 16 : place + 20] = bytes(4)
        place += 46 + sum(int.from_bytes(data[place + at : place + at + 2], "little")
                          for at in (28, 30, 32))  # fmt: skip
    path.write_bytes(data)
    with zipfile.ZipFile(rewritten(path, tmp_path / "out.pt")) as archive:
        assert archive.testzip() is None


def test_bytes_after_the_archive_are_reported_and_left_behind(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    with path.open("ab") as file:
        file.write(b"trailing")
    document = door.read(path)
    assert codes(document) == ["trailing-bytes"]
    assert "8 bytes" in document.notes[0].message
    door.write(document, tmp_path / "out.pt")
    assert b"trailing" not in (tmp_path / "out.pt").read_bytes()


def test_records_that_nothing_refers_to_do_no_harm(tmp_path: Path) -> None:
    """A storage of an earlier save, whose name is that of a storage in what is written."""
    value = {"a": torch.zeros(4), "b": torch.ones(4)}
    path = saved(tmp_path / "x.pt", value)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("x/data.pkl")
    only_b = pickled.replace(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x001q")
    assert only_b != pickled
    orphaned = repacked(path, tmp_path / "o.pt", {"x/data.pkl": only_b})
    document = door.read(orphaned)
    assert codes(document) == ["unused-records"]
    assert "1 records of 16 bytes" in document.notes[0].message
    found = load(rewritten(orphaned, tmp_path / "out.pt"))
    assert found["a"].tolist() == [1, 1, 1, 1]


# --- what is refused


def missing_storage(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data/0": None})


def short_storage(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data/0": bytes(399)})


def long_storage(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data/0": bytes(404)})


def no_pickle(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data.pkl": None})


def two_pickles(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data.pkl": None, "y/data.pkl": b"N.", "z/data.pkl": b"N."})


def no_byteorder(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/byteorder": b"middle"})


def inside_and_outside(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/notes": b"one", "notes": b"two"})


def cut_pickle(path: Path, out: Path) -> Path:
    return repacked(path, out, {"x/data.pkl": b"\x80\x02}("})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (missing_storage, DamagedError, "lacks 'x/data/0'"),
        (short_storage, UnsafeError, "399 bytes where 100 elements of float32 take 400"),
        (long_storage, UnsafeError, "404 bytes where 100 elements of float32 take 400"),
        (no_pickle, NotACheckpointError, "without a checkpoint"),
        (two_pickles, ReadError, "2 checkpoints"),
        (no_byteorder, UnsupportedError, "byte order b'middle'"),
        (cut_pickle, DamagedError, "the pickle ends too soon"),
        (inside_and_outside, UnsafeError, "inside 'x/' and outside"),
    ],
)
def test_archives_that_are_not_whole_are_refused(
    change: Callable[[Path, Path], Path], error: type[ReadError], words: str, tmp_path: Path
) -> None:
    path = change(saved(tmp_path / "x.pt"), tmp_path / "changed.pt")
    with pytest.raises(error, match=words) as caught:
        door.read(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_a_pickle_larger_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnsafeError, match="its pickle has"):
        door.read(saved(tmp_path / "x.pt"), Limits(pickle_bytes=20))


def test_a_deflated_storage_that_is_too_large_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    bomb = repacked(
        saved(tmp_path / "x.pt"), tmp_path / "b.pt", {"x/data/0": bytes(50 << 20)}, 8
    )  # fmt: skip
    with pytest.raises(UnsafeError, match="52428800 bytes where 100 elements"):
        door.read(bomb)


def damaged(data: bytes, place: int, mask: int) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def test_a_damaged_pickle_is_told_by_its_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt")
    data = path.read_bytes()
    path.write_bytes(damaged(data, data.index(b"epoch"), 0x01))
    with pytest.raises(DamagedError, match=r"data\.pkl"):
        door.read(path)


def test_damaged_weights_are_not_written_where_no_checksum_would_tell(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.arange(100.0)})
    data = path.read_bytes()
    place = data.index(torch.arange(100.0).numpy().tobytes())
    path.write_bytes(damaged(data, place + 40, 0x10))
    from ckptfix import api

    with pytest.raises(DamagedError, match="'w'"):
        api.open(path).save(tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path / "x.pt").read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(ReadError) as caught:
            table.read(BytesSource(data[:length], "x.pt"), Reading())
        assert caught.value.message.startswith("x.pt: ")


def test_one_damaged_byte_never_changes_the_tree(tmp_path: Path) -> None:
    """Outside the data of storages, which nobody reads: refused, or read as before."""
    data = saved(tmp_path / "x.pt").read_bytes()
    before = table.read(BytesSource(data, "x.pt"), Reading())
    archive = zips.read(BytesSource(data))
    weights = [span for name, span in archive.spans.items() if "/data/" in name]
    inside = {at for span in weights for at in range(span.offset, span.offset + span.length)}
    chance, refused = random.Random(2), 0
    for place in sorted(set(range(len(data))) - inside):
        try:
            flipped = damaged(data, place, 1 << chance.randrange(8))
            found = table.read(BytesSource(flipped, "x.pt"), Reading())
        except ReadError:
            refused += 1
        else:
            assert layout(found.root) == layout(before.root), place
    assert refused > len(data) // 4


def layout(root: Any) -> list[Any]:
    """Keys, tensors and where their bytes lie; checksums are held against them elsewhere."""
    return [
        (key, value.dtype, value.shape, value.storage.spans[0][1:3])
        if isinstance(value, Tensor)
        else (key, value)
        for key, value in root.items()
    ]


def test_what_is_not_torchs_is_named(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("letter/document.xml", "<xml/>")
    (tmp_path / "letter.pt").write_bytes(made.getvalue())
    with pytest.raises(NotACheckpointError, match=r"no data\.pkl in it") as caught:
        door.read(tmp_path / "letter.pt")
    assert caught.value.hint is not None
    assert "unzip -l" in str(caught.value.hint)


def test_a_pickle_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeError, match=r"its pickle has \d+ bytes"):
        door.read(saved(tmp_path / "in.pt"), Limits(pickle_bytes=20))


def test_a_storage_that_is_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", {"a": torch.ones(2), "b": torch.zeros(4)})
    with zipfile.ZipFile(path) as archive:
        pickle = archive.read("in/data.pkl")
    key = b"X\x01\x00\x00\x00%d"
    assert pickle.count(key % 1) == 1
    out = repacked(path, tmp_path / "out.pt", {"in/data.pkl": pickle.replace(key % 1, key % 0)})
    with pytest.raises(UnsafeError, match="'0' is described in two ways"):
        door.read(out)


def test_records_that_are_lost_are_a_difference(tmp_path: Path) -> None:
    document = door.read(saved(tmp_path / "in.pt"))
    more = replace(document, extras={"notes": Span(BytesSource(b"text"), 0, 4)})
    assert torch_zip.difference(document, document) is None
    assert torch_zip.difference(more, document) == "its further records"


# --- archives that someone packed


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["cpu/", "other/", ""])
def test_a_zip_that_was_packed_again(tmp_path: Path, top: str, method: int) -> None:
    path = tmp_path / "again.pt"
    wanted = torch.load(FIXTURES / "cpu.pt")["linears.0.weight"]
    with zipfile.ZipFile(FIXTURES / "cpu.pt") as old, zipfile.ZipFile(path, "w", method) as new:
        for folder in filter(None, (top, f"{top}data/")):
            new.writestr(folder, b"")
        for name in old.namelist():
            new.writestr(top + name.removeprefix("cpu/"), old.read(name))
    assert torch.equal(ckptfix.load_state_dict(path)["linears.0.weight"], wanted)
    ckptfix.open(path).save(tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt", mmap=True)["linears.0.weight"], wanted)


def test_a_plain_zip_is_no_checkpoint(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    with pytest.raises(NotACheckpointError, match=r"no data\.pkl"):
        door.read(tmp_path / "x.zip")
