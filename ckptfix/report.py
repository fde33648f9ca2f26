"""How a state dict compares with a target, as data and as lines of text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

SPECIAL = "special"
"""Stands for the dtype of a sparse, quantized or other tensor, whose shape is not looked at."""


class Spec(NamedTuple):
    """What a target wants under a key. A value that is no tensor has neither shape nor dtype."""

    shape: tuple[int, ...] | None
    dtype: str | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape) if self.shape is not None else 0


class Difference(NamedTuple):
    """One key whose shape or dtype is not the target's."""

    key: str
    found: Spec
    wanted: Spec


@dataclass(frozen=True, slots=True)
class Report:
    """How a state dict compares with a target. Keys are in the order of the side that has them."""

    matched: list[str]
    """Keys that are in both with equal shapes."""
    missing: list[str]
    """Keys that only the target has; with `strict=False` they stay as they were initialised."""
    unexpected: list[str]
    """Keys that only the state dict has."""
    shape_mismatch: list[Difference]
    dtype_difference: list[Difference]
    """Keys of `matched` whose dtypes differ; torch casts them without a word."""
    target_numel: int
    """Elements that the target wants."""
    random_numel: int
    """Elements that `strict=False` would leave at random: missing and mismatching ones."""
    passed_over: list[str] = field(default_factory=list)
    """Where averages of the weights stand that fit as well, and were not taken."""
    left_out: bool = False
    """Whether the unexpected keys were left out, as `load_into` leaves them out."""

    @property
    def loads(self) -> bool:
        """Whether `load_state_dict(strict=True)` takes the state dict as it stands.

        Of a report that `load_into` returns: whether the model has all that it wants.
        """
        surplus = self.unexpected and not self.left_out
        return not (self.missing or surplus or self.shape_mismatch)

    @property
    def identical(self) -> bool:
        """Whether it would succeed without casting anything."""
        return self.loads and not self.dtype_difference

    @property
    def share(self) -> float:
        """The share of the target's elements that would be loaded, from 0 to 1."""
        if not self.target_numel:
            return float(self.loads)
        return 1 - self.random_numel / self.target_numel


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
    total = len(report.matched) + len(report.missing) + len(report.shape_mismatch)
    share = math.floor(report.share * 1000) / 10  # 100 % is said only of all
    found = {
        "missing": len(report.missing),
        "unexpected": len(report.unexpected),
        "of another shape": len(report.shape_mismatch),
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
    dtypes = [
        f"{row.key}: {row.found.dtype}, wanted {row.wanted.dtype}"
        for row in report.dtype_difference
    ]
    found = [
        Section("missing: wanted, and not in the file", "-", report.missing),
        Section("unexpected: in the file, and not wanted", "+", report.unexpected),
        Section("of another shape", "!", shapes),
        Section("of another dtype (torch casts them when it loads)", "~", dtypes),
    ]
    return [section for section in found if section.rows]


def shape(spec: Spec) -> str:
    """A shape as torch prints it: `[2, 3]`."""
    return "no tensor" if spec.shape is None else str(list(spec.shape))
