"""Which prefixes fit: found in time that is linear in the length of all keys, odd or not."""

from __future__ import annotations

import pytest

from ckptfix.keys import prefixes, renaming, wrappers

MILLION = 1_000_000
"""Characters of a key that only what is linear gets through."""

ODD = {
    "dots": "." * MILLION,
    "components": "a." * (MILLION // 2) + "w",
    "one component": "a" * MILLION,
    "modules": "module." * (MILLION // 7) + "w",
    "wrappers": "_orig_mod.a." * (MILLION // 12) + "w",
}
NET = ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("odd", ODD)
def test_a_key_of_a_million_characters_is_passed_over(odd: str) -> None:
    keys = [f"module.{key}" for key in NET]
    assert prefixes.fits([*keys, ODD[odd]], NET) == []
    (way,) = prefixes.nearest([*keys, ODD[odd]], NET)
    assert way.removed.startswith("module.")
    assert [way.keys[key] for key in keys] == NET
    assert wrappers.detect([*keys, ODD[odd]]).leading in ((), ("module",))


@pytest.mark.parametrize("odd", ODD)
def test_a_target_with_such_a_key_is_compared_too(odd: str) -> None:
    (way,) = prefixes.fits(["module.x", f"module.{ODD[odd]}"], ["x", ODD[odd]])
    assert way.removed == "module."


@pytest.mark.parametrize("odd", ODD)
def test_its_renaming_is_put_into_words(odd: str) -> None:
    made = wrappers.strip(["module.x", ODD[odd]], partial=True)
    assert isinstance(made.label, str)
    assert made.changed


def test_two_keys_that_differ_everywhere_are_not_compared_one_by_one() -> None:
    old = ".".join(f"a{index}" for index in range(100_000))
    new = ".".join(f"b{index}" for index in range(100_000))
    assert renaming.rename([old], lambda prefix: renaming.prefix_of(new)).label.startswith("remov")


def test_a_long_start_that_all_keys_of_a_target_share_is_not_tried_dot_by_dot() -> None:
    start = "a." * (MILLION // 2)
    (way,) = prefixes.ways(["x.w"], [f"{start}w", f"{start}b.w"], exchange=True)
    assert way.label == "unchanged"


def test_thousands_of_layers_called_alike_are_no_thousands_of_ways() -> None:
    keys = [f"layer{at}.weight" for at in range(50_000)]
    assert len(prefixes.ways(keys, ["weight"])) < 100
    keys = [f"layer{at}.{name}" for at in range(500) for name in ("weight", "bias")]
    assert len(prefixes.ways(keys, ["weight", "bias"])) > 500  # of which shapes may leave one
