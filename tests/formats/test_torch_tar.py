"""The tar of 2016 and 2017, made here by its description, since torch no longer writes it."""

import io
import pickle
import struct
import tarfile
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import DamagedError, ReadError
from ckptfix.repair.recover import recover

STORAGE_KEY, TENSOR_KEY, VIEW_KEY = 11, 22, 33


class _Tree(pickle.Pickler):
    """Pickles a tensor as the key under which the archive describes it."""

    def persistent_id(self, value: object) -> str | None:
        return str(value.key) if isinstance(value, Kept) else None


class Kept:
    def __init__(self, key: int) -> None:
        self.key = key


def storages(values: torch.Tensor, views: list[tuple[int, int, int, int]]) -> bytes:
    head = pickle.dumps(1, 2) + pickle.dumps((STORAGE_KEY, "cpu", torch.FloatStorage), 2)
    data = struct.pack("<q", values.numel()) + values.numpy().tobytes()
    return head + data + pickle.dumps(views, 2)


def tensors(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, storage: int) -> bytes:
    head = pickle.dumps(1, 2) + pickle.dumps((TENSOR_KEY, storage, torch.FloatTensor), 2)
    count = len(shape)
    return head + struct.pack(f"<2i{2 * count + 1}q", count, 0, *shape, *stride, offset)


def tree(value: object) -> bytes:
    written = io.BytesIO()
    _Tree(written, 2).dump(value)
    return written.getvalue()


def write(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in {"sys_info": pickle.dumps({}, 2), **members}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def values() -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32)


def archive(path: Path, values: torch.Tensor) -> Path:
    return write(
        path,
        storages=storages(values, []),
        tensors=tensors((4, 3), (1, 4), 0, STORAGE_KEY),
        pickle=tree({"weight": Kept(TENSOR_KEY)}),
    )


def test_tensors_read_as_torch_reads_them(tmp_path: Path, values: torch.Tensor) -> None:
    path = archive(tmp_path / "old.tar", values)
    wanted = torch.load(path, weights_only=False)["weight"]
    found = ckptfix.load(path)["weight"]
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()
    assert door.read(path).container == "torch tar"
    with pytest.raises(RuntimeError, match="weights_only"):
        torch.load(path)
    (finding,) = ckptfix.open(path).findings
    assert (finding.code, finding.command is None) == ("old-container", False)


def test_it_becomes_a_zip_that_loads_safely(tmp_path: Path, values: torch.Tensor) -> None:
    path = archive(tmp_path / "old.tar", values)
    ckptfix.open(path).save(tmp_path / "new.pt")
    loaded = torch.load(tmp_path / "new.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["weight"], values.view(3, 4).t())


def test_views_of_a_storage_share_it(tmp_path: Path, values: torch.Tensor) -> None:
    path = write(
        tmp_path / "old.tar",
        storages=storages(values, [(VIEW_KEY, STORAGE_KEY, 5, 4)]),
        tensors=tensors((2,), (1,), 1, VIEW_KEY),
        pickle=tree({"part": Kept(TENSOR_KEY)}),
    )
    assert ckptfix.load(path)["part"].tolist() == [6.0, 7.0]


@pytest.mark.parametrize("size", range(0, 8192, 512))
def test_a_truncated_archive_is_refused(tmp_path: Path, values: torch.Tensor, size: int) -> None:
    path = archive(tmp_path / "old.tar", values)
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:size])
    try:
        found = ckptfix.load(tmp_path / "cut.tar")
    except ReadError:
        return
    assert torch.equal(found["weight"], values.view(3, 4).t())


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path, values: torch.Tensor) -> None:
    path = write(
        tmp_path / "old.tar",
        storages=storages(values, []),
        tensors=tensors((5, 3), (3, 1), 0, STORAGE_KEY),
        pickle=tree({"weight": Kept(TENSOR_KEY)}),
    )
    with pytest.raises(ReadError, match="outside"):
        door.read(path)


def test_a_key_that_nothing_describes_is_refused(tmp_path: Path, values: torch.Tensor) -> None:
    path = write(tmp_path / "old.tar", storages=storages(values, []), pickle=tree([Kept(99)]))
    with pytest.raises(DamagedError, match="99"):
        door.read(path)


def described(count: object, *rows: object, numbers: bytes = b"") -> bytes:
    """The beginning of a member: how many things follow, and the rows that describe them."""
    return pickle.dumps(count, 2) + b"".join(pickle.dumps(row, 2) for row in rows) + numbers


ROW = (STORAGE_KEY, "cpu", torch.FloatStorage)
TENSOR = (TENSOR_KEY, STORAGE_KEY, torch.FloatTensor)
VALUE = struct.pack("<qf", 1, 2.0)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"storages": described("one")}, "a count is not a number"),
        ({"storages": described(-1)}, "a count is not a number"),
        ({"storages": described(1, ROW[:2])}, "does not have 3 values"),
        ({"storages": described(1, (STORAGE_KEY, "cpu", list))}, "class of a storage"),
        ({"storages": described(1, (1.5, *ROW[1:]), numbers=VALUE)}, "neither text nor a number"),
        ({"storages": described(1, ROW)}, "ends too soon"),
        ({"storages": described(1, ROW, numbers=VALUE[:-1])}, "ends inside a storage"),
        ({"storages": described(0, [(1, 2)])}, "views are described wrongly"),
        ({"storages": described(0, [(1, 2, 0, 1)]), "pickle": tree([Kept(1)])}, "called '1'"),
        ({"tensors": described(1, TENSOR, numbers=struct.pack("<2i", 65, 0))}, "65 dimensions"),
        ({"tensors": tensors((1,), (1,), 0, 99)}, "has no storage"),
        ({"pickle": pickle.dumps({}, 2)[:-1]}, "ends too soon"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_described_wrongly_is_said(tmp_path: Path, members, what: str) -> None:
    sound = {"storages": described(1, ROW, numbers=VALUE), "pickle": tree({})}
    path = write(tmp_path / "old.tar", **{**sound, **members})
    with pytest.raises(ReadError, match=what):
        door.read(path)


def test_a_tar_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="none of them a checkpoint"):
        door.read(write(tmp_path / "other.tar", readme=b"hello"))


def test_what_is_not_cut_off_is_saved_and_views_of_the_rest_are_named(
    tmp_path: Path,
) -> None:
    part = described(1, (TENSOR_KEY, VIEW_KEY, torch.FloatTensor))
    numbers = struct.pack("<2i3q", 1, 0, 2, 1, 0)
    path = write(
        tmp_path / "old.tar",
        pickle=tree({"part": Kept(TENSOR_KEY), "whole": Kept(44)}),
        tensors=part.replace(pickle.dumps(1, 2), pickle.dumps(2, 2), 1)
        + numbers
        + pickle.dumps((44, STORAGE_KEY, torch.FloatTensor), 2)
        + struct.pack("<2i3q", 1, 0, 12, 1, 0),
        storages=storages(torch.arange(12.0), [(VIEW_KEY, STORAGE_KEY, 5, 4)]),
    )
    data = path.read_bytes()
    path.write_bytes(data[: data.find(torch.arange(12.0).numpy().tobytes()) + 48])
    found = recover(path)
    assert (found.saved, found.lost) == (1, ["part"])
    door.write(found.document, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt")["whole"].tolist() == list(range(12))
