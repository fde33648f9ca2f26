"""Described tensors made into torch tensors, from files of every kind and from hostile ones."""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.edit.compacting import gathered
from ckptfix.errors import CkptfixError, UnsupportedError
from ckptfix.torch_bridge.materialize import Materializer, placement
from ckptfix.tree.document import Document, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from ckptfix.tree.walk import walk
from tests.conftest import FIXTURES
from tests.oracles import bits, unlike

if TYPE_CHECKING:
    from pathlib import Path


def over(data: bytes, dtype: str, *cuts: int) -> Tensor:
    """A flat tensor over bytes in memory, in one span or cut into several."""
    source, known = BytesSource(data), BY_NAME[dtype]
    edges = [0, *cuts, len(data)]
    spans = tuple(Span(source, a, b - a) for a, b in pairwise(edges))
    numel = len(data) // known.itemsize
    return Tensor(Storage(known, numel, "cpu", spans), known, (numel,), (1,))


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 9)])
def test_spans_are_joined_in_order(cuts: tuple[int, ...]):
    data = bytes(range(16))
    assert bits(Materializer().tensor(over(data, "float32", *cuts))) == data


def test_what_is_large_is_read_in_blocks_by_several_workers():
    data = bytes(range(256)) * (3 << 15)  # 24 MiB
    assert bits(Materializer().tensor(over(data, "int32", 5, 9 << 20))) == data


@pytest.mark.parametrize(
    ("dtype", "word"), [("uint8", 1), ("int16", 2), ("float32", 4), ("float64", 8),
                        ("complex64", 4), ("complex128", 8)]
)  # fmt: skip
def test_big_endian_numbers_are_turned_round(dtype: str, word: int):
    data = bytes(range(32))
    turned = b"".join(data[i : i + word][::-1] for i in range(0, 32, word))
    assert bits(Materializer(byteorder="big").tensor(over(data, dtype))) == turned
    assert gathered(over(data, dtype), "big").read() == turned


def test_tensors_over_one_storage_are_made_over_one():
    tensor = over(bytes(16), "float32")
    other = Tensor(tensor.storage, tensor.dtype, (2,), (1,), 2)
    materializer = Materializer()
    materializer.tensor(tensor)[2] = 5
    assert materializer.tensor(other)[0] == 5


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_row_major_bytes_are_those_that_torch_makes(checkpoint: Path):
    document = door.read(checkpoint)
    for _, node in walk(document.root):
        if isinstance(node, Tensor):
            made = Materializer(byteorder=document.byteorder).tensor(node)
            assert (gathered(node, document.byteorder).read() if node.numel else b"") == bits(made)
            assert (tuple(made.shape), made.stride()) == (node.shape, node.stride)


def test_weights_may_lie_in_a_map_of_the_file_and_are_not_copied_then():
    [first, *_] = [n for _, n in walk(door.read(FIXTURES / "cpu.pt").root) if isinstance(n, Tensor)]
    materializer = Materializer(mapped=True)
    made = materializer.tensor(first)
    [(source, mapped)] = materializer._maps.values()
    assert isinstance(mapped, mmap.mmap)
    offset = first.storage.spans[0].offset
    mapped[offset : offset + 4] = b"\x00\x00\x80\x3f"
    assert made.flatten()[0] == 1.0
    assert source.read(offset, 4) != b"\x00\x00\x80\x3f"


def test_the_cpu_needs_no_placing_and_a_callable_decides_by_tag():
    assert placement("cpu") is None
    assert placement(torch.device("cpu")) is None
    storage = torch.ones(2).untyped_storage()
    place = placement({"cuda:0": "meta"})
    assert place is not None
    assert place(storage, "cuda:0").device.type == "meta"
    assert place(storage, "cpu") is storage


# What no program of torch's would write


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def packed(pickled: bytes, path: Path, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, data in records.items():
            archive.writestr(f"a/data/{key}", data)
        archive.writestr("a/version", "3\n")
    return path


def rebuild(storage: str, dtype: str, *rest: Any) -> bytes:
    """The pickle of a tensor of two elements whose last arguments are `rest`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            kind = getattr(torch, storage)
            return ("storage", kind, "0", "cpu", 2) if obj == "the storage" else None

    out = io.BytesIO()
    function = getattr(torch._utils, dtype)
    Pickler(out, 2).dump(Call(function, "the storage", 0, (2,), (1,), *rest))
    return out.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        Call(complex, 10**400, 0),
        Call(torch.device, "no such device"),
        Call(torch.device, True),
        Call(set, [[1]]),
        Call(torch._utils._rebuild_parameter, 1),
        Call(torch._utils._rebuild_parameter),
    ],
)
def test_calls_that_cannot_be_made_stay_inert(value: Any, tmp_path: Path):
    path = packed(pickle.dumps([value], 2), tmp_path / "in.pt")
    [loaded] = ckptfix.load(path)
    assert isinstance(loaded, ckptfix.Inert)


def test_a_set_as_a_key_is_refused(tmp_path: Path):
    path = packed(pickle.dumps({Call(set, [1]): 1}, 2), tmp_path / "in.pt")
    with pytest.raises(UnsupportedError, match="a set serves as a key"):
        ckptfix.load(path)


def test_keys_nested_as_deep_as_is_allowed_are_kept(tmp_path: Path):
    pickled = b"\x80\x02})" + b"\x85" * 900 + b"K\x01s."
    [key] = ckptfix.load(packed(pickled, tmp_path / "in.pt"))
    for _ in range(900):
        [key] = key
    assert key == ()


@pytest.mark.parametrize(
    "rest", [(False, {}, [1]), (False, {}, {"conj": True, "neg": True, "x": 1})]
)
def test_odd_bits_of_a_real_tensor_are_never_a_crash(rest: tuple[Any, ...], tmp_path: Path):
    pickled = rebuild("LongStorage", "_rebuild_tensor_v2", *rest)
    path = packed(pickled, tmp_path / "in.pt", **{"0": bytes(range(16))})
    assert bits(ckptfix.load(path)) == bytes(range(16))


def test_integers_that_claim_to_require_grad_load_without_it(tmp_path: Path):
    pickled = rebuild("LongStorage", "_rebuild_tensor_v2", True, {})
    path = packed(pickled, tmp_path / "in.pt", **{"0": bytes(16)})
    assert not ckptfix.load(path).requires_grad


def test_a_tensor_over_raw_bytes_without_a_dtype_is_no_crash(tmp_path: Path):
    pickled = rebuild("UntypedStorage", "_rebuild_tensor_v2", False, {})
    path = packed(pickled, tmp_path / "in.pt", **{"0": bytes(2)})
    try:
        loaded = ckptfix.load(path)
    except CkptfixError:
        return
    assert isinstance(loaded, (torch.Tensor, ckptfix.Inert))


def test_a_deep_tree_is_loaded_without_recursion(tmp_path: Path):
    depth = 100_000
    pickled = b"\x80\x02" + b"]" * (depth + 1) + b"a" * depth + b"."
    loaded = ckptfix.load(packed(pickled, tmp_path / "in.pt"))
    for _ in range(depth):
        [loaded] = loaded
    assert loaded == []


def test_saving_an_opened_document_needs_no_torch_tensor(tmp_path: Path):
    tensor = over(bytes(range(16)), "float32")
    document = Document({"w": tensor}, "memory")
    ckptfix.Checkpoint(document).save(tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    assert unlike(loaded, {"w": Materializer().tensor(tensor)}) is None
