"""Which container a file is, and writing one: told by bytes, written by extension, read back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptfix import door, pickles
from ckptfix.bytes.source import BytesSource, FileSource
from ckptfix.bytes.span import Span
from ckptfix.errors import (
    DamagedError,
    OutputExistsError,
    ReadError,
    UnsupportedError,
    VerifyError,
    WriteError,
)
from ckptfix.formats import table
from ckptfix.formats.reading import Reading
from ckptfix.tree import compare, walk
from ckptfix.tree.document import OrderedMap, Storage, Tensor
from tests.helpers import Computed

if TYPE_CHECKING:
    from pathlib import Path

    from ckptfix.tree.document import Document


def small(folder: Path) -> Document:
    torch.save({"w": torch.arange(4.0), "epoch": 3}, folder / "small.pt")
    return door.read(folder / "small.pt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x", "x.txt"])
def test_the_extension_plays_no_part_in_reading(
    checkpoint: Path, name: str, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / name)
    meant, found = door.read(checkpoint), door.read(tmp_path / name)
    assert found.container == meant.container
    assert compare.difference(found.root, meant.root) is None


def test_any_source_is_read_as_a_file_is(checkpoint: Path) -> None:
    found = table.read(BytesSource(checkpoint.read_bytes(), "memory"), Reading())
    assert compare.difference(found.root, door.read(checkpoint).root) is None


def test_containers_of_the_fixtures(checkpoint: Path) -> None:
    """Their names say what they are."""
    if checkpoint.suffix == ".safetensors":
        meant = "safetensors"
    else:
        meant = "torch legacy" if checkpoint.name.startswith("legacy") else "torch zip"
    assert door.read(checkpoint).container == meant


def test_every_fixture_is_written_and_read_back_the_same(checkpoint: Path, tmp_path: Path) -> None:
    meant = door.read(checkpoint)
    door.write(meant, tmp_path / "out.pt")
    again = door.read(tmp_path / "out.pt")
    assert compare.difference(again.root, meant.root) is None
    assert [storage.spans[0].read() for storage in walk.storages(again.root)] == [
        b"".join(span.read() for span in storage.spans) for storage in walk.storages(meant.root)
    ]


def test_reading_never_changes_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.name
    shutil.copy(checkpoint, path)
    path.chmod(0o400)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    door.read(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert names(tmp_path) == [checkpoint.name]


@pytest.mark.parametrize("name", ["nothing.pt", "no/such/folder/x.pt", "n" * 300 + ".pt"])
def test_files_that_are_not_there_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ReadError) as caught:
        door.read(tmp_path / name)
    assert caught.value.message.startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "x.safetensors", "a.pth.tar"])
def test_the_one_checkpoint_in_a_folder_is_opened(name: str, tmp_path: Path) -> None:
    for other in ("config.json", "._model.pt", "train.log", "vocab.txt"):
        (tmp_path / other).write_text("{}")
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    assert list(door.read(tmp_path).root) == ["w"]
    assert list(door.salvage(tmp_path)[0].root) == ["w"]
    assert door.read(tmp_path).name == str(tmp_path / name)


@pytest.mark.parametrize("optimizer", ["adam_optimizer.pt", "a_optim.pth", "optimizer.bin"])
def test_several_in_a_folder_are_listed_the_model_before_its_optimizer(
    optimizer: str, tmp_path: Path
) -> None:
    for name in (optimizer, "model_final.pth", "rng_state.pth"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ReadError, match=rf"it holds model_final\.pth, {optimizer}") as caught:
        door.read(tmp_path)
    assert str(caught.value.hint).endswith("model_final.pth")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (".snapshot_metadata", "torchsnapshot"),
        ("saved_model.pb", "TensorFlow"),
        ("manifest.ocdbt", "Orbax"),
    ],
)
def test_folders_of_others_are_called_by_their_name(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=f"a folder of {what}"):
        door.read(tmp_path)


def test_one_shard_without_its_index_is_not_the_checkpoint_in_a_folder(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(DamagedError, match="no index"):
        door.read(tmp_path)


def test_folders_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="folder"):
        door.read(tmp_path)


# --- writing


@pytest.mark.parametrize("extension", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_torchs_extensions_give_a_zip(extension: str, tmp_path: Path) -> None:
    document = small(tmp_path)
    door.write(document, tmp_path / f"out{extension}")
    assert (tmp_path / f"out{extension}").read_bytes()[:4] == b"PK\x03\x04"


@pytest.mark.parametrize("name", ["out", "out.txt", "out.pt.gz", ".pt"])
def test_other_extensions_are_refused(name: str, tmp_path: Path) -> None:
    document = small(tmp_path)
    with pytest.raises(UnsupportedError, match="no container has the extension") as caught:
        door.write(document, tmp_path / name)
    assert ".safetensors" in str(caught.value.hint)
    assert names(tmp_path) == ["small.pt"]


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    document = small(tmp_path)
    out = tmp_path / "out.pt"
    out.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="is there already"):
        door.write(document, out)
    assert out.read_bytes() == b"old"
    door.write(document, out, force=True)
    assert compare.difference(door.read(out).root, document.root) is None
    assert names(tmp_path) == ["out.pt", "small.pt"]


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3 << 20, dtype=torch.uint8)}, tmp_path / "x.pt")
    counts: list[int] = []
    door.write(door.read(tmp_path / "x.pt"), tmp_path / "out.pt", progress=counts.append)
    assert sum(counts) == 3 << 20


def with_storage(document: Document, span: Span) -> Document:
    """The document with other bytes behind its only tensor."""
    old = document.root["w"]
    storage = Storage(old.storage.dtype, old.storage.numel, "cpu", (span,))
    tensor = Tensor(storage, old.dtype, old.shape, old.stride)
    return replace(document, root=OrderedMap({"w": tensor}))


def test_a_source_that_gives_too_few_bytes_leaves_nothing(tmp_path: Path) -> None:
    document = small(tmp_path)
    short = Computed(b"too short", 16)
    for name in ("out.pt", "out.safetensors"):
        with pytest.raises(DamagedError, match="computed: ends before byte 16"):
            door.write(with_storage(document, Span(short, 0, 16)), tmp_path / name)
    assert names(tmp_path) == ["small.pt"]


def test_a_source_that_became_shorter_leaves_nothing(tmp_path: Path) -> None:
    document = small(tmp_path)
    (tmp_path / "source").write_bytes(bytes(16))
    span = Span(FileSource(tmp_path / "source"), 0, 16, crc=0)
    (tmp_path / "source").write_bytes(bytes(7))
    with pytest.raises(DamagedError, match=r"shorter|ends before"):
        door.write(with_storage(document, span), tmp_path / "out.pt")
    assert names(tmp_path) == ["small.pt", "source"]


def test_an_output_that_does_not_read_back_as_meant_gets_no_name(tmp_path: Path) -> None:
    """Here: a tree that says more elements than its bytes are."""
    document = small(tmp_path)
    wrong = with_storage(document, Span(BytesSource(bytes(12)), 0, 12))
    with pytest.raises(VerifyError, match=r"out\.pt: does not read back"):
        door.write(wrong, tmp_path / "out.pt")
    assert names(tmp_path) == ["small.pt"]


def test_nodes_that_no_container_holds_leave_nothing(tmp_path: Path) -> None:
    document = small(tmp_path)
    strange: Any = object()
    with pytest.raises(UnsupportedError):
        door.write(replace(document, root={"w": strange}), tmp_path / "out.pt")
    assert names(tmp_path) == ["small.pt"]


def test_errors_of_writing_are_of_one_kind() -> None:
    assert issubclass(OutputExistsError, WriteError)
    assert issubclass(VerifyError, WriteError)


def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, written = small(tmp_path), pickles.write
    monkeypatch.setattr(pickles, "write", lambda root: written({**root, "epoch": 4}))
    with pytest.raises(VerifyError, match=r"out\.pt: reads back differently at /?epoch"):
        door.write(document, tmp_path / "out.pt")
    assert names(tmp_path) == ["small.pt"]
