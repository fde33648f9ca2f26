"""What torch copies into what: every dtype, quantized and lazy tensors, and what values become."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import KeyMismatchError
from ckptfix.report import describe
from ckptfix.tree.dtypes import BY_NAME, cast_loss, is_copied
from tests.oracles import code_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


NAMES = [name for name in BY_NAME if not name.startswith(("q", "uint4x", "uint2x"))]


@pytest.mark.parametrize("wanted", NAMES)
def test_a_dense_tensor_is_copied_where_torch_copies_it(wanted: str) -> None:
    for found in NAMES:
        source, target = (torch.empty(2, dtype=getattr(torch, name)) for name in (found, wanted))
        try:
            target.copy_(source)
            takes = True
        except (RuntimeError, NotImplementedError):
            takes = False
        assert is_copied(found, wanted) is takes, found


WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def test_a_loss_is_named_where_numbers_do_not_come_back() -> None:
    for found in WHOLE:
        edges = [torch.iinfo(getattr(torch, found)).min, torch.iinfo(getattr(torch, found)).max]
        for wanted in WHOLE:
            given = torch.tensor(edges, dtype=getattr(torch, found))
            taken = torch.zeros(2, dtype=getattr(torch, wanted)).copy_(given)
            assert bool(cast_loss(found, wanted)) is (taken.tolist() != edges), (found, wanted)


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        ("complex64", "float32", 1 + 2j),
        ("complex32", "bfloat16", 1 + 2j),
        ("complex128", "int64", 1 + 2j),
        ("float32", "bool", 0.5),
        ("float32", "uint16", 0.5),
        ("bfloat16", "int64", 0.5),
        ("float8_e5m2", "int8", 0.5),
        ("int64", "bool", 3),
        ("int64", "int32", 2**40),
        ("int8", "uint64", -1),
    ],
)
def test_values_that_change_are_a_warning_of_their_own(
    found: str, wanted: str, value: complex, capsys: pytest.CaptureFixture[str]
) -> None:
    given = torch.full((2,), value, dtype=torch.complex128 if type(value) is complex else None)
    given = given.to(getattr(torch, found))
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.register_buffer('t', torch.zeros(2, dtype=torch.{wanted}))\n"
        "        self.b = torch.nn.Linear(2, 2)\n"
    )
    space: dict[str, type[nn.Module]] = {}
    exec(Path("net.py").read_text(), space)
    model = space["Net"]()
    torch.save({**model.state_dict(), "t": given}, "in.pt")
    model.load_state_dict(torch.load("in.pt"), strict=True)
    assert complex(model.state_dict()["t"][0].item()) != complex(value)
    assert code_of("check", "in.pt", "--model", "net.py:Net") == 0
    assert "warning values-change" in capsys.readouterr().out
    assert code_of("check", "in.pt", "--model", "net.py:Net", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "values-change" in {row["code"] for row in told["findings"]}
    code_of("fix", "in.pt", "out.pt", "--model", "net.py:Net")
    assert f"t ({found} to {wanted}: {cast_loss(found, wanted)})" in capsys.readouterr().err
    for load in (ckptfix.load_into, lambda m, p: ckptfix.load_state_dict(p, model=m)):
        with pytest.warns(UserWarning, match=cast_loss(found, wanted)):
            load(space["Net"](), "in.pt")
    assert "t" in ckptfix.check(model, "in.pt").altered


WIDER = [
    ("float32", "float16"), ("int8", "float64"), ("bool", "uint8"), ("float32", "complex64")
]  # fmt: skip


@pytest.mark.parametrize(("found", "wanted"), WIDER)
def test_what_is_merely_rounded_or_wider_is_another_dtype_and_no_more(
    found: str, wanted: str
) -> None:
    model = nn.Module()
    model.register_buffer("t", torch.zeros(2, dtype=getattr(torch, wanted)))
    torch.save({"t": torch.ones(2, dtype=getattr(torch, found))}, "in.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "in.pt")
        report = ckptfix.load_into(model, "in.pt")
    assert [row.key for row in report.dtype_difference] == ["t"]
    assert report.altered == {}


def per_channel(dtype: torch.dtype, zero: torch.dtype) -> torch.Tensor:
    zeros = torch.zeros(4, dtype=zero)
    return torch.quantize_per_channel(torch.zeros(4, 4), torch.ones(4), zeros, 0, dtype)


QUANTIZED: dict[str, Callable[[], torch.Tensor]] = {
    "qint8": lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8),
    "quint8": lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.quint8),
    "per channel": lambda: per_channel(torch.qint8, torch.int64),
    "float zero points": lambda: per_channel(torch.quint8, torch.float32),
}
GIVEN: dict[str, Callable[[], torch.Tensor]] = QUANTIZED | {
    name: (lambda name=name: torch.ones(4, 4).to(getattr(torch, name)))
    for name in ("float32", "float64", "float16", "int8", "complex64")
}
HEAD = """
import torch
from torch import nn
from functools import partial
per_channel = partial(torch.quantize_per_channel, torch.zeros(4, 4), torch.ones(4))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.register_buffer("t", {})
"""
MADE = {
    "qint8": "torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)",
    "per channel": "per_channel(torch.zeros(4).long(), 0, torch.qint8)",
    "float zero points": "per_channel(torch.zeros(4), 0, torch.quint8)",
    "float32": "torch.zeros(4, 4)",
}


@pytest.mark.parametrize("wanted", MADE)
def test_quantized_tensors_go_where_torch_copies_them_by_every_door(wanted: str) -> None:
    Path("net.py").write_text(HEAD.format(MADE[wanted]))
    space: dict[str, type[nn.Module]] = {}
    exec(Path("net.py").read_text(), space)
    make = space["Net"]
    for given, value in GIVEN.items():
        torch.save({**make().state_dict(), "t": value()}, "in.pt")
        model = make()
        try:
            model.load_state_dict(torch.load("in.pt", weights_only=False), strict=True)
            takes = True
        except RuntimeError:
            takes = False
        assert ckptfix.check(make(), "in.pt").loads is takes, given
        assert code_of("check", "in.pt", "--model", "net.py:Net") == (0 if takes else 1), given
        code = code_of("fix", "in.pt", "out.pt", "--force", "--model", "net.py:Net")
        assert code in ((0, 1) if takes else (2,)), given
        try:
            ckptfix.load_into(make(), "in.pt")
        except KeyMismatchError:
            assert not takes, given
        else:
            assert takes, given


def lazy() -> nn.Module:
    return nn.ModuleDict({"a": nn.LazyLinear(3), "n": nn.LazyBatchNorm1d()})


def whole() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "n": nn.BatchNorm1d(3)})


@pytest.mark.parametrize(("saved", "wanted"), [(lazy, lazy), (whole, lazy), (lazy, whole)])
def test_lazy_modules_that_never_ran(
    saved: Callable[[], nn.Module], wanted: Callable[[], nn.Module]
) -> None:
    torch.save(saved().state_dict(), "in.pt")
    try:
        wanted().load_state_dict(torch.load("in.pt", weights_only=False), strict=True)
        takes = True
    except (RuntimeError, ValueError):
        takes = False
    assert takes is (saved is not lazy or wanted is lazy)
    assert ckptfix.check(wanted(), "in.pt").loads is takes
    if takes:
        assert ckptfix.load_into(wanted(), "in.pt").loads
    else:
        with pytest.raises(KeyMismatchError, match="lazy"):
            ckptfix.load_into(wanted(), "in.pt")


class Given(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def get_extra_state(self) -> object:
        return {"v": 1}


class Old(Given):
    def set_extra_state(self, state: object) -> None:
        if state != {"v": 2}:
            raise RuntimeError("an old version")


@pytest.mark.parametrize("model", [Given, Old])
def test_an_extra_state_that_the_model_does_not_take(model: type[nn.Module]) -> None:
    torch.save({f"module.{key}": value for key, value in model().state_dict().items()}, "in.pt")
    torch.save(model().state_dict(), "bare.pt")
    with pytest.raises(RuntimeError):
        model().load_state_dict(torch.load("bare.pt"), strict=True)
    assert not ckptfix.check(model(), "bare.pt").loads
    for path in ("bare.pt", "in.pt"):
        if model is Given:  # it is left out, by name
            with pytest.warns(UserWarning, match="_extra_state"):
                found = ckptfix.load_state_dict(path, model=model())
            model().load_state_dict(found, strict=True)
        else:
            with pytest.raises(KeyMismatchError, match="an old version"):
                ckptfix.load_into(model(), path)


class Secret:
    """A class that no loader builds."""


class Keeps(Given):
    def get_extra_state(self) -> object:
        return {"secret": Secret()}

    def set_extra_state(self, state: object) -> None:
        assert isinstance(state["secret"], Secret)  # type: ignore[index]


def test_a_model_is_not_asked_about_objects_that_are_not_built() -> None:
    torch.save(Keeps().state_dict(), "in.pt")
    assert ckptfix.check(Keeps(), "in.pt").loads


@pytest.mark.parametrize("depth", ["", "body."])
def test_keys_of_a_module_that_is_none_are_passed_over_and_named(depth: str) -> None:
    body = nn.Module()
    body.a, body.norm = nn.Linear(3, 3), nn.LayerNorm(3)
    body.norm = None  # type: ignore[assignment]
    model = nn.ModuleDict({"body": body}) if depth else body
    state = {**model.state_dict(), f"{depth}norm.weight": torch.ones(3)}
    torch.save(state, "in.pt")
    model.load_state_dict(state, strict=True)
    report = ckptfix.check(model, "in.pt")
    assert report.loads
    assert report.ignored == [f"{depth}norm.weight"]
    assert "1 passed over" in "\n".join(describe(report))
    assert ckptfix.load_into(model, "in.pt").loads
    torch.save({**state, f"{depth}normal.weight": torch.ones(3)}, "in.pt")
    assert not ckptfix.check(model, "in.pt").loads
