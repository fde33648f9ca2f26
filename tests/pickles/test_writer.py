"""Pickles written from trees: Python, torch and an independent reading agree on what they hold."""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from argparse import Namespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import _weights_only_unpickler as weights_only

import ckptfix
from ckptfix import door
from ckptfix.errors import UnsafeError, UnsupportedError
from ckptfix.tree import compare, walk
from ckptfix.tree.document import Global, Inert, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from ckptfix.tree.rebuild import rebuild
from tests.helpers import comparable, independent, read, through, u4, write

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOLS = st.sampled_from(range(pickle.HIGHEST_PROTOCOL + 1))

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 2100), 1 << 2100)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.binary(max_size=20)
)
keys = scalars | st.tuples(scalars, st.tuples(scalars))
members = st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.binary(max_size=3))
values = st.recursive(
    scalars
    | st.binary(max_size=20).map(bytearray)
    | st.complex_numbers()
    | st.sets(members)
    | st.frozensets(members),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(inner, max_size=6).map(tuple)
        | st.dictionaries(keys, inner, max_size=6)
        | st.dictionaries(st.text(max_size=4), inner, max_size=6).map(collections.OrderedDict)
        | inner.map(lambda value: [value, value])
    ),
    max_leaves=25,
)


def opcodes(data: bytes) -> list[str]:
    return [opcode.name for opcode, _, _ in pickletools.genops(data)]


def is_of_protocol_2(data: bytes) -> bool:
    return data.startswith(b"\x80\x02") and all(
        op.proto <= 2 for op, _, _ in pickletools.genops(data)
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values, PROTOCOLS)
def test_plain_values_survive_from_every_protocol(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    written = write(read(data))
    assert comparable(pickle.loads(written)) == comparable(pickle.loads(data))
    assert is_of_protocol_2(written)
    assert write(read(written)) == written
    assert compare.difference(read(written), read(data)) is None
    assert independent(written) == independent(pickle.dumps(pickle.loads(data), 2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values, PROTOCOLS)
def test_plain_values_load_with_weights_only(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    written = write(read(data))
    kept = pickle.loads(data)  # protocol 0 writes `nan` for every NaN
    try:
        expected = weights_only.load(io.BytesIO(pickle.dumps(kept, 2)))
    except pickle.UnpicklingError:
        return  # it refuses complex numbers and frozen sets, whoever wrote them
    assert comparable(weights_only.load(io.BytesIO(written))) == comparable(expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(1 << 1100), 1 << 1100) | st.integers(0, 1100).map(lambda n: -(1 << n)))
def test_integers_take_as_many_bytes_as_python_takes(number: int) -> None:
    assert len(write(number)) == len(pickle.dumps(number, 2))
    assert read(write(number)) == number


def test_floats_keep_their_bits() -> None:
    for value in (math.nan, -math.nan, -0.0, math.inf, 5e-324, 1.7976931348623157e308):
        assert comparable(through(value)) == comparable(value)


# --- objects


class Outer:
    class Inner:
        def __init__(self, value: Any) -> None:
            self.value = value

        def twice(self) -> Any:
            return [self.value, self.value]

        def __eq__(self, other: object) -> bool:
            return vars(self) == vars(other)

        __hash__ = None  # type: ignore[assignment]


class Slots:
    __slots__ = ("left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and (self.left, self.right) == (other.left, other.right)

    __hash__ = None  # type: ignore[assignment]


class Keywords:
    def __new__(cls, *, value: Any) -> Keywords:
        made = super().__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"value": self.value}  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class State:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return [self.value]

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Listed(list):
    extra: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listed) and [*self] == [*other] and vars(self) == vars(other)

    __hash__ = None


class Pair(NamedTuple):
    left: Any
    right: Any


class Colour(enum.Enum):
    RED = 1


def listed(value: Any) -> Listed:
    made = Listed([value, value])
    made.extra = value
    return made


def with_attribute(value: Any) -> Any:
    made: Any = collections.OrderedDict(a=value)
    made._metadata = collections.OrderedDict({"": {"version": value}})
    return made


def defaulted(value: Any) -> Any:
    return collections.defaultdict(list, {"a": value, (1, Colour.RED): [value]})


MAKERS: dict[str, Any] = {
    "object": Outer.Inner,
    "slots": lambda value: Slots(value, [value]),
    "keywords": lambda value: Keywords(value=value),
    "state": State,
    "list subclass": listed,
    "named tuple": lambda value: Pair(value, (value,)),
    "ordered dict with attributes": with_attribute,
    "defaultdict": defaulted,
    "deque": lambda value: collections.deque([value, 1], 5),
    "counter": lambda value: collections.Counter({repr(value): 2}),
    "namespace": lambda value: Namespace(value=value),
    "enum as a key": lambda value: {Colour.RED: value},
    "state keyed by an enum": lambda value: State({Colour.RED: value}),
    "path": lambda value: pathlib.PurePosixPath("a", "b"),
    "paths in a set": lambda value: {pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")},
    "datetime": lambda value: datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    "decimal": lambda value: decimal.Decimal("1.5"),
    "fraction": lambda value: fractions.Fraction(1, 3),
    "range and slice": lambda value: [range(1, 9, 2), slice(1, None)],
    "classes": lambda value: [Outer, Outer.Inner, dict, math.sqrt, Outer.Inner.twice],
    "torch": lambda value: [torch.device("cuda:3"), torch.float16, torch.Size([1, 2])],
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [1, "text", b"\xff", [None], {"a": 1.5}], ids=repr)
def test_objects_survive_from_every_protocol(name: str, protocol: int, value: Any) -> None:
    if protocol < 2 and name in ("slots", "keywords"):
        pytest.skip("Python cannot pickle it so")
    original = MAKERS[name](value)
    data = pickle.dumps(original, protocol)
    written = write(read(data))
    found = pickle.loads(written)
    assert (type(found), found) == (type(original), original)
    assert is_of_protocol_2(written)
    assert compare.difference(read(data), read(written)) is None
    assert write(read(written)) == written


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4)
            | st.tuples(st.sampled_from(sorted(MAKERS)), inner).map(lambda it: MAKERS[it[0]](it[1]))
        ),
        max_leaves=12,
    ),
    st.sampled_from(range(2, 6)),
)
def test_objects_are_the_same_by_an_independent_reading(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert independent(write(read(data))) == independent(data)


def test_attributes_of_ordered_dicts_survive() -> None:
    found = through(with_attribute(3), 4)
    assert found._metadata == {"": {"version": 3}}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"(K\x01itests.pickles.test_writer\nState\n.", State(1)),
        (b"(ctests.pickles.test_writer\nState\nK\x01o.", State(1)),
        (b"ctests.pickles.test_writer\nPair\nK\x01K\x02\x86\x81.", Pair(1, 2)),
    ],
)
def test_the_opcodes_of_python_2_objects_survive(data: bytes, expected: Any) -> None:
    assert pickle.loads(write(read(data))) == pickle.loads(data) == expected


