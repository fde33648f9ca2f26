"""torch's container before 1.6: files that torch still writes, whole and damaged."""

from __future__ import annotations

import io
import pickle
import random
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptfix import door
from ckptfix.bytes.source import BytesSource
from ckptfix.errors import DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.formats import table, torch_legacy
from ckptfix.formats.reading import Reading
from ckptfix.formats.torch_legacy import MAGIC_NUMBER
from ckptfix.tree.document import Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from ckptfix.tree.walk import storages
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path


def saved(value: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=False, **options)
    return made.getvalue()


def read(data: bytes) -> Any:
    return table.read(BytesSource(data, "x.pt"), Reading())


def rewritten(data: bytes, folder: Path) -> Path:
    door.write(read(data), folder / "out.pt")
    return folder / "out.pt"


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def some_state() -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.arange(5), c=torch.tensor(True))


@pytest.mark.parametrize("mmap", [False, True])
def test_fixtures_become_zips_that_load_the_same(
    legacy_file: Path, tmp_path: Path, mmap: bool
) -> None:
    document = door.read(legacy_file)
    assert document.container == "torch legacy"
    door.write(document, tmp_path / "out.pt")
    assert unlike(load(tmp_path / "out.pt", mmap=mmap), load(legacy_file)) is None


# torch makes no plain tensors of the others: quantized ones, raw bits, less than a byte
DTYPES = [name for name in BY_NAME if not re.match(r"q|bits|u?int[1-7]$", name)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_keeps_its_bits(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    storage = torch.arange(256, dtype=torch.uint8).untyped_storage()
    value = torch.empty(0, dtype=dtype).set_(storage).as_strided([256 // dtype.itemsize], [1])
    found = load(rewritten(saved([value]), tmp_path))[0]
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert bytes(found.untyped_storage()) == bytes(range(256))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    value = {**some_state(), "epoch": 1 << 40, "text": "é" * 300, "list": [1, (2.5, None)]}
    assert unlike(load(rewritten(saved(value, pickle_protocol=protocol), tmp_path)), value) is None


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    found = load(rewritten(saved({"all": base, "turned": base.T, "row": base[1]}), tmp_path))
    assert unlike(found, {"all": base, "turned": base.T, "row": base[1]}) is None
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


def test_reading_gives_places_in_the_file_and_tags(tmp_path: Path) -> None:
    data = saved(some_state())
    for storage in storages(read(data).root):
        (span,) = storage.spans
        count = int.from_bytes(data[span.offset - 8 : span.offset], "little")
        assert (count, span.length) == (storage.numel, storage.nbytes)
        assert storage.device == "cpu"


def test_bytes_after_the_last_storage_are_reported() -> None:
    notes = read(saved(some_state()) + b"more").notes
    assert [(note.code, note.message[:7]) for note in notes] == [("trailing-bytes", "4 bytes")]
    assert read(saved(some_state())).notes == ()


def test_cut_anywhere_it_is_refused() -> None:
    data = saved(some_state())
    for length in range(len(data)):
        with pytest.raises(ReadError) as caught:
            read(data[:length])
        assert caught.value.message.startswith("x.pt: ")


def test_one_damaged_byte_gives_no_traceback() -> None:
    """There are no checksums: what is read may differ, but a tensor stays within its file."""
    data = saved(some_state())
    chance, refused = random.Random(2), 0
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        try:
            document = read(damaged)
        except ReadError:
            refused += 1
            continue
        for storage in storages(document.root):
            assert all(span.offset + span.length <= len(data) for span in storage.spans)
    assert refused > len(data) // 10


# --- put together by hand


class Named:
    """Pickled as a name, as torch's storage classes are."""

    def __init__(self, name: str) -> None:
        self.name = name


PythonPickler: Any = pickle._Pickler


class Pickler(PythonPickler):  # type: ignore[misc]
    """Python's own pickler, with persistent ids where a tuple says so."""

    def persistent_id(self, value: Any) -> Any:
        return value[1] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named):
            self.write(b"ctorch\n" + value.name.encode() + b"\n")
        else:
            super().save(value, save_persistent_id)


def pickled(*values: Any) -> bytes:
    made = io.BytesIO()
    for value in values:
        Pickler(made, 2).dump(value)
    return made.getvalue()


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


def storage(key: Any = "0", numel: Any = 2, view: Any = None, device: Any = "cpu") -> Any:
    return ("persistent", ("storage", Named("FloatStorage"), key, device, numel, view))


def by_hand(root: Any, keys: Any, system: Any = SYSTEM, version: Any = 1001) -> bytes:
    return pickled(MAGIC_NUMBER, version, system, root, keys)


DATA = (2).to_bytes(8, "little") + bytes(8)


def test_a_file_put_together_by_hand_is_read() -> None:
    (found,) = read(by_hand([storage()], ["0"]) + DATA).root
    assert (found.numel, found.dtype.name, found.key) == (2, "float32", "0")


def test_big_endian_files_are_read() -> None:
    data = by_hand([storage()], ["0"], {**SYSTEM, "little_endian": False})
    document = read(data + (2).to_bytes(8, "big") + bytes(8))
    assert document.byteorder == "big"


def test_a_class_that_is_saved_with_its_source_is_a_name() -> None:
    module = ("persistent", ("module", Named("Net"), "net.py", "class Net: ..."))
    assert str(read(by_hand({"model": module}, [])).root["model"]) == "torch.Net"


REFUSED: dict[str, tuple[bytes, type[ReadError], str]] = {
    "another version": (by_hand([], [], version=1002), UnsupportedError, "this version"),
    "version as a list": (by_hand([], [], version=[]), UnsupportedError, "this version"),
    "a storage without bytes": (by_hand([storage()], []), DamagedError, "list of storages"),
    "bytes without a storage": (by_hand([], ["0"]) + DATA, DamagedError, "list of storages"),
    "a key twice": (by_hand([storage()], ["0", "0"]) + DATA, DamagedError, "list of storages"),
    "keys as numbers": (by_hand([storage()], [0]) + DATA, DamagedError, "list of storages"),
    "keys as a dict": (by_hand([storage()], {"0": 1}) + DATA, DamagedError, "list of storages"),
    "another length": (
        by_hand([storage(numel=3)], ["0"]) + DATA, DamagedError, "2 elements where the tree says 3"
    ),
    "described in two ways": (
        by_hand([storage(), storage(numel=1)], ["0"]) + DATA, UnsafeError, "in two ways"
    ),
    "negative length": (by_hand([storage(numel=-1)], ["0"]), UnsafeError, "elements"),
    "endless length": (by_hand([storage(numel=1 << 400_000)], ["0"]), UnsafeError, "elements"),
    "length as text": (by_hand([storage(numel="2")], ["0"]), DamagedError, "described wrongly"),
    "a view past the end": (
        by_hand([storage(view=("1", 1, 2))], ["0"]) + DATA, UnsafeError, "outside storage '0'"
    ),
    "a view of two parts": (
        by_hand([storage(view=("1", 1))], ["0"]) + DATA, DamagedError, "described wrongly"
    ),
    "an unknown storage": (
        by_hand([("persistent", ("storage", Named("Os"), "0", "cpu", 2, None))], ["0"]),
        UnsupportedError, r"class torch\.Os is not known",
    ),
    "no storage": (by_hand([("persistent", "0")], ["0"]), UnsupportedError, "not one of torch's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_fit_together_are_refused(case: str) -> None:
    data, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        read(data)
    assert caught.value.message.startswith("x.pt: ")


def test_views_of_storages_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """As torch before 1.0 shared storages: a stretch of one, under a key of its own."""
    whole = torch.arange(6.0)

    def tensor(stored: Any, offset: int, numel: int) -> Any:
        return Reduced("_rebuild_tensor", (stored, offset, (numel,), (1,)))

    root = [
        tensor(storage(numel=6), 0, 6),
        tensor(storage(numel=6, view=("7", 2, 3)), 1, 2),
    ]
    data = by_hand(root, ["0"]) + (6).to_bytes(8, "little") + whole.numpy().tobytes()
    found = read(data).root
    assert all(isinstance(one, Tensor) for one in found)
    (tmp_path / "x.pt").write_bytes(data)
    meant = torch.load(tmp_path / "x.pt", weights_only=False)
    assert [one.tolist() for one in meant] == [[0, 1, 2, 3, 4, 5], [3, 4]]
    assert unlike(load(rewritten(data, tmp_path)), meant) is None


class Reduced:
    """Pickled as a call of one of `torch._utils`' functions."""

    def __init__(self, function: str, args: tuple[Any, ...]) -> None:
        self.function, self.args = getattr(torch._utils, function), args

    def __reduce__(self) -> Any:
        return self.function, self.args


def test_another_magic_number_is_damage() -> None:
    other = pickle.dumps(MAGIC_NUMBER + 1, 2)
    with pytest.raises(DamagedError, match="does not begin as torch's legacy files do"):
        torch_legacy.read(BytesSource(other + saved({"w": torch.ones(2)})[len(other) :], "x.pt"))


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        ((1, 2), "described wrongly"),
        (("key", "0", 1), "described wrongly"),
        (("key", 0, "1"), "described wrongly"),
        (("key", 3, 2), "reaches outside"),
        (("key", -1, 2), "reaches outside"),
    ],
)
def test_views_that_are_none_are_refused(described: Any, problem: str) -> None:
    with pytest.raises(ReadError, match=problem):
        torch_legacy.view(Storage(BY_NAME["float32"], 4, "cpu"), described)
