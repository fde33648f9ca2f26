"""Weights that may be transposed: where the shapes show it, and where they cannot.

A `Linear` keeps its weight as `[out, in]`. GPT-2's `Conv1D`, TensorFlow, and graph convolutions of
old keep it as `[in, out]`. A square weight has one shape either way, and loads without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.keys.meanings import last_of
from ckptfix.keys.renaming import components_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.report import Difference, Report, Spec

_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""What GPT-2 calls the modules that are a Conv1D in one program, and a Linear in another."""


def is_transposed(row: Difference) -> bool:
    """Whether what was found has the shape that is wanted, turned round."""
    found, wanted = row.found.shape or (), row.wanted.shape or ()
    return len(found) == 2 and found != wanted and found == wanted[::-1]


def unseen(report: Report, wanted: Mapping[str, Spec]) -> list[str]:
    """Square weights that match, of modules which may be a Conv1D, where no other one tells."""
    found = {
        key: wanted[key].shape or ()
        for key in report.matched
        if last_of(key) == "weight" and _CONV1D & set(components_of(key)[-1:])
    }
    square = [key for key, shape in found.items() if len(shape) == 2 and shape[0] == shape[1]]
    return square if len(square) == len(found) else []
