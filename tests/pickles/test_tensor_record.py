"""Tensors read in one step: what comes out is what their opcodes make one by one."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptfix import pickles
from ckptfix.errors import CkptfixError, UnsafeError
from ckptfix.formats.torch_zip import parse_persistent_id
from ckptfix.pickles import tensor_record
from ckptfix.tree import compare
from ckptfix.tree.document import Inert, OrderedMap, Storage, Tensor

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = [
    (),
    (1,),
    (70_000,),
    (2, 3),
    (300, 2),
    (2, 3, 4),
    (2, 1, 2, 1),
    (1,) * 8,
    (1,) * 9,
    (0, 5),
]


def in_one_step(body: bytes) -> Any:
    """What a pickle without its PROTO and its STOP holds."""
    return read(b"\x80\x02" + body + b".")


def one_by_one(body: bytes) -> Any:
    """The same in a frame, where nothing is taken together."""
    return read(b"\x80\x04\x95" + struct.pack("<Q", len(body) + 1) + body + b".")


def read(data: bytes) -> Any:
    return pickles.read(data, Storages().load, name="test")[0]


class Storages:
    """Storages by key, as containers keep them."""

    def __init__(self) -> None:
        self.known: dict[str, Storage] = {}

    def load(self, pid: Any) -> Storage:
        storage = parse_persistent_id(pid[:5])
        return self.known.setdefault(storage.key, storage)


def body_of(value: Any, path: Path) -> bytes:
    """The pickle that torch.save writes, without its PROTO and its STOP."""
    torch.save(value, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return archive.read(name)[2:-1]


def filled(value: Any) -> list[Any]:
    """A list in which so much comes before a value that the memo's numbers take four bytes."""
    return [*(f"text {number}" for number in range(300)), value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_of_torch_are_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {f"layer.{index}": torch.zeros(shape, dtype=dtype) for index in range(3)}
    views = [torch.zeros(9, 9)[2:5, 1:], torch.zeros(4, 5).t(), torch.zeros(3).expand(2, 3)]
    grown = torch.zeros(2, requires_grad=True)
    body = body_of(filled([tensors, views, grown, tensors["layer.1"]]), tmp_path / "x.pt")
    assert compare.difference(one_by_one(body), in_one_step(body)) is None


def test_what_torch_writes_is_recognised(tmp_path: Path) -> None:
    tensors = {f"layer.{index}.weight": torch.zeros(index, 2) for index in range(1, 500)}
    optimizer = {"state": {n: {"step": torch.tensor(1.0)} for n in range(500)}}
    body = body_of(filled([tensors, optimizer]), tmp_path / "x.pt")
    found = tensor_record._TENSOR.findall(body)
    assert len(found) >= 998  # the first one names its class, function and device


def test_what_ckptfix_writes_is_recognised(tmp_path: Path) -> None:
    body = body_of({f"layer.{n}": torch.zeros(n, 2) for n in range(100)}, tmp_path / "x.pt")
    written, _ = pickles.write(in_one_step(body))
    assert len(tensor_record._TENSOR.findall(written)) >= 98
    assert compare.difference(in_one_step(body), in_one_step(written[2:-1])) is None
    assert compare.difference(in_one_step(body), one_by_one(written[2:-1])) is None


def test_everything_is_in_the_memo(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4), "step": torch.tensor(1.0)}
    body = body_of(filled(tensors), tmp_path / "x.pt")
    opcodes = pickletools.genops(b"\x80\x02" + body + b".")
    puts: set[Any] = {number for opcode, number, _ in opcodes if "PUT" in opcode.name}
    gets = b"".join(b"j" + struct.pack("<I", number) for number in sorted(puts))
    both = in_one_step(b"(" + body + gets + b"t"), one_by_one(b"(" + body + gets + b"t")
    assert compare.difference(*both) is None
    kinds = {type(node) for node in both[0]}
    assert {Tensor, OrderedMap, tuple, str, list, dict} <= kinds
    assert len(both[0]) == 1 + len(puts)


# Spelled by hand: what torch never writes, in the same opcodes.

CALL = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMES = (
    b"X\7\0\0\0storage", b"ctorch\nFloatStorage\n", b"X\3\0\0\0cpu", b"ccollections\nOrderedDict\n",
    CALL, b"cbuiltins\neval\n", b"]", b"ctorch.storage\nUntypedStorage\n",
)  # fmt: skip
WORD, FLOAT, CPU, ORDERED, REBUILD, EVAL, LIST, UNTYPED = (b"h%c" % n for n in range(len(NAMES)))


