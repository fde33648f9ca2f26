"""Edits in place: what the copy would hold, in the old file, whatever happens meanwhile."""

from __future__ import annotations

import collections
import errno
import gzip
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import ckptfix
from ckptfix import door, pickles
from ckptfix.bytes import journal
from ckptfix.bytes.source import FileSource
from ckptfix.contents.state_dicts import choose_all
from ckptfix.edit import edits, inplace
from ckptfix.errors import (
    CkptfixError,
    InPlaceError,
    ReadError,
    RenameError,
    SelectionError,
    UnsafeError,
    UnsupportedError,
    VerifyError,
    WriteError,
)
from ckptfix.formats import patches
from ckptfix.formats.zip import archive as zips
from ckptfix.formats.zip import layout as zip_layout
from ckptfix.keys import wrappers
from ckptfix.tree import compare, walk
from ckptfix.tree.document import OrderedMap
from tests.conftest import CHECKPOINTS, FIXTURES, LEGACY, SAFETENSORS
from tests.oracles import ckptfix_command, done, unlike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptfix import Checkpoint
    from ckptfix.bytes.span import Span
    from ckptfix.tree.document import Document

FILES = [path for path in CHECKPOINTS if path not in LEGACY]
EDITS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "strip": lambda ckpt: ckpt.strip_prefix(),
    "cpu": lambda ckpt: ckpt.to_cpu(),
    "both": lambda ckpt: ckpt.strip_prefix().to_cpu(),
    "add": lambda ckpt: ckpt.add_prefix("m."),
    "same": lambda ckpt: ckpt,
}
MODES: tuple[dict[str, Any], ...] = (
    {"weights_only": True},
    {"weights_only": False},
    {"weights_only": True, "mmap": True},
)


@pytest.fixture
def ddp(tmp_path: Path) -> Path:
    """A copy of a checkpoint with prefixes, on a GPU."""
    return Path(shutil.copy(FIXTURES / "dataparallel_cuda.pt", tmp_path / "ddp.pt"))


def loaded(path: Path) -> list[Any]:
    """What torch or safetensors reads in each mode, or the class of the error."""
    if path.suffix == ".safetensors":
        return [safetensors.torch.load_file(path)]
    found = []
    for mode in MODES:
        try:
            found.append(torch.load(path, map_location="cpu", **mode))
        except Exception as error:  # noqa: BLE001 - whatever torch raises, it is to stay the same
            found.append(type(error))
    return found


def weights(path: Path, document: Document) -> list[bytes]:
    """The bytes of each storage of a document, as they lie in a file."""
    data = path.read_bytes()
    spans = [span for storage in walk.storages(document.root) for span in storage.spans]
    return [data[span.offset : span.offset + span.length] for span in spans]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_edit_in_place_gives_what_the_copy_holds(path: Path, how: str, tmp_path: Path) -> None:
    copy, file = tmp_path / f"copy{path.suffix}", tmp_path / path.name
    shutil.copy(path, file)
    opened = ckptfix.open(file)
    try:
        edited = EDITS[how](opened)
    except (RenameError, SelectionError, UnsupportedError):
        pytest.skip("the edit does not apply to this file")
    edited.save(copy)
    if how == "add" and path.suffix == ".safetensors":
        refused(edited, file, "its header would grow by")
        return
    edited.save_in_place()
    assert compare.difference(door.read(copy).root, door.read(file).root) is None
    assert unlike(loaded(copy), loaded(file)) is None
    assert file.stat().st_size == path.stat().st_size
    assert weights(path, opened.document) == weights(file, door.read(file))
    assert sorted(os.listdir(tmp_path)) == sorted([copy.name, file.name])
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


CORPUS = Path(__file__).parents[3] / "shared" / "corpus"


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not here")
@pytest.mark.parametrize("how", ["strip", "cpu"])
def test_real_checkpoints_too(how: str, tmp_path: Path) -> None:
    equal = 0
    for path in sorted(path for path in CORPUS.rglob("*") if path.is_file()):
        file = tmp_path / "file"
        copy = tmp_path / ("copy.safetensors" if path.suffix == ".safetensors" else "copy.pt")
        shutil.copy(path, file)
        try:
            edited = EDITS[how](ckptfix.open(file))
            edited.save(copy, force=True)
            edited.save_in_place()
        except CkptfixError:
            assert file.read_bytes() == path.read_bytes()
            continue
        assert compare.difference(door.read(copy).root, door.read(file).root) is None, path
        equal += 1
    assert equal > 20


