"""Walking, copying and comparing trees that may share nodes and hold themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes.source import BytesSource
from ckptfix.bytes.span import Span
from ckptfix.tree import compare, walk
from ckptfix.tree.document import Global, Inert, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import BY_NAME
from ckptfix.tree.rebuild import rebuild

FLOAT = BY_NAME["float32"]
NAME = Global("m", "N")


def storage(**changes: Any) -> Storage:
    return Storage(**{"dtype": FLOAT, "numel": 4, "device": "cpu", **changes})


def tensor(held: Storage | None = None, **changes: Any) -> Tensor:
    layout = {"dtype": FLOAT, "shape": (4,), "stride": (1,), **changes}
    return Tensor(held or storage(), **layout)


def everything() -> Any:
    """A tree with each kind of node, sharing and cycles."""
    held, shared = storage(), [1]
    ordered = OrderedMap({"a": tensor(held), "b": tensor(held, offset=0)}, {"_metadata": {}})
    inert = Inert(
        Inert(NAME, (1,)), (shared,), {"k": [2]}, "newobj_ex", True, {"s": ordered},
        items=[shared, tensor()], pairs=[("p", {}), ((1, NAME), 2)],
    )  # fmt: skip
    root: dict[Any, Any] = {"o": ordered, "i": inert, ("key", 1): (shared, (held,)), 1.5: b"x"}
    root["self"] = [root, (inert,)]
    inert.items.append(inert)
    root["hooks"] = tensor(hooks=OrderedMap({1: shared}), metadata={"conj": True})
    return root


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.tuples(st.integers()), inner, max_size=4)
        | st.dictionaries(st.floats(), inner, max_size=4).map(OrderedMap)
        | inner.map(lambda value: Inert(NAME, (value,), items=[value], pairs=[(1, value)]))
        | inner.map(lambda value: [value, value])
    ),
    max_leaves=15,
)


def unshared(node: Any) -> Any:
    """A plain tree as nested tuples, by recursion and without regard to sharing."""
    if isinstance(node, float):
        return (float, repr(node))
    if isinstance(node, Inert):
        return (Inert, node.function, *map(unshared, (node.args, node.items, node.pairs)))
    if isinstance(node, dict):
        return (type(node), *[(unshared(key), unshared(node[key])) for key in node])
    if isinstance(node, (list, tuple)):
        return (type(node), *map(unshared, node))
    return (type(node), node)


def unchanged(node: Any) -> Any:
    return node


# --- walking


def test_each_node_is_met_once_parents_first_in_order_with_its_path() -> None:
    shared = [(1,)]
    root = {"a": shared, "b": {"c": shared, "d": [tensor()]}, 3: OrderedMap({"e": ()})}
    assert [("/".join(path), type(node)) for path, node in walk.walk(root)] == [
        ("", dict), ("a", list), ("a/0", tuple), ("b", dict), ("b/d", list), ("b/d/0", Tensor),
        ("3", OrderedMap), ("3/e", tuple),
    ]  # fmt: skip


def test_what_lies_below_a_node_can_be_left_out() -> None:
    root = {"a": [[1]], "b": {"c": []}}
    walked = walk.walk(root, descend=lambda node: not isinstance(node, list))
    assert ["/".join(path) for path, _ in walked] == ["", "a", "b", "b/c"]


def test_everything_is_reached() -> None:
    nodes = [node for _, node in walk.walk(everything())]
    kinds = {type(node) for node in nodes}
    assert kinds == {dict, list, tuple, OrderedMap, Inert, Tensor, Global, Storage}
    assert len({id(node) for node in nodes}) == len(nodes)


def test_paths_deeper_than_the_cap_stop_growing() -> None:
    root: list[Any] = []
    for _ in range(walk.PATH_DEPTH * 2):
        root = [root]
    depths = [len(path) for path, _ in walk.walk(root)]
    assert depths == [min(depth, walk.PATH_DEPTH) for depth in range(walk.PATH_DEPTH * 2 + 1)]


def test_storages_are_listed_once_in_order() -> None:
    one, two, three = storage(), storage(), storage()
    root = [tensor(two), {"a": tensor(one), "b": tensor(two)}, three]
    assert list(walk.storages(root)) == [two, one, three]


# --- copying


def test_a_copy_is_equal_and_shares_only_what_cannot_change() -> None:
    root = everything()
    copy = rebuild(root, unchanged)
    assert compare.difference(root, copy) is None
    ours, theirs = (
        {
            id(node)
            for _, node in walk.walk(tree, descend=lambda node: not isinstance(node, Tensor))
            if type(node) in (dict, list, OrderedMap, Inert)
        }
        for tree in (root, copy)
    )
    assert len(ours) == len(theirs)
    assert not ours & theirs
    assert copy["self"][0] is copy
    assert copy["i"].items[0] is copy["i"].args[0] is copy[("key", 1)][0]
    assert copy["i"].items[-1] is copy["i"]


@given(plain)
def test_copies_of_any_tree_are_equal(root: Any) -> None:
    assert compare.difference(root, rebuild(root, unchanged)) is None


def test_each_node_is_changed_once_and_what_is_made_of_it_is_visited() -> None:
    met: list[Any] = []
    held = storage()
    shared = tensor(held)

    def change(node: Any) -> Any:
        met.append(node)
        if isinstance(node, Tensor):
            return tensor(node.storage, offset=1, shape=(3,))
        return {"new": [node.pop("old")]} if isinstance(node, dict) and "old" in node else node

    copy = rebuild([shared, {"old": shared}, (shared,)], change)
    assert sum(node is shared for node in met) == 1
    assert copy[0].offset == 1
    assert copy[0] is copy[1]["new"][0] is copy[2][0]


def test_finish_is_given_each_container_and_its_filled_copy() -> None:
    root = everything()
    pairs: list[tuple[Any, Any]] = []
    rebuild(root, unchanged, lambda node, made: pairs.append((node, made)))
    assert {type(node) for node, _ in pairs} == {dict, list, OrderedMap, Inert}
    for node, made in pairs:
        assert type(node) is type(made)
        if not isinstance(node, Inert):
            assert len(node) == len(made)


def test_tuples_that_hold_themselves_through_a_list() -> None:
    inner: list[Any] = []
    root = (inner, 1)
    inner.append(root)
    copy = rebuild(root, unchanged)
    assert copy[0][0] is copy
    assert copy[0] is not inner


def test_shared_nodes_are_not_copied_twice_however_often_they_are_met() -> None:
    for make in (
        lambda node: [node, node],
        lambda node: (node, node),
        lambda node: {1: node, 2: node},
    ):
        root: Any = [1]
        for _ in range(300):
            root = make(root)
        copy = rebuild(root, unchanged)
        assert compare.difference(root, copy) is None
        assert sum(1 for _ in walk.walk(copy)) == 301


# --- comparing


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [
        (1, 1.0, "/"), (1, True, "/"), (0.0, -0.0, "/"), ("a", b"a", "/"), ([1], (1,), "/"),
        ({}, OrderedMap(), "/"), ([1, 2], [1, 3], "/1"), ({"a": [1]}, {"a": [2]}, "/a/0"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "/"), ({1: 1}, {True: 1}, "/"),
        ({1: 1}, {1.0: 1}, "/"),
        ({(1, 2): 0}, {(1, 3): 0}, "/<key>/1"), (OrderedMap(), OrderedMap((), {}), "/"),
        (OrderedMap((), {"v": 1}), OrderedMap((), {"v": 2}), "/<attributes>/v"),
        (NAME, Global("m", "M"), "/"), (NAME, ("m", "N"), "/"), (bytearray(b"a"), b"a", "/"),
        (tensor(), tensor(offset=1), "/"), (tensor(), tensor(stride=(0,)), "/"),
        (tensor(), tensor(requires_grad=True), "/"),
        (tensor(), tensor(dtype=BY_NAME["int32"]), "/"),
        (tensor(), tensor(storage(device="cuda:0")), "/<storage>"),
        (tensor(), tensor(storage(numel=5)), "/<storage>"),
        (tensor(), tensor(storage(dtype=BY_NAME["int32"])), "/<storage>"),
        (tensor(metadata={"conj": True}), tensor(metadata={"conj": False}), "/<metadata>/conj"),
        (tensor(), tensor(hooks=OrderedMap()), "/"),
        (Inert(NAME), Inert(NAME, how="newobj"), "/"),
        (Inert(NAME), Inert(NAME, has_state=True), "/"),
        (Inert(NAME, (1,)), Inert(NAME, (2,)), "/<args>/0"),
        (Inert(NAME, state={}), Inert(NAME, state=OrderedMap()), "/"),
        (Inert(NAME, (), {}), Inert(NAME, ()), "/"),
        (Inert(NAME, items=[1]), Inert(NAME, items=[2]), "/0"),
        (Inert(NAME, pairs=[("a", 1)]), Inert(NAME, pairs=[("a", 2)]), "/a"),
        (Inert(NAME, pairs=[("a", 1)]), Inert(NAME, pairs=[("b", 1)]), "/<key>"),
    ],
)  # fmt: skip
def test_differences_are_found_and_placed(left: Any, right: Any, place: str) -> None:
    assert compare.difference(left, right) == place
    assert compare.difference(right, left) == place


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"), lambda: {float("nan"): 1}, lambda: {(float("nan"), 1): 1},
        lambda: {Inert(NAME): 1}, lambda: Inert(NAME, has_state=True, state={Inert(NAME): 1}),
        lambda: Inert(NAME, has_state=True, state={(NAME, (1,)): [2]}), everything,
    ],
)  # fmt: skip
def test_equal_trees_are_equal(make: Any) -> None:
    assert compare.difference(make(), make()) is None


@given(plain, plain)
def test_plain_trees_differ_where_their_values_do(left: Any, right: Any) -> None:
    assert compare.difference(left, left) is None
    assert (compare.difference(left, right) is None) == (unshared(left) == unshared(right))


def test_a_storage_shared_on_one_side_only_is_a_difference() -> None:
    held = storage()
    tied, untied = [tensor(held), tensor(held)], [tensor(), tensor()]
    for left, right in ((tied, untied), (untied, tied)):
        assert "shared storage" in str(compare.difference(left, right))
    other = storage()
    assert compare.difference(tied, [tensor(other), tensor(other)]) is None


def test_bytes_of_another_crc_are_a_difference() -> None:
    def held(crc: int | None) -> Tensor:
        return tensor(storage(spans=(Span(BytesSource(bytes(16)), 0, 16, crc),)))

    assert compare.difference([held(1)], [held(1)]) is None
    assert compare.difference([held(1)], [held(None)]) is None
    assert compare.difference([held(1)], [held(2)]) == "/0/<storage> (its bytes)"


def test_comparing_trees_that_share_differently_ends() -> None:
    one: Any = [1]
    left: Any = [1]
    right: Any = [1]
    for _ in range(40):
        one, (left, right) = [one, one], ([left, right], [left, right])
    assert compare.difference([one, one], [left, right]) is None
    assert compare.difference([left, right], [one, one]) is None
