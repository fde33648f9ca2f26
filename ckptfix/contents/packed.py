"""Weights that are not there as numbers: without bytes, empty, or packed by a library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.specs import spec
from ckptfix.report import META

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ckptfix.tree.document import Node


def without_bytes(mapping: Mapping[str, Node]) -> list[str]:
    """Keys of tensors that were on the meta device when they were saved."""
    return [key for key, node in mapping.items() if spec(node).kind == META]


def placeholders(mapping: Mapping[str, Node]) -> list[str]:
    """Keys of empty tensors that stand for weights, as DeepSpeed ZeRO-3 leaves them.

    No layer has a weight of shape `[0]`; where one is, what else is empty is a placeholder too.
    """
    empty = [key for key, node in mapping.items() if spec(node).shape == (0,)]
    return empty if any(key.rpartition(".")[2] == "weight" for key in empty) else []


def packed_weights(keys: Collection[str]) -> list[str]:
    """Keys that hold several values in each number, told by what lies beside them.

    So write GPTQ and AWQ (`qweight` beside `qzeros`, `scales`), compressed-tensors
    (`weight_packed`), and bitsandbytes in four bits (`weight.absmax` and others below a weight).
    """
    found = []
    for key in keys:
        module, _, name = key.rpartition(".")
        beside = f"{module}." if module else ""
        if name in _BESIDE and any(f"{beside}{other}" in keys for other in _BESIDE[name]):
            found.append(key)
        elif name == "absmax" and module in keys:
            found.append(module)
    return found


_BESIDE = {
    "qweight": ("qzeros", "scales"),
    "weight_packed": ("weight_scale", "weight_shape"),
    "W_q": ("meta", "scale"),
}
"""What a packed weight is called, and what lies beside it then."""
