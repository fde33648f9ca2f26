"""How a state dict compares with a target, as data and as lines of text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ckptfix.words import listed

META = "meta"
"""The kind of a tensor that was saved without its bytes."""


class Spec(NamedTuple):
    """What lies under a key, or is wanted there.

    A value that is no tensor has neither shape nor dtype, nor a kind. Where that is wanted, any
    value is taken.
    """

    shape: tuple[int, ...] | None
    dtype: str | None
    kind: str = ""
    """Empty for what torch calls strided, which nearly every tensor is; otherwise what it is:
    `sparse_coo`, `quantized`, `meta`, `numpy array`, the name of a class."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape) if self.shape is not None else 0


ANYTHING = Spec(None, None)
"""What a target wants under the key of an extra state."""
LAZY = "lazy"
"""The kind of a parameter that takes the shape of what is loaded."""
EXPANDED = "expanded"
"""The kind of a tensor of a model, several elements of which are one place in memory."""
QUANTIZED = {
    "per_tensor_affine": "quantized",
    "per_channel_affine": "quantized per channel",
    "per_channel_affine_float_qparams": "quantized per channel with float zero points",
}
"""Kinds of quantized tensors, by what torch calls their scheme."""


class Difference(NamedTuple):
    """One key whose shape or dtype is not the target's."""

    key: str
    found: Spec
    wanted: Spec
    is_buffer: bool = False
    """Whether the target computes it, and does not learn it."""


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """How a state dict compares with a target. Keys are in the order of the side that has them."""

    matched: list[str]
    """Keys that are in both with equal shapes."""
    missing: list[str]
    """Keys that only the target has; with `strict=False` they stay as they were initialised."""
    unexpected: list[str]
    """Keys that only the state dict has."""
    shape_mismatch: list[Difference]
    """Keys that are in both with other shapes, which torch refuses, with `strict=False` too."""
    dtype_difference: list[Difference]
    """Keys of `matched` whose dtypes differ; torch casts them without a word."""
    target_numel: int
    """Elements that the target wants."""
    random_numel: int
    """Elements of parameters that are missing, which `strict=False` would leave as they were
    initialised, or of another shape or kind, which it refuses. Buffers do not count."""
    kind_mismatch: list[Difference] = field(default_factory=list)
    """Keys that are in both, of kinds that torch does not copy into one another: sparse ones into
    dense ones, or tensors without bytes. It refuses them with `strict=False` too."""
    buffers: list[str] = field(default_factory=list)
    """Keys of `missing` that are buffers: they keep what the model computed for them."""
    forgiven: list[str] = field(default_factory=list)
    """Keys that are not there, and that the model's own `load_state_dict` passes over."""
    filled: list[str] = field(default_factory=list)
    """Keys that are not there, and that the model itself fills: counters of BatchNorm, which torch
    has since 0.4.1."""
    refusals: list[str] = field(default_factory=list)
    """Why it does not load besides: what the model's own loader says, or two tensors that differ
    and are one in the target."""
    absent_numel: int = 0
    """Elements of the target that would not be loaded: missing ones, other shapes and kinds."""
    passed_over: list[str] = field(default_factory=list)
    """Where averages of the weights stand that fit as well, and were not taken."""
    ignored: list[str] = field(default_factory=list)
    """Keys of the state dict that torch passes over: the target has None where they belong."""
    altered: dict[str, str] = field(default_factory=dict)
    """Keys of `dtype_difference` whose values are not merely rounded, and what becomes of them."""
    left_out: bool = False
    """Whether the unexpected keys were left out, as `load_into` leaves them out."""
    assigned: int = 0
    """Parameters and buffers that were on the meta device, and that `load_into` gave memory."""
    on_meta: list[str] = field(default_factory=list)
    """Those that still have none once it is loaded: buffers, mostly, that no file holds."""

    def __repr__(self) -> str:
        if self.loads and not (self.unexpected or self.forgiven or self.on_meta):
            return "<All keys matched successfully>"
        return "\n".join(describe(self, limit=3))

    @property
    def loads(self) -> bool:
        """Whether `load_state_dict(strict=True)` takes the state dict as it stands.

        Of a report that `load_into` returns: whether the model has all that it wants.
        """
        surplus = self.unexpected and not self.left_out
        return self.fits and not surplus

    @property
    def fits(self) -> bool:
        """Whether the target would get all that it wants, whatever else is there."""
        return not (self.missing or self.refused)

    @property
    def refused(self) -> bool:
        """Whether torch refuses something that is there, with `strict=False` too."""
        return bool(self.shape_mismatch or self.kind_mismatch or self.refusals)

    @property
    def changes(self) -> list[str]:
        """What becomes of values that are not merely rounded: `t (float32 to bool: …)`."""
        rows = ((row, self.altered.get(row.key)) for row in self.dtype_difference)
        return [
            f"{it.key} ({it.found.dtype} to {it.wanted.dtype}: {why})" for it, why in rows if why
        ]

    @property
    def identical(self) -> bool:
        """Whether it would succeed without casting anything."""
        return self.loads and not self.dtype_difference

    @property
    def share(self) -> float:
        """The share of the target's elements that would be loaded, from 0 to 1."""
        if not self.target_numel:
            return float(self.loads)
        return 1 - self.absent_numel / self.target_numel


