"""Errors as data: what they hold, what they print, and that they travel between processes."""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest

from ckptfix import errors
from ckptfix.errors import (
    BusyError,
    ChangedMeaningError,
    CkptfixError,
    DamagedError,
    InPlaceError,
    KeyCollisionError,
    KeyMismatchError,
    OutputExistsError,
    PartialPrefixError,
)
from ckptfix.hints import Hint, adding
from ckptfix.report import Report

REPORT = Report(["a"], ["b"], [], [], [], 2, 1)
SPECIAL = {
    OutputExistsError: lambda: OutputExistsError(where="out.pt"),
    InPlaceError: lambda: InPlaceError("in.pt", "it would grow"),
    BusyError: lambda: BusyError("in.pt"),
    KeyCollisionError: lambda: KeyCollisionError("a", "b", "c"),
    PartialPrefixError: lambda: PartialPrefixError("module.", ["module.a"], ["b"]),
    KeyMismatchError: lambda: KeyMismatchError(REPORT, "differs", where="x", details=["- b"]),
    ChangedMeaningError: lambda: ChangedMeaningError(REPORT, "LoRA", options={"drop": ("*A",)}),
}
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, CkptfixError)
]


def made(cls: type[CkptfixError]) -> CkptfixError:
    make = SPECIAL.get(cls, lambda: cls("is odd", where="x.pt", hint="look", details=["more"]))
    return make().within("folder")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_every_error_can_be_pickled_and_copied(cls: type[CkptfixError], through) -> None:
    error = made(cls)
    other = through(error)
    assert type(other) is cls
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_where_what_and_details_are_put_together() -> None:
    error = CkptfixError("is odd", where="x.pt", details=["- a", "- b"])
    assert (error.where, error.what, error.message) == ("x.pt", "is odd", "x.pt: is odd")
    assert str(error) == "x.pt: is odd\n- a\n- b"
    assert str(error.within("archive.tar")).startswith("archive.tar: x.pt: is odd")
    assert str(CkptfixError("is odd")) == "is odd"


def test_a_traceback_has_the_hint_in_python_and_only_the_last_one() -> None:
    error = CkptfixError("is there", where="x.pt", hint=adding("replace it", "force"))
    error.add_note("a note of somebody else")
    error.suggest(Hint("give another name"))
    told = "".join(traceback.format_exception(error))
    assert "hint: give another name" in told
    assert "replace it" not in told
    assert "a note of somebody else" in told


def test_a_hint_has_the_words_of_python() -> None:
    assert "pass force=True" in "".join(traceback.format_exception(OutputExistsError(where="x")))


def test_an_error_may_have_a_code_of_its_own() -> None:
    assert DamagedError("x").code == "damaged"
    assert DamagedError("x", code="zeros").code == "zeros"
    assert DamagedError.code == "damaged"
    assert str(DamagedError("x").hint) == "copy or download it again"
