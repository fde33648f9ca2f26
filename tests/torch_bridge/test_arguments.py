"""What functions of the library take, and what they say of what they do not take."""

from __future__ import annotations

import io
import re
import traceback
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import ArgumentError, KeyMismatchError, NotACheckpointError, ReadError
from tests.conftest import FIXTURES
from tests.oracles import unlike

LOADS: dict[str, Any] = {
    "load": ckptfix.load,
    "load_state_dict": ckptfix.load_state_dict,
    "load_into": lambda given: ckptfix.load_into(nn.Linear(2, 2), given),
    "open": ckptfix.open,
    "check": lambda given: ckptfix.check(nn.Linear(2, 2), given),
    "diff": lambda given: ckptfix.diff(given, given),
}


# --- bytes and open files


@pytest.mark.parametrize("name", ["cpu.pt", "legacy.pt", "plain.safetensors"])
def test_bytes_and_open_files_give_what_the_path_gives(name: str, tmp_path: Path) -> None:
    path = FIXTURES / name
    wanted = ckptfix.load(path)
    data = path.read_bytes()
    behind = tmp_path / "behind"
    behind.write_bytes(b"12345" + data)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw, behind.open("rb") as later:
        later.seek(5)
        for given in (data, bytearray(data), memoryview(data), io.BytesIO(data), file, raw, later):
            assert unlike(ckptfix.load(given), wanted) is None
    model = nn.Sequential()
    assert ckptfix.open(data).container == ckptfix.open(path).container
    assert unlike(dict(ckptfix.load_state_dict(io.BytesIO(data))), dict(wanted)) is None
    with pytest.raises(KeyMismatchError):
        ckptfix.load_into(nn.Linear(7, 7), data)
    assert ckptfix.diff(data, path).same
    assert model is not None


def test_what_is_in_memory_can_be_saved(tmp_path: Path) -> None:
    data = (FIXTURES / "ddp.pt").read_bytes()
    ckptfix.open(io.BytesIO(data)).strip_prefix().save(tmp_path / "out.pt")
    assert not any(key.startswith("module.") for key in torch.load(tmp_path / "out.pt"))


def test_what_is_no_checkpoint_in_memory_is_refused_as_in_a_file() -> None:
    for given in (b"", b"<html>", io.BytesIO(b"PK\x03\x04 and no more")):
        with pytest.raises(ReadError):
            ckptfix.load(given)
    with pytest.raises(NotACheckpointError, match="<bytes>"):
        ckptfix.load(b"<!doctype html><html></html>")


def test_a_file_that_cannot_be_read_is_an_error_of_ckptfix(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save({"w": torch.ones(2)}, path)
    with path.open() as text, pytest.raises(ArgumentError, match="is open as text"):
        ckptfix.load(text)  # type: ignore[arg-type]
    with path.open("rb") as closed:
        pass
    with pytest.raises(ReadError, match="closed file"):
        ckptfix.load(closed)
    with path.open("ab") as written, pytest.raises(ReadError, match="cannot be read"):
        ckptfix.load(written)


def kind(given: Any) -> str:
    return type(given).__name__


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "given", [None, 3, 2.5, [], {"w": 1}, object(), Path, "zero\0byte"], ids=kind
)
def test_what_is_no_file_is_told_what_is_wanted(load: str, given: Any) -> None:
    with pytest.raises(ArgumentError) as raised:
        LOADS[load](given)
    assert isinstance(raised.value, TypeError)
    assert raised.value.hint is not None


@pytest.mark.parametrize("load", LOADS)
def test_paths_that_are_not_there_are_errors_of_ckptfix(load: str, tmp_path: Path) -> None:
    for given in (
        "",
        "none.pt",
        "x" * 5000,
        tmp_path,
        str(tmp_path / "none" / "x.pt"),
        "/dev/null",
    ):
        with pytest.raises(ckptfix.CkptfixError):
            LOADS[load](given)


# --- models


def test_swapped_arguments_are_called_that(tmp_path: Path) -> None:
    path, model = FIXTURES / "cpu.pt", nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="the arguments are swapped") as raised:
        ckptfix.load_into(path, model)  # type: ignore[arg-type]
    assert str(raised.value.hint) == "call ckptfix.load_into(model, path)"
    with pytest.raises(ArgumentError, match="this is a class, not a model"):
        ckptfix.load_into(nn.Linear, path)  # type: ignore[arg-type]
    for load in (
        lambda: ckptfix.load_into({}, path),  # type: ignore[arg-type]
        lambda: ckptfix.load_state_dict(path, model={}),  # type: ignore[arg-type]
        lambda: ckptfix.check(3, path),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match=r"an nn\.Module is wanted as the model"):
            load()