def spelled(
    call: bytes = REBUILD,
    word: bytes = WORD,
    cls: bytes = FLOAT,
    key: bytes = b"X\1\0\0\0000",
    device: bytes = CPU,
    numel: bytes = b"K\6",
    offset: bytes = b"K\0",
    shape: bytes = b"K\2K\3\x86",
    stride: bytes = b"K\3K\1\x86",
    hooks: bytes = ORDERED,
    puts: tuple[bytes, ...] = (b"",) * 7,
) -> bytes:
    """A list of all names in use, and one tensor."""
    a, b, c, d, e, f, g = puts
    names = b"".join(name + b"q%c0" % number for number, name in enumerate(NAMES))
    tensor = (
        call + b"((" + word + cls + key + a + device + numel + b"t" + b + b"Q" + offset
        + shape + c + stride + d + b"\x89" + hooks + b")R" + e + b"t" + f + b"R" + g
    )  # fmt: skip
    return names + tensor


ODD = {
    "usual": {},
    "another call": {"call": EVAL},
    "other hooks": {"hooks": EVAL},
    "negative": {"shape": b"J\xff\xff\xff\xffK\3\x86"},
    "negative offset": {"offset": b"J\xff\xff\xff\xff"},
    "outside": {"numel": b"K\5"},
    "overflow": {"shape": b"(" + b"J\xff\xff\xff\x7f" * 4 + b"t", "stride": b"(K\1K\1K\1K\1t"},
    "a list is called": {"call": LIST},
    "a list makes the hooks": {"hooks": LIST},
    "a list is the device": {"device": LIST},
    "a list is the class": {"cls": LIST},
    "untyped": {"cls": UNTYPED, "numel": b"K\x18"},
    "no such class": {"cls": ORDERED},
    "no such name": {"device": b"h\x63"},
    "another word": {"word": CPU},
    "key shorter than said": {"key": b"X\2\0\0\0000"},
    "shape without stride": {"stride": b")"},
    "some puts": {"puts": (b"r\x63\0\0\0",) + (b"",) * 6},
    "short puts": {"puts": tuple(b"q%c" % n for n in range(70, 77))},
    "long puts": {"puts": tuple(b"r%c\0\0\0" % n for n in range(70, 77))},
    "a scalar": {"shape": b")", "stride": b")"},
    "a scalar with puts": {"shape": b")", "stride": b")", "puts": (
        b"r\x46\0\0\0", b"r\x47\0\0\0", b"", b"", *(b"r%c\0\0\0" % n for n in range(72, 75)))},
    "a scalar with puts behind its tuples": {
        "shape": b")", "stride": b")", "puts": tuple(b"r%c\0\0\0" % n for n in range(70, 77))},
    "an empty stride with puts": {
        "stride": b")", "puts": tuple(b"r%c\0\0\0" % n for n in range(70, 77))},
    "a put over the device": {"puts": (b"r\2\0\0\0", *(b"r%c\0\0\0" % n for n in range(70, 76)))},
    "a put over the hooks": {"puts": (*(b"r%c\0\0\0" % n for n in range(70, 73)), b"r\3\0\0\0",
                                      *(b"r%c\0\0\0" % n for n in range(73, 76)))},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_ones_come_to_the_same(odd: dict[str, Any]) -> None:
    body = spelled(**odd)
    outcomes = [outcome(in_one_step, body), outcome(one_by_one, body)]
    if isinstance(outcomes[0], tuple):
        assert outcomes[0] == outcomes[1]
    else:
        assert compare.difference(*outcomes) is None


def outcome(reading: Any, body: bytes) -> Any:
    """A tree, or the class and the text of the error, without the place."""
    try:
        return reading(body)
    except CkptfixError as error:
        return type(error), str(error).rpartition(": ")[2]


def test_another_call_stays_inert() -> None:
    made = in_one_step(spelled(call=EVAL))
    assert type(made) is Inert
    assert str(made.function) == "builtins.eval"
    assert [type(part) for part in made.args] == [Storage, int, tuple, tuple, bool, OrderedMap]


def test_a_tensor_outside_its_storage_is_refused() -> None:
    with pytest.raises(UnsafeError, match="outside its storage '0' of 5 elements"):
        in_one_step(spelled(numel=b"K\5"))
