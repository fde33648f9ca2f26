"""What a `.metadata` says, and what it costs to read one that says little in a roundabout way."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckptfix
from ckptfix.bytes.source import FileSource
from ckptfix.errors import CkptfixError
from ckptfix.layouts import dcp_metadata
from ckptfix.pieces import boxes
from tests.dcp_folders import edit, same, save
from tests.sharded import ckptfix_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MANY = 30_000


def read(metadata: Any, folder: Path) -> dcp_metadata.Metadata:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return dcp_metadata.read(FileSource(folder / ".metadata"))


def whole(shape: Any, chunks: Any) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(torch.float32), shape, chunks)


@pytest.mark.parametrize("number", [MANY, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_chunks_are_read_and_proved(tmp_path: Path, number: int) -> None:
    one = torch.Size((1,))
    chunks = [ChunkStorageMetadata(torch.Size((at,)), one) for at in range(number)]
    places = {
        MetadataIndex("w", (at,)): _StorageInfo("__0_0.distcp", at, 1) for at in range(number)
    }
    size = torch.Size((number,))
    found = read(Metadata({"w": whole(size, chunks)}, None, places), tmp_path)
    told = found.wholes["w"]
    assert told is not None
    boxes.check(told.shape, told.boxes)
    assert len(found.items) == number


def shared_chunks() -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))] * MANY
    return Metadata({f"w{n}": whole(torch.Size((1,)), chunks) for n in range(MANY)}, None, {})


def _places(file: str, *transforms: Any) -> dict[MetadataIndex, Any]:
    return {MetadataIndex(f"w{n}"): _StorageInfo(file, 0, 0, *transforms) for n in range(MANY)}


def shared_transforms() -> Metadata:
    return Metadata({}, None, _places("x", ["stream.zstd/1"] * MANY))


def shared_name() -> Metadata:
    return Metadata({}, None, _places("x" * 50 * MANY))


def shared_path() -> Metadata:
    path = ("a",) * MANY
    wholes: Any = {f"w{n}": whole(torch.Size(()), []) for n in range(MANY)}
    return Metadata(wholes, dict.fromkeys(wholes, path), {})


class _Size:
    """Pickled as a `torch.Size` of a tuple that others are made of as well."""

    numbers = (1,) * MANY

    def __reduce__(self) -> Any:
        return torch.Size, (self.numbers,)


def shared_sizes() -> Metadata:
    return Metadata({f"w{n}": whole(_Size(), []) for n in range(MANY)}, None, {})


@pytest.mark.parametrize(
    "make", [shared_chunks, shared_transforms, shared_name, shared_path, shared_sizes]
)
def test_what_is_long_is_not_looked_through_again_and_again(
    tmp_path: Path, make: Callable[[], Metadata]
) -> None:
    with pytest.raises(CkptfixError) as caught:
        read(make(), tmp_path)
    assert len(str(caught.value)) < 1000


# --- what torch would run


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def in_the_rest(metadata: Any) -> None:
    metadata.storage_meta = _Evil()


def in_a_tensor(metadata: Any) -> None:
    vars(metadata.state_dict_metadata["w"].properties)["layout"] = _Evil()


def in_no_field(metadata: Any) -> None:
    vars(metadata)["more"] = [_Evil()]


@pytest.mark.parametrize("change", [in_the_rest, in_a_tensor, in_no_field])
def test_what_torch_would_run_is_told(tmp_path: Path, change: Any) -> None:
    folder = save(tmp_path / "step", {"w": torch.ones(2)})
    assert not ckptfix.open(folder).findings
    edit(folder, change)
    (found,) = ckptfix.open(folder).findings
    assert (found.code, found.severity) == ("dangerous-globals", "error")
    assert "posix.system" in found.message or "nt.system" in found.message
    assert str(folder / ".metadata") in found.message
    assert "dangerous-globals" in ckptfix_command("inspect", folder).stdout
    ckptfix.open(folder).save(tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt"), {"w": torch.ones(2)})
    assert not ckptfix.open(tmp_path / "out.pt").findings


def test_a_call_of_which_nothing_comes_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", {"w": torch.ones(2)})
    data = (folder / ".metadata").read_bytes()
    call = b"cos\nsystem\n(X\x04\x00\x00\x00truetR0"
    (folder / ".metadata").write_bytes(b"\x80\x04" + call + data[2:])
    codes = {found.code for found in ckptfix.open(folder).findings}
    assert codes == {"dangerous-globals", "hidden-call"}