def test_copyreg_reconstructor_survives() -> None:
    data = pickle.dumps(State(2), 0)
    assert b"_reconstructor" in data
    assert hasattr(copyreg, "_reconstructor")
    assert read(data).cls == f"{__name__}.State"
    assert pickle.loads(write(read(data))) == State(2)


# --- sharing and cycles


@pytest.mark.parametrize("protocol", range(6))
def test_shared_objects_stay_shared(protocol: int) -> None:
    for shared in ([1], {"a": 1}, (1, [2]), State(1), bytearray(b"x"), {1, 2}, b"xyz"):
        first, second, other = through([shared, shared, type(shared)], protocol)
        assert first is second
        assert (first, other) == (shared, type(shared))


@pytest.mark.parametrize("protocol", range(6))
def test_what_holds_itself_survives(protocol: int) -> None:
    own_list: list[Any] = [1]
    own_list.append(own_list)
    found = through(own_list, protocol)
    assert found[1] is found
    own_dict: dict[str, Any] = {}
    own_dict["self"] = own_dict
    found = through(own_dict, protocol)
    assert found["self"] is found
    inner: list[Any] = []
    for own_tuple in ((inner,), (1, 2, inner, 4)):
        inner[:] = [own_tuple]
        found = through(own_tuple, protocol)
        assert found[own_tuple.index(inner)][0] is found
    own_object = Outer.Inner(None)
    own_object.value = {"me": (own_object,)}
    found = through(own_object, protocol)
    assert found.value["me"][0] is found


class Node:
    def __reduce__(self) -> Any:
        return Node, (), vars(self)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_that_are_held_by_their_members_keep_them(kind: type, protocol: int) -> None:
    member: Any = Node()
    member.home = kind([member, 1])
    found = through(member.home, protocol)
    (again,) = found - {1}
    assert type(found) is kind
    assert again.home is found


def test_objects_whose_arguments_hold_them_survive() -> None:
    data = b"]q\x000ctests.pickles.test_writer\nState\nh\x00\x85Rq\x01h\x00h\x01a0."
    found = pickle.loads(write(read(data)))
    assert found.value[0] is found