def test_what_is_no_path_to_write_to_is_told(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    opened = ckptfix.open(FIXTURES / "cpu.pt")
    calls: list[Any] = [
        lambda: ckptfix.save("a.pt", state),  # type: ignore[arg-type]
        lambda: ckptfix.save(state, None),  # type: ignore[arg-type]
        lambda: opened.save(io.BytesIO()),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="a path is wanted") as raised:
            call()
        assert "ckptfix.save(value, path)" in str(raised.value.hint)
    with pytest.raises(ArgumentError, match=r"an nn\.Module is wanted"):
        opened.check(FIXTURES)  # type: ignore[arg-type]


def test_the_old_order_of_check_works_with_a_warning() -> None:
    path, model = FIXTURES / "cpu.pt", nn.Linear(2, 2)
    with pytest.warns(DeprecationWarning, match=r"check\(model, path\)"):
        report = ckptfix.check(path, model)  # type: ignore[arg-type]
    assert report == ckptfix.check(model, path)


def test_a_load_of_nothing_is_said(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(KeyMismatchError, match="nothing matches"):
        ckptfix.load_into(nn.Linear(2, 2), tmp_path / "in.pt", strict=False)


# --- state dicts


@pytest.mark.parametrize("function", ["strip_prefix", "add_prefix"])
@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        ("a.pt", "not a path", "(ckptfix.load_state_dict(path))"),
        (Path("a.pt"), "not a path", "(ckptfix.load_state_dict(path))"),
        ({"state_dict": {"w": torch.ones(1)}, "epoch": 1}, "has one", "(checkpoint['state_dict'])"),
        (nn.Linear(2, 2), "not a model", "(model.state_dict())"),
        ([1], "not a list", "nn.Module.state_dict"),
        (None, "not a NoneType", "nn.Module.state_dict"),
        ({1: torch.ones(1)}, "1 is no key", "nn.Module.state_dict"),
    ],
)
def test_what_is_no_state_dict_is_told_what_is_wanted(
    function: str, given: Any, said: str, hint: str
) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)) as raised:
        getattr(ckptfix, function)(given)
    assert hint in str(raised.value.hint)
    assert f"hint: {raised.value.hint}" in "".join(traceback.format_exception(raised.value))


def test_a_prefix_that_only_some_keys_carry_is_said_to_stay() -> None:
    given = {"module.a": 1, "module.b": 2, "head": 3}
    with pytest.warns(UserWarning, match=r"2 of 3 keys begin with 'module\.', which stays"):
        assert list(ckptfix.strip_prefix(given)) == list(given)
    assert list(ckptfix.strip_prefix(given, partial=True)) == ["a", "b", "head"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net._orig_mod.module."])
def test_a_model_decides_what_goes(prefix: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    given = OrderedDict((f"{prefix}{key}", value) for key, value in model.state_dict().items())
    found = ckptfix.strip_prefix(given, model=model)
    model.load_state_dict(found)
    assert all(found[key] is given[f"{prefix}{key}"] for key in found)


def test_a_model_that_strips_its_own_child_keeps_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    state = Own().state_dict()
    assert list(ckptfix.strip_prefix(state)) == ["weight", "bias"]
    assert list(ckptfix.strip_prefix(state, model=Own())) == list(state)
    wrapped = ckptfix.add_prefix(state, "module")
    assert list(ckptfix.strip_prefix(wrapped, model=Own())) == list(state)


def test_where_stripping_does_not_help_a_model_that_is_said() -> None:
    with pytest.raises(KeyMismatchError, match=r"does not match Linear") as raised:
        ckptfix.strip_prefix({"module.weight": torch.ones(2, 2)}, model=nn.Linear(2, 2))
    assert raised.value.report.missing == ["bias"]
    state = {"extra": object(), **nn.Linear(2, 2).state_dict()}
    with pytest.raises(KeyMismatchError):
        ckptfix.strip_prefix(state, model=nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="a model decides"):
        ckptfix.strip_prefix(state, "module", model=nn.Linear(2, 2))


# --- errors


def test_every_error_can_be_imported_from_ckptfix() -> None:
    from ckptfix import errors

    there = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.CkptfixError)
    }
    for name in there:
        assert getattr(ckptfix, name) is getattr(errors, name)
        assert name in (errors.__doc__ or "")


def test_loaders_take_limits() -> None:
    path, few = FIXTURES / "cpu.pt", ckptfix.Limits(pickle_bytes=10)
    calls: list[Any] = [
        lambda: ckptfix.load(path, limits=few),
        lambda: ckptfix.load_state_dict(path, limits=few),
        lambda: ckptfix.load_into(nn.Linear(2, 2), path, limits=few),
        lambda: ckptfix.check(nn.Linear(2, 2), path, limits=few),
    ]
    for call in calls:
        with pytest.raises(ckptfix.UnsafeError):
            call()
