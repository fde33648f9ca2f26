"""Numbers as bits, held against torch: all patterns of small types, and where large ones turn."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ckptfix.tree import floats
from ckptfix.tree.dtypes import BY_NAME

SMALL = [name for name, form in floats.FORMS.items() if form.bits <= 16] + ["float8_e8m0fnu"]
ALL = [*floats.FORMS, "float8_e8m0fnu"]
rng = np.random.default_rng(19)


def as_torch(numbers: Any, name: str) -> torch.Tensor:
    signed = numbers.view(f"i{numbers.itemsize}").copy()
    return torch.from_numpy(signed).view(getattr(torch, name))


def every(name: str) -> Any:
    size = BY_NAME[name].itemsize
    return np.arange(1 << (8 * size), dtype=f"u{size}")


@cache
def turns(name: str) -> Any:
    """float32 or float64 in which something happens: each value of each small type, the middle
    between two of them, and their neighbours; and numbers at random."""
    size = BY_NAME[name].itemsize
    kind = f"f{size}"
    rows = [rng.integers(0, (1 << (8 * size)) - 1, 100_000, f"u{size}").view(kind)]
    with np.errstate(all="ignore"):
        for small in SMALL:
            values = as_torch(every(small), small).double().sort().values.numpy()
            for around in (values, (values[1:] + values[:-1]) / 2):
                there = around.astype(kind)
                up, down = (np.nextafter(there, there.dtype.type(end)) for end in (np.inf, -np.inf))
                rows += [there, up, down]
    return np.concatenate(rows).view(f"u{size}")


def samples(name: str) -> Any:
    return every(name) if name in SMALL else turns(name)


@pytest.mark.parametrize("after", list(floats.FORMS))
@pytest.mark.parametrize("before", ALL)
def test_a_cast_is_torchs_to_the_bit(before: str, after: str) -> None:
    numbers = samples(before)
    old = as_torch(numbers, before)
    wanted = old.to(getattr(torch, after))
    made = np.empty(len(numbers), f"u{BY_NAME[after].itemsize}")
    losses = floats.Losses()
    for start in range(0, len(numbers), floats.PIECE):
        piece = slice(start, start + floats.PIECE)
        losses = losses.plus(floats.cast(numbers[piece], made[piece], before, after))
    found = as_torch(made, after)
    is_nan = wanted.double().isnan()
    assert torch.equal(is_nan, found.double().isnan())
    size = BY_NAME[after].itemsize
    bits = [one.view(getattr(torch, f"int{8 * size}")) for one in (wanted, found)]
    assert torch.equal(*(torch.where(is_nan, 0, one) for one in bits))
    value = old.double()
    largest = torch.finfo(getattr(torch, after)).max
    beyond = value.isfinite() & ~wanted.double().isfinite()
    if floats.FORMS[after].infinite is None:
        beyond = value.abs() > largest
    tiny = (value != 0) & (wanted.double() == 0)
    assert losses == (int(beyond.sum()), int(tiny.sum()), int(value.isnan().sum()))


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_is_counted_as_torch_counts_it(name: str) -> None:
    numbers = samples(name)
    value = as_torch(numbers, name).double()
    assert floats.count(numbers, name) == (int(value.isnan().sum()), int(value.isinf().sum()))
    for part in np.array_split(numbers, 97):
        finite = bool(as_torch(part, name).double().isfinite().all())
        assert floats.is_finite(part, name) == finite
    finite = numbers[value.isfinite().numpy()]
    assert floats.is_finite(finite, name)
    for number in numbers[~value.isfinite().numpy()][:300]:
        assert not floats.is_finite(np.append(finite[:9], number), name)
    assert floats.is_finite(numbers[:0], name)


def test_numbers_of_the_other_byte_order_are_turned_round() -> None:
    data = np.array([1.5, -2.0], ">f4").tobytes()
    assert floats.words(data, 4, "big").view("f4").tolist() == [1.5, -2.0]
    assert floats.words(data[:1], 1, "big").tolist() == [data[0]]


@pytest.mark.parametrize("row", BY_NAME.values(), ids=str)
def test_every_dtype_with_a_fraction_is_known(row: Any) -> None:
    has_fraction = row.is_floating_point or row.name.startswith("complex")
    assert (floats.part(row) is not None) == has_fraction
