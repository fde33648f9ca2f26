"""What a state dict holds under each key: shape and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.tensors import as_tensor, is_special_tensor
from ckptfix.report import SPECIAL, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.tree.document import Node


def specs(mapping: Mapping[str, Node]) -> dict[str, Spec]:
    """What a state dict holds under each key."""
    return {key: _spec(node) for key, node in mapping.items()}


def _spec(node: Node) -> Spec:
    tensor = as_tensor(node)
    if tensor is not None:
        return Spec(tensor.shape, tensor.dtype.name)
    return Spec(None, SPECIAL if is_special_tensor(node) else None)
