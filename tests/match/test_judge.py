"""Reports: what `load_state_dict` would find, and torch itself as the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptfix.contents.specs import specs
from ckptfix.match.judge import compare
from ckptfix.report import Report, Spec, describe, shape
from ckptfix.torch_bridge.describe import describe as tree_of

F32 = "float32"


def specs_of(rows: dict[str, tuple[int, ...]], dtype: str = F32) -> dict[str, Spec]:
    return {key: Spec(size, dtype) for key, size in rows.items()}


def report(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> Report:
    return compare(specs_of(found), specs_of(wanted))


def test_what_matches_is_told_from_what_does_not():
    made = report({"d": (1,), "a": (2, 3), "b": (4,)}, {"a": (2, 3), "b": (5,), "c": (7,)})
    assert made.matched == ["a"]
    assert made.missing == ["c"]
    assert made.unexpected == ["d"]
    assert [(row.key, row.found.shape, row.wanted.shape) for row in made.shape_mismatch] == [
        ("b", (4,), (5,))
    ]
    assert (made.target_numel, made.random_numel) == (18, 12)
    assert made.share == pytest.approx(1 / 3)
    assert not made.loads


def test_another_dtype_loads_and_is_told():
    made = compare(specs_of({"a": (2,)}, "float16"), specs_of({"a": (2,)}))
    assert made.loads
    assert not made.identical
    assert [(row.found.dtype, row.wanted.dtype) for row in made.dtype_difference] == [
        ("float16", F32)
    ]


@pytest.mark.parametrize(
    ("found", "wanted", "loads"),
    [
        (Spec(None, None), Spec((2,), F32), False),
        (Spec(None, None), Spec(None, None), True),
        (Spec((2,), F32), Spec(None, None), True),
        (Spec((2,), F32, "sparse_coo"), Spec((2,), F32), False),
        (Spec((2,), F32, "sparse_coo"), Spec((2,), F32, "sparse_coo"), True),
        (Spec((2,), F32), Spec((2,), F32, "sparse_coo"), False),
        (Spec((2,), F32), Spec((2,), "qint8", "quantized"), True),
        (Spec((3,), F32), Spec(None, None, "lazy"), True),
        (Spec((3,), F32, "sparse_coo"), Spec(None, None, "lazy"), False),
        (Spec((1,), F32), Spec((), F32), True),
        (Spec((), F32), Spec((1,), F32), False),
        (Spec((0, 3), F32), Spec((3, 0), F32), False),
    ],
)
def test_what_has_no_shape_and_what_torch_forgives(found: Spec, wanted: Spec, loads: bool):
    made = compare({"a": found}, {"a": wanted})
    assert made.loads is loads


def test_nothing_against_nothing_loads():
    made = report({}, {})
    assert (made.loads, made.share) == (True, 1.0)
    assert report({"a": (1,)}, {}).share == 0.0


def test_specs_of_a_state_dict_tell_tensors_from_other_values():
    state = {"w": torch.ones(2, 3), "p": nn.Parameter(torch.ones(1)), "n": 3, "s": None}
    assert specs(tree_of(state)) == {
        "w": Spec((2, 3), F32),
        "p": Spec((1,), F32),
        "n": Spec(None, None),
        "s": Spec(None, None),
    }


def test_a_report_as_text_names_every_kind_and_shortens_long_lists():
    made = report({"x": (1,), "b": (2,)}, {"b": (3,), **{f"m{i}": (1,) for i in range(12)}})
    lines = describe(made, limit=10)
    assert lines[0] == "0 of 13 keys match, 0.0% of the elements"
    assert lines[1] == "12 missing, 1 unexpected, 1 of another shape"
    assert lines[2:4] == ["missing: wanted, and not in the file", "  - m0"]
    assert lines[13:] == [
        "  … and 2 more",
        "unexpected: in the file, and not wanted",
        "  + x",
        "of another shape",
        "  ! b: [2], wanted [3]",
    ]
    assert shape(Spec(None, None)) == "no tensor"


SHAPES = st.sampled_from([(2,), (3,), (2, 2)])
STATES = st.dictionaries(st.sampled_from("abcd"), SHAPES)


@given(found=STATES, wanted=STATES)
def test_the_verdict_is_torchs(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
):
    model = nn.ParameterDict({key: torch.zeros(size) for key, size in wanted.items()})
    state = {key: torch.ones(size) for key, size in found.items()}
    made = report(found, wanted)
    try:
        model.load_state_dict(state)
        loaded = True
    except RuntimeError:
        loaded = False
    assert made.loads is loaded
    if not made.shape_mismatch:
        told = model.load_state_dict(state, strict=False)
        assert sorted(told.missing_keys) == sorted(made.missing)
        assert sorted(told.unexpected_keys) == sorted(made.unexpected)