def test_only_the_pickle_and_its_checksums_change(ddp: Path) -> None:
    before = ddp.read_bytes()
    span = pickle_of(ddp)
    ckptfix.open(ddp).strip_prefix().save_in_place()
    after = ddp.read_bytes()
    changed = [
        place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new
    ]
    rest = [place for place in changed if not span.offset <= place < span.offset + span.length]
    assert 4 <= len(rest) <= 8
    assert (
        zlib.crc32(after[span.offset : span.offset + span.length])
        == struct.unpack_from("<I", after, rest[0])[0]
    )


def test_there_and_back_again(ddp: Path) -> None:
    """What the stripping made room for is enough to add the prefix again."""
    before = loaded(ddp)
    ckptfix.open(ddp).strip_prefix().save_in_place()
    assert unlike(before, loaded(ddp)) is not None
    ckptfix.open(ddp).add_prefix().save_in_place()
    assert unlike(before, loaded(ddp)) is None


@pytest.mark.parametrize("shorter", range(1, 14))
def test_a_pickle_can_be_padded_by_any_number_of_bytes(shorter: int, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    ckptfix.save({"k" * 20: torch.arange(6.0).reshape(2, 3)}, file)  # a pickle without slack
    ckptfix.save(ckptfix.open(file), tmp_path / "b.pt")
    rename(file, "k" * shorter, "").save_in_place()
    for found in loaded(file):
        assert list(found) == ["k" * (20 - shorter)]
        assert torch.equal(found["k" * (20 - shorter)], torch.arange(6.0).reshape(2, 3))


def rename(file: Path, pattern: str, replacement: str) -> Checkpoint:
    document = door.read(file)
    (state,) = choose_all(document, ())
    renaming = wrappers.substitute_in_turn(state.mapping, [(f"^{pattern}", replacement)])
    return ckptfix.Checkpoint(edits.rename(document, [(state, renaming)]))


@pytest.mark.parametrize("length", range(40))
def test_padding_keeps_the_meaning_of_a_pickle(length: int) -> None:
    pickle, _ = pickles.write({"number": 7, "list": [1, 2]})
    new = patches.padded(pickle, len(pickle) + length)
    assert len(new) == len(pickle) + length
    assert new.endswith(b".")
    root, _ = pickles.read(new, lambda pid: pid, name="padded")
    assert root == {"number": 7, "list": [1, 2]}


def test_storages_keep_their_records_whatever_their_order(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    first, second = torch.arange(4.0), torch.arange(4.0) + 100
    torch.save({"module.a": first, "module.b": second}, file)
    document = door.read(file)
    turned = replace(document, root=dict(reversed(document.root.items())))
    inplace.apply(inplace.prepare(turned))
    ckptfix.open(file).strip_prefix().save_in_place()
    for found in loaded(file):
        assert list(found) == ["b", "a"]
        assert torch.equal(found["a"], first)
        assert torch.equal(found["b"], second)


# --- the checksums of zips


def pack(path: Path, records: dict[str, bytes], descriptor: int = 0, crcs: bool = True) -> None:
    """A zip with data descriptors of so many bytes after each record, or without."""
    flags, data, directory = (8 if descriptor else 0), bytearray(), bytearray()
    for name, content in records.items():
        label, crc, size = name.encode(), zlib.crc32(content) if crcs else 0, len(content)
        known = (0, 0, 0) if descriptor else (crc, size, size)
        directory += (
            zip_layout.CENTRAL.pack(
                b"PK\1\2",
                20,
                20,
                flags,
                0,
                0,
                33,
                crc,
                size,
                size,
                len(label),
                0,
                0,
                0,
                0,
                0,
                len(data),
            )
            + label
        )
        data += zip_layout.LOCAL.pack(b"PK\3\4", 20, flags, 0, 0, 33, *known, len(label), 0)
        data += label + content
        if descriptor:
            signature = b"PK\7\x08" if descriptor in (16, 24) else b""
            sizes = struct.pack("<2I" if descriptor < 20 else "<2Q", size, size)
            data += signature + struct.pack("<I", crc) + sizes
    end = zip_layout.END.pack(
        b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(data), 0
    )
    path.write_bytes(data + directory + end)


def pickle_of(path: Path) -> Span:
    spans = zips.read(FileSource(path)).spans
    return next(span for name, span in spans.items() if name.endswith("/data.pkl"))


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("first", ["data.pkl", "version"])
@pytest.mark.parametrize("descriptor", [0, 12, 16, 20, 24])
def test_the_checksum_is_mended_wherever_it_stands(descriptor: int, first: str, ddp: Path) -> None:
    records = records_of(ddp)
    order = sorted(records, key=lambda name: not name.endswith(first))
    pack(ddp, {name: records[name] for name in order}, descriptor)
    ckptfix.open(ddp).strip_prefix().save_in_place()
    after = ddp.read_bytes()
    pack(ddp, records_of(ddp), descriptor)
    assert after == ddp.read_bytes()


def test_an_entry_for_a_folder_behind_the_pickle_stays_as_it_is(ddp: Path) -> None:
    records = records_of(ddp)
    first = next(name for name in records if name.endswith("/data.pkl"))
    folder = {f"{first.removesuffix('data.pkl')}data/": b""}
    pack(ddp, {first: records.pop(first), **folder, **records})
    ckptfix.open(ddp).strip_prefix().save_in_place()
    after = ddp.read_bytes()
    pack(ddp, records_of(ddp))
    assert after == ddp.read_bytes()


def test_an_archive_without_checksums_stays_one(ddp: Path) -> None:
    pack(ddp, records_of(ddp), crcs=False)
    ckptfix.open(ddp).strip_prefix().save_in_place()
    assert not any(entry.crc for entry in zips.read(FileSource(ddp)).entries)
    assert [note.code for note in ckptfix.open(ddp).document.notes] == ["no-checksums"]
    assert next(iter(loaded(ddp)[0])).startswith("linears.")


def test_a_descriptor_that_contradicts_the_directory_is_refused(ddp: Path) -> None:
    pack(ddp, records_of(ddp), descriptor=16)
    span, data = pickle_of(ddp), bytearray(ddp.read_bytes())
    place = span.offset + span.length + 4
    data[place : place + 4] = b"????"
    ddp.write_bytes(data)
    with pytest.raises(UnsafeError, match="descriptor and directory"):
        ckptfix.open(ddp)


# --- what is refused


def refused(checkpoint: Checkpoint, path: Path, why: str) -> None:
    before, beside = path.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(InPlaceError, match=why):
        checkpoint.save_in_place()
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == beside


def test_containers_that_are_no_plain_torch_zip_or_safetensors_are_refused(ddp: Path) -> None:
    legacy = Path(shutil.copy(FIXTURES / "legacy_dataparallel_cuda.pt", ddp.parent / "legacy.pt"))
    refused(ckptfix.open(legacy).to_cpu(), legacy, "the form 'torch legacy'")
    packed = ddp.parent / "ddp.pt.gz"
    packed.write_bytes(gzip.compress(ddp.read_bytes()))
    refused(ckptfix.open(packed).to_cpu(), packed, "its tensors are compressed")
    script = ddp.parent / "script.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 3)).save(script)
    refused(ckptfix.open(script), script, "the form 'TorchScript zip'")


def test_compressed_records_are_refused(ddp: Path) -> None:
    records = records_of(ddp)
    for names, why in (
        ({name for name in records if name.endswith("/data.pkl")}, "its pickle is compressed"),
        (set(records), "its tensors are compressed"),
    ):
        with zipfile.ZipFile(ddp, "w") as archive:
            for name, data in records.items():
                kind = zipfile.ZIP_DEFLATED if name in names else zipfile.ZIP_STORED
                archive.writestr(name, data, kind)
        refused(ckptfix.open(ddp).to_cpu(), ddp, why)


def test_tensors_that_are_not_in_the_file_are_refused(ddp: Path) -> None:
    other = Path(shutil.copy(ddp, ddp.parent / "other.pt"))
    one, two = ckptfix.open(ddp).document, ckptfix.open(other).document
    mixed = ckptfix.Checkpoint(replace(one, root={"one": one.root, "two": two.root}))
    refused(mixed, ddp, "its tensors do not lie in one file")
    unpacked = ddp.parent / "unpacked"
    with zipfile.ZipFile(ddp) as archive:
        archive.extractall(unpacked)
    with pytest.raises(InPlaceError, match="its tensors do not lie in one file"):
        ckptfix.open(unpacked).to_cpu().save_in_place()
    first = dict(list(one.root.items())[:1])
    refused(ckptfix.Checkpoint(replace(one, root=first)), ddp, "would stay in the file")


def test_names_that_grow_are_refused(ddp: Path) -> None:
    refused(ckptfix.open(ddp).add_prefix("x" * 5000), ddp, r"its pickle would grow by \d+ bytes")
    file = Path(shutil.copy(FIXTURES / "plain.safetensors", ddp.parent))
    refused(ckptfix.open(file).add_prefix("x" * 5000), file, r"its header would grow by \d+ bytes")


def test_a_file_with_several_names_is_refused(ddp: Path) -> None:
    (ddp.parent / "backup.pt").hardlink_to(ddp)
    refused(ckptfix.open(ddp).to_cpu(), ddp, "several names")


def test_a_file_that_changed_since_it_was_read_is_refused(ddp: Path) -> None:
    checkpoint = ckptfix.open(ddp).strip_prefix()
    other = Path(shutil.copy(FIXTURES / "cuda.pt", ddp.parent / "other.pt"))
    os.replace(other, ddp)
    with pytest.raises(WriteError, match="was changed after it was read"):
        checkpoint.save_in_place()
    assert ddp.read_bytes() == (FIXTURES / "cuda.pt").read_bytes()


def test_an_edit_cannot_be_made_twice_over(ddp: Path) -> None:
    checkpoint = ckptfix.open(ddp)
    checkpoint.strip_prefix().save_in_place()
    with pytest.raises(WriteError, match="was changed after it was read"):
        checkpoint.to_cpu().save_in_place()


def test_what_does_not_read_back_is_put_back(ddp: Path) -> None:
    before = ddp.read_bytes()
    edit = inplace.prepare(ckptfix.open(ddp).strip_prefix().document)
    pickle = edit.patches[0]
    for wrong in (
        pickle.old,
        pickle.new.replace(b"linears.0", b"linears.9"),
        bytes(len(pickle.new)),
    ):
        broken = replace(edit, patches=[pickle._replace(new=wrong)])
        with pytest.raises(VerifyError, match="read"):
            inplace.apply(broken)
        assert ddp.read_bytes() == before
        edit = inplace.prepare(ckptfix.open(ddp).strip_prefix().document)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of somebody who may not do everything, which is who the test runs as."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() != 0:
            yield Path(folder)
            return
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions work otherwise there")
def test_a_read_only_file_or_folder_is_a_clear_error(ddp: Path, request: Any) -> None:
    old = ddp.read_bytes()
    ckptfix.open(ddp).to_cpu().save_in_place()  # imports what root alone might be able to read
    folder = request.getfixturevalue("unprivileged")
    file = folder / "a.pt"
    file.write_bytes(old)
    for locked in (file, folder):
        mode = locked.stat().st_mode
        locked.chmod(0o555)
        with pytest.raises(WriteError, match="cannot be changed in place: permission denied") as no:
            ckptfix.open(file).to_cpu().save_in_place()
        locked.chmod(mode)
        assert no.value.hint is not None
        assert f"chmod u+w {file}" in str(no.value.hint)
        assert (file.read_bytes(), os.listdir(folder)) == (old, ["a.pt"])
    (folder / "a.pt.ckptfix-journal").touch()
    file.chmod(0o444)
    with pytest.raises(ReadError, match="cannot be undone: permission denied"):
        ckptfix.open(file)


# --- safetensors


def test_ties_and_versions_are_renamed_in_the_header(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    weight = torch.arange(6.0)
    state = collections.OrderedDict({"module.embed": weight, "module.head": weight})
    state._metadata = {"": {"version": 1}, "module": {"version": 1}}  # type: ignore[attr-defined]
    ckptfix.save(state, file)
    ckptfix.open(file).strip_prefix().save_in_place()
    found = ckptfix.open(file).document
    assert list(found.root) == ["embed", "head"]
    assert found.root["embed"] is found.root["head"]
    assert found.root.metadata == {"": {"version": 1}}
    header, _ = json.JSONDecoder().raw_decode(file.read_bytes()[8:].decode("latin-1"))
    versions = header["__metadata__"].pop("ckptfix.module_versions")
    assert json.loads(versions) == {"": {"version": 1}}
    assert header["__metadata__"] == {"format": "pt", "head": "embed"}
    assert list(safetensors.torch.load_file(file)) == ["embed"]


@pytest.mark.parametrize("path", SAFETENSORS, ids=lambda path: path.name)
def test_the_data_of_a_safetensors_file_stays_where_it_is(path: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(path, tmp_path))
    rename(file, "(module.)?linears", "x").save_in_place()
    old, new = path.read_bytes(), file.read_bytes()
    start = 8 + int.from_bytes(old[:8], "little")
    assert (new[:8], new[start:]) == (old[:8], old[start:])
    assert sorted(safetensors.torch.load_file(file)) == ["x.0.weight", "x.1.weight", "x.2.weight"]


# --- what it costs


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Bytes of each call of os.write or os.pread from now on."""
    call, sizes = getattr(os, name), []

    def counting(descriptor: int, what: Any, *place: int) -> Any:
        sizes.append(what if isinstance(what, int) else len(what))
        return call(descriptor, what, *place)

    monkeypatch.setattr(os, name, counting)
    return sizes


def test_few_bytes_are_written(torch_zip_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    file = Path(shutil.copy(torch_zip_file, tmp_path))
    archive = zips.read(FileSource(file))
    checkpoint = ckptfix.open(file).to_cpu()
    written = counted(monkeypatch, "write")
    checkpoint.save_in_place()
    assert 0 < sum(written) <= 4 * (pickle_of(file).length + archive.end - archive.directory)


def test_the_weights_of_a_large_file_are_neither_read_nor_written(
    tmp_path: Path, monkeypatch: Any
) -> None:
    file, size = tmp_path / "large.pt", 64 << 20
    torch.save({"module.w": torch.zeros(1)}, tmp_path / "small.pt")
    pickle = records_of(tmp_path / "small.pt")["small/data.pkl"]
    numel = b"J" + struct.pack("<i", size // 4)
    pickle = pickle.replace(b"K\x01t", numel + b"t").replace(
        b"\0K\x01\x85", b"\0" + numel + b"\x85"
    )
    make_sparse(file, pickle, size)
    blocks = file.stat().st_blocks
    assert blocks * 512 < size // 8
    read = counted(monkeypatch, "pread")
    ckptfix.open(file).strip_prefix().save_in_place()
    assert sum(read) < 1 << 20
    assert file.stat().st_blocks <= blocks + 64
    assert torch.load(file, mmap=True)["w"].shape == (size // 4,)


def make_sparse(path: Path, pickle: bytes, size: int) -> None:
    """A torch zip of one storage of zeros that takes no room on the disk."""
    pack(path, {"a/data.pkl": pickle, "a/version": b"3\n", "a/data/0": b"0123"})
    data = bytearray(path.read_bytes())
    at = data.index(b"0123")
    crc = 0
    for _ in range(64):
        crc = zlib.crc32(bytes(size // 64), crc)
    header = data.rindex(b"PK\3\4")
    entry, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    for place in (header + 14, entry + 16):
        struct.pack_into("<3I", data, place, crc, size, size)
    (directory,) = struct.unpack_from("<I", data, end + 16)
    struct.pack_into("<I", data, end + 16, directory + size - 4)
    with path.open("wb") as file:
        file.write(data[:at])
        file.seek(size, os.SEEK_CUR)
        file.write(data[at + 4 :])


# --- whatever happens


@pytest.mark.parametrize("name", ["dataparallel_cuda.pt", "dataparallel.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_killed_at_any_write_it_is_the_old_file_or_the_new_one(
    name: str, share: float, tmp_path: Path
) -> None:
    file, old = tmp_path / name, (FIXTURES / name).read_bytes()
    file.write_bytes(old)
    done("strip-prefix", "--in-place", file)
    new = file.read_bytes()
    contents, notes, number = [], [], 0
    while True:
        number += 1
        file.write_bytes(old)
        ran = interrupted(number, share, "strip-prefix", "--in-place", file)
        if ran.returncode == 0:
            break
        assert ran.returncode == -signal.SIGKILL
        torn = file.read_bytes()
        codes = [note.code for note in ckptfix.open(file).document.notes]
        contents.append(file.read_bytes())
        notes.append("rolled-back" in codes)
        assert torn == contents[-1] or notes[-1]
        assert os.listdir(tmp_path) == [name]
    assert contents == [old] * (len(contents) - 1) + [new]
    assert notes == [True] * (len(notes) - 1) + [False]  # killed before the journal is gone


def interrupted(number: int, share: float, *arguments: str | Path) -> Any:
    command = [
        sys.executable,
        Path(__file__).parents[1] / "interrupt.py",
        number,
        share,
        *arguments,
    ]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)


def test_every_command_that_opens_the_file_undoes_the_edit(ddp: Path) -> None:
    old = ddp.read_bytes()
    assert interrupted(5, 0, "strip-prefix", "--in-place", ddp).returncode == -signal.SIGKILL
    torn, left = ddp.read_bytes(), Path(f"{ddp}.ckptfix-journal").read_bytes()
    assert torn != old
    out = ddp.parent / "out.pt"
    link = ddp.parent / "link.pt"
    link.symlink_to(ddp)
    for arguments in (
        ("check", ddp),
        ("check", FIXTURES / "cuda.pt", "--like", ddp),
        ("convert", ddp, out),
        ("to-cpu", out, ddp, "--force", "-n"),
        ("inspect", link),
        ("to-cpu", "--in-place", link),
    ):
        ddp.write_bytes(torn)
        Path(f"{ddp}.ckptfix-journal").write_bytes(left)
        ran = ckptfix_command(*arguments)
        if arguments[-1] != "-n":
            assert "an edit was interrupted; the file was put back as it was" in ran.stderr
            assert not Path(f"{ddp}.ckptfix-journal").exists()
    assert [*torch.load(ddp, weights_only=True)] == [*torch.load(out, map_location="cpu")]
    ddp.write_bytes(torn)
    Path(f"{ddp}.ckptfix-journal").write_bytes(left)
    assert [note.code for note in ckptfix.open(ddp).document.notes] == ["rolled-back"]
    assert ddp.read_bytes() == old
    assert ckptfix.open(ddp).document.notes == ()


def test_a_file_that_is_replaced_does_not_inherit_a_journal(ddp: Path) -> None:
    assert interrupted(5, 0, "strip-prefix", "--in-place", ddp).returncode == -signal.SIGKILL
    done("strip-prefix", FIXTURES / "dataparallel.pt", ddp, "--force")
    assert sorted(os.listdir(ddp.parent)) == ["ddp.pt"]
    assert ckptfix.open(ddp).document.notes == ()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_or_broken_leaves_the_file_as_it_was(
    code: int, ddp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, outcomes, messages, number = ddp.read_bytes(), [], set(), 0
    while "done" not in outcomes:
        number += 1
        checkpoint = ckptfix.open(ddp).strip_prefix()
        with monkeypatch.context() as patched:
            fail_from(patched, number, code)
            try:
                checkpoint.save_in_place()
                outcomes.append("done")
            except WriteError as error:
                outcomes.append("refused")
                messages.add(error.message)
        ckptfix.open(ddp)
        assert os.listdir(ddp.parent) == ["ddp.pt"]
        assert (ddp.read_bytes() == old) == (outcomes[-1] == "refused")
    assert outcomes == ["refused"] * (number - 1) + ["done"]
    assert number > 5
    reason = os.strerror(code).lower()
    assert messages == {f"{ddp}: cannot be changed in place: {reason}"}


def fail_from(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    """Every call that changes a disk fails, from the Nth on."""
    calls = 0

    def failing(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise OSError(code, os.strerror(code))
            return call(*arguments)

        return wrapped

    for name in ("write", "fsync", "unlink"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


def test_of_two_processes_the_second_is_refused(ddp: Path) -> None:
    old = ddp.read_bytes()
    with journal.locked(ddp):
        ran = ckptfix_command("strip-prefix", "--in-place", ddp)
    assert ran.returncode == 2
    assert "is being changed by another process" in ran.stderr
    assert ddp.read_bytes() == old
    done("strip-prefix", "--in-place", ddp)


def test_a_link_is_followed_and_stays(ddp: Path) -> None:
    link = ddp.parent / "link.pt"
    link.symlink_to("ddp.pt")
    done("to-cpu", "--in-place", link)
    assert link.is_symlink()
    assert not ddp.is_symlink()
    assert torch.load(ddp)["module.linears.0.weight"].device.type == "cpu"
    assert sorted(os.listdir(ddp.parent)) == ["ddp.pt", "link.pt"]


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["strip-prefix"], "linears.0.weight"),
        (["add-prefix", "--prefix", "x."], "x.module.linears.0.weight"),
        (["rename", "--sub", "linears", "l"], "module.l.0.weight"),
        (["to-cpu"], "module.linears.0.weight"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_the_command_says_what_it_changed(arguments: list[str], first: str, ddp: Path) -> None:
    old = ddp.read_bytes()
    said = done(*arguments, "--in-place", ddp, "--dry-run")
    assert f"would change {ddp} in place: 3 " in said
    assert ddp.read_bytes() == old
    said = done(*arguments, "--in-place", ddp)
    assert said.startswith(f"changed {ddp} in place: 3 ")
    assert next(iter(torch.load(ddp, map_location="cpu"))) == first


def test_either_an_output_or_in_place(ddp: Path) -> None:
    for arguments in ((ddp,), (ddp, ddp.parent / "o.pt", "--in-place")):
        ran = ckptfix_command("strip-prefix", *arguments)
        assert ran.returncode == 2
        assert "--in-place" in ran.stderr
        assert "hint: " in ran.stderr
    assert os.listdir(ddp.parent) == ["ddp.pt"]


def test_a_refusal_gives_the_command_that_writes_a_copy(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "legacy_dataparallel_cuda.pt", tmp_path / "old model.pt")
    ran = ckptfix_command("strip-prefix", "old model.pt", "--in-place", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    command = shlex.split(ran.stderr.split("write a copy: ")[1])
    assert command[0] == "ckptfix"
    done(*command[1:], cwd=tmp_path)
    assert "linears.0.weight" in torch.load(tmp_path / "old model.fixed.pt", map_location="cpu")


def test_storages_of_another_file_are_refused(ddp: Path) -> None:
    document = ckptfix.open(ddp).document
    for storage in walk.storages(document.root):
        storage.key = "none"
    with pytest.raises(InPlaceError, match="its tensors are not those of the file"):
        inplace.prepare(document)


def test_a_pickle_that_cannot_be_padded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.pt"
    torch.save({"w": torch.ones(2)}, path)
    document = ckptfix.open(path).document
    size = zips.read(FileSource(path)).spans["in/data.pkl"].length
    monkeypatch.setattr(pickles, "write", lambda root, own_keys: (b"N" * (size - 4) + b"0N.", []))
    with pytest.raises(InPlaceError, match="cannot be padded to its old length"):
        inplace.prepare(document)


def test_a_header_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(2, 2)}, path)
    document = ckptfix.open(path).document
    a, b = document.root["a"], document.root["b"]
    fewer = replace(document, root=OrderedMap([("a", a)]))
    with pytest.raises(InPlaceError, match="its tensors are not those of the file"):
        inplace.prepare(fewer)
    turned = OrderedMap([("a", a), ("b", replace(b, stride=(1, 2)))])
    with pytest.raises(InPlaceError, match="the bytes of 'b' would change"):
        inplace.prepare(replace(document, root=turned))