def test_tuples_that_hold_themselves_in_many_ways_do_not_square() -> None:
    count = 3000
    lists = b"".join(b"]r" + u4(index) for index in range(count))
    fill = b"".join(b"j" + u4(index) + b"j" + u4(count) + b"a0" for index in range(count))
    root = read(b"(" + lists + b"tr" + u4(count) + fill + b".")
    with pytest.raises(UnsafeError, match="hold themselves"):
        write(root)
    with pytest.raises(UnsafeError, match="hold themselves"):
        rebuild(root, lambda node: node)


# --- depth

DEEP = {
    "lists": lambda n: b"]" * n + b"a" * (n - 1) + b".",
    "tuples": lambda n: b")" + b"\x85" * n + b".",
    "dicts": lambda n: b"}K\x00" * n + b"N" + b"s" * n + b".",
    "marks": lambda n: b"(" * n + b"t" * n + b".",
    "objects": lambda n: b"cm\nn\nq\x00" + b"h\x00" * (n - 1) + b")" + b"R\x85" * n + b".",
    "states": lambda n: b"cm\nn\nq\x000" + b"h\x00)\x81" * n + b"N" + b"b" * n + b".",
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("count", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_levels_need_no_recursion(name: str, count: int) -> None:
    root = read(DEEP[name](count))
    written = write(root)
    again = read(written)
    assert compare.difference(root, again) is None
    copy = rebuild(root, lambda node: node)
    assert write(copy)[:1000] == written[:1000]
    assert sum(1 for _ in walk.walk(root)) >= count - 1


# --- size, and what torch makes of it


def state_dicts() -> dict[str, Any]:
    linear = torch.nn.Linear(3, 2)
    norm = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), *[torch.nn.BatchNorm1d(2)] * 3)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    many = collections.OrderedDict((f"layer.{i}.weight", torch.zeros(1)) for i in range(400))
    one = torch.arange(6.0)
    return {
        "linear": linear.state_dict(),
        "norm": norm.state_dict(),
        "training": {"model": norm.state_dict(), "opt": optimizer.state_dict(), "epoch": -128},
        "many": many,
        "views": {"a": one, "b": one[2:], "c": one.view(2, 3).t(), "d": one[:0], "e": one[1]},
        "dtypes": {
            name: torch.zeros(3, dtype=getattr(torch, name))
            for name in ("uint16", "float8_e5m2", "bool", "complex64", "bfloat16", "int8")
        },
        "parameters": {"p": torch.nn.Parameter(one), "q": one.clone().requires_grad_()},
    }


@pytest.mark.parametrize("name", state_dicts())
def test_no_longer_than_what_torch_writes(name: str, tmp_path: Path) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(state_dicts()[name], path)
    ckptfix.open(path).save(out)
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(out) as after:
        old, new = before.read("in/data.pkl"), after.read("in/data.pkl")
    assert is_of_protocol_2(new)
    assert len(new) <= len(old)
    expected, found = torch.load(path, weights_only=True), torch.load(out, weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert write(door.read(out).root) == new


def test_shared_lists_of_one_item_take_no_more_than_python_takes() -> None:
    value = [item for number in range(50) for item in [[number]] * 2 + [{number: 1}] * 2]
    assert len(write(value)) <= len(pickle.dumps(value, 2))


def test_storages_are_numbered_in_the_order_of_the_pickle() -> None:
    from ckptfix import pickles

    made = [Storage(BY_NAME["float32"], 1, "cpu") for _ in range(300)]
    views = [Tensor(storage, storage.dtype, (1,), (1,)) for storage in made]
    root = {"b": views[::-1], "a": views, "s": made[7]}
    data, found = pickles.write(root)
    assert found == made[::-1]
    named = [str(arg) for op, arg, _ in pickletools.genops(data) if op.name == "BINUNICODE"]
    assert [int(name) for name in named if name.isdigit()] == list(range(300))


def test_names_of_more_than_255_shared_objects() -> None:
    value = [[index] for index in range(700)]
    found = through(value * 2)
    assert found == value * 2
    assert all(found[index] is found[index + 700] for index in range(700))


@pytest.mark.parametrize(
    "node", [object(), {1}, 1j, torch.zeros(1), [range(3)]], ids=lambda node: type(node).__name__
)
def test_what_no_tree_may_hold_is_refused(node: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        write(node)


def test_inert_objects_are_written_the_way_they_were_made() -> None:
    name = Global("m", "n")
    for how, opcode in (("reduce", "REDUCE"), ("newobj", "NEWOBJ"), ("obj", "OBJ")):
        assert opcode in opcodes(write(Inert(name, (1,), how=how)))  # type: ignore[arg-type]
    written = write(Inert(name, (), {"a": 1}, "newobj_ex"))
    assert "NEWOBJ_EX" not in opcodes(written)
    assert compare.difference(read(written), Inert(name, (), {"a": 1}, "newobj_ex")) is None
