"""What messages call the bytes of a storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.state_dicts import find
from ckptfix.tree.document import Tensor
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from ckptfix.tree.document import Node, Storage


def label(root: Node, storage: Storage) -> str:
    """The key of a storage, and the tensor that lies in it: `storage '3' (layer1.weight)`."""
    for state in find(root):
        for key, tensor in state.tensors.items():
            if tensor.storage is storage:
                return f"storage {storage.key!r} ({key})"
    for path, node in walk(root):
        if isinstance(node, Tensor) and node.storage is storage:
            return f"storage {storage.key!r} ({'/'.join(map(str, path)) or 'the tensor itself'})"
    return f"storage {storage.key!r}"
