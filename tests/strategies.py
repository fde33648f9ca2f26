"""Checkpoints for hypothesis: trees of plain values and of tensors of every layout and dtype."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ckptfix.tree.dtypes import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = [
    getattr(torch, name)
    for name, row in BY_NAME.items()  # torch can neither fill nor print those left out
    if not name.startswith(("q", "bits", "float4", "complex32"))
    and (row.itemsize > 1 or name.endswith("int8") or not name.strip("u").startswith("int"))
]
DENSE = [dtype for dtype in DTYPES if BY_NAME[str(dtype)[6:]].safetensors is not None]
SUITE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example; `tmp_path` would be shared by all of them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def strided(data: bytes, dtype: Any, shape: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    """A tensor over a storage of its own that holds `data`."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    storage = flat.clone().untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, offset, tuple(shape), tuple(stride))


@st.composite
def tensors(draw: Callable[..., Any], dtypes: list[Any] = DTYPES) -> torch.Tensor:
    """Of any layout: 0-d, empty, up to 4-d, transposed, cut out, overlapping, expanded."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    stride = list(torch.empty(shape).stride())
    layout = draw(st.sampled_from(["row-major", "transposed", "any"]))
    if layout == "transposed":
        shape, stride = shape[::-1], stride[::-1]
    elif layout == "any":
        stride = draw(st.lists(st.integers(0, 4), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.sampled_from([0, 0, 1, 3]))
    last = sum(max(size - 1, 0) * step for size, step in zip(shape, stride, strict=True))
    numel = offset + last + 1 + draw(st.sampled_from([0, 0, 2]))
    seed = draw(st.integers(0, 255))
    whole = bytes((seed + 37 * index) % 256 for index in range(numel * dtype.itemsize))
    data = bytes(byte & 1 for byte in whole) if dtype is torch.bool else whole
    return strided(data, dtype, shape, stride, offset)


CHARACTERS = st.characters()  # surrogates among them: pickles admit lone ones
KEYS = st.one_of(
    st.text(CHARACTERS, max_size=8),
    st.sampled_from(["", ".", "a..b", "a/b", "../x", "\0", "\ud800", "ключ", "module.w", "pt"]),
    st.integers(95_000, 105_000).map(lambda length: "k" * length),
)
NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(
        [
            "",
            ".",
            "a..b",
            "a/b",
            "ключ",
            "module.w",
            "pt",
            "format",
            "\0",
            "ckptfix.module_versions",
        ]
    ),
    st.just("k" * 100_000),
).filter(lambda name: name != "__metadata__")
INTEGERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 255, 256, 65536, 2**31, -(2**31) - 1, 2**63, -(2**63), 2**1000]),
    st.integers(2000, 3000).map(lambda power: -(2**power)),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), INTEGERS, st.floats(), KEYS, st.binary(max_size=300),
    st.binary(max_size=9).map(bytearray), st.complex_numbers(),
    st.sets(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
)  # fmt: skip
SCALARS = st.one_of(KEYS, st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False))


@st.composite
def trees(draw: Callable[..., Any]) -> Any:
    """Nested containers in which tensors, some of them over one storage, recur."""
    pool = draw(st.lists(tensors(), min_size=1, max_size=3))
    views = [torch.as_strided(one.detach(), (1,), (1,), one.storage_offset()) for one in pool]
    leaves = st.one_of(st.sampled_from([*pool, *views]), LEAVES)
    branches = st.recursive(
        leaves,
        lambda below: st.one_of(
            st.lists(below, max_size=4),
            st.lists(below, max_size=4).map(tuple),
            st.dictionaries(SCALARS, below, max_size=4),
            st.dictionaries(SCALARS, below, max_size=4).map(OrderedDict),
        ),
        max_leaves=12,
    )
    return draw(st.one_of(st.dictionaries(KEYS, branches, max_size=4), branches))


@st.composite
def state_dicts(draw: Callable[..., Any], dtypes: list[Any] = DENSE) -> OrderedDict[str, Any]:
    """Names, some of them tied, and tensors."""
    pool = draw(st.lists(tensors(dtypes), min_size=1, max_size=4))
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    return OrderedDict((name, draw(st.sampled_from(pool))) for name in names)
