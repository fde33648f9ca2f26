"""Tensors multiplied, as a module would have multiplied them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.torch_bridge.materialize import Materializer, bytes_of
from ckptfix.tree.dtypes import swap_bytes

if TYPE_CHECKING:
    from ckptfix.tree.document import Tensor


def masked_bytes(tensor: Tensor, mask: Tensor, byteorder: str) -> bytes:
    """A tensor times its mask, row-major, in the byte order of the document it is from.

    Source: `torch.nn.utils.prune.BasePruningMethod.apply_mask`.
    """
    materializer = Materializer(byteorder=byteorder)
    weight = materializer.tensor(tensor).detach()
    data = bytearray(bytes_of(materializer.tensor(mask).detach().to(weight.dtype) * weight))
    if byteorder == "big":
        swap_bytes(data, tensor.dtype.word)
    return bytes(data)
