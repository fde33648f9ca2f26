"""The table of dtypes against torch and safetensors themselves."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from ckptfix.tree.dtypes import BY_NAME, BY_SAFETENSORS, BY_STORAGE, UNTYPED

if TYPE_CHECKING:
    from pathlib import Path

TORCHS = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


def test_every_dtype_of_torch_is_in_the_table_and_no_other() -> None:
    assert set(BY_NAME) == set(TORCHS)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_sizes_and_kinds_are_torchs(name: str) -> None:
    ours, torchs = BY_NAME[name], TORCHS[name]
    assert (str(ours), ours.itemsize) == (name, torchs.itemsize)
    assert ours.is_floating_point == (torchs.is_floating_point and ours.packed == 1)
    assert ours.word * (2 if torchs.is_complex else 1) == ours.itemsize


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_storage_classes_are_those_that_torch_saves(name: str) -> None:
    storages = torch.storage._dtype_to_storage_type_map()
    assert BY_NAME[name].storage == storages.get(TORCHS[name])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "complex128", "bool", "uint16", "int64"])
def test_a_pickle_names_the_class_of_the_table(name: str) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(2, dtype=TORCHS[name]), buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read("archive/data.pkl")
    row = BY_NAME[name]
    expected = row.storage or "UntypedStorage"
    assert f"{expected}\n".encode() in pickled
    assert (b"_rebuild_tensor_v3" in pickled) == (row.storage is None)


def test_names_are_unique() -> None:
    rows = list(BY_NAME.values())
    assert len(BY_STORAGE) == sum(row.storage is not None for row in rows) + 1
    assert len(BY_SAFETENSORS) == sum(row.safetensors is not None for row in rows)
    assert BY_STORAGE["UntypedStorage"] is UNTYPED
    assert "untyped" not in BY_NAME


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_names_in_safetensors_are_those_that_it_writes(name: str) -> None:
    row, dtype = BY_NAME[name], TORCHS[name]
    tensor = torch.zeros(4, dtype=torch.uint8)[: 4 if row.itemsize == 1 else 0].view(dtype)
    try:
        data = safetensors.torch.save({"t": tensor})
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError):
        assert row.safetensors is None
        return
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    assert f'"dtype":"{row.safetensors}"' in header
    shape = f'"shape":[{tensor.numel() * row.packed}]'
    assert shape in header


@pytest.mark.parametrize("name", sorted(BY_SAFETENSORS))
def test_safetensors_reads_what_the_table_calls_by_its_name(name: str, tmp_path: Path) -> None:
    row = BY_SAFETENSORS[name]
    count, nbytes = 4 * row.packed, 4 * row.itemsize
    header = f'{{"t":{{"dtype":"{name}","shape":[{count}],"data_offsets":[0,{nbytes}]}}}}'.encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    with safetensors.safe_open(path, "pt") as opened:
        found = opened.get_tensor("t")
    assert found.dtype is TORCHS[row.name]
    assert found.shape == (4,)
