"""Objects of Python's and numpy's classes in checkpoints; torch's full loader is the oracle."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import UnsupportedError
from ckptfix.torch_bridge import plain
from tests.oracles import unlike

if TYPE_CHECKING:
    from pathlib import Path

VALUES = [
    Namespace(lr=0.1, weights=torch.ones(2), deep=Namespace(a=[1])),
    SimpleNamespace(a=1, b={"c": (2,)}),
    Counter("aab"),
    defaultdict(list, {"a": [1, torch.ones(1)]}),
    defaultdict(None, {"a": 1}),
    deque([1, 2], 5),
    deque([Namespace(a=1)]),
    np.float64(1.5),
    np.int32(-3),
    np.bool_(True),
    np.str_("text"),
    np.complex64(1 - 2j),
    np.float32(1).astype(">f4"),
    np.dtype("int16"),
    datetime(2020, 1, 2, 3, tzinfo=UTC),
    datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=2), "there")),
    date(2020, 1, 2),
    timedelta(1, 2),
    pathlib.PurePosixPath("/a/b"),
    pathlib.PureWindowsPath("c:/a"),
    pathlib.PosixPath("runs"),
    Decimal("1.50"),
    Fraction(1, 3),
    range(1, 9, 2),
    slice(1, None),
    complex(1, 2),
]


def saved(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def unsafely(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_known_comes_back_and_can_be_saved_again(
    value: Any, protocol: int, tmp_path: Path
) -> None:
    path = saved({"it": value, "again": value}, tmp_path / "in.pt", pickle_protocol=protocol)
    loaded, theirs = ckptfix.load(path), unsafely(path)
    assert unlike(loaded["it"], theirs["it"]) is None
    assert type(loaded["it"]) is type(value)
    assert loaded["again"] is loaded["it"] or isinstance(value, (np.dtype, np.generic))
    ckptfix.save(loaded, tmp_path / "out.pt")
    assert unlike(unsafely(tmp_path / "out.pt"), theirs) is None


def test_bytes_in_memory_come_back_with_their_position(tmp_path: Path) -> None:
    given = io.BytesIO(b"weights")
    given.seek(3)
    found = ckptfix.load(saved([given], tmp_path / "in.pt"))[0]
    assert (found.getvalue(), found.tell()) == (b"weights", 3)


def test_a_namespace_that_holds_itself(tmp_path: Path) -> None:
    value = Namespace()
    value.own = [value]
    loaded = ckptfix.load(saved({"args": value}, tmp_path / "in.pt"))["args"]
    assert loaded.own[0] is loaded


def test_what_was_given_as_arguments_is_read_as_attributes(tmp_path: Path) -> None:
    path = saved({"args": Namespace(lr=0.1)}, tmp_path / "in.pt")
    assert ckptfix.load(path)["args"].lr == 0.1


class Config:
    """A class of a program of its own."""

    def __init__(self) -> None:
        self.lr = 0.1


def test_what_is_not_built_says_where_its_values_are(tmp_path: Path) -> None:
    found = ckptfix.load(saved([Config()], tmp_path / "in.pt"))[0]
    with pytest.raises(AttributeError, match=r"Config is not built.*see \.attributes\['lr'\]"):
        _ = found.lr
    with pytest.raises(AttributeError, match=r"see \.attributes and \.state"):
        _ = found.momentum
    assert found.attributes["lr"] == 0.1
    for made in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert made.attributes == found.attributes


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "odd",
    [
        Call(Fraction, ("1e999999999",)),
        Call(range, ("a",)),
        Call(Decimal, ("no number",)),
        Call(datetime, (b"short",)),
        Call(deque, ((), -5)),
        Call(Counter, ([1],)),
        Call(defaultdict, (eval,)),
        Call(defaultdict, (list,), None, None, iter([((1, 2), 3)])),
        Call(Namespace, (), {1: 2}),
        Call(Namespace, (1,), {"a": 2}),
        Call(SimpleNamespace, (), [1]),
        Call(np.float64(1).__reduce__()[0], (np.dtype("f8"), b"short")),
        Call(np.float64(1).__reduce__()[0], (np.dtype("O"), b"12345678")),
        Call(np.float64(1).__reduce__()[0], (1, 2)),
        Call(timedelta, ([1],)),
        Call(pathlib.PosixPath, (1,)),
    ],
)
def test_what_no_such_object_pickles_as_stays_inert(odd: Call, tmp_path: Path) -> None:
    path = tmp_path / "in.pkl"
    path.write_bytes(pickle.dumps({"it": odd, "w": torch.ones(2).numpy()}, 2))
    assert isinstance(ckptfix.load(path)["it"], ckptfix.Inert)


class WithState(nn.Linear):
    """A layer that keeps something beside its weights."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def layer(state: Any) -> WithState:
    made = WithState(2, 2)
    made.state = state
    return made


@pytest.mark.parametrize(
    "state",
    [Namespace(scale=2), Counter("ab"), np.float64(3), OrderedDict(a=OrderedDict(b=1)), (1, {2})],
    ids=lambda state: type(state).__name__,
)
def test_extra_state_arrives_as_what_it_was(state: Any, tmp_path: Path) -> None:
    path = saved(layer(state).state_dict(), tmp_path / "in.pt")
    model = layer(None)
    ckptfix.load_into(model, path)
    assert type(model.state) is type(state)
    assert model.state == state
    assert ckptfix.load_state_dict(path)["_extra_state"] == state


@pytest.mark.parametrize("state", [Config(), {"deep": [Config()]}, Namespace(a=Config()), Config])
def test_extra_state_that_cannot_be_built_is_refused_by_name(state: Any, tmp_path: Path) -> None:
    path = saved(layer(state).state_dict(), tmp_path / "in.pt")
    model = layer("its own")
    before = model.weight.clone()
    for load in (
        lambda: ckptfix.load_into(model, path),
        lambda: ckptfix.load_state_dict(path),
        lambda: ckptfix.load_state_dict(path, model=model),
    ):
        with pytest.raises(UnsupportedError, match=r"'_extra_state' is or holds a .*Config"):
            load()
    assert model.state == "its own"
    assert torch.equal(model.weight, before)


def test_without_strict_it_is_left_out_and_named(tmp_path: Path) -> None:
    source = layer(Config())
    path = saved(source.state_dict(), tmp_path / "in.pt")
    model = layer("its own")
    report = ckptfix.load_into(model, path, strict=False)
    assert report.missing == ["_extra_state"]
    assert model.state == "its own"
    assert torch.equal(model.weight, source.weight)
    with pytest.warns(UserWarning, match="left out what cannot be built .*_extra_state"):
        loaded = ckptfix.load_state_dict(path, strict=False)
    assert list(loaded) == ["weight", "bias"]


def test_nothing_of_ckptfix_is_in_a_state_dict(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    state._metadata["0"]["more"] = OrderedDict(a=Namespace(b=1))  # type: ignore[attr-defined]
    loaded = ckptfix.load_state_dict(saved(state, tmp_path / "in.pt"))
    assert unlike(loaded, state) is None
    kept = loaded._metadata["0"]["more"]  # type: ignore[attr-defined]
    assert type(kept) is OrderedDict
    assert kept["a"] == Namespace(b=1)
    assert plain.unknown(dict(loaded._metadata)) == ""  # type: ignore[attr-defined]
