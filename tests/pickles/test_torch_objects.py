"""Tensors in pickles: read as torch reads them, refused where they leave their storage."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.errors import ReadError, UnsafeError
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles import torch_objects
from ckptfix.pickles.torch_objects import StorageView, tensor_v1, tensor_v2, tensor_v3
from ckptfix.tree.document import Global, Inert, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME, UNTYPED
from tests.helpers import peak_memory, read, write

FLOATS = Storage(BY_NAME["float32"], 12, "cpu", key="0")
BYTES = Storage(UNTYPED, 48, "cuda:0", key="1")


def v2(offset: Any, shape: Any, stride: Any, storage: Any = FLOATS) -> Any:
    return tensor_v2((storage, offset, shape, stride, False, OrderedMap()), DEFAULT)


def test_each_version_of_the_builder() -> None:
    layout = (2, (3, 2), (2, 1))
    one = tensor_v1((FLOATS, *layout), DEFAULT)
    two = tensor_v2((FLOATS, *layout, True, OrderedMap(), {"conj": True}), DEFAULT)
    named = Global("torch", "uint16")
    three = tensor_v3((BYTES, *layout, False, OrderedMap(), named, None), DEFAULT)
    for made, dtype in ((one, "float32"), (two, "float32"), (three, "uint16")):
        assert made is not None
        assert (made.offset, made.shape, made.stride) == layout
        assert (made.dtype.name, made.hooks) == (dtype, None)
    assert one is not None
    assert two is not None
    assert (one.requires_grad, two.requires_grad, two.metadata) == (False, True, {"conj": True})


@pytest.mark.parametrize(
    "args",
    [
        (),
        (FLOATS, 0, (1,), (1,)),
        (FLOATS, 0, (1,), (1, 1), False, None),
        (FLOATS, 0, [1], [1], False, None),
        (FLOATS, 0, ("1",), (1,), False, None),
        (FLOATS, None, (1,), (1,), False, None),
        ("no storage", 0, (1,), (1,), False, None),
        (BYTES, 0, (1,), (1,), False, None),
        (FLOATS, 0, (1,), (1,), False, None, None, None),
    ],
)
def test_unusual_arguments_leave_an_inert_object(args: tuple[Any, ...]) -> None:
    assert tensor_v2(args, DEFAULT) is None


@pytest.mark.parametrize("named", ["float32", Global("torch", "nothing"), Global("os", "float32")])
def test_a_dtype_must_be_one_of_torchs(named: Any) -> None:
    assert tensor_v3((BYTES, 0, (1,), (1,), False, None, named), DEFAULT) is None


def test_sizes_may_be_a_torch_size() -> None:
    made = v2(0, Inert(Global("torch", "Size"), ((2, 3),)), (3, 1))
    assert made.shape == (2, 3)


def test_hooks_that_hold_something_are_kept() -> None:
    hooks = OrderedMap({"a": 1})
    made = tensor_v2((FLOATS, 0, (1,), (1,), False, hooks), DEFAULT)
    assert made is not None
    assert made.hooks is hooks


def test_a_tensor_over_a_view_of_a_storage_lies_over_the_whole() -> None:
    made = v2(1, (2,), (1,), StorageView(FLOATS, 4, 6))
    assert (made.storage, made.offset) == (FLOATS, 5)


# --- bounds: torch's own checks are the oracle

numbers = st.integers(-2, 14)


@given(st.lists(st.tuples(numbers, numbers), max_size=3), numbers)
def test_layouts_are_refused_where_torch_refuses_them(sizes: Any, offset: int) -> None:
    shape, stride = tuple(size for size, _ in sizes), tuple(step for _, step in sizes)
    try:
        torch.as_strided(torch.zeros(12), shape, stride, offset)
        fits = True
    except RuntimeError:
        fits = False
    try:
        made = v2(offset, shape, stride)
    except UnsafeError:
        made = None
    sizes_are_sizes = all(size >= 0 for size in shape)  # torch lets -1 pass beside a 0
    assert (made is not None) == (fits and sizes_are_sizes)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (12, (1,), (1,)), (0, (13,), (1,)), (0, (2,), (12,)), (0, (4, 4), (4, 1)), (13, (), ()),
        (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)), (1 << 63, (0,), (1,)),
        (0, (1 << 64, 0), (1, 1)), (0, (2,), (1 << 62,)), (1 << 62, (2,), (1,)),
        (0, (1 << 62,), (0,)), (0, (1 << 40, 1 << 40), (0, 0)), (0, (1,) * 65, (1,) * 65),
    ],
)  # fmt: skip
def test_layouts_outside_their_storage_are_refused(offset: int, shape: Any, stride: Any) -> None:
    with pytest.raises(UnsafeError, match="a tensor "):
        v2(offset, shape, stride)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (11, (1,), (1,)), (0, (3, 4), (4, 1)), (0, (4, 3), (1, 4)), (11, (), ()), (0, (5,), (2,)),
        (12, (0,), (1,)), (0, (0, 5), (99, 99)), (0, (1000, 12), (0, 1)), (4, (3, 2, 2), (1, 2, 3)),
    ],
)  # fmt: skip
def test_layouts_inside_their_storage_are_read(offset: int, shape: Any, stride: Any) -> None:
    made = v2(offset, shape, stride)
    flat = torch.arange(12.0)
    assert made.numel == torch.as_strided(flat, shape, stride, offset).numel()


def test_an_expanded_tensor_may_be_large_but_not_endless() -> None:
    assert v2(0, (1 << 30,), (0,)).nbytes == 1 << 32
    with pytest.raises(UnsafeError, match="expand"):
        tensor_v2((FLOATS, 0, (1 << 20,), (0,), False, None), Limits(tensor_bytes=1 << 20))


def test_sizes_that_multiply_to_huge_numbers_cost_nothing() -> None:
    for size in (1 << 2000, (1 << 63) - 1):
        for dimensions in (2, 64, 100_000):
            with peak_memory(32 << 20), pytest.raises(UnsafeError) as caught:
                v2(0, (size,) * dimensions, (0,) * dimensions)
            assert len(str(caught.value)) < 5000


def test_a_stride_outside_its_storage_in_a_file(tmp_path: Any) -> None:
    import ckptfix

    path, out = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.zeros(2, 3)}, path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(out, "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            bad.writestr(name, data.replace(b"K\x03K\x01\x86", b"K\x09K\x01\x86"))
    with pytest.raises(ReadError, match=r"bad\.pt.*reaches outside its storage '0' of 6"):
        ckptfix.open(out)


# --- spellings of values


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"c__builtin__\nbytes\n)R.", b""),
        (b"cbuiltins\nbytearray\n)R.", bytearray()),
        (b"c__builtin__\nbytearray\nC\x01a\x85R.", bytearray(b"a")),
        (b"c_codecs\nencode\n(V\xff\nVlatin1\ntR.", b"\xff"),
        (b"c_codecs\nencode\n(V\xff\nVlatin-1\ntR.", b"\xff"),
    ],
)
def test_bytes_are_read_however_they_are_spelled(data: bytes, value: Any) -> None:
    found = read(data)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "data",
    [
        b"c_codecs\nencode\n(VYQ==\nVrot13\ntR.",
        b"c_codecs\nencode\n(VYQ==\ntR.",
        b"cbuiltins\nbytes\n(K\x05tR.",
        b"cbuiltins\nbytearray\nK\x05\x85R.",
        b"cbuiltins\ngetattr\n(V1\nVx\ntR.",
        b"cbuiltins\ngetattr\n(cm\nn\ntR.",
        b"ccopyreg\n__newobj_ex__\n(cm\nn\nNNtR.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"ccollections\nOrderedDict\n(]K\x01atR.",
    ],
)
def test_other_calls_stay_inert_and_survive(data: bytes) -> None:
    from ckptfix.tree import compare

    found = read(data)
    assert type(found) is Inert
    assert compare.difference(read(write(found)), found) is None


def test_keys_of_any_depth_are_hashed_only_where_that_is_quick() -> None:
    deep: Any = ()
    for _ in range(2000):
        deep = (deep,)
    with pytest.raises(UnsafeError, match="dict key"):
        torch_objects.hashable(deep, DEFAULT)
    assert torch_objects.hashable((1, ("a", Global("m", "n"))), DEFAULT)
    with pytest.raises(TypeError, match="list"):
        torch_objects.hashable((1, [2]), DEFAULT)


@pytest.mark.parametrize("dtype", ["float32", "uint16", "float8_e4m3fn", "complex64", "bool"])
def test_a_saved_tensor_is_described_as_it_is(dtype: str, tmp_path: Any) -> None:
    from ckptfix import door

    whole = torch.zeros(4, 6).to(getattr(torch, dtype))
    tensor = whole[1:, ::2].t()
    torch.save(tensor, tmp_path / "a.pt")
    found = door.read(tmp_path / "a.pt").root
    assert isinstance(found, Tensor)
    assert (found.shape, found.stride) == (tuple(tensor.shape), tensor.stride())
    assert (found.offset, found.dtype.name) == (tensor.storage_offset(), dtype)
    assert found.storage.nbytes == tensor.untyped_storage().nbytes()
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    assert torch.load(io.BytesIO(buffer.getvalue())).stride() == tensor.stride()