class Section(NamedTuple):
    """Keys of one kind, as a report lists them: a heading, the sign of each row, the rows."""

    title: str
    sign: str
    rows: list[str]


def describe(report: Report, limit: int = 12) -> list[str]:
    """A report as lines of text, as a diff would have them: at most `limit` keys of each kind."""
    lines = counts(report)
    for title, sign, rows in sections(report):
        lines += [title, *(f"  {sign} {row}" for row in rows[:limit])]
        lines += [f"  … and {len(rows) - limit:,} more"] if len(rows) > limit else []
    return lines


def counts(report: Report) -> list[str]:
    """How many keys match, and in a second line how many do not."""
    unlike = len(report.shape_mismatch) + len(report.kind_mismatch)
    total = sum(
        map(len, (report.matched, report.missing, report.forgiven, report.filled)), start=unlike
    )
    share = math.floor(report.share * 1000) / 10  # 100 % is said only of all
    found = {
        "missing": len(report.missing),
        "missing and passed over": len(report.forgiven),
        "missing and filled by the model itself": len(report.filled),
        "unexpected": len(report.unexpected),
        "passed over": len(report.ignored),
        "of another shape": len(report.shape_mismatch),
        "of another kind": len(report.kind_mismatch),
        "of another dtype": len(report.dtype_difference),
    }
    told = [f"{count:,} {what}" for what, count in found.items() if count]
    matched = f"{len(report.matched):,} of {total:,} keys match, {share:.1f}% of the elements"
    return [matched, *([", ".join(told)] if told else [])]


def sections(report: Report) -> list[Section]:
    """Every key that does not match, by kind; kinds without keys are left out."""
    shapes = [
        f"{row.key}: {shape(row.found)}, wanted {shape(row.wanted)}"
        for row in report.shape_mismatch
    ]
    kinds = ["{}: {}, wanted {}".format(row.key, *kinds_of(row)) for row in report.kind_mismatch]
    dtypes = [
        f"{row.key}: {row.found.dtype}, wanted {row.wanted.dtype}"
        + (f": {report.altered[row.key]}" if row.key in report.altered else "")
        for row in report.dtype_difference
    ]
    found = [
        Section("missing: wanted, and not in the file", "-", report.missing),
        Section(
            "missing, and passed over by the model's own load_state_dict", "-", report.forgiven
        ),
        Section("unexpected: in the file, and not wanted", "+", report.unexpected),
        Section("passed over: the model has None in their place", "~", report.ignored),
        Section("of another shape", "!", shapes),
        Section("of another kind (torch does not copy one into the other)", "!", kinds),
        Section("of another dtype (torch casts them when it loads)", "~", dtypes),
    ]
    found.append(Section("refused", "!", report.refusals))
    found.append(Section("still on the meta device", "-", report.on_meta))
    return [section for section in found if section.rows]


def kinds_of(row: Difference) -> tuple[str, str]:
    """What both sides are, with their dtypes where nothing else tells them apart."""
    found, wanted = (spec.kind or "dense" for spec in (row.found, row.wanted))
    if found == wanted or (not row.found.kind and row.wanted.kind in QUANTIZED.values()):
        return f"{found} {row.found.dtype}", f"{wanted} {row.wanted.dtype}"
    return found, wanted


def without_strict(report: Report) -> list[str]:
    """What `strict=False` would make of a state dict that does not load, in sentences."""
    if report.refused and not (report.shape_mismatch or report.kind_mismatch):
        return ["strict=False would not help with what is marked with !."]
    if report.refused:
        return ["strict=False would not help: torch refuses what is marked with ! all the same."]
    told = []
    if report.loads and report.random_numel:
        told.append(
            f"{report.random_numel:,} of {report.target_numel:,} elements stay at random: "
            "the model's own load_state_dict passes over what is not there."
        )
    elif report.random_numel:
        told.append(
            f"With strict=False, {report.random_numel:,} of {report.target_numel:,} elements "
            f"would silently stay at random."
        )
    if report.buffers and not report.loads:
        told.append(
            f"With strict=False, {listed(report.buffers)} would keep what the model gives them."
        )
    return told


def shape(spec: Spec) -> str:
    """A shape as torch prints it: `[2, 3]`."""
    return "no tensor" if spec.shape is None else str(list(spec.shape))
